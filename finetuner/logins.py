"""Which server runs go to: what `finetuner.login` keeps in the home, or the environment says."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from finetuner.excepts import ConfigError

HOST_VARIABLE = 'FINETUNER_HOST'
TOKEN_VARIABLE = 'FINETUNER_TOKEN'
_FILE = 'login.json'


@dataclass(frozen=True)
class Login:
    """A server and the token for it.

    Attributes:
        host: such as `https://finetuner.example.com`.
        token: empty for a server that wants none.
    """

    host: str
    token: str = ''

    def __post_init__(self) -> None:
        """Check the address.

        Raises:
            ConfigError: it is none.
        """
        address = urlsplit(self.host)
        if address.scheme not in ('http', 'https') or not address.hostname:
            raise ConfigError(
                f'host is {self.host!r}: it takes the address of a server, such as '
                "'http://127.0.0.1:51080'"
            )


def read_login(home: Path) -> Login | None:
    """The login that counts now; None for this machine itself.

    FINETUNER_HOST, with FINETUNER_TOKEN, counts before what is kept in the home.

    Raises:
        ConfigError: what is kept cannot be read.
    """
    host = os.environ.get(HOST_VARIABLE)
    if host:
        return Login(host, os.environ.get(TOKEN_VARIABLE, ''))
    path = home / _FILE
    try:
        return Login(**json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f'{path} cannot be read ({error}): log in again') from error


def save_login(home: Path, login: Login) -> None:
    """Keep a login, readable by its owner alone."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / _FILE
    unfinished = path.with_name(f'.{_FILE}.{os.getpid()}')
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), 'w') as file:
        json.dump(asdict(login), file)
    unfinished.replace(path)


def delete_login(home: Path) -> bool:
    """Forget what is kept; False when there was nothing."""
    path = home / _FILE
    there = path.exists()
    path.unlink(missing_ok=True)
    return there
