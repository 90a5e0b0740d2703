"""What an Executor's process logs when a request is refused, and when something breaks."""

import io
import logging
from types import SimpleNamespace

import pytest

from finetuner.excepts import DataError, ServerError
from finetuner.server.refusals import log_refusals_briefly


@pytest.fixture
def written():
    logger = logging.getLogger('encoder/rep-0')
    logger.propagate = False
    output = io.StringIO()
    logger.handlers = [logging.StreamHandler(output)]
    log_refusals_briefly(SimpleNamespace(name='encoder/rep-0'))
    log_refusals_briefly(SimpleNamespace(name='encoder/rep-0'))
    yield output
    logger.handlers, logger.filters = [], []


def log(error: Exception) -> None:
    """As Jina's worker does."""
    try:
        raise error
    except type(error) as caught:
        logging.getLogger('encoder/rep-0').error(
            f'{caught!r}\n add "--quiet-error" to suppress the exception details', exc_info=True
        )


def test_a_refusal_takes_one_short_line(written):
    log(DataError(f'Document 0 holds %s\n\x1b[2J {"a" * 5000}'))
    text = written.getvalue()
    assert text.startswith("refused: DataError: 'Document 0 holds %s\\n\\x1b[2J aaa")
    assert text.count('\n') == 1
    assert len(text) < 400


def test_a_failure_keeps_its_stack(written):
    log(RuntimeError('out of memory'))
    assert 'Traceback' in written.getvalue()
    assert "RuntimeError('out of memory')" in written.getvalue()


def test_a_failure_of_the_server_that_has_a_name_keeps_its_stack_too(written):
    log(ServerError('the index cannot be written'))
    assert 'Traceback' in written.getvalue()


def test_what_is_no_error_stays_as_it_is(written):
    logging.getLogger('encoder/rep-0').warning('a %s', 'b')
    assert written.getvalue() == 'a b\n'


def test_without_a_name_nothing_changes():
    log_refusals_briefly(SimpleNamespace())
    assert not logging.getLogger().filters
