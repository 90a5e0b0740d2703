"""The guide of collections, run as it is written: on this machine, and against a server."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

import finetuner
from finetuner.collections import TrainingSet, search
from finetuner.config import Settings
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve
from tests.integration.test_documented import blocks

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
GUIDE = 'docs/collections.md'
BANDS, HEIGHT, WIDTH = 8, 700, 900


@pytest.fixture(scope='module')
def scene(tmp_path_factory) -> Path:
    """A GeoTIFF as a satellite's: eight bands of float32."""
    path = tmp_path_factory.mktemp('scene') / 'scene.tif'
    pixels = np.random.default_rng(0).random((BANDS, HEIGHT, WIDTH), np.float32)
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=BANDS,
        height=HEIGHT,
        width=WIDTH,
        dtype='float32',
        crs='EPSG:32613',
        transform=from_origin(500_000, 4_400_000, 0.5, 0.5),
        tiled=True,
    ) as raster:
        raster.write(pixels)
    return path


def run_the_guide() -> dict:
    """All blocks in their order, in one namespace; what `expression  # value` says is compared."""
    namespace: dict = {}
    compared = 0
    for source in blocks(GUIDE, 'python'):
        lines = source.splitlines()
        for statement in ast.parse(source).body:
            code = ast.get_source_segment(source, statement)
            _, _, shown = lines[statement.end_lineno - 1].partition('  # ')
            if isinstance(statement, ast.Expr) and shown:
                value = eval(compile(code, GUIDE, 'eval'), namespace)
                assert repr(value) == shown, code
                compared += 1
            else:
                exec(compile(code, GUIDE, 'exec'), namespace)
    assert compared == 14
    return namespace


def test_on_this_machine(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(scene.parent)
    td = run_the_guide()['td']
    assert td.count == {'train': 99, 'test': 25}, 'one was cleaned away'
    west, south, east, north = td.bbox
    assert -105 <= west < east < -104.9
    assert 39.7 < south < north < 39.8
    assert 'Some Fake Data' in capsys.readouterr().out


def test_against_a_server(scene, tmp_path, monkeypatch):
    home = tmp_path / 'server' / 'home'
    home.mkdir(parents=True)
    token = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}')).create('alice')[0]
    with serve(FLOW, home.parent, FINETUNER_TOKEN='') as server:
        monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'client'))
        monkeypatch.chdir(scene.parent)
        finetuner.login(host=server.url, token=token)
        td = run_the_guide()['td']
        assert td.document['data']['userId'] == 'alice'
        assert td.count == {'train': 99, 'test': 25}
    settings = Settings.from_environment(home)
    monkeypatch.setenv('FINETUNER_HOME', str(settings.home))
    assert search() == [], 'it is the user alice who has it, not the machine'


def test_a_collection_trains_a_model(tmp_path, monkeypatch):
    from examples.emoji_data import load_emoji

    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    td = TrainingSet('emoji', tile_size=[96, 96])
    docs = load_emoji('train', blobs=True)[:64]
    td.feed((doc, str(doc.tags['concept'])) for doc in docs)
    td.save()
    run = finetuner.fit(
        'efficientnet-lite0',
        train_data=td,
        model_options={'input_size': 32},
        epochs=1,
        batch_size=8,
        num_workers=0,
        device='cpu',
    )
    log = list(run.stream_logs())
    assert run.status()['status'] == 'FINISHED', '\n'.join(log)
