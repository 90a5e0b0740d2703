"""TrainerExecutor: runs over gRPC and HTTP, each in a process of its own."""

# no postponed annotations: Jina reads those of endpoints as types
import asyncio
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from docarray import Document, DocumentArray
from jina import Executor, requests

from finetuner.client import LocalClient
from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConfigError, DataError, ForbiddenError
from finetuner.runs.dispatcher import DRAIN_SECONDS, MAX_RETRIES, Dispatcher
from finetuner.runs.launching import WorkerLimits, build_launcher
from finetuner.runs.states import ENDED
from finetuner.runs.workspace import Workspace
from finetuner.server import messages  # noqa: F401 - pickles are refused where it is imported
from finetuner.server.admission import fit_requested, refuse_paths, refuse_uris
from finetuner.server.identity import PARAMETER, IdentitySeal
from finetuner.server.parameters import Parameters
from finetuner.server.refusals import log_refusals_briefly
from finetuner.server.uploads import Uploads
from finetuner.storage.tokens import TokenStore

_UPLOAD = ('total', 'upload')
_RUN = ('run', 'experiment')
_FIT = (*RunConfig.__fields__, *_UPLOAD, 'wait')
_POLL_SECONDS = 0.3
# enough for requests that wait on a disk or the database; training is not done here
_NUM_THREADS = 8


class TrainerExecutor(Executor):
    """Starts runs and tells about them.

    `/fit` takes labelled Documents and, as parameters, the arguments of `finetuner.fit`, with
    `total` (how many Documents there are in all), `upload` (one id for the requests they come
    in) and `wait`; or no Documents and `train_data`, the name of data pushed to `/data`. `/runs`,
    `/status`, `/logs`, `/metrics`, `/examples`, `/artifact`, `/cancel`, `/resume` and `/delete`
    take `run` and `experiment`. Answers are Documents with tags. Jina may run one replica of it only, and
    must not retry its requests (`retries: 0`).
    """

    def __init__(
        self,
        upload_seconds: float = 600.0,
        num_workers: int = 1,
        memory_mb: int | None = None,
        num_threads: int | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        **kwargs: Any,
    ) -> None:
        """Open the run store and begin to take runs from its queue.

        Args:
            upload_seconds: an upload is dropped when its next part does not come for so long.
            num_workers: runs that are worked on at a time; others wait.
            memory_mb: a run that takes more is ended.
            num_threads: of each worker's computations; None for one a core.
            drain_seconds: when the server ends, workers have so long to write a checkpoint.
            kwargs: what Jina hands every Executor.
        """
        super().__init__(**kwargs)
        settings = Settings.from_environment()
        limits = WorkerLimits(memory_mb, num_threads)
        launcher = build_launcher(settings, limits)
        self._client = LocalClient(settings, max_retries=MAX_RETRIES)
        self._seal = IdentitySeal.of_home(settings.home)
        self._tokens = TokenStore(self._client.workspace.database)
        self._dispatcher = Dispatcher(Workspace(settings, launcher=launcher), num_workers)
        self._drain_seconds = drain_seconds
        self._dispatcher.start()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix='trainer')
        self._uploads = Uploads(settings.home / 'uploads', upload_seconds, self._threads)
        # from here on: what keeps it from starting is no request
        log_refusals_briefly(self.runtime_args)

    @requests(on='/fit')
    async def fit(self, docs: DocumentArray, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Start a run once all its Documents are there.

        Args:
            docs: labelled Documents, all of them or a part.
            parameters: see the class.

        Returns:
            One Document with the tags run, experiment, status and artifact_id; none while
            Documents are missing.

        Raises:
            ConfigError: a parameter is unknown, missing or out of range.
            DataError: the Documents cannot be trained on.
            ConflictError: the upload or the run's name is taken.
            NotFoundError: no data or artifact of that name.
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, _FIT, self.metas.name)
        total = given.pop_whole_number('total')
        upload = given.pop_text('upload')
        wait = given.pop_flag('wait')
        name = given.pop_text('train_data')
        RunConfig.from_parameters({**given.values, 'train_data': name or 'in the request'})
        refuse_paths(given.values)
        if name is not None:
            if len(docs) or upload is not None:
                raise ConfigError(
                    f'Documents came as well as train_data={name!r}: send one of the two'
                )
            return await self._start(client, {**given.values, 'train_data': name}, {}, wait)
        if not len(docs):
            raise DataError(
                'there is nothing to train on: send labelled Documents, or name data that was '
                'pushed to /data with the parameter train_data'
            )
        refuse_uris(docs)
        # another user's upload of the same name is another upload
        shared = {**given.values, 'wait': wait, 'owner': client.workspace.owner}
        collected = await self._uploads.collect('/fit', docs, total, upload, shared)
        if collected is None:
            return DocumentArray()
        try:
            return await self._start(client, given.values, {'train_data': collected}, wait)
        except Exception:
            self._uploads.forget(upload)  # the mended request may use the same id
            raise

    @requests(on='/data')
    async def data(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Keep Documents under a name that `train_data` and the like then take.

        Args:
            docs: Documents, all of them or a part.
            parameters: name, total, upload.

        Returns:
            One Document with the tags name, data (the content's hash) and total; none while
            Documents are missing.

        Raises:
            ConfigError: a parameter is unknown, missing or out of range.
            DataError: the Documents cannot be kept.
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, ('name', *_UPLOAD), self.metas.name)
        name = given.pop_needed_text('name')
        total = given.pop_whole_number('total')
        upload = given.pop_text('upload')
        if not len(docs):
            raise DataError('there is no Document to keep')
        refuse_uris(docs)
        shared = {'name': name, 'owner': client.workspace.owner}
        collected = await self._uploads.collect('/data', docs, total, upload, shared)
        if collected is None:
            return DocumentArray()
        reference = await self._in_thread(client.push_data, collected, name)
        return _answer({'name': name, 'data': reference, 'total': len(collected)})

    @requests(on='/runs')
    async def runs(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """List runs, newest first.

        Args:
            parameters: experiment, page (from 1), size (1 to 100, default 50).

        Returns:
            One Document a run, its tags as of `/status`.
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, ('experiment', 'page', 'size'), self.metas.name)
        experiment = given.pop_text('experiment')
        page = given.pop_whole_number('page', 1)
        size = given.pop_whole_number('size', 50)
        found = await self._in_thread(client.list_runs, experiment, page, size)
        return DocumentArray([Document(tags=_run_tags(run)) for run in found])

    @requests(on='/status')
    async def status(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Tell how a run stands.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags run, experiment, status, details, artifact_id, progress
            and the run's times, description and config.
        """
        run = await self._about_run(parameters, LocalClient.get_run)
        return _answer(_run_tags(run))

    @requests(on='/logs')
    async def logs(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Read a run's log.

        Args:
            parameters: run, experiment, and `after`: only lines after this id (the tag `last` of
                the answer before; 0 for all).

        Returns:
            One Document: its text is the lines, its tags run, experiment, status, last, and
            ended (whether no more will come).
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, (*_RUN, 'after'), self.metas.name)
        run_name = given.pop_needed_text('run')
        experiment = given.pop_text('experiment', 'default')
        after = given.pop_whole_number('after', 0, minimum=0)
        # the state first: lines written between the two reads are not missed
        run = await self._in_thread(client.get_run, experiment, run_name)
        lines = await self._in_thread(client.read_run_logs, experiment, run_name, after)
        tags = {
            'run': run_name,
            'experiment': experiment,
            'status': run['status'],
            'last': lines[-1][0] if lines else after,
            'ended': run['status'] in ENDED,
        }
        text = '\n'.join(line for _, line in lines)
        return DocumentArray([Document(text=text, tags=tags)])

    @requests(on='/metrics')
    async def metrics(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Read a run's evaluation metrics.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags before, after and p_value, each a metric's value by its name.
        """
        return _answer(await self._about_run(parameters, LocalClient.get_run_metrics))

    @requests(on='/examples')
    async def examples(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Read the results of a run's example queries.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags before and after.
        """
        return _answer(await self._about_run(parameters, LocalClient.get_run_examples))

    @requests(on='/artifact')
    async def artifact(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Fetch a finished run's artifact.

        Args:
            parameters: run and experiment, or artifact_id.

        Returns:
            One Document: its blob is the zip, its tags artifact_id and file_name.
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, (*_RUN, 'artifact_id'), self.metas.name)
        artifact_id = given.pop_text('artifact_id')
        name = artifact_id
        if artifact_id is None:
            name = given.pop_needed_text('run')
            experiment = given.pop_text('experiment', 'default')
            run = await self._in_thread(client.get_run, experiment, name)
            artifact_id = run['artifact_id']
        elif 'run' in given.values:
            raise ConfigError('give run or artifact_id, not both')
        archive, content = await self._in_thread(_zip, client, artifact_id, name)
        tags = {'artifact_id': artifact_id, 'file_name': archive}
        return DocumentArray([Document(blob=content, mime_type='application/zip', tags=tags)])

    @requests(on='/cancel')
    async def cancel(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """End a run that is going.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags of `/status`.
        """
        return _answer(_run_tags(await self._about_run(parameters, LocalClient.cancel_run)))

    @requests(on='/resume')
    async def resume(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Go on with a run that failed, from its last checkpoint.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags of `/status`.

        Raises:
            ConflictError: the run is going, or has finished.
        """
        return _answer(_run_tags(await self._about_run(parameters, LocalClient.resume_run)))

    @requests(on='/delete')
    async def delete(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Delete an ended run with its log, metrics and artifact.

        Args:
            parameters: run, experiment.

        Returns:
            One Document with the tags run, experiment and deleted.
        """
        client = self._client_of(parameters)
        given = Parameters(parameters, _RUN, self.metas.name)
        run, experiment = given.pop_needed_text('run'), given.pop_text('experiment', 'default')
        await self._in_thread(client.delete_run, experiment, run)
        return _answer({'run': run, 'experiment': experiment, 'deleted': True})

    def close(self) -> None:
        """Have runs that are going written to checkpoints and queued, for the next server."""
        if not hasattr(self, '_uploads'):  # the constructor failed
            return
        self._uploads.close()
        self._dispatcher.drain(self._drain_seconds)
        self._dispatcher.workspace.close()
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _client_of(self, parameters: dict[str, Any]) -> LocalClient:
        """The client of whoever asks.

        Raises:
            ForbiddenError: the request came past the gateway, where tokens are checked.
        """
        sealed = parameters.get(PARAMETER)
        if sealed is not None:
            return self._client.for_owner(self._seal.open(sealed).user)
        if self._tokens.any():
            raise ForbiddenError('this Executor takes requests through its gateway only')
        return self._client

    async def _start(
        self, client: LocalClient, parameters: dict[str, Any], data: dict[str, Any], wait: bool
    ) -> DocumentArray:
        run = await self._in_thread(fit_requested, client, parameters, data)
        while wait and run['status'] not in ENDED:
            await asyncio.sleep(_POLL_SECONDS)
            run = await self._in_thread(client.get_run, run['experiment_name'], run['name'])
        tags = _run_tags(run)
        names = ('run', 'experiment', 'status', 'artifact_id', 'details')
        return _answer({name: tags[name] for name in names if tags[name]})

    async def _about_run(
        self, parameters: dict[str, Any], read: Callable[[LocalClient, str, str], Any]
    ) -> Any:
        client = self._client_of(parameters)
        given = Parameters(parameters, _RUN, self.metas.name)
        run, experiment = given.pop_needed_text('run'), given.pop_text('experiment', 'default')
        return await self._in_thread(read, client, experiment, run)

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _zip(client: LocalClient, artifact_id: str, name: str) -> tuple[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(client.download_artifact(artifact_id, folder, name))
        return archive.name, archive.read_bytes()


def _answer(tags: dict[str, Any]) -> DocumentArray:
    return DocumentArray([Document(tags=tags)])


def _run_tags(run: dict[str, Any]) -> dict[str, Any]:
    """A run as tags, under the words that `run` and `experiment` parameters use."""
    others = {key: run[key] for key in run if key not in ('name', 'experiment_name')}
    return {'run': run['name'], 'experiment': run['experiment_name'], **others}
