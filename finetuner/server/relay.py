"""Connections that are handed on: two ends, each of which is read as fast as the other takes it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import cast


class Side(asyncio.Protocol):
    """One of the two ends; what is written to the other waits for it.

    Attributes:
        transport: None until it is connected.
        other: None until there is one.
        is_paused: whether it is not read, because the other does not keep up.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what to write to."""
        # uvloop's are not of asyncio's classes
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        """Close the other, too."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def pause_writing(self) -> None:
        """Read no more of the other."""
        if self.other is not None and self.other.transport is not None:
            self.other.is_paused = True
            with contextlib.suppress(RuntimeError):  # it is closing
                self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read the other again."""
        if self.other is not None and self.other.transport is not None:
            self.other.is_paused = False
            with contextlib.suppress(RuntimeError):
                self.other.transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Write, unless it is gone."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close, once what is written has left."""
        if self.transport is not None:
            self.transport.close()
