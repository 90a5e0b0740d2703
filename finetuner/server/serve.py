"""Start a Flow and serve it until it is told to end, leaving no process behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from finetuner.excepts import ConfigError, FinetunerError

if TYPE_CHECKING:
    from jina import Flow


def serve_flow(flow: Path) -> None:
    """Serve a Flow until Ctrl+C or SIGTERM.

    Args:
        flow: its YAML.

    Raises:
        ConfigError: there is no such file, Jina is not installed, or the Flow binds an address
            that others can reach and no token is set.
    """
    if not flow.is_file():
        raise ConfigError(f'there is no Flow {str(flow)!r}: give the path of a Flow YAML')
    os.environ.setdefault('JINA_OPTOUT_TELEMETRY', '1')
    loaded = _load_flow(flow)
    _refuse_open_flow(loaded)

    def interrupt(*_: object) -> NoReturn:
        # Jina ends its children after Ctrl+C only: SIGTERM orphans them, their ports bound
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    from jina.excepts import RuntimeFailToStart

    try:
        with loaded:
            loaded.block()
    except KeyboardInterrupt:
        pass  # while it was starting; block() ends by itself
    except RuntimeFailToStart as error:
        raise FinetunerError('the server did not start; the reason is logged above') from error


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


def _refuse_open_flow(flow: Flow) -> None:
    """Check before anything starts that nobody else reaches the gateway or an Executor."""
    from finetuner.server.security import TokenCheck, refuse_open_server

    token = TokenCheck.from_environment()
    for _, deployment in flow:
        hosts = deployment.args.host
        for host in hosts if isinstance(hosts, list) else [hosts]:
            refuse_open_server(host, token)
