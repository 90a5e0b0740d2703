"""The pages of datasets declared as classes: what they show, and what nobody gets through them."""

import asyncio
import io
import json
import os
import re
import shutil
import sqlite3
import threading
import time
from html import unescape
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from finetuner.columns import File, dataset
from finetuner.columns.inspecting import DatasetFile
from finetuner.excepts import NotFoundError
from finetuner.server.dataset_view import DatasetView, thumbnail, untrusted_file
from finetuner.storage.database import open_database
from finetuner.storage.files import FileStore
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve
from tests.integration.test_browser import CHROMIUM, SCREENSHOTS

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
EVIL = '<script>alert(1)</script>\'"&'
NUM_ROWS = 120
PNG = File['png']


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    home = tmp_path_factory.mktemp('server') / 'home'
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    return {'alice': store.create('alice', 'read')[0], 'home': str(home)}


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """Folders of two SQLite files of one name; of one of another name, and of one nobody is shown."""
    folder = tmp_path_factory.mktemp('columns')
    return {name: folder / name for name in ('one', 'two', 'changing', 'hidden')}


@pytest.fixture(scope='module')
def server(tokens, places):
    names = [places['one'] / 'data.sql', places['two'] / 'data.sql', places['changing'] / 'c.sql']
    columns = os.pathsep.join(map(str, names))
    folder = Path(tokens['home']).parent
    with serve(FLOW, folder, FINETUNER_TOKEN='', FINETUNER_COLUMNS=columns) as running:
        yield running


@pytest.fixture(scope='module')
def alice(server, tokens):
    cookies = {'finetuner_token': tokens['alice']}
    headers = {'accept': 'text/html'}
    with httpx.Client(base_url=server.url, cookies=cookies, headers=headers, timeout=60) as client:
        yield client


def pictures(place, number=NUM_ROWS):
    """A dataset of pictures, texts and what is derived from them."""

    @dataset(sql_file=place / 'data.sql', data_dir=place / 'files')
    class Pictures:
        picture: File
        more: File
        text: str

        def pixels(picture: File) -> np.ndarray:
            return np.asarray(Image.open(picture.path))

        def bright(pixels: np.ndarray) -> float:
            if pixels.mean() > 250:
                raise ValueError(EVIL)
            return float(pixels.mean())

        def smaller(picture: File) -> PNG:
            with PNG.make_tmp() as file:
                Image.open(picture.path).resize((8, 8)).save(file.path)
                return file

    for each in range(number if len(Pictures) == 0 else 0):
        colour = (255, 255, 255) if each == 1 else (each, 0, 0)
        Image.new('RGB', (400, 100), colour).save(place / 'picture.png')
        (place / 'page.html').write_text(f'{EVIL} {each}')
        text = EVIL if each == 0 else 'ä' * 20 * each
        Pictures.add(picture=place / 'picture.png', more=place / 'page.html', text=text)
    return Pictures


@pytest.fixture(scope='module')
def made(places):
    places['one'].mkdir()
    found = pictures(places['one'])
    found.rows[:100].materialize('pixels', 'smaller', workers=0, progress=False)
    found.rows[:100].materialize('bright', workers=0, progress=False)
    return found


@pytest.fixture
def changing(places):
    """One that a test may damage."""
    place = places['changing']
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()

    @dataset(sql_file=place / 'c.sql', data_dir=place / 'files')
    class Changing:
        file: File
        number: int

    Changing.add(file=_written(place / 'a.png', b'no picture'), number=0)
    yield Changing
    Changing.store.database.close()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


ONE = {'file': 'one/data.sql', 'dataset': 'Pictures'}
CHANGING = {'file': 'c.sql', 'dataset': 'Changing'}


def links(page: str, kind: str) -> list[str]:
    return [unescape(found) for found in re.findall(rf'"(/ui/dataset/{kind}\?[^"]+)"', page)]


def test_all_datasets_are_listed_and_files_that_cannot_be_read(alice, made, changing, places):
    shutil.rmtree(places['two'], ignore_errors=True)
    page = alice.get('/ui/datasets').text
    assert f'{NUM_ROWS}</td>' in page
    assert 'one/data.sql' in page
    assert 'two/data.sql: there is no such file' in page
    assert 'href="/ui/dataset?file=c.sql&amp;dataset=Changing"' in page
    assert str(places['one'].parent) not in page
    listed = alice.get('/api/v1/datasets').json()
    assert [each.get('name') for each in listed] == ['Pictures', None, 'Changing']
    summary = {**listed[0], **ONE}
    assert (summary['num_rows'], summary['num_columns'], summary['num_errors']) == (NUM_ROWS, 6, 1)
    assert listed[1] == {'file': 'two/data.sql', 'error': 'two/data.sql: there is no such file'}
    places['two'].mkdir()
    _written(places['two'] / 'data.sql', b'no database' * 100)
    assert 'file is not a database' in alice.get('/ui/datasets').text
    answer = alice.get('/ui/dataset', params={'file': 'two/data.sql', 'dataset': 'Pictures'})
    assert answer.status_code == 422
    assert str(places['two']) not in answer.text


def test_a_dataset_shows_its_columns_graph_and_errors(alice, made):
    page = alice.get('/ui/dataset', params=ONE).text
    assert f'{NUM_ROWS} rows' in page
    cells = {
        name: re.findall(r'<td[^>]*>(.*?)</td>', row)
        for name, row in re.findall(r'<tr><td>(\w+)</td>(.*?)</tr>', page, re.DOTALL)
    }
    assert cells['pixels'][:4] == ['numpy.ndarray', 'picture', '100', '']
    assert cells['bright'][:3] == ['float', 'pixels', '99']
    assert 'errors?' in cells['bright'][4]
    assert '<svg' in page
    assert 'data-column="bright"' in page
    errors = alice.get(links(page, 'errors')[0]).text
    assert 'Row 2: ValueError: &lt;script&gt;' in errors
    assert 'raise ValueError(EVIL)' in errors
    assert '<script>alert' not in page + errors
    told = alice.get('/api/v1/dataset', params=ONE).json()
    columns = {each['name']: each for each in told['columns']}
    assert (columns['bright']['num_kept'], columns['bright']['num_errors']) == (99, 1)
    assert not {'sql_file', 'data_dir'} & set(told)
    for wrong in ({'column': 'none'}, {'column': 'text'}):
        assert alice.get('/ui/dataset/errors', params={**ONE, **wrong}).status_code == 404


def test_rows_are_paged_each_once(alice, made):
    seen = []
    for page in (1, 2, 3):
        text = alice.get('/ui/dataset/rows', params={**ONE, 'page': page}).text
        assert f'Page {page} of 3, {NUM_ROWS} rows' in text
        seen += re.findall(r'data-column="Row">(\d+)<', text)
    assert seen == [str(each + 1) for each in range(NUM_ROWS)]
    for page, shown in ((0, 1), (-5, 1), (4, 3), (10**30, 3)):
        text = alice.get('/ui/dataset/rows', params={**ONE, 'page': page}).text
        assert f'Page {shown} of 3' in text
    assert '400 × 3' in text or 'not computed' in text
    told = alice.get('/api/v1/dataset/rows', params={**ONE, 'offset': 99, 'limit': 2}).json()
    assert [row['id'] for row in told] == [100, 101]
    assert told[0]['values']['pixels']['shape'] == [100, 400, 3]
    assert 'pixels' not in told[1]['values']
    assert told[0]['values']['text'] == 'ä' * 20 * 99
    for wrong in ({'limit': 0}, {'limit': 1001}, {'offset': -1}, {'offset': 2**63}):
        assert alice.get('/api/v1/dataset/rows', params={**ONE, **wrong}).status_code == 422


def test_values_are_short_and_harmless(alice, made):
    page = alice.get('/ui/dataset/rows', params=ONE).text
    assert '<script>alert' not in page
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page
    assert 'ä' * 300 + '… (980 characters)' in page
    assert 'ä' * 301 not in page
    assert '100 × 400 × 3, uint8, 120.1 kB' in page


def test_pictures_are_small_and_in_their_proportions(alice, made):
    page = alice.get('/ui/dataset/rows', params=ONE).text
    found = links(page, 'picture')
    assert len(found) == 100, 'pictures and smaller ones'
    answer = alice.get(found[4])
    assert answer.headers['content-type'] == 'image/png'
    assert answer.headers['x-content-type-options'] == 'nosniff'
    shown = Image.open(io.BytesIO(answer.content))
    assert shown.size == (192, 48)
    assert shown.getpixel((5, 5)) == (2, 0, 0)
    assert Image.open(io.BytesIO(alice.get(found[5]).content)).size == (8, 8)


def test_files_are_taken_along_and_never_shown(alice, made):
    page = alice.get('/ui/dataset/rows', params=ONE).text
    (address,) = [
        each for each in links(page, 'file') if 'column=more' in each and 'row=7&' in each
    ]
    for path in (address, address.replace('/ui/dataset', '/api/v1/dataset')):
        answer = alice.get(path)
        assert answer.text == f'{EVIL} 6'
        assert answer.headers['content-type'] == 'application/octet-stream'
        assert answer.headers['content-disposition'] == (
            "attachment; filename*=utf-8''Pictures-more-7.html"
        )
        assert answer.headers['x-content-type-options'] == 'nosniff'
        assert 'sandbox' in answer.headers['content-security-policy']
    assert f'html, {len(EVIL) + 2} bytes' in page
    for wrong in ({'row': 999}, {'column': 'text'}, {'column': 'none'}, {'dataset': 'None'}):
        for kind in ('file', 'picture'):
            params = {**ONE, 'row': 7, 'column': 'more', **wrong}
            assert alice.get(f'/ui/dataset/{kind}', params=params).status_code == 404, wrong
    for row in (-1, 2**63, 'x'):
        params = {**ONE, 'row': row, 'column': 'more'}
        assert alice.get('/ui/dataset/file', params=params).status_code == 422


def test_nobody_gets_in_without_a_token(server, alice, made):
    for path in ('/ui/datasets', '/ui/dataset', '/ui/dataset/rows', '/ui/dataset/file'):
        answer = httpx.get(f'{server.url}{path}', params={**ONE, 'row': 1, 'column': 'more'})
        assert answer.status_code in (401, 303, 307), path
        assert EVIL not in answer.text
    for path in ('datasets', 'dataset', 'dataset/rows', 'dataset/file'):
        assert httpx.get(f'{server.url}/api/v1/{path}', params=ONE).status_code == 401
    assert alice.get('/ui/datasets').status_code == 200, 'with the scope read'


def test_no_other_file_is_opened(alice, made, places):
    places['hidden'].mkdir()
    hidden = pictures(places['hidden'], 1)
    for name in (
        'data.sql', str(places['hidden'] / 'data.sql'), 'hidden/data.sql', '../hidden/data.sql',
        str(places['one'] / 'data.sql'), '/etc/passwd', 'one/../hidden/data.sql', '.', '%00',
    ):  # fmt: skip
        for path in ('/ui/dataset', '/ui/dataset/rows', '/api/v1/dataset', '/api/v1/dataset/rows'):
            answer = alice.get(path, params={'file': name, 'dataset': 'Pictures'})
            assert answer.status_code == 404, name
            assert 'Row' not in answer.text
    hidden.store.database.close()


def test_keys_do_not_lead_out_of_the_data_directory(alice, changing, places):
    secret = _written(places['changing'] / 'secret.png', b'secret')
    (places['changing'] / 'files' / 'file' / 'link.png').symlink_to(secret)
    place = {**CHANGING, 'row': 1, 'column': 'file'}
    for key in (
        '../secret.png', str(secret), '../../../../../../etc/passwd', '/etc/passwd',
        'file/link.png', 'file/../../secret.png', '', '.', 'x' * 5000, 'a\0b',
    ):  # fmt: skip
        with sqlite3.connect(places['changing'] / 'c.sql') as connection:
            connection.execute('UPDATE Changing__files SET path = ?', (key,))
        page = alice.get('/ui/dataset/rows', params=CHANGING)
        assert page.status_code == 200, key
        assert 'no name of a file here' in page.text or 'cannot be read' in page.text, key
        assert not links(page.text, 'file')
        for path in ('/ui/dataset/file', '/ui/dataset/picture', '/api/v1/dataset/file'):
            answer = alice.get(path, params=place)
            assert answer.status_code in (404, 422), (key, path)
            assert 'secret' not in answer.text.replace('secret.png', '')
            assert 'root:' not in answer.text


def test_a_picture_that_is_none_and_a_file_that_is_gone_are_told(alice, changing, places):
    place = {**CHANGING, 'row': 1, 'column': 'file'}
    page = alice.get('/ui/dataset/rows', params=CHANGING).text
    assert 'title="Changing-file-1.png, png, 10 bytes"' in page
    answer = alice.get('/ui/dataset/picture', params=place)
    assert answer.status_code == 404
    assert 'this is no picture' in answer.text
    assert alice.get('/ui/dataset/file', params=place).content == b'no picture'
    (path,) = (places['changing'] / 'files' / 'file').rglob('*.png')
    for make in (path.unlink, path.mkdir):
        make()
        assert 'the file is gone' in alice.get('/ui/dataset/rows', params=CHANGING).text
        for kind in ('file', 'picture'):
            assert alice.get(f'/ui/dataset/{kind}', params=place).status_code == 404
    changing.rows.delete()
    assert 'There are no rows here.' in alice.get('/ui/dataset/rows', params=CHANGING).text
    assert alice.get('/ui/dataset/file', params=place).status_code == 404


def test_what_becomes_of_the_file_is_told(alice, changing, places):
    path = places['changing'] / 'c.sql'
    changing.store.database.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + os.urandom(len(content) - 4096))
    for page in ('/ui/dataset', '/ui/dataset/rows', '/api/v1/dataset'):
        answer = alice.get(page, params=CHANGING)
        assert answer.status_code == 422, answer.text
        assert str(path) not in answer.text
    assert 'c.sql cannot be read' in alice.get('/ui/datasets').text
    path.unlink()
    assert alice.get('/ui/dataset', params=CHANGING).status_code == 404
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE other (id)')
    assert 'has no dataset' in alice.get('/ui/dataset', params=CHANGING).text


def test_pages_are_there_while_rows_come_and_go(alice, changing, places):
    ends = threading.Event()

    def write():
        number = 0
        while not ends.is_set():
            number += 1
            path = _written(places['changing'] / 'new.txt', str(number).encode())
            changing.extend({'file': path, 'number': number} for _ in range(20))
            changing.rows[:-10].delete()
            changing.prune()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            for page in ('/ui/datasets', '/ui/dataset', '/ui/dataset/rows'):
                answer = alice.get(page, params=CHANGING)
                assert answer.status_code == 200, answer.text
            for address in links(answer.text, 'file')[:2]:
                assert alice.get(address).status_code in (200, 404)
    finally:
        ends.set()
        thread.join()


def test_names_are_the_shortest_that_tell_files_apart(tmp_path):
    paths = [tmp_path / name for name in ('a/x/d.sql', 'b/x/d.sql', 'b/y/d.sql', 'e.sql', 'e.sql')]
    found = [each.name for each in DatasetView(paths).shown()]
    assert found == ['a/x/d.sql', 'b/x/d.sql', 'y/d.sql', 'e.sql']
    assert DatasetView(()).shown() == []


def test_files_elsewhere_are_sent_too(tmp_path):
    store = FileStore('memory://column-pages', tmp_path)
    file = io.BytesIO()
    Image.new('RGB', (10, 1000)).save(file, 'PNG')
    store.write('a/b.png', [file.getvalue()])
    assert Image.open(io.BytesIO(thumbnail(store, 'a/b.png'))).size == (2, 192)
    answer = untrusted_file(store, 'a/b.png', 'Röcke-1.png')
    assert answer.body == file.getvalue()
    assert answer.headers['content-disposition'] == "attachment; filename*=utf-8''R%C3%B6cke-1.png"
    large = os.urandom(5 << 20)
    store.write('a/large', [large])

    async def body() -> bytes:
        pieces = untrusted_file(store, 'a/large', 'large').body_iterator
        return b''.join([piece async for piece in pieces])

    assert asyncio.run(body()) == large
    for call in (lambda: thumbnail(store, 'a/c.png'), lambda: untrusted_file(store, 'c', 'c')):
        with pytest.raises(NotFoundError):
            call()


@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
def test_in_a_browser(alice, made, changing, server, tokens):
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
        page.click('text=Datasets')
        page.click('text=Pictures')
        page.locator('svg [data-column="bright"]').wait_for()
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / 'dataset.png', full_page=True)
        page.click('text=All rows')
        page.click('text=After >> nth=0')
        assert 'Page 2 of 3' in page.inner_text('main')
        page.wait_for_load_state('networkidle')
        widths = (
            "[...document.querySelectorAll('.values img')].slice(0, 2).map(i => i.naturalWidth)"
        )
        assert page.evaluate(widths) == [192, 8]
        page.screenshot(path=SCREENSHOTS / 'dataset-rows.png')
        with page.expect_download() as got:
            page.click('.values a[href*="column=more"] >> nth=0')
        assert got.value.suggested_filename == 'Pictures-more-51.html'
        assert Path(got.value.path()).read_text() == f'{EVIL} 50'
        page.goto(f'{server.url}/ui/dataset/rows?{_query(CHANGING)}')
        page.locator('text=Changing-file-1.png, png, 10 bytes: no picture').wait_for()
        assert len(errors) == 1, 'the console says that it was not found'
        errors.clear()
        for width in (390, 320):
            page.set_viewport_size({'width': width, 'height': 800})
            for place in ('rows', ''):
                page.goto(f'{server.url}/ui/dataset/{place}'.rstrip('/') + '?' + _query(ONE))
                page.wait_for_timeout(200)
                assert page.evaluate('document.documentElement.scrollWidth') <= width
                page.screenshot(path=SCREENSHOTS / f'dataset-phone-{place or "columns"}.png')
        browser.close()
    assert errors == []


def _query(place: dict[str, str]) -> str:
    return str(httpx.QueryParams(place))


def test_json_is_what_the_command_line_tells(alice, made, places):
    from typer.testing import CliRunner

    from finetuner.cli import app

    path = str(places['one'] / 'data.sql')
    done = CliRunner().invoke(app, ['columns', 'show', path, '--json', '--rows', '3'])
    (shown,) = json.loads(done.output)['datasets']
    rows = alice.get('/api/v1/dataset/rows', params={**ONE, 'limit': 3}).json()
    assert shown['rows'] == rows
    assert shown['num_rows'] == DatasetFile(path).count('Pictures') == NUM_ROWS
