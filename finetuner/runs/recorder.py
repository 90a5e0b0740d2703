"""What a worker sees and says, gathered and written to the run store a few times a second."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from finetuner.excepts import NotFoundError
from finetuner.runs.records import LogLine, MetricValue, ProcessMark
from finetuner.runs.store import RunStore
from finetuner.significance import Stage

FLUSH_SECONDS = 0.3
BEAT_SECONDS = 2.0
LOGGER = 'finetuner'


class RunRecorder:
    """Watches a run as the runner's observer and keeps its log, by a thread that writes.

    Log lines, metrics and progress wait in memory until the next write, so that training never
    waits for the database; what evaluation finds is written at once.

    Args:
        runs: the run store.
        run_id: the run.
        worker: the process that does the run; nothing is written once another one has it.
    """

    def __init__(self, runs: RunStore, run_id: int, worker: ProcessMark | None = None) -> None:
        self._runs = runs
        self._run_id = run_id
        self._worker = worker
        self._beat_at = 0.0
        self._lines: list[LogLine] = []
        self._metrics: list[MetricValue] = []
        self._progress: dict[str, Any] | None = None
        self._lock = threading.Lock()
        # lines are written in their order, whoever writes them
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._cancelled = False
        self._paused = False

    @contextmanager
    def recording(self) -> Iterator[RunRecorder]:
        """Write regularly, and all that is left when the block ends."""
        handler = _RecordingHandler(self)
        logger = logging.getLogger(LOGGER)
        level = logger.level
        logger.setLevel(logging.INFO if level == logging.NOTSET else min(level, logging.INFO))
        logger.addHandler(handler)
        thread = threading.Thread(target=self._write_regularly, name='run-recorder', daemon=True)
        thread.start()
        try:
            yield self
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            self._stop.set()
            thread.join()
            self.write()

    def add_line(self, line: LogLine) -> None:
        """Put a line into the log."""
        with self._lock:
            self._lines.append(line)

    # what the runner tells its observer

    def progress(self, values: dict[str, Any]) -> None:
        """Keep where the training is; only the latest is written."""
        with self._lock:
            self._progress = dict(values)

    def step_metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Keep named values of one step."""
        self._add_metrics(step, epoch, values)

    def epoch_metrics(self, epoch: int, values: dict[str, float]) -> None:
        """Keep named values of one epoch."""
        self._add_metrics(None, epoch, values)

    def evaluation(self, stage: Stage, metrics: dict[str, float]) -> None:
        """Keep retrieval metrics of a stage, or p-values."""
        self._runs.set_evaluation(self._run_id, stage, 'metrics', metrics)

    def examples(self, stage: Literal['before', 'after'], results: dict[str, Any]) -> None:
        """Keep example results of a stage."""
        self._runs.set_evaluation(self._run_id, stage, 'examples', results)

    def begins(self, step: int, epoch: int) -> None:
        """Forget what an earlier worker measured after the place where this one begins."""
        self._runs.forget_metrics(self._run_id, step, epoch)

    def write_all(self) -> None:
        """Write what has gathered; what the database does not take waits for the next time."""
        try:
            self.write()
        except SQLAlchemyError as error:
            _complain(error)

    def pause(self) -> None:
        """Have training end at the next checkpoint."""
        self._paused = True

    def is_paused(self) -> bool:
        """Whether training should end at the next checkpoint, to go on from there later."""
        return self._paused

    def cancelled(self) -> bool:
        """Whether someone asked for the run to end."""
        return self._cancelled

    def write(self) -> None:
        """Write what has gathered.

        Raises:
            SQLAlchemyError: the database does not take it; it is kept for the next time.
            NotFoundError: the run was deleted.
        """
        with self._writing:
            self._write()

    def _write(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
            metrics, self._metrics = self._metrics, []
            progress, self._progress = self._progress, None
        beats = time.monotonic() - self._beat_at >= BEAT_SECONDS
        try:
            cancel = self._runs.record(self._run_id, lines, metrics, progress, self._worker, beats)
        except SQLAlchemyError:
            with self._lock:
                self._lines = lines + self._lines
                self._metrics = metrics + self._metrics
                self._progress = self._progress or progress
            raise
        if beats:
            self._beat_at = time.monotonic()
        self._cancelled = self._cancelled or cancel

    def _add_metrics(self, step: int | None, epoch: int, values: dict[str, float]) -> None:
        found = [MetricValue(step, epoch, name, float(value)) for name, value in values.items()]
        with self._lock:
            self._metrics += found

    def _write_regularly(self) -> None:
        was_cancelled = False
        while not self._stop.wait(FLUSH_SECONDS):
            try:
                self.write()
            except SQLAlchemyError as error:
                _complain(error)
            except NotFoundError:
                self._cancelled = True
            if self._cancelled and not was_cancelled:
                # Asked for on another machine, which can send no signal here; or another worker
                # has the run, since this one was taken for dead.
                was_cancelled = True
                os.kill(os.getpid(), signal.SIGTERM)


def _complain(error: SQLAlchemyError) -> None:
    print(f'the run store does not take the log: {error}', file=sys.stderr, flush=True)


class _RecordingHandler(logging.Handler):
    def __init__(self, recorder: RunRecorder) -> None:
        super().__init__(logging.INFO)
        self._recorder = recorder
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if os.getpid() != self._pid:
            # A forked loader process has no thread that would write; its output is kept in a file.
            print(text, file=sys.stderr, flush=True)
            return
        time = datetime.fromtimestamp(record.created, timezone.utc)
        self._recorder.add_line(LogLine(time, record.levelname, text))
