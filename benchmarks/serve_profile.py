"""Where the time of our server goes under load: CPU of each process, by stage.

py-spy looks at the stacks of gateway and Executor a few hundred times a second, the kernel tells what
each thread has used. Stages are told apart by the innermost of our or a library's functions on the
stack that `STAGES` knows. py-spy comes with what `make bench-serve` installs.

    .venv/bin/python benchmarks/serve_profile.py     # --kind texts --door http --clients 32 ...
    .venv/bin/python benchmarks/serve_profile.py --flamegraph folder    # one SVG a process as well
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import psutil
from serve import Load, Row, measure_server
from serve_contestants import INFINITY, Server, contestants, started
from serve_work import DOORS, Work

PY_SPY = INFINITY.with_name('py-spy')
_RATE = 100
_LEAST_SHARE = 0.01
# innermost functions of threads that wait; where cores are busy, py-spy takes some of them for active
_WAITS = re.compile(
    r'_worker \(concurrent|Thread\.(run|_wait)|Condition\.wait|EpollSelector\.select|accept \('
)
# the first pattern that fits a function, from the innermost outwards
STAGES = (
    ('decode and resize', r'\(finetuner/images\.py'),
    ('tokenise', r'\(finetuner/data/collation\.py|\(tokenizers/'),
    ('inference', r'\(onnxruntime/|embed \(finetuner/engines'),
    ('threads started and joined', r'\((threading|concurrent/futures/thread)\.py'),
    ('JSON and base64', r'\((json|base64)/?|json_documents\.py'),
    (
        'tokens and identity',
        r'\(finetuner/(server/(security|identity)|storage)|\(sqlalchemy/|<sqlalchemy',
    ),
    ('parameters (Struct)', r'google/protobuf/(json_format|internal/well_known)|parameters \(jina'),
    ('Documents from and to protobuf', r'\(docarray/(proto|document/mixins/proto|array/mixins/io)'),
    ('Documents', r'\(docarray/'),
    (
        'protobuf of requests',
        r'\(google/protobuf|\(jina/types/request|SerializeToString|FromString',
    ),
    ('metrics and tracing', r'\((prometheus_client|opentelemetry)/|\(jina/serve/monitoring'),
    ('gRPC', r'\(grpc/|_cython'),
    ('HTTP', r'\((uvicorn|starlette|fastapi|h11|httptools|anyio)/'),
    ('Jina', r'\(jina/'),
    ('our server', r'\(finetuner/'),
    ('event loop', r'\((asyncio|selectors)'),
)


def stage_of(stack: Iterable[str]) -> str:
    """The stage of a stack, whose functions come from the outermost in."""
    for function in reversed(list(stack)):
        for name, pattern in STAGES:
            if re.search(pattern, function):
                return name
    return 'other'


def read_stacks(text: str) -> Counter[str]:
    """Samples by stage, of what py-spy writes with `--format raw`; those that wait are left out."""
    found: Counter[str] = Counter()
    # a stack ends with its innermost function
    for line in text.splitlines():
        stack, _, count = line.rpartition(' ')
        functions = [function for function in stack.strip().split(';') if function]
        if functions and not _WAITS.match(functions[-1]):
            found[stage_of(functions)] += int(count)
    return found


class Watched:
    """A process of the server, before and after.

    Attributes:
        pid: its number.
        name: `gateway`, `executor` or what else it is.
        cpu_seconds: used while it was watched.
        native: of that, what threads without Python used, by what the kernel calls them.
    """

    def __init__(self, pid: int, ports: Collection[int]) -> None:
        """Look at its threads; who listens to one of these ports is the gateway."""
        self.pid = pid
        dumped = subprocess.run(
            [str(PY_SPY), 'dump', '--json', '--nonblocking', '--pid', str(pid)],
            capture_output=True,
            text=True,
            check=True,
        )
        threads = json.loads(dumped.stdout)
        listens = {
            each.laddr.port
            for each in psutil.Process(pid).net_connections()
            if each.status == psutil.CONN_LISTEN
        }
        self.name = 'Executor' if 'embed-0' in dumped.stdout else 'other'
        if listens & set(ports):
            self.name = 'gateway'
        self._python = {thread['os_thread_id'] for thread in threads}
        self._before = self._now()
        self.cpu_seconds = 0.0
        self.native: Counter[str] = Counter()

    def end(self) -> None:
        """Look again."""
        total, threads = self._now()
        self.cpu_seconds = total - self._before[0]
        for thread, seconds in threads.items():
            used = seconds - self._before[1].get(thread, seconds)
            if thread not in self._python and used > 0:
                comm = Path(f'/proc/{self.pid}/task/{thread}/comm').read_text().strip()
                self.native['threads of gRPC' if _is_grpc(comm) else 'inference'] += used

    def _now(self) -> tuple[float, dict[int, float]]:
        process = psutil.Process(self.pid)
        threads = {each.id: each.user_time + each.system_time for each in process.threads()}
        return sum(process.cpu_times()[:2]), threads


def _is_grpc(comm: str) -> bool:
    return comm.startswith(('grpc', 'event_engine', 'resolver', 'default-exec', 'lifeguard'))


def by_stage(process: Watched, samples: Counter[str]) -> dict[str, float]:
    """Seconds of CPU by stage; what threads with Python used is divided as the samples are."""
    seconds = Counter(process.native)
    left = process.cpu_seconds - sum(process.native.values())
    for stage, count in samples.items():
        seconds[stage] += left * count / samples.total()
    return dict(seconds.most_common())


def _record(process: Watched, kind: str, seconds: float, folder: Path) -> list[str]:
    options = {
        'pid': process.pid,
        'rate': _RATE,
        'format': kind,
        'duration': round(seconds) + 1,
        'output': folder / f'{process.name}-{process.pid}.{kind}.svg',
    }
    given = [str(word) for name, value in options.items() for word in (f'--{name}', value)]
    return [str(PY_SPY), 'record', *given]


def watch(
    server: Server, door: str, load: Load, work: Work, seconds: float, folder: Path, svg: bool
) -> tuple[Row, list[tuple[Watched, Counter[str]]]]:
    """Load the server and look at its processes meanwhile."""
    dim = len(np.load(work.folder / 'limit.npy')[0])
    measure_server(server, door, load, work, dim, Row('warm'), 2)
    family = psutil.Process(server.process.pid).children(recursive=True)
    processes = [Watched(each.pid, server.ports.values()) for each in family]
    kinds = ['raw', 'flamegraph'] if svg else ['raw']
    spies = [
        subprocess.Popen(
            _record(each, kind, seconds, folder),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in processes
        for kind in kinds
    ]
    row = Row('watched')
    measure_server(server, door, load, work, dim, row, seconds)
    for each in processes:
        each.end()
    for spy in spies:
        spy.wait(120)
    found = []
    for each in processes:
        raw = folder / f'{each.name}-{each.pid}.raw.svg'
        found.append((each, read_stacks(raw.read_text() if raw.exists() else '')))
        raw.unlink(missing_ok=True)
    return row, found


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kind', choices=('pictures', 'texts'), default='pictures')
    parser.add_argument('--door', choices=DOORS, default='grpc')
    parser.add_argument('--clients', type=int, default=32)
    parser.add_argument('--documents', type=int, default=1, help='in a request')
    parser.add_argument('--seconds', type=float, default=10)
    parser.add_argument('--flamegraph', type=Path, help='folder for an SVG of each process')
    return parser.parse_args()


def main() -> None:
    """Watch, and print a table."""
    arguments = parse_arguments()
    if not PY_SPY.exists():
        sys.exit(f'{PY_SPY} is missing: `make bench-serve` installs it')
    load = Load(arguments.clients, arguments.documents)
    with tempfile.TemporaryDirectory(prefix='serve-') as name:
        folder = Path(name)
        work = Work(arguments.kind, folder / 'work')
        ours = next(each for each in contestants(arguments.kind, None) if each.is_ours)
        output = arguments.flamegraph or folder
        output.mkdir(parents=True, exist_ok=True)
        with started(ours, work, folder / 'server') as server:
            given = server.ask('grpc', next(work.requests('grpc', 64).iterdir()).read_bytes())
            np.save(work.folder / 'limit.npy', DOORS['grpc'].read(given))
            row, found = watch(
                server,
                arguments.door,
                load,
                work,
                arguments.seconds,
                output,
                arguments.flamegraph is not None,
            )
    num_documents = sum(each.cpu_seconds for each, _ in found) / row.server_cpu[0]
    print(f'{arguments.kind}, {arguments.door}, {load}: {row.speeds[0]:,.1f} documents/s')
    print('\n| process | stage | CPU ms a document | share |\n|---|---|---|---|')
    total = sum(each.cpu_seconds for each, _ in found)
    for each, samples in found:
        for stage, seconds in by_stage(each, samples).items():
            if seconds >= _LEAST_SHARE * total:
                share = seconds / total
                cost = 1000 * seconds / num_documents
                print(f'| {each.name} | {stage} | {cost:.2f} | {share:.0%} |')


if __name__ == '__main__':
    main()
