"""What the REST API takes, and who may ask for it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel

from finetuner.excepts import ForbiddenError
from finetuner.server.security import FORBIDDEN, current_identity
from finetuner.storage.tokens import Identity, Scope

Name = Annotated[str, Query(min_length=1, max_length=200)]
Owner = Annotated[
    str | None, Query(description="another user's: only what that one shares is seen")
]


class _Body(BaseModel):
    class Config:
        extra = 'forbid'


class FitRequest(_Body):
    """The arguments of `fit`, and its data as references (`sha256:...`) or names."""

    parameters: dict[str, Any]
    data: dict[str, str]


class ExperimentRequest(_Body):
    """A new experiment."""

    name: str
    description: str = ''


class UploadRequest(_Body):
    """A file of Documents that is about to come."""

    sha256: str
    num_bytes: int


class NameRequest(_Body):
    """A name for stored data."""

    name: str
    data: str
    public: bool = False


class ShareRequest(_Body):
    """Whether others may see a run."""

    public: bool


class AliasRequest(_Body):
    """What an alias shall stand for: the id of an artifact, or another alias of it."""

    artifact_id: str


class TokenRequest(_Body):
    """A new token."""

    user: str
    scope: str = 'write'
    days: float | None = None
    description: str = ''


def identity() -> Identity:
    """Who asks, as the middleware found out."""
    found = current_identity.get()
    if found is None:
        raise ForbiddenError('nobody is known to ask')
    return found


def require(scope: Scope) -> Identity:
    """Who asks, when that one may do what needs this scope.

    Raises:
        ForbiddenError: the token's scope is less.
    """
    who = identity()
    if not who.may(scope):
        raise ForbiddenError(FORBIDDEN.format(scope=who.scope, needed=scope))
    return who
