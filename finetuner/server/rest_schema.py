"""What the REST API takes, and who may ask for it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, root_validator
from starlette.convertors import IntegerConvertor, register_url_convertor

from finetuner.collections.tables import MAX_NUMBER
from finetuner.excepts import ForbiddenError
from finetuner.server.security import FORBIDDEN, current_identity
from finetuner.storage.tokens import Identity, Scope

Name = Annotated[str, Query(min_length=1, max_length=200)]
Owner = Annotated[
    str | None, Query(description="another user's: only what that one shares is seen")
]


class _RowConvertor(IntegerConvertor):
    """Numbers in paths, `{id:row}`: one that no database holds stands for one that is in none."""

    def convert(self, value: str) -> int:
        """The number."""
        digits = value.lstrip('0')
        return int(digits or '0') if len(digits) < len(str(MAX_NUMBER)) else MAX_NUMBER


register_url_convertor('row', _RowConvertor())


class Body(BaseModel):
    """The body of a request: a key that it has not is an error, told once."""

    class Config:
        """Options of pydantic."""

        extra = 'forbid'

    @root_validator(pre=True)
    def _know_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        # pydantic makes an error of each
        unknown = [key for key in values if key not in cls.__fields__]
        if len(unknown) > 1:
            raise ValueError(f'{len(unknown):,} unknown keys, such as {unknown[0][:80]!r}')
        return values


class FitRequest(Body):
    """The arguments of `fit`, and its data as references (`sha256:...`) or names."""

    parameters: dict[str, Any]
    data: dict[str, str]


class ExperimentRequest(Body):
    """A new experiment."""

    name: str
    description: str = ''


class UploadRequest(Body):
    """A file of Documents that is about to come."""

    sha256: str
    num_bytes: int


class NameRequest(Body):
    """A name for stored data."""

    name: str
    data: str
    public: bool = False


class ShareRequest(Body):
    """Whether others may see a run."""

    public: bool


class AliasRequest(Body):
    """What an alias shall stand for: the id of an artifact, or another alias of it."""

    artifact_id: str


class TokenRequest(Body):
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
