"""A cached collection as people train on it: its groups, their pairs, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from finetuner.collections.batch_generator import BatchGenerator
from finetuner.collections.batch_options import (
    BatchOptions,
    Pad,
    Preparation,
    TransformFn,
    check_batch_size,
)
from finetuner.collections.cache import OpenCache
from finetuner.collections.views import Images, Labels, choose, read_ahead, read_pair
from finetuner.excepts import NotFoundError, unknown_name

if TYPE_CHECKING:
    from finetuner.collections.torch_pairs import TorchPairs

# groups that are always there, if without pairs
GROUPS = ('train', 'test', 'validate')


class ImageTrainer:
    """The pairs of a cached collection, group by group. It pickles by the path of its cache.

    Attributes:
        batch_size: of batches, where nothing else is asked for.
        groups: names of the groups that have pairs.
        classes: names of the classes.
        mltype: of the labels: `'classification'`, `'object_detection'` or `'segmentation'`.
        revision: of the collection.
        is_whole: whether all images are there; not so where the writer of the cache was stopped.
    """

    def __init__(self, cache: OpenCache, batch_size: int = 32) -> None:
        """Train on what is in a cache.

        Args:
            cache: of a collection, open; closed with this object.
            batch_size: of batches, where nothing else is asked for.

        Raises:
            ConfigError: the size is below 1.
        """
        check_batch_size(batch_size)
        self._cache = cache
        self.batch_size = batch_size
        self.groups = cache.groups
        self.classes = cache.kind.classes
        self.mltype = cache.kind.mltype
        self.revision = cache.revision
        self.is_whole = cache.is_whole

    @property
    def train(self) -> Partition:
        """The pairs to train on."""
        return self['train']

    @property
    def test(self) -> Partition:
        """The pairs to test with."""
        return self['test']

    @property
    def validate(self) -> Partition:
        """The pairs to validate with."""
        return self['validate']

    def __getitem__(self, group: str) -> Partition:
        """The pairs of a group.

        Args:
            group: its name.

        Raises:
            NotFoundError: there is none of that name.
        """
        known = {*GROUPS, *self.groups}
        if group not in known:
            raise NotFoundError(unknown_name('group', group, known))
        return Partition(self._cache, self._cache.positions(group), self.batch_size)

    def close(self) -> None:
        """Let the files go; reading afterwards is an error."""
        self._cache.close()

    def __enter__(self) -> ImageTrainer:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the files go."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the cache again."""
        return ImageTrainer, (self._cache, self.batch_size)

    def __repr__(self) -> str:
        """Return the groups, and how many pairs each has."""
        counts = ', '.join(f'{group}: {len(self[group])}' for group in self.groups)
        return f'<{type(self).__name__} of {self.mltype}, {counts or "no pairs"}>'


class Partition(Sequence[Any]):
    """Some pairs `(x, y)`, read when they are asked for: `x` is `[bands, height, width]`.

    `y` is uint8 `[classes]` for classes, uint8 `[height, width]` for masks, and for boxes a list a
    class. A slice, or a list of indices, is a Partition as well.

    Attributes:
        ids: `[n]` int64, of the pairs.
        classes: names of the classes.
        images: the images alone.
        labels: the labels alone.
    """

    def __init__(self, cache: OpenCache, positions: NDArray[np.int64], batch_size: int) -> None:
        """Look at some pairs of a cache.

        Args:
            cache: open.
            positions: `[n]` int64, of the pairs.
            batch_size: of batches, where nothing else is asked for.
        """
        self._cache = cache
        self._positions = positions
        self._batch_size = batch_size

    @property
    def ids(self) -> NDArray[np.int64]:
        """Ids of the pairs, `[n]` int64."""
        return self._cache.ids[self._positions]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._cache.kind.classes

    @property
    def images(self) -> Images:
        """The images alone."""
        return Images(self._cache, self._positions)

    @property
    def labels(self) -> Labels:
        """The labels alone."""
        return Labels(self._cache, self._positions)

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> Partition: ...

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Any] | Partition:
        """Read a pair, or look at several without reading any.

        Args:
            index: a number, negative from the end; a slice; a list or array of numbers, or of as many
                bools as there are pairs.

        Raises:
            IndexError: there is no such pair.
            ConfigError: it is nothing of the kind.
            DataError: the cache is damaged, or was closed.
        """
        chosen = choose(self._positions, index)
        if isinstance(chosen, int):
            return read_pair(self._cache, chosen)
        return Partition(self._cache, chosen, self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Read all pairs in order, some of them ahead of time."""
        return read_ahead(self._cache, self._positions, read_pair)

    def __repr__(self) -> str:
        """Return the number of pairs."""
        return f'<{type(self).__name__} of {len(self)} pairs>'

    def batch_generator(
        self,
        batch_size: int | None = None,
        shuffle: bool = True,
        rescale: bool = False,
        flip_horizontal: bool = False,
        flip_vertical: bool = False,
        channels_last: bool = False,
        pad: Pad | None = None,
        image_transform: TransformFn | None = None,
        label_transform: TransformFn | None = None,
        loop: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> BatchGenerator:
        """Batches `(x, y)` of these pairs; see `BatchGenerator`.

        Args:
            batch_size: pairs in a batch; None for what `batch` was called with.
            shuffle: whether each epoch has an order of its own.
            rescale: see `Preparation`, as all up to `label_transform`.
            flip_horizontal: whether half of the pairs, by chance, have left and right exchanged.
            flip_vertical: whether half of the pairs, by chance, have top and bottom exchanged.
            channels_last: whether `x` is `[n, height, width, bands]`.
            pad: `(height, width)`, or both in one number, to fill up to with zeros.
            image_transform: takes and returns an image, after all this.
            label_transform: takes and returns a label, after all this.
            loop: whether epoch follows epoch for ever.
            seed: from which orders and flips come.
            drop_last: whether a last batch that is not full is left out.

        Raises:
            ConfigError: an option is out of range, or not for images of this collection.
            DataError: an endless loop over no batch.
        """
        preparation = Preparation(
            rescale=rescale,
            flip_horizontal=flip_horizontal,
            flip_vertical=flip_vertical,
            channels_last=channels_last,
            pad=pad,
            image_transform=image_transform,
            label_transform=label_transform,
        )
        options = BatchOptions(
            batch_size=self._batch_size if batch_size is None else batch_size,
            shuffle=shuffle,
            loop=loop,
            seed=seed,
            drop_last=drop_last,
            preparation=preparation,
        )
        return BatchGenerator(self._cache, self._positions, options)

    def as_torch(
        self,
        rescale: bool = False,
        flip_horizontal: bool = False,
        flip_vertical: bool = False,
        pad: Pad | None = None,
        image_transform: TransformFn | None = None,
        label_transform: TransformFn | None = None,
    ) -> TorchPairs:
        """A `torch.utils.data.Dataset` of these pairs; see `TorchPairs`.

        Args:
            rescale: see `Preparation`, as all the others.
            flip_horizontal: whether half of the pairs, by chance, have left and right exchanged.
            flip_vertical: whether half of the pairs, by chance, have top and bottom exchanged.
            pad: `(height, width)`, or both in one number, to fill up to with zeros.
            image_transform: takes the tensor of an image and returns another, after all this.
            label_transform: takes a label and returns another, after all this.

        Raises:
            ConfigError: an option is out of range, or not for images of this collection.
        """
        from finetuner.collections.torch_pairs import TorchPairs

        preparation = Preparation(
            rescale=rescale,
            flip_horizontal=flip_horizontal,
            flip_vertical=flip_vertical,
            pad=pad,
            image_transform=image_transform,
            label_transform=label_transform,
        )
        return TorchPairs(self._cache, self._positions, preparation)
