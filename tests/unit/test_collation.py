"""Collation: stacking, padding of mixed sizes, and texts to token ids."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader

from finetuner.data.collation import (
    TextCollate,
    pad_contents,
    pad_token_ids,
    stack_contents,
    text_lengths,
)
from finetuner.excepts import ConfigError, DataError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'red', 'shoe', 'blue', 'hat', 'and', 'a', '##s']


def build_tokenizer(words=WORDS, special=True):
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token='[UNK]')
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
        )
    return tokenizer


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def file(tokenizer, tmp_path):
    path = tmp_path / 'tokenizer.json'
    tokenizer.save(str(path))
    return path


# --- arrays


@pytest.mark.parametrize('dtype', [np.uint8, np.int64, np.float32, np.float16, bool])
def test_padding_keeps_contents_and_dtype(dtype):
    generator = np.random.default_rng(0)
    shapes = [(3, 1, 4), (2, 5, 4), (1, 2, 1), (3, 5, 4)]
    arrays = [generator.integers(0, 2, shape).astype(dtype) for shape in shapes]
    padded = pad_contents(arrays)
    assert padded.shape == (4, 3, 5, 4)
    for row, array in zip(padded.numpy(), arrays, strict=True):
        assert row.dtype == dtype
        inside = tuple(slice(size) for size in array.shape)
        np.testing.assert_array_equal(row[inside], array)
        assert row.astype(float).sum() == array.astype(float).sum(), 'all else is zero'


def test_padding_of_lists_tensors_and_doubles():
    padded = pad_contents([[1.5, 2.5], torch.tensor([1.0]), np.array([], dtype=np.float64)])
    assert padded.dtype == torch.float32
    assert padded.tolist() == [[1.5, 2.5], [1.0, 0.0], [0.0, 0.0]]
    mixed = pad_contents([np.array([1], dtype=np.uint8), np.array([300, 2])])
    assert mixed.dtype == torch.int64
    assert mixed.tolist() == [[1, 0], [300, 2]]


def test_padding_equal_sizes_is_stacking():
    arrays = [np.full((2, 3), number, dtype=np.uint8) for number in range(4)]
    assert torch.equal(pad_contents(arrays), stack_contents(arrays))
    assert torch.equal(pad_contents([1, 2, 3]), stack_contents([1, 2, 3]))


def test_padding_takes_a_read_only_array():
    array = np.arange(3)
    array.flags.writeable = False
    padded = pad_contents([array, array[:1]])
    padded += 1
    assert array.tolist() == [0, 1, 2]


def test_padding_refuses_other_dimensions_and_no_arrays():
    contents = [np.zeros((2, 2)), np.zeros(2)]
    with pytest.raises(
        DataError, match=r'^item 1 became an array of 1 dimensions and item 0 one of 2'
    ):
        pad_contents(contents)
    with pytest.raises(
        DataError, match=r'^Document 7 became an array of 1 dim.* Document 3 one of'
    ):
        pad_contents(contents, ['Document 3', 'Document 7'])
    for content, kind in (
        ('text', 'a str'),
        (b'x', 'a bytes'),
        ({}, 'a dict'),
        (None, 'a NoneType'),
    ):
        for collate in (pad_contents, stack_contents):
            with pytest.raises(DataError, match=f'^item 1 became {kind}, which is no array'):
                collate([np.zeros(2), content])


def test_stacking_refuses_mixed_shapes_by_name():
    with pytest.raises(DataError, match=r'^b became an array of shape \(3,\) and a one of \(2,\)'):
        stack_contents([np.zeros(2), np.zeros(3)], ['a', 'b'])


# --- token ids


def test_pad_token_ids():
    batch = pad_token_ids([[5, 6, 7], [8], []], pad_id=9)
    assert batch['input_ids'].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert batch['attention_mask'].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_pad_token_ids_cuts_only_what_is_too_long():
    batch = pad_token_ids([[5, 6, 7], [8]], max_length=2)
    assert batch['input_ids'].tolist() == [[5, 6], [8, 0]]
    assert batch['attention_mask'].tolist() == [[1, 1], [1, 0]]
    assert pad_token_ids([[5], [8]], max_length=100)['input_ids'].shape == (2, 1)


# --- texts


def test_text_collate_pads_to_the_longest(tokenizer, file):
    for source in (tokenizer, file, str(file)):
        batch = TextCollate(source)(['red shoe', 'hats', 'zebra and a hat'])
        assert batch['input_ids'].tolist() == [
            [2, 4, 5, 3, 0, 0],
            [2, 7, 10, 3, 0, 0],
            [2, 1, 8, 9, 7, 3],
        ]
        assert batch['attention_mask'].sum(dim=1).tolist() == [4, 4, 6]


def test_max_length_counts_special_tokens(tokenizer):
    batch = TextCollate(tokenizer, max_length=4)(['red shoe and a blue hat', 'hat'])
    assert batch['input_ids'].tolist() == [[2, 4, 5, 3], [2, 7, 3, 0]]


def test_own_settings_of_the_tokenizer(tokenizer):
    """Its limit holds where none is given, padding to a fixed length does not; it is left alone."""
    tokenizer.enable_padding(pad_id=6, pad_token='blue', length=50)
    tokenizer.enable_truncation(5)
    before = tokenizer.to_str()
    batch = TextCollate(tokenizer)(['red shoe and a blue hat', 'hat'])
    assert batch['input_ids'].tolist() == [[2, 4, 5, 8, 3], [2, 7, 3, 6, 6]]
    assert TextCollate(tokenizer, 6)(['red shoe and a hat'])['input_ids'].shape == (1, 6)
    assert tokenizer.to_str() == before


def test_padding_token_is_found_by_name():
    words = [*WORDS[1:], '<pad>']
    collate = TextCollate(build_tokenizer(words, special=False))
    assert collate(['red', 'red hat'])['input_ids'][0].tolist() == [3, 10]
    nameless = TextCollate(build_tokenizer(WORDS[1:], special=False))
    assert nameless(['red', 'red hat'])['input_ids'][0].tolist() == [3, 0]


def test_real_texts_come_back_whole():
    """A trained tokenizer, long and short texts: each row decodes to what went in."""
    texts = [f'{"word " * (number % 13)}number {number} Ünïcödé' for number in range(64)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    batch = TextCollate(trained)(texts)
    for ids, mask, text in zip(*batch.values(), texts, strict=True):
        assert ids[mask.bool()].tolist() == trained.encode(text).ids
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert batch['attention_mask'].sum(dim=1).max() == batch['input_ids'].shape[1]


@pytest.mark.parametrize(
    ('content', 'kind'),
    [(b'red', 'a bytes'), (None, 'a NoneType'), (3, 'an int'), (np.zeros(2), 'an? ndarray')],
)
def test_what_is_no_text(tokenizer, content, kind):
    collate = TextCollate(tokenizer)
    with pytest.raises(DataError, match=f'^item 1 is {kind}, not a text'):
        collate(['red', content])
    with pytest.raises(DataError, match=f'^Document 40 is {kind}, not a text'):
        collate(['red', content], names=['Document 8', 'Document 40'])
    with pytest.raises(DataError, match=r'^item 2 is'):
        text_lengths(['red', 'hat', content], tokenizer)


def test_text_without_tokens():
    plain = TextCollate(build_tokenizer(special=False))
    with pytest.raises(DataError, match=r"^item 1 \('   '\) has no tokens"):
        plain(['red', '   '])


@pytest.mark.parametrize('max_length', [2, 0, -1, 4.5, True, '8'])
def test_bad_max_length(tokenizer, max_length):
    with pytest.raises(ConfigError, match=r'^max_length must be .* more than the 2 special'):
        TextCollate(tokenizer, max_length)


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ConfigError, match=r'absent\.json.* cannot be read: No such file'):
        TextCollate(tmp_path / 'absent.json')
    with pytest.raises(ConfigError, match='cannot be read: Is a directory'):
        TextCollate(tmp_path)
    for name, data in (('a', b'{}'), ('b', b''), ('c', b'\xff\xfe'), ('d', b'{"model": 1')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name}' is no tokenizer.json"):
            TextCollate(tmp_path / name)
    with pytest.raises(ConfigError, match='tokenizer is an int: give a Tokenizer'):
        TextCollate(3)


def test_text_lengths(tokenizer, file):
    texts = ['red', 'red shoe and a hat', 'hats']
    for source in (tokenizer, file):
        lengths = text_lengths(iter(texts), source)
        assert lengths.dtype == np.int64
        assert lengths.tolist() == [3, 7, 4]
    assert text_lengths(texts, tokenizer, max_length=5).tolist() == [3, 5, 4]
    assert text_lengths([], tokenizer).shape == (0,)


def test_pickled_and_in_threads(tokenizer):
    collate = TextCollate(tokenizer, max_length=6)
    texts = ['red shoe and a blue hat', 'hat']
    expected = collate(texts)['input_ids']
    assert torch.equal(pickle.loads(pickle.dumps(collate))(texts)['input_ids'], expected)
    with ThreadPoolExecutor(8) as pool:
        for batch in pool.map(lambda _: collate(texts), range(200)):
            assert torch.equal(batch['input_ids'], expected)


@pytest.mark.skipif(sys.platform != 'linux', reason='loader workers are forked on Linux only')
def test_forked_workers_after_use_in_the_parent(file):
    """Neither a hang nor the library's warning on stderr of a fork after parallel use."""
    code = f"""
from torch.utils.data import DataLoader
from finetuner.data.collation import TextCollate, text_lengths
texts = ['red shoe and a blue hat', 'hat'] * 200
text_lengths(texts, {str(file)!r})
collate = TextCollate({str(file)!r})
collate(texts)
loader = DataLoader(texts, 50, collate_fn=collate, num_workers=2, multiprocessing_context='fork')
print(sum(int(batch['attention_mask'].sum()) for batch in loader))
"""
    environment = {k: v for k, v in os.environ.items() if k != 'TOKENIZERS_PARALLELISM'}
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, 'OMP_NUM_THREADS': '1'},
    )
    assert result.stdout.strip() == str(200 * (8 + 3)), result.stderr
    assert 'forked' not in result.stderr


def test_as_collate_fn(tokenizer):
    loader = DataLoader(['red', 'blue hat', 'hats'], 2, collate_fn=TextCollate(tokenizer))
    assert [tuple(batch['input_ids'].shape) for batch in loader] == [(2, 4), (1, 4)]
