"""Data that comes in pieces and counts only when it is whole and its hash is right.

What has come of a file stays on the disk, whatever breaks off: the connection, the client, this
server. Whoever sends it again is told where to go on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetuner.artifact_files import hash_file
from finetuner.data.stored.files import StoredDocuments
from finetuner.excepts import ConfigError, ConflictError, DataError
from finetuner.server.admission import refuse_uris
from finetuner.storage.database import make_private_directory

if TYPE_CHECKING:
    from finetuner.runs.workspace import Workspace

logger = logging.getLogger('finetuner.server')

MAX_BYTES = 1 << 40
KEPT_SECONDS = 24 * 3600.0
_SHA256 = re.compile(r'[0-9a-f]{64}')


@dataclass(frozen=True)
class UploadState:
    """Where an upload stands: `offset` bytes are there."""

    status: Literal['open', 'stored']
    offset: int


class IncomingData:
    """Uploads of stored Documents, by their owner and hash.

    Args:
        directory: where unfinished ones lie; kept when the server ends.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks: dict[Path, threading.Lock] = {}
        self._locks_lock = threading.Lock()

    def begin(self, workspace: Workspace, sha256: str, num_bytes: int) -> UploadState:
        """Say what is there of a file.

        Args:
            workspace: of whoever sends it.
            sha256: of the whole file, 64 hex characters.
            num_bytes: of the whole file.

        Raises:
            ConfigError: the hash or the size cannot be one.
        """
        _check_hash(sha256)
        if not 1 <= num_bytes <= MAX_BYTES:
            raise ConfigError(f'num_bytes is {num_bytes}: allowed are 1 to {MAX_BYTES}')
        # data that only another user has stored is not told of: it is sent, and found equal then
        if workspace.has_data(sha256):
            return UploadState('stored', num_bytes)
        self._sweep()
        path = self._path(workspace, sha256)
        with self._lock(path):
            return UploadState('open', path.stat().st_size if path.exists() else 0)

    def write(
        self, workspace: Workspace, sha256: str, offset: int, num_bytes: int, piece: bytes
    ) -> UploadState:
        """Append a piece; with the last one the data is checked and stored.

        Args:
            workspace: of whoever sends it.
            sha256: of the whole file.
            offset: where the piece begins.
            num_bytes: of the whole file.
            piece: its bytes.

        Raises:
            ConflictError: the piece does not begin where the file ends so far.
            DataError: the whole file has another hash, or is no file of Documents.
            OSError: the disk is full; what was there before stays.
        """
        _check_hash(sha256)
        path = self._path(workspace, sha256)
        with self._lock(path):
            there = path.stat().st_size if path.exists() else 0
            if offset != there:
                raise ConflictError(f'{there} bytes are there: go on from there, not from {offset}')
            if there + len(piece) > num_bytes:
                path.unlink(missing_ok=True)
                raise DataError(f'more came than the {num_bytes} bytes that were announced')
            self._append(path, there, piece)
            there += len(piece)
            if there < num_bytes:
                return UploadState('open', there)
            self._finish(workspace, path, sha256)
            return UploadState('stored', there)

    def _append(self, path: Path, there: int, piece: bytes) -> None:
        make_private_directory(path.parent)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            with os.fdopen(descriptor, 'wb', closefd=False) as file:
                file.seek(there)
                file.write(piece)
        except OSError:
            # a full disk takes a part of it, and of a part nobody knows what it holds
            os.ftruncate(descriptor, there)
            raise
        finally:
            os.close(descriptor)

    def _finish(self, workspace: Workspace, path: Path, sha256: str) -> None:
        try:
            if hash_file(path) != sha256:
                raise DataError(
                    'the data has another hash than announced: it changed on its way; send it again'
                )
            try:
                with StoredDocuments(path) as docs:
                    refuse_uris(docs)
            except DataError as error:
                # where things lie here is nobody's business
                raise DataError(str(error).replace(repr(str(path)), 'the file')) from error
            workspace.adopt_data(path, sha256)
        finally:
            path.unlink(missing_ok=True)

    def _path(self, workspace: Workspace, sha256: str) -> Path:
        owner = hashlib.sha256(workspace.owner.encode()).hexdigest()[:32]
        return self._directory / owner / f'{sha256}.part'

    def _lock(self, path: Path) -> threading.Lock:
        with self._locks_lock:
            return self._locks.setdefault(path, threading.Lock())

    def _sweep(self) -> None:
        """Remove what nobody has gone on with for a day."""
        oldest = time.time() - KEPT_SECONDS
        for path in self._directory.glob('*/*.part'):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    logger.warning('an upload that nobody went on with was dropped: %s', path.name)
            except FileNotFoundError:
                continue  # finished meanwhile


def _check_hash(sha256: str) -> None:
    if not _SHA256.fullmatch(sha256):
        raise ConfigError(f'sha256 is {sha256[:80]!r}: it takes 64 hex characters')
