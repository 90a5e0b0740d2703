"""A real PostgreSQL server for the tests, where Debian's package is installed."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.serving import free_ports

INSTALLED = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'))
REASON = "PostgreSQL is not installed: apt-get install postgresql runs the store's tests on it too"


class PostgreSQL:
    """A server of one's own: data in a folder that is thrown away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / 'data'
        self._bin = INSTALLED[-1].parent
        self._port = free_ports(1)[0]
        # the server refuses to run as root
        self._user = pwd.getpwnam('postgres') if os.getuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        self._run('initdb', '-D', self._folder, '-U', 'tests', '-A', 'trust', '--no-sync')

    @property
    def url(self) -> str:
        return f'postgresql://tests@127.0.0.1:{self._port}/postgres'

    def start(self) -> None:
        options = f'-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='
        self._run('pg_ctl', '-D', self._folder, '-o', options, '-w', '-l', '/dev/null', 'start')

    def stop(self) -> None:
        self._run('pg_ctl', '-D', self._folder, '-m', 'immediate', '-w', 'stop')

    def create_database(self, name: str) -> str:
        address = ['-h', '127.0.0.1', '-p', str(self._port), '-U', 'tests']
        self._run('createdb', *address, name)
        return f'{self.url.rpartition("/")[0]}/{name}'

    def _run(self, program: str, *arguments: object) -> None:
        user = {} if self._user is None else {'user': self._user.pw_uid, 'group': self._user.pw_gid}
        subprocess.run(
            [str(self._bin / program), *map(str, arguments)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr,
            cwd='/',
            env={'PATH': os.environ['PATH'], 'LC_ALL': 'C'},
            **user,
        )


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """Start a server and end it."""
    folder = Path(tempfile.mkdtemp(prefix='postgresql-'))
    server = PostgreSQL(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
