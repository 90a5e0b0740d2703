"""Embedding as a service: a model by its name, Documents of any number of requests, vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from docarray import Document

from finetuner.encoding.batcher import Batcher
from finetuner.encoding.jobs import Embedded
from finetuner.encoding.model_pool import LoadedModel, ModelPool
from finetuner.encoding.observer import EncodingObserver
from finetuner.engines import InferenceEngine, TextImageEngine, at_least_one
from finetuner.excepts import ConfigError, DeadlineError, unknown_name
from finetuner.models.backbones import TOWERS

# requests that look a name up, and those that wait for a model to be loaded: the first do not wait
# for the second
_FINDERS, _LOADERS = 8, 8
_UNIT_LENGTH = 1e-3


@dataclass(frozen=True)
class EncodingOptions:
    """What a request asks for beside its Documents.

    Attributes:
        model: its name; None is the service's default.
        owner: who asks; None is whoever started the service.
        select_model: which of two towers; None takes for each Document the one it is for.
        batch_size: see `Batcher.submit`.
        output_dim: so many numbers of the beginning of each embedding, of a model that was
            trained to be good at that length (`matryoshka_dims`); None takes all.
        normalize: whether embeddings are made to have length 1.
        seconds: after which nobody wants the answer any more; None waits for it.
    """

    model: str | None = None
    owner: str | None = None
    select_model: str | None = None
    batch_size: int | None = None
    output_dim: int | None = None
    normalize: bool = False
    seconds: float | None = None


class EncodingService:
    """Embeds for many at once.

    Args:
        models: the models, by name.
        batcher: makes batches over all requests.
        select_model: of requests that do not say.
        observer: hears what happens.
    """

    def __init__(
        self,
        models: ModelPool,
        batcher: Batcher,
        select_model: str | None = None,
        observer: EncodingObserver | None = None,
    ) -> None:
        self.models = models
        self.batcher = batcher
        self._select_model = select_model
        self._observer = observer or EncodingObserver()
        self._finders = ThreadPoolExecutor(_FINDERS, thread_name_prefix='find-model')
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix='load-model')

    async def encode(
        self, docs: Sequence[Document], options: EncodingOptions
    ) -> tuple[Embedded, LoadedModel]:
        """Embed Documents.

        Args:
            docs: Documents, which stay as they are.
            options: see there.

        Returns:
            Their embeddings, and the model that made all of them.

        Raises:
            NotFoundError: there is no such model, or it is not ready yet.
            ConfigError: an option is out of range, or not one of that model.
            TooLargeError: more Documents at a time than may wait.
            TooManyRequestsError: too many wait already.
            DeadlineError: it took longer than it might.
        """
        answer = asyncio.ensure_future(self._encode(docs, options))
        try:
            await asyncio.wait([answer], timeout=options.seconds)
        finally:
            # in time it is over already; else whoever asked has gone or is told so, and what waits
            # is taken out again
            answer.cancel()
        if answer.done():
            return answer.result()
        self._observer.request_refused('deadline')
        raise DeadlineError(
            f'{len(docs):,} Documents were not embedded within {options.seconds:.3g} seconds: send '
            'fewer at a time, or ask again later'
        )

    def close(self) -> None:
        """Answer what was taken, and end the threads."""
        self._finders.shutdown(cancel_futures=True)
        self._loaders.shutdown(cancel_futures=True)
        self.models.close()
        self.batcher.close()

    async def _encode(
        self, docs: Sequence[Document], options: EncodingOptions
    ) -> tuple[Embedded, LoadedModel]:
        model = await self._model(options.model, options.owner)
        engine = self._engine(model, options.select_model)
        output_dim = check_output_dim(engine, options.output_dim)
        future = self.batcher.submit(docs, engine, model.key, options.batch_size)
        embedded = await asyncio.wrap_future(future)
        if output_dim is not None or options.normalize:
            embedded.embeddings = [
                None if each is None else shortened(each, output_dim, options.normalize)
                for each in embedded.embeddings
            ]
        return embedded, model

    def _engine(self, model: LoadedModel, select_model: str | None) -> InferenceEngine:
        if select_model in (None, self._select_model):
            # what all requests get by default is no mistake of one for another model
            is_pair = isinstance(model.engine, TextImageEngine)
            return select_engine(model.engine, self._select_model if is_pair else None)
        return select_engine(model.engine, select_model)

    async def _model(self, name: str | None, owner: str | None) -> LoadedModel:
        if name is None:
            return self.models.get_default()
        loop = asyncio.get_running_loop()
        key, found = await loop.run_in_executor(self._finders, self.models.find, name, owner)
        if found is None:
            found = await loop.run_in_executor(self._loaders, self.models.load, key)
        return found


def select_engine(engine: InferenceEngine, select_model: str | None) -> InferenceEngine:
    """The engine of a tower, or of the whole model where none is named.

    Raises:
        ConfigError: the model has no such tower.
    """
    if select_model is None:
        return engine
    if select_model not in TOWERS:
        raise ConfigError(unknown_name('select_model', select_model, TOWERS))
    if not isinstance(engine, TextImageEngine):
        raise ConfigError(
            f'select_model={select_model!r}: {engine.name} is a single model: leave it out'
        )
    return engine.towers[select_model]


def check_output_dim(engine: InferenceEngine, output_dim: int | None) -> int | None:
    """The length that embeddings are cut to; None where they stay whole.

    Raises:
        ConfigError: the model was not trained to be good at that length.
    """
    if output_dim is None:
        return None
    length = at_least_one('output_dim', output_dim)
    lengths = sorted({*engine.spec.matryoshka_dims, engine.dimension})
    if length not in lengths:
        known = ', '.join(map(str, lengths))
        raise ConfigError(
            f'output_dim={length}: embeddings of this model are good at {known} numbers: take one of '
            'these, or train with matryoshka_dims'
        )
    return None if length == engine.dimension else length


def shortened(embedding: np.ndarray, output_dim: int | None, normalize: bool) -> np.ndarray:
    """The beginning of an embedding; of length 1 where that is asked for, or the whole one was.

    Args:
        embedding: float32 `[dimension]`.
        output_dim: numbers to keep, None for all.
        normalize: whether to make its length 1. A zero vector stays one.
    """
    short = embedding if output_dim is None else embedding[:output_dim]
    had_unit_length = abs(float(np.linalg.norm(embedding)) - 1) <= _UNIT_LENGTH
    if not (normalize or had_unit_length):
        return short
    length = float(np.linalg.norm(short))
    return short / np.float32(length) if length else short
