"""The emoji data set: what its README says, and how its Documents look."""

import csv
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from finetuner.data.checks import check_evaluation_data, check_training_data
from finetuner.data.loading import build_dataset

EXAMPLES = Path(__file__).parents[2] / 'examples'
sys.path.insert(0, str(EXAMPLES))

from emoji_data import ARTISTS, load_emoji, load_emoji_queries_and_index  # noqa: E402


@pytest.mark.parametrize('split', ['train', 'test'])
def test_1000_pictures_of_250_concepts_by_four_artists(split):
    docs = load_emoji(split)
    assert len(docs) == 1000
    labels = [doc.tags['finetuner_label'] for doc in docs]
    assert labels == [label for label in range(250) for _ in range(4)]
    assert [doc.tags['artist'] for doc in docs[:4]] == list(ARTISTS)
    concepts = [doc.tags['concept'] for doc in docs[::4]]
    assert concepts == sorted(set(concepts))
    for doc in docs:
        folder = EXAMPLES / 'emoji' / split / doc.tags['concept']
        assert Path(doc.uri) == folder / f'{doc.tags["artist"]}.webp'
    check_training_data(build_dataset(docs), batch_size=128, num_items_per_class=4)


def test_no_concept_is_in_both_splits():
    train, test = (
        {doc.tags['concept'] for doc in load_emoji(split)} for split in ('train', 'test')
    )
    assert not train & test
    with (EXAMPLES / 'emoji' / 'concepts.csv').open(encoding='utf-8', newline='') as file:
        assert {row['concept'] for row in csv.DictReader(file)} == train | test


def test_pictures_are_96_by_96_webp():
    for split in ('train', 'test'):
        for doc in load_emoji(split)[::50]:
            data = Path(doc.uri).read_bytes()
            assert data[8:12] == b'WEBP'
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert picture.shape == (96, 96, 3)


def test_queries_and_index():
    queries, index = load_emoji_queries_and_index()
    assert (len(queries), len(index)) == (250, 750)
    assert {doc.tags['artist'] for doc in queries} == {'noto'}
    assert {doc.tags['artist'] for doc in index} == set(ARTISTS) - {'noto'}
    assert set(Counter(doc.tags['finetuner_label'] for doc in index).values()) == {3}
    check_evaluation_data(build_dataset(queries), build_dataset(index))


def test_blobs_hold_the_files():
    docs = load_emoji('test', blobs=True)
    assert not docs[7].uri
    assert docs[7].blob == Path(docs[7].tags['file']).read_bytes()


def test_ids_are_the_same_each_time_and_all_different():
    ids = [doc.id for split in ('train', 'test') for doc in load_emoji(split)]
    assert len(set(ids)) == 2000
    assert ids[:1000] == [doc.id for doc in load_emoji('train')]


def test_wrong_split_or_folder(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', not 'dev'"):
        load_emoji('dev')
    (tmp_path / 'concepts.csv').write_text('split,concept\ntest,star\n')
    with pytest.raises(FileNotFoundError, match='star'):
        load_emoji('test', root=tmp_path)


def test_licences_lie_beside_the_pictures():
    text = (EXAMPLES / 'emoji' / 'README.md').read_text(encoding='utf-8')
    for artist in ARTISTS:
        assert artist in text
    assert 'Apache-2.0' in text
    assert 'CC-BY-4.0' in text
