"""Decoded contents: the same as fresh ones, made once, shared by processes, within their memory."""

import copy
import logging
import pickle

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.data.content_cache import FreshContents, KeptContents, find_rows
from finetuner.data.loading import LoadingError, build_dataset, build_loader
from finetuner.data.memory import available_memory
from finetuner.data.samplers import SequentialSampler
from finetuner.excepts import PictureError
from finetuner.images import picture_of
from tests.conftest import make_picture_docs, png

SIZE = 16
ITEM_BYTES = SIZE * SIZE * 3 + 1


class Decoder:
    """Decodes, and counts how often it did."""

    def __init__(self):
        self.count = 0

    def __call__(self, doc):
        self.count += 1
        return picture_of(doc, SIZE)


def pictures(dataset):
    return [np.array(dataset[index][0]) for index in range(len(dataset))]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def dataset():
    return build_dataset(make_picture_docs())


def test_a_picture_is_decoded_once(dataset):
    decode = Decoder()
    fresh = FreshContents().prepared(dataset, decode)
    expected = pictures(fresh)
    kept = KeptContents().prepared(dataset, decode)
    decode.count = 0
    assert_same(pictures(kept), expected)
    assert decode.count == len(dataset)
    assert_same(pictures(kept), expected)
    assert decode.count == len(dataset)
    assert kept[3][1] == dataset[3][1]
    with pytest.raises(ValueError, match='read-only'):
        kept[0][0][:] = 0


def test_what_varies_is_varied_each_time(dataset):
    decode, drawn = Decoder(), np.random.default_rng(0)

    def shift(picture):
        return picture + drawn.integers(1, 100, dtype=np.uint8)

    kept = KeptContents().prepared(dataset, decode, shift)
    first, second = kept[0][0], kept[0][0]
    assert (first != second).all()
    assert decode.count == 2  # one look at what contents are like
    fresh = FreshContents().prepared(dataset, decode, shift)
    assert (fresh[0][0] != fresh[0][0]).all()
    assert decode.count == 4


def test_items_of_subsets_share(dataset):
    decode = Decoder()
    kept = KeptContents()
    expected = pictures(kept.prepared(dataset, decode))
    count = decode.count
    numbers = np.array([20, 3, 11])
    part = dataset.subset(numbers).subset(np.array([2, 0]))
    found = kept.prepared(part, decode)
    assert_same(pictures(found), [expected[11], expected[20]])
    assert decode.count == count
    # made in another way they are others
    pictures(kept.prepared(part, Decoder()))
    other = Decoder()
    assert kept.share_kept(part, other) == 0
    assert kept.share_kept(part, decode) == 1


def test_memory_has_an_end(dataset, caplog):
    decode = Decoder()
    kept = KeptContents(10 * ITEM_BYTES + 5)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        found = kept.prepared(dataset, decode)
    assert 'Memory holds 10 of 24 decoded pictures' in caplog.text
    assert_same(pictures(found), pictures(FreshContents().prepared(dataset, decode)))
    decode.count = 0
    pictures(found)
    assert decode.count == 14
    assert kept.share_kept(dataset, decode) == pytest.approx(10 / 24)
    # nothing is left for others
    other = Decoder()
    pictures(kept.prepared(dataset, other))
    pictures(kept.prepared(dataset, other))
    assert other.count >= 48


def test_contents_of_other_kinds_are_made_anew():
    docs = DocumentArray(Document(text=f'{i}', tags={'finetuner_label': i % 2}) for i in range(6))
    dataset = build_dataset(docs)
    kept = KeptContents().prepared(dataset, lambda doc: [int(doc.text)])
    assert [kept[i][0] for i in range(6)] == [[i] for i in range(6)]
    assert KeptContents().prepared(dataset, None)[2][0] == '2'
    # a picture of another shape passes through
    sizes = iter([SIZE, SIZE, 8, 8])
    kept = KeptContents().prepared(
        build_dataset(make_picture_docs()), lambda doc: picture_of(doc, next(sizes))
    )
    assert [kept[i][0].shape[0] for i in (0, 1, 1)] == [SIZE, 8, 8]


def test_matches_and_chunks_have_numbers_of_their_own():
    pictures_of = make_picture_docs(2, 6)
    roots = DocumentArray(Document(blob=doc.blob) for doc in pictures_of[:3])
    for number, root in enumerate(roots):
        root.matches = copy.deepcopy(pictures_of[3 + number : 5 + 2 * number])
        for match in root.matches:
            match.tags['finetuner_label'] = 1
    dataset = build_dataset(roots)
    assert dataset.kind == 'session'
    keys = dataset.item_keys()
    assert len(set(keys.tolist())) == len(dataset)
    part = dataset.subset(np.array([2, 0]))
    rows = find_rows(keys, part.item_keys())
    decode, kept = Decoder(), KeptContents()
    whole = pictures(kept.prepared(dataset, decode))
    assert_same(pictures(kept.prepared(part, decode)), [whole[row] for row in rows])
    assert_same(
        [picture_of(part.document(i), SIZE) for i in range(len(part))],
        [whole[row] for row in rows],
    )


@pytest.mark.parametrize('broken', [0, 9])
def test_broken_pictures_are_named(broken):
    docs = make_picture_docs()
    docs[broken].blob = b'gone'
    kept = KeptContents().prepared(build_dataset(docs), Decoder())
    loader = build_loader(kept, SequentialSampler(24, 8))
    for _ in range(2):
        with pytest.raises(LoadingError, match=f'^Document {broken} cannot be preprocessed'):
            list(loader)
    loader = build_loader(kept, SequentialSampler(24, 8), on_broken='skip')
    for _ in range(2):
        assert sum(len(labels) for _, labels in loader) == 23
    assert list(loader.broken) == [f'Document {broken}']
    with pytest.raises(PictureError):
        kept[broken]


def test_forked_processes_share(dataset, tmp_path):
    docs = DocumentArray()
    for number, doc in enumerate(make_picture_docs()):
        path = tmp_path / f'{number}.png'
        path.write_bytes(doc.blob)
        docs.append(Document(uri=str(path), tags=doc.tags))
    kept = KeptContents().prepared(build_dataset(docs), Decoder())
    loader = build_loader(kept, SequentialSampler(24, 5), num_workers=2)
    first = [inputs for inputs, _ in loader]
    # without the files it is clear who has them: this process, too, which decoded none
    for path in tmp_path.iterdir():
        path.unlink()
    second = [inputs for inputs, _ in loader]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert_same(pictures(kept), [picture.numpy() for batch in first for picture in batch])
    loader.close()


def test_processes_that_share_nothing_decode_anew(dataset):
    kept = KeptContents().prepared(dataset, lambda_free_decode)
    expected = pictures(kept)
    assert_same(pictures(pickle.loads(pickle.dumps(kept))), expected)


def lambda_free_decode(doc):
    return picture_of(doc, SIZE)


def test_rows_are_found():
    known = np.array([7, 3, 9])
    np.testing.assert_array_equal(
        find_rows(known, np.array([3, 8, 9, 1, 7, 10])), [1, -1, 2, -1, 0, -1]
    )


def test_available_memory_is_that_of_the_container(tmp_path):
    whole = available_memory(tmp_path / 'absent')
    assert whole > 10**8
    (tmp_path / 'memory.max').write_text('max\n')
    (tmp_path / 'memory.current').write_text('5000\n')
    assert available_memory(tmp_path) > 10**8
    (tmp_path / 'memory.max').write_text('20000\n')
    assert available_memory(tmp_path) == 15000
    (tmp_path / 'memory.stat').write_text('anon 1000\ninactive_file 3000\nactive_file 5\n')
    assert available_memory(tmp_path) == 18000


def test_a_picture_of_one_colour_is_kept_too():
    # zeros look like memory that nothing was written to
    docs = DocumentArray(
        Document(blob=png(np.zeros((4, 4, 3), np.uint8)), tags={'finetuner_label': i % 2})
        for i in range(4)
    )
    decode = Decoder()
    kept = KeptContents().prepared(build_dataset(docs), decode)
    for _ in range(3):
        assert not kept[1][0].any()
    assert decode.count == 2
