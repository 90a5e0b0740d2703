"""Clients that stop in the middle of a request are let go, also where it waited behind another."""

import asyncio

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from finetuner.server.http_protocol import protocol_with_patience

ANSWERED = b'GET / HTTP/1.1\r\nHost: x\r\n\r\n'
HALF_A_BODY = b'POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf'
HALF_A_HEAD = b'POST /body HTTP/1.1\r\nHo'
SLOW = b'GET /slow HTTP/1.1\r\nHost: x\r\n\r\n'


class App:
    """Answers, after the whole body and a while where the path says so."""

    def __init__(self) -> None:
        self.begun = self.in_flight = 0

    async def __call__(self, scope, receive, send) -> None:
        self.begun += 1
        self.in_flight += 1
        try:
            while (await receive()).get('more_body'):
                pass
            await asyncio.sleep(0.6 if scope['path'] == '/slow' else 0)
            headers = [(b'content-length', b'2')]
            await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
            await send({'type': 'http.response.body', 'body': b'ok'})
        finally:
            self.in_flight -= 1


def answers_to(sent: bytes, patience: float, keep_alive: float) -> tuple[bytes, App]:
    """What comes until the server closes the connection."""

    async def run() -> tuple[bytes, App]:
        app = App()
        config = Config(app, log_level='critical', lifespan='off', timeout_keep_alive=keep_alive)
        config.load()
        protocol = protocol_with_patience(patience)
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), '127.0.0.1', 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        got = await asyncio.wait_for(reader.read(), 10)
        await asyncio.sleep(0.05)
        writer.close()
        server.close()
        return got, app

    return asyncio.run(run())


@pytest.mark.parametrize('before', [b'', ANSWERED, ANSWERED * 3])
def test_half_a_body_is_not_waited_for_without_end(before):
    got, app = answers_to(before + HALF_A_BODY, 0.3, 5)
    assert got.count(b'200 OK') == before.count(b'GET')
    assert b'408 Request Timeout' in got
    assert app.begun == before.count(b'GET') + 1
    assert app.in_flight == 0


@pytest.mark.parametrize('before', [b'', ANSWERED])
def test_half_a_head_is_not_waited_for_without_end(before):
    got, app = answers_to(before + HALF_A_HEAD, 0.3, 5)
    assert b'408 Request Timeout' in got
    assert app.begun == before.count(b'GET')


def test_a_request_that_waited_behind_another_has_all_the_time_that_its_answer_takes():
    got, _ = answers_to(ANSWERED + SLOW, 5, 0.2)
    assert got.count(b'200 OK') == 2
