"""The same scripts against a server: login, data in pieces, runs, logs, artifacts, other users."""

import contextlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray

import finetuner
from examples.emoji_data import load_emoji
from finetuner.callback import EvaluationCallback, TrainingCheckpoint
from finetuner.client import LocalClient
from finetuner.config import Settings
from finetuner.excepts import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    ServerError,
)
from finetuner.logins import read_login
from finetuner.remote import RemoteClient
from finetuner.server.http import build_app
from finetuner.server.http_door import _OPEN_PATHS, Door
from finetuner.server.json_documents import write_documents
from finetuner.server.limits import Limits
from finetuner.server.security import TokenCheck
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.conftest import make_picture_docs
from tests.integration.serving import REPOSITORY, Server, serve, store_of

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
ENCODE_FLOW = (REPOSITORY / 'flows' / 'encode.yml').read_text()
API = '/api/v1'
QUICK = {
    'model_options': {'input_size': 32},
    'epochs': 2,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
}
AWKWARD = [
    '../x',
    '%2e%2e',
    'a#b',
    'a?b&c=d',
    'x/y',
    '😀 — ü',
    '..',
    "'; DROP TABLE runs; --",
    'a+b',
]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory) -> dict[str, str]:
    """Tokens of some users, in a home that a server is then started on."""
    home = tmp_path_factory.mktemp('server') / 'home'
    settings = Settings.from_environment(home)
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    made = {
        'alice': store.create('alice')[0],
        'bob': store.create('bob')[0],
        'erin': store.create('erin')[0],
        'reader': store.create('alice', 'read')[0],
        'admin': store.create('root', 'admin')[0],
    }
    return {**made, 'home': str(settings.home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture
def clients(server, tokens, tmp_path):
    """A client for each user, each on a machine of its own as it were."""
    made = {
        name: RemoteClient(server.url, tokens[name], Settings.from_environment(tmp_path / name))
        for name in ('alice', 'bob', 'erin', 'reader', 'admin')
    }
    yield made
    for client in made.values():
        client.close()


def bearer(token: str) -> dict[str, str]:
    return {'authorization': f'Bearer {token}'}


def script() -> dict:
    """What a script of the guide does, and what it sees of it."""
    train_data = load_emoji('train')[:40]
    test_data = load_emoji('test')[:24]  # four pictures of each concept
    query_data = test_data[::4]
    index_data = DocumentArray(doc for i, doc in enumerate(test_data) if i % 4)
    evaluation = EvaluationCallback(query_data, index_data, limit=3, gather_examples=True)
    run = finetuner.fit(
        'efficientnet-lite0',
        train_data,
        run_name='from a script',
        callbacks=[evaluation, TrainingCheckpoint(last_k_epochs=1)],
        seed=3,
        **QUICK,
    )
    log = list(run.stream_logs())
    assert run.status()['status'] == 'FINISHED', '\n'.join(log)
    archive = run.save_artifact('artifacts')
    model = finetuner.get_model(run.artifact_id)
    found = finetuner.encode(model, load_emoji('test')[:3])
    kept = run.checkpoints()
    weights = sorted(line for line in log if 'Epoch' in line)
    return {
        'metrics': run.metrics(),
        'examples': run.example_results(),
        'embeddings': np.asarray(found.embeddings),
        'epochs': [
            line.split('Epoch')[1].split('Documents/s')[0].split('loss')[1][:8] for line in weights
        ],
        'archive': archive,
        'checkpoints': list(kept),
        'restored': finetuner.get_model(kept[2]).dimension,
        'names': [each.name for each in finetuner.list_runs()],
        'experiments': [each.name for each in finetuner.list_experiments()],
    }


def test_a_script_runs_here_and_there_and_sees_the_same(
    server, tokens, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # as the server of the tests
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'here'))
    here = script()
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'there'))
    finetuner.login(host=server.url + '/', token=tokens['alice'])
    assert f'Runs go to {server.url}, as alice (scope write)' in capsys.readouterr().out.replace(
        '\n', ' '
    )
    assert finetuner.get_token() == tokens['alice']
    there = script()
    assert not (tmp_path / 'there' / 'finetuner.db').exists(), 'nothing was kept here'
    np.testing.assert_array_equal(here.pop('embeddings'), there.pop('embeddings'))
    assert here == there
    finetuner.logout()
    assert finetuner.list_runs() == []


def test_the_login_is_kept_and_the_environment_counts_before_it(
    server, tokens, tmp_path, monkeypatch
):
    home = tmp_path / 'home'
    monkeypatch.setenv('FINETUNER_HOME', str(home))
    finetuner.login(host=server.url, token=tokens['bob'])
    assert (home / 'login.json').stat().st_mode & 0o777 == 0o600
    assert finetuner.login() is None
    assert finetuner.get_token() == tokens['bob']
    monkeypatch.setenv('FINETUNER_HOST', 'http://127.0.0.1:9')
    monkeypatch.setenv('FINETUNER_TOKEN', 'x')
    assert read_login(home).host == 'http://127.0.0.1:9'
    with pytest.raises(ServerError, match='does not answer'):
        finetuner.list_runs()


def test_a_login_that_cannot_be(server, tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    with pytest.raises(ForbiddenError, match='token'):
        finetuner.login(host=server.url, token='ft_wrong')
    with pytest.raises(ConfigError, match='address of a server'):
        finetuner.login(host='127.0.0.1:51080', token='x')
    with pytest.raises(ConfigError, match='address too'):
        finetuner.login(token='x')
    with pytest.raises(ServerError, match='is it running'):
        finetuner.login(host='http://127.0.0.1:9')
    assert not (tmp_path / 'home' / 'login.json').exists()


# data


def sent(server: Server) -> list[Path]:
    return sorted((server.log.parent / 'home' / 'data').glob('*.docs'))


def test_the_same_data_is_sent_once(server, clients, monkeypatch):
    alice = clients['alice']
    pieces = []
    send_piece = alice._server._send_piece
    monkeypatch.setattr(alice._server, '_send_piece', lambda *a: pieces.append(a) or send_piece(*a))

    def made_anew():
        docs = load_emoji('train')[40:60]
        return DocumentArray(Document(uri=doc.uri, tags=doc.tags) for doc in docs)

    first = alice.push_data(made_anew())
    assert pieces
    pieces.clear()
    # its ids are random, and others each time: it is the same data for all that
    assert alice.push_data(made_anew()) == first
    assert pieces == []
    other = alice.push_data(load_emoji('train')[40:61])
    assert other != first


def test_data_under_a_name_comes_back(server, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    finetuner.login(host=server.url, token=tokens['alice'])
    docs = make_picture_docs(2, 3)
    reference = finetuner.push_data('tiny pictures', docs)
    back = finetuner.pull_data('tiny pictures')
    assert [d.id for d in back] == [d.id for d in docs]
    assert [d.blob for d in back] == [d.blob for d in docs]
    assert finetuner.pull_data(reference)[:, 'tags'] == docs[:, 'tags']
    with pytest.raises(NotFoundError, match="did you mean 'tiny pictures'"):
        finetuner.pull_data('tiny picture')
    with pytest.raises(NotFoundError):
        finetuner.fit('efficientnet-lite0', 'tiny picture', **QUICK)


def test_an_upload_goes_on_where_it_broke_off(server, tokens, clients):
    alice = clients['alice']
    from finetuner.data.stored.storing import save_documents

    path = server.log.parent / 'upload.docs'
    sha256 = save_documents(make_picture_docs(3, 8, size=64, seed=9), path)
    content = path.read_bytes()
    announced = {'sha256': sha256, 'num_bytes': len(content)}
    headers = bearer(tokens['alice'])

    def ask():
        return httpx.post(f'{server.url}{API}/uploads', json=announced, headers=headers).json()

    def send(offset, piece):
        params = {**announced, 'offset': offset}
        return httpx.patch(
            f'{server.url}{API}/uploads', params=params, content=piece, headers=headers
        )

    assert ask() == {'status': 'open', 'offset': 0}
    assert send(0, content[:1000]).json() == {'status': 'open', 'offset': 1000}
    answer = send(500, content[500:2000])
    assert (answer.status_code, answer.json()['error']) == (409, 'ConflictError')
    assert 'go on from there' in answer.json()['message']

    def breaks_off():
        yield content[1000:3000]
        time.sleep(1)  # what the server has not read when a connection breaks is lost
        raise RuntimeError('the client dies')

    with pytest.raises(RuntimeError):
        send(1000, breaks_off())
    deadline = time.monotonic() + 10
    while ask()['offset'] != 3000:
        assert time.monotonic() < deadline, ask()
        time.sleep(0.05)
    # another user begins at nothing, and hears of nothing
    other = httpx.post(
        f'{server.url}{API}/uploads', json=announced, headers=bearer(tokens['bob'])
    ).json()
    assert other == {'status': 'open', 'offset': 0}
    alice._server.send_file(path, sha256)
    assert ask() == {'status': 'stored', 'offset': len(content)}
    assert len(alice.load_data(f'sha256:{sha256}')) == 24
    with pytest.raises(NotFoundError):
        clients['bob'].load_data(f'sha256:{sha256}')


@pytest.mark.parametrize('what', ['another hash', 'no documents', 'a uri', 'too much'])
def test_data_that_is_not_what_it_says_is_refused(server, tokens, tmp_path, what):
    import hashlib

    from finetuner.data.stored.storing import save_documents

    path = tmp_path / 'docs'
    save_documents([Document(uri='/etc/passwd') if what == 'a uri' else Document(text=what)], path)
    content = b'pickle' * 100 if what == 'no documents' else path.read_bytes()
    sha256 = hashlib.sha256(b'other' if what == 'another hash' else content).hexdigest()
    num_bytes = len(content) - 5 if what == 'too much' else len(content)
    params = {'sha256': sha256, 'num_bytes': num_bytes, 'offset': 0}
    answer = httpx.patch(
        f'{server.url}{API}/uploads',
        params=params,
        content=content,
        headers=bearer(tokens['alice']),
    )
    assert answer.status_code == 422, answer.text
    assert answer.json()['error'] == 'DataError'
    before = httpx.post(
        f'{server.url}{API}/uploads',
        json={'sha256': sha256, 'num_bytes': num_bytes},
        headers=bearer(tokens['alice']),
    )
    assert before.json() == {'status': 'open', 'offset': 0}, 'nothing of it is kept'


# runs and their owners


def submit(client, name='run', **parameters):
    data = {'train_data': make_picture_docs(4, 4)}
    return client.fit(
        {'model': 'efficientnet-lite0', **QUICK, 'run_name': name, **parameters}, data
    )


def ended(client, name, experiment='default', seconds=120):
    deadline = time.monotonic() + seconds
    while (run := client.get_run(experiment, name))['status'] not in ('FINISHED', 'FAILED'):
        assert time.monotonic() < deadline, run
        time.sleep(0.1)
    return run


def test_nobody_sees_what_is_anothers(clients):
    alice, bob = clients['alice'], clients['bob']
    submit(alice, 'secret plans', experiment_name='merger', epochs=1)
    run = ended(alice, 'secret plans', 'merger')
    assert run['status'] == 'FINISHED', run
    assert run['owner'] == 'alice'
    alice.push_data(make_picture_docs(2, 2), 'salaries')
    going_on = {'model_artifact': run['artifact_id'], 'model_options': {}}
    asked = [
        lambda: bob.get_run('merger', 'secret plans'),
        lambda: bob.get_run('merge', 'secret plan'),
        lambda: bob.get_experiment('merge'),
        lambda: bob.load_data('salarie'),
        lambda: bob.find_artifact(run['artifact_id']),
        lambda: bob.cancel_run('merger', 'secret plans'),
        lambda: bob.delete_run('merger', 'secret plans'),
        lambda: bob.get_run_logs('merger', 'secret plans'),
        lambda: submit(bob, 'x', **going_on),
    ]
    for ask in asked:
        with pytest.raises(NotFoundError) as caught:
            ask()
        assert 'did you mean' not in str(caught.value)
    assert bob.list_experiments() == []
    assert [r['name'] for r in bob.list_runs()] == []
    assert bob._server.get('/data') == []
    assert bob._server.get('/runs/shared') == []
    assert alice.find_artifact(run['artifact_id']).is_dir()


def test_what_is_shared_is_seen_and_not_changed(clients):
    alice, bob = clients['alice'], clients['bob']
    submit(alice, 'for all', epochs=1)
    run = ended(alice, 'for all')
    with pytest.raises(NotFoundError):
        bob.find_artifact(run['artifact_id'])
    assert alice.share_run('default', 'for all', True)['public'] is True
    assert [r['name'] for r in bob._server.get('/runs/shared')] == ['for all']
    found = bob._server.get('/run', run='for all', owner='alice')
    assert found['artifact_id'] == run['artifact_id']
    assert 'Epoch' in str(bob._server.get('/run/log', run='for all', owner='alice')['lines'])
    assert (bob.find_artifact(run['artifact_id']) / 'model.safetensors').is_file()
    going_on = {'model_artifact': run['artifact_id'], 'model_options': {}, 'epochs': 1}
    assert submit(bob, 'goes on', **going_on)['status'] == 'CREATED'
    with pytest.raises(NotFoundError):
        bob.cancel_run('default', 'for all')
    with pytest.raises(NotFoundError):
        bob._server.send('DELETE', '/run', run='for all', owner='alice')
    assert ended(bob, 'goes on')['status'] == 'FINISHED'
    alice.share_run('default', 'for all', False)
    assert bob._server.get('/runs/shared') == []


def test_a_token_to_read_changes_nothing(clients):
    submit(clients['alice'], 'looked at', epochs=1)
    reader = clients['reader']
    assert reader.get_run('default', 'looked at')['name'] == 'looked at'
    for ask in (
        lambda: submit(reader, 'mine'),
        lambda: reader.cancel_run('default', 'looked at'),
        lambda: reader.delete_runs(),
        lambda: reader.push_data(make_picture_docs(2, 2), 'mine'),
        lambda: reader.create_experiment('mine'),
    ):
        with pytest.raises(ForbiddenError, match="'read'"):
            ask()
    ended(clients['alice'], 'looked at')


def test_tokens_are_made_and_ended_by_an_admin(server, clients):
    admin = clients['admin']._server
    made = admin.send('POST', '/tokens', json={'user': 'carol', 'days': 1})
    carol = RemoteClient(server.url, made['token'])
    assert carol.who()['user'] == 'carol'
    assert made['token'] not in json.dumps(admin.get('/tokens'))
    admin.send('DELETE', '/tokens', token_id=made['id'])
    with pytest.raises(ForbiddenError):
        carol.who()
    for name in ('alice', 'bob', 'reader'):
        with pytest.raises(ForbiddenError, match='admin'):
            clients[name]._server.get('/tokens')


def test_the_executors_know_who_asks(server, tokens, clients):
    submit(clients['alice'], 'asked for over jina', epochs=1)
    for protocol in ('grpc', 'http'):
        client = server.client(protocol)

        def post(name, endpoint, parameters, client=client, protocol=protocol):
            headers = bearer(tokens[name])
            extra = (
                {'metadata': tuple(headers.items())} if protocol == 'grpc' else {'headers': headers}
            )
            return client.post(endpoint, parameters=parameters, **extra)

        run = {'run': 'asked for over jina'}
        assert post('alice', '/status', run)[0].tags['run'] == 'asked for over jina'
        assert post('reader', '/status', run)[0].tags['run'] == 'asked for over jina'
        # Jina's HTTP client says this of any 404
        unknown = r'unknown (run|experiment)' if protocol == 'grpc' else 'no such endpoint'
        with pytest.raises(Exception, match=unknown):
            post('bob', '/status', run)
        with pytest.raises(Exception, match='scope'):
            post('reader', '/cancel', run)
        # whoever writes the parameter himself is found out
        forged = {**run, '__identity': 'WyJhbGljZSIsICJhZG1pbiJd.00'}
        with pytest.raises(Exception, match=unknown):
            post('bob', '/status', forged)
    ended(clients['alice'], 'asked for over jina')


def test_a_model_embeds_for_whom_it_belongs_to(server, tokens, clients):
    alice = clients['alice']
    submit(alice, 'for encoding', epochs=1)
    artifact_id = ended(alice, 'for encoding')['artifact_id']
    body = {'data': write_documents(make_picture_docs(1, 1)), 'parameters': {}}

    def encode(name, **parameters):
        body['parameters'] = parameters
        return server.post('/encode', body, headers=bearer(tokens[name]))

    assert encode('bob').status_code == 200
    mine = encode('alice', artifact=artifact_id)
    assert len(mine.json()['data'][0]['embedding']) == 1280
    # loaded by now, and still nothing that another user knows of
    other = encode('bob', artifact=artifact_id)
    assert (other.status_code, other.json()['error']) == (404, 'NotFoundError')
    assert 'for encoding' not in other.text
    alice.share_run('default', 'for encoding', True)
    assert encode('bob', artifact=artifact_id).status_code == 200
    alice.share_run('default', 'for encoding', False)


def test_an_encoder_elsewhere_fetches_its_model_with_a_token(server, tokens, clients, tmp_path):
    alice = clients['alice']
    submit(alice, 'for another machine', epochs=1)
    artifact_id = ended(alice, 'for another machine')['artifact_id']

    def flow(token):
        given = f'artifact: {artifact_id}\n      token: {token}'
        text, found = re.subn(r'artifact: efficientnet-lite0 .*', given, ENCODE_FLOW)
        assert found == 1
        return text

    elsewhere = {'FINETUNER_HOST': server.url, 'FINETUNER_TOKEN': ''}
    body = {'data': write_documents(make_picture_docs(1, 1))}
    (tmp_path / 'right').mkdir()
    with serve(flow(tokens['reader']), tmp_path / 'right', **elsewhere) as encoder:
        answer = encoder.post('/encode', body).json()
    assert len(answer['data'][0]['embedding']) == 1280
    (tmp_path / 'wrong').mkdir()
    refused = serve(flow(tokens['bob']), tmp_path / 'wrong', **elsewhere)
    with pytest.raises(AssertionError, match='there is no artifact'), refused:
        pass


def test_past_the_gateway_nobody_gets_in(server):
    import psutil
    from jina import Client

    ports = {
        connection.laddr.port
        for child in psutil.Process(server.process.pid).children(recursive=True)
        for connection in child.net_connections('tcp')
        if connection.status == 'LISTEN'
    } - {server.grpc_port, server.http_port}
    assert ports
    refused = 0
    for port in ports:
        # the encoder knows no such endpoint, and Jina passes over what an Executor does not know
        try:
            answer = Client(host='127.0.0.1', port=port).post('/runs', parameters={})
        except Exception as error:
            refused += 'gateway' in str(error)
        else:
            assert len(answer) == 0
    assert refused


def routes(server, tmp_path, monkeypatch):
    """Method and path of all routes: of the app's own table, and of the Executors' endpoints."""
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'no server'))
    dispatcher = SimpleNamespace(endpoints=None)
    door = Door(TokenCheck('x'), Limits(), None, None, None, None, dispatcher, has_runs=True)
    app = build_app(door, SimpleNamespace(close=None))
    table = {(m, route.path) for route in app.routes for m in getattr(route, 'methods', None) or ()}
    schema = httpx.get(f'{server.url}/openapi.json').json()
    told = {(m.upper(), path) for path, found in schema['paths'].items() for m in found}
    return sorted(table | told)


def test_every_route_wants_a_token(server, tmp_path, monkeypatch):
    asked = set()
    for method, path in routes(server, tmp_path, monkeypatch):
        if method in ('GET', 'HEAD') and path in (
            '/{path:path}', *_OPEN_PATHS, '/health/live', '/health/ready',
        ):  # fmt: skip
            continue
        address = server.url + re.sub(r'\{.*?\}', 'x', path)
        for headers in ({}, {'authorization': 'Bearer x'}, {'cookie': 'finetuner_token=x'}):
            headers['content-type'] = 'application/json'
            answer = httpx.request(method, address, headers=headers)
            assert answer.status_code == 401, (method, path)
        asked.add((method, path))
    changing = {each for each in asked if each[0] not in ('GET', 'HEAD')}
    assert {('POST', '/ui/run/delete'), ('DELETE', '/api/v1/runs'), ('POST', '/fit')} <= changing
    aliases = {(method, '/api/v1/aliases/{alias}') for method in ('GET', 'PUT', 'DELETE')}
    assert {*aliases, ('GET', '/api/v1/aliases')} <= asked
    assert len(changing) > 30


def test_every_route_that_changes_something_wants_the_scope_for_it(
    server, tokens, tmp_path, monkeypatch
):
    """With a token to read, whatever the request says."""
    # these change nothing of anybody's
    everywhere = ('/login', '/ui/logout', '/ui/try', '/ui/collection', '/v1/embeddings')
    reads = (
        '/encode', '/search', '/rank', '/info', '/ready', '/runs', '/status', '/logs', '/metrics', '/examples', '/artifact',
        '/post',
    )  # fmt: skip
    asked = 0
    for method, path in routes(server, tmp_path, monkeypatch):
        if method in ('GET', 'HEAD') or path in (*everywhere, *reads, '/{path:path}'):
            continue
        address = f'{server.url}{re.sub("{[a-z]+_id(:[a-z]+)?}", "1", path)}'
        answer = httpx.request(
            method, address, json={}, headers=bearer(tokens['reader']), params={'run': 'x'}
        )
        # what is wrong with a request may be said before who may send it
        assert answer.status_code in (403, 422), (method, path, answer.text)
        asked += answer.status_code == 403
    assert asked > 15


def test_a_page_of_another_server_cannot_post(server, tokens):
    headers = {**bearer(tokens['alice']), 'origin': 'http://evil.example'}
    for method, path in (
        ('POST', '/experiments'),
        ('DELETE', '/experiments'),
        ('POST', '/run/cancel?run=x'),
        ('PUT', '/data'),
    ):
        answer = httpx.request(method, f'{server.url}{API}{path}', headers=headers)
        assert answer.status_code == 403, (method, path)
        assert 'evil.example' in answer.json()['message']
    own = {**headers, 'origin': server.url}
    answer = httpx.post(f'{server.url}{API}/run/cancel?run=x', headers=own)
    assert answer.status_code == 404


@pytest.mark.parametrize('name', AWKWARD)
def test_awkward_names_stay_names(clients, name, tmp_path):
    alice = clients['alice']
    alice.create_experiment(name)
    assert alice.get_experiment(name)['name'] == name
    submit(alice, name, experiment_name=name, epochs=1)
    assert alice.get_run(name, name)['name'] == name
    with pytest.raises(ConflictError):
        submit(alice, name, experiment_name=name)
    with contextlib.suppress(ConflictError):  # it may have been quick
        alice.cancel_run(name, name)
    ended(alice, name, name)
    alice.delete_experiment(name)
    with pytest.raises(NotFoundError):
        alice.get_run(name, name)


@pytest.mark.parametrize('name', ['x' * 300, '😀' * 300, ' x', 'a\nb', '\u202e', ''])
def test_names_that_cannot_be(clients, name):
    for ask in (
        lambda: clients['alice'].create_experiment(name),
        lambda: submit(clients['alice'], 'fine', experiment_name=name),
        lambda: clients['alice'].push_data(make_picture_docs(1, 1), name),
    ):
        with pytest.raises(ConfigError):
            ask()


def test_three_hundred_names(clients):
    bob = clients['bob']
    names = [f'experiment {i}' for i in range(300)]
    for name in names:
        bob.create_experiment(name)
    listed = [each['name'] for page in (1, 2, 3) for each in bob.list_experiments(page, 100)]
    assert listed == names[::-1]
    with pytest.raises(NotFoundError, match="did you mean 'experiment 7'"):
        bob.get_experiment('experiment_7')
    assert {each['name'] for each in bob.delete_experiments()} >= set(names)
    assert bob.list_experiments() == []


def test_errors_are_the_ones_of_a_local_run(clients):
    alice = clients['alice']
    with pytest.raises(ConfigError, match='epochs'):
        submit(alice, epochs=0)
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        submit(alice, epoch=1)
    with pytest.raises(ConfigError, match='unknown loss'):
        submit(alice, loss='TripletMarginLos')
    with pytest.raises(ConfigError, match='reads no file that a request names'):
        submit(alice, model_options={'weights': '/etc/passwd'})
    with pytest.raises(NotFoundError, match="'nobody'"):
        alice.get_run('default', 'nobody')
    with pytest.raises(ConfigError, match='page'):
        alice.list_runs(page=0)
    answer = alice._server._http.get('/run')
    assert (answer.status_code, answer.json()['error']) == (422, 'ConfigError')
    assert 'run' in answer.json()['message']


# names for artifacts


def named_models(client) -> list:
    """What a client is told of names for the model of its run `named`, moved about."""
    artifact_id = ended(client, 'named', 'emoji')['artifact_id']

    def plain(found):
        if isinstance(found, list):
            return [plain(each) for each in found]
        if found is None:
            return None
        assert found.pop('updated_at') > '2024'
        return {**found, 'artifact_id': found['artifact_id'] == artifact_id}

    def refusal(ask, *arguments):
        with pytest.raises((ConfigError, ConflictError, NotFoundError)) as caught:
            ask(*arguments)
        return type(caught.value).__name__, str(caught.value).replace(artifact_id, 'the id')

    told = [client.resolve_artifact(name) == artifact_id for name in ('emoji@latest', artifact_id)]
    told += [plain(client.set_alias('emoji@production', artifact_id))]
    told += [plain(client.set_alias('emoji@production', 'emoji@latest'))]
    for name in AWKWARD:
        told += [plain(client.set_alias(f'{name}@{name}', artifact_id))]
        told += [client.resolve_artifact(f'{name}@{name}') == artifact_id]
    told += [plain(client.list_aliases())]
    told += [client.find_artifact('emoji@production') == client.find_artifact(artifact_id)]
    told += [
        refusal(client.delete_run, 'emoji', 'named'),
        refusal(client.delete_runs, 'emoji'),
        refusal(client.delete_experiment, 'emoji'),
        refusal(client.set_alias, 'emoji@latest', artifact_id),
        refusal(client.set_alias, 'emoji', artifact_id),
        refusal(client.set_alias, 'x' * 201 + '@v1', artifact_id),
        refusal(client.set_alias, 'emoji@v1', '0' * 24)[0],
        refusal(client.set_alias, 'emoji@v1', 'emoji@v2'),
        refusal(client.delete_alias, 'emoji@productoin'),
        refusal(client.find_artifact, 'emoji@productoin'),
        refusal(client.resolve_artifact, 'emoij@latest'),
        refusal(client.resolve_artifact, ''),
        refusal(client.resolve_artifact, '0' * 24)[0],
    ]
    for name in AWKWARD:
        told += [client.delete_alias(f'{name}@{name}')]
    return [*told, client.delete_alias('emoji@production'), client.list_aliases()]


def test_names_for_artifacts_are_the_same_here_and_there(clients, tmp_path):
    # nobody else's names are known to her, and so suggested
    erin = clients['erin']
    here = LocalClient(Settings.from_environment(tmp_path / 'here'))
    for client in (erin, here):
        submit(client, 'named', experiment_name='emoji', epochs=1)
    assert named_models(here) == named_models(erin)
    here.close()


def test_whatever_takes_an_artifact_takes_its_alias(server, tokens, clients, tmp_path, monkeypatch):
    alice = clients['alice']
    submit(alice, 'first', experiment_name='series', epochs=1)
    first = ended(alice, 'first', 'series')['artifact_id']
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    finetuner.login(host=server.url, token=tokens['alice'])
    run = finetuner.get_run('first', 'series')
    assert finetuner.set_alias('series@production', run)['artifact_id'] == first
    assert [each['alias'] for each in finetuner.list_aliases()] == ['series@production']
    assert finetuner.get_model('series@latest').dimension == 1280
    fetched = finetuner.api.find_artifact('series@production')
    assert fetched.name == first
    # what the name stood for is written down
    going_on = {'model_artifact': 'series@latest', 'model_options': {}, 'epochs': 1}
    assert (
        submit(alice, 'second', experiment_name='series', **going_on)['config']['model_artifact']
        == first
    )
    second = ended(alice, 'second', 'series')
    assert second['status'] == 'FINISHED', second
    assert alice.resolve_artifact('series@latest') == second['artifact_id']
    assert alice.resolve_artifact('series@production') == first
    # over Jina as well
    answer = server.client('grpc').post(
        '/fit',
        make_picture_docs(4, 4),
        parameters={
            **QUICK,
            **going_on,
            'run_name': 'third',
            'experiment_name': 'series',
            'total': 16,
        },
        metadata=tuple(bearer(tokens['alice']).items()),
        request_size=-1,
    )
    assert answer[0].tags['run'] == 'third'
    third = ended(alice, 'third', 'series')
    assert third['config']['model_artifact'] == second['artifact_id']
    finetuner.delete_alias('series@production')
    assert finetuner.list_aliases() == []


def test_an_alias_in_a_request_is_no_path(server, clients):
    """A file on the server that has the name of an alias is not opened."""
    place = server.log.parent / 'home@tokens'
    place.mkdir(exist_ok=True)
    alice = clients['alice']
    for name in (str(place), f'../{place.parent.name}/home@tokens'):
        with pytest.raises(NotFoundError, match='unknown alias'):
            submit(alice, 'no', model_artifact=name, model_options={})


def test_names_for_artifacts_are_their_owners(server, tokens, clients):
    alice, bob = clients['alice'], clients['bob']
    submit(alice, 'mine', experiment_name='ours', epochs=1)
    run = ended(alice, 'mine', 'ours')
    alice.set_alias('ours@v1', run['artifact_id'])
    assert clients['reader'].resolve_artifact('ours@v1') == run['artifact_id']
    for ask in (
        lambda: clients['reader'].set_alias('ours@v2', run['artifact_id']),
        lambda: clients['reader'].delete_alias('ours@v1'),
    ):
        with pytest.raises(ForbiddenError, match="'read'"):
            ask()

    def theirs(name):
        path = f'{API}/aliases/{name}' if name else f'{API}/aliases'
        return httpx.get(
            server.url + path, params={'owner': 'alice'}, headers=bearer(tokens['bob'])
        )

    for ask in (
        lambda: bob.resolve_artifact('ours@v1'),
        lambda: bob.resolve_artifact('ours@latest'),
        lambda: bob.resolve_artifact(run['artifact_id']),
        lambda: bob.set_alias('my@v1', run['artifact_id']),
        lambda: bob.delete_alias('ours@v1'),
    ):
        with pytest.raises(NotFoundError) as caught:
            ask()
        assert 'did you mean' not in str(caught.value)
    assert theirs('').json() == []
    assert theirs('ours@latest').status_code == 404
    alice.share_run('ours', 'mine', True)
    assert theirs('').json()[0]['run'] == 'mine'
    assert theirs('ours@latest').json()['artifact_id'] == run['artifact_id']
    assert bob.set_alias('my@v1', run['artifact_id'])['experiment'] == 'ours'
    assert bob.find_artifact('my@v1').name == run['artifact_id']
    alice.share_run('ours', 'mine', False)
    with pytest.raises(NotFoundError, match='not shared any more'):
        bob.resolve_artifact('my@v1')
    alice.delete_alias('ours@v1')
    alice.delete_run('ours', 'mine')
    bob.delete_alias('my@v1')


# logs as they come


def test_a_log_is_streamed_as_it_grows_and_goes_on(server, tokens, clients):
    alice = clients['alice']
    submit(alice, 'streamed', epochs=2)
    seen, times = [], []
    for line in alice.stream_run_logs('default', 'streamed'):
        seen.append(line)
        times.append(time.monotonic())
    assert times[-1] - times[0] > 0.5, 'not all at once'
    assert '\n'.join(seen) == alice.get_run_logs('default', 'streamed')
    headers = {**bearer(tokens['alice']), 'last-event-id': '0'}
    url = f'{server.url}{API}/run/events'
    events = httpx.get(url, params={'run': 'streamed'}, headers=headers).text
    ids = [int(line[4:]) for line in events.splitlines() if line.startswith('id: ')]
    assert len(ids) == len(seen)
    headers['last-event-id'] = str(ids[-3])
    rest = httpx.get(url, params={'run': 'streamed'}, headers=headers).text
    assert [line for line in rest.splitlines() if line.startswith('id: ')] == [
        f'id: {number}' for number in ids[-2:]
    ]
    assert 'event: end\ndata: {"status": "FINISHED"' in rest
    assert httpx.get(url, params={'run': 'nobody'}, headers=headers).status_code == 404


def test_a_waiting_run_is_cancelled_by_its_user(clients):
    alice = clients['alice']
    submit(alice, 'long', epochs=500)
    submit(alice, 'waits', epochs=1)
    assert alice.get_run_status('default', 'waits')['status'] == 'CREATED'
    assert alice.cancel_run('default', 'waits')['details'] == 'cancelled'
    deadline = time.monotonic() + 60
    while alice.get_run_status('default', 'long')['status'] != 'STARTED':
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    assert alice.cancel_run('default', 'long')['details'] == 'cancelled'
    assert time.monotonic() - began < 2.5
    assert alice.resume_run('default', 'waits')['status'] == 'CREATED'
    assert ended(alice, 'waits')['status'] == 'FINISHED'


def test_an_artifact_goes_on_where_it_broke_off(clients):
    alice = clients['alice']
    submit(alice, 'fetched', epochs=1)
    artifact_id = ended(alice, 'fetched')['artifact_id']
    directory = alice.find_artifact(artifact_id)
    weights = directory / 'model.safetensors'
    whole = weights.read_bytes()
    manifest = json.loads((directory / 'artifact.json').read_text())
    sha256 = manifest['files']['model.safetensors']
    weights.unlink()
    partial = weights.with_name(f'.model.safetensors.{sha256[:16]}.part')
    partial.write_bytes(whole[:100_000])
    alice.find_artifact(artifact_id)
    assert weights.read_bytes() == whole
    assert not partial.exists()
    # a part that is wrong is not taken for right
    weights.unlink()
    partial.write_bytes(b'x' * 100_000)
    with pytest.raises(finetuner.excepts.DataError, match='another hash'):
        alice.find_artifact(artifact_id)
    alice.find_artifact(artifact_id)
    assert weights.read_bytes() == whole


def test_a_server_that_ends_has_its_runs_go_on_with_the_next(tmp_path, tokens):
    folder = tmp_path / 'server'
    folder.mkdir()
    with serve(FLOW, folder, FINETUNER_TOKEN='machine') as first:
        client = RemoteClient(first.url, 'machine', Settings.from_environment(tmp_path / 'c'))
        # cancelled in the end: it should not end by itself before
        submit(client, 'goes on', epochs=1000)
        deadline = time.monotonic() + 90
        while not client.get_run('default', 'goes on')['progress'].get('epoch'):
            assert time.monotonic() < deadline, client.get_run_logs('default', 'goes on')
            time.sleep(0.1)
    with store_of(first) as store:
        waiting = store.workspace.runs.get_run('default', 'goes on')
        assert (waiting.status, waiting.queue) == ('CREATED', 'WAITING'), waiting
        assert 'goes on from its last checkpoint' in store.get_run_logs('default', 'goes on')
    with serve(FLOW, folder, FINETUNER_TOKEN='machine') as second:
        client = RemoteClient(second.url, 'machine', Settings.from_environment(tmp_path / 'c'))
        deadline = time.monotonic() + 90
        while 'Going on from the checkpoint' not in client.get_run_logs('default', 'goes on'):
            assert time.monotonic() < deadline, client.get_run_logs('default', 'goes on')
            time.sleep(0.1)
        client.cancel_run('default', 'goes on')
