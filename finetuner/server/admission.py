"""What a request may not ask of this machine: to open files and addresses that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from docarray import Document, DocumentArray

from finetuner.client import LocalClient
from finetuner.data.contents import content_of, positions_text
from finetuner.excepts import ConfigError, DataError, NotFoundError, unknown_name
from finetuner.models.zoo import ALIASES, BACKBONES, DEFAULT_BACKBONE
from finetuner.names import ARTIFACT_ID, is_alias

# arguments of `wandb.init` that a request can give: none names a path, an address or a key
_WANDB_ARGUMENTS = (
    'project',
    'entity',
    'name',
    'notes',
    'tags',
    'group',
    'job_type',
    'mode',
    'config',
)


def refuse_paths(parameters: dict[str, Any]) -> None:
    """A request names no file of this machine, and has it download nothing but what it lists."""
    model = parameters.get('model', DEFAULT_BACKBONE)
    if model not in BACKBONES and model not in ALIASES:
        raise ConfigError(unknown_name('model', model, (*BACKBONES, *ALIASES)))
    weights = (parameters.get('model_options') or {}).get('weights', 'pretrained')
    if weights not in ('pretrained', 'none'):
        raise ConfigError(
            f'model_options.weights is {weights!r}: a server reads no file that a request names; '
            "use 'pretrained' or 'none', or model_artifact to go on from an earlier run"
        )
    artifact = parameters.get('model_artifact')
    name = str(artifact)
    if artifact is not None and not (ARTIFACT_ID.fullmatch(name) or is_alias(name)):
        raise NotFoundError(
            f'model_artifact {artifact!r} is not the id of an artifact: 24 of the characters '
            '0-9a-f, such as the tag artifact_id of a run; or an alias, such as emoji@latest'
        )
    for callback in parameters.get('callbacks') or ():
        options = callback.get('options') or {}
        if options.get('log_dir') is not None:
            raise ConfigError(
                f'log_dir is {options["log_dir"]!r}: a server writes to no place that a request '
                'names; leave it out'
            )
        for name in options.get('wandb_args') or ():
            if name not in _WANDB_ARGUMENTS:
                raise ConfigError(
                    f'wandb_args: a request cannot give {name!r}; it can give '
                    f'{", ".join(_WANDB_ARGUMENTS)}'
                )


def fit_requested(
    client: LocalClient, parameters: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Start a run that a request asks for, once `refuse_paths` has looked at it.

    Args:
        client: of whoever asks.
        parameters: as `Client.fit` takes them.
        data: as well.
    """
    artifact = parameters.get('model_artifact')
    if isinstance(artifact, str) and is_alias(artifact):
        # an alias here, also where a file of this machine has that name
        parameters = {**parameters, 'model_artifact': client.resolve_artifact(artifact)}
    return client.fit(parameters, data)


def refuse_uris(docs: Iterable[Document]) -> None:
    """A request has this machine open no address; a uri beside other content is dropped."""
    refused = []
    for position, doc in enumerate(docs):
        for part in DocumentArray([doc]).traverse_flat('r,c,m'):
            if not part.uri or part.uri.startswith('data:'):
                continue
            if content_of(part) is part.uri:
                refused.append(position)
                break
            part.pop('uri')
    if refused:
        raise DataError(
            f'{positions_text(refused)}: a server opens no uri: send the content itself in `blob` '
            '(finetuner.server.fit_request reads local files, doc.load_uri_to_blob() anything)'
        )
