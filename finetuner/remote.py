"""The client that submits and reads runs on a server, over its REST API."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docarray import Document

from finetuner.artifact_files import archive_name
from finetuner.config import Settings
from finetuner.excepts import ServerError
from finetuner.names import is_alias
from finetuner.runs.submission import NOT_STORED_YET, REFERENCE, build_config, collect_data
from finetuner.transport import PATIENCE_SECONDS, Transport

_RANDOM_ID = re.compile(r'[0-9a-f]{32}')


class RemoteClient:
    """A client of a server: what it fits is trained there, and what it asks is asked there.

    Args:
        host: address of the server, such as `http://127.0.0.1:51080`.
        token: None for a server that wants none.
        settings: where artifacts and data are kept that were fetched from there.
        patience: seconds to go on asking a server that does not answer.
    """

    def __init__(
        self,
        host: str,
        token: str | None = None,
        settings: Settings | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._server = Transport(host, token, patience)
        self._cache = (settings or Settings.from_environment()).home / 'fetched'

    def close(self) -> None:
        """Close the connections; runs go on."""
        self._server.close()

    def who(self) -> dict[str, Any]:
        """`user` and `scope` of the token, and the `version` of the server."""
        return self._server.get('/me')

    # data

    def push_data(
        self, docs: Sequence[Document], name: str | None = None, public: bool = False
    ) -> str:
        """Store Documents on the server by content, under a name too when one is given.

        Local files are read into blobs. What is stored there already is not sent again, and what
        was sent before a connection broke is not either.
        """
        reference = self._upload(docs, keep_ids=name is not None)
        if name is not None:
            self._server.send(
                'PUT', '/data', json={'name': name, 'data': reference, 'public': public}
            )
        return reference

    def load_data(self, reference: str) -> Sequence[Document]:
        """Fetch stored Documents by `sha256:...` or name."""
        from finetuner.data.stored.files import StoredDocuments

        stored = self._server.get('/data/reference', name=reference)['data']
        match = REFERENCE.fullmatch(stored)
        if match is None:
            raise ServerError(f'the server says that {reference!r} is {stored!r}, which is no data')
        sha256 = match[1]
        path = self._cache / 'data' / f'{sha256}.docs'
        self._server.fetch('/data/content', {'reference': stored}, path, sha256)
        return StoredDocuments(path)

    def list_data(self) -> list[dict]:
        """Named data, newest first: name, data, num_documents, num_bytes, public, created_at."""
        return self._server.get('/data')

    def forget_data(self, name: str) -> None:
        """Forget a name; runs that were trained on the data keep it."""
        self._server.send('DELETE', '/data', name=name)

    # runs

    def fit(
        self, parameters: Mapping[str, Any], data: Mapping[str, Sequence[Document] | str]
    ) -> dict:
        """Validate, send the data that is not there yet, and submit the run."""
        given = collect_data(parameters, data)
        # what is wrong with the arguments is known before anything is sent
        build_config(parameters, dict.fromkeys(given, NOT_STORED_YET))
        references = {
            key: value if isinstance(value, str) else self._upload(value)
            for key, value in given.items()
        }
        plain = {k: v for k, v in parameters.items() if k not in ('train_data', 'eval_data')}
        return self._server.send('POST', '/runs', json={'parameters': plain, 'data': references})

    def get_run(self, experiment_name: str, run_name: str) -> dict:
        """Everything about a run but its log and metrics."""
        return self._server.get('/run', experiment=experiment_name, run=run_name)

    def list_runs(
        self, experiment_name: str | None = None, page: int = 1, size: int = 50
    ) -> list[dict]:
        """One page of runs, newest first."""
        return self._server.get('/runs', experiment=experiment_name, page=page, size=size)

    def delete_run(self, experiment_name: str, run_name: str) -> None:
        """Delete an ended run with its artifact, log and metrics."""
        self._server.send('DELETE', '/run', experiment=experiment_name, run=run_name)

    def delete_runs(self, experiment_name: str | None = None) -> None:
        """Delete all runs, of one experiment or of all; none when any is still going."""
        self._server.send('DELETE', '/runs', experiment=experiment_name)

    def cancel_run(self, experiment_name: str, run_name: str) -> dict:
        """End a run that is going, or waits."""
        return self._server.send('POST', '/run/cancel', experiment=experiment_name, run=run_name)

    def resume_run(self, experiment_name: str, run_name: str) -> dict:
        """Go on with a run that failed, from its last checkpoint."""
        return self._server.send('POST', '/run/resume', experiment=experiment_name, run=run_name)

    def share_run(self, experiment_name: str, run_name: str, public: bool) -> dict:
        """Show a run, its log, metrics and artifact to all users of the server, or stop that."""
        place = {'experiment': experiment_name, 'run': run_name}
        return self._server.send('POST', '/run/share', json={'public': public}, **place)

    def get_run_status(self, experiment_name: str, run_name: str) -> dict:
        """`{'status': ..., 'details': ...}`."""
        run = self.get_run(experiment_name, run_name)
        return {'status': run['status'], 'details': run['details']}

    def get_run_logs(self, experiment_name: str, run_name: str) -> str:
        """All log lines so far."""
        return '\n'.join(line for _, line in self.read_run_logs(experiment_name, run_name))

    def read_run_logs(
        self, experiment_name: str, run_name: str, after: int = 0
    ) -> list[tuple[int, str]]:
        """Log lines with their ids, those after an id."""
        found = self._server.get('/run/log', experiment=experiment_name, run=run_name, after=after)
        return [(number, line) for number, line in found['lines']]

    def stream_run_logs(self, experiment_name: str, run_name: str) -> Iterator[str]:
        """Log lines as they come; goes on where it was when a connection breaks."""
        place = {'experiment': experiment_name, 'run': run_name}
        for event, data in self._server.stream('/run/events', place):
            if event == 'line':
                yield data

    def get_run_metrics(self, experiment_name: str, run_name: str) -> dict[str, dict[str, float]]:
        """Evaluation metrics by stage, 'before' and 'after'."""
        return self._server.get('/run/metrics', experiment=experiment_name, run=run_name)

    def get_run_examples(self, experiment_name: str, run_name: str) -> dict[str, dict[str, Any]]:
        """Results of example queries by stage, 'before' and 'after'."""
        return self._server.get('/run/examples', experiment=experiment_name, run=run_name)

    def get_run_curves(self, experiment_name: str, run_name: str) -> dict[str, list[list[Any]]]:
        """Values measured while training: for each name a list of [step, epoch, value]."""
        return self._server.get('/run/curves', experiment=experiment_name, run=run_name)

    def get_run_checkpoints(self, experiment_name: str, run_name: str) -> dict[int, str]:
        """Fetch the models that `TrainingCheckpoint` keeps; their local paths, by epoch from 1."""
        place = {'experiment': experiment_name, 'run': run_name}
        found = self._server.get('/run/checkpoints', **place)
        artifact_id = self.get_run(experiment_name, run_name)['artifact_id']
        paths = {}
        for epoch, files in found.items():
            directory = self._cache / 'checkpoints' / f'{artifact_id}-{int(epoch)}'
            where = {**place, 'epoch': epoch}
            paths[int(epoch)] = str(
                self._server.fetch_files('/run/checkpoints/file', where, files, directory)
            )
        return paths

    # experiments

    def create_experiment(self, name: str, description: str = '') -> dict:
        """Create an experiment."""
        body = {'name': name, 'description': description}
        return self._server.send('POST', '/experiments', json=body)

    def get_experiment(self, name: str) -> dict:
        """Name, status, description, created_at, owner and number of runs."""
        return self._server.get('/experiment', name=name)

    def list_experiments(self, page: int = 1, size: int = 50) -> list[dict]:
        """One page of experiments, newest first."""
        return self._server.get('/experiments', page=page, size=size)

    def delete_experiment(self, name: str) -> dict:
        """Delete an experiment and all its runs; returns what it was."""
        return self._server.send('DELETE', '/experiment', name=name)

    def delete_experiments(self) -> list[dict]:
        """Delete all experiments and all runs; returns what they were."""
        return self._server.send('DELETE', '/experiments')

    # artifacts

    def find_artifact(self, artifact_id: str) -> Path:
        """Local directory of an artifact, fetched when it is not there yet."""
        # files of one artifact, though the alias move meanwhile
        artifact_id = self._id_of(artifact_id)
        files = self._server.get('/artifact', artifact_id=artifact_id)
        directory = self._cache / 'artifacts' / artifact_id
        return self._server.fetch_files(
            '/artifact/file', {'artifact_id': artifact_id}, files, directory
        )

    def download_artifact(self, artifact_id: str, directory: str | Path, run_name: str) -> str:
        """Write an artifact as a zip archive into a directory; returns the archive's path."""
        from finetuner.artifact import zip_artifact

        artifact_id = self._id_of(artifact_id)
        source = self.find_artifact(artifact_id)
        return str(zip_artifact(source, Path(directory) / archive_name(run_name, artifact_id)))

    def resolve_artifact(self, name: str) -> str:
        """The id of the artifact that a name stands for now; an id stands for itself."""
        return self._server.get(_alias_path(name))['artifact_id']

    def set_alias(self, alias: str, artifact_id: str) -> dict:
        """Have an alias stand for an artifact; one that is there moves."""
        return self._server.send('PUT', _alias_path(alias), json={'artifact_id': artifact_id})

    def list_aliases(self) -> list[dict]:
        """Aliases that were set, by name: alias, artifact_id, run, experiment, updated_at."""
        return self._server.get('/aliases')

    def delete_alias(self, alias: str) -> None:
        """Forget an alias; its artifact stays."""
        self._server.send('DELETE', _alias_path(alias))

    def _id_of(self, artifact: str) -> str:
        return self.resolve_artifact(artifact) if is_alias(artifact) else artifact

    def _upload(self, docs: Sequence[Document], keep_ids: bool = False) -> str:
        from finetuner.data.stored.storing import save_documents

        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.push-', dir=self._cache) as folder:
            path = Path(folder) / 'documents'
            sha256 = save_documents(_portable(docs, keep_ids), path)
            self._server.send_file(path, sha256)
        return f'sha256:{sha256}'


def _alias_path(alias: str) -> str:
    # it may hold anything, also what would lead elsewhere in an address
    return f'/aliases/{quote(alias, safe="")}'


def _portable(docs: Sequence[Document], keep_ids: bool) -> Iterator[Document]:
    """Documents that mean the same on another machine.

    Random ids become numbers, unless they are wanted: equal data is then equal to the last byte.
    """
    from finetuner.data.contents import portable_document

    numbers: dict[str, str] = {}
    for position, doc in enumerate(docs):
        twin = portable_document(doc, f'Document {position}', load_file=True)
        for part, source in _parts(twin, doc):
            if source.uri and not part.uri and 'file' not in part.tags:
                part.tags['file'] = source.uri  # what people know it by
            if not keep_ids and _RANDOM_ID.fullmatch(part.id):
                part.id = numbers.setdefault(part.id, str(len(numbers)))
        yield twin


def _parts(twin: Document, doc: Document) -> Iterator[tuple[Document, Document]]:
    from finetuner.data.contents import nested_documents

    yield twin, doc
    for name in ('chunks', 'matches'):
        for inner, source in zip(
            nested_documents(twin, name), nested_documents(doc, name), strict=True
        ):
            yield from _parts(inner, source)
