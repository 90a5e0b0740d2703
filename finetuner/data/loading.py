"""Loading: from a dataset and a sampler to batches of tensors, in worker processes if wanted."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from docarray import Document
from torch import Tensor
from torch.utils.data import DataLoader

from finetuner.data.datasets import ClassDataset, LabelledDataset, PreprocessFn
from finetuner.data.documents import require_class_data
from finetuner.data.samplers import ClassSampler, EpochSampler, RandomSampler
from finetuner.excepts import DataError, unknown_name

CollateFn = Callable[[list[Any]], Any]
SamplerName = Literal['auto', 'class', 'random']

_LOGGER = logging.getLogger(__name__)
_SAMPLERS = ('auto', 'class', 'random')


class LoadingError(DataError):
    """A Document could not be made into model input; the message names it and the cause.

    torch hands an exception of a worker process on as a new one of the same class, with a whole
    traceback for its message. This class takes its own message out of that again.

    Attributes:
        worker_traceback: what torch made of it; empty when no worker was involved.
    """

    def __init__(self, message: str) -> None:
        marker = f'{type(self).__module__}.{type(self).__qualname__}: '
        before, found, own = message.rpartition(marker)
        super().__init__(own.strip() if found else message)
        self.worker_traceback = before if found else ''


class BatchLoader(DataLoader[Any]):
    """A torch loader whose workers end when it fails or is closed.

    torch ends them when the loader is collected. A failure ties the loader into a cycle with its
    own traceback, and collecting that leaves the workers waiting for 5 s.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of one epoch."""
        # Not left to the first `next`: workers begin while the caller is still busy.
        return self._until_failure(super().__iter__())

    def _until_failure(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; iterating starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def build_dataset(
    docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None
) -> ClassDataset:
    """Make the dataset that fits the kind of the Documents: class data for now.

    Args:
        docs: class data.
        preprocess_fn: takes a Document and returns what the model takes.

    Raises:
        DataError: as `data_kind`, or the Documents are of another kind.
    """
    require_class_data(docs)
    return ClassDataset(docs, preprocess_fn)


def build_sampler(
    dataset: LabelledDataset[Any],
    batch_size: int,
    sampler: SamplerName = 'auto',
    num_items_per_class: int | None = None,
    seed: int | None = None,
) -> EpochSampler:
    """Make a sampler by its name.

    Args:
        dataset: whose items are sampled.
        batch_size: items in a batch.
        sampler: `'class'` for the same number of items of each class in a batch, `'random'` for
            shuffled items, `'auto'` for what fits the dataset.
        num_items_per_class: of `'class'`; None for the sampler's own choice.
        seed: for the same batches again.

    Raises:
        ValueError: the name is unknown or a size out of range.
    """
    if sampler not in _SAMPLERS:
        raise ValueError(unknown_name('sampler', sampler, _SAMPLERS))
    if sampler == 'random':
        return RandomSampler(len(dataset), batch_size, seed)
    return ClassSampler(dataset.labels, batch_size, num_items_per_class, seed)


def build_loader(
    dataset: LabelledDataset[Any],
    sampler: EpochSampler,
    collate_fn: CollateFn | None = None,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Make the loader of a dataset: it yields `(inputs, labels)`.

    Args:
        dataset: what to load.
        sampler: which items stand together; for data in order a `SequentialSampler`.
        collate_fn: makes a list of contents into the model's input; `stack_contents` by default.
        num_workers: processes that preprocess beside the training, at most the cores there are;
            0 for none. They stay between epochs.
        seed: of the random numbers in the workers (`random`, `numpy`, `torch`): augmentation is
            the same again with the same seed and number of workers. Without workers it draws from
            the generators of the process.
        pin_memory: copy batches to page-locked memory, from where CUDA takes them faster.

    Returns:
        A loader whose batches are `(inputs, labels)`: inputs as `collate_fn` returns them, labels
        `[num_items]` int64. Iterating raises `LoadingError`, a DataError, when a Document cannot
        be preprocessed.
    """
    num_workers = _cap_workers(num_workers)
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {'worker_init_fn': _start_worker, 'persistent_workers': True}
        if sys.platform == 'linux':
            # A forked worker has the dataset already: a lambda for preprocess_fn need not pickle.
            workers['multiprocessing_context'] = 'fork'
    return BatchLoader(
        _NamedItems(dataset),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=_Collate(dataset, collate_fn),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
        **workers,
    )


def stack_contents(contents: list[Any], names: Sequence[str] | None = None) -> Tensor:
    """Stack arrays or tensors of one shape into one tensor.

    Args:
        contents: ndarrays, tensors, numbers or lists of numbers, at least one.
        names: what errors call them; by default their number in the batch.

    Returns:
        `[num_items, ...]` of the dtype that came (uint8 stays uint8), float64 as float32.

    Raises:
        DataError: a content is no array, or shapes differ.
    """
    names = names or [f'item {number}' for number in range(len(contents))]
    tensors: list[Tensor] = []
    for content, name in zip(contents, names, strict=True):
        tensor = _as_tensor(content, name)
        if tensors and tensor.shape != tensors[0].shape:
            raise DataError(
                f'{name} became an array of shape {tuple(tensor.shape)} and {names[0]} one of '
                f'{tuple(tensors[0].shape)}: give a preprocess_fn that makes them the same, or a '
                'collate_fn that takes both'
            )
        tensors.append(tensor)
    stacked = torch.stack(tensors)
    return stacked.float() if stacked.dtype == torch.float64 else stacked


def _as_tensor(content: Any, name: str) -> Tensor:
    if isinstance(content, torch.Tensor):
        return content
    array = np.asarray(content) if not isinstance(content, (str, bytes)) else None
    if array is None or array.dtype.kind not in 'biuf':
        kind = type(content).__name__
        raise DataError(
            f'{name} became {"a" if kind[0] not in "aeiou" else "an"} {kind}, which is no array: '
            'give a preprocess_fn that returns one, or a collate_fn that takes what it returns'
        )
    # A copy where it must be: torch takes no read-only array, which protobuf makes of a tensor.
    return torch.from_numpy(np.require(array, requirements=['C', 'W']))


class _NamedItems:
    """The dataset's items with their index, and failures that say which Document failed."""

    def __init__(self, dataset: LabelledDataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any, Any]:
        try:
            content, label = self._dataset[index]
        except Exception as error:
            # Whatever a user's preprocess_fn raises, and from wherever.
            raise LoadingError(
                f'{self._dataset.position_of(index)} cannot be preprocessed: {_cause(error)}'
            ) from error
        return index, content, label


class _Collate:
    """Stacks contents with the collate_fn and labels into an int64 tensor."""

    def __init__(self, dataset: LabelledDataset[Any], collate_fn: CollateFn | None) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn

    def __call__(self, items: list[tuple[int, Any, Any]]) -> tuple[Any, Tensor]:
        indices, contents, labels = zip(*items, strict=True)
        return self._collate(indices, list(contents)), torch.tensor(labels, dtype=torch.int64)

    def _collate(self, indices: Sequence[int], contents: list[Any]) -> Any:
        names = [self._dataset.position_of(index) for index in indices]
        if self._collate_fn is None:
            try:
                return stack_contents(contents, names)
            except DataError as error:
                raise LoadingError(str(error)) from error
        try:
            return self._collate_fn(contents)
        except Exception as error:
            shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
            raise LoadingError(
                f'collate_fn failed on a batch of {len(names)} ({shown}): {_cause(error)}'
            ) from error


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f'{type(error).__name__}: {error}'


def _cap_workers(num_workers: int) -> int:
    affinity = getattr(os, 'sched_getaffinity', None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if num_workers > num_cores:
        _LOGGER.info('num_workers=%d capped at the %d cores there are', num_workers, num_cores)
        return num_cores
    return num_workers


def _start_worker(worker: int) -> None:
    """Seed every generator from torch's seed of this worker, and keep to one core."""
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    # For OpenCV imported from here on, and for OpenCV that came with the fork.
    os.environ['OPENCV_FOR_THREADS_NUM'] = '1'
    if 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)
