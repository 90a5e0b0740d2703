"""A pair of a collection: its image, not read before it is wanted, and its label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.collections.drawing import draw_pair
from finetuner.collections.labels import LabelKind
from finetuner.collections.place import Store
from finetuner.collections.records import CollectionRecord, PairRecord, ReadImage
from finetuner.collections.tiles import pixels_of

if TYPE_CHECKING:
    import dask.array
    from PIL.Image import Image


class DataPoint:
    """A pair, as `TrainingSet` gives it.

    Args:
        pair: as the store has it.
        collection: that it belongs to.
        store: that has both.
        read_image: of the collection.
    """

    def __init__(
        self,
        pair: PairRecord,
        collection: CollectionRecord,
        store: Store,
        read_image: ReadImage,
    ) -> None:
        self._pair = pair
        self._collection = collection
        self._store = store
        self._read_image = read_image

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
    def name(self) -> str:
        """A name that no pair of another collection has, either."""
        return f'{self._collection.key[:12]}-{self.id}'

    @property
    def kind(self) -> LabelKind:
        """What its label is, with the classes that it counts."""
        return self._collection.kind

    @property
    def bounds(self) -> list[float] | None:
        """`[minx, miny, maxx, maxy]` in the units of its map; None where it is on none."""
        return None if self._pair.frame.transform is None else list(self._pair.frame.bounds)

    @property
    def data(self) -> dict[str, Any]:
        """What is stored, as JSON; the pixels of the image aside."""
        return self._pair.document(self._collection)

    @property
    def image(self) -> dask.array.Array:
        """The image `[bands, height, width]`; nothing is read before `.compute()`."""
        import dask
        from dask import array

        form = self._pair.form
        # not hashed by its content: that would read it
        name = f'pair-{self._collection.key}-{self.id}'
        pixels = dask.delayed(self.read, pure=False, traverse=False)(dask_key_name=name)
        return array.from_delayed(pixels, form.shape, np.dtype(form.dtype))

    @property
    def y(self) -> Any:
        """The label: a vector of zeros and ones, boxes for each class, or a mask."""
        return self._collection.kind.decode(self._pair.label, self._pair.frame)

    @property
    def present(self) -> list[str]:
        """Names of the classes that the label says are there."""
        return self._collection.kind.present(self.y)

    @property
    def preview(self) -> Image:
        """A picture of the pair, with its boxes or its mask drawn in."""
        return self.draw()

    def draw(self, bands: Sequence[int] | None = None, most: int | None = None) -> Image:
        """A picture of the pair, with its boxes or its mask drawn in.

        Args:
            bands: the three that are shown as red, green and blue, counted from 0.
            most: pixels of its longer side; of a larger image every n-th is shown.
        """
        return draw_pair(self.read(), self.y, self._collection.kind, bands, most)

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

    @property
    def kept(self) -> tuple[bytes, str]:
        """The bytes of the image as they are kept, and how they are to be read: `raw` or `picture`."""
        return self._read_image(self._pair), self._pair.encoding

    def read(self) -> np.ndarray:
        """The pixels of the image, `[bands, height, width]`.

        Raises:
            DataError: they are not there any more, or damaged.
        """
        return pixels_of(*self.kept, self._pair.form)
