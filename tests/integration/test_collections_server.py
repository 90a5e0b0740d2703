"""Collections on a server: the same class, the routes behind its links, other users."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from docarray import Document, DocumentArray
from PIL import Image

import finetuner
from finetuner.collections import TrainingSet, search
from finetuner.config import Settings
from finetuner.excepts import ConflictError, DataError, ForbiddenError, NotFoundError
from finetuner.remote import RemoteClient
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
SIZE = (16, 20)
TRANSFORM = (0.5, 0.0, 500_000.0, 0.0, -0.5, 4_400_000.0)


class Placed:
    """An image on a map, as a window of a raster is."""

    def __init__(self, pixels, frame):
        self.pixels, self.frame = pixels, frame

    def read(self):
        return self.pixels


@pytest.fixture(scope='module')
def tokens(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp('server') / 'home'
    settings = Settings.from_environment(home)
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    users = {'alice': ('alice', 'write'), 'bob': ('bob', 'write'), 'reader': ('alice', 'read')}
    made = {name: store.create(*given)[0] for name, given in users.items()}
    return {**made, 'home': str(settings.home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture
def login(server, tokens, tmp_path, monkeypatch):
    """Logs in as somebody, each on a machine of its own as it were."""

    def as_user(name: str) -> None:
        monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / name))
        finetuner.login(host=server.url, token=tokens[name])

    as_user('alice')
    yield as_user
    as_user('alice')
    for each in search():
        if each._saved.owner == 'alice':
            each.remove()
    as_user('bob')
    for each in search():
        each.remove()


@pytest.fixture
def ask(server, tokens):
    def request(method: str, path: str, user: str = 'alice', **options) -> httpx.Response:
        headers = {'authorization': f'Bearer {tokens[user]}'}
        address = f'{server.url}/api/v1{path}'
        return httpx.request(method, address, headers=headers, timeout=60, **options)

    return request


def image(seed=0, dtype=np.uint8, bands=3):
    return np.random.default_rng(seed).integers(0, 200, (bands, *SIZE)).astype(dtype)


def saved(name='set', count=6, **options):
    made = TrainingSet(name, tile_size=SIZE, **options)
    made.feed((image(i), [i % 2]) for i in range(count))
    made.save()
    return made


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(image(seed).transpose(1, 2, 0)).save(file, 'PNG')
    return file.getvalue()


def test_the_same_code_runs_against_a_server(login, server):
    made = TrainingSet('set', tile_size=SIZE, description='of random things')
    made.feed((image(i), [i % 2]) for i in range(7))
    made.feed([(png(9), [1])], group='test')
    assert made.count == {'train': 7, 'test': 1}
    document = made.save()
    assert document['data']['userId'] == 'alice'
    assert document['links']['publish'] == {
        'href': f'{server.url}/api/v1/data/{made.id}/publish',
        'method': 'PUT',
    }
    assert made.count == {'train': 7, 'test': 1}
    for opened in (
        TrainingSet.from_id(made.id),
        TrainingSet.from_name('set'),
        TrainingSet.from_doc(search('random')[0]),
    ):
        points = opened[0:8]
        for i, point in enumerate(points[:7]):
            assert (point.image.compute() == image(i)).all()
            assert point.y.tolist() == [i % 2]
        assert (points[7].image.compute() == image(9)).all()
        assert points[7].kept[0] == png(9), 'a picture stays the file it was'
        assert points[0].data['dataset_id'] == made.id
    made.feed([(image(50), [0])])
    made.save()
    made[0].update([1])
    assert made[0].y.tolist() == [1]
    made[1].remove()
    assert made.count == {'train': 7, 'test': 1}
    assert made.remove_pairs([point.id for point in made[:2]]) == 2
    made.update(name='other')
    assert [each.name for each in search()] == ['other']
    assert made.preview(count=4).width > 100
    assert len(made.to_documents('test')) == 1
    made.remove()
    assert search() == []


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32', 'int16'])
def test_all_kinds_of_pairs_travel_as_they_are(login, dtype):
    from finetuner.collections.geometry import Frame

    frame = Frame(*SIZE, TRANSFORM, 'EPSG:32613')
    pixels = image(3, dtype, 5)
    boxes = TrainingSet('boxes', 'object_detection', SIZE, classes=['car', 'boat'])
    boxes.feed([(Placed(pixels, frame), {'boat': [[1.5, 2, 3, 4]]}), (pixels, [[], []])])
    boxes.save()
    point = boxes[0]
    assert point.y == [[], [(1.5, 2.0, 3.0, 4.0)]]
    assert point.image.compute().dtype == np.dtype(dtype)
    assert (point.image.compute() == pixels).all()
    assert point.data['transform'] == list(TRANSFORM)
    assert point.data['crs'] == 'EPSG:32613'
    west, south, east, north = boxes.bbox
    assert -106 < west < east < -104
    assert 39 < south < north < 40
    assert [each.name for each in search(bbox=[-110, 35, -100, 45])] == ['boxes']
    assert search(bbox=[0, 35, 10, 45]) == []
    mask = np.zeros(SIZE, int)
    mask[2:5] = 2
    masks = TrainingSet('masks', 'segmentation', SIZE)
    masks.feed([(pixels, mask)])
    masks.save()
    assert masks[0].y.tolist() == mask.tolist()
    masks[0].update(mask.T.reshape(SIZE) * 0)
    assert masks[0].y.max() == 0


def test_classes_that_came_from_names_grow_on_the_server_too(login):
    made = TrainingSet('named', tile_size=SIZE)
    made.feed([(image(), 'cat'), (image(), 'dog')])
    made.save()
    made.feed([(image(), ['eel', 'cat'])])
    made.save()
    assert made.classes == ['cat', 'dog', 'eel']
    assert [point.present for point in made] == [['cat'], ['dog'], ['cat', 'eel']]
    one, other = TrainingSet.from_id(made.id), TrainingSet.from_id(made.id)
    one.feed([(image(), 'ant')])
    other.feed([(image(), 'bee')])
    one.save()
    with pytest.raises(ConflictError, match='open it again'):
        other.save()


def test_others_see_what_is_published_and_change_nothing(login):
    made = saved()
    login('bob')
    assert search() == []
    with pytest.raises(NotFoundError):
        TrainingSet.from_id(made.id)
    login('alice')
    TrainingSet.from_id(made.id).publish()
    login('bob')
    (found,) = search()
    assert (found[0].image.compute() == image()).all()
    for attempt in (
        found.unpublish,
        found.remove,
        lambda: found.update(name='mine'),
        lambda: found[0].update([1]),
        found[0].remove,
        lambda: found.remove_pairs([found[0].id]),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    found.feed([(image(), [1])])
    with pytest.raises(NotFoundError):
        found.save()
    saved()
    assert TrainingSet.from_name('set').id != made.id, 'his own'
    login('alice')
    TrainingSet.from_id(made.id).unpublish()
    login('bob')
    assert [each.id for each in search()] == [TrainingSet.from_name('set').id]


def test_who_may_only_read_changes_nothing(login):
    made = saved()
    login('reader')
    found = TrainingSet.from_id(made.id)
    assert found[0].y.tolist() == [0]
    for attempt in (found.publish, found.remove, found[0].remove):
        with pytest.raises(ForbiddenError):
            attempt()


def test_a_name_that_is_taken_loses_nothing(login):
    saved()
    made = TrainingSet('set', tile_size=SIZE)
    made.feed([(image(), [1])])
    with pytest.raises(ConflictError, match='there already'):
        made.save()
    made.update(name='other')
    made.save()
    assert made.count == {'train': 1}


# ---- plain HTTP


def test_the_routes_behind_the_links(login, ask):
    made = ask('POST', '/data', json={'name': 'plain', 'tile_size': list(SIZE)})
    assert made.status_code == 201
    data, links = made.json()['data'], made.json()['links']
    assert (data['status'], data['count']) == ('EMPTY', {})
    path = f'/data/{data["id"]}'
    pairs = [
        {'image': base64.b64encode(png(i)).decode(), 'label': 'shoe', 'group': 'test'}
        for i in range(3)
    ]
    answer = ask('POST', f'{path}/datapoints', json={'datapoints': pairs})
    assert answer.status_code == 201
    assert answer.json()['data']['count'] == {'test': 3}
    assert answer.json()['data']['classes'] == ['shoe']
    found = ask('GET', f'{path}/datapoints?limit=2&offset=1').json()
    assert [each['data']['label'] for each in found] == [[1], [1]]
    pair = found[0]['links']
    picture = ask('GET', httpx.URL(pair['image']['href']).path.removeprefix('/api/v1'))
    assert picture.headers['content-type'] == 'image/png'
    shown = np.asarray(Image.open(io.BytesIO(picture.content)))
    assert (shown == image(1).transpose(1, 2, 0)).all()
    number = found[0]['data']['id']
    numbers = ask('GET', f'/datapoints/{number}/image?form=npy').content
    assert (np.load(io.BytesIO(numbers)) == image(1)).all()
    assert ask('PUT', f'/datapoints/{number}', json={'label': [0]}).json()['data']['label'] == [0]
    assert ask('GET', f'/datapoints/{number}').json()['data']['label'] == [0]
    assert ask('DELETE', f'/datapoints/{number}').status_code == 204
    assert ask('GET', f'/datapoints/{number}').status_code == 404
    assert ask('PUT', path, json={'description': 'blue'}).json()['data']['description'] == 'blue'
    assert ask('PUT', f'{path}/publish').json()['data']['public'] is True
    assert ask('PUT', f'{path}/publish', json={'public': False}).json()['data']['public'] is False
    assert [each['data']['id'] for each in ask('GET', '/search?text=blue').json()] == [data['id']]
    assert ask('DELETE', path).status_code == 204
    assert ask('GET', path).status_code == 404
    assert links['delete']['method'] == 'DELETE'


@pytest.mark.parametrize(
    ('method', 'path', 'body', 'status', 'words'),
    [
        ('POST', '/data', {'name': 'x', 'mltype': 'mask'}, 422, 'unknown mltype'),
        ('POST', '/data', {'name': ''}, 422, 'name'),
        ('POST', '/data', {'name': 'x', 'tilesize': 3}, 422, 'tilesize'),
        ('POST', '/data', {'name': 'x', 'pairs': {'documents': 'sha256:0'}}, 404, 'sha256:0'),
        ('POST', '/data/{id}/datapoints', {}, 422, 'give `datapoints`'),
        (
            'POST',
            '/data/{id}/datapoints',
            {'datapoints': [{'image': '!', 'label': [1]}]},
            422,
            'pair 0: the image is no standard base64',
        ),
        (
            'POST',
            '/data/{id}/datapoints',
            {'datapoints': [{'image': 'aGVsbG8=', 'label': [1]}]},
            422,
            'pair 0: not a picture',
        ),
        ('PUT', '/data/{id}', {'name': 7}, 422, 'name'),
        ('GET', '/data/999', None, 404, 'no collection 999'),
        ('GET', '/data/{huge}', None, 404, 'no collection'),
        ('DELETE', '/data/{huge}', None, 404, 'no collection'),
        ('GET', '/data/{huge}/datapoints', None, 404, 'no collection'),
        ('GET', '/datapoints/{huge}/image', None, 404, 'no pair'),
        ('DELETE', '/datapoints/{huge}', None, 404, 'no pair'),
        ('DELETE', '/data/{id}/datapoints?ids={huge}&ids=-{huge}', None, 200, '0'),
        ('GET', '/data/{id}/datapoints?offset={huge}', None, 422, 'offset'),
        ('GET', '/data/{id}/datapoints?after={huge}', None, 422, 'after'),
        ('GET', '/data/{id}/datapoints?after=-{huge}', None, 422, 'after'),
        ('GET', '/search?offset={huge}', None, 422, 'offset'),
        ('GET', '/data/{id}/images?ids={huge}&ids=-{huge}', None, 200, ''),
        ('GET', '/data/{id}/datapoints?limit=100000', None, 422, 'limit'),
        ('GET', '/search?bbox=1,2,x', None, 422, 'numbers with commas'),
        ('GET', '/search?limit=-1', None, 422, 'limit is 1 to'),
        ('GET', '/datapoints/{pair}/image?bands=7,0,0', None, 422, 'three numbers from 0 to 2'),
        ('PUT', '/datapoints/{pair}', {'label': [1, 2, 3]}, 422, 'zeros and ones'),
    ],
)
def test_what_is_refused_over_http(login, ask, method, path, body, status, words):
    made = saved()
    path = path.format(id=made.id, pair=made[0].id, huge='9' * 20)
    answer = ask(method, path, **({} if body is None else {'json': body}))
    assert answer.status_code == status, answer.text
    assert words in answer.text
    assert made.count == {'train': 6}


def test_documents_that_are_no_pairs_are_refused_whole(login, ask, tokens, server, tmp_path):
    made = saved(classes=['one'])
    client = RemoteClient(server.url, tokens['alice'], Settings.from_environment(tmp_path / 'x'))
    good = Document(tensor=image(), tags={'label': [1]})
    for bad, words in (
        (Document(text='x', tags={'label': [1]}), 'pair 1: the Document holds no image'),
        (Document(tensor=image()), 'pair 1: the Document holds no label'),
        (Document(tensor=image(bands=4), tags={'label': [1]}), 'pair 1: the image is [4'),
        (Document(blob=b'x' * 20, tags={'label': [1], 'transform': [1] * 6}), 'pair 1: '),
        (Document(tensor=image(), tags={'label': [1], 'transform': 'x'}), 'takes six numbers'),
        (Document(tensor=image(), tags={'label': [1], 'transform': [0] * 6}), 'turned round'),
        (Document(tensor=image(), tags={'label': [1], 'group': ''}), "pair 1: group=''"),
        (Document(tensor=image(), tags={'label': {'a': 1}}), 'pair 1: a label of this'),
    ):
        reference = client.push_data(DocumentArray([good, bad]))
        body = {'pairs': {'documents': reference}}
        answer = ask('POST', f'/data/{made.id}/datapoints', json=body)
        assert answer.status_code == 422, answer.text
        assert words in answer.json()['message']
        assert made.count == {'train': 6}
    unsaved = Path(tokens['home']) / 'collections-unsaved'
    assert not list(unsaved.iterdir()), 'nothing is left of what was refused'
    client.close()


def test_the_routes_are_described(ask):
    described = ask('GET', '/openapi.json')
    paths = (
        described if described.status_code == 200 else ask('GET', '/../../openapi.json')
    ).json()
    shown = ' '.join(paths['paths'])
    for path in ('/data/{collection_id}', '/datapoints/{pair_id}/image', '/api/v1/search'):
        assert path in shown, shown


def test_a_draft_that_was_refused_may_be_mended(login):
    made = TrainingSet('set', tile_size=SIZE)
    with pytest.raises(DataError, match='pair 1'):
        made.feed([(image(), [1]), (image(bands=2), [1])])
    made.save()
    assert made.count == {'train': 1}


def test_images_travel_by_hundreds_and_what_an_answer_lacks_is_asked_for(login, ask):
    made = TrainingSet('many', tile_size=SIZE)
    images = [np.full((3, *SIZE), number, np.uint16) for number in range(450)]
    made.feed((image, [1, 0]) for image in images)
    made.save()
    ids = [point.id for point in made]
    answer = ask('GET', f'/data/{made.id}/images', params={'ids': [ids[3], ids[1], ids[2]]})
    assert answer.content == b''.join(images[number].tobytes() for number in (3, 1, 2))
    # an answer ends where a pair is not there
    answer = ask('GET', f'/data/{made.id}/images', params={'ids': [ids[0], 2**40, ids[1]]})
    assert answer.content == images[0].tobytes()
    assert ask('GET', f'/data/{made.id}/images', 'bob', params={'ids': ids[:2]}).status_code == 404
    too_many = ask('GET', f'/data/{made.id}/images', params={'ids': list(range(1001))})
    assert too_many.status_code == 422

    store, record = made._place.store, made._saved
    pairs = list(store.iter_pairs(made.id))
    assert list(store.read_images(record, pairs)) == [image.tobytes() for image in images]
    made[7].remove()
    reading = store.read_images(record, pairs)
    assert [next(reading) for _ in range(7)] == [image.tobytes() for image in images[:7]]
    with pytest.raises(NotFoundError):
        next(reading)
    trained = made.batch(32)
    left = images[:7] + images[8:]
    assert all((x == image).all() for (x, _), image in zip(trained.train, left, strict=True))
    assert len(made.to_documents()) == 449
