"""Mining on a Ray cluster that loses a node finds what is found on this machine."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from pyarrow import parquet

from finetuner.bulk import mine_negatives
from tests.integration.serving import REPOSITORY
from tests.ray_nodes import RayNodes
from tests.unit.encoded_cases import write_encoded

pytestmark = pytest.mark.timeout(900)


def test_a_ray_cluster_of_which_a_node_is_killed_finds_the_same(tmp_path):
    random = np.random.default_rng(0)
    query, index = tmp_path / 'query', tmp_path / 'index'
    write_encoded(query, random.standard_normal((400, 32)), [n % 5 for n in range(400)])
    write_encoded(
        index, random.standard_normal((3000, 32)), [n % 7 for n in range(3000)], None, 100
    )
    (tmp_path / 'out').mkdir()
    here, there = tmp_path / 'here.parquet', tmp_path / 'out' / 'there.parquet'
    mine_negatives(query, index, here, k=7)
    with RayNodes(has_jobs=False, head_cpus=1) as cluster:
        node = cluster.add(1)
        begun = subprocess.Popen(
            [
                *(sys.executable, '-m', 'tests.integration.search_on_ray'),
                *(cluster.address, query, index, there),
            ],
            env={**os.environ, **cluster.environment},
            cwd=REPOSITORY,
        )
        while not any(p.stat().st_size > 100 for p in there.parent.glob('.unfinished-*')):
            assert begun.poll() is None, 'it ended before a node could be killed'
            time.sleep(0.01)
        cluster.kill(node)
        assert begun.wait(timeout=600) == 0
    ours, theirs = parquet.read_table(here).to_pydict(), parquet.read_table(there).to_pydict()
    assert theirs['anchor_id'] == ours['anchor_id']
    assert theirs['negative_ids'] == ours['negative_ids']
    np.testing.assert_allclose(theirs['distances'], ours['distances'], rtol=1e-9)
