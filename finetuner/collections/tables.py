"""Tables of collections and their pairs.

A change here needs a new file in `storage/migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
)
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy.orm import Mapped, mapped_column

from finetuner.storage.database import Base, UtcDateTime

# databases take none that are larger
MAX_NUMBER = 2**63 - 1
# SQLite numbers rows by itself only in a column of exactly the type INTEGER.
RowNumber = BigInteger().with_variant(Integer(), 'sqlite')


class CollectionRow(Base):
    """A collection; `key` names its files, `revision` grows with every change of its pairs.

    `words` is what is searched through: name, description and classes. `west` and its like say where
    the images lie, in degrees of longitude and latitude; null where none is on a map. Ids are never
    used again: others may have noted them. What is searched is made by the migration alone, in the
    database's own way.
    """

    __tablename__ = 'collections'
    __table_args__ = (
        Unique('owner', 'name'),
        Unique('key'),
        {'sqlite_autoincrement': True},
    )

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    key: Mapped[str] = mapped_column(String(32))
    owner: Mapped[str] = mapped_column(String(200), default='')
    name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(Text, default='')
    words: Mapped[str] = mapped_column(Text)
    mltype: Mapped[str] = mapped_column(String(32))
    classes: Mapped[list[str]] = mapped_column(JSON)
    has_fixed_classes: Mapped[bool]
    partition: Mapped[list[float] | None] = mapped_column(JSON(none_as_null=True))
    shape: Mapped[list[int]] = mapped_column(JSON)
    dtype: Mapped[str] = mapped_column(String(16))
    sensors: Mapped[list[str]] = mapped_column(JSON)
    source: Mapped[str] = mapped_column(String(32))
    west: Mapped[float | None] = mapped_column(Float)
    south: Mapped[float | None] = mapped_column(Float)
    east: Mapped[float | None] = mapped_column(Float)
    north: Mapped[float | None] = mapped_column(Float)
    public: Mapped[bool] = mapped_column(default=False)
    revision: Mapped[int] = mapped_column(BigInteger, default=1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class CollectionPairRow(Base):
    """A pair: where its image lies in a pack, and its label as the collection's kind encodes it."""

    __tablename__ = 'collection_pairs'
    __table_args__ = (
        Index(None, 'collection_id', 'id'),
        Index(None, 'collection_id', 'group_name', 'id'),
        {'sqlite_autoincrement': True},
    )

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey('collections.id', ondelete='CASCADE'))
    group_name: Mapped[str] = mapped_column(String(200))
    pack: Mapped[str] = mapped_column(String(40))
    offset: Mapped[int] = mapped_column(BigInteger)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    checksum: Mapped[int] = mapped_column(BigInteger)
    encoding: Mapped[str] = mapped_column(String(16))
    label: Mapped[bytes] = mapped_column(LargeBinary)
    transform: Mapped[list[float] | None] = mapped_column(JSON(none_as_null=True))
    crs: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)

    def place_values(self) -> dict[str, Any]:
        """What says where its image lies."""
        names = ('pack', 'offset', 'num_bytes', 'checksum')
        return {name: getattr(self, name) for name in names}
