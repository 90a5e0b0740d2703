"""Documents that come in several requests and count only once all are there."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor as ThreadPool
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from docarray import Document, DocumentArray

from finetuner.data.stored.files import StoredDocuments, spool_documents
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import ConfigError, ConflictError, DataError

logger = logging.getLogger(__name__)

MEND = (
    "Jina's client cuts what it posts into requests of 100, so say how many Documents there are "
    "in all: client.post('{endpoint}', inputs=docs, parameters={{'total': len(docs), "
    "'upload': '<any id of your own>', ...}}), or let finetuner.server.{helper}() build the "
    'arguments'
)


@dataclass
class _Upload:
    """One set of Documents on its way."""

    total: int
    parameters: dict[str, Any]
    directory: Path
    promised: int = 0  # Documents accepted
    stored: int = 0  # Documents on disk
    parts: list[Path] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Uploads:
    """Uploads in progress: parts on disk, dropped when the rest does not come."""

    def __init__(self, directory: Path, seconds: float, threads: ThreadPool) -> None:
        """Clear away what an earlier server left behind.

        Args:
            directory: where parts are kept until an upload is complete.
            seconds: how long to wait for the next part.
            threads: where files are read and written.
        """
        self._directory = directory
        self._seconds = seconds
        self._threads = threads
        self._open: dict[str, _Upload] = {}
        self._complete: dict[str, float] = {}
        self._sweep()

    async def collect(
        self,
        endpoint: str,
        docs: DocumentArray,
        total: int | None,
        upload: str | None,
        parameters: Mapping[str, Any],
    ) -> Sequence[Document] | None:
        """Take the Documents of one request.

        Args:
            endpoint: where they came, for the messages.
            docs: the Documents of this request.
            total: how many there are in all.
            upload: the id that requests of one upload share.
            parameters: the rest of the parameters, which they share too.

        Returns:
            All Documents when they are there, None while some are missing.

        Raises:
            ConfigError: `total` is missing, or `upload` where it is needed.
            DataError: there are more Documents than `total`.
            ConflictError: the id was used before, or with other parameters.
        """
        helper = 'fit_request' if endpoint == '/fit' else 'data_request'
        mend = MEND.format(endpoint=endpoint, helper=helper)
        if total is None:
            raise ConfigError(
                f"parameter 'total' is missing and this request holds {len(docs)} Documents. {mend}"
            )
        if len(docs) > total:
            raise DataError(f'{len(docs)} Documents came, more than total={total}')
        if upload is None:
            if len(docs) == total:
                return docs
            raise ConfigError(
                f'this request holds {len(docs)} of total={total} Documents and no '
                f"parameter 'upload' says where the others belong. {mend}"
            )
        return await self._add(upload, docs, total, dict(parameters, endpoint=endpoint))

    async def _add(
        self, upload: str, docs: DocumentArray, total: int, parameters: dict[str, Any]
    ) -> Sequence[Document] | None:
        now = time.monotonic()
        self._complete = {key: until for key, until in self._complete.items() if until > now}
        if upload in self._complete:
            raise ConflictError(f'upload {upload!r} is complete: begin another under a new id')
        state = self._open.get(upload)
        if state is None:
            state = _Upload(total, parameters, self._directory / uuid.uuid4().hex)
            self._open[upload] = state
        elif state.total != total or state.parameters != parameters:
            raise ConflictError(
                f'upload {upload!r} was begun with other parameters: '
                'all its requests carry the same, `total` included'
            )
        if state.promised + len(docs) > total:
            self.forget(upload)
            raise DataError(
                f'upload {upload!r} dropped: {state.promised + len(docs)} Documents came, '
                f'more than total={total}'
            )
        state.promised += len(docs)
        part = state.directory / f'{len(state.parts):06}.docs'
        state.parts.append(part)
        self._restart_timer(upload, state)
        if not await self._store(upload, state, docs, part):
            return None
        self.complete(upload)
        return await self._in_thread(_join, state.parts, state.directory)

    async def _store(self, upload: str, state: _Upload, docs: DocumentArray, part: Path) -> bool:
        """Write one part; true when it was the last missing."""
        try:
            await self._in_thread(_write, docs, part)
        except OSError:
            self.forget(upload)  # a full disk leaves no half upload behind
            raise
        if self._open.get(upload) is not state:  # dropped while this part was being written
            shutil.rmtree(state.directory, ignore_errors=True)
            raise ConflictError(f'upload {upload!r} was dropped: begin another')
        state.stored += len(docs)
        return state.stored == state.total

    def complete(self, upload: str) -> None:
        """Close an upload whose Documents are all there; its id stays taken for a while."""
        state = self._open.pop(upload)
        if state.timer is not None:
            state.timer.cancel()
        self._complete[upload] = time.monotonic() + self._seconds

    def forget(self, upload: str | None) -> None:
        """Drop an upload and free its id, complete or not."""
        if upload is None:
            return
        self._complete.pop(upload, None)
        state = self._open.pop(upload, None)
        if state is not None:
            if state.timer is not None:
                state.timer.cancel()
            shutil.rmtree(state.directory, ignore_errors=True)

    def close(self) -> None:
        """Drop all uploads in progress."""
        for upload in list(self._open):
            self.forget(upload)

    def _restart_timer(self, upload: str, state: _Upload) -> None:
        if state.timer is not None:
            state.timer.cancel()
        loop = asyncio.get_running_loop()
        state.timer = loop.call_later(self._seconds, self._give_up, upload, state)

    def _give_up(self, upload: str, state: _Upload) -> None:
        logger.warning(
            'upload %r dropped: %d of %d Documents came, then none for %g seconds',
            upload,
            state.stored,
            state.total,
            self._seconds,
        )
        self.forget(upload)

    def _sweep(self) -> None:
        """Remove parts that a server which did not end well left, but not another server's."""
        if not self._directory.is_dir():
            return
        oldest = time.time() - self._seconds
        for left in self._directory.iterdir():
            if left.stat().st_mtime >= oldest:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _write(docs: DocumentArray, part: Path) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    save_documents(docs, part)


def _join(parts: list[Path], directory: Path) -> Sequence[Document]:
    """Put the parts together in the order they came, without ever holding all, and remove them."""
    every = chain.from_iterable(StoredDocuments(part) for part in parts)
    docs = spool_documents(every, directory.parent)
    shutil.rmtree(directory)
    return docs
