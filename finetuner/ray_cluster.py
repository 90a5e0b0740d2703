"""The one door to Ray: imports it, connects to a cluster, and submits jobs to one.

Ray is optional: nothing here is called where runs are processes of one machine. Its token
authentication is on unless `RAY_AUTH_MODE` says otherwise; Ray looks for the token itself, in
`RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` and `~/.ray/auth_token`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetuner.excepts import ConfigError, ServerError

LOCAL = 'local'
AUTO = 'auto'
NAMESPACE = 'finetuner'

_EXTRA = "it is not installed: pip install 'finetuner[ray]'"
_PROBE_SECONDS = 5.0
_FOLLOW_SECONDS = 1.0
_SUBMIT_SECONDS = 30.0
# what Ray sets for the entrypoint of a job, which connects as the cluster does
_WITHIN_JOB = 'RAY_JOB_CONFIG_JSON_ENV_VAR'


def import_ray() -> Any:
    """Import Ray, with token authentication on.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    if _WITHIN_JOB not in os.environ:
        os.environ.setdefault('RAY_AUTH_MODE', 'token')
    # says what a later release will do to variables that nobody here sets
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Pydantic v1 is deprecated', FutureWarning)
        try:
            import ray
        except ModuleNotFoundError as error:
            if (error.name or '').partition('.')[0] != 'ray':
                raise
            raise ConfigError(f'this needs Ray, and {_EXTRA}') from error
    return ray


def check_driver_address(address: str) -> str:
    """Check the address of a cluster as `driver` takes it.

    Raises:
        ConfigError: it is another kind of address; says what is allowed.
    """
    if address in (LOCAL, AUTO):
        return address
    host, colon, port = address.rpartition(':')
    if '://' in address or not host or not colon or not port.isdigit():
        raise ConfigError(
            f"{address!r} is no address of a Ray cluster to connect to: give 'auto' on one of its "
            "machines, 'host:port' of its head, or 'local' for one of this process alone"
        )
    return address


@contextmanager
def driver(
    address: str = AUTO, num_cpus: int | None = None, show_logs: bool = True
) -> Iterator[Any]:
    """Connect this process to a cluster, and let go of it at the end.

    What is connected already stays connected.

    Args:
        address: `auto` for the cluster that this machine belongs to, `host:port` of a head, or
            `local` for a cluster of this process's own, which ends with it.
        num_cpus: of a `local` cluster; None for those of the machine.
        show_logs: print what workers print, and what becomes of nodes, to this process's stdout.

    Yields:
        The module `ray`.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        ServerError: nothing answers there, or the token is not the cluster's.
    """
    check_driver_address(address)
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    given = None if address == LOCAL else address
    if given not in (None, AUTO):
        host, _, port = address.rpartition(':')
        _probe(host.strip('[]'), int(port), address)
    with _own_signals():
        _connect(ray, address, num_cpus, show_logs)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, num_cpus: int | None, show_logs: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Pydantic v1 is deprecated', FutureWarning)
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                num_cpus=num_cpus if address == LOCAL else None,
                include_dashboard=False if address == LOCAL else None,
                logging_level='WARNING',
                log_to_driver=show_logs,
            )
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ServerError(
                f'no Ray cluster lets this process in at {address!r} ({_first_line(error)}): start '
                'it, name its address, and give it and this process the same token in '
                'RAY_AUTH_TOKEN or ~/.ray/auth_token'
            ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which Ray would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_jobs_address(address: str) -> str:
    """Check the address of a cluster's jobs API.

    Raises:
        ConfigError: it is no `http://` or `https://` address.
    """
    parts = urlsplit(address)
    if parts.scheme not in ('http', 'https') or not parts.hostname:
        raise ConfigError(
            f'{address!r} is no address of the jobs API of a Ray cluster: give that of its '
            'dashboard, such as http://127.0.0.1:8265'
        )
    return address.rstrip('/')


def jobs_client(address: str) -> Any:
    """Connect to the jobs API of a cluster.

    Args:
        address: of its dashboard, such as `http://127.0.0.1:8265`.

    Returns:
        Ray's `JobSubmissionClient`.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        ServerError: nothing answers there, or the token is not the cluster's.
    """
    address = check_jobs_address(address)
    ray = import_ray()
    from ray.job_submission import JobSubmissionClient

    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    _probe(str(parts.hostname), port, address)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ServerError(
            f'the jobs API at {address} lets nobody in: {_first_line(error)}. This process needs '
            "the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token, or RAY_AUTH_MODE=disabled "
            'for a cluster without one, before anything imports ray, which looks for them only once'
        ) from error


def _probe(host: str, port: int, address: str) -> None:
    """Ray itself tries for minutes where nobody listens."""
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        raise ServerError(f'no Ray cluster answers at {address}: {error}') from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def job_command(module: str, *arguments: str) -> str:
    """The entrypoint of a job that runs a module of this package, by this process's Python."""
    return shlex.join([sys.executable, '-m', module, *arguments])


def job_environment() -> dict[str, str]:
    """Of a job's process: no secrets, since Ray shows it."""
    environment = {'PYTHONSAFEPATH': '1', 'PYTHONUNBUFFERED': '1'}
    root = Path(__file__).parents[1]
    if root.name not in ('site-packages', 'dist-packages'):
        # run from its sources, the package is found only where this process found it
        environment['PYTHONPATH'] = str(root)
    return environment


def submit_job(client: Any, command: str, job: str, metadata: dict[str, str] | None = None) -> None:
    """Submit a job; a cluster that is just starting, or has lost a node, is given some time.

    Args:
        client: as `jobs_client` gives it.
        command: its entrypoint, as `job_command` gives it.
        job: its id.
        metadata: shown beside it.

    Raises:
        ServerError: the cluster does not take it.
    """
    deadline = time.monotonic() + _SUBMIT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=job,
                metadata=metadata,
                runtime_env={'env_vars': job_environment()},
            )
            return
        except (RuntimeError, OSError) as error:
            later = 'try again later' in str(error) and time.monotonic() < deadline
            if not later:
                raise ServerError(
                    f'the Ray cluster does not take the job {job}: {_first_line(error)}'
                ) from error
        time.sleep(_FOLLOW_SECONDS)


def follow_job(address: str, command: str, name: str) -> Generator[str, None, None]:
    """Submit a job, and wait for its end; whoever leaves earlier ends it.

    Args:
        address: of the cluster's jobs API.
        command: its entrypoint, as `job_command` gives it.
        name: what its id begins with.

    Yields:
        The lines that it prints.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        ServerError: the cluster does not answer, or the job could not begin.
    """
    client = jobs_client(address)
    job = f'{name}-{secrets.token_hex(4)}'
    submit_job(client, command, job)
    num_lines = 0
    try:
        while True:
            ended = client.get_job_status(job).is_terminal()
            lines = client.get_job_logs(job).splitlines()
            # the last one may be half a line
            whole = lines if ended else lines[:-1]
            yield from whole[num_lines:]
            num_lines = max(num_lines, len(whole))
            if ended:
                return
            time.sleep(_FOLLOW_SECONDS)
    except (RuntimeError, OSError) as error:
        raise ServerError(
            f'the Ray cluster at {address} does not answer: {_first_line(error)}'
        ) from error
    finally:
        with contextlib.suppress(RuntimeError, OSError):
            if not client.get_job_status(job).is_terminal():
                client.stop_job(job)
