"""Serving, side by side: ours, the limit of the machine, and what others would put up.

The limit is a loop by hand without any server, ONNX Runtime with reading overlapped, shared over the
cores in the best of three ways; the script does the same as ONNX Runtime comes. Ours is
`finetuner serve` on the Flow that comes with it. The peers are a naive Jina Executor, Jina's own
dynamic batching, sentence-transformers behind FastAPI, and infinity. All have the same weights and
get the same pictures or texts, and all vectors are compared with the limit's before anything is
timed. Every server is a fresh process; they are loaded in turns, round by round, each by clients
that ask without a pause. Only ratios travel between machines.

    make bench-serve                          # SERVE='--only texts' for options
    .venv/bin/python benchmarks/serve.py      # --rounds 3 --seconds 3 --only pictures|texts
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from serve_clients import (  # noqa: E402
    Job,
    Seen,
    documents_per_second,
    latencies,
    percentile,
)
from serve_contestants import (  # noqa: E402
    INFINITY,
    NoSuchDoor,
    Server,
    Talker,
    contestants,
    smallest_cosine,
    started,
)
from serve_work import DOORS, Work  # noqa: E402

LIMIT = 'the limit, no server'
SCRIPT = 'a script, no server'
# the shares of the script's speed to reach
TARGETS = {'gRPC': 0.85, 'HTTP': 0.7}
TITLES = {
    'pictures': 'EfficientNet-Lite0 at 224 px, JPEG 640 x 480',
    'texts': 'all-MiniLM-L6-v2, texts of mixed lengths',
}
# of processes that hold the clients, so that none of them is busy all the time
_MOST_GENERATORS = 2
_WARM_SECONDS = 0.7


@dataclass(frozen=True)
class Load:
    """How a server is asked.

    Attributes:
        num_clients: each asks again as soon as it is answered.
        num_documents: in a request.
    """

    num_clients: int
    num_documents: int

    def __str__(self) -> str:
        """Its name in the tables."""
        clients = 'client' if self.num_clients == 1 else 'clients'
        return f'{self.num_clients} {clients}, {self.num_documents} a request'

    @property
    def at_once(self) -> int:
        """Documents on their way."""
        return self.num_clients * self.num_documents


LOADS = (Load(1, 1), Load(1, 64), Load(32, 1), Load(32, 8))


@dataclass
class Row:
    """What all rounds said of one contestant under one load.

    Attributes:
        title: of the contestant and the door.
        is_ours: whether it is finetuner.
        speeds: documents a second, of each round.
        seconds: of all requests.
        server_cpu: seconds a document, of each round.
        client_cpu: the same of the clients.
        peak_mb: most memory of the server's processes.
    """

    title: str
    is_ours: bool = False
    speeds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    client_cpu: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    @property
    def protocol(self) -> str:
        """The door that it was asked at; empty where there is none."""
        return self.title.rpartition(', ')[2] if self.title not in (LIMIT, SCRIPT) else ''


def measure_server(
    server: Server, door: str, load: Load, work: Work, dim: int, row: Row, seconds: float
) -> None:
    """Load a server for a while."""
    num = min(_MOST_GENERATORS, load.num_clients)
    way = DOORS[door]
    job = {
        'protocol': way.protocol,
        'port': server.port(door),
        'path': way.path,
        'folder': str(work.requests(door, load.num_documents)),
        'num_clients': load.num_clients // num,
        'least_bytes': load.num_documents * dim * way.least_bytes,
    }
    talkers = [
        Talker('serve_clients.py', job=Job(**job, first=i * (load.num_clients // num)))
        for i in range(num)
    ]
    begin, end = _window(talkers, seconds)
    _sleep_until(begin)
    before = server.cpu_seconds()
    _sleep_until(end)
    cpu = server.cpu_seconds() - before
    server.weigh()
    seen = [talker.seen() for talker in talkers]
    for talker in talkers:
        talker.close()
    requests = [request for each in seen for request in each.requests]
    speed = documents_per_second(requests, begin, end, load.num_documents)
    row.speeds.append(speed)
    row.seconds += latencies(requests, begin, end)
    row.server_cpu.append(cpu / (speed * (end - begin)))
    sent = len(requests) * load.num_documents
    row.client_cpu.append(sum(each.cpu_seconds for each in seen) / sent)
    row.peak_mb = server.peak_mb


def measure_limit(limit: Talker, row: Row, seconds: float) -> None:
    """Let the loop by hand run for as long."""
    begin, end = _window([limit], seconds)
    process = psutil.Process(limit.process.pid)
    seen: Seen = limit.seen()
    row.speeds.append(documents_per_second(seen.requests, begin, end, 1))
    row.server_cpu.append(seen.cpu_seconds / len(seen.requests))
    row.peak_mb = max(row.peak_mb, process.memory_full_info().pss / 2**20)


def _window(talkers: list[Talker], seconds: float) -> tuple[float, float]:
    """Begin and end of what counts; clients begin earlier."""
    start = time.monotonic() + 0.1
    begin, end = start + _WARM_SECONDS, start + _WARM_SECONDS + seconds
    for talker in talkers:
        talker.begin(start, end)
    return begin, end


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def compare_vectors(server: Server, work: Work) -> dict[str, str]:
    """Stop a benchmark that would compare different things.

    Returns:
        The doors that the server has.
    """
    contestant = server.contestant
    expected = np.load(work.folder / f'{contestant.opens_with}.npy')
    doors = {}
    for name, door in contestant.doors.items():
        try:
            answers = [
                server.ask(door, file.read_bytes())
                for file in sorted(work.requests(door, 8).iterdir())
            ]
        except NoSuchDoor:
            print(f'{contestant.title} has no {DOORS[door].path}: left out', file=sys.stderr)
            continue
        given = np.concatenate([DOORS[door].read(answer) for answer in answers])
        if given.shape != expected.shape:
            raise RuntimeError(f'{contestant.title}, {name}: {given.shape}, not {expected.shape}')
        cosine = smallest_cosine(given, expected)
        print(f'{work.kind}: {contestant.title}, {name}: cosine {cosine:.5f}', file=sys.stderr)
        if contestant.min_cosine is not None and not cosine >= contestant.min_cosine:
            raise RuntimeError(f'{contestant.title}, {name}: other vectors, cosine {cosine:.5f}')
        doors[name] = door
    return doors


def compare(
    kind: str, folder: Path, num_rounds: int, seconds: float, more: Mapping[str, Any] | None
) -> tuple[dict[Load, list[Row]], str]:
    """Measure everybody of one kind.

    Returns:
        Rows by load, the limit first, the script second; and how the limit shared the cores.
    """
    work = Work(kind, folder / kind)
    limit = Talker('serve_limit.py', str(work.folder))
    script = Talker('serve_limit.py', str(work.folder), '--script')
    way = json.loads(limit.greeting)['way']
    dim = np.load(work.folder / 'limit.npy').shape[1]
    rows: dict[Load, list[Row]] = {load: [Row(LIMIT), Row(SCRIPT)] for load in LOADS}
    with ExitStack() as stack:
        stack.callback(limit.close)
        stack.callback(script.close)
        servers = [
            (server, compare_vectors(server, work))
            for server in (
                stack.enter_context(started(each, work, folder / f'{kind}-{i}'))
                for i, each in enumerate(contestants(kind, more))
            )
        ]
        asked = list(_turns(servers, rows))
        for number in range(num_rounds):
            for load in LOADS:
                measure_limit(limit, rows[load][0], seconds)
                measure_limit(script, rows[load][1], seconds)
                for server, door, its_load, row in asked:
                    if its_load == load:
                        measure_server(server, door, load, work, dim, row, seconds)
            print(f'{kind}: round {number + 1} of {num_rounds}', file=sys.stderr, flush=True)
    return rows, way


def _turns(
    servers: list[tuple[Server, dict[str, str]]], rows: dict[Load, list[Row]]
) -> Iterator[tuple[Server, str, Load, Row]]:
    """Who is asked how, each with the row for it."""
    for load in LOADS:
        for server, doors in servers:
            for name, door in doors.items():
                # one of these sends few or many as it likes; its own cost shows with many
                other_load = door == 'jina' and load != Load(1, 64)
                if other_load or load.at_once > server.contestant.most_at_once:
                    continue
                row = Row(f'{server.contestant.title}, {name}', server.contestant.is_ours)
                rows[load].append(row)
                yield server, door, load, row


def print_tables(kind: str, rows: Mapping[Load, list[Row]]) -> None:
    """Print a Markdown table of all loads; a star stands where a peer is not behind ours."""
    print(
        f'\n| {TITLES[kind]} | docs/s | to the limit | to the script | p50 ms | p99 ms '
        "| CPU ms a doc | clients' | MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for load, of_load in rows.items():
        print(f'| *{load}* | | | | | | | | |')
        ours = {row.protocol: statistics.median(row.speeds) for row in of_load if row.is_ours}
        for row in of_load:
            speed = statistics.median(row.speeds)
            # against ours over the same protocol
            star = '*' if not row.is_ours and speed >= ours.get(row.protocol, math.inf) else ''
            times = [
                f'{percentile(row.seconds, part) * 1000:,.1f}' if row.seconds else ''
                for part in (0.5, 0.99)
            ]
            cpu = [
                f'{statistics.median(each) * 1000:.2f}' if each else ''
                for each in (row.server_cpu, row.client_cpu)
            ]
            shares = [f'{share_of(row, other):.2f}' for other in of_load[:2]]
            cells = [f'{speed:,.1f}{star}', *shares, *times, *cpu, f'{row.peak_mb:,.0f}']
            title = f'**{row.title}**' if row.is_ours else row.title
            print(f'| {title} | {" | ".join(cells)} |', flush=True)


def share_of(row: Row, other: Row) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(own / its for own, its in zip(row.speeds, other.speeds, strict=True))


def print_targets(rows: Mapping[Load, list[Row]]) -> None:
    """Say which shares of the script's speed ours reaches where the server is busy."""
    print()
    for name, target in TARGETS.items():
        for load in LOADS:
            if load == Load(1, 1):
                continue  # nothing to overlap with: it tells of latency
            for row in rows[load]:
                if row.title == f'finetuner, {name}':
                    share = share_of(row, rows[load][1])
                    word = 'reached' if share >= target else 'NOT reached'
                    print(f'- {name}, {load}: {share:.2f} of the script; {target} is {word}')


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=3, help='of each load in a round')
    parser.add_argument('--only', choices=TITLES)
    parser.add_argument(
        '--uses-with',
        type=json.loads,
        metavar='JSON',
        help='one more of ours, whose Executor is given these arguments, such as '
        '\'{"artifact": "path", "precision": "int8"}\'; goes with --only',
    )
    arguments = parser.parse_args()
    if arguments.uses_with is not None and arguments.only is None:
        parser.error('--uses-with goes with --only: say which kind it is')
    return arguments


def main() -> None:
    """Measure all and print the tables."""
    arguments = parse_arguments()
    kinds = [kind for kind in TITLES if arguments.only in (None, kind)]
    if 'texts' in kinds and not INFINITY.exists():
        sys.exit(f'{INFINITY} is missing: `make bench-serve` installs it')
    # the servers end with us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cores = len(os.sched_getaffinity(0))
    print(f'{cores} cores, medians of {arguments.rounds} rounds of {arguments.seconds:g} s')
    with tempfile.TemporaryDirectory(prefix='serve-') as folder:
        for kind in kinds:
            rows, way = compare(
                kind, Path(folder), arguments.rounds, arguments.seconds, arguments.uses_with
            )
            print_tables(kind, rows)
            print_targets(rows)
            print(f'- the limit: {way}')


if __name__ == '__main__':
    main()
