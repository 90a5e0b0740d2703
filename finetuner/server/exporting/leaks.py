"""What must not stand in exported files, for all to read: tokens, keys and passwords of a Flow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetuner.excepts import ConfigError

TOKEN, KEY, DATABASE = 'FINETUNER_TOKEN', 'FINETUNER_GATEWAY_KEY', 'FINETUNER_DATABASE_URL'
# what an export fills from a Secret, and so nobody writes into a Flow
SECRETS = (TOKEN, KEY, DATABASE)
_SECRET_NAME = re.compile(
    r'(?:token|password|passwd|passphrase|secret|authorization'
    # the key of something, but no monkey
    r'|(?:^|[\W_\d]|api|access|secret|private|(?-i:(?<=[a-z])(?=K)))key)$',
    re.IGNORECASE,
)
_HARMLESS_NAME = re.compile(
    r'(?:^|.*_)(?:(?:bos|cls|eos|mask|pad|sep|unk)_token|(?:foreign|primary|public|sort)_key)',
    re.IGNORECASE,
)
# scheme://user:password@host; a port ends before the path
_PASSWORD_IN_URL = re.compile(r'\w://[^/\s:@?#]*:(?!\d*[/?#])[^\s@]+@')
# images, whose digests come behind an @, and what names a Secret
_NO_URLS = ('uses', 'env_from_secret')


def refuse_secrets(where: str, said: Mapping[str, Any]) -> None:
    """Turn away a part of a Flow that holds what nobody else should read.

    Args:
        where: whose part it is, for messages, which never show a value.
        said: the part.

    Raises:
        ConfigError: `env` or `uses_with` is no mapping, or a secret is in sight.
    """
    for key in ('env', 'uses_with'):
        if not isinstance(said.get(key) or {}, dict):
            raise ConfigError(f'{where}: `{key}` is no mapping, it is {said[key]!r}')
    for name in said.get('env') or {}:
        if name in SECRETS:
            raise ConfigError(
                f'{where} sets {name} in `env`, where it could be read: leave it out, the export '
                'takes it from a Secret'
            )
    for path, value in _leaves(said.get('env') or {}):
        if _is_secret(path, value):
            raise ConfigError(
                f'{where} sets {path} in `env`, where it could be read: name a Secret instead, '
                f'`env_from_secret: {{{path}: {{name: ..., key: ...}}}}`'
            )
    for path, value in _leaves(said.get('uses_with') or {}):
        if _is_secret(path, value):
            mend = (
                f'leave it out and set {TOKEN} with `env_from_secret`'
                if path == 'token'
                else 'have the Executor take it from a variable, and set that with '
                '`env_from_secret`'
            )
            raise ConfigError(
                f'{where} has a `{path}` in `uses_with`, where it could be read: {mend}'
            )
    if said.get('grpc_metadata'):
        raise ConfigError(
            f'{where} has `grpc_metadata`, which an export would write where it could be read: '
            'leave it out, and reach that Executor at an address that asks for none'
        )
    for path, value in _leaves({key: each for key, each in said.items() if key not in _NO_URLS}):
        if isinstance(value, str) and _PASSWORD_IN_URL.search(value):
            raise ConfigError(
                f'{where} has an address with a password in it (`{path}`), where it could be read: '
                'take it from a variable, and set that with `env_from_secret`'
            )


def _leaves(said: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """All that is no mapping and no list, by the names that lead there."""
    if isinstance(said, Mapping):
        for name, each in said.items():
            yield from _leaves(each, f'{path}.{name}' if path else str(name))
    elif isinstance(said, (list, tuple)):
        for each in said:
            yield from _leaves(each, path)
    else:
        yield path, said


def _is_secret(path: str, value: Any) -> bool:
    """Whether a name promises a secret, and there is a value to hide."""
    if value in (None, '') or isinstance(value, bool):
        return False
    names = path.split('.')
    return any(_SECRET_NAME.search(name) and not _HARMLESS_NAME.fullmatch(name) for name in names)
