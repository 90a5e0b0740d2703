"""Processes that fork while a cache is written in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')

SCRIPT = textwrap.dedent(
    """
    import os, sys, time
    import numpy as np
    from finetuner.collections import TrainingSet
    from finetuner.collections.caching import stop_all_caching

    def write(name, count):
        made = TrainingSet(name, tile_size=[32, 32])
        noise = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
        made.feed((image, [1, 0]) for image in noise)
        made.save()
        return made

    def succeeds(seconds, work, *arguments):
        child = os.fork()
        if not child:
            work(*arguments)
            os._exit(0)
        for _ in range(20 * seconds):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.05)
        os.kill(child, 9)
        os.waitpid(child, 0)
        return False

    def write_and_read(name):
        made = write(name, 3)
        assert len(made.batch(2).train) == 3

    def fork_after(seconds, name):
        # nothing was written here before, so that the thread which writes has modules to import
        assert 'h5py' not in sys.modules
        made = write(name, 500)
        time.sleep(seconds)
        assert succeeds(15, write_and_read, f'{name} by a child')
        assert len(made.batch(2).train) == 500
        assert made.percent_cached == 100
        stop_all_caching()

    for number in range(int(sys.argv[1])):
        if not succeeds(40, fork_after, 0.02 * number, f'set {number}'):
            sys.exit(f'forked after {0.02 * number} s: hangs or fails')
    """
)


def test_a_process_forked_while_a_cache_is_written_writes_and_reads_its_own(tmp_path):
    environment = {**os.environ, 'FINETUNER_HOME': str(tmp_path / 'home')}
    command = [sys.executable, '-c', SCRIPT, '16']
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
