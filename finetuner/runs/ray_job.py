"""The process of a run's job on a Ray cluster: `python -m finetuner.runs.ray_job <run directory>`.

It asks the cluster for a place for each process of the run, has them started there, and sees to it
that the run goes on elsewhere, from its last checkpoint, when a node is lost.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.config import RunConfig
from finetuner.excepts import FinetunerError
from finetuner.ray_cluster import AUTO, driver
from finetuner.runs.dispatcher import MAX_RETRIES
from finetuner.runs.ray_launching import Launch
from finetuner.runs.ray_node import RankEnd, RankHost, node_address
from finetuner.runs.records import RunRecord
from finetuner.runs.states import FINISHED, WAITING
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database

logger = logging.getLogger('finetuner.runs.ray_job')

# a lost node takes with it what was written in its last moments
_SETTLE_SECONDS = 10.0
_STOP_SECONDS = 2.0
_REPORT_SECONDS = 30.0
# so long a worker has to say itself that another process of the run has gone
_LOOK_SECONDS = 1.0


class StoppedError(BaseException):
    """Ray stops the job. No Exception, so that nothing takes it for a failure of its own."""


@dataclass(frozen=True)
class _Shape:
    """How a run's processes stand on nodes.

    Attributes:
        num_processes: in all.
        num_nodes: that they are spread over.
    """

    num_processes: int
    num_nodes: int

    @property
    def per_node(self) -> int:
        return self.num_processes // self.num_nodes


class Job:
    """One run on the cluster.

    Args:
        ray: the module, connected.
        launch: what the job was told.
        runs: the run store.
        run: as the store had it.
    """

    def __init__(self, ray: Any, launch: Launch, runs: RunStore, run: RunRecord) -> None:
        self._ray = ray
        self._launch = launch
        self._runs = runs
        config = RunConfig.from_parameters(run.config)
        self._shape = _Shape(config.num_processes, config.num_nodes)
        self._max_retries = run.max_retries or MAX_RETRIES

    def do(self) -> bool:
        """Do the run, again where nodes are lost; whether it ended as it should."""
        attempt = 0
        while True:
            end = self._attempt(attempt)
            run = self._runs.read_run(self._launch.run_id)
            if end.spoke or not run.is_going or run.queue == WAITING:
                return run.status == FINISHED
            if run.worker != self._launch.mark(attempt):
                print('another worker has the run by now')
                return False
            if attempt >= self._max_retries or not end.is_lost:
                before = f'; so did {attempt} before it' if attempt else ''
                self._runs.mark_failed(run.id, f'{end.failure}{before}', seen=run)
                return False
            attempt += 1
            count = f'retry {attempt} of {self._max_retries}'
            message = f'{end.failure}; the run goes on from its last checkpoint, {count}'
            if not self._runs.hand_on(run, self._launch.mark(attempt), message):
                return False

    def _attempt(self, attempt: int) -> RankEnd:
        """Have the run's processes do it once; how that ended."""
        group = self._reserve()
        hosts: list[Any] = []
        pending: list[Any] = []
        try:
            for host, ranks in self._hosts(group):
                hosts.append(host)
                pending.append(host.run.remote(str(self._launch.directory), attempt, ranks))
            return self._watch(pending)
        except self._ray.exceptions.RayError as error:
            return _node_lost(error)
        finally:
            self._stop(hosts, pending)
            self._ray.util.remove_placement_group(group)

    def _reserve(self) -> Any:
        """Wait for places on nodes, saying in the job's log what is waited for."""
        shape, ray = self._shape, self._launch.ray
        bundle = {'CPU': ray.num_cpus * shape.per_node}
        if ray.num_gpus:
            bundle['GPU'] = ray.num_gpus * shape.per_node
        if self._launch.limits.memory_mb:
            bundle['memory'] = self._launch.limits.memory_mb * 1_000_000 * shape.per_node
        strategy = 'STRICT_SPREAD' if shape.num_nodes > 1 else 'PACK'
        group = self._ray.util.placement_group([bundle] * shape.num_nodes, strategy=strategy)
        began, told = time.monotonic(), 0.0
        while not group.wait(timeout_seconds=1):
            waited = time.monotonic() - began
            if waited - told >= _REPORT_SECONDS:
                told = waited
                wanted = ', '.join(f'{amount:g} {name}' for name, amount in bundle.items())
                print(f'the run waits for {shape.num_nodes} x ({wanted}), {waited:.0f} s so far')
        return group

    def _hosts(self, group: Any) -> Iterator[tuple[Any, dict[str, str]]]:
        """An actor for each process, in its place, and what the process is among the others."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        shape, ray = self._shape, self._launch.ray

        def on_node(what: Any, node: int, **options: Any) -> Any:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
            return self._ray.remote(scheduling_strategy=place, **options)(what)

        # what is lost is lost for all processes together: they are started anew by this job
        asked = on_node(node_address, 0, num_cpus=0, max_retries=0).remote()
        address, port = self._ray.get(asked)
        for rank in range(shape.num_processes):
            node, local = divmod(rank, shape.per_node)
            ranks = {
                'RANK': rank,
                'WORLD_SIZE': shape.num_processes,
                # each sees its own GPUs alone
                'LOCAL_RANK': 0 if ray.num_gpus else local,
                'LOCAL_WORLD_SIZE': shape.per_node,
                'MASTER_ADDR': address,
                'MASTER_PORT': port,
            }
            environment = {name: str(value) for name, value in ranks.items()}
            # it hears that it is to end while it waits for the end
            host = on_node(
                RankHost, node, num_cpus=ray.num_cpus, num_gpus=ray.num_gpus, max_concurrency=2
            )
            yield host.remote(), {} if shape.num_processes == 1 else environment

    def _watch(self, pending: list[Any]) -> RankEnd:
        """Wait for the processes: the first one says all of it, or one of them has been lost."""
        first, left = pending[0], list(pending)
        failure = RankEnd(False, 'the worker ended without a word', is_lost=True)
        deadline: float | None = None
        while left and (deadline is None or time.monotonic() < deadline):
            done, left = self._ray.wait(left, num_returns=1, timeout=_LOOK_SECONDS)
            for each in done:
                end = self._end_of(each)
                if each == first and end.spoke:
                    return end
                if end.failure is None:
                    continue
                if deadline is None or (end.is_cause and not failure.is_cause):
                    failure = end
                deadline = deadline or time.monotonic() + _SETTLE_SECONDS
        return failure

    def _end_of(self, reference: Any) -> RankEnd:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return _node_lost(error)

    def _stop(self, hosts: list[Any], pending: list[Any]) -> None:
        """End what is still there: in peace first."""
        for host in hosts:
            host.end.remote()
        if pending:
            self._ray.wait(pending, num_returns=len(pending), timeout=_STOP_SECONDS)
        for host in hosts:
            self._ray.kill(host)


def _node_lost(error: Exception) -> RankEnd:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = ' '.join(said.split())[:300]
    return RankEnd(False, f'a node of the run was lost ({reason})', is_cause=True, is_lost=True)


def _stop(*_: object) -> None:
    raise StoppedError


def main() -> int:
    """Do the run whose directory is the only argument."""
    if len(sys.argv) != 2:
        print('usage: python -m finetuner.runs.ray_job <run directory>', file=sys.stderr)
        return 2
    try:
        launch = Launch.read(Path(sys.argv[1]))
        database = open_database(launch.database_url)
        runs = RunStore(database)
        run = runs.read_run(launch.run_id)
        with driver(AUTO) as ray:
            signal.signal(signal.SIGTERM, _stop)
            return 0 if Job(ray, launch, runs, run).do() else 1
    except FinetunerError as error:
        print(f'finetuner: {error}', file=sys.stderr)
        return 2
    except StoppedError:
        # its processes have written down how they ended
        return 143


if __name__ == '__main__':
    sys.exit(main())
