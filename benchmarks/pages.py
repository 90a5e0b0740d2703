"""How long the pages of a server take with 1,000 runs in its store, beside 10.

Two real servers, each asked in turns for every page; medians of the milliseconds until the whole
page is there, and the ratio of the two.

    python benchmarks/pages.py            # --runs 1000 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetuner.config import RunConfig, Settings
from finetuner.runs.processes import this_host, this_process
from finetuner.runs.records import LogLine, MetricValue, now
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database
from tests.integration.serving import REPOSITORY, serve

PAGES = {
    'runs, newest': '/ui/runs',
    'runs, last page': '/ui/runs?page={last}',
    'experiments': '/ui/experiments',
    'a run': '/ui/run?run=run+0',
    'runs, REST API': '/api/v1/runs?size=50',
    'curves of a run, REST API': '/api/v1/run/curves?run=run+0',
}
FEW = 10
NUM_STEPS = 500


def fill(home: Path, num_runs: int) -> None:
    """Write ended runs into a store, the first with a log and curves."""
    settings = Settings.from_environment(home)
    database = open_database(settings.database_url)
    store = RunStore(database)
    worker = this_process()
    for number in range(num_runs):
        name = 'default' if number % 10 == 0 else f'experiment {number % 10}'
        config = RunConfig(train_data='sha256:' + '0' * 64, experiment_name=name)
        run = store.create_run(config, f'run {number}', worker, this_host())
        store.mark_started(run.id, worker)
        if number == 0:
            lines = [LogLine(now(), 'INFO', f'step {step}') for step in range(NUM_STEPS)]
            values = [MetricValue(step, 0, 'loss', 1 / (step + 1)) for step in range(NUM_STEPS)]
            store.record(run.id, lines, values)
        store.mark_finished(run.id)
    database.close()


def main() -> None:
    """Print a line for each page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=1000)
    parser.add_argument('--rounds', type=int, default=15)
    arguments = parser.parse_args()
    flow = (REPOSITORY / 'flows' / 'train.yml').read_text()
    counts = (arguments.runs, FEW)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for folder, count in zip((first, second), counts, strict=True):
            fill(Path(folder) / 'home', count)
        with serve(flow, Path(first)) as many, serve(flow, Path(second)) as few:
            print(f'{"":<28} {f"{counts[0]} runs, ms":>16} {f"{FEW} runs, ms":>14} {"ratio":>7}')
            for name, path in PAGES.items():
                times: list[list[float]] = [[], []]
                for _ in range(arguments.rounds + 1):
                    for server, count, taken in zip((many, few), counts, times, strict=True):
                        address = server.url + path.format(last=-(-count // 50))
                        start = time.perf_counter()
                        httpx.get(address).raise_for_status()
                        taken.append(1000 * (time.perf_counter() - start))
                # the first round was for practice
                middle = [statistics.median(taken[1:]) for taken in times]
                print(
                    f'{name:<28} {middle[0]:>16.1f} {middle[1]:>14.1f} {middle[0] / middle[1]:>7.2f}'
                )


if __name__ == '__main__':
    main()
