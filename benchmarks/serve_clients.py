"""Clients that ask without a pause, and what their answers say: documents a second, p50, p99.

As a script it is one process of clients, which `serve.py` starts. It reads a job as a line of JSON,
opens its connections, prints `ready`, reads when to begin and to end on the clock that all
processes of a machine share, and prints what it saw. Requests are ready-made bytes and answers are
not parsed, only weighed: what is measured is the server, and what clients cost is told apart.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRPC_METHOD = '/jina.JinaSingleDataRequestRPC/process_single_data'
# stands in the ids of Documents where each client puts its number
ANY_CLIENT = b'client--'
_UNLIMITED = [('grpc.max_send_message_length', -1), ('grpc.max_receive_message_length', -1)]
_SHOWN = 300
_TIMEOUT = 300.0
Ask = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Job:
    """What a process of clients does.

    Attributes:
        protocol: `grpc`, `http`, or `jina` for Jina's own client.
        port: of the server.
        path: of HTTP.
        folder: holds the requests, a file each; clients take them by turns.
        num_clients: each has one request on its way at any time.
        first: how many clients other processes have before this one's.
        least_bytes: an answer below it cannot hold all embeddings.
    """

    protocol: str
    port: int
    path: str
    folder: str
    num_clients: int
    first: int
    least_bytes: int


@dataclass(frozen=True)
class Seen:
    """What clients saw.

    Attributes:
        requests: when each began, and how many seconds it took.
        cpu_seconds: of the clients themselves.
    """

    requests: list[tuple[float, float]]
    cpu_seconds: float


def documents_per_second(
    requests: Iterable[tuple[float, float]], begin: float, end: float, num_documents: int
) -> float:
    """Documents that were answered in a second of a window.

    A request counts by the share of its time that lies in the window, so that neither edge of it
    matters, however long requests take.

    Args:
        requests: when each began, and how many seconds it took.
        begin: of the window.
        end: of the window.
        num_documents: in a request.
    """
    done = 0.0
    for started, seconds in requests:
        inside = min(started + seconds, end) - max(started, begin)
        done += max(0.0, inside) / seconds
    return done * num_documents / (end - begin)


def latencies(requests: Iterable[tuple[float, float]], begin: float, end: float) -> list[float]:
    """Seconds of the requests that were on their way in the window."""
    return [seconds for started, seconds in requests if started < end and started + seconds > begin]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of all are not above; by nearest rank.

    Args:
        values: at least one.
        share: above 0, at most 1.

    Raises:
        ValueError: there is no value, or no such share.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f'no share {share} of {len(values)} values')
    return sorted(values)[math.ceil(share * len(values)) - 1]


def main() -> None:
    """Do one job."""
    job = Job(**json.loads(sys.stdin.readline()))
    seen = asyncio.run(_run(job))
    print(json.dumps(asdict(seen)), flush=True)


async def _run(job: Job) -> Seen:
    payloads = [file.read_bytes() for file in sorted(Path(job.folder).iterdir())]
    async with AsyncExitStack() as stack:
        asks = [await _connect(job, stack) for _ in range(job.num_clients)]
        print('ready', flush=True)
        return await _ask_until_told(job, payloads, asks)


async def _ask_until_told(job: Job, payloads: list[bytes], asks: list[Ask]) -> Seen:
    line = await asyncio.to_thread(sys.stdin.readline)
    begin, end = map(float, line.split())
    requests: list[tuple[float, float]] = []

    async def repeat(client: int, ask: Ask) -> None:
        # Jina's dynamic batching takes two Documents of one id for one
        own = [payload.replace(ANY_CLIENT, b'client%02d' % client) for payload in payloads]
        turn = client * 7  # not all the same one at the same time
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        while (started := time.monotonic()) < end:
            await ask(own[turn % len(own)])
            requests.append((started, time.monotonic() - started))
            turn += 1

    before = time.process_time()
    await asyncio.gather(*(repeat(job.first + i, ask) for i, ask in enumerate(asks)))
    return Seen(requests, time.process_time() - before)


async def _connect(job: Job, stack: AsyncExitStack) -> Ask:
    if job.protocol == 'grpc':
        return await _connect_grpc(job, stack)
    if job.protocol == 'http':
        return await _connect_http(job, stack)
    return _connect_jina(job)


async def _connect_grpc(job: Job, stack: AsyncExitStack) -> Ask:
    import grpc

    channel = grpc.aio.insecure_channel(f'127.0.0.1:{job.port}', _UNLIMITED)
    await stack.enter_async_context(channel)
    method = channel.unary_unary(GRPC_METHOD)

    async def ask(payload: bytes) -> None:
        answer = await method(payload)
        if len(answer) < job.least_bytes:
            raise RuntimeError(f'the answer holds no embeddings: {answer[:_SHOWN]!r}')

    return ask


async def _connect_http(job: Job, stack: AsyncExitStack) -> Ask:
    import aiohttp

    timeout = aiohttp.ClientTimeout(_TIMEOUT)
    session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
    url = f'http://127.0.0.1:{job.port}{job.path}'
    headers = {'Content-Type': 'application/json'}

    async def ask(payload: bytes) -> None:
        async with session.post(url, data=payload, headers=headers) as response:
            answer = await response.read()
        if response.status != 200 or len(answer) < job.least_bytes:
            raise RuntimeError(f'answer {response.status}: {answer[:_SHOWN]!r}')

    return ask


def _connect_jina(job: Job) -> Ask:
    """Jina's client as people use it: Documents made anew, and those of the answer read."""
    import warnings

    warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)
    from docarray import DocumentArray
    from jina import Client
    from jina.types.request.data import DataRequest

    client = Client(host='127.0.0.1', port=job.port, protocol='grpc', asyncio=True)
    made: dict[bytes, Any] = {}

    async def ask(payload: bytes) -> None:
        if payload not in made:
            request = DataRequest()
            request.proto.ParseFromString(payload)
            made[payload] = [(doc.text, doc.blob) for doc in request.docs]
        docs = DocumentArray.empty(len(made[payload]))
        for doc, (text, blob) in zip(docs, made[payload], strict=True):
            if text:
                doc.text = text
            else:
                doc.blob = blob
        async for answer in client.post('/encode', inputs=docs, request_size=len(docs)):
            answer.embeddings  # noqa: B018  reading them is part of the work

    return ask


if __name__ == '__main__':
    main()
