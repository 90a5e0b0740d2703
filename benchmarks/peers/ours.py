"""finetuner.fit: a real run in its worker process, timed by the log that the run store keeps.

Training lasts from the log's line "Training on" (the model is built after it) to "Writing the
artifact": the epochs, what lies between them, and the whitening where there is one. Evaluation after
each epoch, when asked for, is taken off: what an epoch's training took is its items over the items a
second of its line, and what is left before the line of the evaluation was the evaluation's.

    python benchmarks/peers/ours.py FOLDER
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from contestant import Result, Task, begin, write_embeddings
from docarray import Document, DocumentArray

import finetuner
from finetuner.callback import EvaluationCallback

# what `finetuner, tuned` passes to fit
TUNED = {'model_options': {'train_input_size': 160}}
MODELS = {'pictures': 'efficientnet-lite0', 'texts': 'all-MiniLM-L6-v2'}
# each task's metric and how many neighbours it sees
METRICS = {'pictures': ('recall_at_k', 3), 'texts': ('reciprocal_rank', 250)}

_EPOCH_DONE = re.compile(r'Epoch (\d+)/\d+ done .* ([\d.]+) Documents/s')
_EPOCH_EVALUATED = re.compile(r'Evaluation, epoch \d+: (.*)')


@dataclass
class Times:
    """What the log of a run says.

    Attributes:
        train_seconds: without evaluation.
        epoch_seconds: of each epoch's training.
        paused_seconds: of evaluation.
        curve: seconds of training and the metric after each epoch.
    """

    train_seconds: float = 0.0
    epoch_seconds: list[float] = field(default_factory=list)
    paused_seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)


def read_times(lines: Iterable[tuple[float, str]], items: list[int], metric: str) -> Times:
    """Take a run's log apart.

    Args:
        lines: (seconds, message) of each line, in order.
        items: that went through the model in each epoch.
        metric: the curve's.

    Raises:
        ValueError: the log lacks a line that is needed.
    """
    times = Times()
    began = ended = last = value = None
    for now, message in lines:
        if message.startswith('Training on '):
            began = last = now
        elif message.startswith('Writing the artifact'):
            ended = now
        elif began is None:
            continue
        elif match := _EPOCH_EVALUATED.match(message):
            value = float(re.search(rf'{metric} ([\d.]+)', match[1])[1])
            evaluated = now
        elif match := _EPOCH_DONE.match(message):
            seconds = items[int(match[1]) - 1] / float(match[2])
            times.epoch_seconds.append(seconds)
            if value is not None:
                times.paused_seconds += max(0.0, evaluated - last - seconds)
                times.curve.append((now - began - times.paused_seconds, value))
            last, value = now, None
        elif message.startswith('Evaluation, '):
            # before and after training
            times.paused_seconds += now - last
            last = now
        elif message.startswith('Whitening fitted'):
            last = now
    if began is None or ended is None or len(times.epoch_seconds) != len(items):
        raise ValueError('the log has not the lines that times are read from')
    times.train_seconds = ended - began - times.paused_seconds
    return times


def read_run(home: Path, batch_size: int, metric: str) -> tuple[Times, int]:
    """The times and items of the only run that a home holds.

    Args:
        home: of the run.
        batch_size: of the run.
        metric: the curve's.
    """
    with sqlite3.connect(home / 'finetuner.db') as database:
        rows = database.execute('SELECT time, message FROM log_lines ORDER BY id').fetchall()
        steps = database.execute(
            "SELECT count(*) FROM metrics WHERE name = 'loss' GROUP BY epoch ORDER BY epoch"
        ).fetchall()
    lines = [(datetime.fromisoformat(time).timestamp(), message) for time, message in rows]
    items = [count * batch_size for (count,) in steps]
    return read_times(lines, items, metric), sum(items)


def documents(task: Task, items: list[tuple[str, int]]) -> DocumentArray:
    """Labelled Documents of the task's items."""
    content = 'uri' if task.kind == 'pictures' else 'text'
    return DocumentArray(
        Document(**{content: value}, tags={'finetuner_label': label}) for value, label in items
    )


def main() -> None:
    """Fit, wait, embed."""
    folder, task = begin()
    os.environ['FINETUNER_HOME'] = str(folder / 'home')
    metric, limit = METRICS[task.kind]
    query, index = documents(task, task.query), documents(task, task.index)
    callbacks = [EvaluationCallback(query, index, limit=limit)] if task.curve else None
    run = finetuner.fit(
        MODELS[task.kind],
        documents(task, task.train),
        epochs=task.epochs,
        seed=task.seed,
        callbacks=callbacks,
        **task.options,
    )
    for line in run.stream_logs():
        print(line, flush=True)
    if run.status()['status'] != 'FINISHED':
        sys.exit(f'the run failed: {run.status()["details"]}')
    saved_at = time.time()
    times, num_items = read_run(folder / 'home', run.config['batch_size'], metric)
    engine = finetuner.get_model(run.artifact_id)
    for docs in (query, index):
        finetuner.encode(engine, docs)
    write_embeddings(folder, 'encode', query.embeddings, index.embeddings)
    import torch

    Result(
        train_seconds=times.train_seconds,
        epoch_seconds=times.epoch_seconds,
        num_items=num_items,
        saved_at=saved_at,
        threads=torch.get_num_threads(),
        versions={'finetuner': finetuner.__version__},
        paused_seconds=times.paused_seconds,
        curve=times.curve,
    ).write(folder)


if __name__ == '__main__':
    main()
