"""Look at the files of an artifact before any library opens them: what could do harm is refused.

Hashes say that an artifact is as whoever made it wanted it, not that it is harmless: a config can name
code to run or fetch, sizes that no machine has room for, and a tokenizer texts that it puts before
each of ours. What is checked here costs milliseconds; the shapes of weights are checked by those who
load them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from finetuner.excepts import ArtifactError
from finetuner.model_spec import MANIFEST
from finetuner.onnx_check import check_graph

# of what this library, transformers and sentence-transformers write, nothing that is code or pickle
_ENDINGS = ('.json', '.safetensors', '.onnx', '.md', '.txt', '.model', '.jinja')
# these have transformers load other weights than those at hand, and run them through other code
_REFUSED_NAMES = ('adapter_config.json',)
# what a config says of code of its own (`auto_map`) is passed over by those who read it
_REFUSED_KEYS = ('quantization_config',)
_ATTENTION = ('attn_implementation', '_attn_implementation')
_MAX_JSON_BYTES = 128 << 20
_MAX_SIZE = 1 << 24
# of a normaliser's replacements and the like: more would be put into each text
_MAX_TOKENIZER_TEXT = 1_000
_TOKENIZER_PARTS = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
_SIZES = (
    'hidden_size',
    'intermediate_size',
    'vocab_size',
    'max_position_embeddings',
    'num_attention_heads',
    'projection_dim',
    'image_size',
)
_LAYERS = ('num_hidden_layers', 'num_layers', 'n_layers', 'n_layer', 'encoder_layers')


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Refuse an artifact with a file that had better not be opened.

    Args:
        directory: of the artifact.
        names: its files, relative to it, each there and no link.

    Raises:
        ArtifactError: a file is of no kind that artifacts hold, is damaged, or asks for what no
            artifact of this library needs; or one lies there that is not among the names.
    """
    names = frozenset(names)
    for path in directory.rglob('[!.]*'):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST and name not in names:
            # nobody compared its hash, and transformers reads what it finds
            raise ArtifactError(f'{name!r} lies in the artifact and is none of its files')
    for name in sorted(names):
        path = directory / name
        place = PurePosixPath(name)
        if place.suffix not in _ENDINGS or place.name in _REFUSED_NAMES:
            raise ArtifactError(
                f'the artifact holds {name!r}: it is made of {", ".join(_ENDINGS)} files, none of '
                'them adapters or code'
            )
        if place.suffix == '.onnx':
            check_graph(path)
        elif place.suffix == '.safetensors':
            _tensor_names(path)
        elif place.name == 'config.json' and (path.parent / 'model.safetensors').is_file():
            _check_config(path, name)
        elif place.name == 'tokenizer.json':
            _check_tokenizer(path, name)
        elif place.name == 'tokenizer_config.json':
            _check_keys(_read(path, name), name)


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'numpy') as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f'the weights in {path.name} cannot be read: {error}') from error


def _check_config(path: Path, name: str) -> None:
    config = _read(path, name)
    _check_keys(config, name)
    num_tensors = len(_tensor_names(path.parent / 'model.safetensors'))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in (*_SIZES, *_LAYERS):
            value = part.get(key)
            # a layer has a tensor at least, or is that of another again
            most = _MAX_SIZE if key in _SIZES else num_tensors
            if isinstance(value, (int, float)) and not 0 < value <= most:
                raise ArtifactError(
                    f'{name} of the artifact says {key}={value}, which its weights cannot fill'
                )


def _check_keys(config: dict[str, Any], name: str) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        named = [key for key in _REFUSED_KEYS if key in part]
        # an implementation of attention may be the name of a repository to fetch code from
        named += [key for key in _ATTENTION if not str(part.get(key) or 'x').isidentifier()]
        if named:
            raise ArtifactError(
                f'{name} of the artifact asks for code that is not part of it ({named[0]}), which '
                'is never run'
            )


def _check_tokenizer(path: Path, name: str) -> None:
    tokenizer = _read(path, name)
    for part in _TOKENIZER_PARTS:
        if any(len(text) > _MAX_TOKENIZER_TEXT for text in _texts(tokenizer.get(part))):
            raise ArtifactError(f'{name} of the artifact would put a long text into each text')
    model = tokenizer.get('model')
    vocabulary = model.get('vocab') if isinstance(model, dict) else None
    config = path.parent / 'config.json'
    if not isinstance(vocabulary, dict) or not config.is_file():
        return
    size = _read(config, 'config.json').get('vocab_size')
    if isinstance(size, int) and any(number >= size for number in vocabulary.values()):
        raise ArtifactError(f'{name} of the artifact has tokens that its model does not know')


def _texts(value: Any) -> Iterator[str]:
    """The texts in a JSON value, but for the table that stands for a normaliser's rules."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += [inner for key, inner in one.items() if key != 'precompiled_charsmap']


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f'it is larger than {_MAX_JSON_BYTES:,} bytes')
        value = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f'{name} of the artifact cannot be read: {error}') from error
    if not isinstance(value, dict):
        raise ArtifactError(f'{name} of the artifact is no JSON object')
    return value
