"""Who asks, on its way from the gateway to an Executor: a signed text in the parameters.

Executors see no headers, and whoever reaches their ports could write anything; so the gateway signs.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ConfigError
from finetuner.storage.database import make_private_directory

if TYPE_CHECKING:
    from finetuner.storage.tokens import Identity

PARAMETER = '__identity'
KEY_VARIABLE = 'FINETUNER_GATEWAY_KEY'


class IdentitySeal:
    """Signs identities, and reads what was signed with the same key.

    Args:
        key: secret bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_home(cls, home: Path) -> IdentitySeal:
        """Take the key in FINETUNER_GATEWAY_KEY, or the one in a home, made when it is not there.

        Args:
            home: shared by the gateway and its Executors.
        """
        given = os.environ.get(KEY_VARIABLE)
        if given:
            return cls(given.encode())
        path = home / 'gateway.key'
        make_private_directory(home)
        # linked to its name when it is whole: nobody reads half a key, and the first one stays
        unfinished = home / f'.gateway-{secrets.token_hex(8)}'
        if not path.exists():
            with open(
                os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), 'wb'
            ) as file:
                file.write(secrets.token_hex(32).encode())
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(unfinished)
            unfinished.unlink()
        return cls(path.read_bytes())

    def seal(self, identity: Identity) -> str:
        """Write an identity as a text that only a holder of the key can write."""
        content = json.dumps([identity.user, identity.scope]).encode()
        return f'{base64.urlsafe_b64encode(content).decode()}.{self._sign(content)}'

    def open(self, text: Any) -> Identity:
        """Read what `seal` wrote.

        Raises:
            ConfigError: somebody else wrote it.
        """
        from finetuner.storage.tokens import Identity

        content, _, signature = str(text).partition('.')
        with contextlib.suppress(ValueError):
            raw = base64.urlsafe_b64decode(content)
            if hmac.compare_digest(signature.encode(), self._sign(raw).encode()):
                return Identity(*json.loads(raw))
        raise ConfigError(
            'this request did not come through the gateway that belongs to this Executor'
        )

    def _sign(self, content: bytes) -> str:
        return hmac.new(self._key, content, hashlib.sha256).hexdigest()
