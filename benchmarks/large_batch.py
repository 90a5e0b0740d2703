"""What micro-batches do to memory: peaks of training steps on texts, each in a fresh process.

The same texts of the same length go through all-MiniLM-L6-v2 with NTXentLoss and Adam, a step or two
of the path of a run. Memory is the largest resident set of the process; only ratios travel between
machines.

    python benchmarks/large_batch.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import dataclass

import torch
from rounds import NAME_WIDTH, peak_resident_mb

from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import get_backbone
from finetuner.training.losses import build_loss
from finetuner.training.objectives import Objective
from finetuner.training.optimization import build_optimizer
from finetuner.training.step import StepOptions
from finetuner.training.trainer import Trainer

MODEL = 'all-MiniLM-L6-v2'
ITEMS_PER_CLASS = 2
LOWEST_WORD, HIGHEST_WORD = 1_000, 30_000  # no special tokens among these


@dataclass(frozen=True)
class Work:
    """Steps of one kind."""

    batch_size: int
    micro_batch_size: int | None
    num_tokens: int
    num_steps: int

    @property
    def name(self) -> str:
        """For the table."""
        if not self.batch_size:
            return 'model alone, before any step'
        parts = f', {self.micro_batch_size} at a time' if self.micro_batch_size else ''
        return f'batch of {self.batch_size:,}{parts}'


def measure(work: Work) -> tuple[float, float]:
    """Peak memory in MB, and texts a second after the first step."""
    generator = torch.Generator().manual_seed(0)
    model = build_embedding_model(get_backbone(MODEL))
    trainer = Trainer(
        model,
        Objective(build_loss('NTXentLoss', None, 384, 2)),
        [build_optimizer('Adam', model.parameters(), 1e-5)],
        step_options=StepOptions(micro_batch_size=work.micro_batch_size),
    )
    if not work.batch_size:
        return peak_resident_mb(), 0.0
    shape = (work.batch_size, work.num_tokens)
    inputs = {
        'input_ids': torch.randint(LOWEST_WORD, HIGHEST_WORD, shape, generator=generator),
        'attention_mask': torch.ones(shape, dtype=torch.int64),
    }
    batch = inputs, torch.arange(work.batch_size) // ITEMS_PER_CLASS
    trainer.fit([batch], 1)
    if not work.num_steps:
        return peak_resident_mb(), 0.0
    began = time.perf_counter()
    trainer.fit([batch] * work.num_steps, 1)
    return peak_resident_mb(), work.batch_size * work.num_steps / (time.perf_counter() - began)


def main() -> None:
    """Run each in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch-size', type=int, default=2_048)
    parser.add_argument('--micro-batch-size', type=int, default=64)
    parser.add_argument('--plain-batch-size', type=int, default=512)
    parser.add_argument('--tokens', type=int, default=16, help='of each text')
    parser.add_argument(
        '--steps', type=int, default=1, help='timed, after one for practice; 0: none'
    )
    given = parser.parse_args()
    small = Work(given.micro_batch_size, None, given.tokens, given.steps)
    works = [
        Work(0, None, given.tokens, 0),
        small,
        Work(given.plain_batch_size, None, given.tokens, given.steps),
        Work(given.batch_size, given.micro_batch_size, given.tokens, given.steps),
    ]
    print(f'{MODEL}, texts of {given.tokens} tokens, {torch.get_num_threads()} threads')
    print(f'\n{"":<{NAME_WIDTH}} {"MB":>7} {f"to {small.name}":>16} {"texts/s":>9}')
    peaks: dict[Work, float] = {}
    for work in works:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            peaks[work], speed = pool.apply(measure, (work,))
        ratio = f'{peaks[work] / peaks[small]:.2f}' if small in peaks else ''
        shown = f'{speed:,.1f}' if speed else ''
        print(f'{work.name:<{NAME_WIDTH}} {peaks[work]:>7,.0f} {ratio:>16} {shown:>9}', flush=True)


if __name__ == '__main__':
    main()
