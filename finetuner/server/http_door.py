"""The HTTP door: ids, sizes, tokens and who is a stranger, before anything reads a body."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetuner.excepts import FinetunerError, TooLargeError
from finetuner.server.calls import (
    GONE,
    ID_HEADER,
    TIMEOUT_HEADER,
    Call,
    current_call,
    request_id_of,
    seconds_of,
)
from finetuner.server.dispatch import Dispatcher
from finetuner.server.health import Readiness
from finetuner.server.http_errors import answer_of, error_answer, error_to, status_of
from finetuner.server.journal import Journal
from finetuner.server.limits import ByteBudget, Limits, Slots
from finetuner.server.pages import COOKIE
from finetuner.server.security import (
    DENIED,
    TokenCheck,
    current_identity,
    is_foreign,
    is_rebound,
)
from finetuner.server.tracing import parent_of

_OPEN_BELOW = ('/static/', '/swagger/', '/health/')
_OPEN_PATHS = ('/', '/login', '/dry_run', '/docs', '/redoc', '/openapi.json')
# these go to the disk as they come, a form only where it is one of parts
_PIECES = ('PATCH', '/api/v1/uploads')
_FILE_FORM = ('POST', '/ui/data')
_REST = '/api/v1/'
_MOST_JSON = 8 << 20
_MOST_FORM = 1 << 19


@dataclass(frozen=True)
class Door:
    """What the HTTP side of the gateway is handed.

    Attributes:
        token: checked on every path but health and documentation.
        limits: of requests.
        slots: for requests being answered.
        budget: for their bytes.
        readiness: whether the Executors can answer.
        journal: of requests.
        dispatcher: that answers.
        has_runs: whether runs can be submitted and watched here.
    """

    token: TokenCheck
    limits: Limits
    slots: Slots
    budget: ByteBudget
    readiness: Readiness
    journal: Journal
    dispatcher: Dispatcher
    has_runs: bool


class CallMiddleware:
    """Outermost: gives a request its id, and writes it down when it is answered.

    Args:
        app: all the rest.
        door: of the gateway.
        traces: whether clients' spans are of interest.
    """

    def __init__(self, app: ASGIApp, door: Door, traces: bool) -> None:
        self._app = app
        self._door = door
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = Call('http', request_id_of(headers.get(ID_HEADER)))
        if self._traces:
            call.parent = parent_of(headers)
        current_call.set(call)
        has_answer = False

        async def send_on(message: Message) -> None:
            nonlocal has_answer
            if message['type'] == 'http.response.start':
                has_answer = True
                call.status = message['status']
                answered = MutableHeaders(scope=message)
                answered[ID_HEADER] = call.request_id
                if self._door.slots.is_closed:
                    answered['connection'] = 'close'
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            if not has_answer:
                call.status = GONE
            self._door.journal.finish(call, scope['path'])


class DoorMiddleware:
    """Turns away who has no token, pages of other servers, and what is too large.

    Args:
        app: all the rest.
        door: of the gateway.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, or not."""
        if scope['type'] != 'http':
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = await self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope['method'] in ('GET', 'HEAD') or _goes_to_disk(scope, headers):
            await self._app(scope, receive, send)
            return
        body = _Body(
            receive,
            send,
            self._door,
            lambda size: _check_bytes(size, self._door.limits, scope, headers),
        )
        try:
            await self._app(scope, body.receive, body.send)
            if body.error is not None and not body.is_answered:
                await (await error_to(Request(scope), body.error))(scope, receive, send)
        finally:
            self._door.budget.give_back(body.num_bytes)

    async def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        looks = scope['method'] in ('GET', 'HEAD')
        has_pages = self._door.has_runs
        path = scope['path']
        if not looks and is_foreign(headers.get('origin'), headers.get('host')):
            message = f'a page of {headers["origin"]} may not send requests to this server'
            return error_answer('ForbiddenError', message, 403, path)
        is_open = looks and (path in _OPEN_PATHS or path.startswith(_OPEN_BELOW))
        # its answer to a wrong token is 401 as well
        is_open = is_open or (has_pages and path == '/login')
        token = self._door.token
        identity = await token.identify_soon(_authorization(headers))
        if identity is None and not is_open:
            if has_pages and looks and 'text/html' in headers.get('accept', ''):
                return RedirectResponse('/login', 303)
            denied = error_answer('Unauthorized', DENIED, 401, path)
            denied.headers['www-authenticate'] = 'Bearer'
            return denied
        if is_rebound(headers.get('host')) and not await token.required_soon():
            message = f'this server is on this machine alone, and is not {headers["host"]!r}'
            return error_answer('ForbiddenError', message, 403, path)
        current_identity.set(identity)
        call = current_call.get()
        try:
            if call is not None:
                call.user = identity.user if identity is not None else ''
                call.seconds = seconds_of(headers.get(TIMEOUT_HEADER))
            length = headers.get('content-length', '')
            if length.isdecimal() and not _goes_to_disk(scope, headers):
                _check_bytes(int(length[:20]), self._door.limits, scope, headers)
        except FinetunerError as error:
            return answer_of(error, path)
        return None


def _goes_to_disk(scope: Scope, headers: Headers) -> bool:
    asked = scope['method'], scope['path']
    return asked == _PIECES or (asked == _FILE_FORM and _kind_of(headers) == 'multipart/form-data')


def _kind_of(headers: Headers) -> str:
    return headers.get('content-type', '').partition(';')[0].strip().lower()


def _check_bytes(num_bytes: int, limits: Limits, scope: Scope, headers: Headers) -> None:
    """Refuse a body that is too large for what it is.

    JSON takes some fifty times as much memory as it has bytes, and both it and forms are taken apart
    where everybody else is answered too.

    Raises:
        TooLargeError: it is.
    """
    limits.check_bytes(num_bytes)
    for what, most, applies in (
        ('a form', _MOST_FORM, _kind_of(headers) == 'application/x-www-form-urlencoded'),
        ('JSON', _MOST_JSON, scope['path'].startswith(_REST)),
    ):
        if applies and num_bytes > most:
            raise TooLargeError(
                f'the request is larger than the {most >> 10:,} KiB that this server takes as {what}: '
                'send less at a time, or store Documents and name them'
            )


class _Body:
    """The body of a request as it comes, counted, and what is answered to it.

    Attributes:
        num_bytes: that have come.
        error: why no more of it is taken, None while that is not so.
        is_answered: whether the answer has begun.
    """

    def __init__(
        self, receive: Receive, send: Send, door: Door, check: Callable[[int], None]
    ) -> None:
        self._check = check
        self._receive = receive
        self._send = send
        self._door = door
        self.num_bytes = 0
        self.error: FinetunerError | None = None
        self.is_answered = False

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            TooLargeError: with it the body is.
            TooManyRequestsError: there is no memory for it beside those of other requests.
        """
        message = await self._receive()
        size = len(message.get('body', b''))
        try:
            self._check(self.num_bytes + size)
            self._door.budget.take_or_refuse(size)
        except FinetunerError as error:
            self.error = error
            raise
        self.num_bytes += size
        return message

    async def send(self, message: Message) -> None:
        """Hand an answer on, unless the body was refused and it is not the answer to that.

        FastAPI takes whatever is raised while it reads a body for a mistake in it: 400.
        """
        if not self.is_answered:
            if self.error is not None and message.get('status') != status_of(self.error):
                return
            self.is_answered = True
        await self._send(message)


def _authorization(headers: Headers) -> str | None:
    """The header of that name, or what a browser that logged in sends in its place."""
    given = headers.get('authorization')
    if given is not None:
        return given
    token = cookie_parser(headers['cookie']).get(COOKIE) if 'cookie' in headers else None
    return None if token is None else f'Bearer {token}'


@contextlib.contextmanager
def call_of(request: Request, door: Door) -> Iterator[Call]:
    """The call of a request, with a place among those being answered."""
    call = current_call.get()
    if call is None:
        call = Call('http', request_id_of(request.headers.get(ID_HEADER)))
    with door.slots.taken_for(call):
        yield call


def id_of_failure() -> str:
    """The id under which the log tells of a failure."""
    call = current_call.get()
    return uuid.uuid4().hex if call is None else call.request_id
