"""Names for artifacts: the rules of the store on SQLite, and of a client with files."""

from __future__ import annotations

import pytest

import finetuner
from finetuner.client import LocalClient, get_client
from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConflictError, NotFoundError, RunInProgressError
from finetuner.storage.database import open_database
from tests.unit.alias_cases import CASES, finished, started


@pytest.fixture
def settings(tmp_path):
    return Settings.from_environment(tmp_path / 'home')


@pytest.fixture
def client(settings):
    made = LocalClient(settings)
    yield made
    made.close()


def put_artifact(client, artifact_id):
    directory = client.settings.home / 'artifacts' / artifact_id
    directory.mkdir(parents=True)
    (directory / 'artifact.json').write_text('{}')


def made(client, name, experiment='emoji', public=False):
    run = finished(client.workspace.runs, name, experiment, public)
    put_artifact(client, run.artifact_id)
    return run


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.__name__)
def test_the_store(case, tmp_path):
    database = open_database(f'sqlite:///{tmp_path / "runs.db"}')
    case(database)
    database.close()


@pytest.mark.parametrize('alias', ['emoji@latest', 'emoji@v1'])
def test_what_an_alias_stands_for_is_found_over_indexes(client, alias):
    """A service asks each second: no table is gone through, however long it is."""
    store = client.workspace.runs
    aliases = store.aliases
    aliases.set('emoji@v1', made(client, 'run').artifact_id)
    name, _, label = alias.partition('@')
    query = aliases._latest(name) if label == 'latest' else aliases._set(name, label)
    engine = client.workspace.database.engine
    text = str(query.compile(engine, compile_kwargs={'literal_binds': True}))
    with engine.connect() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f'EXPLAIN QUERY PLAN {text}')]
    assert plan
    assert all(step.startswith('SEARCH') for step in plan), plan


def test_ids_and_aliases_are_resolved(client):
    run = made(client, 'run')
    assert client.resolve_artifact(run.artifact_id) == run.artifact_id
    assert client.resolve_artifact('emoji@latest') == run.artifact_id
    told = client.set_alias('emoji@production', 'emoji@latest')
    assert told == client.list_aliases()[0]
    assert told['alias'] == 'emoji@production'
    assert (told['artifact_id'], told['run']) == (run.artifact_id, 'run')
    assert client.find_artifact('emoji@production').name == run.artifact_id
    client.delete_alias('emoji@production')
    assert client.list_aliases() == []
    with pytest.raises(NotFoundError, match="unknown alias 'emoji@lates': did you mean 'emoji@l"):
        client.resolve_artifact('emoji@lates')
    for unknown in ('0' * 24, started(client.workspace.runs, 'going').artifact_id):
        with pytest.raises(NotFoundError, match=unknown):
            client.resolve_artifact(unknown)
        with pytest.raises(NotFoundError, match=unknown):
            client.set_alias('emoji@v1', unknown)


def test_an_artifact_that_no_run_made_has_a_name_too(client):
    brought = 'a' * 24
    put_artifact(client, brought)
    assert client.set_alias('brought@v1', brought)['run'] is None
    assert client.resolve_artifact('brought@v1') == brought
    assert client.list_aliases()[0]['experiment'] is None
    client.workspace.artifacts.delete(brought)
    with pytest.raises(NotFoundError, match=f"'brought@v1' stands for the artifact '{brought}'"):
        client.resolve_artifact('brought@v1')
    # the machine's own artifacts are not everybody's
    put_artifact(client, 'b' * 24)
    with pytest.raises(NotFoundError):
        client.for_owner('alice').set_alias('mine@v1', 'b' * 24)


def test_what_is_not_shared_any_more_is_said_so(client):
    run = made(client, 'run', public=True)
    bob = client.for_owner('bob')
    bob.set_alias('theirs@v1', run.artifact_id)
    assert bob.resolve_artifact('theirs@v1') == run.artifact_id
    client.share_run('emoji', 'run', False)
    with pytest.raises(NotFoundError, match='not shared any more'):
        bob.resolve_artifact('theirs@v1')
    client.delete_run('emoji', 'run')
    assert bob.list_aliases()[0]['run'] is None
    bob.delete_alias('theirs@v1')


@pytest.mark.parametrize(
    'ask',
    [
        lambda client: client.delete_run('emoji', 'named'),
        lambda client: client.delete_runs('emoji'),
        lambda client: client.delete_runs(),
        lambda client: client.delete_experiment('emoji'),
        lambda client: client.delete_experiments(),
    ],
)
def test_a_run_with_a_name_is_not_deleted_nor_what_is_deleted_with_it(client, ask):
    runs = [made(client, 'older'), made(client, 'named'), made(client, 'newer')]
    made(client, 'other', 'words')
    client.set_alias('anything@production', runs[1].artifact_id)
    with pytest.raises(ConflictError, match=r"'anything@production'.* first"):
        ask(client)
    assert len(client.list_runs()) == 4
    assert [each['name'] for each in client.list_experiments()] == ['words', 'emoji']
    assert all(client.find_artifact(run.artifact_id).is_dir() for run in runs)
    client.delete_alias('anything@production')
    ask(client)
    with pytest.raises(NotFoundError):
        client.find_artifact(runs[1].artifact_id)


@pytest.mark.parametrize('alias', ['emoji@production', 'emoji@latest', 'ü' * 200 + '@v1'])
def test_a_model_is_found_by_its_alias(client, alias, monkeypatch, tmp_path):
    monkeypatch.setenv('FINETUNER_HOME', str(client.settings.home))
    monkeypatch.chdir(tmp_path)
    run = made(client, 'run')
    if not alias.endswith('@latest'):
        finetuner.set_alias(alias, finetuner.get_run('run', 'emoji'))
    assert finetuner.api.find_artifact(alias).name == run.artifact_id
    draft = RunConfig(train_data='x', model_artifact=alias)
    assert client.workspace.settle_artifact(draft).model_artifact == run.artifact_id
    started(client.workspace.runs, 'going')
    with pytest.raises(RunInProgressError):
        finetuner.set_alias('emoji@v2', finetuner.get_run('going', 'emoji'))
    get_client().close()


def test_a_path_counts_before_an_alias(client, monkeypatch, tmp_path):
    """As it does before an id: whoever has such a directory means it."""
    monkeypatch.chdir(tmp_path)
    made(client, 'run')
    (tmp_path / 'emoji@latest').mkdir()
    assert str(finetuner.api.find_artifact('emoji@latest')) == 'emoji@latest'
    draft = RunConfig(train_data='x', model_artifact='emoji@latest')
    assert client.workspace.settle_artifact(draft) == draft
