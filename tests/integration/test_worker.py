"""Workers as real processes: ended well, killed, told to stop, never heard of."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from finetuner.config import RunConfig, Settings
from finetuner.runs import processes
from finetuner.runs.launching import ProcessLauncher
from finetuner.runs.processes import ProcessMark, is_alive, process_mark, stop_workers, this_process
from finetuner.runs.workspace import Workspace

ROOT = Path(__file__).parents[2]

# What a worker does is said in the run's description.
WORKER = f"""
import logging, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from finetuner.config import Settings
from finetuner.runs.worker import run_worker

def execute(config, load_data, directory, observer, run_directory):
    what = config.description
    log = logging.getLogger('finetuner.test')
    log.info('at work')
    (directory / 'half').write_text('half an artifact')
    print('a word on standard output', flush=True)
    if what == 'exits':
        os._exit(3)
    if what == 'stubborn':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what == 'helper ends':  # as a data loader whose helper process got the signal first
        try:
            time.sleep(60)
        except BaseException:
            raise RuntimeError('a helper process was terminated')
    if what == 'forks':
        child = os.fork()
        if child == 0:
            log.info('from a forked process')
            time.sleep(60)
            os._exit(0)
        log.info('child %d', child)
    deadline = time.monotonic() + 60
    while what != 'quick' and time.monotonic() < deadline:
        time.sleep(0.01)
    (directory / 'half').rename(directory / 'artifact.json')

sys.exit(0 if run_worker(int(sys.argv[1]), Settings.from_environment(), execute) else 1)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'worker.py'
    path.write_text(WORKER)
    return path


@pytest.fixture
def workspace(tmp_path):
    home = tmp_path / 'home'
    settings = Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))
    script = tmp_path / 'worker.py'
    workspace = Workspace(
        settings, launcher=ProcessLauncher(settings, (sys.executable, str(script)))
    )
    yield workspace
    stop_workers(grace=0.5)
    workspace.close()


@pytest.fixture
def start(workspace, script):
    def start(what, name='run'):
        config = RunConfig(train_data='sha256:00', run_name=name, description=what)
        return workspace.start_run(config)

    return start


def _until(workspace, run, status, seconds=30):
    deadline = time.monotonic() + seconds
    while (now := workspace.settle(workspace.runs.read_run(run.id))).status != status:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def _at_work(workspace, run):
    """Wait until the worker is in the middle of it: its artifact half written."""
    deadline = time.monotonic() + 30
    half = workspace.settings.home / 'artifacts' / f'.staging-{run.artifact_id}' / 'half'
    while not half.exists():
        assert time.monotonic() < deadline, workspace.runs.read_run(run.id)
        time.sleep(0.02)
    time.sleep(0.1)
    return workspace.runs.read_run(run.id)


def _artifacts(workspace):
    return [path.name for path in (workspace.settings.home / 'artifacts').iterdir()]


def _lines(workspace, run):
    return [line for _, line in workspace.runs.read_log_lines(run.id)]


def test_good_end(workspace, start):
    run = start('quick')
    ended = _until(workspace, run, 'FINISHED')
    assert _artifacts(workspace) == [run.artifact_id]
    assert [line.split()[-2:] for line in _lines(workspace, run)] == [['at', 'work']]
    assert ended.created_at < ended.started_at < ended.finished_at


def test_killed_worker_leaves_a_failed_run_that_says_so(workspace, start):
    run = _at_work(workspace, start('slow'))
    assert run.status == 'STARTED'
    os.kill(run.worker.pid, signal.SIGKILL)
    ended = _until(workspace, run, 'FAILED', seconds=5)
    assert (
        f'the worker process {run.worker.pid} ended without finishing (killed by signal 9'
        in ended.details
    )
    assert 'its last output: a word on standard output' in ended.details
    assert ended.finished_at is not None
    assert _artifacts(workspace) == []
    assert ended.details in _lines(workspace, run)[-1]


def test_killed_worker_is_noticed_by_a_process_that_did_not_start_it(workspace, script):
    code = f"""
import sys
from finetuner.config import RunConfig, Settings
from finetuner.runs.launching import ProcessLauncher
from finetuner.runs.workspace import Workspace
config = RunConfig(train_data='sha256:00', run_name='run', description='slow')
settings = Settings.from_environment()
launcher = ProcessLauncher(settings, (sys.executable, {str(script)!r}))
Workspace(settings, launcher=launcher).start_run(config)
"""
    environment = processes.worker_environment(workspace.settings, os.environ)
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, check=True)
    run = _at_work(workspace, workspace.runs.get_run('default', 'run'))
    # it outlived the process that started it, in a session of its own
    assert is_alive(run.worker)
    assert os.getsid(run.worker.pid) == run.worker.pid
    assert workspace.settle(run).status == 'STARTED'
    os.kill(run.worker.pid, signal.SIGKILL)
    ended = _until(workspace, run, 'FAILED', seconds=10)
    assert f'the worker process {run.worker.pid} ended without finishing' in ended.details
    assert _artifacts(workspace) == []


def test_a_worker_that_crashes_before_it_can_log(workspace, start, script):
    script.write_text('import sys\nraise SystemError("broken installation")')
    ended = _until(workspace, start('quick'), 'FAILED')
    assert '(exit code 1)' in ended.details
    assert 'SystemError: broken installation' in ended.details


def test_a_worker_that_vanishes_with_an_exit_code(workspace, start):
    ended = _until(workspace, start('exits'), 'FAILED')
    assert '(exit code 3)' in ended.details
    assert _artifacts(workspace) == []


@pytest.mark.parametrize('what', ['slow', 'helper ends'])
def test_sigterm_is_a_clean_failure(workspace, start, what):
    run = _at_work(workspace, start(what))
    os.kill(run.worker.pid, signal.SIGTERM)
    ended = _until(workspace, run, 'FAILED', seconds=5)
    assert ended.details == 'ended by a signal (SIGTERM)'
    assert _artifacts(workspace) == []
    assert _lines(workspace, run)[-1].endswith('The run failed: ended by a signal (SIGTERM)')


def test_cancel_ends_loader_processes_too(workspace, start):
    run = _at_work(workspace, start('forks'))
    helpers = psutil.Process(run.worker.pid).children()
    assert len(helpers) == 1
    begin = time.monotonic()
    ended = workspace.cancel(run)
    assert time.monotonic() - begin < 3
    assert (ended.status, ended.details) == ('FAILED', 'cancelled')
    _, alive = psutil.wait_procs(helpers, timeout=5)
    assert alive == []
    assert not any('forked' in line for line in _lines(workspace, run))
    output = processes.run_directory(workspace.settings, run.id) / 'output.txt'
    assert 'from a forked process' in output.read_text()


def test_cancel_kills_a_worker_that_does_not_listen(workspace, start):
    run = _at_work(workspace, start('stubborn'))
    begin = time.monotonic()
    ended = workspace.cancel(run)
    assert (ended.status, ended.details) == ('FAILED', 'cancelled')
    assert time.monotonic() - begin < 2
    assert not is_alive(run.worker)
    assert _artifacts(workspace) == []


def test_cancel_from_another_machine_reaches_the_worker(workspace, start):
    run = _at_work(workspace, start('slow'))
    workspace.runs.request_cancel(run.id)  # all that another machine can do
    deadline = time.monotonic() + 10
    while workspace.runs.read_run(run.id).is_going:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert workspace.runs.read_run(run.id).details == 'cancelled'
    assert _artifacts(workspace) == []


def test_cancel_before_the_worker_is_known(workspace, script):
    config = RunConfig(train_data='sha256:00', description='quick')
    run = workspace.runs.create_run(config, 'run', this_process(), processes.this_host())
    assert workspace.settle(run) == run  # its launcher, this process, is alive
    assert workspace.cancel(run).details == 'cancelled'
    worker = processes.launch_worker(workspace.settings, run.id, (sys.executable, str(script)))
    while is_alive(worker):
        time.sleep(0.02)
    assert workspace.runs.read_run(run.id).details == 'cancelled'
    assert len(_lines(workspace, run)) == 1  # nothing was done


def test_a_launcher_that_died_in_between_is_noticed(workspace):
    config = RunConfig(train_data='sha256:00')
    gone = ProcessMark(this_process().pid, 'a process of that id, long ago')
    run = workspace.runs.create_run(config, 'run', gone, processes.this_host())
    ended = workspace.settle(run)
    assert ended.status == 'FAILED'
    assert 'ended before it had started a worker' in ended.details


def test_a_reused_process_id_is_not_taken_for_the_worker(workspace):
    config = RunConfig(train_data='sha256:00')
    run = workspace.runs.create_run(config, 'run', this_process(), processes.this_host())
    me = this_process()
    workspace.runs.mark_started(run.id, replace(me, mark=me.mark + '0'))
    assert workspace.settle(workspace.runs.read_run(run.id)).status == 'FAILED'
    assert process_mark(os.getpid()) == me.mark


def test_runs_of_another_machine_are_left_alone(workspace):
    gone = ProcessMark(2**22 + 1, 'gone')
    run = workspace.runs.create_run(RunConfig(train_data='x'), 'run', gone, 'another-host')
    assert workspace.settle(run).status == 'CREATED'


def test_stop_workers_ends_all_it_started(workspace, start):
    runs = [_at_work(workspace, start('slow', name)) for name in ('a', 'b')]
    stop_workers()
    for run in runs:
        assert not is_alive(run.worker)
        ended = workspace.runs.read_run(run.id)
        assert (ended.status, ended.details) == ('FAILED', 'ended by a signal (SIGTERM)')


def test_log_arrives_while_the_run_goes_on(workspace, start):
    run = _at_work(workspace, start('slow'))
    deadline = time.monotonic() + 2
    while not _lines(workspace, run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert workspace.runs.read_run(run.id).status == 'STARTED'


def test_started_from_another_directory_with_misleading_files(workspace, tmp_path, monkeypatch):
    trap = tmp_path / 'trap'
    trap.mkdir()
    for name in ('finetuner.py', 'logging.py', 'json.py'):
        (trap / name).write_text('raise SystemExit("the wrong module")')
    monkeypatch.chdir(trap)
    real = Workspace(workspace.settings)  # with the real command
    run = real.start_run(RunConfig(train_data='missing'))
    real.close()
    ended = _until(workspace, run, 'FAILED', seconds=90)
    assert 'unknown data' in ended.details
    assert not any('Traceback' in line for line in _lines(workspace, run))
