"""One training in several processes, beside one process and beside DistributedDataParallel by hand.

    python benchmarks/parallel_training.py [--processes 2] [--rounds 3]

The same model, loss and batches of texts in each; the processes of a contestant share the cores of the
machine evenly and are started by torchrun, in turns with the others. Documents a second are those of
whole batches, after the first two steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from rounds import NAME_WIDTH

from finetuner.cores import num_cores
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import get_backbone
from finetuner.training.losses import build_loss
from finetuner.training.objectives import Objective
from finetuner.training.ranks import join_ranks
from finetuner.training.step import StepOptions, TrainingStep

MODEL = 'all-MiniLM-L6-v2'
BATCH_SIZE, NUM_TOKENS, NUM_STEPS, NUM_SKIPPED = 64, 32, 12, 2
LOWEST_WORD, HIGHEST_WORD = 1_000, 30_000  # no special tokens among these
ALONE, OURS, BY_HAND = 'one process', 'finetuner', 'DistributedDataParallel by hand'


def batches() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The same texts for everybody."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(BATCH_SIZE) // 2
    ids = [
        torch.randint(LOWEST_WORD, HIGHEST_WORD, (BATCH_SIZE, NUM_TOKENS), generator=generator)
        for _ in range(NUM_STEPS)
    ]
    return [({'input_ids': i, 'attention_mask': torch.ones_like(i)}, labels) for i in ids]


def gathered(own: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """All rows, those of this process with their graph, as one writes it oneself."""
    rows = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(rows, own.detach().contiguous())
    rows[rank] = own
    return torch.cat(rows)


def measure(contestant: str) -> float:
    """Documents a second of this process and the others."""
    ranks = join_ranks('cpu')
    torch.manual_seed(0)
    model: Any = build_embedding_model(get_backbone(MODEL)).train()
    objective = Objective(build_loss('NTXentLoss', None, 384, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if contestant == BY_HAND:
        model = torch.nn.parallel.DistributedDataParallel(model)
    step = TrainingStep(
        model, objective, [optimizer], torch.device('cpu'), StepOptions(), ranks=ranks
    )

    def by_hand(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        embeddings = gathered(model(inputs), ranks.rank, ranks.size)
        # DistributedDataParallel takes the mean of what is to be added up
        (ranks.size * objective(embeddings, labels)).backward()
        optimizer.step()

    began = 0.0
    for number, (inputs, labels) in enumerate(batches()):
        if number == NUM_SKIPPED:
            began = time.perf_counter()
        rows = ranks.part().of(list(range(BATCH_SIZE)))
        own = {name: value[rows] for name, value in inputs.items()}
        if contestant == BY_HAND:
            by_hand(own, labels)
        else:
            step(own, labels[rows])
    return (NUM_STEPS - NUM_SKIPPED) * BATCH_SIZE / (time.perf_counter() - began)


def speed_of(contestant: str, num_processes: int, folder: Path) -> float:
    """Start the processes of a contestant, and read what the first one measured."""
    count = 1 if contestant == ALONE else num_processes
    answer = folder / 'answer'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += ['--nproc-per-node', str(count), __file__, '--measure', contestant, str(answer)]
    threads = {'OMP_NUM_THREADS': str(max(1, num_cores() // count))}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return float(answer.read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        speed = measure(arguments.measure[0])
        if not dist.is_initialized() or dist.get_rank() == 0:
            Path(arguments.measure[1]).write_text(str(speed))
        PartialState().destroy_process_group()
        return
    names = (ALONE, OURS, BY_HAND)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name in names:
                speeds[name].append(speed_of(name, arguments.processes, Path(folder)))
    print(f'{MODEL}, batches of {BATCH_SIZE} texts of {NUM_TOKENS} tokens, NTXentLoss, AdamW')
    print(f'{"":<{NAME_WIDTH}} {"Documents/s":>12} {"to one":>8} {"to by hand":>11}')
    for name in names:
        shown = name if name == ALONE else f'{name}, {arguments.processes} processes'
        to = [
            statistics.median(a / b for a, b in zip(speeds[name], speeds[peer], strict=True))
            for peer in (ALONE, BY_HAND)
        ]
        print(
            f'{shown:<{NAME_WIDTH}} {statistics.median(speeds[name]):>12.1f} {to[0]:>8.2f} {to[1]:>11.2f}'
        )


if __name__ == '__main__':
    main()
