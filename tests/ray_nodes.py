"""A Ray cluster of several nodes on this machine, in a process of its own that is told what to do.

Lines on its standard input: `add CPUS`, `kill NUMBER`, `end`; each is answered by a line. Its own
process, since Ray would stay in that of the tests, which may reach loopback addresses only.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_STORE_BYTES = 80 << 20
# a dead node is found out within three seconds instead of half a minute: it refuses connections; one
# that a busy machine keeps from answering is not dead
_QUICK = {
    'RAY_health_check_initial_delay_ms': '500',
    'RAY_health_check_period_ms': '500',
    'RAY_health_check_timeout_ms': '20000',
    'RAY_health_check_failure_threshold': '5',
    # as quick as what the tests compare with
    'RAY_worker_niceness': '0',
}


class RayNodes:
    """The cluster; `with` ends it.

    Attributes:
        address: `host:port` of its head.
        jobs_address: of its jobs API, `http://...`; '' without a dashboard.
        environment: what its clients need, the token above all.
    """

    def __init__(self, has_jobs: bool = True, head_cpus: int = 0):
        self.token = secrets.token_hex(16)
        self.environment = {
            'RAY_AUTH_MODE': 'token',
            'RAY_AUTH_TOKEN': self.token,
            'RAY_USAGE_STATS_ENABLED': '0',
        }
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.ray_nodes', str(int(has_jobs)), str(head_cpus)],
            cwd=ROOT,
            env={**os.environ, **self.environment, **_QUICK, 'PYTHONPATH': str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address, self.jobs_address = self._answer().split()
        self.jobs_address = '' if self.jobs_address == '-' else self.jobs_address

    def _answer(self) -> str:
        for line in self._process.stdout:
            if line.startswith('answer: '):
                return line.removeprefix('answer: ').strip()
        raise RuntimeError('the cluster ended')

    def _tell(self, words: str) -> str:
        self._process.stdin.write(f'{words}\n')
        self._process.stdin.flush()
        return self._answer()

    def add(self, num_cpus: int = 1) -> int:
        """Start a node; returns its number."""
        return int(self._tell(f'add {num_cpus}'))

    def kill(self, number: int) -> None:
        """Kill a node with all its processes, as a machine that loses its power."""
        self._tell(f'kill {number}')

    def node_ids(self) -> list[str]:
        """Ray's names of the nodes that were added, '' of those that are gone."""
        return self._tell('ids').split(',')

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.write('end\n')
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main(has_jobs: bool, head_cpus: int) -> None:
    from finetuner.ray_cluster import import_ray

    import_ray()
    from ray.cluster_utils import Cluster

    head = {
        'num_cpus': head_cpus,
        'object_store_memory': _STORE_BYTES,
        'include_dashboard': has_jobs,
        'dashboard_port': 0,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = []
    url = cluster.head_node.webui_url if has_jobs else ''
    print(f'answer: {cluster.address} {f"http://{url}" if url else "-"}', flush=True)
    for line in sys.stdin:
        match line.split():
            case ['add', cpus]:
                nodes.append(cluster.add_node(num_cpus=int(cpus), object_store_memory=_STORE_BYTES))
                said = str(len(nodes) - 1)
            case ['kill', number]:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                nodes[int(number)] = None
                said = 'gone'
            case ['ids']:
                said = ','.join(node.node_id if node else '' for node in nodes)
            case _:
                break
        print(f'answer: {said}', flush=True)
    cluster.shutdown()


if __name__ == '__main__':
    main(sys.argv[1] == '1', int(sys.argv[2]))
