"""Bodies over HTTP: counted on every way but those that go to the disk, and refused as they should be."""

import asyncio
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Body, FastAPI, Form, UploadFile

from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import FinetunerError
from finetuner.server.http_door import Door, DoorMiddleware
from finetuner.server.http_errors import error_to
from finetuner.server.incoming import IncomingData
from finetuner.server.limits import ByteBudget, Limits, Slots
from finetuner.server.rest import build_router
from finetuner.storage.tokens import Identity

MIB = 1 << 20


class Everybody:
    """A check of tokens that lets all in."""

    async def identify_soon(self, _: str | None) -> Identity:
        return Identity('somebody', 'write')

    async def required_soon(self) -> bool:
        return False


def answers(tmp_path: Path, held: int, *asked: tuple[str, str, dict]) -> list[httpx.Response]:
    """What is answered where so many of 1 MiB are taken."""
    budget = ByteBudget(MIB)
    door = Door(
        Everybody(), Limits(max_request_mb=1), Slots(10), budget, None, None, None, has_runs=False
    )
    app = FastAPI()
    app.add_middleware(DoorMiddleware, door=door)
    app.add_exception_handler(FinetunerError, error_to)
    app.state.token_required = lambda: False
    client = LocalClient(Settings.from_environment(tmp_path))
    app.include_router(build_router(client, IncomingData(tmp_path / 'incoming'), lambda: False))

    @app.post('/json')
    async def take(body: Annotated[dict, Body()]) -> int:
        return len(body)

    @app.post('/ui/data')
    @app.post('/ui/try')
    async def take_form(file: UploadFile | None = None, name: str = Form('')) -> int:
        return file.size if file is not None else len(name)

    async def run() -> list[httpx.Response]:
        budget.take(held)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url='http://127.0.0.1') as sender:
            found = [await sender.request(how, path, **what) for how, path, what in asked]
        assert budget.held == held
        return found

    return asyncio.run(run())


def in_pieces(num_bytes: int):
    async def pieces():
        for _ in range(num_bytes // 65_536):
            yield b' ' * 65_536

    return {'content': pieces(), 'headers': {'content-type': 'application/json'}}


@pytest.mark.parametrize('path', ['/json', '/ui/try', '/api/v1/runs', '/api/v1/uploads'])
def test_a_body_for_which_there_is_no_memory_is_told_to_come_again(tmp_path, path):
    what = {'files': {'file': bytes(500_000)}} if path == '/ui/try' else in_pieces(MIB // 2)
    (answer,) = answers(tmp_path, 900_000, ('POST', path, what))
    assert answer.status_code == 429
    assert answer.json()['error'] == 'TooManyRequestsError'
    assert answer.headers['retry-after'] == '1'


@pytest.mark.parametrize('path', ['/json', '/api/v1/runs', '/api/v1/uploads'])
def test_a_body_that_grows_too_large_is_told_so(tmp_path, path):
    (answer,) = answers(tmp_path, 0, ('POST', path, in_pieces(2 * MIB)))
    assert (answer.status_code, answer.json()['error']) == (413, 'TooLargeError')


def test_who_looks_at_pages_is_told_on_one(tmp_path):
    what = {'files': {'file': bytes(500_000)}, 'headers': {'accept': 'text/html'}}
    (answer,) = answers(tmp_path, 900_000, ('POST', '/ui/try', what))
    assert answer.status_code == 429
    assert answer.text.startswith('<!')
    assert 'max_total_mb' in answer.text


def test_only_what_goes_to_the_disk_may_be_large(tmp_path):
    large = bytes(3 * MIB)
    query = {'sha256': 'a' * 64, 'offset': 0, 'num_bytes': 4 * MIB}
    sent = [
        ('PATCH', '/api/v1/uploads', {'params': query, 'content': large}),
        ('POST', '/ui/data', {'files': {'file': large}}),
        ('POST', '/ui/data', {'data': {'name': 'a' * 2 * MIB}}),
        ('POST', '/api/v1/uploads', {'json': {'sha256': 'a' * 2 * MIB, 'num_bytes': 1}}),
        ('POST', '/api/v1/uploads', {'json': {'sha256': 'a' * 100_000, 'num_bytes': 1}}),
    ]
    piece, form, fields, announced, wrong = answers(tmp_path, 0, *sent)
    assert (piece.status_code, piece.json()['offset']) == (200, 3 * MIB)
    assert (form.status_code, form.json()) == (200, 3 * MIB)
    assert fields.status_code == announced.status_code == 413
    assert wrong.status_code == 422
    assert len(wrong.text) < 300
