"""Collections and those who mean harm, or take no care; the last test prints the table of it.

`python -m pytest tests/integration/test_hostile_collections.py -s` shows it; see `test_hostile.py`. It
is kept in `build/hostile-collections.txt`. Everything is asked of a real server, whose collections are
in SQLite and then in PostgreSQL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.collections import Raster, create_from_geojson
from finetuner.data.stored import storing
from finetuner.data.stored.storing import save_documents
from finetuner.excepts import ConfigError, DataError
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration import hostile_collections as hostile
from tests.integration.hostile_clients import family, memory
from tests.integration.hostile_table import MEGABYTE, NO_WARNINGS, Table
from tests.integration.serving import REPOSITORY, serve
from tests.postgresql import INSTALLED, REASON, postgresql

TABLE = Table()
pytestmark = NO_WARNINGS
FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
SIZE = [hostile.HEIGHT, hostile.WIDTH]
GOOD = {'image': hostile.PICTURE, 'label': 'a'}
# nothing of it has to do with the database
ON_SQLITE = pytest.mark.parametrize('site', ['sqlite'], indirect=True)
# what people may be told
CLEAR = (400, 404, 405, 409, 413, 422)


class Site:
    """A server of collections, its users, and what was tried on it."""

    def __init__(self, running, tokens, home, database):
        self.running, self.tokens, self.home, self.database = running, tokens, home, database
        self.http = httpx.Client(base_url=running.url, timeout=60)
        self.counts = Counter()

    def ask(self, method, path, user='alice', http=None, **options):
        headers = dict(options.pop('headers', {}))
        if user is not None:
            headers['authorization'] = f'Bearer {self.tokens[user]}'
        path = path if path.startswith('/ui') else f'/api/v1{path}'
        return (http or self.http).request(method, path, headers=headers, **options)

    def post(self, path, body, **options):
        """Send JSON as it is."""
        headers = {'content-type': 'application/json'}
        return self.ask(
            options.pop('method', 'POST'), path, content=body, headers=headers, **options
        )

    def attempt(self, answer, may_pass=True):
        """Count an answer, which is a refusal in clear words or a success, and never long in coming."""
        asked = answer.request
        told = f'{asked.method} {str(asked.url)[:200]} {asked.content[-200:]!r}'
        told = f'{told}: {answer.status_code} {answer.text[:300]}'
        assert answer.status_code < 300 or answer.status_code in CLEAR, told
        assert may_pass or answer.status_code >= 400, told
        assert answer.elapsed.total_seconds() < 20, told
        if answer.status_code >= 400:
            assert len(answer.content) < 30_000, told
            assert 'Traceback' not in answer.text, told
            assert str(self.home) not in answer.text, told
        self.counts['survived' if answer.status_code < 300 else 'refused'] += 1
        return answer

    def row(self, what, process):
        found, self.counts = self.counts, Counter()
        TABLE.add(
            f'{what} ({self.database})', found.total(), found['refused'], found['survived'], process
        )

    def make(self, **options):
        """A new collection; its number."""
        body = {'name': uuid.uuid4().hex, 'tile_size': SIZE, **options}
        answer = self.ask('POST', '/data', json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()['data']['id']

    def add(self, number, label='"a"', image=hostile.PICTURE):
        body = f'{{"datapoints":[{{"image":"{image}","label":{label}}}]}}'
        return self.post(f'/data/{number}/datapoints', body)

    def pairs(self, number):
        return self.ask('GET', f'/data/{number}/datapoints', params={'kept': True}).json()

    def upload(self, content):
        """Send a file of Documents; its name, or why there is none."""
        sha256 = hashlib.sha256(content).hexdigest()
        place = {'sha256': sha256, 'offset': 0, 'num_bytes': len(content)}
        answer = self.ask('PATCH', '/uploads', params=place, content=content)
        return f'sha256:{sha256}' if answer.status_code == 200 else answer

    def add_documents(self, docs, folder, **options):
        path = folder / 'documents'
        save_documents(DocumentArray(docs), path)
        name = self.upload(path.read_bytes())
        if not isinstance(name, str):
            return name
        number = self.make(**options)
        body = json.dumps({'pairs': {'documents': name}})
        return self.post(f'/data/{number}/datapoints', body)

    def check_everything_is_read(self):
        """What was taken can be told: by lists, one by one, as pictures and as pages."""
        offset = 0
        while found := self.ask('GET', '/search', params={'offset': offset, 'limit': 20}).json():
            for number in (each['data']['id'] for each in found):
                for path in (f'/data/{number}/datapoints', f'/ui/collection?collection={number}'):
                    assert self.ask('GET', path).status_code == 200, path
                for pair in self.pairs(number)[:2]:
                    for path in ('/datapoints/{}', '/datapoints/{}/image', '/ui/pair?pair={}'):
                        answer = self.ask('GET', path.format(pair['id']))
                        assert answer.status_code == 200, (path, answer.text)
            offset += len(found)
        return offset


@pytest.fixture(scope='module', params=['sqlite', 'postgresql'])
def site(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f'hostile-{request.param}')
    variables = {'FINETUNER_TOKEN': ''}
    url = f'sqlite:///{folder / "home" / "finetuner.db"}'
    if request.param == 'sqlite':
        yield from _served(folder, url, variables, request.param)
        return
    if not INSTALLED:
        pytest.skip(REASON)
    with postgresql() as database:
        yield from _served(
            folder,
            database.url,
            {**variables, 'FINETUNER_DATABASE_URL': database.url},
            request.param,
        )


def _served(folder, url, variables, name):
    users = {'alice': ('alice', 'write'), 'bob': ('bob', 'write'), 'reader': ('alice', 'read')}
    database = open_database(url)
    store = TokenStore(database)
    tokens = {user: store.create(*given)[0] for user, given in users.items()}
    database.close()
    with serve(FLOW, folder, **variables) as running:
        found = Site(running, tokens, folder / 'home', name)
        before = {one.pid for one in family(running.process.pid)}
        yield found
        assert {one.pid for one in family(running.process.pid)} >= before, 'a process died'
        assert 'failed: ' not in running.log.read_text(), 'something ended in 500'
        assert not list((folder / 'home').glob('collections-unsaved/*')), 'a draft is left'


# what is told of a collection


def test_new_collections(site):
    for body in hostile.new_bodies():
        site.attempt(site.post('/data', body))
    site.row('bodies of new collections', 'clear words')


def test_numbers(site):
    number = site.make()
    for each in hostile.NUMBERS:
        for method, path, body in (
            *(('GET', f'/data/{each}', None), ('GET', f'/datapoints/{each}', None)),
            *(
                ('GET', f'/data/{each}/datapoints', None),
                ('GET', f'/datapoints/{each}/image', None),
            ),
            *(('GET', f'/data/{each}/images?ids=1', None), ('GET', f'/data/{each}/releases', None)),
            ('GET', f'/data/{number}/images?ids={each}', None),
            ('DELETE', f'/data/{each}', None),
            ('DELETE', f'/datapoints/{each}', None),
            ('DELETE', f'/data/{number}/datapoints?ids={each}', None),
            ('PUT', f'/data/{each}', {'name': 'x'}),
            ('PUT', f'/data/{each}/publish', None),
            ('PUT', f'/datapoints/{each}', {'label': [1]}),
            ('POST', f'/data/{each}/datapoints', {'datapoints': [GOOD]}),
            ('POST', f'/data/{each}/releases', {'version': 'x'}),
        ):
            if each.lstrip('0') != '1':
                site.attempt(site.ask(method, path, json=body))
        for name in ('offset', 'limit', 'after'):
            site.attempt(site.ask('GET', f'/data/{number}/datapoints?{name}={each}'))
            site.attempt(site.ask('GET', f'/search?{name}={each}'))
        for path in ('collection?collection', 'pair?pair', 'collections?page'):
            site.attempt(site.ask('GET', f'/ui/{path}={each}'))
        for form in ({'page': each}, {'bad': each}, {'bad': each, 'sure': 'yes'}):
            for path in ('/ui/collection', '/ui/collection/remove'):
                form = {'collection': number, **form}
                answer = site.ask('POST', path, data=form)
                if answer.status_code != 303:
                    site.attempt(answer)
    site.row('numbers out of range, and none', '404 or 422')


def test_searches(site):
    number = site.make(description='a the x 漢')
    for text in hostile.TEXTS:
        site.attempt(site.ask('GET', '/search', params={'text': text}))
        site.attempt(site.ask('GET', '/ui/collections', params={'text': text}))
    for query in hostile.QUERIES:
        site.attempt(site.ask('GET', f'/search?{query}'))
    for group in ('%00', '%FF', 'x' * 10_000, '%ED%A0%80', 'nope'):
        site.attempt(site.ask('GET', f'/data/{number}/datapoints?group={group}'))
        site.attempt(site.ask('GET', f'/ui/collection?collection={number}&group={group}'))
        site.attempt(site.ask('GET', f'/data/name?name={group}'))
    site.row('words, boxes, groups', 'no syntax of a database')


@pytest.mark.parametrize('letter', ['a', '漢'])
def test_more_words_than_an_index_holds(site, letter):
    """PostgreSQL makes a megabyte of words at most."""
    names = [f'{letter}{i}.b.com/x' for i in range(90_000)]
    number = site.make(description=' '.join(names)[:100_000], classes=names)
    found = site.ask('GET', '/search', params={'classes': names[-1]}).json()
    assert [each['data']['id'] for each in found] == [number]
    assert site.ask('DELETE', f'/data/{number}').status_code == 204


# pairs


@ON_SQLITE
def test_pictures(site):
    number = site.make()
    for image in hostile.pictures():
        site.attempt(site.add(number, image=image), may_pass=False)
    answer = site.attempt(site.add(number, image=hostile.flat_picture(3000)), may_pass=False)
    assert '3000 x 3000' in answer.text
    assert site.ask('GET', f'/data/{number}').json()['data']['count'] == {}
    site.add(number)
    (pair,) = site.pairs(number)
    for bands in hostile.BANDS:
        site.attempt(site.ask('GET', f'/datapoints/{pair["id"]}/image?bands={bands}'), False)
    site.row('pictures, and bands of them', 'none decoded that is too large')


@ON_SQLITE
@pytest.mark.parametrize('mltype', ['classification', 'object_detection', 'segmentation'])
def test_labels(site, mltype):
    labels = {
        'classification': hostile.VECTORS,
        'object_detection': hostile.BOXES,
        'segmentation': tuple(hostile.masks()),
    }[mltype]
    fixed, mended = (site.make(mltype=mltype, classes=['a']) for _ in range(2))
    open_ = site.make(mltype=mltype)
    good = {
        'classification': '"a"',
        'object_detection': hostile.TINY_BOX,
        'segmentation': '[[0,0,0,0,0],[0,0,0,0,0],[0,0,0,0,0],[0,0,0,0,1]]',
    }[mltype]
    assert site.add(mended, good).status_code == 201
    (pair,) = site.pairs(mended)
    for label in labels:
        site.attempt(site.add(fixed, label), may_pass=False)
        site.attempt(site.add(open_, label), may_pass=label == '""' or label.startswith('{"c0"'))
        body = f'{{"label":{label}}}'
        site.attempt(site.post(f'/datapoints/{pair["id"]}', body, method='PUT'), may_pass=False)
    assert site.pairs(mended) == [pair]
    site.row(f'labels of {mltype}', 'nothing of them is kept')


@ON_SQLITE
def test_shapes_that_are_never_drawn_to_the_end(site):
    number = site.make(mltype='segmentation', tile_size=[256, 256])
    image = hostile.picture(256, 256)
    with Watch(site) as watch:
        for features in hostile.endless_shapes():
            site.attempt(site.add(number, json.dumps(features), image))
    assert watch.gap < 3, f'others waited {watch.gap:.1f} s'
    site.row('shapes that never end', f'others waited {watch.gap:.1f} s')


@ON_SQLITE
def test_coordinate_systems(site, tmp_path):
    fifo, touched = tmp_path / 'grid', []
    os.mkfifo(fifo)
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        listening.listen()
        listening.settimeout(0.2)
        place = [0.5, 0, 500_000, 0, -0.5, 4_400_000]
        for system in hostile.systems(listening.getsockname()[1], str(fifo)):
            told = {'transform': place, 'crs': system}
            site.attempt(
                site.add_documents([hostile.document(tags=told)], tmp_path), may_pass=False
            )
            raster = written_raster(tmp_path / 'plain.tif')
            with pytest.raises(ConfigError):
                raster.bounds_as(system)
            feature = json.loads(hostile.feature('{"type":"Point","coordinates":[1,1]}'))
            named = {'type': 'name', 'properties': {'name': system}}
            features = {'type': 'FeatureCollection', 'crs': named, 'features': [feature]}
            with pytest.raises(DataError):
                create_from_geojson(features, raster, 'x', (4, 4))
        with contextlib.suppress(TimeoutError):
            touched.append(listening.accept())
    assert not touched, 'a connection was opened'
    site.row('systems that open something', 'nothing was opened')


def written_raster(path, driver='GTiff', size=8):
    import rasterio

    with rasterio.open(
        path,
        'w',
        driver=driver,
        width=size,
        height=size,
        count=1,
        dtype='uint8',
        crs='EPSG:32613',
        transform=rasterio.Affine(1, 0, 500_000, 0, -1, 4_400_000),
    ) as dataset:
        dataset.write(np.ones((1, size, size), np.uint8))
    return Raster(path)


@ON_SQLITE
def test_stored_documents(site, tmp_path):
    docs = [hostile.document(tensor=tensor) for tensor in hostile.tensors()]
    docs += [hostile.document(tags=tags) for tags in hostile.tags()]
    docs += [
        Document(text='x', tags={'label': 'a'}),
        Document(uri='/etc/passwd', tags={'label': 'a'}),
        Document(blob=b'x', tags={'label': 'a'}),
        Document(tensor=np.zeros((3, *SIZE)), chunks=[Document(), Document()]),
    ]
    for doc in docs:
        site.attempt(site.add_documents([doc], tmp_path), may_pass=False)
    save_documents(DocumentArray([hostile.document()]), tmp_path / 'one')
    head = (tmp_path / 'one').read_bytes()[: storing.HEADER_BYTES]
    for record in hostile.records():
        name = site.upload(head + record)
        if isinstance(name, str):
            body = json.dumps({'pairs': {'documents': name}})
            name = site.post(f'/data/{site.make()}/datapoints', body)
        site.attempt(name, may_pass=False)
    site.row('stored Documents', 'no address and no pickle opened')


def test_lists_beside_stored_documents(site, tmp_path):
    save_documents(DocumentArray([hostile.document()]), tmp_path / 'one')
    name = site.upload((tmp_path / 'one').read_bytes())
    for more in (
        *({'sensors': [sensor]} for sensor in ('\ud800', '\0', '', hostile.LONG)),
        {'sensors': [str(i) for i in range(10_000)]},
        {'classes': ['b', 'b']},
        {'classes': []},
    ):
        body = json.dumps({'pairs': {'documents': name, **more}})
        site.attempt(site.post(f'/data/{site.make()}/datapoints', body), may_pass=False)
    # of somebody else's upload the name says nothing
    body = {'name': 'x', 'tile_size': SIZE, 'pairs': {'documents': name}}
    site.attempt(site.ask('POST', '/data', 'bob', json=body), may_pass=False)
    site.row('lists, and data of others', 'nothing of them is kept')


def test_boxes_on_both_sides_of_the_180th_meridian(site, tmp_path):
    def placed(*wests):
        places = [[0.1, 0, west, 0, -0.1, -17] for west in wests]
        tags = [{'transform': place, 'crs': 'EPSG:4326'} for place in places]
        docs = [hostile.document(tags=each) for each in tags]
        answer = site.add_documents(docs, tmp_path)
        assert answer.status_code == 201, answer.text
        return answer.json()['data']

    fiji, plain = placed(179, -179.5), placed(10, 12)
    assert fiji['bbox'] == pytest.approx([179, -17.4, -179, -17])
    assert plain['bbox'] == pytest.approx([10, -17.4, 12.5, -17])
    for box, expected in {
        '179.2,-20,179.4,0': {fiji['id']},
        '-180,-20,-179.9,0': {fiji['id']},
        '178,-20,-178,0': {fiji['id']},
        '11,-20,-179.8,0': {fiji['id'], plain['id']},
        '-179.6,-20,11,0': {fiji['id'], plain['id']},
        '0,-20,20,0': {plain['id']},
        '20,-20,-180,0': {fiji['id']},
        '-170,-20,0,0': set(),
        '170,-20,178,0': set(),
        '170,-10,-170,0': set(),
        '-180,-90,180,90': {fiji['id'], plain['id']},
    }.items():
        found = {each['data']['id'] for each in site.ask('GET', f'/search?bbox={box}').json()}
        assert found & {fiji['id'], plain['id']} == expected, box


# how much


class Watch:
    """How long others wait meanwhile, and how much more memory the server takes."""

    def __init__(self, site):
        self.site, self.gap, self.grown, self._is_over = site, 0.0, 0, False

    def __enter__(self):
        self._first = memory(self.site.running.process.pid)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over = True
        self._thread.join()

    def _look(self):
        with httpx.Client(base_url=self.site.running.url, timeout=60) as client:
            while not self._is_over:
                begun = time.monotonic()
                assert client.get('/health/live').status_code == 200
                self.gap = max(self.gap, time.monotonic() - begun)
                now = memory(self.site.running.process.pid) - self._first
                self.grown = max(self.grown, now)
                time.sleep(0.05)


@ON_SQLITE
def test_floods(site):
    number = site.make()
    with Watch(site) as watch:
        for body in hostile.floods(4 * MEGABYTE).values():
            site.attempt(site.post('/data', body), may_pass=False)
        for body in (b'{"name":' + b' ' * (9 * MEGABYTE), b'x' * (100 * MEGABYTE)):
            assert site.attempt(site.post('/data', body), False).status_code == 413
        marks = f'collection={number}&'.encode() + b'bad=1&' * MEGABYTE
        kind = {'content-type': 'application/x-www-form-urlencoded'}
        answer = site.ask('POST', '/ui/collection', content=marks, headers=kind)
        assert site.attempt(answer, False).status_code == 413
        marks = marks[: 400 << 10]
        site.attempt(site.ask('POST', '/ui/collection', content=marks, headers=kind))
        answer = site.ask('POST', '/ui/collection/remove', content=marks, headers=kind)
        site.attempt(answer, may_pass=False)
        label = '[' + '[],' * MEGABYTE + '[]]'
        site.attempt(site.add(number, label), may_pass=False)
    assert watch.gap < 10, f'others waited {watch.gap:.1f} s'
    assert watch.grown < 1000 * MEGABYTE, f'memory grew by {watch.grown >> 20} MB'
    process = f'others waited {watch.gap:.1f} s, memory grew by {watch.grown >> 20} MB'
    site.row('floods', process)


@ON_SQLITE
def test_answers_without_end(site):
    """A pair of few bytes is told in many, and of many pairs as often."""
    many = site.make(classes=[f'{i:05}' for i in range(100_000)])
    body = json.dumps({'datapoints': [{**GOOD, 'label': '00005'}] * 1000})
    assert site.post(f'/data/{many}/datapoints', body).status_code == 201
    large = site.make(mltype='segmentation', tile_size=[5000, 5000], classes=['a'])
    image = hostile.flat_picture(5000)
    square = {'type': 'Polygon', 'coordinates': [[[0, 0], [5000, 0], [5000, 5000], [0, 0]]]}
    label = {'type': 'Feature', 'properties': {}, 'geometry': square}
    assert site.add(large, json.dumps(label), image).status_code == 201
    (pair,) = site.pairs(large)
    with Watch(site) as watch:
        for path in (
            f'/data/{many}/datapoints?limit=1000',
            f'/data/{large}/datapoints',
            f'/datapoints/{pair["id"]}',
        ):
            assert site.attempt(site.ask('GET', path), False).status_code == 413
        body = json.dumps({'label': label})
        answer = site.post(f'/datapoints/{pair["id"]}', body, method='PUT')
        assert site.attempt(answer, False).status_code == 413
        for path in (
            f'/data/{many}/datapoints?limit=20',
            f'/data/{large}/datapoints?kept=true',
            f'/ui/collection?collection={many}',
            f'/ui/pair?pair={pair["id"]}',
            f'/datapoints/{pair["id"]}/image',
        ):
            assert site.attempt(site.ask('GET', path)).status_code == 200
    assert watch.gap < 5, f'others waited {watch.gap:.1f} s'
    assert watch.grown < 1000 * MEGABYTE, f'memory grew by {watch.grown >> 20} MB'
    for number in (many, large):
        assert site.ask('DELETE', f'/data/{number}').status_code == 204
    process = f'others waited {watch.gap:.1f} s, memory grew by {watch.grown >> 20} MB'
    site.row('answers without end', process)


# at the same time


def at_once(site, number, work):
    """What several threads are answered, by method and status."""
    counts = Counter()

    def run(i):
        with httpx.Client(base_url=site.running.url, timeout=60) as http:

            def ask(method, path, user='alice', **options):
                answer = site.ask(method, path, user, http, **options)
                assert answer.status_code < 500, (method, path, answer.text)
                counts[method, answer.status_code] += 1
                return answer

            work(i, ask)

    with ThreadPoolExecutor(number) as pool:
        list(pool.map(run, range(number)))
    return counts


def test_who_appends_at_the_same_time_loses_nothing(site):
    number = site.make()
    body = {'datapoints': [GOOD] * 5}

    def work(i, ask):
        for _ in range(4):
            ask('POST', f'/data/{number}/datapoints', json=body)

    counts = at_once(site, 10, work)
    assert set(counts) <= {('POST', 201), ('POST', 429)}, counts
    saved = 5 * counts['POST', 201]
    assert site.ask('GET', f'/data/{number}').json()['data']['count'] == {'train': saved}
    assert saved, 'somebody gets on'
    site.counts.update(refused=counts['POST', 429], survived=counts['POST', 201])
    site.row('appends of one user at once', 'all or none of each is there')


def test_what_is_deleted_meanwhile_is_not_there(site):
    for seconds in (0, 0.02, 0.05, 0.1):
        number = site.make()
        site.add(number)
        (pair,) = site.pairs(number)

        def work(i, ask, number=number, pair=pair['id'], seconds=seconds):
            if i == 0:
                time.sleep(seconds)
                assert ask('DELETE', f'/data/{number}').status_code == 204
            for _ in range(4):
                if i in (1, 2):
                    ask('POST', f'/data/{number}/datapoints', json={'datapoints': [GOOD]})
                elif i in (3, 4):
                    ask('GET', f'/data/{number}/datapoints')
                    ask('GET', f'/datapoints/{pair}/image')
                    ask('GET', f'/ui/pair?pair={pair}')
                elif i == 5:
                    ask('PUT', f'/datapoints/{pair}', json={'label': [1]})
                elif i == 6:
                    ask('DELETE', f'/data/{number}/datapoints?ids={pair}')

        counts = at_once(site, 7, work)
        site.counts.update({'refused': sum(n for (_, s), n in counts.items() if s >= 400)})
        site.counts.update({'survived': sum(n for (_, s), n in counts.items() if s < 400)})
        assert site.ask('GET', f'/data/{number}').status_code == 404
    site.row('deletions under everything', 'nothing of it is there')


def test_what_is_private_again_is_seen_by_nobody(site):
    number = site.make()
    site.add(number)
    (pair,) = site.pairs(number)
    places = [
        *(f'/data/{number}', f'/data/{number}/datapoints', f'/datapoints/{pair["id"]}'),
        *(f'/datapoints/{pair["id"]}/image', f'/data/{number}/images?ids={pair["id"]}'),
        *(f'/ui/collection?collection={number}', f'/ui/pair?pair={pair["id"]}'),
        f'/data/{number}/releases',
    ]

    def work(i, ask):
        if i == 0:
            for public in (True, False) * 6:
                ask('PUT', f'/data/{number}/publish', json={'public': public})
        else:
            for place in places:
                assert ask('GET', place, 'bob').status_code in (200, 404)

    at_once(site, 4, work)
    for place in places:
        assert site.attempt(site.ask('GET', place, 'bob'), False).status_code == 404
        assert site.ask('GET', place, None, headers={'accept': '*/*'}).status_code == 401
    for place in places[3:5]:
        headers = site.ask('GET', place).headers
        assert headers['cache-control'].startswith('private')
        assert headers['vary'] == 'authorization, cookie'
    found = site.ask('GET', '/search?limit=1000', 'bob').json()
    assert number not in [each['data']['id'] for each in found]
    site.row('what was public before', 'others are told of none')


def test_strangers(site):
    number = site.make()
    site.add(number)
    (pair,) = site.pairs(number)
    form = {'collection': number, 'bad': pair['id'], 'sure': 'yes'}
    changes = [
        ('PUT', f'/data/{number}', {'json': {'name': 'z'}}),
        ('PUT', f'/data/{number}/publish', {}),
        ('DELETE', f'/data/{number}', {}),
        ('POST', f'/data/{number}/datapoints', {'json': {'datapoints': [GOOD]}}),
        ('DELETE', f'/data/{number}/datapoints?ids={pair["id"]}', {}),
        ('PUT', f'/datapoints/{pair["id"]}', {'json': {'label': [0]}}),
        ('DELETE', f'/datapoints/{pair["id"]}', {}),
        ('POST', f'/data/{number}/releases', {'json': {'version': '1'}}),
        ('POST', '/ui/collection/remove', {'data': form}),
    ]
    expected = {'bob': (404, 403), 'reader': (403,), None: (401,)}
    for public in (False, True):
        site.ask('PUT', f'/data/{number}/publish', json={'public': public})
        for user, statuses in expected.items():
            for method, path, options in changes:
                answer = site.ask(method, path, user, **options)
                assert answer.status_code in statuses, (user, method, path, answer.text)
                site.counts['refused'] += 1
    answer = site.ask(
        'POST', '/ui/collection/remove', data=form, headers={'origin': 'https://x.example'}
    )
    assert answer.status_code == 403
    assert site.pairs(number) == [pair]
    assert site.ask('GET', f'/data/{number}').json()['data']['count'] == {'train': 1}
    site.row('changes by others and by readers', 'nothing changed')


@ON_SQLITE
def test_pages_show_what_they_are_told(site):
    evil = '<script>alert(1)</script>"\'><img src=x onerror=alert(1)>{{7*7}}'
    number = site.make(name=f'{evil}{uuid.uuid4().hex}', description=evil, classes=[evil, 'b'])
    pair = {**GOOD, 'label': evil, 'group': evil}
    body = json.dumps({'datapoints': [pair]})
    assert site.post(f'/data/{number}/datapoints', body).status_code == 201
    (saved,) = site.pairs(number)
    form = {'collection': number, 'group': evil, 'bad': [saved['id']]}
    for answer in (
        site.ask('GET', f'/ui/collection?collection={number}'),
        site.ask('GET', '/ui/collection', params={'collection': number, 'group': evil}),
        site.ask('GET', '/ui/collections', params={'text': evil}),
        site.ask('GET', '/ui/collections'),
        site.ask('POST', '/ui/collection', data=form),
        site.ask('POST', '/ui/collection/remove', data=form),
    ):
        site.attempt(answer)
        for told in ('<script>alert', '<img src=x', 'onerror=alert(1)>', '>49<'):
            assert told not in answer.text
        assert "default-src 'self'" in answer.headers['content-security-policy']
    site.row('names that are scripts', 'shown as they are')


def test_what_was_taken_can_be_read(site):
    assert site.add(site.make()).status_code == 201
    assert site.check_everything_is_read()
    assert site.ask('POST', '/data', json={'name': 'still there'}).status_code == 201


# this machine


def test_a_full_disk_leaves_no_draft(tmp_path):
    code = (
        'import resource, signal, sys\n'
        'from pathlib import Path\n'
        'import numpy as np\n'
        'from finetuner.collections.draft import Draft\n'
        'from finetuner.collections.spec import CollectionSpec\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        "draft = Draft(Path(sys.argv[1]), CollectionSpec('x', tile_size=(256, 256)))\n"
        'resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n'
        'try:\n'
        '    while True:\n'
        "        draft.add(np.zeros((3, 256, 256), np.uint8), 'a')\n"
        'except OSError:\n'
        '    print(len(draft))\n'
        'draft.discard()\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'drafts')],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) == (1 << 20) // (3 * 256 * 256)
    assert list((tmp_path / 'drafts').iterdir()) == []
    TABLE.add('a disk that is full', 1, 1, 0, 'no draft is left')


def test_rasters_that_have_a_grid_opened(tmp_path):
    """The system in a file beside the pixels names a pipe, for which whoever opens it waits."""
    fifo = tmp_path / 'grid'
    os.mkfifo(fifo)
    refused = 0
    for driver, suffix in (('ENVI', '.img'), ('EHdr', '.bil'), ('SAGA', '.sdat'), ('PNG', '.png')):
        folder = tmp_path / driver
        folder.mkdir()
        path = folder / f'x{suffix}'
        written_raster(path, driver).close()
        system = (
            'GEOGCS["x",DATUM["x",SPHEROID["WGS84",6378137,298.257223563],EXTENSION["PROJ4_GRIDS",'
            f'"{fifo}"]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]]'
        )
        _write_system(folder, path, system, driver)
        for each in sorted(folder.iterdir()):
            if each.suffix in (path.suffix, '.prj', '.hdr'):
                with pytest.raises(DataError):
                    Raster(each)
                refused += 1
    TABLE.add('rasters whose system names a file', refused, refused, 0, 'nothing was opened')


def _write_system(folder: Path, path: Path, system: str, driver: str) -> None:
    header = folder / 'x.hdr'
    if driver == 'ENVI':
        kept = [line for line in header.read_text().splitlines() if 'coordinate system' not in line]
        header.write_text('\n'.join([*kept, f'coordinate system string = {{{system}}}']))
    elif driver == 'PNG':
        text = system.replace('"', '&quot;')
        beside = path.with_name(f'{path.name}.aux.xml')
        beside.write_text(f'<PAMDataset><SRS>{text}</SRS></PAMDataset>')
    else:
        path.with_suffix('.prj').write_text(system)


def test_the_table(capsys):
    TABLE.show('hostile-collections', capsys)
