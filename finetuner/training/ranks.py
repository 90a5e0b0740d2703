"""One training in several processes: each embeds its part of a batch, and all see the whole of it.

The processes are `ranks`, 0 the first. Every rank draws the same batches and loads its own part of
each. The embeddings are gathered, and each rank computes the loss of the whole batch, so that all
others' items are negatives there. As it does that in full, the gradient of its own embeddings is
complete: what is left to add up is the gradients of the weights, once a step.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor

from finetuner.cores import share_of_cores
from finetuner.data.numbering import Part
from finetuner.data.randomness import drawing_from
from finetuner.excepts import RANK_LOST, RankLostError

logger = logging.getLogger('finetuner.training')

_PATIENCE = timedelta(minutes=30)
# gradients that are added up in one message
_BUCKET_BYTES = 64 << 20
_ROWS_AT_ONCE = 4096
# parts the random numbers of losses from those of batches, which begin with (seed, epoch, number)
_LOSS_KEY = 1_000_003
_T = TypeVar('_T')
_Method = TypeVar('_Method', bound=Callable[..., Any])


def _together(method: _Method) -> _Method:
    """Say what it means when the others cannot be reached."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = ' '.join(str(error).split())[:300]
            raise RankLostError(f'{RANK_LOST} ({reason})') from error

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class Ranks:
    """This process among those of one training.

    Attributes:
        rank: of this process, from 0.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that reports, and writes checkpoints and artifacts."""
        return self.rank == 0

    def part(self, unit: int = 1, whole_batches: bool = False) -> Part:
        """What this process loads of a sampler's batches; see `finetuner.data.numbering.Part`."""
        return Part(self.rank, self.size, unit, whole_batches)

    @_together
    def gather_batch(self, embeddings: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' embeddings and labels, in the order of the batch.

        Args:
            embeddings: `[rows, dimension]` of this rank's part; None where that is empty. Their
                gradients are those of a loss that every rank computes from what this returns.
            labels: `[rows]` or `[rows, 2]` of the same part, of the same dtype on all ranks.

        Returns:
            `[batch, dimension]` and `[batch]` or `[batch, 2]`.
        """
        shape = (0, 0, 0)
        if embeddings is not None:
            shape = (*embeddings.shape, int(embeddings.dtype == torch.float64))
        shapes = torch.tensor([shape], dtype=torch.int64, device=labels.device)
        sizes, dimensions, doubles = torch.cat(self._all(shapes)).T.tolist()
        if embeddings is None:
            dtype = torch.float64 if any(doubles) else torch.float32
            embeddings = labels.new_zeros((0, max(dimensions)), dtype=dtype).requires_grad_()
        found = self._gather_rows(embeddings.detach(), sizes)
        # the others' are constants here: their ranks know their gradients
        found[self.rank] = embeddings
        return torch.cat(found), torch.cat(self._gather_rows(labels, sizes))

    def _gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Rows of all ranks, of which gloo wants equal numbers."""
        most = max(sizes)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self._all(padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    @_together
    def add_gradients(
        self, parameters: Iterable[torch.nn.Parameter], average: bool = False
    ) -> None:
        """Add up the gradients of all ranks.

        Args:
            parameters: the same on all ranks, in the same order; one that got no gradient gets one
                where another rank's did.
            average: for parameters whose whole gradient every rank has found, such as a loss's.
        """
        if self.size == 1:
            return
        trained = [each for each in parameters if each.requires_grad]
        for each in trained:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        for bucket in _buckets([each.grad for each in trained if each.grad is not None]):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            dist.all_reduce(flat)
            if average:
                flat /= self.size
            for gradient, total in zip(
                bucket, flat.split([g.numel() for g in bucket]), strict=True
            ):
                gradient.copy_(total.view_as(gradient))

    @_together
    def add_rows(self, rows: Tensor, device: torch.device) -> None:
        """Add up what ranks have in a tensor on the CPU, `[n, ...]`, where only one has a row."""
        for some in rows.split(_ROWS_AT_ONCE):
            # gloo adds no truth values
            moved = some.to(self._device(device), torch.uint8 if some.dtype == torch.bool else None)
            moved = moved.clone()
            dist.all_reduce(moved)
            some.copy_(moved)

    @_together
    def copy_first(self, modules: Iterable[torch.nn.Module]) -> None:
        """Give all ranks the weights of the first one."""
        if self.size == 1:
            return
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    @_together
    def any(self, value: bool, device: torch.device | str = 'cpu') -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return value
        counted = torch.tensor([int(value)], device=self._device(device))
        dist.all_reduce(counted, dist.ReduceOp.MAX)
        return bool(counted.item())

    @_together
    def total(self, value: int, device: torch.device | str = 'cpu') -> int:
        """The sum of all ranks' numbers."""
        if self.size == 1:
            return value
        added = torch.tensor([value], device=self._device(device))
        dist.all_reduce(added)
        return int(added.item())

    @_together
    def of_first(self, value: _T | None) -> _T:
        """What the first rank says; the others' values are not looked at."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]  # type: ignore[return-value]

    @_together
    def collect(self, value: _T) -> list[_T]:
        """What each rank says, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def interleave(self, own: Sequence[_T]) -> list[_T]:
        """All batches in order, where each rank has every so-manieth of them."""
        parts = self.collect(list(own))
        most = max(map(len, parts))
        return [part[row] for row in range(most) for part in parts if row < len(part)]

    @contextmanager
    def equal_draws(self, step: int) -> Iterator[None]:
        """Have all ranks draw the same random numbers, as losses and miners do."""
        if self.size == 1:
            yield
            return
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        here = torch.random.fork_rng() if on_gpu else contextlib.nullcontext()
        with here, drawing_from((_LOSS_KEY, step)):
            if on_gpu:
                torch.cuda.manual_seed(step)
            yield

    def draw_apart(self, seed: int) -> None:
        """Have every rank draw other random numbers from here on, as for dropout."""
        if not self.is_first:
            torch.manual_seed(seed + 7919 * self.rank)

    def _device(self, device: torch.device | str) -> torch.device | str:
        return torch.device('cuda') if dist.get_backend() == 'nccl' else device


ALONE = Ranks()


def join_ranks(device: str) -> Ranks:
    """Meet the other processes of a training, as the environment names them.

    torchrun sets it, and so does whatever starts a run in several processes: `RANK`, `WORLD_SIZE`,
    `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`.

    Args:
        device: `cpu`, where they talk by gloo, or `cuda`, by nccl.

    Returns:
        This process among them; alone where the environment names none.

    Raises:
        RankLostError: they do not come.
    """
    if int(os.environ.get('WORLD_SIZE', '1')) < 2:
        return ALONE
    if not dist.is_initialized():
        # torch has looked at the environment before this was set there
        torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS') or _own_cores()))
        _meet(device)
        # a script that torchrun started may train several times
        atexit.register(leave_ranks)
    return Ranks(dist.get_rank(), dist.get_world_size())


@_together
def _meet(device: str) -> None:
    with warnings.catch_warnings():
        # that each process takes its share of the cores is what is wanted
        warnings.filterwarnings('ignore', 'OMP_NUM_THREADS/MKL_NUM_THREADS unset')
        PartialState(cpu=device == 'cpu', timeout=_PATIENCE)


def _own_cores() -> int:
    return share_of_cores(int(os.environ.get('LOCAL_WORLD_SIZE', '1')))


def leave_ranks() -> None:
    """Part from the other processes, when all is said."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in rows of one dtype and of at most so many bytes."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (num_bytes + size > _BUCKET_BYTES or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += size
    if bucket:
        yield bucket
