"""Whether the migrations make what the tables declare."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

# the tables of these are declared when they are imported
from finetuner.collections import tables as _collections  # noqa: F401
from finetuner.runs import tables as _runs  # noqa: F401
from finetuner.storage.database import Base

# full-text search, which SQLAlchemy cannot declare
_SEARCHED = ('collection_words', 'ix_collections_words')


def differences(connection: Connection) -> list[Any]:
    """What the database has otherwise than the tables declare it."""

    def is_compared(name: str | None, *_: Any) -> bool:
        return not (name or '').startswith(_SEARCHED)

    context = MigrationContext.configure(connection, opts={'include_name': is_compared})
    return compare_metadata(context, Base.metadata)
