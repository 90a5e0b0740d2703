"""What encoding 1e6, 1e8 and 1e9 documents takes, by a cost model and a simulation of workers.

Reads what `scale_costs.py` measured; simulates its small cases first, beside what they took, then
what no machine here could do. A minute:

    python benchmarks/scale_costs.py --json benchmarks/scale_costs.json
    python benchmarks/scale_simulation.py  # --storage-mb 500 --hours 24 --memory-gib 16
    python benchmarks/scale_simulation.py --only 'small cases' demands
    python benchmarks/scale_simulation.py --update docs/scale.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import scale_tables
from scale_model import Site, UnitCosts, load_costs

COSTS = Path(__file__).with_name('scale_costs.json')


def tables(costs: UnitCosts, site: Site) -> dict[str, Callable[[], Iterator[str]]]:
    """All tables by their names; a table is computed when its lines are asked for."""
    return {
        'unit costs': lambda: scale_tables.unit_costs(costs),
        'small cases': lambda: scale_tables.small_cases(costs),
        'demands': lambda: scale_tables.demands(costs),
        'shares': lambda: scale_tables.shares(costs, site),
        'simulations': lambda: scale_tables.simulations(costs, site),
        'limits': lambda: scale_tables.limits(costs, site),
        'queue': lambda: scale_tables.queue(costs),
    }


def updated(text: str, name: str, lines: Iterator[str]) -> str:
    """A document with the block behind `<!-- table: NAME -->` replaced.

    Raises:
        SystemExit: there is no such block.
    """
    block = re.compile(rf'(<!-- table: {re.escape(name)} -->\n```text\n).*?(^```$)', re.M | re.S)
    body = ''.join(f'{line}\n' for line in lines)
    found, count = block.subn(lambda match: match[1] + body + match[2], text)
    if not count:
        raise SystemExit(f'there is no block behind <!-- table: {name} -->')
    return found


def main() -> None:
    """Print tables, or put them into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('costs', type=Path, nargs='?', default=COSTS, help='of scale_costs.py')
    parser.add_argument('--only', nargs='+', help='names of tables')
    parser.add_argument('--update', type=Path, help='a document whose tables are replaced')
    parser.add_argument('--storage-mb', type=float, default=500.0, help='a second, of all nodes')
    parser.add_argument('--memory-gib', type=float, default=16.0, help='of a node of four cores')
    parser.add_argument('--hours', type=float, default=24.0, help='in which it should be done')
    given = parser.parse_args()
    site = Site(
        num_nodes=1,
        memory=given.memory_gib * 2**30,
        storage_bytes=given.storage_mb * 1e6,
        hours=given.hours,
    )
    found = tables(load_costs(given.costs), site)
    unknown = set(given.only or ()) - set(found)
    if unknown:
        raise SystemExit(f'there is no table {sorted(unknown)}: there are {", ".join(found)}')
    for name in given.only or found:
        if given.update:
            text = updated(given.update.read_text(encoding='utf-8'), name, found[name]())
            given.update.write_text(text, encoding='utf-8')
            continue
        print(f'\n{name}\n{"-" * len(name)}')
        for line in found[name]():
            print(line, flush=True)


if __name__ == '__main__':
    main()
