"""Which server runs go to, and data and artifacts kept there, or here, under a name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from docarray import Document, DocumentArray

from finetuner.client import get_client
from finetuner.config import Settings
from finetuner.console import console
from finetuner.excepts import ConfigError
from finetuner.logins import TOKEN_VARIABLE, Login, delete_login, read_login, save_login
from finetuner.remote import RemoteClient
from finetuner.run import Run


def login(
    force: bool = False,
    interactive: bool | None = None,
    host: str | None = None,
    token: str | None = None,
) -> None:
    """Send runs to a server from now on; without a host, accept the login of published scripts.

    The server and its token are kept in the home, for later scripts too, until `logout()`.

    Args:
        force: accepted for Finetuner's scripts.
        interactive: accepted for Finetuner's scripts.
        host: address of the server, such as `http://127.0.0.1:51080`; None leaves things as they
            are: on this machine, or where an earlier login said.
        token: made on the server with `finetuner token create`; None takes FINETUNER_TOKEN.

    Raises:
        ConfigError: the address is none, or a token is given without one.
        ForbiddenError: the server does not know the token.
        ServerError: no server answers there.
    """
    if host is None:
        if token is not None:
            raise ConfigError(
                "a token is for a server: give its address too, login(host='http://...')"
            )
        return
    chosen = Login(host.rstrip('/'), get_token() if token is None else token)
    settings = Settings.from_environment()
    client = RemoteClient(chosen.host, chosen.token, settings)
    try:
        who = client.who()
    finally:
        client.close()
    save_login(settings.home, chosen)
    name = who['user'] or "the server's own user"
    console.print(f'Runs go to {chosen.host}, as {name} (scope {who["scope"]}).', markup=False)


def logout() -> None:
    """Forget the server of the last login: runs go on this machine again."""
    delete_login(Settings.from_environment().home)


def get_token() -> str:
    """The token for the server that runs go to; empty where none is needed."""
    login_now = read_login(Settings.from_environment().home)
    return os.environ.get(TOKEN_VARIABLE, '') if login_now is None else login_now.token


def push_data(name: str, docs: DocumentArray | Sequence[Document], public: bool = False) -> str:
    """Keep Documents under a name, for `fit(train_data=name)` and `pull_data(name)`.

    Args:
        name: one that is there already moves to the new data.
        docs: any Documents; for a server, local files are read into their blobs.
        public: whether other users of the server may use the data too.

    Returns:
        `sha256:<hex>`, which names this very content.
    """
    return get_client().push_data(docs, name, public)


def pull_data(name: str) -> DocumentArray:
    """The Documents that were pushed under a name.

    Args:
        name: or `sha256:<hex>`.

    Raises:
        NotFoundError: nothing of that name; the nearest are given.
    """
    return DocumentArray(get_client().load_data(name))


def set_alias(alias: str, run_or_artifact: Run | str) -> dict:
    """Give an artifact a name, for `get_model(alias)` and whatever else takes an artifact.

    Args:
        alias: `name@label`, such as `emoji@production`; one that is there moves. The label
            `latest` needs nobody to set it: `emoji@latest` is the model of the newest finished
            run of the experiment `emoji`.
        run_or_artifact: a finished run, the id of an artifact, or another alias of it.

    Returns:
        alias, artifact_id, the run and experiment it comes from, updated_at.

    Raises:
        ConfigError: it is no alias, or its label is `latest`.
        NotFoundError: the artifact is not there, or may not be read.
        RunInProgressError: the run has not ended.
        RunFailedError: the run failed.
    """
    artifact = run_or_artifact
    return get_client().set_alias(
        alias, artifact.artifact_id if isinstance(artifact, Run) else artifact
    )


def list_aliases() -> list[dict]:
    """The aliases that were set, by name: alias, artifact_id, run, experiment, updated_at."""
    return get_client().list_aliases()


def delete_alias(alias: str) -> None:
    """Forget an alias; its artifact stays.

    Raises:
        NotFoundError: there is none of that name; the nearest are given.
    """
    get_client().delete_alias(alias)
