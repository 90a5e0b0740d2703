"""The pages of collections: a list, and a grid where bad pairs are marked, also in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

import finetuner
from examples.emoji_data import load_emoji
from finetuner.collections import TrainingSet
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve
from tests.integration.test_browser import CHROMIUM, SCREENSHOTS

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
SIZE = (96, 96)
NUM_PAIRS = 130
AWKWARD = '<script>alert(1)</script> & "Röcke"'


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    home = tmp_path_factory.mktemp('server') / 'home'
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    made = {name: store.create(name)[0] for name in ('alice', 'bob')}
    return {**made, 'reader': store.create('alice', 'read')[0], 'home': str(home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture
def made(server, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'alice'))
    finetuner.login(host=server.url, token=tokens['alice'])
    made = TrainingSet(AWKWARD, 'object_detection', SIZE, classes=['left', 'right'])
    boxes = {'left': [[5, 10, 40, 80]], 'right': [[50, 20, 90, 60], [60, 70, 80, 90]]}
    docs = load_emoji('train', blobs=True)[:NUM_PAIRS]
    made.feed((doc, boxes) for doc in docs[:-10])
    made.feed(((doc, {'left': [[1, 1, 95, 95]]}) for doc in docs[-10:]), group='test')
    made.save()
    yield made
    made.remove()


@pytest.fixture
def browse(server, tokens):
    clients = []

    def as_user(name: str) -> httpx.Client:
        client = httpx.Client(base_url=server.url, cookies={'finetuner_token': tokens[name]})
        clients.append(client)
        return client

    yield as_user
    for client in clients:
        client.close()


def shown_ids(page: str) -> list[int]:
    return [int(number) for number in re.findall(r'alt="Pair (\d+):', page)]


def marked_ids(page: str) -> set[int]:
    hidden = re.findall(r'type="hidden" name="bad" value="(\d+)"', page)
    ticked = re.findall(r'name="bad" value="(\d+)" checked', page)
    return {int(number) for number in (*hidden, *ticked)}


def test_marks_are_carried_from_page_to_page_and_removed_after_a_question(made, browse):
    alice = browse('alice')
    ids = [point.id for point in made]
    listed = alice.get('/ui/collections', params={'text': 'röcke'}).text
    assert f'/ui/collection?collection={made.id}' in listed
    assert '<script>alert' not in listed
    assert 'Nothing was found' in alice.get('/ui/collections', params={'text': 'hats'}).text
    place = {'collection': made.id, 'group': ''}
    first = alice.get('/ui/collection', params=place).text
    assert shown_ids(first) == ids[:60]
    assert 'Page 1 of 3, 130 pairs' in first
    second = alice.post('/ui/collection', data={**place, 'page': 2, 'bad': [ids[3], ids[5]]}).text
    assert shown_ids(second) == ids[60:120]
    assert '2 marked on other pages' in second
    marks = {'bad': [ids[3], ids[5], ids[70]]}
    again = alice.post('/ui/collection', data={**place, 'page': 1, **marks}).text
    assert marked_ids(again) == set(marks['bad'])
    question = alice.post('/ui/collection/remove', data={**place, **marks})
    assert 'remove 3 pairs?' in question.text
    assert len(made) == NUM_PAIRS, 'nothing yet'
    done = alice.post('/ui/collection/remove', data={**place, **marks, 'sure': 'yes'})
    assert done.status_code == 303
    assert [point.id for point in made] == [i for i in ids if i not in marks['bad']]
    nothing = alice.post('/ui/collection/remove', data=place)
    assert nothing.status_code == 422
    assert 'tick the bad ones first' in nothing.text
    group = alice.get('/ui/collection', params={**place, 'group': 'test'}).text
    assert shown_ids(group) == ids[-10:]
    picture = alice.get(re.search(r'src="(/ui/pair[^"]+)"', group)[1].replace('&amp;', '&'))
    assert picture.headers['content-type'] == 'image/png'


def test_others_look_at_what_is_published_and_touch_nothing(made, browse):
    bob, reader = browse('bob'), browse('reader')
    place = {'collection': made.id}
    number = made[0].id
    remove = {**place, 'bad': [number], 'sure': 'yes'}
    assert bob.get('/ui/collection', params=place).status_code == 404
    assert bob.get('/ui/pair', params={'pair': number}).status_code == 404
    assert bob.post('/ui/collection/remove', data=remove).status_code == 404
    assert reader.get('/ui/collection', params=place).status_code == 200
    assert reader.post('/ui/collection/remove', data=remove).status_code == 403
    made.publish()
    page = bob.get('/ui/collection', params=place).text
    assert 'Remove what is marked' not in page
    assert 'by alice' in bob.get('/ui/collections').text
    assert bob.post('/ui/collection/remove', data=remove).status_code == 404
    assert len(made) == NUM_PAIRS


@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
def test_in_a_browser(made, server, tokens):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_context(viewport={'width': 1200, 'height': 900}).new_page()
        errors: list[str] = []
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.goto(f'{server.url}/')
        page.fill('#token', tokens['alice'])
        page.keyboard.press('Enter')
        page.wait_for_url('**/ui/runs')
        page.click('text=Collections')
        page.click(f'text={AWKWARD}')
        page.locator('.pairs li').nth(2).click()
        page.locator('.pairs input').nth(4).check()
        page.wait_for_timeout(300)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / 'collection.png', full_page=False)
        page.click('text=After')
        assert '2 marked on other pages' in page.inner_text('main')
        page.click('text=Remove what is marked')
        page.click('text=No, go back')
        page.click('text=After')
        page.click('text=Remove what is marked')
        page.click('text=Yes, remove')
        assert '128 pairs' in page.inner_text('main')
        page.set_viewport_size({'width': 390, 'height': 800})
        page.wait_for_timeout(200)
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        page.screenshot(path=SCREENSHOTS / 'collection-phone.png')
        browser.close()
    assert errors == []
    assert len(made) == NUM_PAIRS - 2
