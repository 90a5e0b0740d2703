"""What the names of models stand for: artifacts by id, path or alias, and pretrained backbones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from finetuner.artifact import load_artifact
from finetuner.client import Client, LocalClient, get_client
from finetuner.engines import InferenceEngine
from finetuner.excepts import ConfigError, unknown_name
from finetuner.model_spec import MANIFEST
from finetuner.models.backbones import TextImageBackbone
from finetuner.models.zoo import ALIASES, BACKBONES, get_backbone
from finetuner.names import ARTIFACT_ID, is_alias


class ArtifactNames:
    """Finds and loads models by name.

    Args:
        default: what the service was started with: the only one that may be a path.
        token: for the server of `finetuner.login`.
    """

    def __init__(self, default: str, token: str | None = None) -> None:
        self._default = default
        self._token = token
        # a path of this machine is nobody else's business
        self._local: dict[str, str] = {}

    def resolve(self, name: str, owner: str | None = None) -> str:
        """The key of a model: an artifact id, a backbone's name, or the path of the default.

        Args:
            name: what a request calls it.
            owner: who asks; None for whoever started the service.

        Raises:
            ConfigError: it is no name of a model.
            NotFoundError: there is no such artifact or alias, or it is not theirs.
        """
        if name in BACKBONES or name in ALIASES:
            return ALIASES.get(name, name)
        if name == self._default and Path(name).expanduser().exists():
            return name
        client = self._client_of(owner)
        if is_alias(name):
            return client.resolve_artifact(name)
        if not ARTIFACT_ID.fullmatch(name):
            raise ConfigError(
                f'{unknown_name("artifact", name, (*BACKBONES, *ALIASES))} Or give the id of a '
                "finished run's artifact, 24 of the characters 0-9a-f, or an alias of one such as "
                "'emoji@latest'"
            )
        if owner or name == self._default:
            # where nobody is told apart, a loaded model need not be looked for again
            client.find_artifact(name)
        return name

    def load_engine(self, key: str, select_model: str | None, **options: Any) -> InferenceEngine:
        """Load the model of a key.

        Args:
            key: as `resolve` gave it.
            select_model: which model of a pretrained pair, or None.
            options: further arguments of `finetuner.inference.load_engine`.

        Raises:
            FinetunerError: it cannot be loaded.
        """
        from finetuner.inference import build_engine, load_engine

        if key in BACKBONES:
            is_pair = isinstance(get_backbone(key), TextImageBackbone)
            return build_engine(key, select_model=select_model if is_pair else None, **options)
        if ARTIFACT_ID.fullmatch(key):
            return load_engine(get_client(self._token).find_artifact(key), **options)
        artifact = load_artifact(Path(key).expanduser())
        manifest = (artifact.directory / MANIFEST).read_bytes()
        self._local[key] = f'local-{hashlib.sha256(manifest).hexdigest()[:12]}'
        return load_engine(artifact, **options)

    def shown(self, key: str) -> str:
        """What clients are told of a model: its key, but of a path only what tells it from others.

        Args:
            key: of a model that was loaded.
        """
        return self._local.get(key, key)

    def _client_of(self, owner: str | None) -> Client:
        client = get_client(self._token)
        return client.for_owner(owner) if owner and isinstance(client, LocalClient) else client
