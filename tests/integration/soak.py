"""Mixed load on a server whose model is swapped under it: what fails, what is mixed, what it takes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from docarray import Document, DocumentArray
from jina import Client

from finetuner.client import LocalClient
from tests.integration.serving import Server

BROKEN = b'no picture'
# of a vector's own length
TOLERANCE = 1e-3
PAUSE = 0.02


@dataclass
class Load:
    """What is asked, and what the answers were.

    Attributes:
        pictures: encoded pictures to ask for.
        expected: by artifact id, the embeddings of all of them.
        answers: how many requests each model answered.
        problems: what was wrong with others.
        memory: (seconds since the start, bytes) of the server's processes.
    """

    pictures: list[bytes]
    expected: dict[str, np.ndarray]
    answers: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    num_swaps: int = 0
    num_documents: int = 0

    def check(self, numbers: list[int], given: list[np.ndarray | None]) -> None:
        """Each answer comes from one of the models as a whole; -1 stands for a broken picture."""
        if [each is None for each in given] != [number < 0 for number in numbers]:
            self.problems.append('an embedding is missing, or is there for no picture')
            return
        good = [place for place, number in enumerate(numbers) if number >= 0]
        found = np.array([given[place] for place in good], np.float32)
        for artifact_id, vectors in self.expected.items():
            wanted = vectors[[numbers[place] for place in good]]
            if np.allclose(found, wanted, atol=TOLERANCE * np.linalg.norm(wanted, axis=1).mean()):
                self.answers[artifact_id] += 1
                self.num_documents += len(numbers)
                return
        self.problems.append(f'a mixture, or vectors of no model, for {len(numbers)} Documents')


async def ask_over_grpc(load: Load, server: Server, numbers: list[int], parameters: dict) -> None:
    client = Client(host='127.0.0.1', port=server.grpc_port, protocol='grpc', asyncio=True)
    docs = DocumentArray([Document(blob=_picture(load, number)) for number in numbers])
    answer = DocumentArray()
    async for part in client.post(
        '/encode', docs, parameters=parameters, request_size=-1, results_in_order=True
    ):
        answer.extend(part)
    load.check(numbers, [doc.embedding for doc in answer])


async def ask_over_http(
    load: Load, client: httpx.AsyncClient, numbers: list[int], parameters: dict
) -> None:
    data = [{'blob': base64.b64encode(_picture(load, number)).decode()} for number in numbers]
    answer = await client.post('/encode', json={'data': data, 'parameters': parameters})
    if answer.status_code != 200:
        load.problems.append(f'HTTP {answer.status_code}: {answer.text[:300]}')
        return
    load.check(numbers, [doc.get('embedding') for doc in answer.json()['data']])


def _picture(load: Load, number: int) -> bytes:
    return BROKEN if number < 0 else load.pictures[number]


async def put_under_load(
    load: Load, server: Server, store: LocalClient, alias: str, seconds: float, num_swaps: int
) -> None:
    """Ask in six ways at once while an alias moves to and fro between the models.

    Args:
        load: what to ask; holds the answers afterwards.
        server: serves the alias.
        store: where the alias is kept.
        alias: what the server was started with.
        seconds: how long.
        num_swaps: how often the alias moves in that time.
    """
    started = time.monotonic()
    end = started + seconds
    ids = list(load.expected)

    async def again(ask: Callable[[random.Random], Awaitable[None]], seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            try:
                await ask(chance)
            except Exception as error:
                load.problems.append(f'{type(error).__name__}: {error}'[:300])
            await asyncio.sleep(PAUSE)

    def numbers(chance: random.Random, most: int) -> list[int]:
        return [chance.randrange(len(load.pictures)) for _ in range(chance.randint(1, most))]

    async def swap() -> None:
        for n in range(num_swaps):
            await asyncio.sleep(
                max(0, started + (n + 1) * seconds / (num_swaps + 1) - time.monotonic())
            )
            await asyncio.to_thread(store.set_alias, alias, ids[(n + 1) % len(ids)])
            load.num_swaps += 1

    async def watch() -> None:
        while time.monotonic() < end:
            load.memory.append((time.monotonic() - started, memory_of(server)))
            await asyncio.sleep(seconds / 60)

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        ways: list[Callable[[random.Random], Awaitable[None]]] = [
            lambda chance: ask_over_grpc(load, server, numbers(chance, 1), {}),
            lambda chance: ask_over_grpc(load, server, numbers(chance, 24), {'batch_size': chance.randint(1, 9)}),
            lambda chance: ask_over_grpc(load, server, [*numbers(chance, 4), -1, *numbers(chance, 4)], {}),
            lambda chance: ask_over_http(load, http, numbers(chance, 1), {}),
            lambda chance: ask_over_http(load, http, [*numbers(chance, 6), -1], {}),
            lambda chance: ask_over_http(load, http, numbers(chance, 3), {'artifact': chance.choice([*ids, alias])}),
        ]  # fmt: skip
        asking = [again(way, seed) for seed, way in enumerate(ways)]
        await asyncio.gather(swap(), watch(), *asking)


def memory_of(server: Server) -> int:
    """Bytes that the server's processes have for themselves, pages they share counted once.

    Without those of files: how many of these are counted here depends on who else has them open.
    """
    parent = psutil.Process(server.process.pid)
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(OSError):  # it has ended
            rolled_up = Path(f'/proc/{process.pid}/smaps_rollup').read_text()
            total += int(re.search(r'Pss_Anon:\s+(\d+) kB', rolled_up).group(1)) * 1024
    return total
