"""What is known of a request on its way through the gateway: for limits, logs, metrics and spans."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from finetuner.excepts import ConfigError

ID_HEADER = 'x-request-id'
TIMEOUT_HEADER = 'x-request-timeout'
# as nginx has it: the client went away
GONE = 499
_SANE_ID = re.compile('[A-Za-z0-9._-]{1,64}')

# set where a request comes in, so that whatever works on it can add to it
current_call: ContextVar[Call | None] = ContextVar('current_call', default=None)


@dataclass
class Call:
    """One request, and what came of it.

    Attributes:
        protocol: it came over.
        request_id: under which the log, the spans and the answer name it.
        seconds: its client waits, None where it said nothing.
        parent: OpenTelemetry context of the client, None without one.
        endpoint: one that the Executors know; empty until that is clear, and for all others.
        num_documents: it brought.
        status: as HTTP tells it, for gRPC too.
        user: whose token it has.
        retry_after: seconds after which a refused client should ask again.
        has_slot: whether it is counted as being answered.
        started: on the clock `time.perf_counter`.
    """

    protocol: Literal['grpc', 'http']
    request_id: str
    seconds: float | None = None
    parent: Any = None
    endpoint: str = ''
    num_documents: int = 0
    status: int = 200
    user: str = ''
    retry_after: float | None = None
    has_slot: bool = False
    started: float = field(default_factory=time.perf_counter)


def request_id_of(given: str | bytes | None) -> str:
    """The id that a client gave its request if it is short and plain, and a new one otherwise."""
    text = given.decode('latin-1') if isinstance(given, bytes) else given
    return text if text and _SANE_ID.fullmatch(text) else uuid.uuid4().hex


def seconds_of(given: str | None) -> float | None:
    """Read the header `X-Request-Timeout`.

    Raises:
        ConfigError: it is no number above 0.
    """
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float('inf'):
        raise ConfigError(
            f'the header X-Request-Timeout is {given[:40]!r}: it takes the seconds that you wait '
            'for the answer, such as 2.5'
        )
    return seconds
