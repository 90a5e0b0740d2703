"""Start a Flow and serve it until it is told to end, leaving no process behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from finetuner.excepts import ConfigError, FinetunerError
from finetuner.server.multiprocess import metrics_directory

if TYPE_CHECKING:
    from jina import Flow

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def serve_flow(flow: Path, host: str | None = None) -> None:
    """Serve a Flow until Ctrl+C, SIGTERM or the end of the terminal.

    The gateway then takes no new requests and answers those it has, before anything else ends.

    Args:
        flow: its YAML.
        host: address that the gateway binds in place of the Flow's; Executors keep theirs.

    Raises:
        ConfigError: there is no such file, Jina is not installed, or the Flow binds an address
            that others can reach and no token is set.
    """
    if not flow.is_file():
        raise ConfigError(f'there is no Flow {str(flow)!r}: give the path of a Flow YAML')
    os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
    # before Jina is imported, and prometheus_client with it
    with metrics_directory():
        loaded = _load_flow(flow)
        _refuse_open_flow(loaded, host)
        if host is not None:
            loaded.config_gateway(host=host, copy_flow=False)
        _serve(loaded)


def _serve(flow: Flow) -> None:
    asked: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        # Jina ends its children after Ctrl+C only: SIGTERM orphans them, their ports bound
        asked.append(number)
        for name in _ENDING:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    for name in (signal.SIGINT, *_ENDING):
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup
            signal.signal(name, interrupt)
    from jina.excepts import RuntimeFailToStart

    try:
        with flow:
            _keep_from_terminal()
            if not asked:  # what Jina prints while it starts can swallow the interrupt
                flow.block()
    except KeyboardInterrupt:
        pass  # while it was starting; block() ends by itself
    except RuntimeFailToStart as error:
        raise FinetunerError('the server did not start; the reason is logged above') from error


def _keep_from_terminal() -> None:
    """Take the processes of the Flow out of reach of Ctrl+C.

    A terminal sends it to all of its processes, and the Executors would end while the gateway waits
    for their answers. So it reaches this process alone, which ends them in order.
    """
    for child in multiprocessing.active_children():
        # it may have ended by itself; and one that runs another program cannot be moved
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(child.pid or 0, 0)


def _load_flow(path: Path) -> Flow:
    import_jina()
    from jina import Flow

    # a bare file name makes Jina look for its modules in the root folder
    return Flow.load_config(str(path.resolve()))


def import_jina() -> None:
    """Import Jina without its warning about pkg_resources, or say how to install it.

    Raises:
        ConfigError: Jina is not installed.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)
            import jina  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'serving needs the module {error.name!r}: pip install "finetuner[serve]"'
        ) from error


def _refuse_open_flow(flow: Flow, host: str | None) -> None:
    """Check before anything starts that nobody else reaches the gateway or an Executor."""
    from finetuner.server.security import TokenCheck, refuse_open_server

    token = TokenCheck.from_environment()
    if host is not None:
        refuse_open_server(host, token)
    for _, deployment in flow:
        hosts = deployment.args.host
        for host in hosts if isinstance(hosts, list) else [hosts]:
            refuse_open_server(host, token)
