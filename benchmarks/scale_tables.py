"""Tables of `scale_costs.py` and `scale_simulation.py`: lines of text, as docs/scale.md shows them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

from scale_events import simulate_encoding, simulate_queue
from scale_model import (
    DAY,
    Site,
    UnitCosts,
    cluster_of,
    coarser,
    demand_of,
    most_cores,
    shares_of,
    small_case,
    smallest_site,
    work_of,
)

SIZES = (10**6, 10**8, 10**9)
# a node fails once in this time
_MEAN_LIFE_SECONDS = 7 * DAY
_REPAIR_SECONDS = 300.0
_NUM_RUNS = 20_000
_RUN_SECONDS = 600.0
# of a recorder that has something to write each time
_WRITES_PER_SECOND = 1 / 0.3
_STAGES = ('read', 'decode', 'embed', 'write')


def unit_costs(costs: UnitCosts) -> Iterator[str]:
    """What was measured, a line each."""
    yield f'{f"on a machine of {costs.cores} cores":<40}'.rstrip()
    for what, value, unit in _unit_costs(costs):
        yield f'{what:<40} {value:>10} {unit}'


def _unit_costs(costs: UnitCosts) -> Iterator[tuple[str, str, str]]:
    for kind, unit in costs.kinds.items():
        stages = {name: getattr(unit, f'{name}_seconds') for name in _STAGES}
        for name, seconds in stages.items():
            yield f'{kind}: {name}', f'{seconds * 1e6:,.0f}', 'µs a document on a core'
        rate = 1 / sum(stages.values())
        yield f'{kind}: all of it', f'{rate:,.1f}', 'documents/s on a core that is alone'
        crowded = rate * unit.crowded_speed
        yield f'{kind}: all cores busy', f'{crowded:,.1f}', 'documents/s on each core'
        yield f'{kind}: a row of the input', f'{unit.bytes_in:,.0f}', 'bytes in Parquet'
        yield f'{kind}: pixels or token ids', f'{unit.bytes_held:,.0f}', 'bytes of memory'
        yield f'{kind}: a row of the output', f'{unit.bytes_out:,.0f}', 'bytes in Parquet'
        yield f'{kind}: a row of an exact index', f'{unit.bytes_indexed:,.0f}', 'bytes of memory'
        yield f'{kind}: an engine', f'{costs.load_seconds[kind]:.1f}', 's until it answers'
        yield f'{kind}: a worker', f'{costs.worker_seconds[kind]:.1f}', 's until it answers'
        cores = f'{costs.worker_core_seconds[kind]:.1f}'
        yield f'{kind}: the start of a worker', cores, 's of a core'
    yield 'a worker of pictures', f'{costs.worker_bytes / 1e6:,.0f}', 'MB of memory'
    yield (
        'a Ray cluster of this machine',
        f'{costs.ray_seconds:.1f}',
        's to start, to do nothing, to end',
    )
    yield 'an actor of Ray', f'{costs.actor_seconds:.1f}', 's to start, without its engine'
    yield 'a shard', f'{costs.shard_seconds * 1e3:.1f}', 'ms of its worker, beyond its rows'
    yield 'a shard', f'{costs.plan_seconds * 1e3:.2f}', 'ms of the driver: plan, look, list'
    for how, seconds in costs.dispatch_seconds.items():
        yield 'a shard', f'{seconds * 1e3:.2f}', f'ms of the driver: handed to {how}'
    yield 'a shard', f'{costs.shard_bytes:,.0f}', 'bytes of plan and manifests'
    yield 'the disk', f'{costs.disk_write / 1e6:,.0f}', 'MB/s written, with fsync'
    yield 'the disk', f'{costs.disk_read / 1e6:,.0f}', 'MB/s read'
    yield 'SHA-256', f'{costs.hash_bytes / 1e6:,.0f}', 'MB/s on a core'
    yield 'an exact query', f'{costs.search_seconds:.2f}', 's of a core over 1 GB of embeddings'
    yield 'a run that trains next to nothing', f'{costs.run_seconds:.1f}', 's'
    yield 'a run that trains next to nothing', f'{costs.run_core_seconds:.1f}', 's of a core'
    yield 'a write to the run store', f'{costs.store_seconds * 1e3:.1f}', 'ms, in SQLite'


def small_cases(costs: UnitCosts) -> Iterator[str]:
    """What was measured as a whole, simulated from the unit costs."""
    yield f'{"":<34} {"measured s":>10} {"simulated s":>11} {"ratio":>6}'
    for name, measured, simulated in _small_cases(costs):
        yield f'{name:<34} {measured:>10.1f} {simulated:>11.1f} {simulated / measured:>6.2f}'


def _small_cases(costs: UnitCosts) -> Iterator[tuple[str, float, float]]:
    ways = {'here': 'this process', 'processes': 'processes', 'ray': 'actors of Ray'}
    for case in costs.measured:
        work, machines = small_case(costs, case)
        workers = '' if case['how'] == 'here' else f'{case["workers"]} '
        name = f'{case["documents"]:,} {case["kind"]}, {workers}{ways[case["how"]]}'
        yield name, case['seconds'], simulate_encoding(work, machines).seconds
    for case in costs.queue:
        seconds = costs.runs(case['slots'])
        waits = simulate_queue(1e9, lambda _, each=seconds: each, case['slots'], case['runs'])
        name = f'{case["runs"]} runs, {case["slots"]} at a time'
        yield name, case['seconds'], max(waits) + seconds


def demands(costs: UnitCosts) -> Iterator[str]:
    """What each size asks for, wherever it is encoded."""
    yield (
        f'{"":<15} {"core hours":>10} {"in GB":>7} {"out GB":>7} {"files":>7} {"plan MB":>7} '
        f'{"driver s":>8} {"rehash s":>8} {"index GB":>8} {"query, core s":>13}'
    )
    for kind in costs.kinds:
        for size in SIZES:
            asked = demand_of(costs, kind, size)
            yield (
                f'{f"{size:.0e} {kind}":<15} {asked.core_seconds / 3600:>10,.1f} '
                f'{asked.bytes_in / 1e9:>7,.0f} {asked.bytes_out / 1e9:>7,.0f} '
                f'{asked.num_files:>7,} {asked.plan_bytes / 1e6:>7,.1f} '
                f'{asked.driver_seconds:>8,.0f} {asked.resume_seconds:>8,.0f} '
                f'{asked.index_bytes / 1e9:>8,.0f} {asked.search_core_seconds:>13,.1f}'
            )


def shares(costs: UnitCosts, site: Site) -> Iterator[str]:
    """How much a size takes of the fewest nodes that encode it in time, and what is scarcest there."""
    names = list(shares_of(demand_of(costs, 'texts', 1), site))
    heads = ''.join(f'{name:>14}' for name in names)
    yield f'{f"of what there is, in {site.hours:g} h":<26}{heads}  first'
    for kind in costs.kinds:
        for size in SIZES:
            asked = demand_of(costs, kind, size)
            here = smallest_site(asked, site)
            found = shares_of(asked, here)
            first = max(found, key=lambda name: found[name])
            line = ''.join(f'{found[name]:>14.3f}' for name in names)
            yield f'{f"{size:.0e} {kind}, nodes: {here.num_nodes}":<26}{line}  {first}'


def simulations(costs: UnitCosts, site: Site) -> Iterator[str]:
    """How long each size takes on those nodes, which fail now and then."""
    yield (
        f'{"":<26} {"hours":>7} {"model":>7} {"cores":>6} {"storage":>7} {"driver":>6} '
        f'{"failures":>8} {"repeated":>8}'
    )
    for kind in costs.kinds:
        for size in SIZES:
            asked = demand_of(costs, kind, size)
            here = smallest_site(asked, site)
            machines = dataclasses.replace(
                cluster_of(costs, kind, here),
                mean_life_seconds=_MEAN_LIFE_SECONDS,
                repair_seconds=_REPAIR_SECONDS,
            )
            done = simulate_encoding(coarser(work_of(costs, kind, size)), machines)
            moved = (asked.bytes_in + asked.bytes_out) / here.storage_bytes
            longest = max(asked.core_seconds / here.num_cores, moved, asked.driver_seconds)
            model = machines.plan_seconds + machines.start_seconds + longest
            yield (
                f'{f"{size:.0e} {kind}, nodes: {here.num_nodes}":<26} {done.seconds / 3600:>7.2f} '
                f'{model / 3600:>7.2f} {done.busy["cores"]:>6.2f} {done.busy["storage"]:>7.3f} '
                f'{done.busy["driver"]:>6.3f} {done.failures:>8} {done.repeated:>8}'
            )


def limits(costs: UnitCosts, site: Site) -> Iterator[str]:
    """Beyond how many cores more of them help no more, and what the simulation says of that."""
    yield (
        f'{"cores that can be kept busy by":<30} {"storage":>9} {"driver":>9} '
        f'{"documents/s with half, twice as many":>37}'
    )
    for kind in costs.kinds:
        most = most_cores(costs, kind, site)
        rates = []
        for factor in (0.5, 2.0):
            nodes = max(1, round(min(most.values()) * factor / site.cores))
            here = dataclasses.replace(site, num_nodes=nodes)
            machines = dataclasses.replace(
                cluster_of(costs, kind, here), plan_seconds=0.0, start_seconds=0.0
            )
            # some shards for each worker
            work = coarser(work_of(costs, kind, here.num_cores * 50_000), 1)
            rates.append(work.num_documents / simulate_encoding(work, machines).seconds)
        shown = ', '.join(f'{rate:,.0f}' for rate in rates)
        yield f'{kind:<30} {most["storage"]:>9,.0f} {most["driver"]:>9,.0f} {shown:>37}'


def queue(costs: UnitCosts) -> Iterator[str]:
    """How long runs wait for a slot, and how many the run store carries."""
    seconds = _RUN_SECONDS + costs.run_seconds
    yield f'{f"runs of {seconds / 60:.0f} minutes, minutes waited":<38} {"mean":>6} {"95 %":>6} {"99 %":>6}'
    for slots in (1, 2, 8):
        for load in (0.5, 0.8, 0.95):
            waits = simulate_queue(
                load * slots / seconds,
                lambda draw: draw.expovariate(1 / seconds),
                slots,
                _NUM_RUNS,
            )
            cut = statistics.quantiles(waits, n=100)
            name = f'{slots} at a time, {load:.0%} of that comes'
            mean = statistics.mean(waits)
            yield f'{name:<38} {mean / 60:>6.1f} {cut[94] / 60:>6.1f} {cut[98] / 60:>6.1f}'
    most = 1 / (costs.store_seconds * _WRITES_PER_SECOND)
    yield f'{"runs that SQLite takes down at a time":<38} {most:>6,.0f}'
