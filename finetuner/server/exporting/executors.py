"""Which code an Executor of a Flow stands for, and what a container starts it with."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from finetuner.excepts import ConfigError, unknown_name

GATEWAY_CLASS = 'finetuner.server.gateway.Gateway'
TRAINER_CLASS = 'finetuner.server.trainer.TrainerExecutor'
INDEXER_CLASS = 'finetuner.server.indexer.IndexExecutor'
# which Executors of ours there may not be several of, and why
ONE_REPLICA = {
    TRAINER_CLASS: 'a request that fails would go to the next replica and start a second run',
    INDEXER_CLASS: 'one process at a time can have an index open, and the others would not start',
}
_DOTTED = re.compile(r'[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+')
_IN_THE_IMAGE = 'config.yml'
_CONFIG_KEYS = {'jtype', 'with', 'metas', 'py_modules', 'version'}


@dataclass(frozen=True)
class Code:
    """What a container runs.

    Attributes:
        uses: what `jina executor --uses` is given in the container.
        image: the image that holds it; None for the library's own.
        is_own: whether it is the user's code, in an image of the user's.
        uses_with: arguments that its config.yml brings.
        name: of the config.yml, for messages to clients.
    """

    uses: str
    image: str | None = None
    is_own: bool = False
    uses_with: dict[str, Any] = field(default_factory=dict)
    name: str = ''


def find_code(name: str, executor: dict[str, Any], folder: Path, image: str | None) -> Code:
    """Find out what an Executor's `uses` means, without running anybody's code.

    Args:
        name: of the Executor.
        executor: its part of the Flow.
        folder: of the Flow, which relative paths start from.
        image: that the user gave for this Executor.

    Returns:
        What its container runs.

    Raises:
        ConfigError: there is nothing of that name, or an image would have to be built first.
    """
    uses = executor.get('uses')
    if isinstance(uses, dict):
        return _of_config(name, uses, folder, image, str(uses.get('jtype')))
    if not isinstance(uses, str) or not uses:
        raise ConfigError(f'Executor {name!r} has no `uses`: name its class or its config.yml')
    if uses.startswith('docker://'):
        return Code(_IN_THE_IMAGE, image or uses.removeprefix('docker://'), is_own=True)
    if '://' in uses:
        raise ConfigError(
            f'Executor {name!r} comes from a hub ({uses}), which an export does not ask: name its '
            'image as docker://NAME'
        )
    if uses.endswith(('.yml', '.yaml')):
        path = folder / uses
        return _of_config(name, _read_config(name, path), path.parent, image, uses)
    if not _DOTTED.fullmatch(uses):
        modules = executor.get('py_modules', [])
        return _of_config(name, {'jtype': uses, 'py_modules': modules}, folder, image, uses)
    if not uses.startswith('finetuner.'):
        return _own_code(name, uses, uses, image)
    _load_class(name, uses)
    return Code(uses, image)


def takes_argument(code: Code, argument: str) -> bool:
    """Whether a class of the library takes an argument; of others nothing is known."""
    if code.is_own:
        return False
    return argument in inspect.signature(_load_class('', code.uses).__init__).parameters


def _load_class(name: str, path: str) -> Any:
    module, _, attribute = path.rpartition('.')
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        import finetuner.server

        known = [cls for cls in finetuner.server.__all__ if cls.endswith('Executor')]
        message = unknown_name('class', attribute, known)
        raise ConfigError(f'Executor {name!r} uses {path}: {message}') from error


def _of_config(
    name: str, config: dict[str, Any], folder: Path, image: str | None, said: str
) -> Code:
    class_name = config.get('jtype')
    if not isinstance(class_name, str):
        raise ConfigError(f'Executor {name!r}: {said} names no class as `jtype`')
    ours = _class_of_ours(name, class_name, config.get('py_modules') or [], folder)
    if ours is None:
        return _own_code(name, _IN_THE_IMAGE, said, image)
    unknown = sorted(set(config) - _CONFIG_KEYS)
    if unknown:
        raise ConfigError(
            f'Executor {name!r}: {said} has {unknown[0]!r}, which an export cannot carry: '
            'write it into the Flow'
        )
    metas = config.get('metas') or {}
    return Code(ours, image, False, dict(config.get('with') or {}), str(metas.get('name') or ''))


def _class_of_ours(name: str, class_name: str, modules: Any, folder: Path) -> str | None:
    """The dotted path of a class of the library; None for code of the user's own."""
    import finetuner.server

    homes = finetuner.server._HOMES
    for module in [modules] if isinstance(modules, str) else modules:
        path = folder / module
        if not path.is_file():
            raise ConfigError(f'Executor {name!r}: there is no file {str(path)!r} (py_modules)')
        origin = _imported_from(path, class_name)
        if origin is None:
            return None
        return f'{origin}.{class_name}'
    if class_name in homes:
        return f'{homes[class_name]}.{class_name}'
    return None


def _imported_from(path: Path, class_name: str) -> str | None:
    """The module of the library that a file takes a class from and hands on unchanged."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f'{str(path)!r} is not Python: {error}') from error
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('finetuner.'):
            for alias in node.names:
                if alias.name == class_name and alias.asname in (None, class_name):
                    return node.module
    return None


def _read_config(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f'Executor {name!r}: there is no file {str(path)!r} (uses)')
    return read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read YAML as Jina reads it, its variables filled in.

    Raises:
        ConfigError: it is not YAML, or no mapping.
    """
    import yaml
    from jina.jaml import JAML

    try:
        text = path.read_text(encoding='utf-8')
        # Jina takes it for granted
        is_mapping = isinstance(yaml.compose(text, yaml.SafeLoader), yaml.MappingNode)
        found = JAML.load(text, substitute=True, context=None) if is_mapping else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f'{str(path)!r} is not YAML that can be read: {error}') from error
    if found is None:
        raise ConfigError(f'{str(path)!r} holds no mapping: give the YAML of a Flow')
    return found


def _own_code(name: str, uses: str, said: str, image: str | None) -> Code:
    if image is None:
        raise ConfigError(
            f'Executor {name!r} is code of your own ({said}), which the image of this library '
            f'does not hold: build one, its config.yml in the working directory, and name it with '
            f'--executor-image {name}=NAME'
        )
    return Code(uses, image, is_own=True)
