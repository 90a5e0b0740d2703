"""FinetunerExecutor: embeddings from a fine-tuned or pretrained model, over /encode."""

# no postponed annotations: Jina reads those of endpoints as types
import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docarray import Document, DocumentArray
from jina import Executor, requests

from finetuner.config import Settings
from finetuner.excepts import ConfigError, DataError, FinetunerError, unknown_name
from finetuner.server.identity import PARAMETER, IdentitySeal
from finetuner.server.parameters import Parameters
from finetuner.uris import PicturePolicy

if TYPE_CHECKING:
    from finetuner.inference import InferenceEngine

ERROR_TAG = 'finetuner_error'
ARTIFACT_ID = re.compile('[0-9a-f]{24}')
_ENGINES_BESIDE_THE_FIRST = 2
_CONTENTS = ('text', 'blob', 'tensor', 'uri', 'chunks', 'matches')
_LEVELS = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')


class FinetunerExecutor(Executor):
    """Fills the embeddings of Documents.

    `/encode` takes the parameters `artifact` (an artifact id or the name of a pretrained model),
    `batch_size`, `return_contents` (default false: embeddings, ids and tags come back) and
    `on_error`: with `mark` (the default) a Document that cannot be read comes back without
    embedding, its tag `finetuner_error` saying why; with `raise` it fails the request. `/info`
    tells which model answers.
    """

    def __init__(
        self,
        artifact: str = 'efficientnet-lite0',
        token: str | None = None,
        batch_size: int = 32,
        select_model: str | None = None,
        device: str | None = None,
        is_onnx: bool | None = None,
        logging_level: str = 'WARNING',
        precision: str = 'fp32',
        num_threads: int | None = None,
        uri_allow: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Load the model, so that a server with a wrong one does not start.

        Args:
            artifact: id of a run's artifact, its directory or zip, or the name of a pretrained
                model.
            token: for the server of `finetuner.login`, to fetch artifacts from; those of this
                machine need none.
            batch_size: Documents embedded at a time.
            select_model: which model of an artifact that holds several.
            device: `cpu` or `cuda`; None takes a GPU where there is one.
            is_onnx: True for ONNX Runtime, False for torch, None for the faster one at hand.
            logging_level: of this library's log.
            precision: `fp32`.
            num_threads: for one operator; None lets the engine choose.
            uri_allow: folders and addresses below which URIs may be opened; none by default.
            kwargs: what Jina hands every Executor.

        Raises:
            FinetunerError: there is no such artifact or model, or an argument is out of range.
        """
        super().__init__(**kwargs)
        if logging_level not in _LEVELS:
            raise ConfigError(unknown_name('logging_level', logging_level, _LEVELS))
        logging.getLogger('finetuner').setLevel(logging_level)
        self.token = token
        self.artifact = artifact
        self._seal = IdentitySeal.of_home(Settings.from_environment().home)
        self._policy = PicturePolicy(
            uri_allow=(uri_allow,) if isinstance(uri_allow, str) else tuple(uri_allow or ())
        )
        self._batch_size = batch_size
        self._select_model = select_model
        self._device = device
        self._is_onnx = is_onnx
        self._precision = precision
        self._num_threads = num_threads
        self._others: OrderedDict[str, InferenceEngine] = OrderedDict()
        # One thread: requests do not fight over the cores, and the event loop stays free. The
        # model is loaded there too: Jina forks this process, and where the parent has used torch,
        # OpenMP hangs in the thread that was forked but not in a new one.
        self._inference = ThreadPoolExecutor(1, thread_name_prefix='encode')
        self._engine = self._inference.submit(self._load, artifact).result()

    @requests(on='/encode')
    async def encode(
        self, docs: DocumentArray, parameters: dict[str, Any], **_: Any
    ) -> DocumentArray:
        """Embed Documents.

        Args:
            docs: Documents with text, tensor, blob, or an allowed uri.
            parameters: see the class.

        Returns:
            The same Documents in the same order, embeddings filled, contents dropped unless
            asked for.

        Raises:
            ConfigError: a parameter is unknown or out of range.
            NotFoundError: there is no such artifact.
            DataError: no Document can be read, or one cannot and `on_error` is `raise`.
        """
        given = Parameters(
            parameters,
            ('artifact', 'batch_size', 'return_contents', 'on_error'),
            self.metas.name,
        )
        artifact = given.pop_text('artifact')
        batch_size = given.pop_whole_number('batch_size')
        return_contents = given.pop_flag('return_contents')
        on_error = given.pop_choice('on_error', ('mark', 'raise'))
        # a gateway of ours says who asks; others take everybody for the machine's own user
        sealed = parameters.get(PARAMETER)
        owner = None if sealed is None else self._seal.open(sealed).user
        loop = asyncio.get_running_loop()
        failures = await loop.run_in_executor(
            self._inference, self._embed, docs, artifact, batch_size, owner
        )
        if failures and (on_error == 'raise' or len(failures) == len(docs)):
            raise _all_in_one(failures)
        for position, error in failures:
            docs[position].tags[ERROR_TAG] = str(error)
        if not return_contents:
            for doc in docs:
                doc.pop(*_CONTENTS)
        return docs

    @requests(on='/info')
    async def info(self, parameters: dict[str, Any], **_: Any) -> DocumentArray:
        """Tell which model answers.

        Args:
            parameters: none are known.

        Returns:
            One Document with the tags artifact, model, dimension, device and is_onnx.
        """
        Parameters(parameters, (), self.metas.name)
        engine = self._engine
        name = self.artifact
        tags = {
            # a path of this machine is nobody else's business
            'artifact': name if ARTIFACT_ID.fullmatch(name) or name == engine.name else 'local',
            'model': engine.name,
            'dimension': engine.dimension,
            'device': engine.device,
            'is_onnx': engine.is_onnx,
        }
        return DocumentArray([Document(tags=tags)])

    def close(self) -> None:
        """Let the request being embedded end."""
        inference = getattr(self, '_inference', None)
        if inference is not None:
            inference.shutdown(cancel_futures=True)

    def _embed(
        self,
        docs: DocumentArray,
        artifact: str | None,
        batch_size: int | None,
        owner: str | None,
    ) -> list[tuple[int, FinetunerError]]:
        engine = self._engine_for(artifact, owner)
        return engine.encode_documents(docs, batch_size or self._batch_size)

    def _engine_for(self, artifact: str | None, owner: str | None) -> 'InferenceEngine':
        """The engine a request names; the least recently used beyond a few are let go."""
        from finetuner.client import LocalClient, get_client

        if artifact is None or artifact == self.artifact:
            return self._engine
        client = get_client(self.token)
        if owner and isinstance(client, LocalClient) and ARTIFACT_ID.fullmatch(artifact):
            # asked each time: what is loaded for one is not there for another
            client.for_owner(owner).find_artifact(artifact)
        if artifact in self._others:
            self._others.move_to_end(artifact)
            return self._others[artifact]
        engine = self._load(artifact, may_be_path=False)
        self._others[artifact] = engine
        while len(self._others) > _ENGINES_BESIDE_THE_FIRST:
            self._others.popitem(last=False)
        return engine

    def _load(self, artifact: str, may_be_path: bool = True) -> 'InferenceEngine':
        """Load by name, path or id; a request may not name a path of this machine."""
        from finetuner.client import get_client
        from finetuner.inference import build_engine, load_engine
        from finetuner.models.zoo import ALIASES, BACKBONES

        if artifact in BACKBONES or artifact in ALIASES:
            return build_engine(
                artifact,
                batch_size=self._batch_size,
                device=self._device,
                is_onnx=self._is_onnx,
                num_threads=self._num_threads,
                policy=self._policy,
                select_model=self._select_model,
            )
        place = Path(artifact).expanduser()
        if not may_be_path or not place.exists():
            if not ARTIFACT_ID.fullmatch(artifact):
                raise ConfigError(
                    f'{unknown_name("artifact", artifact, (*BACKBONES, *ALIASES))} Or give the id '
                    "of a finished run's artifact, 24 of the characters 0-9a-f"
                )
            place = get_client(self.token).find_artifact(artifact)
        return load_engine(
            place,
            batch_size=self._batch_size,
            select_model=self._select_model,
            device=self._device,
            is_onnx=self._is_onnx,
            num_threads=self._num_threads,
            precision=self._precision,
            policy=self._policy,
        )


def _all_in_one(failures: list[tuple[int, FinetunerError]]) -> DataError:
    shown = '; '.join(str(error) for _, error in failures[:5])
    more = f'; and {len(failures) - 5} more' if len(failures) > 5 else ''
    return DataError(f'{len(failures)} of the Documents cannot be encoded: {shown}{more}')
