"""What encoding 1e6, 1e8 and 1e9 documents takes, by a cost model and a simulation of workers.

Reads what `scale_costs.py` measured on some machine; simulates its small cases first, beside what they
took, then what no machine here could do. Half a minute:

    python benchmarks/scale_costs.py --json costs.json
    python benchmarks/scale_simulation.py costs.json  # --storage-mb 500 --hours 24 --memory-gib 16
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from scale_events import simulate_encoding, simulate_queue
from scale_model import (
    DAY,
    Site,
    UnitCosts,
    cluster_of,
    coarser,
    demand_of,
    load_costs,
    most_cores,
    shares_of,
    small_case,
    work_of,
)

# documents, and nodes of four cores that are asked to encode them in the given hours
SIZES = ((10**6, 1), (10**8, 16), (10**9, 128))
# a node fails once in this time
_MEAN_LIFE_SECONDS = 30 * DAY
_REPAIR_SECONDS = 300.0
_NUM_RUNS = 20_000
# of a recorder that has something to write each time
_WRITES_PER_SECOND = 1 / 0.3


def small_cases(costs: UnitCosts) -> Iterator[tuple[str, float, float]]:
    """What was measured, simulated: its name, measured seconds and simulated ones."""
    for case in costs.measured:
        work, machines = small_case(costs, case)
        name = f'{case["documents"]:,} {case["kind"]}, {case["workers"]} by {case["how"]}'
        yield name, case['seconds'], simulate_encoding(work, machines).seconds
    crowded = min(unit.crowded_speed for unit in costs.kinds.values())
    for case in costs.queue:
        slots = case['slots']
        waits = simulate_queue(1e9, lambda _: costs.run_seconds / crowded, slots, case['runs'])
        seconds = max(waits) + costs.run_seconds / crowded
        yield f'{case["runs"]} runs in {slots} slots', case['seconds'], seconds


def print_small_cases(costs: UnitCosts) -> None:
    """A line a case, with the ratio."""
    print(f'{"small cases":<40} {"measured s":>11} {"simulated s":>12} {"ratio":>6}')
    for name, measured, simulated in small_cases(costs):
        print(f'{name:<40} {measured:>11.1f} {simulated:>12.1f} {simulated / measured:>6.2f}')


def print_demands(costs: UnitCosts) -> None:
    """What each size asks for, wherever it is encoded."""
    print(
        f'\n{"asked for":<22} {"core hours":>11} {"in GB":>8} {"out GB":>8} {"files":>9} '
        f'{"plan MB":>8} {"driver s":>9} {"rehash s":>9} {"index GB":>9} {"query core s":>13}'
    )
    for kind in costs.kinds:
        for size, _ in SIZES:
            asked = demand_of(costs, kind, size)
            print(
                f'{f"{size:.0e} {kind}":<22} {asked.core_seconds / 3600:>11,.1f} '
                f'{asked.bytes_in / 1e9:>8,.1f} {asked.bytes_out / 1e9:>8,.1f} '
                f'{asked.num_files:>9,} {asked.plan_bytes / 1e6:>8,.1f} '
                f'{asked.driver_seconds:>9,.1f} {asked.resume_seconds:>9,.0f} '
                f'{asked.index_bytes / 1e9:>9,.1f} {asked.search_core_seconds:>13,.2f}'
            )


def print_sites(costs: UnitCosts, site: Site) -> None:
    """How much of each site a size takes, and what there is too little of first."""
    names = list(shares_of(demand_of(costs, 'texts', 1), site))
    print(
        f'\n{f"share of what there is in {site.hours:g} h":<38}'
        + ''.join(f'{n:>20}' for n in names)
    )
    for kind in costs.kinds:
        for size, num_nodes in SIZES:
            here = dataclasses.replace(site, num_nodes=num_nodes)
            shares = shares_of(demand_of(costs, kind, size), here)
            first = max(shares, key=lambda name: shares[name])
            line = ''.join(f'{shares[name]:>20.3f}' for name in names)
            print(f'{f"{size:.0e} {kind}, {here.num_cores} cores":<38}{line}  first: {first}')


def print_simulations(costs: UnitCosts, site: Site) -> None:
    """How long each size takes on its site, with nodes that fail."""
    print(
        f'\n{"simulated":<38} {"hours":>8} {"by the model":>13} {"cores":>7} {"storage":>8} '
        f'{"driver":>7} {"failures":>9} {"repeated":>9}'
    )
    for kind in costs.kinds:
        for size, num_nodes in SIZES:
            here = dataclasses.replace(site, num_nodes=num_nodes)
            machines = dataclasses.replace(
                cluster_of(costs, kind, here),
                mean_life_seconds=_MEAN_LIFE_SECONDS,
                repair_seconds=_REPAIR_SECONDS,
            )
            done = simulate_encoding(coarser(work_of(costs, kind, size)), machines)
            asked = demand_of(costs, kind, size)
            moved = (asked.bytes_in + asked.bytes_out) / here.storage_bytes
            fixed = machines.plan_seconds + machines.start_seconds
            model = fixed + max(asked.core_seconds / here.num_cores, moved, asked.driver_seconds)
            print(
                f'{f"{size:.0e} {kind}, {here.num_cores} cores":<38} {done.seconds / 3600:>8.2f} '
                f'{model / 3600:>13.2f} {done.busy["cores"]:>7.2f} {done.busy["storage"]:>8.2f} '
                f'{done.busy["driver"]:>7.2f} {done.failures:>9} {done.repeated:>9}'
            )


def print_limits(costs: UnitCosts, site: Site) -> None:
    """Beyond how many cores more of them help no more, and that the simulation agrees."""
    print(
        f'\n{"most cores that help":<38} {"storage":>9} {"driver":>9} {"simulated: at half, at twice":>32}'
    )
    for kind in costs.kinds:
        most = most_cores(costs, kind, site)
        limit = min(most.values())
        rates = []
        for factor in (0.5, 2.0):
            nodes = max(1, round(limit * factor / site.cores))
            here = dataclasses.replace(site, num_nodes=nodes)
            # so many shards that the last ones do not matter
            work = coarser(work_of(costs, kind, nodes * site.cores * 50_000), 1)
            machines = dataclasses.replace(
                cluster_of(costs, kind, here), plan_seconds=0.0, start_seconds=0.0
            )
            done = simulate_encoding(work, machines)
            rates.append(work.num_documents / done.seconds)
        shown = ', '.join(f'{rate:,.0f}/s' for rate in rates)
        print(f'{kind:<38} {most["storage"]:>9,.0f} {most["driver"]:>9,.0f} {shown:>32}')


def print_queue(costs: UnitCosts) -> None:
    """How long runs wait, and how many the run store carries."""
    print(f'\n{"runs of 10 minutes, minutes waited":<38} {"mean":>8} {"95 %":>8} {"99 %":>8}')
    seconds = 600.0 + costs.run_seconds
    for slots in (1, 2, 8):
        for load in (0.5, 0.8, 0.95):
            rate = load * slots / seconds
            waits = simulate_queue(
                rate, lambda draw: draw.expovariate(1 / seconds), slots, _NUM_RUNS
            )
            cut = statistics.quantiles(waits, n=100)
            print(
                f'{f"{slots} slots, {load:.0%} of them needed":<38} '
                f'{statistics.mean(waits) / 60:>8.1f} {cut[94] / 60:>8.1f} {cut[98] / 60:>8.1f}'
            )
    most = 1 / (costs.store_seconds * _WRITES_PER_SECOND)
    print(f'runs at a time that SQLite takes down, each with something to say: {most:,.0f}')


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('costs', type=Path, help='what scale_costs.py --json wrote')
    parser.add_argument('--storage-mb', type=float, default=500.0, help='a second, of all nodes')
    parser.add_argument('--memory-gib', type=float, default=16.0, help='of a node of four cores')
    parser.add_argument('--hours', type=float, default=24.0, help='in which it should be done')
    given = parser.parse_args()
    costs = load_costs(given.costs)
    site = Site(
        num_nodes=1,
        memory=given.memory_gib * 2**30,
        storage_bytes=given.storage_mb * 1e6,
        hours=given.hours,
    )
    print_small_cases(costs)
    print_demands(costs)
    print_sites(costs, site)
    print_simulations(costs, site)
    print_limits(costs, site)
    print_queue(costs)


if __name__ == '__main__':
    main()
