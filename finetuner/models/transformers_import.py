"""Import transformers, whatever torchvision is like, and have it keep to itself."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.models.torchvision_import import import_torchvision

_lock = threading.Lock()


def import_transformers() -> Any:
    """Import transformers, which imports torchvision; from any thread."""
    import_torchvision()
    # it puts another module in its own place while it is imported: a thread that waits for the end of
    # that is left with the first one
    with _lock:
        import transformers

        return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep progress bars and notes about unused heads to itself."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


@contextlib.contextmanager
def as_config_error(name: str) -> Iterator[None]:
    """Say of whatever goes wrong in reading a user's files which model it was.

    Raises:
        ConfigError: instead of what transformers raised.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    logger = logging.getLogger('finetuner.models')
    try:
        yield
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        KeyError,
        ImportError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        logger.debug('Loading %s failed', name, exc_info=True)
        reason = ' '.join(str(error).split())[:300]
        raise ConfigError(f'the transformer in {name!r} cannot be loaded: {reason}') from error
