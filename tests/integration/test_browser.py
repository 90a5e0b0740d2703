"""The pages in a real browser: submit, watch, look, try, cancel; at a desk, on a phone, in the dark."""

import os
import time
from pathlib import Path

import pytest

from examples.emoji_data import load_emoji
from finetuner.config import Settings
from finetuner.remote import RemoteClient
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve

CHROMIUM = next(
    (p for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser') if Path(p).exists()), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason='Chromium is not installed: apt-get install chromium runs the pages in a browser too',
)

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
SCREENSHOTS = Path(os.environ.get('FINETUNER_SCREENSHOTS') or REPOSITORY / 'build' / 'screenshots')


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    home = tmp_path_factory.mktemp('server') / 'home'
    store = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}'))
    return {'alice': store.create('alice')[0], 'home': str(home)}


@pytest.fixture(scope='module')
def server(tokens):
    with serve(FLOW, Path(tokens['home']).parent, FINETUNER_TOKEN='') as running:
        yield running


@pytest.fixture(scope='module')
def named_data(server, tokens, tmp_path_factory):
    settings = Settings.from_environment(tmp_path_factory.mktemp('c'))
    client = RemoteClient(server.url, tokens['alice'], settings)
    client.push_data(load_emoji('train')[:96], 'emoji')
    test_data = load_emoji('test')[:96]  # four pictures of each concept
    client.push_data(test_data[::4][:8], 'emoji queries')
    client.push_data([doc for i, doc in enumerate(test_data) if i % 4], 'emoji index')
    return client


@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ['--no-sandbox'] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server, tokens):
    """A page that is logged in; what it asks of other servers, and its errors, fail the test."""
    context = chromium.new_context(viewport={'width': 1200, 'height': 900})
    page = context.new_page()
    asked, errors = [], []
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.goto(f'{server.url}/')
    page.fill('#token', tokens['alice'])
    page.keyboard.press('Enter')
    page.wait_for_url('**/ui/runs')
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((server.url, 'data:', 'blob:'))] == []
    assert errors == [], server.log.read_text()[-3000:]


def until(page, expression: str, seconds: float = 30) -> None:
    """Wait for an expression to be true; the page's own policy forbids `wait_for_function`."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def shoot(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f'{name}.png', full_page=True)


def submit(page, server, name: str, epochs: int) -> None:
    page.goto(f'{server.url}/ui/submit')
    page.select_option('#train_data', 'emoji')
    page.select_option('#query_data', 'emoji queries')
    page.select_option('#index_data', 'emoji index')
    page.fill('#epochs', str(epochs))
    page.fill('#run_name', name)
    page.click('main button')
    page.wait_for_url('**/ui/run?*')


def test_without_a_token_nobody_gets_in(chromium, server):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f'{server.url}/ui/runs')
    assert page.url.endswith('/login')
    page.fill('#token', 'ft_wrong')
    page.click('main button')
    assert 'lets nobody in' in page.inner_text('[role=alert]')
    page.goto(f'{server.url}/ui/runs')
    assert page.url.endswith('/login')
    context.close()


def test_a_run_from_the_form_to_its_results(page, server, named_data):
    submit(page, server, 'first look', 2)
    page.wait_for_selector('#status.STARTED', timeout=60_000)
    until(page, 'document.querySelector("pre.log").textContent.includes("Epoch 1/2")', 240)
    until(page, 'document.querySelector("#progress").value > 0')
    page.wait_for_selector('#status.FINISHED', timeout=240_000)
    # curves
    page.wait_for_selector('.curve canvas')
    assert page.locator('.curve').count() >= 3
    titles = page.locator('.curve h3').all_inner_texts()
    assert 'loss' in [title.lower() for title in titles]
    # example pictures, each of them there
    page.locator('.example').first.scroll_into_view_if_needed()
    pictures = page.locator('.example img')
    assert pictures.count() > 20
    for index in range(pictures.count()):
        pictures.nth(index).scroll_into_view_if_needed()
    loaded = '(image) => image.complete && image.naturalWidth > 0'
    until(page, f'[...document.querySelectorAll(".example img")].every({loaded})')
    assert 'recall_at_k' in page.inner_text('main')
    # the map, by mouse and by keyboard
    page.wait_for_selector('.map canvas', timeout=180_000)
    box = page.locator('.map canvas').bounding_box()
    for step in range(40):
        page.mouse.move(
            box['x'] + box['width'] * (step % 8 + 0.5) / 8,
            box['y'] + box['height'] * (step // 8 + 0.5) / 5,
        )
        if page.is_visible('.map .hover'):
            break
    page.focus('.map canvas')
    page.keyboard.press('ArrowRight')
    assert page.is_visible('.map .hover')
    until(page, 'document.querySelector(".map .hover img").naturalWidth > 0')
    shoot(page, 'run')
    # try it
    picture = load_emoji('test', blobs=True)[21]
    page.set_input_files(
        '#picture', {'name': 'a.png', 'mimeType': 'image/png', 'buffer': picture.blob}
    )
    page.wait_for_selector('#neighbours .tile', timeout=60_000)
    assert page.locator('#neighbours .tile').count() == 12
    assert '1.00' in page.locator('#neighbours .tile').first.inner_text()
    # download
    with page.expect_download() as download:
        page.click('text=Download the model')
    assert download.value.suggested_filename == 'first look.zip'


def test_one_is_cancelled_and_deleted_after_a_question(page, server, named_data):
    submit(page, server, 'in vain', 500)
    page.wait_for_selector('#status.STARTED', timeout=60_000)
    page.wait_for_selector('.curve canvas', timeout=60_000)  # they come as they grow
    page.click('text=Cancel')
    assert 'Its training ends' in page.inner_text('main')
    page.click('text=No, go back')
    assert page.inner_text('#status') == 'STARTED'
    page.click('text=Cancel')
    page.wait_for_selector('main button:focus')
    page.keyboard.press('Enter')
    page.wait_for_selector('#status.FAILED')
    assert 'cancelled' in page.inner_text('.error')
    page.click('text=Delete')
    page.click('text=Yes, delete')
    page.wait_for_url('**/ui/runs')
    assert 'in vain' not in page.inner_text('main')


def test_the_list_and_a_comparison(page, server, named_data):
    submit(page, server, 'second look', 1)
    page.wait_for_selector('#status.FINISHED', timeout=240_000)
    page.goto(f'{server.url}/ui/runs')
    shoot(page, 'runs')
    page.check('[aria-label="Compare first look"]')
    page.check('[aria-label="Compare second look"]')
    page.click('text=Compare the two')
    page.wait_for_selector('.curve canvas')
    assert 'epochs' in page.inner_text('main')
    shoot(page, 'compare')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_on_a_phone_nothing_is_cut_off(chromium, server, tokens, named_data, scheme):
    context = chromium.new_context(viewport={'width': 375, 'height': 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f'{server.url}/')
    page.fill('#token', tokens['alice'])
    page.click('main button')
    page.wait_for_url('**/ui/runs')
    for place in ('/ui/runs', '/ui/submit', '/ui/data', '/ui/run?run=first+look'):
        page.goto(server.url + place)
        page.wait_for_timeout(300)
        width = page.evaluate('document.documentElement.scrollWidth')
        assert width <= 375, (place, width)
    shoot(page, f'phone-{scheme}')
    ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert ground == ('rgb(255, 255, 255)' if scheme == 'light' else 'rgb(18, 22, 28)')
    context.close()


def test_the_api_is_described_on_a_page_of_its_own(page, server):
    page.goto(f'{server.url}/docs')
    page.wait_for_selector('#operations-runs-submit_api_v1_runs_post')
    assert page.locator('.opblock').count() > 30


def test_everything_is_reached_by_keyboard(page, server):
    page.goto(f'{server.url}/ui/runs')
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.textContent') == 'Skip to the content'
    seen = set()
    for _ in range(25):
        page.keyboard.press('Tab')
        seen.add(page.evaluate('document.activeElement.textContent.trim()'))
        if page.evaluate('document.activeElement !== document.body'):
            outline = page.evaluate('getComputedStyle(document.activeElement).outlineStyle')
            assert outline != 'none'
    assert {'Runs', 'Experiments', 'Data', 'Shared', 'New run', 'Log out'} <= seen
