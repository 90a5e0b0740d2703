"""An Executor that takes as long as it is told, and says what reached it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
from docarray import Document, DocumentArray
from jina import Executor, requests

from finetuner.excepts import TooManyRequestsError
from finetuner.server.telemetry import build_observer
from finetuner.server.tracing import stage_span

UNREADY = 'BUSY_UNREADY_FILE'


class Busy(Executor):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observer = build_observer(self.runtime_args)
        self.observer.model_loaded('first', 0.5, 1000)

    @requests(on='/encode')
    async def encode(
        self, docs: DocumentArray, parameters: dict, tracing_context: Any = None, **_: Any
    ) -> DocumentArray:
        self.observer.queue_changed(len(docs))
        self.observer.model_asked('first', True)
        with stage_span(self.tracer, tracing_context, 'embed', {'num_documents': len(docs)}):
            await asyncio.sleep(parameters.get('seconds', 0))
        for doc in docs:
            doc.embedding = np.arange(3, dtype='float32') / 7
            doc.tags['seen'] = {k: str(v) for k, v in parameters.items()}
        self.observer.documents_read(len(docs), min(1, len(docs)), 0.1)
        self.observer.batch_embedded('first', len(docs), 0.01)
        self.observer.queue_changed(0)
        return docs

    @requests(on='/full')
    async def full(self, **_: Any) -> None:
        self.observer.request_refused('queue')
        raise TooManyRequestsError('the queue is full', 7)

    @requests(on='/wait')
    async def wait(self, docs: DocumentArray, parameters: dict, **_: Any) -> DocumentArray:
        await asyncio.sleep(parameters['seconds'])
        return docs

    @requests(on='/ready')
    async def ready(self, **_: Any) -> DocumentArray:
        path = os.environ.get(UNREADY)
        is_ready = not (path and Path(path).exists())
        return DocumentArray([Document(tags={'ready': is_ready, 'reason': 'the model loads'})])
