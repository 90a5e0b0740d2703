"""The garbage collector deletes what nothing refers to, and never what a run or a name needs."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from docarray import Document

from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConfigError, NotFoundError
from finetuner.runs import processes
from finetuner.runs.garbage import collect_garbage
from finetuner.runs.workspace import Workspace


@pytest.fixture(params=['disk', 'memory'])
def workspace(tmp_path, request):
    home = tmp_path / 'home'
    artifacts = str(home / 'artifacts') if request.param == 'disk' else f'memory://{tmp_path.name}'
    workspace = Workspace(Settings(home, f'sqlite:///{home / "finetuner.db"}', artifacts))
    yield workspace
    workspace.close()


def push(workspace, text, name=None):
    return workspace.push_data([Document(id=text, text=text)], name)


def create_run(workspace, name, train_data, callbacks=()):
    config = RunConfig(train_data=train_data, callbacks=callbacks)
    return workspace.runs.create_run(config, name, processes.this_process(), processes.this_host())


def test_what_is_needed_stays_and_the_rest_goes(workspace):
    alice = workspace.for_owner('alice')
    kept = [
        push(workspace, 'named', 'a name'),
        push(alice, 'named by another', 'a name'),
        push(workspace, 'of a run'),
        push(alice, 'of a callback of a run'),
    ]
    create_run(workspace, 'one', kept[2])
    evaluation = {'name': 'EvaluationCallback', 'options': {'query_data': kept[3]}}
    create_run(alice, 'two', kept[2], [evaluation])
    lost = [push(workspace, 'nobody needs this'), push(alice, 'nor this')]
    found = collect_garbage(workspace, seconds=0, only_look=True)
    assert sorted(found.data) == sorted(r.removeprefix('sha256:') for r in lost)
    assert found.num_bytes > 0
    for reference in (*kept, *lost):
        assert len(alice.for_owner('').load_data(reference)) == 1, 'a look deletes nothing'
    assert collect_garbage(workspace, seconds=0).data == found.data
    for reference in kept:
        assert len(workspace.load_data(reference)) == 1
    for reference in lost:
        with pytest.raises(NotFoundError):
            workspace.load_data(reference)
    assert collect_garbage(workspace, seconds=0).data == []
    assert push(workspace, 'nobody needs this') == lost[0], 'and it can be stored again'


def test_what_is_new_stays(workspace):
    reference = push(workspace, 'just sent')
    assert collect_garbage(workspace).data == []
    assert len(workspace.load_data(reference)) == 1


def test_a_deleted_run_needs_its_data_no_more(workspace):
    reference = push(workspace, 'of a run')
    run = create_run(workspace, 'one', reference)
    assert collect_garbage(workspace, seconds=0).data == []
    workspace.runs.mark_failed(run.id, 'why')
    workspace.delete_runs([workspace.runs.read_run(run.id)])
    assert [f'sha256:{h}' for h in collect_garbage(workspace, seconds=0).data] == [reference]


def test_what_killed_processes_left_goes_after_a_while(workspace):
    home = workspace.settings.home
    workspace.database  # noqa: B018 - makes the home
    old, new = home / '.push-old', home / '.push-new'
    for folder in (old, new):
        folder.mkdir()
        (folder / 'documents').write_bytes(b'half')
    long_ago = time.time() - 3 * 24 * 3600
    for path in (old / 'documents', old):
        os.utime(path, (long_ago, long_ago))
    found = collect_garbage(workspace)
    assert found.unfinished == [str(old)]
    assert (old.exists(), new.exists()) == (False, True)


def test_data_that_is_being_used_is_not_taken_away(tmp_path):
    """Collect again and again while others store the same data and make runs of it."""
    home = tmp_path / 'home'
    settings = Settings(home, f'sqlite:///{home / "finetuner.db"}', str(home / 'artifacts'))
    collector = Workspace(settings)
    collector.database  # noqa: B018
    stop = []

    def collect():
        while not stop:
            collect_garbage(collector, seconds=1.0)

    def use(number):
        workspace = Workspace(settings)
        for i in range(15):
            reference = push(workspace, f'text {i % 3}')
            run = create_run(workspace, f'{number}-{i}', reference)
            assert len(workspace.load_data(reference)) == 1
            workspace.runs.mark_failed(run.id, 'done')
            workspace.runs.delete_run(run.id)
            time.sleep(0.1)
        workspace.close()

    with ThreadPoolExecutor(4) as pool:
        collecting = pool.submit(collect)
        try:
            list(pool.map(use, range(3)))
        finally:
            stop.append(True)
        collecting.result()
    collector.close()


def test_a_time_that_cannot_be(workspace):
    with pytest.raises(ConfigError, match='seconds is -1'):
        collect_garbage(workspace, seconds=-1)
