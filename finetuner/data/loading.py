"""Loading: from a dataset and a sampler to batches of tensors, in worker processes if wanted."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from docarray import Document
from torch.utils.data import DataLoader

from finetuner.cores import num_cores
from finetuner.data.datasets import DATASETS, InstanceDataset, SessionDataset
from finetuner.data.documents import DataKind, survey_documents
from finetuner.data.labelled import LabelledDataset, PreprocessFn
from finetuner.data.loaded_items import (
    BrokenItem,
    CollateFn,
    LabelledCollate,
    LoadedBatches,
    LoadingError,
    NamedItems,
)
from finetuner.data.numbering import NumberedBatches, Part
from finetuner.data.relation_samplers import InstanceSampler, PairSampler, SessionSampler
from finetuner.data.samplers import ClassSampler, EpochSampler, RandomSampler
from finetuner.excepts import ConfigError, unknown_name

SamplerName = Literal['auto', 'class', 'random']
OnBroken = Literal['stop', 'skip']

_LOGGER = logging.getLogger(__name__)
_SAMPLERS = ('auto', 'class', 'random')
_NUM_LOGGED = 20


class BatchLoader(DataLoader[Any]):
    """A torch loader whose workers end when it fails or is closed.

    torch ends them when the loader is collected. A failure ties the loader into a cycle with its
    own traceback, and collecting that leaves the workers waiting for 5 s.

    It knows its place: what `state_dict` gives after a batch was taken makes another loader of the
    same data go on with the batch after it, the same one to the last bit.

    Attributes:
        broken: what was left out of batches because it could not be loaded: the reason by the
            name of the Document. Empty unless the loader was told to skip.
    """

    broken: dict[str, str]
    _batches: NumberedBatches
    _place: tuple[int, int]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of one epoch, or those of it that are left."""
        epoch, first = self._place = self._batches.next_place
        # Not left to the first `next`: workers begin while the caller is still busy.
        return self._until_failure(super().__iter__(), epoch, first)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how many of its batches were taken, as plain values."""
        epoch, num_taken = self._place
        return {'epoch': epoch, 'num_taken': num_taken, 'broken': dict(self.broken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, at the next iteration, from where another loader of the same data was."""
        self._place = self._batches.next_place = state['epoch'], state['num_taken']
        self.broken = dict(state['broken'])

    def _until_failure(self, batches: Iterator[Any], epoch: int, first: int) -> Iterator[Any]:
        used = first > 0
        try:
            for number, (inputs, labels, *broken) in enumerate(batches, first):
                for reasons in broken:
                    self._note(reasons)
                self._place = epoch, number + 1
                if labels is not None:
                    used = True
                    yield inputs, labels
        except Exception:
            self.close()
            raise
        self._place = epoch + 1, 0
        # of a part, the other processes may have used theirs
        if self.broken and not used and not self._batches.part.divides:
            raise LoadingError(
                f'nothing is left to load: all batches held Documents that cannot be preprocessed '
                f'({len(self.broken)} in all), such as {next(iter(self.broken.values()))}'
            )

    def _note(self, broken: dict[str, str]) -> None:
        for name, reason in broken.items():
            if name not in self.broken:
                self.broken[name] = reason
                if len(self.broken) <= _NUM_LOGGED:
                    _LOGGER.warning('Left out: %s', reason)
                elif len(self.broken) == _NUM_LOGGED + 1:
                    _LOGGER.warning('More are left out and counted, but not named here')

    def add_broken(self, others: Iterable[dict[str, str]]) -> None:
        """Count what other processes left out of their parts of the batches."""
        for broken in others:
            self.broken |= broken

    def log_broken(self) -> None:
        """Say in the log how many Documents were left out, if any."""
        if self.broken:
            _LOGGER.warning(
                '%d Documents were left out of batches, since they cannot be loaded',
                len(self.broken),
            )

    def close(self) -> None:
        """End the workers; iterating starts new ones."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def build_dataset(
    docs: Sequence[Document], preprocess_fn: PreprocessFn | None = None
) -> LabelledDataset[Any]:
    """Make the dataset that fits the kind of the Documents, in one pass over them.

    Args:
        docs: Documents of one kind.
        preprocess_fn: takes a Document and returns what the model takes.

    Raises:
        DataError: as `survey_documents`.
    """
    survey = survey_documents(docs)
    return DATASETS[survey.kind].of_column(docs, survey.column, preprocess_fn)


def build_sampler(
    dataset: LabelledDataset[Any],
    batch_size: int,
    sampler: SamplerName = 'auto',
    num_items_per_class: int | None = None,
    seed: int | None = None,
    views_per_instance: int = 2,
) -> EpochSampler:
    """Make the sampler that fits the dataset.

    Args:
        dataset: whose items are sampled.
        batch_size: items in a batch.
        sampler: `'auto'` for what fits the dataset. Of class data, `'class'` (which is `'auto'`)
            for the same number of items of each class in a batch, `'random'` for shuffled items.
        num_items_per_class: of `'class'`; None for the sampler's own choice.
        seed: for the same batches again.
        views_per_instance: of unlabelled data: how often each Document stands in a batch.

    Raises:
        ValueError: the name is unknown or a size out of range.
        ConfigError: the sampler does not fit the kind of data.
    """
    if sampler not in _SAMPLERS:
        raise ValueError(unknown_name('sampler', sampler, _SAMPLERS))
    check_sampler(sampler, dataset.kind)
    if dataset.kind == 'class':
        if sampler == 'random':
            return RandomSampler(len(dataset), batch_size, seed)
        return ClassSampler(dataset.labels, batch_size, num_items_per_class, seed)
    if isinstance(dataset, SessionDataset):
        return SessionSampler(dataset.labels, batch_size, seed=seed)
    if isinstance(dataset, InstanceDataset):
        return InstanceSampler(len(dataset), batch_size, views_per_instance, seed)
    return PairSampler(dataset.num_documents, batch_size, seed)


def check_sampler(sampler: SamplerName, kind: DataKind) -> None:
    """Check that a sampler fits a kind of data.

    Raises:
        ConfigError: it is for class data, and this is none.
    """
    if sampler != 'auto' and kind != 'class':
        raise ConfigError(
            f"sampler {sampler!r} is for class data, and this is of kind {kind}: use 'auto'"
        )


def build_loader(
    dataset: LabelledDataset[Any],
    sampler: EpochSampler,
    collate_fn: CollateFn | None = None,
    num_workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
    on_broken: OnBroken = 'stop',
    part: Part | None = None,
) -> BatchLoader:
    """Make the loader of a dataset: it yields `(inputs, labels)`.

    Args:
        dataset: what to load.
        sampler: which items stand together; for data in order a `SequentialSampler`.
        collate_fn: makes a list of contents into the model's input; `stack_contents` by default.
        num_workers: processes that preprocess beside the training, at most the cores there are;
            0 for none. They stay between epochs.
        seed: of the random numbers drawn while a batch is loaded (`random`, `numpy`, `torch`).
            They depend on the seed, the epoch and the batch's number in it alone: augmentation is
            the same with any number of workers, and draws nothing from this process's generators.
        pin_memory: copy batches to page-locked memory, from where CUDA takes them faster.
        on_broken: `'stop'` at a Document that cannot be loaded (a file that is missing, empty or
            damaged), or `'skip'` it: its batch is smaller, without the other half of its pair or
            the matches of its session too. See `BatchLoader.broken`.
        part: what this process loads, where several share the batches; None for all. A part of a
            batch may be empty: its inputs are None then.

    Returns:
        A loader whose batches are `(inputs, labels)`: inputs as `collate_fn` returns them, labels
        `[num_items]` or `[num_items, 2]`, int64, or float32 where they are scores. Iterating
        raises `LoadingError`, a DataError, when a Document cannot be preprocessed.
    """
    num_workers = cap_workers(num_workers)
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {'worker_init_fn': start_worker, 'persistent_workers': True}
        if sys.platform == 'linux':
            # A forked worker has the dataset already: a lambda for preprocess_fn need not pickle.
            workers['multiprocessing_context'] = 'fork'
    items = NamedItems(dataset, skips=on_broken == 'skip')
    batches = NumberedBatches(sampler, seed, part)
    loader = BatchLoader(
        LoadedBatches(items, LabelledCollate(dataset, collate_fn, batches.part.divides)),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
        **workers,
    )
    loader.broken = {}
    loader._batches = batches
    loader._place = batches.next_place
    return loader


def _as_it_is(batch: Any) -> Any:
    return batch


def load_in_order(
    dataset: LabelledDataset[Any],
    batch_size: int,
    on_broken: OnBroken = 'stop',
    part: Part | None = None,
) -> Iterator[tuple[list[int], list[Any], dict[int, str]]]:
    """Read all contents of a dataset once, with threads, those of the next batch ahead.

    Args:
        dataset: of any kind.
        batch_size: items that are read at a time.
        on_broken: `'stop'` at a Document that cannot be loaded, or `'skip'` it.
        part: of several processes, which of the batches this one reads; None for all.

    Yields:
        Of each batch the items that were read, their contents, and by item why others were not.

    Raises:
        LoadingError: a Document cannot be preprocessed.
    """
    items = NamedItems(dataset, skips=on_broken == 'skip')
    batches = [
        range(start, min(start + batch_size, len(dataset)))
        for start in range(0, len(dataset), batch_size)
    ]
    if part is not None:
        batches = batches[part.rank :: part.size]
    with ThreadPoolExecutor() as pool:
        ahead = pool.map(items.__getitem__, batches[0] if batches else ())
        for following in [*batches[1:], range(0)][: len(batches)]:
            read, ahead = list(ahead), pool.map(items.__getitem__, following)
            whole = [
                (index, content) for index, content in read if not isinstance(content, BrokenItem)
            ]
            broken = {i: c.reason for i, c in read if isinstance(c, BrokenItem)}
            yield [index for index, _ in whole], [content for _, content in whole], broken


def cap_workers(num_workers: int) -> int:
    """As many processes as asked for, and at most the cores there are."""
    most = num_cores()
    if num_workers > most:
        _LOGGER.info('num_workers=%d capped at the %d cores there are', num_workers, most)
        return most
    return num_workers


def start_worker(worker: int) -> None:
    """Keep to one core, and leave the memory shared with other processes alone."""
    # What came with the fork stays as it is: a collection would write to every object of it, and so
    # copy what the processes share.
    gc.freeze()
    # For OpenCV imported from here on, and for OpenCV that came with the fork.
    os.environ['OPENCV_FOR_THREADS_NUM'] = '1'
    if 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)
