"""Tokens that let users in: shown once, kept as a hash, ended by time or by hand.

A token is `ft_<id>_<secret>`. The id is found in the database, the secret compared in constant time.
A secret has 256 random bits, so that its hash needs neither salt nor stretching.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal, get_args

from sqlalchemy import String, select, update
from sqlalchemy.orm import Mapped, mapped_column

from finetuner.excepts import ConfigError, NotFoundError, unknown_name
from finetuner.storage.database import Base, Database, UtcDateTime

Scope = Literal['read', 'write', 'admin']
# each allows what those before it allow
SCOPES: tuple[Scope, ...] = get_args(Scope)
MAX_TEXT = 200

_TOKEN = re.compile(r'ft_([0-9a-f]{12})_([A-Za-z0-9_-]{43})')
_USER = re.compile(r'[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}')
# of the last use no more is kept than this, or every request would write to the database
_USE_SECONDS = 60


class TokenRow(Base):
    """A token; the secret itself is nowhere."""

    __tablename__ = 'tokens'

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    user: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(String(200), default='')
    scope: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


@dataclass(frozen=True)
class Identity:
    """Who asks, and what they may do.

    Attributes:
        user: name; '' is whoever owns the machine's own runs, without a login.
        scope: `read` looks, `write` also submits, cancels and deletes, `admin` also makes tokens.
    """

    user: str
    scope: Scope

    def may(self, scope: Scope) -> bool:
        """Whether what needs this scope is allowed."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


@dataclass(frozen=True)
class Token:
    """What may be told of a token; times are ISO strings in UTC."""

    id: str
    user: str
    description: str
    scope: str
    created_at: str
    expires_at: str | None
    used_at: str | None
    revoked_at: str | None


class TokenStore:
    """Tokens in the database.

    Args:
        database: open.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        user: str,
        scope: str = 'write',
        days: float | None = None,
        description: str = '',
    ) -> tuple[str, Token]:
        """Make a token.

        Args:
            user: whose it is: letters, digits and `._@+-`, 1 to 100 of them.
            scope: one of `SCOPES`.
            days: until it ends; None for one that does not.
            description: for people, at most 200 characters.

        Returns:
            The token itself, which is never seen again, and what is kept of it.

        Raises:
            ConfigError: an argument is out of range.
        """
        if not _USER.fullmatch(user):
            raise ConfigError(
                f'{user!r} cannot name a user: allowed are 1 to 100 letters, digits and . _ @ + -, '
                'beginning with a letter or digit'
            )
        if scope not in SCOPES:
            raise ConfigError(unknown_name('scope', scope, SCOPES))
        if days is not None and not 0 < days <= 36_500:
            raise ConfigError(f'a token cannot last {days:g} days: allowed are up to 36,500')
        if len(description) > MAX_TEXT or not description.isprintable():
            raise ConfigError(f'a description has at most {MAX_TEXT} printable characters')
        number, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        created = _now()
        row = TokenRow(
            id=number,
            user=user,
            description=description,
            scope=scope,
            sha256=_hash(secret),
            created_at=created,
            expires_at=None if days is None else created + timedelta(days=days),
        )
        with self._database.session() as session:
            session.add(row)
            session.flush()
            return f'ft_{number}_{secret}', _token(row)

    def list(self, user: str | None = None) -> list[Token]:
        """All tokens, or those of a user, oldest first."""
        query = select(TokenRow).order_by(TokenRow.created_at, TokenRow.id)
        if user is not None:
            query = query.where(TokenRow.user == user)
        with self._database.reader() as session:
            return [_token(row) for row in session.scalars(query)]

    def any(self) -> bool:
        """Whether a token was ever made: from then on nobody gets in without one."""
        with self._database.reader() as session:
            return session.scalars(select(TokenRow.id).limit(1)).first() is not None

    def revoke(self, token_id: str) -> Token:
        """End a token, at once.

        Args:
            token_id: its id, or the token itself.

        Raises:
            NotFoundError: no such token.
        """
        match = _TOKEN.fullmatch(token_id)
        number = match[1] if match else token_id
        with self._database.session() as session:
            row = session.get(TokenRow, number)
            if row is None:
                known = session.scalars(select(TokenRow.id)).all()
                raise NotFoundError(unknown_name('token', number, known))
            row.revoked_at = row.revoked_at or _now()
            return _token(row)

    def identify(self, token: str) -> Identity | None:
        """Who a token belongs to; None when it is none, or has ended."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        with self._database.reader() as session:
            row = session.get(TokenRow, match[1])
        # compared even where nothing was found: the time tells nobody which ids there are
        expected = _hash('') if row is None else row.sha256
        fits = hmac.compare_digest(_hash(match[2]), expected)
        if row is None or not fits or row.revoked_at is not None:
            return None
        now = _now()
        if row.expires_at is not None and row.expires_at <= now:
            return None
        if row.used_at is None or abs((now - row.used_at).total_seconds()) > _USE_SECONDS:
            with self._database.session() as session:
                session.execute(update(TokenRow).where(TokenRow.id == row.id).values(used_at=now))
        return Identity(row.user, row.scope)  # type: ignore[arg-type]


def _token(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        user=row.user,
        description=row.description,
        scope=row.scope,
        created_at=row.created_at.isoformat(),
        expires_at=_iso(row.expires_at),
        used_at=_iso(row.used_at),
        revoked_at=_iso(row.revoked_at),
    )


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(timezone.utc)
