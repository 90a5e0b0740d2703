"""Real servers for the tests: `finetuner serve` in a process of its own, on free ports."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from jina import Client

from finetuner.client import LocalClient
from finetuner.config import Settings

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Server:
    """A server and how to talk to it."""

    process: subprocess.Popen
    grpc_port: int
    http_port: int
    log: Path

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.http_port}'

    def client(self, protocol: str = 'grpc') -> Client:
        port = self.grpc_port if protocol == 'grpc' else self.http_port
        return Client(host='127.0.0.1', port=port, protocol=protocol)

    def post(self, path: str, body: dict | None = None, **options) -> httpx.Response:
        return httpx.post(f'{self.url}{path}', json=body or {}, timeout=120, **options)


def free_ports(count: int) -> list[int]:
    """Ports below those that connections going out are given, which other tests have many of."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(('127.0.0.1', port))
            found.append(port)
    return found if len(set(found)) == count else free_ports(count)


def flow_on_free_ports(source: str, folder: Path) -> tuple[Path, int, int]:
    """Copy a Flow's YAML with other ports; what it refers to stays where it is."""
    grpc_port, http_port = free_ports(2)
    text = source.replace('../executors', str(REPOSITORY / 'executors'))
    text, found = re.subn(r'port: \[.*\]', f'port: [{grpc_port}, {http_port}]', text)
    assert found == 1
    path = folder / 'flow.yml'
    path.write_text(text)
    return path, grpc_port, http_port


@contextmanager
def store_of(server: Server) -> Iterator[LocalClient]:
    """The server's runs, data and artifacts, looked at from outside."""
    client = LocalClient(Settings.from_environment(Path(server.log).parent / 'home'))
    yield client
    client.close()


@contextmanager
def serve(source: str, folder: Path, **environment: str) -> Iterator[Server]:
    """Start `finetuner serve` on a Flow's YAML and end it with SIGTERM."""
    path, grpc_port, http_port = flow_on_free_ports(source, folder)
    log = folder / 'server.log'
    server = Server(start(path, log, **environment), grpc_port, http_port, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        end(server.process)


def start(flow: Path, log: Path, **environment: str) -> subprocess.Popen:
    """Start `finetuner serve`; what it keeps is beside its log."""
    variables = {
        **os.environ,
        'FINETUNER_HOME': str(log.parent / 'home'),
        'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': '1',
        **environment,
    }
    with log.open('a') as output:
        return subprocess.Popen(
            [sys.executable, '-m', 'finetuner.cli', 'serve', str(flow)],
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_until_ready(server: Server, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert server.process.poll() is None, server.log.read_text()
        try:
            answer = httpx.get(f'{server.url}/dry_run', timeout=10)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if answer.status_code == 200:
            return
        time.sleep(0.2)
    raise AssertionError(f'not ready after {seconds} s: {server.log.read_text()}')


def end(process: subprocess.Popen, seconds: float = 30) -> int:
    """SIGTERM, as a service manager sends it; whatever is left after that is killed."""
    if process.poll() is not None:
        return process.returncode
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    finally:
        for child in family:
            if child.is_running():
                child.kill()
        process.kill()
