"""How a client's questions, data and artifacts travel to a server and back, whatever breaks off."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetuner import excepts
from finetuner.excepts import (
    ArtifactError,
    ConflictError,
    DataError,
    FinetunerError,
    ForbiddenError,
    ServerError,
    TooManyRequestsError,
)

if TYPE_CHECKING:
    import httpx

API = '/api/v1'
UPLOAD_BYTES = 4 << 20
# less than one is lost when a connection breaks
_PIECE_BYTES = 1 << 16
# how long to go on asking a server that does not answer, such as one that starts anew
PATIENCE_SECONDS = 60.0
# a server looks through all the data of a run before it answers
_TIMEOUT_SECONDS = 300.0

T = TypeVar('T')


class _UnreachableError(ServerError):
    """No answer came, which may change."""


class Transport:
    """Connections to a server.

    Args:
        host: its address.
        token: None for a server that wants none.
        patience: seconds to go on asking a server that does not answer.
    """

    def __init__(
        self, host: str, token: str | None = None, patience: float = PATIENCE_SECONDS
    ) -> None:
        import httpx

        headers = {} if not token else {'authorization': f'Bearer {token}'}
        self._http = httpx.Client(
            base_url=host.rstrip('/') + API,
            headers=headers,
            timeout=httpx.Timeout(_TIMEOUT_SECONDS, connect=10.0),
        )
        self.host = host
        self._patience = patience
        self._was_reached = False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """Ask for something; asked again while no answer comes."""
        given = {name: value for name, value in params.items() if value is not None}
        return self._patiently(lambda: _checked(self._http.get(path, params=given))).json()

    def get_bytes(self, path: str, **params: Any) -> bytes:
        """Ask for a file that fits into memory; asked again while no answer comes."""
        return self._patiently(lambda: _checked(self._http.get(path, params=params))).content

    def get_pieces(
        self, path: str, params: dict[str, Any], sizes: Sequence[int]
    ) -> Generator[bytes, None, None]:
        """Ask for an answer and cut it while it comes.

        Args:
            path: what to ask for.
            params: of the question.
            sizes: of the pieces, in bytes.

        Yields:
            The pieces; fewer where the connection breaks off or the answer is shorter.
        """
        import httpx

        held = bytearray()
        wanted = iter(sizes)
        with (
            contextlib.suppress(httpx.TransportError),
            self._http.stream('GET', path, params=params) as answer,
        ):
            if answer.is_error:
                answer.read()
            _checked(answer)
            size = next(wanted, None)
            for chunk in answer.iter_bytes():
                held += chunk
                while size is not None and len(held) >= size:
                    yield bytes(held[:size])
                    del held[:size]
                    size = next(wanted, None)

    def send(self, method: str, path: str, json: Any = None, **params: Any) -> Any:
        """Have something done; sent again only where the server has too much to do to begin with it."""
        given = {name: value for name, value in params.items() if value is not None}
        deadline = time.monotonic() + self._patience
        while True:
            try:
                answer = self._once(
                    lambda: _checked(self._http.request(method, path, params=given, json=json))
                )
                return answer.json() if answer.content else None
            except TooManyRequestsError as error:
                if time.monotonic() + error.retry_after > deadline:
                    raise
                time.sleep(error.retry_after)

    def ask(self, path: str, json: Any) -> Any:
        """Have something done that the server does once, however often it is asked for; asked again
        while no answer comes.
        """
        return self._patiently(lambda: _checked(self._http.post(path, json=json))).json()

    def _once(self, ask: Callable[[], T]) -> T:
        import httpx

        try:
            return ask()
        except httpx.TransportError as error:
            raise _UnreachableError(
                f'the server {self.host} does not answer ({type(error).__name__}: {error}): is it '
                'running, and is the address right? finetuner.login(host=...) sets it'
            ) from error

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while there is no answer; an answer itself may take its time."""
        deadline = 0.0
        pause = 0.2
        while True:
            try:
                found = self._once(ask)
                self._was_reached = True
                return found
            except _UnreachableError:
                deadline = deadline or time.monotonic() + self._patience
                # an address that never answered is more likely wrong than busy
                if not self._was_reached or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 3.0)

    def stream(self, path: str, place: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Server-sent events until `end`, as (name, data); goes on when a connection breaks."""
        last = 0
        deadline = time.monotonic() + self._patience
        while True:
            try:
                for number, event, data in self._events(path, place, last):
                    deadline = time.monotonic() + self._patience
                    last = number or last
                    yield event, data
                    if event == 'end':
                        return
            except _UnreachableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _events(
        self, path: str, place: dict[str, Any], last: int
    ) -> Iterator[tuple[int, str, Any]]:
        import httpx

        headers = {'last-event-id': str(last)} if last else {}
        try:
            with self._http.stream('GET', path, params=place, headers=headers) as answer:
                if answer.is_error:
                    answer.read()
                _checked(answer)
                fields: dict[str, str] = {}
                for line in answer.iter_lines():
                    if line:
                        name, _, value = line.partition(': ')
                        fields[name] = value
                    elif fields:
                        if 'data' in fields:
                            number = int(fields.get('id') or 0)
                            yield number, fields.get('event', ''), json.loads(fields['data'])
                        fields = {}
        except httpx.TransportError as error:
            raise _UnreachableError(f'the server {self.host} does not answer: {error}') from error

    def send_file(self, path: Path, sha256: str) -> None:
        """Send a file of Documents, as far as it is not there; goes on where it broke off."""
        from finetuner.console import transfer_progress

        num_bytes = path.stat().st_size
        announced = {'sha256': sha256, 'num_bytes': num_bytes}
        with path.open('rb') as file, transfer_progress('Sending data', num_bytes) as advance:
            deadline = time.monotonic() + self._patience
            while True:
                state = self._patiently(
                    lambda: _checked(self._http.post('/uploads', json=announced)).json()
                )
                if state['status'] == 'stored':
                    advance(num_bytes)
                    return
                offset = state['offset']
                advance(offset)
                try:
                    while state['status'] != 'stored':
                        file.seek(offset)
                        state = self._send_piece(announced, offset, file.read(UPLOAD_BYTES))
                        offset = state['offset']
                        advance(offset)
                        deadline = time.monotonic() + self._patience
                    return
                except (_UnreachableError, ConflictError):
                    # what came of the piece stays there: the server says where to go on
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)

    def _send_piece(self, announced: dict[str, Any], offset: int, piece: bytes) -> dict[str, Any]:
        params = {**announced, 'offset': offset}
        headers = {'content-type': 'application/octet-stream'}
        return self._once(
            lambda: _checked(
                self._http.patch('/uploads', params=params, content=piece, headers=headers)
            )
        ).json()

    def fetch_files(
        self, path: str, params: dict[str, Any], files: list[dict[str, Any]], directory: Path
    ) -> Path:
        """Fetch what is missing of a directory; it is there under its name when it is whole."""
        from finetuner.artifact_files import verify_files

        if directory.is_dir():
            # what was changed since is fetched again
            with contextlib.suppress(ArtifactError):
                verify_files(directory)
                return directory
        for file in files:
            if Path(file['path']).is_absolute() or '..' in Path(file['path']).parts:
                raise ArtifactError(f'the server names a file {file["path"]!r}')
            target = directory / file['path']
            # the list of all files comes last: without it a directory is no artifact
            self.fetch(path, {**params, 'path': file['path']}, target, file['sha256'])
        verify_files(directory)
        return directory

    def fetch(self, path: str, params: dict[str, Any], target: Path, sha256: str) -> None:
        """Fetch a file, going on where it broke off; it has its name when its hash is right."""
        from finetuner.artifact_files import hash_file
        from finetuner.console import transfer_progress

        if target.is_file() and hash_file(target) == sha256:
            return
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = target.with_name(f'.{target.name}.{sha256[:16]}.part')

        def num_there() -> int:
            return partial.stat().st_size if partial.exists() else 0

        def go_on() -> None:
            there = num_there()
            headers = {'range': f'bytes={there}-'} if there else {}
            with self._http.stream('GET', path, params=params, headers=headers) as answer:
                if answer.status_code == 416:
                    return  # all of it is there
                if answer.is_error:
                    answer.read()
                _checked(answer)
                mode = 'ab' if answer.status_code == 206 else 'wb'
                total = there + int(answer.headers.get('content-length', 0))
                with partial.open(mode) as file, transfer_progress(target.name, total) as advance:
                    for chunk in answer.iter_bytes(_PIECE_BYTES):
                        file.write(chunk)
                        advance(file.tell())

        while True:
            before = num_there()
            try:
                self._patiently(go_on)
                break
            except _UnreachableError:
                # as long as more of it comes, it goes on, however long that takes
                if num_there() <= before:
                    raise
        if hash_file(partial) != sha256:
            partial.unlink()
            raise DataError(f'{target.name} came with another hash than the server said: try again')
        partial.replace(target)


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, or the error that the server told.

    Raises:
        FinetunerError: of the class that was raised there.
        ServerError: the server failed, or is no such server.
    """
    if not answer.is_error:
        return answer
    try:
        told = answer.json()
        name, message = told['error'], told['message']
    except (ValueError, KeyError, TypeError):
        raise ServerError(
            f'{answer.url} answered {answer.status_code}: is it a finetuner server?'
        ) from None
    if answer.status_code == 401:
        raise ForbiddenError(
            'the server wants a token that is valid: finetuner.login(host=..., token=...)'
        )
    error = getattr(excepts, name, None)
    if isinstance(error, type) and issubclass(error, FinetunerError):
        raise error(message)
    raise ServerError(message)
