"""The Flow files and the other ways to start what they hold."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from jina import Flow

from examples.emoji_data import load_emoji
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.server.requests import fit_request
from tests.integration.serving import REPOSITORY, serve
from tests.scripts import run_script

FLOWS = sorted((REPOSITORY / 'flows').glob('*.yml'))


@pytest.mark.parametrize('path', FLOWS, ids=lambda path: path.name)
def test_flows_load_and_keep_to_this_machine(path):
    flow = Flow.load_config(str(path))
    for name, deployment in flow:
        hosts = deployment.args.host
        assert set(hosts if isinstance(hosts, list) else [hosts]) == {'127.0.0.1'}, name
        assert deployment.args.retries == 0
        assert deployment.args.timeout_send is None


def is_bound(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) == 0


def until_it_works(server):
    """All processes of a server, once one of them is the worker of a run."""
    deadline = time.monotonic() + 60
    while True:
        family = psutil.Process(server.process.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            if any('finetuner.runs.worker' in ' '.join(each.cmdline()) for each in family):
                return family
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.1)


def test_sigterm_ends_the_server_and_all_it_started(tmp_path):
    with serve(FLOWS[-1].read_text(), tmp_path, FINETUNER_TOKEN='') as server:
        docs = load_emoji('train', blobs=True)[:80]
        server.client().post(
            **fit_request(
                docs,
                {
                    'model_options': {'input_size': 32},
                    'epochs': 500,
                    'batch_size': 8,
                    'num_workers': 0,
                    'device': 'cpu',
                },
            )
        )
        family = until_it_works(server)
        so_far = len(server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
        assert not is_bound(server.grpc_port)
        assert not is_bound(server.http_port)
        assert 'Traceback' not in server.log.read_text()[so_far:]
    client = LocalClient(Settings.from_environment(tmp_path / 'home'))
    (run,) = client.workspace.runs.list_runs(None, 1, 10)
    lines = client.get_run_logs('default', run.name)
    client.close()
    assert (run.status, run.queue) == ('CREATED', 'WAITING'), 'the next server goes on with it'
    assert 'waits for' in lines


IN_ONE_SCRIPT = """
import numpy as np
import torch
from docarray import DocumentArray

import finetuner
from examples.emoji_data import load_emoji

# the guide's order: encode here first, then start a Flow, which forks this process
torch.nn.functional.conv2d(torch.rand(8, 3, 256, 256), torch.rand(64, 3, 5, 5))
pictures = load_emoji('test', blobs=True)[:40]
here = finetuner.encode(finetuner.build_model('efficientnet-lite0'), DocumentArray(pictures, copy=True))

from jina import Flow

from finetuner.server import FinetunerExecutor

flow = Flow(host='127.0.0.1').add(
    uses=FinetunerExecutor, uses_with={'artifact': 'efficientnet-lite0'}
)
with flow:
    served = flow.post('/encode', pictures, results_in_order=True)
np.testing.assert_allclose(here.embeddings, served.embeddings, atol=1e-4)
print('the same')
"""


def test_a_script_that_used_torch_starts_a_flow_by_class():
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '2'}
    process = subprocess.Popen(
        [sys.executable, '-c', IN_ONE_SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        # a forked Executor that hangs would outlive its parent
        for left in psutil.process_iter(['pid']):
            if left.pid != process.pid and _session(left.pid) == process.pid:
                left.kill()
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0
    assert 'the same' in output


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize('config', ['executors/encoder/config.yml', 'config.yml'])
def test_the_executors_config_serves_behind_jinas_own_gateway(config):
    printed = run_script(
        f"""
from docarray import DocumentArray
from emoji_data import load_emoji
from jina import Flow

with Flow(host='127.0.0.1').add(uses={str(REPOSITORY / config)!r}) as flow:
    answer = flow.post('/encode', load_emoji('test', blobs=True)[:3])
print('answer', answer.embeddings.shape, abs(answer.embeddings).sum() > 0)
"""
    )
    assert 'answer (3, 1280) True' in printed, printed
