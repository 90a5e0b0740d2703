"""A loader of streamed batches whose place can be kept, with any number of processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from finetuner.data.loaded_items import LoadingError
from finetuner.data.loading import start_worker
from finetuner.data.samplers import whole_number
from finetuner.data.sharded_batches import Place, ShardedBatches
from finetuner.excepts import ConfigError, DataError


class ShardLoader(DataLoader[Any]):
    """Batches of a rank, made by any number of processes; each iteration is the next epoch.

    What `state_dict` gives after a batch makes another loader, of the same arguments, go on with the
    batch after it.

    Attributes:
        epoch: number of the epoch that the next iteration yields, from 0; setting it goes on with the
            beginning of that epoch.
    """

    def __init__(self, batches: ShardedBatches, num_workers: int, pin_memory: bool) -> None:
        """See `ShardedBatches.loader`."""
        self._told = _ToldBatches(batches)
        workers: dict[str, Any] = {}
        if num_workers:
            workers = {'worker_init_fn': start_worker}
            if sys.platform == 'linux':
                # a forked worker has everything already: a lambda for preprocess_fn need not pickle
                workers['multiprocessing_context'] = 'fork'
        super().__init__(
            self._told,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            **workers,
        )
        self.epoch = batches.epoch

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next iteration yields."""
        return self._told.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        told = self._told
        told.epoch, told.next_reader = whole_number('epoch', epoch, 0), 0
        told.places = [Place()] * max(1, self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how far each process came, as plain values."""
        told = self._told
        places = [list(place) for place in told.places]
        return {'epoch': told.epoch, 'places': places, 'next_reader': told.next_reader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, at the next iteration, from where another loader was.

        Raises:
            ConfigError: that one had another number of processes, each with its own rows.
        """
        told, num_workers = self._told, max(1, self.num_workers)
        if len(state['places']) != num_workers:
            raise ConfigError(
                f'num_workers={self.num_workers}, and the state is of {len(state["places"])} '
                'processes, among which the rows were dealt: take as many'
            )
        told.epoch, told.next_reader = state['epoch'], state['next_reader']
        told.places = [Place(*place) for place in state['places']]

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:  # type: ignore[override]
        """Yield the batches of an epoch, or those of it that are left."""
        told, epoch = self._told, self.epoch
        batches: Any = super().__iter__()
        try:
            for reader, place, (inputs, labels) in batches:
                told.places[reader] = Place(*place)
                told.next_reader = (reader + 1) % len(told.places)
                yield inputs, labels
        finally:
            # not left to the end of what holds the iterator, for which workers would wait
            shut_down = getattr(batches, '_shutdown_workers', None)
            if shut_down is not None:
                shut_down()
        self.epoch = epoch + 1


class _ToldBatches(IterableDataset[Any]):
    """Batches that say which of the processes made them, and how far it came.

    torch takes a batch of each process in turn. The one whose turn is next after a state was kept comes
    first when it goes on.
    """

    epoch: int
    places: list[Place]
    next_reader: int

    def __init__(self, batches: ShardedBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[int, Place, tuple[Any, torch.Tensor]]]:
        worker = get_worker_info()
        number, num_readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        reader = (self.next_reader + number) % num_readers
        places = self._batches.read_epoch(self.epoch, reader, num_readers, self.places[reader])
        try:
            for place, batch in places:
                yield reader, place, batch
        except DataError as error:
            if worker is None or isinstance(error, LoadingError):
                raise
            # the one whose message torch leaves readable on its way from a process
            raise LoadingError(str(error)) from error


def _as_it_is(batch: Any) -> Any:
    return batch
