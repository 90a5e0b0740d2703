"""Takes the pictures of the pages that the documents show: a real server, a real run, a browser.

.venv/bin/python docs/screenshots.py        # Chromium must be installed; some minutes
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from docarray import DocumentArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.emoji_data import load_emoji
from finetuner.config import Settings
from finetuner.remote import RemoteClient
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve

IMAGES = Path(__file__).parent / 'images'
NAME = 'emoji, five epochs'
NUM_QUERIES = 100


def train(url: str, token: str, home: Path) -> None:
    """Submit a run on the emoji pictures with nothing but data given, and wait for its end."""
    client = RemoteClient(url, token, Settings.from_environment(home))
    test_data = load_emoji('test')  # four pictures of each concept
    client.push_data(load_emoji('train'), 'emoji')
    client.push_data(DocumentArray(test_data[: 4 * NUM_QUERIES : 4]), 'emoji queries')
    client.push_data([doc for i, doc in enumerate(test_data) if i % 4], 'emoji index')
    data = {
        'train_data': 'emoji',
        'callbacks.0.query_data': 'emoji queries',
        'callbacks.0.index_data': 'emoji index',
    }
    options = {'limit': 3, 'gather_examples': True}
    callbacks = [{'name': 'EvaluationCallback', 'options': options}]
    client.fit(
        {'model': 'efficientnet-lite0', 'run_name': NAME, 'epochs': 5, 'callbacks': callbacks}, data
    )
    for line in client.stream_run_logs('default', NAME):
        print(line)


def take_pictures(url: str, token: str, chromium: str) -> None:
    """Open the run's page at a desk and, in the dark, on a phone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ['--no-sandbox'] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        desk = browser.new_page(viewport={'width': 1200, 'height': 900})
        _log_in(desk, url, token)
        desk.locator('.example img').last.scroll_into_view_if_needed()
        desk.wait_for_selector('.map canvas', timeout=300_000)
        desk.wait_for_timeout(1000)
        desk.evaluate('scrollTo(0, 0)')
        bottom = desk.locator('.curve').nth(5).bounding_box()
        area = {'x': 0, 'y': 0, 'width': 1200, 'height': bottom['y'] + bottom['height'] + 16}
        desk.screenshot(path=IMAGES / 'run-page.png', full_page=True, clip=area)
        phone = browser.new_page(viewport={'width': 420, 'height': 900}, color_scheme='dark')
        _log_in(phone, url, token)
        picture = load_emoji('test', blobs=True)[41]
        file = {'name': 'a.png', 'mimeType': 'image/png', 'buffer': picture.blob}
        phone.set_input_files('#picture', file)
        phone.wait_for_selector('#neighbours .tile')
        phone.focus('.map canvas')
        for _ in range(30):
            phone.keyboard.press('ArrowRight')
        phone.locator('#neighbours .tile').last.scroll_into_view_if_needed()
        phone.wait_for_timeout(1000)
        top = phone.locator('.map').bounding_box()
        phone.evaluate(f'scrollBy(0, {top["y"] - 60})')
        phone.wait_for_timeout(300)
        phone.screenshot(path=IMAGES / 'map-page.png')
        browser.close()


def _log_in(page: Any, url: str, token: str) -> None:
    page.goto(url)
    page.fill('#token', token)
    page.keyboard.press('Enter')
    page.wait_for_url('**/ui/runs')
    page.click(f'text={NAME}')
    page.wait_for_selector('.curve canvas')


def main() -> None:
    """Write `docs/images/run-page.png` and `map-page.png`."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None:
        sys.exit('Chromium is not installed: apt-get install chromium')
    flow = (REPOSITORY / 'flows' / 'train.yml').read_text()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / 'home'
        database = open_database(Settings.from_environment(home).database_url)
        token, _ = TokenStore(database).create('alice')
        database.close()
        with serve(flow, Path(folder), OMP_NUM_THREADS=str(os.cpu_count())) as server:
            train(server.url, token, Path(folder) / 'client')
            take_pictures(server.url, token, chromium)


if __name__ == '__main__':
    main()
