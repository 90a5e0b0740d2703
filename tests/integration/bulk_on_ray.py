"""Encode on a Ray cluster of two nodes on this machine, one of which is killed meanwhile.

`python -m tests.integration.bulk_on_ray SOURCE OUTPUT ARTIFACT`; the embeddings of `finetuner encode`
are at the output when it ends with 0. A process of its own: Ray keeps its token as long as a process is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

# a dead node is noticed within seconds
HEALTH = {'initial_delay_ms': 500, 'period_ms': 500, 'timeout_ms': 1000, 'failure_threshold': 3}
SMALL = {'object_store_memory': 80 * 2**20}


def command(*arguments):
    """`finetuner encode` in a process of its own."""
    return [sys.executable, '-m', 'finetuner.cli', 'encode', *map(str, arguments)]


def main(source: str, output: str, artifact: str) -> int:
    """Encode, kill a node, add another; returns the command's exit code."""
    os.environ.update({f'RAY_health_check_{name}': str(value) for name, value in HEALTH.items()})
    os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN='a-token-of-the-test' * 2)
    from finetuner.ray_cluster import import_ray

    import_ray()
    from ray.cluster_utils import Cluster

    head = {'num_cpus': 1, 'include_dashboard': False, **SMALL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1, **SMALL)
        options = ('--rows-per-shard', 10, '--workers', 2, '--ray', cluster.address, '--json')
        begun = subprocess.Popen(
            command('-i', source, '-o', output, '--artifact', artifact, *options)
        )
        while begun.poll() is None and len(list(Path(output).glob('part-*.json'))) < 3:
            time.sleep(0.02)
        if begun.poll() is not None:
            print('it ended before a node could be killed', file=sys.stderr)
            return 1
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, **SMALL)
        return begun.wait(timeout=500)
    finally:
        cluster.shutdown()


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
