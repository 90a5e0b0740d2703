"""Servers that are killed while they make releases: nothing half is served, and whoever waits gets it."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import finetuner
from finetuner.collections import TrainingSet, create_from_archive
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import (
    REPOSITORY,
    Server,
    end,
    flow_on_free_ports,
    start,
    wait_until_ready,
)

FLOW = (REPOSITORY / 'flows' / 'train.yml').read_text()
SIZE = (32, 32)
NUM_PAIRS = 600
NUM_KILLS = 4


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that starts again where it was."""
    folder = tmp_path / 'server'
    folder.mkdir()
    path, *ports = flow_on_free_ports(FLOW, folder)
    database = open_database(f'sqlite:///{folder / "home" / "finetuner.db"}')
    token = TokenStore(database).create('alice')[0]
    database.close()
    log = folder / 'server.log'

    def begin() -> Server:
        begun = Server(start(path, log, FINETUNER_TOKEN=''), *ports, log)
        running.append(begun)
        wait_until_ready(begun)
        return begun

    running: list[Server] = []
    begin()
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'client'))
    finetuner.login(host=running[0].url, token=token)
    yield begin, running, token
    end(running[-1].process)


def kill(server: Server) -> None:
    main = psutil.Process(server.process.pid)
    family = [main, *main.children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    server.process.wait()
    psutil.wait_procs(family, 10)


def check(made: TrainingSet, folder: Path) -> list[str]:
    """All that is served is whole; returns its versions."""
    for about in made.releases():
        path = made.download_release(about['version'], folder)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == about['sha256']
        assert path.stat().st_size == about['size']
        path.unlink()
    return [about['version'] for about in made.releases()]


def test_a_server_that_is_killed_leaves_whole_releases_only(server, tmp_path):
    begin, running, token = server
    rng = random.Random(0)
    home = tmp_path / 'server' / 'home'
    made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    made.feed((np.full((3, *SIZE), i % 250, np.uint8), [i % 2]) for i in range(NUM_PAIRS))
    made.save()
    answers: dict[str, object] = {}
    lost = {}
    was_at_work = 0
    for number in range(NUM_KILLS):
        version = f'v{number}'

        def release(version=version):
            answers[version] = made.release(version)

        waiting = threading.Thread(target=release)
        waiting.start()
        # of somebody who does not wait, and is gone when the server is
        headers = {'authorization': f'Bearer {token}'}
        address = f'{running[-1].url}/api/v1/data/{made.id}/releases'
        lost[version] = {'version': f'{version}-lost', 'ticket': 'x'}
        httpx.post(f'{address}?wait=0', json=lost[version], headers=headers)
        time.sleep(rng.uniform(0.0, 1.2))
        kill(running[-1])
        unfinished = list(home.glob('collections-unsaved/*/release.tar'))
        was_at_work += bool(unfinished)
        begin()
        told = set(answers)
        assert set(check(made, tmp_path)) >= told
        waiting.join(60)
        assert answers[version]['version'] == version, 'asked again, the new server made it'
        known = check(made, tmp_path)
        assert version in known
        if f'{version}-lost' in known:
            continue
        answer = httpx.post(address, json=lost[version], headers=headers, timeout=60)
        assert answer.status_code == 201, answer.text
    assert was_at_work >= 1, 'some were killed in the middle'
    known = check(made, tmp_path)
    assert set(known) == {*answers, *(wish['version'] for wish in lost.values())}
    assert made.releases() == sorted(made.releases(), key=lambda about: about['created_at'])
    assert [about for about in made.releases() if about['version'] in answers] == [
        answers[version] for version in known if version in answers
    ]
    assert len({about['content_sha256'] for about in made.releases()}) == 1
    folder = next(home.glob('collections/*/releases'))
    assert len(list(folder.glob('*.tar'))) == len(list(folder.iterdir())) // 2 == len(known)
    left = [path for path in (home / 'collections-unsaved').iterdir() if path.is_dir()]
    assert left == [], 'what the killed ones left is cleared'
    again = create_from_archive(made.download_release('v0', tmp_path), 'again')
    again.save()
    pixels = [point.read()[0, 0, 0] for point in again]
    assert pixels == [i % 250 for i in range(NUM_PAIRS)]


def test_a_server_that_ends_orderly_waits_for_no_release(server):
    begin, running, _ = server
    made = TrainingSet('set', tile_size=SIZE, classes=['odd'])
    made.feed((np.full((3, *SIZE), i % 250, np.uint8), [i % 2]) for i in range(NUM_PAIRS))
    made.save()
    answers = []
    waiting = [
        threading.Thread(target=lambda v=v: answers.append(made.release(v)))
        for v in ('1', '2', '3')
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    started = time.monotonic()
    end(running[-1].process)
    seconds = time.monotonic() - started
    begin()
    for thread in waiting:
        thread.join(60)
    assert {about['version'] for about in answers} == {'1', '2', '3'}
    assert {about['version'] for about in made.releases()} == {'1', '2', '3'}
    assert seconds < 20
