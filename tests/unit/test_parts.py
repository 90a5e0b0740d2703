"""What each of several processes loads of the batches that all of them draw."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuner.data.loading import build_dataset, build_loader
from finetuner.data.numbering import NumberedBatches, Part
from finetuner.data.samplers import RandomSampler, SequentialSampler
from tests.conftest import make_vector_docs


@given(st.integers(0, 40), st.integers(1, 7), st.sampled_from([1, 2]))
def test_the_parts_of_a_batch_are_all_of_it_in_order(num_items, size, unit):
    batch = list(range(num_items * unit))
    parts = [Part(rank, size, unit).of(batch) for rank in range(size)]
    assert [item for part in parts for item in part] == batch
    counts = [len(part) // unit for part in parts]
    assert max(counts) - min(counts) <= 1, 'evenly'
    assert all(len(part) % unit == 0 for part in parts), 'what belongs together stays together'


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 5))
def test_every_so_manieth_batch_makes_all_of_them(num_items, batch_size, size):
    whole = list(NumberedBatches(SequentialSampler(num_items, batch_size), 0))
    shared = [
        NumberedBatches(SequentialSampler(num_items, batch_size), 0, Part(rank, size, 1, True))
        for rank in range(size)
    ]
    found = [list(batches) for batches in shared]
    assert [len(batches) for batches in shared] == [len(each) for each in found]
    for number, batch in enumerate(whole):
        rank, place = number % size, number // size
        assert found[rank][place] == batch
        assert found[rank][place].key == batch.key, 'what is drawn for it is the same'


def test_parts_draw_numbers_of_their_own():
    keys = {
        batch.key
        for rank in range(3)
        for batch in NumberedBatches(RandomSampler(10, 4, seed=0), 5, Part(rank, 3))
    }
    assert len(keys) == 3 * 3


def loader_of(rank, size, **options):
    dataset = build_dataset(make_vector_docs())
    sampler = RandomSampler(len(dataset), 6, seed=3)
    return build_loader(dataset, sampler, seed=1, part=Part(rank, size), **options)


@pytest.mark.parametrize('size', [2, 3, 8])
def test_loaders_of_all_ranks_load_the_batches_of_one(size):
    loaders = [loader_of(rank, size) for rank in range(size)]
    for (inputs, labels), *parts in zip(loader_of(0, 1), *loaders, strict=True):
        rows = [part for part, _ in parts if part is not None]
        np.testing.assert_array_equal(np.concatenate(rows), inputs)
        np.testing.assert_array_equal(np.concatenate([each for _, each in parts]), labels)
        assert all(each.dtype == labels.dtype for _, each in parts), 'of an empty part, too'


def test_a_part_goes_on_where_it_was():
    first = loader_of(1, 2)
    taken = [next(batches) for batches in [iter(first)] for _ in range(2)]
    second = loader_of(1, 2)
    second.load_state_dict(first.state_dict())
    found = [labels.tolist() for _, labels in [*taken, *second]]
    assert found == [labels.tolist() for _, labels in loader_of(1, 2)]
