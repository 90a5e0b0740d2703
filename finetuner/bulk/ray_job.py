"""Encoding as a job of a Ray cluster: submitted from anywhere, done by `python -m` this module there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetuner import excepts
from finetuner.bulk.encoding import BulkProgress, EncodedSummary, encode_files
from finetuner.bulk.manifest import MissingInput
from finetuner.bulk.options import BulkOptions
from finetuner.excepts import FinetunerError, ServerError
from finetuner.ray_cluster import AUTO, follow_job, job_command

# what a line of the job's output begins with that is meant for who submitted it
_PROGRESS, _SUMMARY, _ERROR = 'finetuner-progress', 'finetuner-summary', 'finetuner-error'
_LINES_SHOWN = 5


def encode_by_job(
    address: str,
    inputs: list[str],
    options: dict[str, Any],
    on_progress: Callable[[BulkProgress], None],
) -> EncodedSummary:
    """Have a cluster encode a data set, and wait for it; see `finetuner.encode_dataset`.

    Args:
        address: of the cluster's jobs API.
        inputs: files, folders and patterns, as its nodes see them.
        options: of `BulkOptions`, the address aside.
        on_progress: called now and then.

    Raises:
        ServerError: the cluster does not answer, or the job ended without a word.
        FinetunerError: what went wrong there.
    """
    arguments = json.dumps({'inputs': inputs, 'options': options}, default=str)
    command = job_command('finetuner.bulk.ray_job', arguments)
    others: list[str] = []
    outcome: EncodedSummary | FinetunerError | None = None
    with closing(follow_job(address, command, 'finetuner-encode')) as lines:
        # to the end: a job that is left is stopped
        for line in lines:
            begin, _, value = line.partition(': ')
            if begin == _PROGRESS:
                on_progress(BulkProgress(**json.loads(value)))
            elif begin == _SUMMARY:
                outcome = _summary(json.loads(value))
            elif begin == _ERROR:
                kind, message = json.loads(value)
                outcome = getattr(excepts, kind, ServerError)(message)
            else:
                others.append(line)
    if outcome is None:
        tail = ' | '.join(line.strip() for line in others[-_LINES_SHOWN:])
        outcome = ServerError(f'the job ended without a result; its last output: {tail}')
    if isinstance(outcome, FinetunerError):
        raise outcome
    return outcome


def _summary(values: dict[str, Any]) -> EncodedSummary:
    values['missing'] = tuple(MissingInput(**each) for each in values['missing'])
    values['output'] = Path(values['output'])
    return EncodedSummary(**values)


def main() -> int:
    """Encode what the only argument, JSON, says, on the cluster that this process is a job of."""
    given = json.loads(sys.argv[1])
    options = given['options']

    def told(begin: str, value: Any) -> None:
        print(f'{begin}: {json.dumps(value, default=str)}', flush=True)

    try:
        artifact = options['artifact']
        checked = BulkOptions(
            **{
                **options,
                'output': Path(options['output']),
                'artifact': None if artifact is None else Path(artifact),
                'keep': tuple(options['keep']),
                'ray_address': AUTO,
            }
        )
        summary = encode_files(
            given['inputs'], checked, lambda progress: told(_PROGRESS, asdict(progress))
        )
    except FinetunerError as error:
        told(_ERROR, [type(error).__name__, str(error)])
        return 2
    told(_SUMMARY, asdict(summary))
    return 0


if __name__ == '__main__':
    sys.exit(main())
