"""What `fit` makes of data and nothing else, against the defaults that Finetuner 0.8.1 had.

Pictures: EfficientNet-Lite0 on the emoji pictures, a picture by one artist looked for among those of
three others, for concepts that training has not seen (recall@3). Texts: all-MiniLM-L6-v2, a
concept's keywords looked for by its name (mean reciprocal rank). Every run is a real one, in a
process of its own; seconds are those of the whole run, from the first line of its log to the last,
artifact and ONNX graph included, evaluation not.

    python benchmarks/recipes.py            # --seeds 3 --only pictures|texts
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from docarray import DocumentArray

import finetuner
from finetuner.evaluation import evaluate_embeddings

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))
from emoji_data import (
    load_emoji,
    load_emoji_queries_and_index,
    load_emoji_text_queries_and_index,
    load_emoji_texts,
)

PUBLISHED = {
    'loss': 'TripletMarginLoss',
    'learning_rate': 1e-4,
    'scheduler': 'constant',
    'whiten': False,
}
Load = tuple[str, Callable[[], DocumentArray], Callable[[], Any], str, int]
TASKS: dict[str, Load] = {
    'pictures': (
        'efficientnet-lite0',
        load_emoji,
        load_emoji_queries_and_index,
        'recall_at_k',
        3,
    ),
    'texts': (
        'all-MiniLM-L6-v2',
        load_emoji_texts,
        load_emoji_text_queries_and_index,
        'reciprocal_rank',
        250,
    ),
}


def measure(engine: Any, task: str) -> float:
    """The task's metric with this model."""
    _, _, load_test, metric, limit = TASKS[task]
    queries, index = load_test()
    for docs in (queries, index):
        finetuner.encode(engine, docs)
    labels = [[doc.tags['concept'] for doc in docs] for docs in (queries, index)]
    metrics = evaluate_embeddings(
        queries.embeddings, labels[0], index.embeddings, labels[1], limit=limit
    )
    return metrics[metric]


def train(task: str, seed: int, options: dict[str, Any]) -> tuple[float, float]:
    """Run once: seconds, and the task's metric."""
    model, load_train, *_ = TASKS[task]
    run = finetuner.fit(model, load_train(), seed=seed, **options)
    lines = list(run.stream_logs())
    if run.status()['status'] != 'FINISHED':
        sys.exit('\n'.join(lines[-10:]))
    times = [datetime.fromisoformat(line[:19]) for line in (lines[0], lines[-1])]
    return (times[1] - times[0]).total_seconds(), measure(
        finetuner.get_model(run.artifact_id), task
    )


def main() -> None:
    """Print a line for each way of asking."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--only', choices=TASKS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ['FINETUNER_HOME'] = home
        for task in [arguments.only] if arguments.only else TASKS:
            model, _, _, metric, limit = TASKS[task]
            name = f'{metric}, limit {limit}' if limit < 250 else metric
            print(f'\n{task}, {model:<36} {"seconds":>8} {name:>24}   of each seed')
            print(
                f'{"as it comes":<46} {"":>8} {measure(finetuner.build_model(model), task):>24.3f}'
            )
            asked = {
                'nothing asked for': {},
                'the same, whiten=False': {'whiten': False},
                "Finetuner 0.8.1's defaults": PUBLISHED,
            }
            for title, options in asked.items():
                seeds = range(arguments.seeds if not options else 1)
                done = [train(task, seed, options) for seed in seeds]
                seconds, values = zip(*done, strict=True)
                each = ' '.join(f'{value:.3f}' for value in values)
                print(
                    f'{title:<46} {statistics.median(seconds):>8.0f} '
                    f'{statistics.mean(values):>24.3f}   {each}',
                    flush=True,
                )


if __name__ == '__main__':
    main()
