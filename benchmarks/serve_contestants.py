"""Who takes part in `serve.py`, and their processes: started, asked, weighed and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import psutil
import yaml
from serve_clients import GRPC_METHOD, Job, Seen
from serve_work import DOORS, MODELS, ROOT, SERVED_NAME, Work, minilm_folder

HERE = Path(__file__).resolve().parent
INFINITY = ROOT / '.venv-infinity' / 'bin' / 'infinity_emb'
MIN_COSINE = 0.999
_START_SECONDS = 180
_END_SECONDS = 30
_LINES_OF_FAILURE = 30
# everybody has the threads that its libraries choose, and nobody asks a hub or tells anybody
_LEFT_OUT = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
_QUIET = {
    'HF_HUB_OFFLINE': '1',
    'JINA_OPTOUT_TELEMETRY': '1',
    'INFINITY_ANONYMOUS_USAGE_STATS': '0',
    'DO_NOT_TRACK': '1',
}


class NoSuchDoor(Exception):
    """The server has no such path."""


@dataclass(frozen=True)
class Contestant:
    """A server.

    Attributes:
        title: in the tables.
        doors: through which it is asked, by what the tables add to its title.
        uses_with: of our Executor; None for a server of others.
        script: the name that `serve_peers.py` knows, or `infinity`.
        min_cosine: of its vectors with those of the limit; None only tells it.
        opens_with: `pillow` for who opens pictures with it: the graph is shown the same pixels then.
        most_at_once: Documents on their way; loads beyond it are left out.
    """

    title: str
    doors: Mapping[str, str]
    uses_with: Mapping[str, Any] | None = None
    script: str = ''
    min_cosine: float | None = MIN_COSINE
    opens_with: str = 'limit'
    most_at_once: int = 10_000

    @property
    def is_ours(self) -> bool:
        """Whether it is finetuner."""
        return self.uses_with is not None


def contestants(kind: str, more: Mapping[str, Any] | None) -> list[Contestant]:
    """All of a kind.

    Args:
        kind: `pictures` or `texts`.
        more: `uses_with` of one more of ours, such as of another precision.
    """
    doors = {'gRPC': 'grpc', 'gRPC, jina.Client': 'jina', 'HTTP': 'http'}
    if kind == 'texts':
        doors['HTTP, /v1/embeddings'] = 'v1'
    ours = {'artifact': MODELS[kind], 'is_onnx': True}
    found = [Contestant('finetuner', doors, ours)]
    if more is not None:
        title = f'finetuner, {", ".join(f"{k} {Path(str(v)).name}" for k, v in more.items())}'
        few = {name: door for name, door in doors.items() if door in ('grpc', 'http')}
        found.append(Contestant(title, few, {**ours, **more}, min_cosine=None))
    if kind == 'pictures':
        peer = partial(Contestant, doors={'gRPC': 'grpc'}, opens_with='pillow')
        naive = peer('naive Jina Executor', script='naive', most_at_once=64)
        return [*found, naive, peer("Jina's @dynamic_batching", script='dynamic')]
    encode = Contestant(
        'sentence-transformers, FastAPI', {'HTTP': 'embed'}, script='sentence-transformers'
    )
    return [*found, encode, Contestant('infinity', {'HTTP': 'embeddings'}, script='infinity')]


@dataclass
class Server:
    """A contestant at work.

    Attributes:
        contestant: who it is.
        ports: of gRPC and of HTTP.
        process: the first of its processes.
        peak_mb: the most memory seen so far, pages that processes share counted once.
    """

    contestant: Contestant
    ports: Mapping[str, int]
    process: subprocess.Popen[bytes]
    peak_mb: float = 0.0
    _family: list[psutil.Process] = field(default_factory=list)

    def port(self, door: str) -> int:
        """The port of a door."""
        return self.ports['http' if DOORS[door].protocol == 'http' else 'grpc']

    def ask(self, door: str, payload: bytes) -> bytes:
        """Send one request.

        Raises:
            NoSuchDoor: there is no such path.
            OSError: the server does not answer.
        """
        if DOORS[door].protocol == 'http':
            url = f'http://127.0.0.1:{self.port(door)}{DOORS[door].path}'
            headers = {'Content-Type': 'application/json'}
            request = urllib.request.Request(url, payload, headers)
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                if DOORS[door].is_optional and error.code in (404, 405, 422):
                    raise NoSuchDoor(door) from error
                raise RuntimeError(f'answer {error.code}: {error.read()[:300]!r}') from error
        options = [('grpc.max_receive_message_length', -1), ('grpc.max_send_message_length', -1)]
        with grpc.insecure_channel(f'127.0.0.1:{self.port(door)}', options) as channel:
            try:
                return channel.unary_unary(GRPC_METHOD)(payload, timeout=300)
            except grpc.RpcError as error:
                raise ConnectionError(str(error)) from error

    def cpu_seconds(self) -> float:
        """Of all its processes."""
        if not self._family:
            first = psutil.Process(self.process.pid)
            self._family = [first, *first.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in self._family)

    def weigh(self) -> None:
        """Look at its memory."""
        first = psutil.Process(self.process.pid)
        family = [first, *first.children(recursive=True)]
        now = sum(process.memory_full_info().pss for process in family) / 2**20
        self.peak_mb = max(self.peak_mb, now)


@contextmanager
def started(contestant: Contestant, work: Work, folder: Path) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it."""
    folder.mkdir(parents=True)
    ports = dict(zip(('grpc', 'http'), _free_ports(2), strict=True))
    log = folder / 'server.log'
    variables = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    variables |= _QUIET | {'FINETUNER_HOME': str(folder / 'home')}
    if contestant.script == 'infinity':
        variables.pop('PYTHONPATH', None)
    else:
        before = variables.get('PYTHONPATH')
        variables['PYTHONPATH'] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    with log.open('wb') as output:
        process = subprocess.Popen(
            _command(contestant, ports, work, folder),
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(contestant, ports, process)
    try:
        _wait(server, work, log)
        yield server
    finally:
        _end(process, signal.SIGTERM if contestant.script == 'infinity' else signal.SIGINT)


def _command(
    contestant: Contestant, ports: Mapping[str, int], work: Work, folder: Path
) -> list[str]:
    if contestant.is_ours:
        flow = _write_flow(contestant, ports, folder)
        return [sys.executable, '-m', 'finetuner.cli', 'serve', str(flow)]
    if contestant.script == 'infinity':
        model = ['--model-id', str(minilm_folder()), '--served-model-name', SERVED_NAME]
        place = ['--host', '127.0.0.1', '--port', str(ports['http']), '--device', 'cpu']
        return [str(INFINITY), 'v2', *model, *place, '--dtype', 'float32']
    port = ports['http' if 'embed' in contestant.doors.values() else 'grpc']
    script = HERE / 'serve_peers.py'
    return [sys.executable, str(script), contestant.script, str(port), str(work.folder)]


def _write_flow(contestant: Contestant, ports: Mapping[str, int], folder: Path) -> Path:
    """The Flow that comes with the library, for another model on other ports."""
    place = ROOT / 'flows'
    flow = yaml.safe_load((place / 'encode.yml').read_text())
    flow['gateway']['port'] = [ports[protocol] for protocol in flow['gateway']['protocol']]
    (executor,) = [each for each in flow['executors'] if 'encoder' in each['uses']]
    executor['uses'] = str((place / executor['uses']).resolve())
    executor['uses_with'] = dict(contestant.uses_with or {})
    path = folder / 'flow.yml'
    path.write_text(yaml.safe_dump(flow, sort_keys=False))
    return path


def _wait(server: Server, work: Work, log: Path) -> None:
    door = next(iter(server.contestant.doors.values()))
    payload = next(work.requests(door, 1).iterdir()).read_bytes()
    until = time.monotonic() + _START_SECONDS
    while server.process.poll() is None and time.monotonic() < until:
        try:
            server.ask(door, payload)
        except OSError:
            time.sleep(0.3)
        else:
            return
    last = log.read_text(errors='replace').splitlines()[-_LINES_OF_FAILURE:]
    raise RuntimeError('\n'.join([f'{server.contestant.title} does not answer:', *last]))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Ask it to end; whatever is left after a while is killed."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=3)
    for child in alive:
        child.kill()


def smallest_cosine(given: np.ndarray, expected: np.ndarray) -> float:
    """Between rows of the same number."""
    products = (given * expected).sum(1)
    return float(
        (products / np.linalg.norm(given, axis=1) / np.linalg.norm(expected, axis=1)).min()
    )


class Talker:
    """A process that is told when to begin and to end, and answers what it saw.

    Attributes:
        process: of the clients, or of the limit.
    """

    def __init__(self, script: str, *arguments: str, job: Job | None = None) -> None:
        """Start it, and wait until it is ready."""
        variables = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        variables['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables | _QUIET,
        )
        if job is not None:
            self._write(json.dumps(job.__dict__))
        self.greeting = self._read()

    def begin(self, begin: float, end: float) -> None:
        """Say when."""
        self._write(f'{begin} {end}')

    def seen(self) -> Seen:
        """Wait for the answer."""
        found = json.loads(self._read())
        return Seen([tuple(each) for each in found['requests']], found['cpu_seconds'])

    def close(self) -> None:
        """Let it end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(_END_SECONDS)

    def _write(self, line: str) -> None:
        _open(self.process.stdin).write(f'{line}\n')
        _open(self.process.stdin).flush()

    def _read(self) -> str:
        line = _open(self.process.stdout).readline()
        if not line:
            self.process.wait(_END_SECONDS)
            raise RuntimeError(f'{self.process.args} ended with {self.process.returncode}')
        return line


def _open(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise ValueError('the stream is not a pipe')
    return stream
