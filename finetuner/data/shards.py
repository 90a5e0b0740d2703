"""Training data in shards, streamed: each rank reads its own, in an order drawn anew each epoch."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from docarray import Document

from finetuner.data.contents import shown_value
from finetuner.data.shard_files import open_shards
from finetuner.excepts import ConfigError, DataError

Row = tuple[str, Document]
# shards, or parts of them, for each reader at least: with one each, whoever has the longest is last
_LEAST_EACH = 2
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class _Piece:
    """Part of a shard that one reader reads: of the rows of a group one in `num_parts`."""

    shard: int
    group: int | None = None
    part: int = 0
    num_parts: int = 1

    def has(self, row: int) -> bool:
        # rows in turn would go with labels in turn, and leave each reader some of the classes
        place = (self.shard << 20 | (self.group or 0)) << 40 | row
        return _mixed(place) % self.num_parts == self.part


class ShardedDocuments:
    """The Documents of shards, streamed: those of one rank, in an order drawn anew each epoch.

    Each epoch the shards are put into an order drawn from `(seed, epoch)` and dealt to the ranks in
    turn, so that each row comes to one rank, once. Where there are fewer than two shards a rank, the
    row groups of Parquet files are dealt instead, and where these are too few, the rows of each.
    Rows then go through a buffer of `shuffle_buffer`, from which they leave at random, drawn
    from `(seed, epoch, rank)`.

    Each iteration is the next epoch, as with samplers. Memory holds the buffer and little else.

    Attributes:
        epoch: number of the epoch that the next iteration yields, from 0; setting it goes on with the
            beginning of that epoch.
        rank: whose rows these are.
        num_ranks: how many there are.
        seed: of all that is drawn.
        shuffle_buffer: rows held, 1 where the order is not to be changed.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        rank: int | None = None,
        num_ranks: int | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1_000,
        shuffle: bool = True,
        on_broken: Literal['stop', 'skip'] = 'stop',
        content: str | None = None,
        label: str | None = None,
    ) -> None:
        """Find the shards; no row is read yet.

        Args:
            shards: paths of files of one form, `.parquet`, `.tar` (WebDataset), `.jsonl`, `.ndjson` or
                `.docs`; or a pattern such as `'train-*.parquet'` or `'train-{000..099}.tar'`. The same
                at all ranks.
            rank: of this process; None takes that of `torch.distributed` or, where it is not begun,
                `RANK` of the environment, or 0.
            num_ranks: processes in all; None the same way, with `WORLD_SIZE`, or 1.
            seed: 0 or more; the same at all ranks.
            shuffle_buffer: rows that are held to be shuffled.
            shuffle: whether shards and rows are shuffled at all; without, they come in order.
            on_broken: see `open_documents`.
            content: the same.
            label: the same.

        Raises:
            ConfigError: a number is out of range, or `content` or `label` fits not.
            DataError: there are no shards, or they are of several forms.
        """
        self.rank, self.num_ranks = _ranks(rank, num_ranks)
        self.seed = _whole('seed', seed, 0)
        self.shuffle_buffer = _whole('shuffle_buffer', shuffle_buffer, 1) if shuffle else 1
        self._shuffle = shuffle
        self._shards = open_shards(shards, on_broken, content, label)
        self._epoch = self._num_taken = 0

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next iteration yields."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self._num_taken = _whole('epoch', epoch, 0), 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its rows were taken here, as plain values."""
        return {'epoch': self._epoch, 'num_taken': self._num_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on, at the next iteration, from where another object of the same arguments was.

        Rows that were taken are counted, not read again, but for those of the shards that the buffer
        held some of.
        """
        self._epoch = _whole('epoch', state['epoch'], 0)
        self._num_taken = _whole('num_taken', state['num_taken'], 0)

    def __iter__(self) -> Iterator[Document]:
        """Yield the Documents of an epoch, or those of it that are left.

        Raises:
            DataError: a shard cannot be read, or a row is no Document; the row is named. What is
                said of a query and a document that belong together is refused: classes are made of it
                over all rows.
        """
        epoch = self._epoch
        for number, (_, doc) in enumerate(
            self.read_epoch(epoch, num_skipped=self._num_taken), self._num_taken
        ):
            self._epoch, self._num_taken = epoch, number + 1
            yield doc
        self._epoch, self._num_taken = epoch + 1, 0

    def read_epoch(
        self,
        epoch: int,
        reader: int = 0,
        num_readers: int = 1,
        num_skipped: int = 0,
        buffer: int | None = None,
    ) -> Iterator[Row]:
        """Read this rank's rows of an epoch, or of them the share of one of several readers.

        Args:
            epoch: which.
            reader: which of the readers, from 0; its rows are its own.
            num_readers: among which the rank's shards are dealt.
            num_skipped: rows at the beginning that are left out.
            buffer: rows that are held to be shuffled, 1 for none; None for `shuffle_buffer`.

        Yields:
            What to call the row in a message, and its Document.
        """
        pieces = self._pieces(epoch, reader, num_readers)
        key = (self.seed, epoch, self.rank + 1, reader + 1)
        size = self.shuffle_buffer if buffer is None else buffer
        for shard, where, row in self._shuffled(pieces, size, uniform(key), num_skipped):
            doc = self._shards[shard].document(where, row)
            if isinstance(doc, tuple):
                raise DataError(
                    f'{where}: a query with its document, of which classes are made over all of the '
                    'data, cannot be streamed: open it with open_documents'
                )
            yield where, doc

    def _pieces(self, epoch: int, reader: int, num_readers: int) -> list[_Piece]:
        pieces = [_Piece(number) for number in range(len(self._shards))]
        pieces = self._enough(pieces, self.num_ranks)
        if self._shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(pieces))
            pieces = [pieces[place] for place in order.tolist()]
        own = pieces[self.rank :: self.num_ranks]
        return self._enough(own, num_readers)[reader::num_readers]

    def _enough(self, pieces: list[_Piece], num_readers: int) -> list[_Piece]:
        """The pieces, made smaller where they are too few for so many readers."""
        least = _LEAST_EACH * num_readers
        if num_readers == 1 or len(pieces) >= least or not pieces:
            return pieces
        pieces = [
            replace(piece, group=group) if piece.group is None else piece
            for piece in pieces
            for group in range(self._shards[piece.shard].num_groups if piece.group is None else 1)
        ]
        if len(pieces) >= least or not pieces:
            return pieces
        times = -(-least // len(pieces))
        return [
            replace(p, part=p.part + p.num_parts * each, num_parts=p.num_parts * times)
            for p in pieces
            for each in range(times)
        ]

    def _shuffled(
        self, pieces: Iterable[_Piece], size: int, draw: Callable[[], float], num_skipped: int
    ) -> Iterator[tuple[int, str, Any]]:
        """Rows in the order in which they leave the buffer: each makes room for the next one."""
        left = deque(pieces)
        buffer, num_skipped = self._skip(left, size, draw, num_skipped)
        for row in itertools.chain.from_iterable(map(self._rows, left)):
            if len(buffer) < size:
                buffer.append(row)
                continue
            place = int(draw() * size)
            row, buffer[place] = buffer[place], row
            if num_skipped:
                num_skipped -= 1
            else:
                yield row
        while buffer:
            place = int(draw() * len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            row = buffer.pop()
            if num_skipped:
                num_skipped -= 1
            else:
                yield row

    def _skip(
        self, left: deque[_Piece], size: int, draw: Callable[[], float], num_skipped: int
    ) -> tuple[list[tuple[int, str, Any]], int]:
        """Do what reading whole pieces would do to the buffer, with the places of rows for rows.

        Args:
            left: pieces; those whose rows are counted are taken off its beginning.
            size: of the buffer.
            draw: as for reading.
            num_skipped: rows that are to leave the buffer.

        Returns:
            The rows in the buffer, and how many are still to leave it.
        """
        places: list[tuple[_Piece, int]] = []
        while left and num_skipped:
            piece = left[0]
            num_rows = self._shards[piece.shard].num_rows(piece.group)
            rows = (
                range(num_rows) if piece.num_parts == 1 else [*filter(piece.has, range(num_rows))]
            )
            num_leaving = max(0, len(places) + len(rows) - size)
            if num_leaving > num_skipped:
                break
            num_skipped -= num_leaving
            left.popleft()
            for row in rows:
                if len(places) < size:
                    places.append((piece, row))
                else:
                    places[int(draw() * size)] = piece, row
        return self._fetched(places), num_skipped

    def _fetched(self, places: list[tuple[_Piece, int]]) -> list[tuple[int, str, Any]]:
        """Read single rows."""
        slots: dict[_Piece, dict[int, int]] = {}
        for slot, (piece, row) in enumerate(places):
            slots.setdefault(piece, {})[row] = slot
        buffer: list[Any] = [None] * len(places)
        for piece, wanted in slots.items():
            rows = self._shards[piece.shard].rows(piece.group, wanted.__contains__)
            for row in sorted(wanted):
                found = next(rows, None)
                if found is None:
                    name = str(self._shards[piece.shard].path)
                    raise DataError(f'{name!r} has fewer rows than it had: it was changed')
                buffer[wanted[row]] = piece.shard, *found
        return buffer

    def _rows(self, piece: _Piece) -> Iterator[tuple[int, str, Any]]:
        chosen = None if piece.num_parts == 1 else piece.has
        for where, row in self._shards[piece.shard].rows(piece.group, chosen):
            yield piece.shard, where, row


def uniform(key: Sequence[int]) -> Callable[[], float]:
    """What draws numbers from 0 to 1, the same ones for the same key.

    Args:
        key: whole numbers of 0 or more.
    """
    words = np.random.SeedSequence(key).generate_state(4)
    # for single numbers it is many times as fast as NumPy's
    return random.Random(int.from_bytes(words.tobytes(), 'little')).random


def _mixed(number: int) -> int:
    """Another number of 64 bits, with no pattern of the first: the step of SplitMix64."""
    mixed = (number + 1 & _64_BITS) * 0x9E3779B97F4A7C15 & _64_BITS
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _64_BITS
    return mixed ^ mixed >> 31


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    if (rank is None) != (num_ranks is None):
        raise ConfigError(
            f'rank={rank!r} with num_ranks={num_ranks!r}: give both, or none for those of '
            'torch.distributed or of RANK and WORLD_SIZE'
        )
    if rank is not None and num_ranks is not None:
        names, values = ('rank', 'num_ranks'), (rank, num_ranks)
    else:
        distributed = getattr(sys.modules.get('torch'), 'distributed', None)
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        names = ('RANK', 'WORLD_SIZE')
        values = _number('RANK', '0'), _number('WORLD_SIZE', '1')
    _whole(names[1], values[1], 1)
    if _whole(names[0], values[0], 0) >= values[1]:
        raise ConfigError(
            f'{names[0]}={values[0]}: with {names[1]}={values[1]} it is from 0 to {values[1] - 1}'
        )
    return values


def _number(name: str, default: str) -> int:
    value = os.environ.get(name) or default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f'{name}={shown_value(value)} of the environment is no number') from error


def _whole(name: str, value: Any, least: int) -> int:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ConfigError(f'{name}={shown_value(value)} is not a whole number of at least {least}')
    return int(value)
