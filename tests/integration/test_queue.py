"""The queue with real workers: runs wait, start, are retried, paused, limited and adopted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConfigError
from finetuner.runs import processes
from finetuner.runs.dispatcher import Dispatcher
from finetuner.runs.launching import ProcessLauncher, WorkerLimits
from finetuner.runs.processes import ProcessMark, is_alive, stop_workers
from finetuner.runs.states import TAKEN, WAITING
from finetuner.runs.workspace import Workspace

ROOT = Path(__file__).parents[2]

# What a worker does is said in the run's description; a file in its directory counts its attempts.
WORKER = f"""
import logging, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from finetuner.config import Settings
from finetuner.excepts import TrainingPausedError
from finetuner.runs.worker import run_worker

def execute(config, load_data, directory, observer, run_directory):
    what = config.description
    log = logging.getLogger('finetuner.test')
    counter = run_directory / 'attempts'
    attempt = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(attempt))
    log.info('attempt %d, %s threads', attempt, os.environ.get('OMP_NUM_THREADS'))
    (directory / 'half').write_text('half an artifact')
    if what == 'dies':
        os._exit(3)
    if what == 'dies once' and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == 'grows':
        kept = bytearray(os.urandom(1 << 20) * 600)
    if what == 'fails':
        raise ValueError('loss is nan')
    deadline = time.monotonic() + (60 if what in ('slow', 'grows', 'deaf') else 0)
    if what == 'second is quick' and attempt == 1:
        deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if observer.is_paused() and what != 'deaf':
            (run_directory / 'checkpoint').write_text(str(attempt))
            raise TrainingPausedError('paused')
        time.sleep(0.01)
    (directory / 'half').rename(directory / 'artifact.json')

sys.exit(0 if run_worker(int(sys.argv[1]), Settings.from_environment(), execute) else 1)
"""

SERVER = """
import sys, time
from finetuner.config import Settings
from finetuner.runs.dispatcher import Dispatcher
from finetuner.runs.launching import ProcessLauncher
from finetuner.runs.workspace import Workspace
settings = Settings.from_environment()
launcher = ProcessLauncher(settings, (sys.executable, sys.argv[1]))
Dispatcher(Workspace(settings, launcher=launcher), int(sys.argv[2])).start()
time.sleep(300)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'worker.py'
    path.write_text(WORKER)
    return path


@pytest.fixture
def settings(tmp_path):
    home = tmp_path / 'home'
    return Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))


@pytest.fixture
def build(settings, script):
    """A dispatcher as a server makes it; all are ended with the test."""
    made = []

    def build(limits=None, **options):
        launcher = ProcessLauncher(settings, (sys.executable, str(script)), limits)
        made.append(Dispatcher(Workspace(settings, launcher=launcher), **options))
        return made[-1]

    yield build
    for dispatcher in made:
        dispatcher._stop.set()
        dispatcher.workspace.close()
    stop_workers(grace=0.5)


@pytest.fixture
def workspace(settings):
    workspace = Workspace(settings)
    yield workspace
    workspace.close()


def submit(workspace, what, name='run', max_retries=2):
    config = RunConfig(train_data='sha256:00', run_name=name, description=what)
    return workspace.start_run(config, max_retries)


def until(workspace, run, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition(now := workspace.runs.read_run(run.id)):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def at_work(workspace, run):
    until(workspace, run, lambda now: now.status == 'STARTED')
    counter = processes.run_directory(workspace.settings, run.id) / 'attempts'
    deadline = time.monotonic() + 30
    while not counter.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    return workspace.runs.read_run(run.id)


def ended(run):
    return not run.is_going


def lines(workspace, run):
    return [line for _, line in workspace.runs.read_log_lines(run.id)]


def artifacts(workspace):
    return sorted(p.name for p in (workspace.settings.home / 'artifacts').iterdir())


def test_a_run_waits_for_a_server_and_is_done_by_it(workspace, build):
    run = submit(workspace, 'quick')
    assert workspace.settle(run) == run, 'its client may go: the run waits'
    build().start()
    done = until(workspace, run, ended)
    assert (done.status, done.queue, done.retries) == ('FINISHED', None, 0), done.details
    assert artifacts(workspace) == [run.artifact_id]


def test_so_many_at_a_time_and_in_their_order(workspace, build):
    runs = [submit(workspace, 'slow', f'run {i}') for i in range(4)]
    build(num_workers=2).start()
    for run in runs[:2]:
        at_work(workspace, run)
    time.sleep(1.5)
    assert [workspace.runs.read_run(run.id).queue for run in runs] == [TAKEN] * 2 + [WAITING] * 2
    workspace.cancel(workspace.runs.read_run(runs[0].id))
    at_work(workspace, runs[2])
    assert workspace.runs.read_run(runs[3].id).queue == WAITING


def test_a_killed_worker_is_replaced(workspace, build):
    run = submit(workspace, 'dies once')
    build().start()
    done = until(workspace, run, ended)
    assert (done.status, done.retries) == ('FINISHED', 1)
    log = '\n'.join(lines(workspace, run))
    assert 'killed by signal 9' in log
    assert 'the run goes on, retry 1 of 2' in log
    assert 'attempt 2' in log
    assert artifacts(workspace) == [run.artifact_id]


def test_a_worker_that_always_dies_is_not_replaced_for_ever(workspace, build):
    run = submit(workspace, 'dies')
    build().start()
    done = until(workspace, run, ended)
    assert done.status == 'FAILED'
    assert '(exit code 3)' in done.details
    assert done.details.endswith('so did 2 before it')
    assert artifacts(workspace) == []
    assert (processes.run_directory(workspace.settings, run.id) / 'attempts').read_text() == '3'


def test_a_failure_that_is_the_runs_own_is_not_retried(workspace, build):
    run = submit(workspace, 'fails')
    build().start()
    done = until(workspace, run, ended)
    assert (done.status, done.details, done.retries) == ('FAILED', 'ValueError: loss is nan', 0)


@pytest.mark.parametrize('what', ['slow', 'deaf'])
def test_cancelled_within_two_seconds(workspace, build, what):
    run = submit(workspace, what)
    build().start()
    going = at_work(workspace, run)
    began = time.monotonic()
    done = workspace.cancel(going)
    assert time.monotonic() - began < 2
    assert (done.status, done.details) == ('FAILED', 'cancelled')
    assert not is_alive(going.worker)
    time.sleep(1.2)
    assert workspace.runs.read_run(run.id) == done, 'and it is not taken up again'


def test_a_waiting_run_is_cancelled_and_deleted(workspace, build):
    run = submit(workspace, 'quick')
    assert workspace.cancel(run).details == 'cancelled'
    workspace.delete_runs([workspace.runs.read_run(run.id)])
    build().look()
    assert workspace.runs.list_runs(None, 1, 10) == []


def test_a_server_that_ends_has_its_runs_paused(workspace, build, monkeypatch):
    run = submit(workspace, 'second is quick')
    first = build()
    first.start()
    going = at_work(workspace, run)
    began = time.monotonic()
    first.drain(seconds=10)
    assert time.monotonic() - began < 5
    assert not is_alive(going.worker)
    waiting = workspace.runs.read_run(run.id)
    assert (waiting.status, waiting.queue, waiting.retries) == ('CREATED', WAITING, 0)
    assert 'goes on from its last checkpoint' in lines(workspace, run)[-1]
    directory = processes.run_directory(workspace.settings, run.id)
    assert (directory / 'checkpoint').read_text() == '1'
    build().start()
    assert until(workspace, run, ended).status == 'FINISHED'


def test_a_worker_that_comes_to_no_checkpoint_is_ended_and_its_run_goes_on(workspace, build):
    run = submit(workspace, 'deaf')
    first = build()
    first.start()
    going = at_work(workspace, run)
    first.drain(seconds=0.5)
    assert not is_alive(going.worker)
    waiting = workspace.runs.read_run(run.id)
    assert (waiting.status, waiting.queue, waiting.retries) == ('CREATED', WAITING, 0)


def test_what_takes_too_much_memory_is_ended_and_says_so(workspace, build):
    run = submit(workspace, 'grows')
    build(WorkerLimits(memory_mb=500)).start()
    done = until(workspace, run, ended)
    assert done.status == 'FAILED'
    assert 'more than the 500 MB of memory' in done.details
    assert done.retries == 0
    deadline = time.monotonic() + 5
    while artifacts(workspace):  # its worker is ended first
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_threads_are_limited(workspace, build):
    run = submit(workspace, 'quick')
    build(WorkerLimits(num_threads=3)).start()
    until(workspace, run, ended)
    assert 'attempt 1, 3 threads' in lines(workspace, run)[0]


@pytest.mark.parametrize('name', ['memory_mb', 'num_threads'])
def test_limits_that_cannot_be(name):
    with pytest.raises(ConfigError, match=f'{name} is 0'):
        WorkerLimits(**{name: 0})


def start_server(workspace, script, num_workers=1):
    environment = processes.worker_environment(workspace.settings, os.environ)
    command = [sys.executable, '-c', SERVER, str(script), str(num_workers)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def test_two_servers_share_a_store(workspace, script):
    runs = [submit(workspace, 'quick', f'run {i}') for i in range(6)]
    servers = [start_server(workspace, script, 2) for _ in range(2)]
    try:
        for run in runs:
            assert until(workspace, run, ended, 60).status == 'FINISHED'
        for run in runs:
            counter = processes.run_directory(workspace.settings, run.id) / 'attempts'
            assert counter.read_text() == '1', 'each was done once'
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_a_worker_outlives_its_server_and_counts_for_the_next(workspace, script, build):
    run = submit(workspace, 'slow')
    server = start_server(workspace, script)
    try:
        going = at_work(workspace, run)
    finally:
        server.kill()
        server.wait()
    assert is_alive(going.worker)
    other = submit(workspace, 'quick', 'other')
    build(num_workers=1).start()
    time.sleep(1.5)
    assert workspace.runs.read_run(other.id).queue == WAITING, 'the place is taken'
    os.kill(going.worker.pid, signal.SIGKILL)
    psutil.wait_procs(
        [psutil.Process(going.worker.pid)] if psutil.pid_exists(going.worker.pid) else []
    )
    # the run whose worker died goes on, and then it is the other's turn
    again = until(workspace, run, lambda now: now.retries == 1)
    assert again.is_going


def test_a_silent_worker_of_another_machine_is_replaced(workspace, build, monkeypatch):
    run = submit(workspace, 'quick')
    far = ProcessMark(2**22 + 1, 'far away')
    workspace.runs.claim(far, 'another-host')
    workspace.runs.mark_started(run.id, far)
    dispatcher = build(silent_seconds=0.6)
    dispatcher.look()
    for _ in range(4):
        # it beats, whatever any clock says
        workspace.runs.record(run.id, worker=far, beats=True)
        time.sleep(0.3)
        dispatcher.look()
    assert workspace.runs.read_run(run.id).status == 'STARTED'
    time.sleep(0.7)
    dispatcher.look()
    assert until(workspace, run, ended).status == 'FINISHED'
    assert workspace.runs.read_run(run.id).retries == 1


def test_a_server_killed_between_claim_and_start_loses_no_run(workspace, build):
    run = submit(workspace, 'quick')
    gone = ProcessMark(2**22 + 1, 'gone')
    workspace.runs.claim(gone, processes.this_host())
    build().start()
    done = until(workspace, run, ended)
    assert (done.status, done.retries) == ('FINISHED', 0)
