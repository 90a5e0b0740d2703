"""Who does the shards: this process, processes of this machine, or a Ray cluster."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

from finetuner.bulk.options import BulkOptions
from finetuner.bulk.plan import PlannedShard
from finetuner.bulk.shard_encoding import ShardEncoder, ShardResult
from finetuner.cores import share_of_cores
from finetuner.excepts import ServerError
from finetuner.process_pool import ProcessPool

logger = logging.getLogger('finetuner.bulk')

# processes that may die of a shard before it is given up
_MOST_DEATHS = 3
# of those that the cluster has, for a worker: with all of them Ray has none for anything else, and waits
_MOST_OF_CPUS = 0.5


def run_shards(
    shards: Sequence[PlannedShard], options: BulkOptions, job: dict[str, Any]
) -> Generator[ShardResult, None, None]:
    """Encode shards; close it (`contextlib.closing`), for what was started to be gone.

    Args:
        shards: what is to be done; at least one.
        options: by whom, and how.
        job: what the options come to.

    Yields:
        What came of each, in the order in which they are done.

    Raises:
        ConfigError: Ray is not installed.
        ServerError: no Ray cluster answers.
        RuntimeError: a process failed in a way that nobody foresaw.
    """
    if options.ray_address is not None:
        return _on_ray(shards, options, job)
    if options.num_workers == 1:
        return _here(shards, options, job)
    return _in_processes(shards, options, job)


def _here(
    shards: Sequence[PlannedShard], options: BulkOptions, job: dict[str, Any]
) -> Generator[ShardResult, None, None]:
    encode = ShardEncoder(options, job, options.num_threads)
    for shard in shards:
        yield encode(shard)


def _in_processes(
    shards: Sequence[PlannedShard], options: BulkOptions, job: dict[str, Any]
) -> Generator[ShardResult, None, None]:
    num_workers = min(options.num_workers, len(shards))
    threads = options.num_threads or share_of_cores(options.num_workers)
    # new interpreters: forks of one that has an engine would wait for its threads for ever
    pool = ProcessPool(
        ShardEncoder(options, job, threads),
        num_workers,
        name='encode',
        tasks_each=1,
        most_deaths=_MOST_DEATHS,
        fresh=True,
    )
    with closing(pool.run(iter(shards))) as finished:
        for done in finished:
            if done.error:
                raise RuntimeError(f'a process that encodes failed:\n{done.error}')
            if done.death:
                yield _given_up(done.task, f'its process {done.death}')
            else:
                yield done.result


def _given_up(shard: PlannedShard, how: str) -> ShardResult:
    reason = f'{_MOST_DEATHS} processes died of it ({how}), perhaps for memory'
    return ShardResult(shard.shard, missing=reason)


def _on_ray(
    shards: Sequence[PlannedShard], options: BulkOptions, job: dict[str, Any]
) -> Generator[ShardResult, None, None]:
    from finetuner.ray_cluster import driver

    threads = options.num_threads or 1
    encoder = ShardEncoder(options, job, threads, elsewhere=True)
    left = {shard.shard: shard for shard in shards}
    # what actors print is none of the command's output
    with driver(str(options.ray_address), show_logs=False) as ray, _quiet_ray_data():
        # Ray itself tries again without end, or not often enough while it looks for a dead node's actors
        for _ in range(_MOST_DEATHS):
            for result in _ray_results(ray, list(left.values()), encoder, options, threads):
                del left[result.shard]
                yield result
            if not left:
                return
            logger.warning('%d shards are done again: the actors that had them are gone', len(left))
    for shard in left.values():
        yield _given_up(shard, 'actors of Ray')


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data from telling each step, and of what is said or mended here."""
    import ray.data  # noqa: F401 - it sets its own level when it comes in

    levels = {
        'ray.data': logging.WARNING,
        # tracebacks of actors that are gone
        'ray.data._internal.execution.streaming_executor_state': logging.CRITICAL,
        # how large the object store is, which has nothing to hold
        'ray.data._internal.execution.resource_manager': logging.ERROR,
        'ray.data._internal.progress': logging.ERROR,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _ray_results(
    ray: Any,
    shards: Sequence[PlannedShard],
    encoder: ShardEncoder,
    options: BulkOptions,
    threads: int,
) -> Iterator[ShardResult]:
    import ray.data as ray_data

    num_workers = min(options.num_workers, len(shards))
    cpus = ray.cluster_resources().get('CPU', 0)
    dataset = ray_data.from_items(
        [asdict(shard) for shard in shards], override_num_blocks=len(shards)
    ).map_batches(
        RayShardEncoder,
        fn_constructor_args=(encoder,),
        batch_size=1,
        batch_format='pandas',
        compute=ray_data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_cpus=min(threads, _MOST_OF_CPUS * cpus / num_workers),
        num_gpus=1 if options.device == 'cuda' else None,
        scheduling_strategy='SPREAD',
        max_restarts=-1,
        max_task_retries=0,
    )
    # a row says what came of a shard; a block that fails is one whose actor is gone
    dataset.context.max_errored_blocks = -1
    dataset.context.enable_progress_bars = False
    try:
        for row in dataset.iter_rows():
            yield _result_of(row)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ServerError(
            f'the Ray cluster failed: {lines[-1]}; give the same call again'
        ) from error


def _result_of(row: Mapping[str, Any]) -> ShardResult:
    if row['trace']:
        raise RuntimeError(f'an actor that encodes failed:\n{row["trace"]}')
    return ShardResult(
        int(row['shard']),
        int(row['num_rows']),
        int(row['num_failed']),
        made_by=str(row['made_by']),
        missing=str(row['missing']),
        fatal=(str(row['kind']), str(row['message'])) if row['kind'] else (),
    )


class RayShardEncoder:
    """Encodes shards in an actor of Ray: of a row that plans a shard it makes one that says what came."""

    def __init__(self, encoder: ShardEncoder) -> None:
        """Take what encodes."""
        self._encode = encoder

    def __call__(self, batch: Any) -> Any:
        """Encode the shards of a batch, a data frame of `PlannedShard`'s fields."""
        import pandas

        found = []
        for planned in batch.to_dict('records'):
            shard, trace = PlannedShard(**planned), ''
            try:
                result = self._encode(shard)
            except Exception:  # noqa: BLE001 - the driver tells it
                result, trace = ShardResult(shard.shard), traceback.format_exc()
            kind, message = result.fatal or ('', '')
            row = {**asdict(result), 'kind': kind, 'message': message, 'trace': trace}
            del row['fatal']
            found.append(row)
        return pandas.DataFrame(found)
