"""Our training against that of others: speed, time, and what comes of it, in one table.

Same backbone and weights, same data, same epochs, same machine. Every contestant is a script in
`benchmarks/peers/`, run in a process of its own; all take turns seed by seed, one at a time. What a
contestant does is what its documentation shows; `benchmarks/README.md` says where it had to be told
more. All metrics are computed here, by one function, from the embeddings of the test data.

    make bench-peers
    .venv/bin/python benchmarks/peers.py    # --seeds 3 --only pictures|texts --contestants ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from docarray import DocumentArray
from peer_table import Measured, Standing, print_table

from finetuner.evaluation import evaluate_embeddings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / 'examples'), str(HERE / 'peers')]
from contestant import Result, Task  # noqa: E402
from emoji_data import (  # noqa: E402
    load_emoji,
    load_emoji_queries_and_index,
    load_emoji_text_queries_and_index,
    load_emoji_texts,
)
from ours import TUNED  # noqa: E402

PEERS_PYTHON = ROOT / '.venv-peers' / 'bin' / 'python'
LOAD = {
    'pictures': (load_emoji, load_emoji_queries_and_index),
    'texts': (load_emoji_texts, load_emoji_text_queries_and_index),
}
# of each kind: the metric, how many neighbours it sees, and what the table calls it
METRICS = {'pictures': ('recall_at_k', 3, 'recall@3'), 'texts': ('reciprocal_rank', 250, 'MRR')}
TITLES = {
    'pictures': 'pictures, EfficientNet-Lite0 (ImageNet)',
    'texts': 'texts, all-MiniLM-L6-v2',
}
_NUM_LINES_OF_FAILURE = 20


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        title: in the table.
        kind: `pictures` or `texts`.
        script: in `benchmarks/peers/`.
        options: given to the script.
        epochs: its own, where its documentation has others.
    """

    title: str
    kind: str
    script: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is finetuner."""
        return self.script == 'ours.py'

    @property
    def is_reference(self) -> bool:
        """Whether the others are held against it."""
        return self.is_ours and not self.options

    @property
    def distances(self) -> tuple[str, ...]:
        """Ours is made for the cosine; a peer may be searched with what suits it better."""
        return ('cosine',) if self.is_ours else ('cosine', 'euclidean')


CONTESTANTS = {
    'defaults': Contestant('finetuner, defaults', 'pictures', 'ours.py'),
    'tuned': Contestant('finetuner, tuned', 'pictures', 'ours.py', TUNED),
    'loop': Contestant(
        'a loop by hand, MultiSimilarity, one cycle',
        'pictures',
        'plain_loop.py',
        {'learning_rate': 1e-3},
    ),
    'pml': Contestant(
        "pytorch-metric-learning's trainer",
        'pictures',
        'pml_trainer.py',
        {'learning_rate': 1e-4, 'augmentation': 'none'},
    ),
    'oml': Contestant(
        'open-metric-learning with Lightning',
        'pictures',
        'oml_lightning.py',
        {'learning_rate': 1e-4},
    ),
    'defaults-texts': Contestant('finetuner, defaults', 'texts', 'ours.py'),
    'st': Contestant(
        "sentence-transformers' trainer, lr 1e-4",
        'texts',
        'st_trainer.py',
        {'learning_rate': 1e-4},
    ),
    'st-defaults': Contestant(
        "sentence-transformers' trainer, 3 epochs, 2e-5",
        'texts',
        'st_trainer.py',
        {'learning_rate': 2e-5},
        epochs=3,
    ),
}


def build_task(kind: str, epochs: int, num_concepts: int | None) -> Task:
    """The task of a kind, of so many concepts or all; its seed is 0."""

    def items(docs: DocumentArray) -> list[tuple[str, int]]:
        labelled = [(doc.uri or doc.text, int(doc.tags['finetuner_label'])) for doc in docs]
        return [item for item in labelled if num_concepts is None or item[1] < num_concepts]

    load_train, load_test = LOAD[kind]
    query, index = (items(docs) for docs in load_test())
    return Task(
        kind=kind,
        train=items(load_train()),
        query=query,
        index=index,
        epochs=epochs,
        batch_size=128,
        items_per_class=4 if kind == 'pictures' else 2,
        train_size=128,
        embed_sizes=[128, 224],
        num_workers=min(4, os.cpu_count() or 1),
        seed=0,
    )


def run_contestant(contestant: Contestant, task: Task, folder: Path) -> Measured:
    """Let one contestant do the task in a process of its own; or read what it did of it before."""
    measured = folder / 'measured.json'
    if measured.is_file() and task.is_in(folder):
        return Measured(Result.read(folder), **json.loads(measured.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    task.write(folder)
    python = sys.executable if contestant.is_ours else str(PEERS_PYTHON)
    # everybody has torch's own number of threads, and nobody asks a hub
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
        and (contestant.is_ours or name != 'PYTHONPATH')
    }
    environment |= {'HF_HUB_OFFLINE': '1', 'PYTHONUNBUFFERED': '1'}
    output = folder / 'output.txt'
    started = time.time()
    with output.open('w') as file:
        done = subprocess.run(
            [python, str(HERE / 'peers' / contestant.script), str(folder)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            check=False,
        )
    if done.returncode or not (folder / 'result.json').is_file():
        last = output.read_text(errors='replace').splitlines()[-_NUM_LINES_OF_FAILURE:]
        sys.exit('\n'.join([f'{contestant.title} failed; its last output:', *last]))
    result = Result.read(folder)
    score, way = best_score(contestant, task, folder)
    found = {
        'score': score,
        'way': way,
        'whole_seconds': result.saved_at - started - result.paused_seconds,
    }
    measured.write_text(json.dumps(found))
    return Measured(result, **found)


def best_score(contestant: Contestant, task: Task, folder: Path) -> tuple[float, str]:
    """The best metric among the ways of embedding and searching, and which way that was."""
    metric, limit, _ = METRICS[task.kind]
    labels = [[label for _, label in items] for items in (task.query, task.index)]
    found = []
    for file in sorted(folder.glob('embeddings-*.npz')):
        with np.load(file) as arrays:
            query, index = arrays['query'], arrays['index']
        for distance in contestant.distances:
            metrics = evaluate_embeddings(
                query, labels[0], index, labels[1], limit=limit, distance=distance
            )
            way = file.stem.removeprefix('embeddings-')
            found.append((metrics[metric], f'{way}, {distance}'))
    return max(found, key=lambda pair: pair[0])


def measure(
    names: list[str], tasks: dict[str, Task], num_seeds: int, results: Path
) -> dict[str, Standing]:
    """Let all contestants do their tasks, seed by seed.

    Args:
        names: of the contestants.
        tasks: by kind.
        num_seeds: how often each trains.
        results: a folder; what lies there is not measured again.
    """
    standings = {
        name: Standing(
            CONTESTANTS[name].title, CONTESTANTS[name].is_ours, CONTESTANTS[name].is_reference
        )
        for name in names
    }
    for seed in range(num_seeds):
        for name in names:
            contestant = CONTESTANTS[name]
            task = tasks[contestant.kind]
            task = replace(
                task,
                seed=seed,
                epochs=min(task.epochs, contestant.epochs or task.epochs),
                # evaluation takes longer than training: once tells when a metric is passed
                curve=contestant.is_reference and seed == 0,
                options=contestant.options,
            )
            began = time.monotonic()
            found = run_contestant(contestant, task, results / f'{name}-{seed}')
            standings[name].measured.append(found)
            print(
                f'seed {seed}: {contestant.kind}, {contestant.title}: '
                f'{METRICS[contestant.kind][2]} {found.score:.3f} ({found.way}), '
                f'{found.result.train_seconds:.0f} s of training, '
                f'{time.monotonic() - began:.0f} s with evaluation',
                flush=True,
            )
    return standings


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--only', choices=LOAD)
    parser.add_argument('--contestants', nargs='+', choices=CONTESTANTS, metavar='NAME')
    parser.add_argument(
        '--results', type=Path, help='folder to keep results in; what is there is not run again'
    )
    # for a quick look at whether everything works; the table is then worth nothing
    parser.add_argument('--epochs', type=int, default=5, help=argparse.SUPPRESS)
    parser.add_argument('--concepts', type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def results_folder(asked: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is gone afterwards."""
    if asked is not None:
        yield asked.resolve()
        return
    with tempfile.TemporaryDirectory(prefix='peers-') as folder:
        yield Path(folder)


def main() -> None:
    """Measure all and print the tables."""
    arguments = parse_arguments()
    names = [
        name
        for name in arguments.contestants or CONTESTANTS
        if arguments.only in (None, CONTESTANTS[name].kind)
    ]
    if not PEERS_PYTHON.exists() and not all(CONTESTANTS[name].is_ours for name in names):
        sys.exit(f'{PEERS_PYTHON} is missing: `make bench-peers` installs what the peers need')
    kinds = list(dict.fromkeys(CONTESTANTS[name].kind for name in names))
    tasks = {kind: build_task(kind, arguments.epochs, arguments.concepts) for kind in kinds}
    with results_folder(arguments.results) as results:
        standings = measure(names, tasks, arguments.seeds, results)
    for kind in kinds:
        task = tasks[kind]
        given = f'{TITLES[kind]}: {len(task.train):,} for training'
        sizes = f' at {task.train_size} px' if kind == 'pictures' else ''
        title = f'{given}{sizes}, {task.epochs} epochs'
        of_kind = [standings[name] for name in names if CONTESTANTS[name].kind == kind]
        print_table(title, METRICS[kind][2], of_kind)


if __name__ == '__main__':
    main()
