"""Bad training data ends in an error that says where and what to do, or is left out, counted and named."""

from __future__ import annotations

import gc
import logging
import socket
import tempfile
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from docarray import Document
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

import finetuner
from finetuner.artifact import load_artifact
from finetuner.data.checks import check_training_data
from finetuner.data.collation import TextCollate, stack_contents
from finetuner.data.loading import build_dataset
from finetuner.data.report.describing import describe
from finetuner.data.sources import open_documents
from finetuner.data_cli import app
from finetuner.excepts import ConfigError, DataError, FinetunerError, PictureError, TrainingError
from finetuner.images import load_picture
from finetuner.runs.plan import make_plan
from finetuner.runs.runner import validate_run
from tests.conftest import _GETADDRINFO, make_picture_docs, make_vector_docs
from tests.unit.bad_data_cases_documents import BAD_DOCUMENTS, ODD_BUT_FINE
from tests.unit.bad_data_cases_files import FILES
from tests.unit.bad_data_cases_pictures import BROKEN, OPENED, encoded
from tests.unit.bad_data_cases_sources import BAD_SOURCES
from tests.unit.bad_data_cases_values import good, scored_pairs, sessions, text
from tests.unit.test_runner import config, execute

pytestmark = pytest.mark.timeout(30)
NUM_CASES = 200
BROKEN_PNG = b'\x89PNG\r\n\x1a\n and no more'


@pytest.fixture(autouse=True)
def spool(tmp_path_factory, monkeypatch):
    """Keep temporary files in a folder of their own, to see whether any are left."""
    folder = tmp_path_factory.mktemp('spool')
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    return folder


@pytest.fixture
def nothing_left(spool, finetuner_home):
    """Check that neither temporary files nor anything of a run outlive the test."""
    yield
    if any(spool.glob('finetuner-*')):
        # held by the error of a test, or in a cycle
        gc.collect()
    assert list(spool.glob('finetuner-*')) == []
    assert list(finetuner_home.iterdir()) == []


def check_message(error):
    assert isinstance(error, FinetunerError)
    message = str(error)
    for trace in ('Traceback', 'site-packages', 'File "', '.py", line', '\n'):
        assert trace not in message
    assert 10 < len(message) < 2000


def train_on(source, csv_options=None, **options):
    check_training_data(build_dataset(open_documents(source, csv_options)), **options)


def refuse(source, message, csv_options=None, **options):
    with pytest.raises(FinetunerError, match=message) as found:
        train_on(source, csv_options, **options)
    check_message(found.value)


def test_the_table_is_large():
    cases = [
        *BAD_DOCUMENTS,
        *BAD_SOURCES,
        *BROKEN,
        *FILES,
        *UNFIT,
    ]
    assert len({case.id for case in cases}) == len(cases) >= NUM_CASES


@pytest.mark.parametrize(('make', 'message', 'options'), [*BAD_DOCUMENTS, *BAD_SOURCES])
@pytest.mark.usefixtures('nothing_left')
def test_bad_documents_are_refused(make, message, options):
    refuse(make(), message, **options)


@pytest.mark.parametrize(('make', 'message', 'options'), [*BAD_DOCUMENTS, *BAD_SOURCES])
def test_bad_documents_are_described(make, message, options, capsys):
    docs = make()
    if not isinstance(docs, Sequence) or isinstance(docs, bytes):
        return
    description = describe(docs)
    # nothing is wrong with Documents that are too few for a batch, or for models that are not there
    is_wrong_in_itself = not options and 'there is none yet' not in message
    assert description.problems or not is_wrong_in_itself
    assert all(len(problem) < 2000 for problem in description.problems)


@pytest.mark.parametrize(('make', 'found', 'options'), ODD_BUT_FINE)
def test_odd_documents_are_taken(make, found, options):
    docs = make()
    dataset = build_dataset(open_documents(docs))
    check_training_data(dataset, **options)
    assert (dataset.kind, len(dataset)) == found
    description = describe(docs)
    assert description.problems == ()
    assert (description.kind, description.num_items) == found


@pytest.mark.parametrize(('write', 'message', 'csv_options'), FILES)
@pytest.mark.usefixtures('nothing_left')
def test_bad_files_are_refused(write, message, csv_options, tmp_path):
    path = write(tmp_path)
    if message is None:
        # wrong only in what they hold, which opening it shows
        train_on(path, csv_options)
    else:
        refuse(path, message, csv_options)


@pytest.mark.parametrize(('write', 'message', 'csv_options'), FILES)
@pytest.mark.usefixtures('nothing_left')
def test_bad_files_fail_the_check(write, message, csv_options, tmp_path):
    labeled = ['--labeled'] if csv_options else []
    done = CliRunner().invoke(app, ['check', str(write(tmp_path)), *labeled])
    assert done.exit_code in (1, 2), done.output
    assert isinstance(done.exception, SystemExit)
    assert 'Traceback' not in done.output


def pictures_with(broken, position=5):
    docs = make_picture_docs(num_classes=4, items_per_class=4)
    broken.tags['finetuner_label'] = docs[position].tags['finetuner_label']
    docs[position] = broken
    return docs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that is the working directory and the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    return tmp_path


SHAPE = {'batch_size': 8, 'num_items_per_class': 2}


@pytest.mark.parametrize(('make', 'message'), BROKEN)
@pytest.mark.usefixtures('nothing_left')
def test_broken_pictures_stop_or_are_skipped(make, message, here, caplog):
    data = {'train_data': pictures_with(make(here))}
    with pytest.raises(PictureError, match=f'^train_data: Document 5:? .*({message})') as found:
        validate_run(config(**SHAPE), data)
    check_message(found.value)
    assert "on_broken='skip'" in str(found.value)

    caplog.set_level(logging.WARNING, 'finetuner.run')
    skipping = config(**SHAPE, on_broken='skip')
    validate_run(skipping, data)
    caplog.clear()
    plan = make_plan(skipping, data)
    assert plan.train.num_documents == 15
    assert [plan.train.position_of(index) for index in (4, 5)] == ['Document 4', 'Document 6']
    assert (
        '1 pictures cannot be opened, and with them 1 of 16 Documents are left out' in caplog.text
    )
    assert 'Left out: Document 5' in caplog.text


@pytest.mark.parametrize(('make', 'message'), BROKEN)
def test_broken_pictures_are_described(make, message, here):
    broken = make(here)
    description = describe(pictures_with(broken))
    assert description.num_documents == 16
    # nothing is fetched, and arrays need not be pictures
    if broken.uri and not broken.uri.startswith('http'):
        assert any('Document 5' in problem for problem in description.problems)


def test_hosts_that_no_name_service_would_take(monkeypatch):
    # it fails before anything leaves this machine
    monkeypatch.setattr(socket, 'getaddrinfo', _GETADDRINFO)
    for host in ('a..b', f'{"a" * 70}.org'):
        with pytest.raises(PictureError, match=r"^'http://a.*cannot be fetched: ") as found:
            load_picture(f'http://{host}/a.png', 32)
        check_message(found.value)


@pytest.mark.parametrize(('make', 'message'), OPENED)
@pytest.mark.usefixtures('nothing_left')
def test_odd_pictures_are_opened(make, message, here):
    docs = pictures_with(make(here))
    validate_run(config(**SHAPE), {'train_data': docs})
    assert describe(docs).problems == ()


def test_all_pictures_broken_is_no_run_even_when_skipping():
    docs = [Document(blob=BROKEN_PNG, tags={'finetuner_label': n % 2}) for n in range(8)]
    with pytest.raises(
        PictureError, match=r'^train_data: none of the 8 Documents is left: pictures cannot'
    ):
        validate_run(config(**SHAPE, on_broken='skip'), {'train_data': docs})


def test_too_few_pictures_are_left():
    docs = make_picture_docs(num_classes=2, items_per_class=4)
    for position in (1, 2, 3):
        docs[position].blob = BROKEN_PNG
    with pytest.raises(DataError, match='needs 8 Documents in a batch, and the data has 5'):
        validate_run(
            config(batch_size=8, num_items_per_class=4, on_broken='skip'), {'train_data': docs}
        )


def class_pictures():
    docs = make_picture_docs(num_classes=4, items_per_class=4)
    docs[5].blob = BROKEN_PNG
    return docs


def picture(number, blob=None, **fields):
    blob = blob or encoded(size=(16 + number, 16))
    return Document(id=f'{number}', blob=blob, **fields)


def session_pictures():
    docs = [
        picture(
            10 * n,
            matches=[
                picture(10 * n + place, tags={'finetuner_label': label})
                for place, label in enumerate((1, -1, -1), 1)
            ],
        )
        for n in range(4)
    ]
    docs[2].matches[1].blob = BROKEN_PNG
    return docs


def pair_pictures():
    docs = [
        Document(chunks=[picture(2 * n), picture(2 * n + 1)], tags={'finetuner_score': n / 10})
        for n in range(6)
    ]
    docs[3].chunks[1].blob = BROKEN_PNG
    return docs


@pytest.mark.parametrize(
    ('make', 'loss', 'name', 'num_left_out'),
    [
        pytest.param(class_pictures, 'TripletMarginLoss', 'Document 5', '1 of 16', id='class'),
        # a session loses the match and goes on
        pytest.param(
            session_pictures, 'TripletMarginLoss', 'Document 2, match 1', '0 of 4', id='session'
        ),
        pytest.param(
            pair_pictures, 'CosineSimilarityLoss', 'Document 3, chunk 1', '1 of 6', id='pair'
        ),
    ],
)
def test_runs_leave_broken_pictures_out(make, loss, name, num_left_out, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    options = SHAPE if make is class_pictures else {'batch_size': 8}
    with pytest.raises(PictureError, match=f'^train_data: {name}: '):
        validate_run(config(loss=loss, **options), {'train_data': make()})
    observer = execute(
        tmp_path / 'a', {'train': make()}, loss=loss, epochs=1, on_broken='skip', **options
    )
    assert observer.epochs
    assert np.isfinite([values['train_loss'] for _, values in observer.epochs]).all()
    assert load_artifact(tmp_path / 'a')
    assert f'and with them {num_left_out} Documents are left out' in caplog.text
    assert f'Left out: {name}: ' in caplog.text


def vectors(change=None, count=12):
    """Vectors of two classes; Document 7 holds what is given."""
    docs = make_vector_docs(num_classes=2, items_per_class=count // 2)
    if change is not None:
        docs[7].tensor = change
    return docs


def vector_pairs():
    return [
        Document(
            chunks=[Document(tensor=np.ones(6, np.float32) * n) for n in (1, 2)],
            tags={'finetuner_score': score},
        )
        for score in (0, 1)
    ]


def unfit(name, make, error, message, **options):
    return pytest.param(make, error, message, options, id=f'fit-{name}')


UNFIT = [
    unfit('texts', good, DataError, 'Document 0 became a str, which is no array: give a preproc'),
    unfit('blobs', make_picture_docs, DataError, 'Document 0 became a bytes, which is no array'),
    unfit('missing-labels', lambda: [*good(), text()], DataError, '^train_data: Document 6: label'),
    unfit('none', list, DataError, '^train_data: there are no Documents'),
    unfit('other-length', lambda: vectors(np.ones(5, np.float32)), DataError,
          r'Document 7 became an array of shape \(5,\) and Document \d+ one of \(6,\)'),
    unfit('ragged', lambda: vectors([[1], [1, 2]]), DataError, 'Document 7 became .*no array'),
    unfit('objects', lambda: vectors(np.array([None] * 6)), DataError, 'Document 7 became'),
    unfit('strings', lambda: vectors(np.array(['a'] * 6)), DataError, 'Document 7 became'),
    unfit('nan', lambda: vectors(np.full(6, np.nan, np.float32)), TrainingError,
          'the loss became nan .* look for empty or extreme inputs'),
    unfit('inf', lambda: vectors(np.full(6, np.inf, np.float32)), TrainingError,
          'the loss became nan .* look for empty or extreme inputs'),
    unfit('sparse', lambda: vectors(torch.ones(6).to_sparse()), DataError,
          'Document 7 became a sparse tensor'),
    unfit('complex', lambda: vectors(np.ones(6) * 1j), DataError, 'Document 7 became'),
    unfit('wrong-model', lambda: make_vector_docs(dimension=9), ConfigError,
          'the model does not take what preprocess_fn and collate_fn make of the Documents'),
    unfit('one-class', lambda: make_vector_docs(num_classes=1), DataError, 'have the label 0'),
    unfit('mixed', lambda: [*good(), *sessions()], DataError, 'must be of one kind'),
    unfit('eval-of-another-kind', vectors, DataError, 'eval_data is of kind scored_pair',
          eval_data=vector_pairs),
    unfit('eval-of-one-class', vectors, DataError, '^eval_data: all 8 Documents have the label',
          eval_data=lambda: make_vector_docs(num_classes=1)),
    unfit('pairs-of-texts', scored_pairs, DataError, 'Document 0, chunk 0 became a str',
          loss='CosineSimilarityLoss'),
    unfit('tensors-for-texts', vectors, DataError, 'Document 0 is a ndarray, not a text: text mod',
          collate_fn=TextCollate(Tokenizer(models.WordLevel({'a': 0}, unk_token='a')))),
    unfit('batch-too-large', vectors, DataError, 'use batch_size of at most 12', batch_size=64,
          num_items_per_class=32),
    unfit('items-0', vectors, ConfigError, 'num_items_per_class=0 is not a whole', batch_size=4,
          num_items_per_class=0),
    unfit('views-text', vectors, ConfigError, "views_per_instance: '2'", views_per_instance='2'),
    unfit('name', lambda: 'my-data', ConfigError, "'my-data' is no file, and pushed data is for"),
    unfit('gone', lambda: './gone.csv', DataError, 'there is no file or folder'),
    unfit('not-data', lambda: 5, DataError, 'data is a int'),
]  # fmt: skip


@pytest.mark.parametrize(('make', 'error', 'message', 'options'), UNFIT)
@pytest.mark.usefixtures('nothing_left')
def test_fit_of_a_module_refuses(make, error, message, options, tiny_network):
    options = {'epochs': 1, **options}
    if 'eval_data' in options:
        options['eval_data'] = options['eval_data']()
    with pytest.raises(error, match=message) as found:
        finetuner.fit(tiny_network, make(), **options)
    if error is not ConfigError or 'does not take' not in message:
        check_message(found.value)


def test_fit_of_a_module_skips(tiny_network, caplog):
    docs = vectors()
    docs[7].tags['broken'] = True

    def preprocess(doc):
        if 'broken' in doc.tags:
            raise OSError('disk on fire')
        return doc.tensor

    with pytest.raises(
        DataError, match=r'Document 7 cannot be preprocessed: OSError: disk on fire'
    ):
        finetuner.fit(tiny_network, docs, epochs=1, preprocess_fn=preprocess)
    finetuner.fit(tiny_network, docs, epochs=1, preprocess_fn=preprocess, on_broken='skip')
    assert 'Left out: Document 7 cannot be preprocessed' in caplog.text


@pytest.mark.parametrize('dtype', [np.longdouble, '>f4', np.float16, np.uint16, bool])
def test_fit_of_a_module_takes_odd_numbers(dtype, tiny_network):
    docs = vectors()
    for doc in docs:
        doc.tensor = doc.tensor.astype(dtype)
    finetuner.fit(
        tiny_network, docs, epochs=1, collate_fn=lambda items: stack_contents(items).float()
    )


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named_by_the_description(value):
    problems = describe(vectors(np.full(6, value, np.float32))).problems
    assert any(problem.startswith('Document 7: ') for problem in problems)
