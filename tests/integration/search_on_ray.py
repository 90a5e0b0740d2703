"""Mine on a Ray cluster: `python -m tests.integration.search_on_ray ADDRESS QUERY INDEX OUTPUT`.

A process of its own, since Ray keeps its token as long as a process is.
"""

from __future__ import annotations

import sys

from finetuner.bulk import mine_negatives, search_plan


def main(address: str, query: str, index: str, output: str) -> None:
    """Mine in many small tasks, for a node to be lost among them."""
    search_plan._QUERIES_AT_ONCE = 40
    mine_negatives(query, index, output, k=7, num_workers=2, ray_address=address)


if __name__ == '__main__':
    main(*sys.argv[1:])
