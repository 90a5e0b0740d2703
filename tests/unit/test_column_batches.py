"""Batches declared as classes: what they hold, in which order, and again."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuner.columns import batch, dataset
from finetuner.excepts import ConfigError

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def numbers(tmp_path_factory):
    place = tmp_path_factory.mktemp('numbers')

    @dataset(sql_file=place / 'dataset.sql', data_dir=place / 'dataset')
    class Numbers:
        number: int
        split: str = 'train'

        def squared(number: int) -> float:
            return float(number**2)

    Numbers.extend(
        {'number': number, 'split': 'test' if number % 5 == 0 else 'train'} for number in range(53)
    )
    return Numbers


@pytest.fixture(scope='module')
def batches(numbers):
    computed = []

    @batch(numbers)
    class NumberBatch:
        def squares(squared: list[float]) -> torch.Tensor:
            return torch.tensor(squared)

        def noisy(squares: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            computed.append('noisy')
            return squares + torch.randn(squares.shape, generator=generator)

        def drawn(number: list[int], numpy_draws: np.random.Generator) -> np.ndarray:
            return numpy_draws.random(len(number))

        def chosen(number: list[int], draws: random.Random) -> int:
            return draws.choice(number)

        def together(squares, noisy, drawn) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
            return squares, noisy, drawn

        def twice(noisy: torch.Tensor, together: tuple) -> bool:
            return bool((noisy == together[1]).all())

        def plain(number: list[int]) -> list[int]:
            return number

    NumberBatch.computed = computed
    return NumberBatch


def test_batches_hold_the_rows_in_their_order(batches):
    assert list(batches.plain.range(0, 10, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(batches.plain.range(50, 100, 4)) == [[50, 51, 52]]
    assert list(batches.plain.range(60, 100, 4)) == []
    assert len(batches.plain.all(10)) == 6
    assert [len(each) for each in batches.plain.all(10)] == [10, 10, 10, 10, 10, 3]
    assert list(batches.plain.where(4, split='test', number=lambda n: n > 30)) == [[35, 40, 45, 50]]
    first = next(iter(batches.squares.all(3)))
    assert first.tolist() == [0.0, 1.0, 4.0]
    assert batches.squares([2.0]).tolist() == [2.0]


def test_a_column_that_several_need_is_computed_once_a_batch(batches):
    batches.computed.clear()
    assert list(batches.twice.range(0, 20, 10)) == [True, True]
    assert len(batches.computed) == 2


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    batch_size=st.integers(1, 20),
    world=st.integers(1, 5),
    seed=st.none() | st.integers(0, 2**40),
    ahead=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_ranges_shuffles_and_shards_cover_each_row_once(
    batches, start, length, batch_size, world, seed, ahead, epoch
):
    expected = list(range(53))[start : start + length]
    shares = []
    for rank in range(world):
        chosen = batches.plain.range(start, start + length, batch_size).shard(rank, world)
        chosen = chosen.prefetch(ahead).from_epoch(epoch)
        if seed is not None:
            chosen = chosen.randomize(seed)
        found = list(chosen)
        assert len(found) == len(
            batches.plain.range(start, start + length, batch_size).shard(rank, world)
        )
        assert all(len(each) == batch_size for each in found[:-1])
        shares.append([number for each in found for number in each])
    assert sorted(number for share in shares for number in share) == expected
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if seed is None and world == 1:
        assert shares[0] == expected


def test_an_epoch_is_repeated_exactly_and_the_next_one_is_another(batches):
    def epochs(column, count, **options):
        chosen = column.all(10).randomize(7)
        if options.get('ahead'):
            chosen = chosen.prefetch(2)
        if options.get('first'):
            chosen = chosen.from_epoch(options['first'])
        return [[torch.as_tensor(each).tolist() for each in chosen] for _ in range(count)]

    for column in (batches.noisy, batches.drawn, batches.chosen, batches.plain):
        first = epochs(column, 3)
        assert first == epochs(column, 3)
        assert first == epochs(column, 3, ahead=True)
        assert first[2] == epochs(column, 1, first=2)[0]
        assert first[0] != first[1] != first[2]
    other = [each.tolist() for each in batches.noisy.all(10).randomize(8)]
    assert other != epochs(batches.noisy, 1)[0]
    # rows in their order, draws by a seed
    kept = [each.tolist() for each in batches.noisy.all(10).seeded(3)]
    assert kept == [each.tolist() for each in batches.noisy.all(10).seeded(3)]
    # what is computed beside it changes nothing
    alone = [each.tolist() for each in batches.noisy.all(10).seeded(3)]
    beside = [noisy.tolist() for _, noisy, _ in batches.together.all(10).seeded(3)]
    assert alone == beside


def test_an_error_ahead_of_time_is_raised_where_batches_are_asked_for(numbers):
    @batch(numbers)
    class Failing:
        def broken(number: list[int]) -> int:
            if 20 in number:
                raise ValueError('twenty')
            return len(number)

    for ahead in (0, 2):
        found = iter(Failing.broken.all(10).prefetch(ahead))
        assert [next(found), next(found)] == [10, 10]
        with pytest.raises(ValueError, match='twenty'):
            next(found)
    # who stops in the middle leaves no thread
    for _ in Failing.broken.all(1).prefetch(3):
        break


def declare(numbers, text):
    namespace = {'torch': torch, 'np': np}
    source = f'class Declared:\n{text}\n'
    exec(compile(source, 'declared.py', 'exec', dont_inherit=True), namespace)
    return batch(numbers)(namespace['Declared'])


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('    def a(b): return b', r"declared\.py:2: Declared\.a: .*'b'"),
        ('    def a(number): return number', r'write `number: list\[\.\.\.\]`'),
        ('    def a(nmber: list[int]): return 1', r"'nmber'.*number"),
        ('    def a(number: list[str]): return 1', r'number is int, and it takes lists of str'),
        ('    def a(*number): return 1', r'not \*number'),
        ('    def a(b): return b\n    def b(a): return a', r'from itself: [ab] -> [ab] -> [ab]'),
        (
            '    def a(number: list[int]) -> np.ndarray: return 1\n'
            '    def b(a: torch.Tensor): return a',
            r'declared\.py:3: .*a is ndarray, and it takes Tensor',
        ),
    ],
)
def test_what_is_none_of_a_batch_is_told_when_the_class_is_defined(text, words, numbers):
    with pytest.raises(ConfigError, match=words):
        declare(numbers, text)


@pytest.mark.parametrize(
    'wrong',
    [
        lambda column: column.all(0),
        lambda column: column.all(True),
        lambda column: column.range(-1, 3, 2),
        lambda column: column.range(0, 1.5, 2),
        lambda column: column.all(2).shard(2, 2),
        lambda column: column.all(2).shard(-1, 2),
        lambda column: column.all(2).randomize('x'),
        lambda column: column.all(2).prefetch(-1),
        lambda column: batch(int),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, batches):
    with pytest.raises(ConfigError):
        wrong(batches.plain)


def test_tensors_of_tensorflow_and_its_generators(tmp_path):
    tf = pytest.importorskip('tensorflow')

    @dataset(sql_file=tmp_path / 'rows.sql', data_dir=tmp_path / 'rows')
    class Numbers:
        number: int

    @batch(Numbers)
    class NumberBatch:
        def tensor(number: list[int]) -> tf.Tensor:
            return tf.constant(number, tf.float32)

        def noisy(tensor: tf.Tensor, draws: tf.random.Generator) -> tf.Tensor:
            return tensor + draws.normal(tensor.shape)

    Numbers.extend({'number': number} for number in range(10))
    batches = NumberBatch.noisy.all(4).randomize(seed=3)
    first, second = ([each.numpy() for each in batches] for _ in range(2))
    again = [each.numpy() for each in NumberBatch.noisy.all(4).randomize(seed=3)]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert not all((one == other).all() for one, other in zip(first, second, strict=True))
    rows = np.concatenate([each.numpy() for each in NumberBatch.tensor.all(4).randomize(seed=3)])
    assert sorted(rows) == list(range(10))
