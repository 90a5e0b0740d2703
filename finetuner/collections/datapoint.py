"""A pair of a collection: its image, not read before it is wanted, and its label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.collections.packs import PackReader
from finetuner.collections.records import CollectionRecord, PairRecord
from finetuner.collections.store import CollectionStore
from finetuner.collections.tiles import pixels_of

if TYPE_CHECKING:
    import dask.array


class DataPoint:
    """A pair, as `TrainingSet` gives it.

    Args:
        pair: as the store has it.
        collection: that it belongs to.
        store: that has both.
        reader: of the images of the collection.
    """

    def __init__(
        self,
        pair: PairRecord,
        collection: CollectionRecord,
        store: CollectionStore,
        reader: PackReader,
    ) -> None:
        self._pair = pair
        self._collection = collection
        self._store = store
        self._reader = reader

    @property
    def id(self) -> int:
        """Its number, which no other pair will ever have."""
        return self._pair.id

    @property
    def group(self) -> str:
        """Name of the group that it is in."""
        return self._pair.group

    @property
    def mltype(self) -> str:
        """What its label is."""
        return self._collection.mltype

    @property
    def bounds(self) -> list[float] | None:
        """`[minx, miny, maxx, maxy]` in the units of its map; None where it is on none."""
        return None if self._pair.frame.transform is None else list(self._pair.frame.bounds)

    @property
    def data(self) -> dict[str, Any]:
        """What is stored, as JSON; the pixels of the image aside."""
        frame = self._pair.frame
        return {
            'id': self.id,
            'dataset_id': self._collection.id,
            'group': self.group,
            'mlType': self.mltype,
            'classes': list(self._collection.classes),
            'label': self._collection.kind.as_json(self.y),
            'shape': list(self._collection.form.shape),
            'dtype': self._collection.form.dtype,
            'bounds': self.bounds,
            'transform': None if frame.transform is None else list(frame.transform),
            'crs': frame.crs,
            'updated_at': self._pair.updated_at,
        }

    @property
    def image(self) -> dask.array.Array:
        """The image `[bands, height, width]`; nothing is read before `.compute()`."""
        import dask
        from dask import array

        form = self._collection.form
        # not hashed by its content: that would read it
        name = f'pair-{self._collection.key}-{self.id}'
        pixels = dask.delayed(self._read, pure=False, traverse=False)(dask_key_name=name)
        return array.from_delayed(pixels, form.shape, np.dtype(form.dtype))

    @property
    def y(self) -> Any:
        """The label: a vector of zeros and ones, boxes for each class, or a mask."""
        return self._collection.kind.decode(self._pair.label, self._pair.frame)

    @property
    def present(self) -> list[str]:
        """Names of the classes that the label says are there."""
        return self._collection.kind.present(self.y)

    def update(self, label: Any) -> None:
        """Give the pair another label, at once.

        Args:
            label: in any of the forms that its kind takes.

        Raises:
            DataError: it is no label of this collection.
            NotFoundError: the pair was removed, or is somebody else's.
        """
        self._pair = self._store.relabel(self.id, label)

    def remove(self) -> None:
        """Remove the pair from its collection, at once.

        Raises:
            NotFoundError: it was removed already, or is somebody else's.
        """
        self._store.remove_pair(self.id)

    def __repr__(self) -> str:
        """Its number, group and label."""
        return f'DataPoint(id={self.id}, group={self.group!r}, classes={self.present})'

    def _read(self) -> np.ndarray:
        data = self._reader.read(self._pair.place)
        return pixels_of(data, self._pair.encoding, self._collection.form)
