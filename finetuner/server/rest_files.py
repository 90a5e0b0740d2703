"""The part of the REST API that carries files, artifacts and data in pieces that resume, and names them; tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

from finetuner.artifact_files import hash_file, read_manifest
from finetuner.client import LocalClient
from finetuner.excepts import ConfigError, NotFoundError
from finetuner.model_spec import MANIFEST
from finetuner.server.incoming import IncomingData
from finetuner.server.rest_schema import (
    AliasRequest,
    Name,
    NameRequest,
    TokenRequest,
    UploadRequest,
    require,
)
from finetuner.storage.tokens import TokenStore

_PIECE_BYTES = 8 << 20


def add_artifacts(router: APIRouter, reads: Any) -> None:
    """Routes that read artifacts."""

    @router.get('/artifact', tags=['artifacts'])
    def list_files(artifact_id: Name, client: LocalClient = reads) -> list[dict[str, Any]]:
        """The files of an artifact, with their sizes and hashes."""
        return _files(client.find_artifact(artifact_id))

    @router.get('/artifact/file', tags=['artifacts'], response_class=FileResponse)
    def get_file(artifact_id: Name, path: Name, client: LocalClient = reads) -> FileResponse:
        """A file of an artifact; `Range` fetches a part."""
        return _file(client.find_artifact(artifact_id), path)

    @router.get('/run/checkpoints', tags=['artifacts'])
    def list_checkpoints(
        run: Name, experiment: Name = 'default', client: LocalClient = reads
    ) -> dict[int, list[dict[str, Any]]]:
        """The files of the models of single epochs, by epoch from 1."""
        kept = client.get_run_checkpoints(experiment, run)
        return {epoch: _files(Path(path)) for epoch, path in kept.items()}

    @router.get('/run/checkpoints/file', tags=['artifacts'], response_class=FileResponse)
    def get_checkpoint_file(
        run: Name, epoch: int, path: Name, experiment: Name = 'default', client: LocalClient = reads
    ) -> FileResponse:
        """A file of the model of an epoch; `Range` fetches a part."""
        kept = client.get_run_checkpoints(experiment, run)
        if epoch not in kept:
            raise NotFoundError(f'no model of epoch {epoch} is kept: there are {list(kept)}')
        return _file(Path(kept[epoch]), path)


def add_aliases(router: APIRouter, reads: Any, writes: Any) -> None:
    """Routes that name artifacts; an alias may hold slashes, and stands at the end of its path."""

    @router.get('/aliases', tags=['artifacts'])
    def list_aliases(client: LocalClient = reads) -> list[dict[str, Any]]:
        """The aliases that were set, in the order of their names."""
        return client.list_aliases()

    @router.get('/aliases/{alias:path}', tags=['artifacts'])
    def find_alias(alias: str, client: LocalClient = reads) -> dict[str, Any]:
        """What an alias stands for now; `name@latest` is the newest finished run of `name`.

        In place of the alias the id of an artifact may stand, which is answered when it is there.
        """
        return asdict(client.workspace.name_artifact(alias))

    @router.put('/aliases/{alias:path}', tags=['artifacts'])
    def set_alias(body: AliasRequest, alias: str, client: LocalClient = writes) -> dict[str, Any]:
        """Have an alias stand for an artifact; one that is there moves."""
        return client.set_alias(alias, body.artifact_id)

    @router.delete('/aliases/{alias:path}', status_code=204, tags=['artifacts'])
    def delete_alias(alias: str, client: LocalClient = writes) -> Response:
        """Forget an alias; its artifact stays."""
        client.delete_alias(alias)
        return Response(status_code=204)


def _files(directory: Path) -> list[dict[str, Any]]:
    manifest = read_manifest(directory)
    own = {MANIFEST: hash_file(directory / MANIFEST)}
    return [
        {'path': name, 'num_bytes': (directory / name).stat().st_size, 'sha256': sha256}
        for name, sha256 in {**own, **manifest['files']}.items()
    ]


def _file(directory: Path, name: str) -> FileResponse:
    if name != MANIFEST and name not in read_manifest(directory)['files']:
        raise NotFoundError(f'the artifact has no file {name!r}')
    return FileResponse(directory / name, media_type='application/octet-stream')


def add_data(router: APIRouter, reads: Any, writes: Any, incoming: IncomingData) -> None:
    """Routes that take, name and give data."""

    @router.post('/uploads', tags=['data'])
    def begin_upload(body: UploadRequest, client: LocalClient = writes) -> dict[str, Any]:
        """Ask whether data is stored already, or how much of it has come."""
        return vars(incoming.begin(client.workspace, body.sha256, body.num_bytes))

    @router.patch('/uploads', tags=['data'])
    async def add_piece(
        request: Request,
        sha256: Name,
        offset: int,
        num_bytes: int,
        client: LocalClient = writes,
    ) -> dict[str, Any]:
        """Append a piece, the body as it is; what came of a connection that broke stays.

        With the last piece the data is checked and stored.
        """
        state = None
        async for piece in _pieces(request):
            state = await asyncio.to_thread(
                incoming.write, client.workspace, sha256, offset, num_bytes, piece
            )
            offset = state.offset
        if state is None:
            raise ConfigError('the body is empty: send a piece of the file')
        return vars(state)

    @router.get('/data', tags=['data'])
    def list_data(client: LocalClient = reads) -> Any:
        """Named data, newest first."""
        return client.workspace.runs.list_datasets()

    @router.put('/data', tags=['data'])
    def name_data(body: NameRequest, client: LocalClient = writes) -> dict[str, Any]:
        """Give stored data a name; one that is there moves to it."""
        client.workspace.name_data(body.name, body.data, body.public)
        return {'name': body.name, 'data': body.data}

    @router.delete('/data', status_code=204, tags=['data'])
    def forget_data(name: Name, client: LocalClient = writes) -> Response:
        """Forget a name; runs that were trained on the data keep it."""
        client.workspace.runs.delete_dataset(name)
        return Response(status_code=204)

    @router.get('/data/reference', tags=['data'])
    def find_data(name: Name, client: LocalClient = reads) -> dict[str, str]:
        """`sha256:...` of named data."""
        return {'data': client.workspace.data_reference(name)}

    @router.get('/data/content', tags=['data'], response_class=FileResponse)
    def get_data(reference: Name, client: LocalClient = reads) -> FileResponse:
        """Stored data, by `sha256:...` or name, as a file of Documents; `Range` fetches a part."""
        docs = client.workspace.load_data(reference)
        return FileResponse(docs.path, media_type='application/octet-stream')


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of a few MB, the last one also when the connection breaks."""
    gathered = bytearray()
    with contextlib.suppress(ClientDisconnect):
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= _PIECE_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


def add_tokens(router: APIRouter, tokens: Callable[[], TokenStore]) -> None:
    """Routes that make and end tokens."""

    @router.get('/tokens', tags=['tokens'])
    def list_tokens() -> list[dict[str, Any]]:
        """All tokens, without their secrets; needs the scope admin."""
        require('admin')
        return [vars(token) for token in tokens().list()]

    @router.post('/tokens', status_code=201, tags=['tokens'])
    def create_token(body: TokenRequest) -> dict[str, Any]:
        """Make a token, which is shown this once; needs the scope admin."""
        require('admin')
        secret, token = tokens().create(body.user, body.scope, body.days, body.description)
        return {**vars(token), 'token': secret}

    @router.delete('/tokens', tags=['tokens'])
    def revoke_token(token_id: Name) -> dict[str, Any]:
        """End a token, at once; needs the scope admin."""
        require('admin')
        return vars(tokens().revoke(token_id))
