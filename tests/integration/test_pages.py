"""The pages over HTTP, without a browser: what they show, whom they let in, how fast they are."""

import re
import statistics
import time
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from finetuner.config import RunConfig, Settings
from finetuner.excepts import ConflictError
from finetuner.remote import RemoteClient
from finetuner.runs.records import LogLine, ProcessMark
from finetuner.runs.store import RunStore
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.conftest import make_picture_docs, png
from tests.integration.serving import REPOSITORY, serve

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
EVIL = '<script>alert(1)</script>\'"&'
PLACES = ['/ui/runs', '/ui/experiments', '/ui/data', '/ui/shared', '/ui/submit']


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    home = tmp_path_factory.mktemp('server') / 'home'
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    made = {name: store.create(name)[0] for name in ('alice', 'bob', 'many')}
    return {**made, 'reader': store.create('alice', 'read')[0], 'home': str(home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


def browser(server, token: str | None = None, **headers: str) -> httpx.Client:
    """What a browser sends: it wants pages, and its requests say where they come from."""
    cookies = {} if token is None else {'finetuner_token': token}
    headers = {'accept': 'text/html', 'origin': server.url, **headers}
    return httpx.Client(base_url=server.url, cookies=cookies, headers=headers, timeout=120)


@pytest.fixture
def alice(server, tokens):
    with browser(server, tokens['alice']) as client:
        yield client


@pytest.fixture(scope='module')
def finished(server, tokens, tmp_path_factory):
    """A finished run of alice with everything that a page can show."""
    client = RemoteClient(
        server.url, tokens['alice'], Settings.from_environment(tmp_path_factory.mktemp('c'))
    )
    client.push_data(make_picture_docs(6, 4), 'colours')
    client.push_data(make_picture_docs(6, 2, seed=1), 'queries')
    evaluation = {'name': 'EvaluationCallback', 'options': {'limit': 3, 'gather_examples': True}}
    parameters = {
        'model': 'efficientnet-lite0',
        'model_options': {'input_size': 32},
        'epochs': 2,
        'batch_size': 8,
        'num_workers': 0,
        'device': 'cpu',
        'run_name': 'all there',
        'description': EVIL,
        'callbacks': [evaluation],
    }
    data = {
        'train_data': 'colours',
        'callbacks.0.query_data': 'queries',
        'callbacks.0.index_data': 'colours',
    }
    client.fit(parameters, data)
    for _ in client.stream_run_logs('default', 'all there'):
        pass
    assert client.get_run_status('default', 'all there')['status'] == 'FINISHED'
    return {'experiment': 'default', 'run': 'all there'}


class Checked(HTMLParser):
    """Collects what a page opens, and checks that each element is closed."""

    VOID = ('meta', 'link', 'input', 'br', 'img', 'hr', 'option')

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert not [name for name in given if name.startswith('on')], 'no scripts in attributes'
        for name in ('href', 'src', 'action', 'hx-get', 'hx-post'):
            if given.get(name):
                self.links.append(given[name])
        if tag == 'script':
            self.scripts.append(given.get('src') or given.get('type'))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(answer: httpx.Response, status: int = 200) -> Checked:
    assert answer.status_code == status, answer.text
    assert answer.headers['content-type'].startswith('text/html')
    assert "default-src 'self'" in answer.headers['content-security-policy']
    assert answer.headers['x-content-type-options'] == 'nosniff'
    page = Checked(answer.text)
    assert page.open == []
    return page


@pytest.mark.parametrize('place', PLACES)
def test_every_page_opens_and_asks_no_other_server(alice, place):
    page = read(alice.get(place))
    for link in page.links:
        assert link.startswith('/') or link in ('data:,', '#main'), link
    assert page.scripts == ['/static/htmx.min.js', '/static/uplot.min.js', '/static/app.js']
    for link in page.links:
        if link.startswith('/static'):
            assert alice.get(link).status_code == 200


def test_a_browser_is_led_to_the_pages_and_a_program_is_not(alice, server):
    assert alice.get('/').headers['location'] == '/ui/runs'
    assert httpx.get(f'{server.url}/').json()['name'] == 'finetuner'


def test_without_a_token_there_is_the_login_and_nothing_else(server, tokens):
    with browser(server) as client:
        for place in PLACES:
            answer = client.get(place)
            assert (answer.status_code, answer.headers['location']) == (303, '/login')
        read(client.get('/login'))
        refused = client.post('/login', data={'token': 'ft_wrong'})
        page = read(refused, 401)
        assert 'lets nobody in' in refused.text
        assert page
        for place in ('/ui/run/cancel?run=x', '/ui/submit', '/ui/data', '/ui/logout'):
            assert client.post(place).status_code == 401
        answer = client.post('/login', data={'token': f' {tokens["bob"]} '})
        assert answer.headers['location'] == '/ui/runs'
        cookie = answer.headers['set-cookie']
        assert 'HttpOnly' in cookie
        assert 'samesite=strict' in cookie.lower()
        assert '>bob' in client.get('/ui/runs').text.replace(' ', '').replace('\n', '')
        client.post('/ui/logout')
        assert client.get('/ui/runs').status_code == 303


def test_a_page_of_another_server_cannot_post(server, tokens):
    with browser(server, tokens['alice'], origin='http://evil.example') as client:
        for place in ('/ui/run/delete?run=x', '/ui/submit', '/ui/data', '/login'):
            assert client.post(place, data={'x': 'y'}).status_code == 403


def test_a_token_to_read_looks_and_does_not_touch(server, tokens, finished):
    with browser(server, tokens['reader']) as client:
        read(client.get('/ui/run', params=finished))
        for place in ('/ui/run/delete', '/ui/run/share?public=yes', '/ui/run/resume'):
            read(client.post(place, params={**finished, 'public': 'yes'}), 403)
        read(client.post('/ui/submit', data={'train_data': 'colours'}), 403)


def test_a_finished_run_shows_all_that_is_known(alice, finished):
    answer = alice.get('/ui/run', params=finished)
    page = read(answer)
    text = answer.text
    assert 'What fine-tuning changed' in text
    assert (
        len(re.findall(r'<td class="number">0\.\d{3}</td>|<td class="number">1\.000</td>', text))
        >= 12
    )
    assert re.search(r'p = 0\.\d{3}|p &lt; 0\.001', text)
    thumbnails = [link for link in page.links if link.startswith('/ui/thumbnail')]
    assert len(thumbnails) > 20
    picture = alice.get(thumbnails[0])
    assert picture.content[:4] == b'\x89PNG'
    assert picture.headers['content-type'] == 'image/png'
    assert 'tile right' in text
    assert 'Epoch 2/2 done' in text
    assert 'TripletMarginLoss' in text or 'MultiSimilarityLoss' in text
    curves = alice.get('/api/v1/run/curves', params=finished).json()
    assert {'loss', 'learning_rate'} <= set(curves)


def test_what_users_write_stays_text(alice, server, tokens, finished):
    page = alice.get('/ui/run', params=finished).text
    assert '<script>alert' not in page
    assert '&lt;script&gt;alert(1)&lt;/script&gt;&#39;&#34;&amp;' in page
    client = RemoteClient(server.url, tokens['alice'])
    client.create_experiment(EVIL)
    experiments = alice.get('/ui/experiments')
    read(experiments)
    assert '<script>alert' not in experiments.text
    missing = alice.get('/ui/run', params={'run': EVIL})
    read(missing, 404)
    assert '<script>alert' not in missing.text


def test_the_names_of_a_model_are_shown(alice, server, tokens, finished):
    client = RemoteClient(server.url, tokens['alice'])
    client.set_alias(f'{EVIL}@v1', 'default@latest')
    page = alice.get('/ui/run', params=finished)
    read(page)
    assert 'Its model is &lt;script&gt;' in page.text
    assert '@v1, default@latest</p>' in page.text
    refused = alice.post('/ui/run/delete', params=finished)
    read(refused, 409)
    assert 'still needed' in refused.text
    client.delete_alias(f'{EVIL}@v1')
    assert 'Its model is default@latest</p>' in alice.get('/ui/run', params=finished).text
    client.close()


def test_a_model_is_downloaded_as_a_zip(alice, finished):
    answer = alice.get('/ui/artifact', params=finished)
    assert answer.content[:2] == b'PK'
    assert 'all there.zip' in answer.headers['content-disposition'].replace('%20', ' ')


def test_the_map_and_what_is_nearest(alice, finished):
    deadline = time.monotonic() + 120
    while 'map-points' not in (page := alice.get('/ui/map', params=finished).text):
        assert 'error' not in page, page
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert page.count('/ui/thumbnail?') == 24
    colour = make_picture_docs(6, 4)[5]
    answer = alice.post('/ui/try', params=finished, files={'picture': ('a.png', colour.blob)})
    tiles = re.findall(r'<div class="faint">(\d), (-?\d\.\d\d)</div>', answer.text)
    assert tiles, answer.text
    assert tiles[0] == (str(int(colour.tags['finetuner_label'])), '1.00')
    cosines = [float(cosine) for _, cosine in tiles]
    assert len(cosines) == 12
    assert cosines == sorted(cosines, reverse=True)
    for files, message in (
        ({'picture': ('a.png', b'no picture')}, 'error'),
        ({'picture': ('', b'')}, 'nothing to look for'),
    ):
        assert message in alice.post('/ui/try', params=finished, files=files).text
    text = alice.post('/ui/try', params=finished, data={'text': 'red'})
    assert 'class="error"' in text.text, 'this model takes pictures'


def test_others_see_it_once_it_is_shared(alice, server, tokens, finished):
    theirs = {**finished, 'owner': 'alice'}
    with browser(server, tokens['bob']) as bob:
        read(bob.get('/ui/run', params=theirs), 404)
        assert 'all there' not in bob.get('/ui/shared').text
        assert alice.post('/ui/run/share', params={**finished, 'public': 'yes'}).status_code == 303
        assert 'all there' in bob.get('/ui/shared').text
        page = bob.get('/ui/run', params=theirs)
        read(page)
        assert 'Delete' not in page.text
        assert '/ui/thumbnail' not in page.text, 'the data is not shared with the run'
        read(bob.post('/ui/run/delete', params=theirs), 404)
        alice.post('/ui/run/share', params={**finished, 'public': 'no'})
        read(bob.get('/ui/run', params=theirs), 404)


def test_submitted_by_the_form_watched_and_cancelled(alice, finished):
    form = {
        'model': 'efficientnet-lite0',
        'train_data': 'colours',
        'query_data': 'queries',
        'index_data': 'colours',
        'epochs': '300',
        'run_name': 'by the form',
        'experiment_name': 'default',
    }
    for wrong, message in (
        ({'epochs': 'many'}, 'it takes a number'),
        ({'train_data': ''}, 'choose what to train on'),
        ({'loss': 'TripletMarginLos'}, 'did you mean'),
        ({'model': '/etc/passwd'}, 'unknown model'),
    ):
        answer = alice.post('/ui/submit', data={**form, **wrong})
        read(answer, 422)
        assert message in answer.text
        assert 'value="by the form"' in answer.text, 'what was typed is not lost'
    answer = alice.post('/ui/submit', data=form)
    assert answer.status_code == 303, answer.text
    place = {'experiment': 'default', 'run': 'by the form'}
    page = alice.get(answer.headers['location'])
    read(page)
    assert 'data-after' in page.text
    rows = alice.get('/ui/runs?rows=1')
    assert 'by the form' in rows.text
    assert '<html' not in rows.text
    question = alice.get('/ui/confirm/cancel', params=place)
    assert 'Yes, cancel' in question.text
    action = next(
        link for link in Checked(question.text).links if link.startswith('/ui/run/cancel')
    )
    assert alice.post(action).status_code == 303
    ended = alice.get('/ui/run', params=place)
    assert 'cancelled' in ended.text
    assert alice.post('/ui/run/delete', params=place).headers['location'] == '/ui/runs'
    read(alice.get('/ui/run', params=place), 404)


def test_data_is_stored_by_the_form(alice, tmp_path):
    import zipfile

    folder = tmp_path / 'pictures.zip'
    with zipfile.ZipFile(folder, 'w') as archive:
        for doc in make_picture_docs(3, 2):
            archive.writestr(f'class {int(doc.tags["finetuner_label"])}/{doc.id}.png', doc.blob)
    answer = alice.post(
        '/ui/data',
        data={'name': 'zipped'},
        files={'file': ('x.zip', folder.read_bytes())},
    )
    assert answer.status_code == 303, answer.text
    csv = 'a text,1\nanother text,1\nsomething else,2\n'
    answer = alice.post(
        '/ui/data', data={'name': 'texts', 'labeled': 'yes'}, files={'file': ('x.csv', csv)}
    )
    assert answer.status_code == 303, answer.text
    listed = alice.get('/ui/data').text
    assert 'zipped' in listed
    assert 'texts' in listed
    for name, content, message in (
        ('x.exe', b'MZ', 'allowed are files'),
        ('x.zip', b'PK no zip', ''),
        ('x.csv', b'/etc/passwd.png,1\n/etc/shadow.png,2\n', 'opens no uri'),
        ('x.docs', b'nothing', ''),
    ):
        answer = alice.post('/ui/data', data={'name': 'bad'}, files={'file': (name, content)})
        read(answer, 422)
        assert message in answer.text, answer.text
    assert '>bad<' not in alice.get('/ui/data').text


def test_two_runs_are_compared(alice, server, tokens, finished):
    client = RemoteClient(server.url, tokens['alice'])
    parameters = {**client.get_run('default', 'all there')['config'], 'run_name': 'other'}
    data = {'train_data': 'colours'}
    for name in ('train_data', 'callbacks', 'epochs'):
        parameters.pop(name)
    client.fit({**parameters, 'epochs': 1}, data)
    for _ in client.stream_run_logs('default', 'other'):
        pass
    runs = [f'default\t{name}' for name in ('all there', 'other')]
    answer = alice.get('/ui/compare', params={'run': runs})
    read(answer)
    assert '<td>epochs</td><td>2</td><td>1</td>' in answer.text
    assert 'recall_at_k' in answer.text
    read(alice.get('/ui/compare', params={'run': runs[:1]}), 422)


def test_a_thousand_runs_are_listed_at_once(server, tokens):
    """A page of them under 300 ms."""
    store = RunStore(open_database(f'sqlite:///{tokens["home"]}/finetuner.db'), 'many')
    config = RunConfig(train_data='sha256:00')
    mark = ProcessMark(1, 'x')
    for i in range(1_000):
        run = store.create_run(config, f'run {i}', mark, 'another-host')
        store.mark_failed(run.id, 'why')
    with browser(server, tokens['many']) as client:
        times = []
        for page in (1, 2, 10, 19, 20):
            began = time.perf_counter()
            answer = client.get(f'/ui/runs?page={page}')
            times.append(time.perf_counter() - began)
            assert answer.text.count('status FAILED') == 50
    assert statistics.median(times) < 0.3, times


def test_a_log_line_of_ten_megabytes(server, tokens):
    store = RunStore(open_database(f'sqlite:///{tokens["home"]}/finetuner.db'), 'many')
    run = store.create_run(RunConfig(train_data='x'), 'long line', ProcessMark(1, 'x'), 'far')
    line = LogLine(datetime.now(timezone.utc), 'INFO', 'x' * 10_000_000)
    store.record(run.id, [line] * 3)
    with browser(server, tokens['many']) as client:
        answer = client.get('/ui/run', params={'run': 'long line'})
        read(answer)
        assert len(answer.content) < 1_000_000
        assert 'more characters' in answer.text
    store.mark_failed(run.id, 'why')
    with pytest.raises(ConflictError):
        store.create_run(RunConfig(train_data='x'), 'long line', ProcessMark(1, 'x'), 'far')


def test_pictures_are_shown_to_their_owner_alone(server, tokens, finished):
    assert png
    with browser(server, tokens['bob']) as bob:
        for reference in ('colours', 'sha256:' + '0' * 64):
            read(bob.get('/ui/thumbnail', params={'reference': reference, 'position': 0}), 404)
    with browser(server, tokens['alice']) as alice:
        read(alice.get('/ui/thumbnail', params={'reference': 'colours', 'position': 99}), 404)
