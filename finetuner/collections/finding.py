"""What collections are searched by: words, places, kinds and classes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, Select, Text, and_, cast, column, func, literal, or_, select, text
from sqlalchemy.orm import Session

from finetuner.collections.geometry import Bounds
from finetuner.collections.labels import MLTYPES, shown
from finetuner.collections.spec import is_text
from finetuner.collections.tables import MAX_NUMBER, CollectionRow
from finetuner.excepts import ConfigError, unknown_name

MAX_TEXT = 1000
MAX_PAGE = 1000
# each is looked for in a query of its own
MAX_CLASSES = 100
# of what is searched, in UTF-8: PostgreSQL makes a megabyte of words at most, and several of one
_MOST_BYTES = 300_000
# and of a word that is asked for
_MOST_WORD_BYTES = 2000
_WORD = re.compile(r'\w+')
_BOX = 4
_MOST_DEGREES = 180


@dataclass(frozen=True)
class Query:
    """What a collection must match to be found.

    Attributes:
        text: words that its name, description and classes must hold, beginnings of words too.
        bbox: `(west, south, east, north)` in degrees, which the box of its images must touch; west >
            east where it lies across the 180th meridian.
        mltype: what its labels are.
        classes: that it must have, all of them.
        limit: at most so many are found.
        offset: so many are left out before them.
    """

    text: str = ''
    bbox: Bounds | None = None
    mltype: str | None = None
    classes: tuple[str, ...] = ()
    limit: int = 100
    offset: int = 0

    @classmethod
    def checked(
        cls,
        text: Any = '',
        bbox: Any = None,
        mltype: Any = None,
        classes: Any = None,
        limit: Any = 100,
        offset: Any = 0,
    ) -> Query:
        """Take what people give.

        Raises:
            ConfigError: one of them is not what it may be.
        """
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ConfigError(
                f'text={str(text)[:60]!r}: it takes words, {MAX_TEXT:,} characters at most'
            )
        if mltype is not None and mltype not in MLTYPES:
            raise ConfigError(unknown_name('mltype', mltype, MLTYPES))
        names = [classes] if isinstance(classes, str) else classes or []
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f'classes={shown(classes)}: it takes names of classes')
        if len(names) > MAX_CLASSES or not all(map(is_text, names)):
            raise ConfigError(
                f'classes={shown(classes)}: it takes {MAX_CLASSES} names of classes at most'
            )
        if not isinstance(limit, int) or not isinstance(offset, int):
            raise ConfigError(f'limit={limit!r}, offset={offset!r}: both are whole numbers')
        if not 1 <= limit <= MAX_PAGE or not 0 <= offset <= MAX_NUMBER:
            raise ConfigError(
                f'limit={limit}, offset={offset}: limit is 1 to {MAX_PAGE:,}, offset 0 or more'
            )
        return cls(text, _check_box(bbox), mltype, tuple(names), limit, offset)


def matching(session: Session, query: Query) -> Select[Any]:
    """The rows that match, the best first where words are asked for, else the newest."""
    is_sqlite = _is_sqlite(session)
    found = select(CollectionRow)
    words = [_cut(word, _MOST_WORD_BYTES) for word in _WORD.findall(query.text)]
    if words and is_sqlite:
        hits = text(
            'SELECT rowid AS id, rank FROM collection_words WHERE collection_words MATCH :words'
        )
        hits = hits.bindparams(words=' '.join(f'"{word}"*' for word in words))
        table = hits.columns(CollectionRow.id, column('rank', Float)).subquery()
        found = found.join(table, table.c.id == CollectionRow.id).order_by(table.c.rank)
    elif words:
        vector = func.to_tsvector(text("'english'::regconfig"), text('words'))
        asked = func.to_tsquery(
            text("'english'::regconfig"), ' & '.join(f'{word}:*' for word in words)
        )
        # words like `the` leave nothing to ask for
        found = found.where((func.numnode(asked) == 0) | vector.op('@@')(asked))
        found = found.order_by(func.ts_rank(vector, asked).desc())
    elif query.text.strip():
        # signs alone are in no text
        found = found.where(literal(False))
    if query.mltype is not None:
        found = found.where(CollectionRow.mltype == query.mltype)
    if query.bbox is not None:
        found = found.where(_meets(query.bbox))
    for name in query.classes:
        found = found.where(_has_class(name, is_sqlite))
    found = found.order_by(CollectionRow.id.desc())
    return found.limit(query.limit).offset(query.offset)


def note_words(session: Session, row: CollectionRow) -> None:
    """Have a collection found by the words that it holds now; those of too many classes are left out."""
    row.words = _cut('\n'.join((row.name, row.description, *row.classes)), _MOST_BYTES)
    session.flush()
    if _is_sqlite(session):
        forget_words(session, row.id)
        statement = text('INSERT INTO collection_words (rowid, words) VALUES (:id, :words)')
        session.execute(statement, {'id': row.id, 'words': row.words})


def forget_words(session: Session, collection_id: int) -> None:
    """Have a collection found no more, which is about to be deleted."""
    if _is_sqlite(session):
        statement = text('DELETE FROM collection_words WHERE rowid = :id')
        session.execute(statement, {'id': collection_id})


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == 'sqlite'


def _has_class(name: str, is_sqlite: bool) -> Any:
    if is_sqlite:
        values = func.json_each(CollectionRow.classes).table_valued('value')
        return select(literal(1)).select_from(values).where(values.c.value == name).exists()
    # As it is written: in a database without an encoding PostgreSQL takes no escaped letter for one.
    # A quote within a name has a backslash before it, so that no other name looks like this.
    written, quoted = cast(CollectionRow.classes, Text), json.dumps(name)
    return or_(func.strpos(written, f'[{quoted}') == 1, func.strpos(written, f', {quoted}') > 0)


def _meets(box: Bounds) -> Any:
    """Whether the box of a collection touches another; either may lie across the 180th meridian."""
    west, south, east, north = box
    begins, ends = CollectionRow.west <= east, CollectionRow.east >= west
    is_across = CollectionRow.west > CollectionRow.east
    if west > east:
        meets = or_(is_across, begins, ends)
    else:
        meets = or_(and_(begins, ends), and_(is_across, or_(begins, ends)))
    return and_(meets, CollectionRow.south <= north, CollectionRow.north >= south)


def _cut(text: str, most: int) -> str:
    return text if 4 * len(text) <= most else text.encode()[:most].decode(errors='ignore')


def _check_box(bbox: Any) -> Bounds | None:
    if bbox is None:
        return None
    is_box = isinstance(bbox, Sequence) and not isinstance(bbox, str) and len(bbox) == _BOX
    if is_box and all(isinstance(side, int | float) for side in bbox):
        west, south, east, north = map(float, bbox)
        is_across = -_MOST_DEGREES <= east < west <= _MOST_DEGREES
        if (west <= east or is_across) and south <= north:
            return west, south, east, north
    raise ConfigError(
        f'bbox={str(bbox)[:80]}: it takes [west, south, east, north] in degrees, south <= north, and '
        'west > east only across the 180th meridian'
    )
