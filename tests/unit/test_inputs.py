"""How texts are divided into batches."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuner.inputs import divide_by_length

MAX_TOKENS = 240
COST_OF_A_BATCH = 10  # 1 / 24 of them


def cost(lengths, batches):
    padded = sum(len(batch) * max(max(lengths[i], 1) for i in batch) for batch in batches)
    return padded + COST_OF_A_BATCH * len(batches)


def fits(lengths, batch):
    return len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= MAX_TOKENS


def least_cost(lengths):
    """Of all ways to put so many texts into batches, sorted or not."""

    def partitions(items):
        if not items:
            yield []
            return
        first, rest = items[0], items[1:]
        for size in range(len(rest) + 1):
            for others in itertools.combinations(rest, size):
                left = [item for item in rest if item not in others]
                for more in partitions(left):
                    yield [[first, *others], *more]

    return min(
        cost(lengths, batches)
        for batches in partitions(list(range(len(lengths))))
        if all(fits(lengths, batch) for batch in batches)
    )


@given(st.lists(st.integers(0, 300), max_size=7))
def test_no_other_way_costs_less(lengths):
    batches = list(divide_by_length(lengths, MAX_TOKENS))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(fits(lengths, batch) for batch in batches)
    assert cost(lengths, batches) == pytest.approx(least_cost(lengths))


def test_one_long_text_does_not_pad_the_short_ones():
    assert list(divide_by_length([5, 100, 6, 5], MAX_TOKENS)) == [[1], [2, 0, 3]]


def test_texts_of_one_length_fill_batches():
    sizes = [len(batch) for batch in divide_by_length([10] * 60, MAX_TOKENS)]
    assert sizes == [24, 24, 12]
