"""Mine on a Ray cluster of two nodes on this machine, one of which is killed meanwhile.

`python -m tests.integration.search_on_ray QUERY INDEX OUTPUT`; negatives are at the output when it ends
with 0. A process of its own: Ray keeps its token as long as a process is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from tests.integration.bulk_on_ray import HEALTH, SMALL


def main(query: str, index: str, output: str) -> int:
    """Mine, and kill a node when some of the output is there; returns the exit code."""
    os.environ.update({f'RAY_health_check_{name}': str(value) for name, value in HEALTH.items()})
    os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN='a-token-of-the-test' * 2)
    from finetuner.bulk import mine_negatives, search_plan
    from finetuner.ray_cluster import import_ray

    import_ray()
    from ray.cluster_utils import Cluster

    head = {'num_cpus': 1, 'include_dashboard': False, **SMALL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    search_plan._QUERIES_AT_ONCE = 40
    is_killed = threading.Event()

    def kill() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            sizes = [p.stat().st_size for p in Path(output).parent.glob('.unfinished-*')]
            if any(size > 100 for size in sizes):
                cluster.remove_node(node, allow_graceful=False)
                is_killed.set()
                return
            time.sleep(0.01)

    try:
        node = cluster.add_node(num_cpus=1, **SMALL)
        killer = threading.Thread(target=kill)
        killer.start()
        mine_negatives(query, index, output, k=7, num_workers=2, ray_address=cluster.address)
        was_killed = is_killed.is_set()
        killer.join()
        return 0 if was_killed else 1
    finally:
        cluster.shutdown()


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
