"""Reading a saved collection: pair by pair, as pictures to look at, as Documents to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
from docarray import Document, DocumentArray

from finetuner.collections.cleaning import Cleaning
from finetuner.collections.datapoint import DataPoint
from finetuner.collections.documents import documents_of
from finetuner.collections.draft import DEFAULT_GROUP
from finetuner.collections.drawing import draw_sheet
from finetuner.collections.place import Place
from finetuner.collections.records import CollectionRecord, ReadImage, status_of
from finetuner.excepts import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetuner.collections.batches import ImageTrainer

_MOST_DRAWN = 256
_PAGE = 500


class SavedPairs:
    """The pairs of a collection, as far as they are saved."""

    _place: Place
    _record: CollectionRecord | None = None

    def __len__(self) -> int:
        """Return how many pairs are saved."""
        return self._fresh().num_pairs if self._record else 0

    @overload
    def __getitem__(self, index: int) -> DataPoint: ...

    @overload
    def __getitem__(self, index: slice) -> list[DataPoint]: ...

    def __getitem__(self, index: int | slice) -> DataPoint | list[DataPoint]:
        """Pairs by their places in the order in which they were fed."""
        record = self._fresh()
        if isinstance(index, slice):
            wanted = range(record.num_pairs)[index]
            low, high = (min(wanted), max(wanted)) if wanted else (0, -1)
            found = self._points(record, low, high - low + 1)
            # what was removed meanwhile is not there
            return [found[i - low] for i in wanted if i - low < len(found)]
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise TypeError(f'pairs are found by whole numbers and slices, not {index!r}')
        place = int(index) + record.num_pairs * (index < 0)
        found = self._points(record, place, 1) if 0 <= place < record.num_pairs else []
        if not found:
            raise IndexError(f'there is no pair {index}: there are {record.num_pairs:,}')
        return found[0]

    def __iter__(self) -> Iterator[DataPoint]:
        """All saved pairs in the order in which they were fed."""
        record = self._fresh()
        for pair in self._place.store.iter_pairs(record.id):
            yield DataPoint(pair, record, self._place.store, self._read_image)

    def preview(
        self,
        count: int = 40,
        group: str | None = None,
        columns: int = 8,
        size: int = 128,
        bands: Sequence[int] | None = None,
    ) -> Image:
        """A sheet of pairs, spread evenly over the collection, their boxes and masks drawn in.

        Args:
            count: pairs on the sheet, 1 to 256.
            group: only its pairs.
            columns: pairs side by side.
            size: of a pair in pixels.
            bands: the three that are shown as red, green and blue, counted from 0.

        Raises:
            ConfigError: a number is out of range, or there are no pairs.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_DRAWN:
            raise ConfigError(f'count={count!r}: a sheet has 1 to {_MOST_DRAWN} pairs')
        record = self._fresh()
        total = record.num_pairs if group is None else record.counts.get(group, 0)
        places = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
        points = [point for i in places for point in self._points(record, int(i), 1, group)]
        title = f'{record.name}: {len(points)} of {total:,} pairs of {group or "all groups"}'
        return draw_sheet(points, title, columns, size, bands)

    def clean(self, size: int = 40, columns: int = 8) -> Cleaning:
        """Look through all pairs page by page, mark the bad ones, and remove them.

        Args:
            size: pairs on a page.
            columns: pairs side by side.
        """
        return Cleaning(self, size, columns)

    def remove_pairs(self, ids: Sequence[int]) -> int:
        """Remove pairs, all at once.

        Args:
            ids: their numbers; those that are none of this collection's are left out.

        Returns:
            How many there were.
        """
        return self._place.store.remove_pairs(self._saved.id, list(ids))

    @property
    def percent_cached(self) -> int:
        """How much of it the cache of this machine holds, 100 only when all of it."""
        from finetuner.collections.caching import percent_cached

        return percent_cached(self._fresh(), self._place.cache) if self._record else 0

    @property
    def status(self) -> str:
        """`EMPTY` without pairs, `BUILDING` while not all of it is cached, else `COMPLETE`."""
        return status_of(len(self), self.percent_cached)

    def batch(self, batch_size: int = 32) -> ImageTrainer:
        """What training reads: the saved pairs from a cache on this machine, brought up to date first.

        Args:
            batch_size: of the batches that its generators make.

        Returns:
            Partitions `train`, `test` and `validate`, and any other group by its name; each is
            indexed, sliced and iterated as (image, label). Later changes of the collection are seen
            by another call.

        Raises:
            ConfigError: the collection is not saved, or has no pairs.
        """
        from finetuner.collections.caching import read_batches

        return read_batches(self._place.store, self._fresh(), self._place.cache, batch_size)

    def iter_points(self, group: str | None = None) -> Iterator[DataPoint]:
        """The pairs in the order in which they were fed, whose images are fetched hundreds at a time.

        Args:
            group: only its pairs.
        """
        record, store = self._fresh(), self._place.store
        after = 0
        while found := store.list_pairs(record.id, 0, _PAGE, group, after):
            for pair, image in zip(found, store.read_images(record, found), strict=True):
                yield DataPoint(pair, record, store, _given(image))
            after = found[-1].id

    def iter_documents(
        self, group: str | None = None, bands: Sequence[int] | None = None
    ) -> Iterator[Document]:
        """The pairs as labelled Documents, one by one; see `to_documents`."""
        return documents_of(self.iter_points(group), bands)

    def to_documents(
        self, group: str | None = None, bands: Sequence[int] | None = None
    ) -> DocumentArray:
        """The pairs as labelled Documents, which `finetuner.fit` and everybody else takes.

        A pair with boxes becomes a Document for each box, cut out, its class the label. Any other pair
        becomes one whose label are its classes, joined by ` + `; `none` where it shows none of them.

        Args:
            group: only its pairs.
            bands: the three that become red, green and blue, counted from 0.
        """
        return DocumentArray(self.iter_documents(group, bands))

    def training_documents(self) -> Iterator[Document]:
        """What `finetuner.fit(train_data=...)` trains on: the Documents of the group `train`."""
        return self.iter_documents(DEFAULT_GROUP)

    # below

    @cached_property
    def _read_image(self) -> ReadImage:
        return self._place.store.reader_of(self._saved)

    @property
    def _saved(self) -> CollectionRecord:
        if self._record is None:
            raise ConfigError('the collection is not saved yet: save() it first')
        return self._record

    def _fresh(self) -> CollectionRecord:
        """The collection as it is now; others may have changed it."""
        self._take(self._place.store.get(self._saved.id))
        return self._saved

    def _take(self, record: CollectionRecord) -> None:
        self._record = record

    def _points(
        self, record: CollectionRecord, offset: int, limit: int, group: str | None = None
    ) -> list[DataPoint]:
        pairs = self._place.store.list_pairs(record.id, offset, limit, group)
        return [DataPoint(pair, record, self._place.store, self._read_image) for pair in pairs]


def _given(image: bytes) -> ReadImage:
    return lambda pair: image
