"""Pairs that were fed and not saved yet: on the disk, so that any number of them takes no memory.

A draft belongs to the process that feeds; what it left when it was killed is cleared by the next one.
Only `save` makes of it something that others see.
"""

from __future__ import annotations

import base64
import errno
import json
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetuner.collections.geometry import Bounds, Frame
from finetuner.collections.labels import LabelKind, build_label_kind
from finetuner.collections.labels.growing import grown_classes
from finetuner.collections.packs import PACK_BYTES, PackWriter, Place
from finetuner.collections.spec import (
    MOST_GROUPS,
    CollectionSpec,
    check_classes,
    check_group,
    check_sensors,
    partitioned_group,
)
from finetuner.collections.tiles import ImageForm, Tile, read_tile
from finetuner.excepts import DataError, FinetunerError
from finetuner.storage.database import make_private_directory
from finetuner.storage.leftovers import left_over
from finetuner.uris import DEFAULT_POLICY, PicturePolicy

_JOURNAL = 'pairs.jsonl'
_LOCK = '.lock'
_NEW_SECONDS = 3600.0
# what is brought into degrees when it is saved, and others wait meanwhile
_MOST_SYSTEMS = 100
_MOST_JOURNAL = 8 << 30
DEFAULT_GROUP = 'train'


@dataclass(frozen=True)
class DraftPair:
    """A pair as it waits to be saved.

    Attributes:
        group: it belongs to.
        place: of its image.
        encoding: of its image.
        label: as its kind encodes it.
        frame: where its image lies.
    """

    group: str
    place: Place
    encoding: str
    label: bytes
    frame: Frame


class Draft:
    """Pairs on their way into a collection.

    Attributes:
        counts: pairs by group.
        form: of all images; None before the first.
        classes: that have come so far.
        sources: what images came as.
        sensors: that took them.
        bounds: of what lies on maps, by coordinate system and by whether x is negative in the middle:
            what lies on both sides of the 180th meridian is no box around the earth.

    Args:
        parent: directory of all drafts.
        spec: of the collection.
        form: of the images that are saved already.
        classes: of the collection as it is saved.
        num_saved: pairs that are saved already; where a partition goes on.
        policy: what may be opened.
        pack_bytes: after which a pack is full.
    """

    def __init__(
        self,
        parent: Path,
        spec: CollectionSpec,
        form: ImageForm | None = None,
        classes: tuple[str, ...] = (),
        num_saved: int = 0,
        policy: PicturePolicy = DEFAULT_POLICY,
        pack_bytes: int = PACK_BYTES,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.form = form
        self.classes = spec.classes or classes
        self.sources: set[str] = set()
        self.sensors: list[str] = []
        self.bounds: dict[tuple[str, bool], Bounds] = {}
        self._spec = spec
        self._num_saved = num_saved
        self._policy = policy
        self._kind: LabelKind | None = None
        make_private_directory(parent)
        clear_drafts(parent)
        self._directory, self._lock = new_directory(parent)
        self._packs = PackWriter(self._directory, pack_bytes)
        # not buffered: a line is there, or it is not
        self._journal = (self._directory / _JOURNAL).open('xb', buffering=0)
        self._journal_bytes = 0

    def __len__(self) -> int:
        """Return how many pairs wait."""
        return sum(self.counts.values())

    @property
    def packs(self) -> list[Path]:
        """The files of the images."""
        return sorted(self._directory.glob('*.pack'))

    @property
    def boxes(self) -> list[tuple[str, Bounds]]:
        """What holds all that lies on maps, each box after its coordinate system."""
        return [(crs, box) for (crs, _), box in self.bounds.items()]

    @property
    def kind(self) -> LabelKind:
        """What the labels are, with the classes that have come so far."""
        return self._kind or build_label_kind(self._spec.mltype, self.classes)

    def read(self, place: Place) -> bytes:
        """The bytes of an image that waits."""
        with (self._directory / place.pack).open('rb') as file:
            file.seek(place.offset)
            return file.read(place.num_bytes)

    def add(self, image: Any, label: Any, group: str = DEFAULT_GROUP) -> None:
        """Check a pair and take it in.

        Args:
            image: in any of the forms that `read_tile` takes.
            label: in any of the forms that its kind takes.
            group: its name; with a partition, pairs of `train` are divided.

        Raises:
            DataError: the image or the label is none of this collection; nothing is taken in then.
            ConfigError: the group has no name.
        """
        group = check_group(group)
        if group not in self.counts and len(self.counts) >= MOST_GROUPS:
            raise DataError(f'the group {group[:80]!r} is one too many: {MOST_GROUPS} are taken')
        tile = read_tile(image, self._spec.tile_size, self._policy)
        if self.form is not None and tile.form != self.form:
            raise DataError(_other_form(tile.form, self.form))
        kind = self._kind_with(label)
        kept = kind.encode(kind.read(label, tile.frame))
        if self._spec.partition is not None and group == DEFAULT_GROUP:
            group = partitioned_group(self._spec.partition, self._num_saved + len(self))
        self._check_place(tile)
        self._write(tile, kept, group)
        # from here on nothing can fail
        self.form, self.classes, self._kind = tile.form, kind.classes, kind
        self.counts[group] += 1
        self._note(tile)

    def note_sensors(self, names: Sequence[str]) -> None:
        """Add to the sensors that took the images.

        Raises:
            DataError: they are no names, or too many.
        """
        known = set(self.sensors)
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            self.sensors = check_sensors([*self.sensors, *new])

    def pairs(self) -> Iterator[DraftPair]:
        """What waits, in the order in which it came, read from the disk."""
        height, width = self._spec.tile_size
        with (self._directory / _JOURNAL).open('rb') as journal:
            for _, line in zip(range(len(self)), journal, strict=False):
                group, place, encoding, label, transform, crs = json.loads(line)
                frame = Frame(height, width, transform and tuple(transform), crs)
                yield DraftPair(group, Place(*place), encoding, base64.b64decode(label), frame)

    def seal(self) -> None:
        """Bring all images to the disk; more may come, into other packs."""
        self._packs.close()

    def discard(self) -> None:
        """Forget all of it."""
        # a full disk must not keep it
        with suppress(OSError):
            self._journal.close()
        with suppress(OSError):
            self._packs.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._lock.release()

    def __del__(self) -> None:
        """What was never saved is of no use to anybody."""
        if '_journal' in self.__dict__ and not self._journal.closed:
            self.discard()

    def _kind_with(self, label: Any) -> LabelKind:
        classes = self.classes
        if self._spec.classes is None:
            known = () if self._kind is None else self._kind.places
            classes = grown_classes(self._spec.mltype, classes, label, known)
            if not classes:
                raise DataError(
                    'the collection has no classes yet, and this label brings none: give it a '
                    f'label of {self._spec.mltype}, or the collection its classes=[...]'
                )
            if classes != self.classes:
                check_classes(self._spec.mltype, classes)
        if self._kind is None or classes != self._kind.classes:
            return build_label_kind(self._spec.mltype, classes)
        return self._kind

    def _write(self, tile: Tile, label: bytes, group: str) -> None:
        place = self._packs.write(tile.data)
        transform = tile.frame.transform
        text = base64.b64encode(label).decode()
        line = [group, astuple(place), tile.encoding, text, transform, tile.frame.crs]
        data = json.dumps(line).encode() + b'\n'
        if self._journal.write(data) != len(data):
            self._journal.truncate(self._journal_bytes)
            self._journal.seek(self._journal_bytes)
            raise OSError(errno.ENOSPC, 'the disk is full', str(self._directory))
        self._journal_bytes += len(data)

    def _check_place(self, tile: Tile) -> None:
        crs = tile.frame.crs
        is_new = crs is not None and not {(crs, True), (crs, False)} & self.bounds.keys()
        if is_new and len({known for known, _ in self.bounds}) >= _MOST_SYSTEMS:
            raise DataError(
                f'the images lie in more than {_MOST_SYSTEMS} coordinate systems: bring them into '
                'fewer, or save what came so far'
            )
        if self._journal_bytes > _MOST_JOURNAL:
            raise DataError(
                f'the labels have more than {_MOST_JOURNAL >> 30} GiB: save what came so far'
            )

    def _note(self, tile: Tile) -> None:
        self.sources.add(tile.source)
        self.note_sensors(tile.sensors)
        if tile.frame.crs is not None and tile.frame.transform is not None:
            new = tile.frame.bounds
            place = tile.frame.crs, new[0] + new[2] < 0
            old = self.bounds.get(place, new)
            self.bounds[place] = (
                min(old[0], new[0]),
                min(old[1], new[1]),
                max(old[2], new[2]),
                max(old[3], new[3]),
            )


def new_directory(parent: Path) -> tuple[Path, FileLock]:
    """A directory for work that is not finished, which `clear_drafts` deletes once its process is gone.

    Args:
        parent: directory of all drafts.

    Returns:
        The directory, and the lock that says that somebody works in it.
    """
    while True:
        directory = parent / uuid.uuid4().hex
        directory.mkdir(mode=0o700)
        lock = FileLock(directory / _LOCK)
        # who clears drafts may have found it before it was locked
        with suppress(FileNotFoundError):
            lock.acquire()
        if lock.is_locked and (directory / _LOCK).exists():
            return directory, lock
        lock.release()


def clear_drafts(
    parent: Path, seconds: float = 0.0, only_look: bool = False
) -> list[tuple[Path, int]]:
    """Delete the drafts of processes that are gone.

    Args:
        parent: directory of all drafts.
        seconds: what is newer stays.
        only_look: delete nothing.

    Returns:
        What was deleted, or would be, and the bytes of each.
    """
    cleared = []
    for directory in parent.iterdir():
        if not directory.is_dir():
            continue
        with suppress(Timeout, OSError):
            # one that was just made has no lock yet; where other things are without one, it went first
            is_new = time.time() - directory.stat().st_mtime < _NEW_SECONDS
            if any(directory.iterdir()) or not is_new:
                with FileLock(directory / _LOCK).acquire(blocking=False):
                    found = list(left_over([directory], seconds))
                    cleared += found
                    if found and not only_look:
                        shutil.rmtree(directory, ignore_errors=True)
    return cleared


def at_position(error: FinetunerError, position: int) -> FinetunerError:
    """The same error, with the place of the pair that it is about.

    Args:
        error: of one pair.
        position: of the pair among those that were fed together.
    """
    return type(error)(f'pair {position}: {error}')


def _other_form(found: ImageForm, expected: ImageForm) -> str:
    return (
        f'the image is {list(found.shape)} of {found.dtype}, and those of this collection are '
        f'{list(expected.shape)} of {expected.dtype}: bands, size and dtype are those of its first'
    )
