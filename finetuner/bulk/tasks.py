"""Tasks computed by this process, processes of this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from itertools import islice
from typing import Any

from finetuner import excepts
from finetuner.cores import share_of_cores
from finetuner.excepts import ConfigError, FinetunerError, ServerError
from finetuner.process_pool import ProcessPool

# processes that may die of a task before it is given up
_MOST_DEATHS = 3
_MANY_WORKERS = 4096


def check_workers(num_workers: int, ray_address: str | None) -> None:
    """Check by whom tasks shall be computed.

    Raises:
        ConfigError: the number is out of range, or this is no address of a cluster.
    """
    is_whole = isinstance(num_workers, int) and not isinstance(num_workers, bool)
    if not is_whole or not 1 <= num_workers <= _MANY_WORKERS:
        raise ConfigError(
            f'num_workers={num_workers!r} is not a whole number from 1 to {_MANY_WORKERS}'
        )
    if ray_address is not None:
        from finetuner.ray_cluster import check_driver_address

        check_driver_address(ray_address)


def run_tasks(
    compute: Callable[[Any], Any], tasks: Iterable[Any], num_workers: int, ray_address: str | None
) -> Generator[Any, None, None]:
    """Compute tasks; close it (`contextlib.closing`), for what was started to be gone.

    Args:
        compute: computes one; pickled where it is computed elsewhere.
        tasks: each is asked for when somebody is free to compute it.
        num_workers: how many at a time; 1, without Ray, is this process.
        ray_address: of a Ray cluster; None for this machine.

    Yields:
        Results, in the order in which they are done.

    Raises:
        FinetunerError: what `compute` raised, if it was one.
        ServerError: no Ray cluster answers, or it failed; or processes died of a task.
        RuntimeError: `compute` failed in a way that nobody foresaw.
    """
    if ray_address is not None:
        yield from _on_ray(compute, tasks, num_workers, ray_address)
    elif num_workers == 1:
        yield from map(compute, tasks)
    else:
        yield from _in_processes(compute, tasks, num_workers)


class _Told:
    """Computes in another process, and says what was wrong on purpose instead of raising it."""

    def __init__(self, compute: Callable[[Any], Any], num_threads: int) -> None:
        self._compute = compute
        self._num_threads = num_threads

    def __call__(self, task: Any) -> tuple[Any, str, str]:
        import torch

        torch.set_num_threads(self._num_threads)
        try:
            return self._compute(task), '', ''
        except FinetunerError as error:
            return None, type(error).__name__, str(error)


def _told_of(told: _Told, task: Any) -> tuple[Any, str, str]:
    # what Ray runs is a function
    return told(task)


def _result(told: tuple[Any, str, str]) -> Any:
    result, kind, message = told
    if kind:
        raise getattr(excepts, kind, FinetunerError)(message)
    return result


def _in_processes(
    compute: Callable[[Any], Any], tasks: Iterable[Any], num_workers: int
) -> Generator[Any, None, None]:
    pool = ProcessPool(
        _Told(compute, share_of_cores(num_workers)),
        num_workers,
        name='search',
        tasks_each=1,
        most_deaths=_MOST_DEATHS,
        # forks of a process whose libraries have threads would wait for these for ever
        fresh=True,
    )
    with closing(pool.run(iter(tasks))) as finished:
        for done in finished:
            if done.error:
                raise RuntimeError(f'a process that searches failed:\n{done.error}')
            if done.death:
                raise ServerError(
                    f'{_MOST_DEATHS} processes died of one task ({done.death}), perhaps for memory: '
                    'take fewer of them (num_workers)'
                )
            yield _result(done.result)


def _on_ray(
    compute: Callable[[Any], Any], tasks: Iterable[Any], num_workers: int, address: str
) -> Generator[Any, None, None]:
    from finetuner.ray_cluster import driver

    with driver(address, show_logs=False) as ray:
        # What is under way when this ends early ends with the driver, or by itself: to cancel a task that
        # comes to its end at that moment aborts the process (Ray 2.55, `CompletePendingTask`).
        # A task whose node dies is given to another by Ray itself
        told = _Told(compute, 1)
        remote = ray.remote(_told_of).options(
            num_cpus=1, max_retries=_MOST_DEATHS, scheduling_strategy='SPREAD'
        )
        left = iter(tasks)
        waiting = [remote.remote(told, task) for task in islice(left, num_workers)]
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting, num_returns=1)
                result = _result(ray.get(done))
                waiting += [remote.remote(told, task) for task in islice(left, 1)]
                yield result
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f'a task of Ray failed:\n{error}') from error
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ServerError(
                f'the Ray cluster failed: {lines[-1]}; give the same call again'
            ) from error
