"""FinetunerExecutor: embeddings from a fine-tuned or pretrained model, over /encode."""

# no postponed annotations: Jina reads those of endpoints as types
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from docarray import Document, DocumentArray
from jina import Executor, requests

from finetuner.config import Settings
from finetuner.encoding.batcher import Batcher, BatcherConfig
from finetuner.encoding.capacity import plan_capacity
from finetuner.encoding.model_pool import ModelPool
from finetuner.encoding.service import EncodingOptions, EncodingService
from finetuner.excepts import ConfigError, DataError, FinetunerError, unknown_name
from finetuner.names import is_alias
from finetuner.server import messages  # noqa: F401 - pickles are refused where it is imported
from finetuner.server.artifact_names import ArtifactNames
from finetuner.server.identity import PARAMETER, IdentitySeal
from finetuner.server.parameters import Parameters
from finetuner.server.parts import ENDPOINT, TIMEOUT_PARAMETER, answer_parts
from finetuner.server.refusals import log_refusals_briefly
from finetuner.server.tags import ERROR_TAG, MODEL_TAG
from finetuner.server.telemetry import build_observer
from finetuner.server.tracing import stage_spans
from finetuner.uris import PicturePolicy

if TYPE_CHECKING:
    from finetuner.engines import InferenceEngine

_CONTENTS = ('text', 'blob', 'tensor', 'uri')
_NESTED = ('chunks', 'matches')
_ROOTS = '@r'
_ACCESS_PATHS = re.compile(r'@?[rcm](?:[.,]?[rcm]){0,31}')
_LEVELS = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')
_PARAMETERS = (
    'artifact',
    'batch_size',
    'return_contents',
    'on_error',
    'select_model',
    'output_dim',
    'normalize',
    'access_paths',
)


class FinetunerExecutor(Executor):
    """Fills the embeddings of Documents.

    `/encode` takes the parameters `artifact` (an artifact id, an alias such as `emoji@latest`, or the
    name of a pretrained model), `select_model`, `batch_size`, `output_dim`, `normalize`,
    `access_paths`, `return_contents` (default false: embeddings, ids and tags come back) and
    `on_error`: with `mark` (the default) a Document that cannot be read comes back without
    embedding, its tag `finetuner_error` saying why; with `raise` it fails the request. `/index`
    and `/search` do the same and leave the contents for the Executor behind this one; `/rank` embeds
    the matches of the Documents too. `/info` tells which model answers, `/ready` whether one does.
    """

    def __init__(
        self,
        artifact: str = 'efficientnet-lite0',
        token: str | None = None,
        batch_size: int | None = None,
        select_model: str | None = None,
        device: str | None = None,
        is_onnx: bool | None = None,
        logging_level: str = 'WARNING',
        precision: str = 'auto',
        num_threads: int | None = None,
        uri_allow: Sequence[str] = (),
        engine: str = 'auto',
        normalize: bool = False,
        access_paths: str = _ROOTS,
        model_memory_mb: float | None = None,
        poll_seconds: float = 1.0,
        max_wait_ms: float = 5.0,
        max_queue: int = 10_000,
        max_queue_mb: int = 1024,
        **kwargs: Any,
    ) -> None:
        """Load the model, so that a server with a wrong one does not start.

        Args:
            artifact: id of a run's artifact, an alias of one, its directory or zip, or the name of
                a pretrained model. For an alias that stands for nothing yet the server waits.
            token: for the server of `finetuner.login`, to fetch artifacts from; those of this
                machine need none.
            batch_size: Documents embedded together, of however many requests; None is what suits
                the device. See `finetuner.encoding.capacity`.
            select_model: which model of an artifact that holds several.
            device: `cpu` or `cuda`; None takes a GPU where there is one.
            is_onnx: True for the exported graph, False for torch, None for the faster at hand.
            logging_level: of this library's log.
            precision: see `finetuner.inference.load_engine`.
            num_threads: of one batch. As many batches as cores allow are embedded at the same
                time; None is one thread each on a CPU.
            uri_allow: folders and addresses below which URIs may be opened; none by default.
            engine: see `finetuner.inference.load_engine`.
            normalize: whether embeddings get the length 1, of requests that do not say.
            access_paths: which Documents are embedded, of requests that do not say: `@r` the
                roots, `@c` their chunks, `@m` their matches, `@r,c` both, and so on.
            model_memory_mb: memory of all models together; the least recently used are let go of.
                None takes 4,096, or half of the machine's where that is less.
            poll_seconds: how often is looked whether an alias stands for another model by now.
            max_wait_ms: how long a Document waits for others to be embedded with.
            max_queue: Documents that may wait; a request for more is refused for the time being.
            max_queue_mb: megabytes of contents that may wait.
            kwargs: what Jina hands every Executor.

        Raises:
            FinetunerError: there is no such artifact or model, or an argument is out of range.
        """
        super().__init__(**kwargs)
        if logging_level not in _LEVELS:
            raise ConfigError(unknown_name('logging_level', logging_level, _LEVELS))
        logging.getLogger('finetuner').setLevel(logging_level)
        self.artifact = artifact
        self._normalize = normalize
        self._access_paths = check_access_paths(access_paths)
        self._seal = IdentitySeal.of_home(Settings.from_environment().home)
        self._names = ArtifactNames(artifact, token)
        policy = PicturePolicy(
            uri_allow=(uri_allow,) if isinstance(uri_allow, str) else tuple(uri_allow or ())
        )

        observer = build_observer(self.runtime_args)

        def start() -> EncodingService:
            from finetuner.inference import best_device

            capacity = plan_capacity(device or best_device(), batch_size, num_threads)
            config = BatcherConfig(
                max_wait_ms=max_wait_ms,
                max_queue=max_queue,
                max_queue_mb=max_queue_mb,
                num_readers=capacity.num_readers,
                num_embedders=capacity.num_embedders,
            )

            def load(key: str) -> 'InferenceEngine':
                return self._names.load_engine(
                    key,
                    batch_size=capacity.batch_size,
                    select_model=select_model,
                    device=device,
                    is_onnx=is_onnx,
                    num_threads=capacity.num_threads,
                    precision=precision,
                    policy=policy,
                    engine=engine,
                )

            models = ModelPool(
                artifact,
                self._names.resolve,
                load,
                is_alias,
                _default_memory_mb() if model_memory_mb is None else model_memory_mb,
                poll_seconds,
                observer,
            )
            return EncodingService(models, Batcher(config, observer), select_model, observer)

        # In a thread of its own: Jina forks this process, and where the parent has used torch,
        # OpenMP hangs in the thread that was forked but not in a new one.
        with ThreadPoolExecutor(1) as starter:
            self._service = starter.submit(start).result()
        # from here on: what keeps it from starting is no request
        log_refusals_briefly(self.runtime_args)

    @requests(on='/encode')
    async def encode(
        self,
        docs: DocumentArray,
        parameters: dict[str, Any],
        tracing_context: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Embed Documents.

        Args:
            docs: Documents with text, tensor, blob, or an allowed uri; their embeddings are filled
                in, and contents dropped unless asked for.
            parameters: see the class.
            tracing_context: of the span of the request, where Jina traces.

        Returns:
            `artifact`, which model answered, and `tokens`, how many its texts had.

        Raises:
            ConfigError: a parameter is unknown or out of range.
            NotFoundError: there is no such artifact.
            DataError: no Document can be read, or one cannot and `on_error` is `raise`.
            TooManyRequestsError: too many wait already.
            DeadlineError: it took longer than it might.
        """
        given = Parameters(parameters, _PARAMETERS, self.metas.name)
        return_contents = given.pop_flag('return_contents')
        answer = await self._embed(docs, given, parameters, tracing_context)
        if not return_contents:
            paths = parameters.get('access_paths') or self._access_paths
            _drop_contents(docs, keep_nested=paths not in ('r', _ROOTS))
        return answer

    @requests(on=ENDPOINT)
    async def encode_parts(
        self,
        docs: DocumentArray,
        parameters: dict[str, Any],
        tracing_context: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Answer small requests to `/encode` that our gateway sends together.

        Args:
            docs: see `answer_parts`, as for all.
            parameters: which Documents are whose among them.
            tracing_context: see `encode`.
        """
        return await answer_parts(self, docs, parameters, tracing_context)

    @requests(on=['/index', '/search'])
    async def encode_for_index(
        self,
        docs: DocumentArray,
        parameters: dict[str, Any],
        tracing_context: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Embed Documents for the Executor behind this one, contents left as they are.

        Args:
            docs: see `encode`.
            parameters: those of `encode`; what others may be there is for that Executor.
            tracing_context: see `encode`.
        """
        known = self._known_of(parameters)
        return await self._embed_for_index(docs, known, parameters, tracing_context)

    @requests(on='/rank')
    async def encode_for_rank(
        self,
        docs: DocumentArray,
        parameters: dict[str, Any],
        tracing_context: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Embed queries and their matches for the Executor behind this one.

        Args:
            docs: queries, the candidates of each as its matches.
            parameters: see `encode_for_index`.
            tracing_context: see `encode`.
        """
        known = self._known_of({**parameters, 'access_paths': '@r,m'})
        return await self._embed_for_index(docs, known, parameters, tracing_context)

    @requests(on='/info')
    async def info(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Tell which model answers.

        Args:
            parameters: none are known.

        Returns:
            One Document with the tags artifact, model, dimension, device, engine, precision,
            is_onnx and models, all that are loaded.
        """
        Parameters(parameters, (), self.metas.name)
        model = self._service.models.get_default()
        engine = model.engine
        tags = {
            'artifact': self._names.shown(model.key),
            'model': engine.name,
            'dimension': engine.dimension,
            'device': engine.device,
            'engine': engine.engine,
            'precision': engine.precision,
            'is_onnx': engine.is_onnx,
            'models': [self._names.shown(each.key) for each in self._service.models.loaded],
        }
        return DocumentArray([Document(tags=tags)])

    @requests(on='/ready')
    async def ready(self, **_: Any) -> DocumentArray:
        """Tell whether the model has answered once.

        Returns:
            One Document with the tags ready and, where it is not, reason.
        """
        models = self._service.models
        return DocumentArray([Document(tags={'ready': models.is_ready, 'reason': models.reason})])

    def close(self) -> None:
        """Let the requests that were taken end."""
        service = getattr(self, '_service', None)
        if service is not None:
            service.close()

    def _known_of(self, parameters: dict[str, Any]) -> Parameters:
        mine = {name: value for name, value in parameters.items() if name in _PARAMETERS}
        mine.pop('return_contents', None)
        return Parameters(mine, _PARAMETERS, self.metas.name)

    async def _embed_for_index(
        self, docs: DocumentArray, given: Parameters, parameters: dict[str, Any], context: Any
    ) -> dict[str, Any]:
        answer = await self._embed(docs, given, parameters, context)
        for doc in docs:
            doc.tags[MODEL_TAG] = answer['artifact']
        return answer

    async def _embed(
        self, docs: DocumentArray, given: Parameters, parameters: dict[str, Any], context: Any
    ) -> dict[str, Any]:
        """Fill in the embeddings of Documents, or say in their tags why there is none."""
        paths = check_access_paths(given.pop_text('access_paths', self._access_paths))
        on_error = given.pop_choice('on_error', ('mark', 'raise'))
        options = EncodingOptions(
            model=given.pop_text('artifact'),
            owner=self._owner(parameters),
            select_model=given.pop_text('select_model'),
            batch_size=given.pop_whole_number('batch_size'),
            output_dim=given.pop_whole_number('output_dim'),
            normalize=given.pop_flag('normalize', self._normalize),
            seconds=parameters.get(TIMEOUT_PARAMETER),
        )
        chosen = docs if paths == _ROOTS else docs[paths]
        embedded, model = await self._service.encode(chosen, options)
        stage_spans(
            self.tracer,
            context,
            embedded.stages,
            {'finetuner.model': model.key, 'finetuner.documents': len(chosen)},
        )
        failures = embedded.failures
        if failures and (on_error == 'raise' or len(failures) == len(chosen)):
            raise _all_in_one(failures)
        for doc, embedding in zip(chosen, embedded.embeddings, strict=True):
            doc.embedding = embedding
        for position, error in failures:
            chosen[position].tags[ERROR_TAG] = str(error)
        return {'artifact': self._names.shown(model.key), 'tokens': embedded.num_tokens}

    def _owner(self, parameters: dict[str, Any]) -> str | None:
        # a gateway of ours says who asks; others take everybody for the machine's own user
        sealed = parameters.get(PARAMETER)
        return None if sealed is None else self._seal.open(sealed).user


def check_access_paths(paths: Any) -> str:
    """Which Documents are embedded, as docarray writes it: `@r`, `@c`, `@r,c`, `@c.m` ...

    Raises:
        ConfigError: it is written otherwise.
    """
    if not isinstance(paths, str) or not _ACCESS_PATHS.fullmatch(paths):
        raise ConfigError(
            f'access_paths={paths!r} names no Documents: @r takes the roots, @c their chunks, @m '
            "their matches, '@r,c' both, '@cc' the chunks of chunks"
        )
    return paths if paths.startswith('@') else f'@{paths}'


def _drop_contents(docs: DocumentArray, keep_nested: bool) -> None:
    for doc in docs:
        doc.pop(*_CONTENTS)
        if not keep_nested:
            doc.pop(*_NESTED)
            continue
        for nested in (doc.chunks, doc.matches):
            _drop_contents(nested, keep_nested)


def _default_memory_mb() -> float:
    import psutil

    return min(4096, psutil.virtual_memory().total / 2**21)


def _all_in_one(failures: list[tuple[int, FinetunerError]]) -> DataError:
    shown = '; '.join(str(error) for _, error in failures[:5])
    more = f'; and {len(failures) - 5} more' if len(failures) > 5 else ''
    return DataError(f'{len(failures)} of the Documents cannot be encoded: {shown}{more}')
