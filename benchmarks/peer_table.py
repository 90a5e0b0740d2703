"""The table of `benchmarks/peers.py`, and what it is made of."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / 'peers'))
from contestant import Result

_NAME_WIDTH = 47
_NOT_BEHIND = '*'


@dataclass(frozen=True)
class Measured:
    """One training of a contestant.

    Attributes:
        result: what it told.
        score: the metric.
        way: of embedding and searching in which it was best.
        whole_seconds: from the start of its process to the tuned model on disk.
    """

    result: Result
    score: float
    way: str
    whole_seconds: float


@dataclass
class Standing:
    """A contestant with all its trainings, a seed each."""

    title: str
    is_ours: bool
    is_reference: bool
    measured: list[Measured] = field(default_factory=list)

    @property
    def items_per_second(self) -> float:
        """Training items through the model in a second of an epoch, median of the seeds."""
        return statistics.median(
            m.result.num_items / sum(m.result.epoch_seconds) for m in self.measured
        )

    @property
    def train_seconds(self) -> float:
        """From the first batch to the final weights, median of the seeds."""
        return statistics.median(m.result.train_seconds for m in self.measured)

    @property
    def whole_seconds(self) -> float:
        """From the start of the process to the tuned model on disk, median of the seeds."""
        return statistics.median(m.whole_seconds for m in self.measured)

    @property
    def score(self) -> float:
        """The metric, mean of the seeds."""
        return statistics.mean(m.score for m in self.measured)

    def seconds_to(self, score: float) -> float | None:
        """Seconds of training after which seed 0 has passed a score; None when it has not."""
        first = self.measured[0]
        points = [*first.result.curve, (first.result.train_seconds, first.score)]
        return next((seconds for seconds, value in points if value >= score), None)


def print_table(title: str, metric: str, standings: list[Standing]) -> None:
    """Print a line a contestant.

    Args:
        title: of the table.
        metric: its name.
        standings: in the order of the lines.
    """
    reference = next((standing for standing in standings if standing.is_reference), None)
    captions = ('items/s', 'training s', 'whole s', metric, 'finetuner there')
    widths = (12, 12, 12, 12, 16)
    heads = ''.join(
        f'{caption:>{width - 1}} ' for caption, width in zip(captions, widths, strict=True)
    )
    print(f'\n{title}; {_threads(standings)}')
    print(f'{"":<{_NAME_WIDTH}}{heads}  seeds')
    lines = [_cells(standing, reference) for standing in standings]
    for standing, cells in zip(standings, lines, strict=True):
        row = ''.join(f'{cell:>{width}}' for cell, width in zip(cells, widths, strict=True))
        each = ' '.join(f'{m.score:.3f}' for m in standing.measured)
        print(f'{standing.title:<{_NAME_WIDTH}}{row}  {each}', flush=True)
    if any(cell.endswith(_NOT_BEHIND) for cells in lines for cell in cells):
        print(f'{_NOT_BEHIND} not behind finetuner with its defaults')
    print('of the ways to embed and search that were tried, the best counts:')
    for standing in standings:
        ways = ' | '.join(dict.fromkeys(m.way for m in standing.measured))
        print(f'    {standing.title}: {ways}')


def _cells(standing: Standing, reference: Standing | None) -> list[str]:
    """The cells of a line, marked where a peer is not behind the reference."""
    own, others = _values(standing), _values(reference) if reference else None
    cells = []
    for value, other, shape, sign in zip(
        own, others or own, ('{:,.1f}', '{:,.1f}', '{:,.1f}', '{:.3f}'), (1, -1, -1, 1), strict=True
    ):
        not_behind = others is not None and not standing.is_ours and sign * (value - other) >= 0
        cells.append(shape.format(value) + (_NOT_BEHIND if not_behind else ' '))
    return [*cells, _there(reference, standing)]


def _values(standing: Standing) -> list[float]:
    return [
        standing.items_per_second,
        standing.train_seconds,
        standing.whole_seconds,
        standing.score,
    ]


def _there(reference: Standing | None, peer: Standing) -> str:
    """When the reference passes a peer's metric, marked where that is no sooner than the peer."""
    if reference is None or peer.is_ours:
        return ' '
    seconds = reference.seconds_to(peer.score)
    if seconds is None:
        return 'never' + _NOT_BEHIND
    return f'{seconds:.1f}' + (_NOT_BEHIND if seconds >= peer.train_seconds else ' ')


def _threads(standings: list[Standing]) -> str:
    found = sorted({m.result.threads for s in standings for m in s.measured})
    return f'torch with {" and ".join(map(str, found))} threads'
