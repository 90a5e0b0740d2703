"""Declared datasets train models: here, and on a server, whose machine has none of their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from PIL import Image

import finetuner
from examples.emoji_data import load_emoji
from finetuner.callback import EvaluationCallback
from finetuner.client import get_client
from finetuner.collections import TrainingSet
from finetuner.columns import File, dataset
from finetuner.data.loading import build_dataset
from finetuner.storage.database import open_database
from finetuner.storage.tokens import TokenStore
from tests.integration.serving import REPOSITORY, serve, store_of

FLOW = (REPOSITORY / 'flows' / 'train-and-encode.yml').read_text()
QUICK = {
    'model_options': {'input_size': 32},
    'epochs': 1,
    'batch_size': 16,
    'num_workers': 0,
    'device': 'cpu',
}
NUM_PICTURES = 48


def emoji(folder, data_dir=None):
    """Emoji with a smaller picture of each; `test` are the last four concepts."""

    @dataset(sql_file=folder / 'emoji.sql', data_dir=data_dir or folder / 'emoji')
    class Emoji:
        image: File
        concept: str
        artist: str
        split: str = 'train'

        def small(image: File) -> File:
            with Image.open(image.path) as picture, File.make_tmp('.png') as file:
                picture.convert('RGB').resize((48, 48)).save(file.path)
                return file

    docs = load_emoji('train')[:NUM_PICTURES]
    Emoji.extend(
        {
            'image': doc.uri,
            'concept': doc.tags['concept'],
            'artist': doc.tags['artist'],
            'split': 'train' if place < NUM_PICTURES - 16 else 'test',
        }
        for place, doc in enumerate(docs)
    )
    return Emoji


def naive(split):
    """The Documents that one would make by hand, with the pictures as pixels."""
    docs = load_emoji('train')[:NUM_PICTURES]
    docs = docs[:-16] if split == 'train' else docs[-16:]
    return DocumentArray(
        Document(
            tensor=np.asarray(Image.open(doc.uri).convert('RGB').resize((48, 48))),
            tags={'finetuner_label': doc.tags['concept']},
        )
        for doc in docs
    )


def pixels_of(content):
    if isinstance(content, np.ndarray):
        return content
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    path = Path('picture')
    path.write_bytes(data)
    return np.asarray(Image.open(path))


def check_data(stored, split):
    """What was stored for a run says what the naive Documents say."""
    found, wanted = build_dataset(stored), build_dataset(naive(split))
    assert (found.kind, found.classes) == (wanted.kind, wanted.classes) == ('class', wanted.classes)
    assert list(found.labels) == list(wanted.labels)
    for (content, _), (pixels, _) in zip(found, wanted, strict=True):
        assert (pixels_of(content) == pixels).all()


def fit(made):
    """A run on one part, evaluated on the other; waits for its end."""
    test = made.where(split='test')
    queries = test.where(artist='noto')
    index = test.where(artist=lambda artist: artist != 'noto')
    run = finetuner.fit(
        'efficientnet-lite0',
        train_data=made.where(split='train'),
        eval_data=test,
        content='small',
        label='concept',
        callbacks=[EvaluationCallback(queries, index, limit=3)],
        **QUICK,
    )
    log = list(run.stream_logs())
    assert run.status()['status'] == 'FINISHED', '\n'.join(log)
    return run


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FINETUNER_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)


def test_a_run_here_trains_on_a_derived_column(tmp_path):
    made = emoji(tmp_path)
    run = fit(made)
    check_data(get_client().load_data(run.config['train_data']), 'train')
    check_data(get_client().load_data(run.config['eval_data']), 'test')
    assert 0 < run.metrics()['after']['efficientnet-lite0_recall_at_k'] <= 1
    # what a model makes of a row leads back to it
    docs = made[:4].to_documents('small')
    finetuner.encode(finetuner.get_model(run.artifact_id), docs)
    assert [doc.tags['row'] for doc in docs] == [row.id for row in made[:4]]
    assert docs.embeddings.shape[0] == 4


def test_a_run_on_a_server_gets_the_files(tmp_path, monkeypatch):
    home = tmp_path / 'server' / 'home'
    home.mkdir(parents=True)
    token = TokenStore(open_database(f'sqlite:///{home / "finetuner.db"}')).create('alice')[0]
    # the files are on no disk at all; what is fetched of them is on that of the client
    made = emoji(tmp_path, f'memory://{tmp_path.name}')
    with serve(FLOW, home.parent, FINETUNER_TOKEN='') as server:
        finetuner.login(host=server.url, token=token)
        run = fit(made)
        with store_of(server) as store:
            alice = store.for_owner('alice')
            for key, split in (('train_data', 'train'), ('eval_data', 'test')):
                stored = alice.load_data(run.config[key])
                assert all(doc.blob and not doc.uri for doc in stored)
                check_data(stored, split)
                rows = [row.id for row in made.where(split=split)]
                assert [doc.tags['row'] for doc in stored] == rows
        # collections are there, too
        fed = made.to_training_set('emoji', 'small', label='concept', group='split')
        fed.save()
        back = made.where(split='test').to_documents('small', 'concept')

        @dataset(sql_file=tmp_path / 'back.sql', data_dir=tmp_path / 'back')
        class Back:
            picture: File
            concept: str
            split: str

        found = TrainingSet.from_name('emoji')
        assert found.count == {'train': NUM_PICTURES - 16, 'test': 16}
        assert Back.import_training_set(found, 'picture', 'concept', 'split') == NUM_PICTURES
        for row, doc in zip(Back.where(split='test'), back, strict=True):
            assert row.concept == doc.tags['finetuner_label']
            assert row.picture.read() == Path(doc.uri).read_bytes()
