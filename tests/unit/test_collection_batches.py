"""Training on a cached collection: indices against lists, flips against loops, batches against both."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from finetuner.collections.batch_options import Preparation, Preparer
from finetuner.collections.batches import ImageTrainer, Partition
from finetuner.collections.cache import open_cache, write_cache
from finetuner.collections.labels import build_label_kind
from finetuner.collections.threads import num_threads
from finetuner.excepts import ConfigError, DataError, NotFoundError

from .collection_pairs import CLASSES, KEY, MemorySource, in_child, label_of, same_label

MLTYPES = tuple(CLASSES)
# train: pairs 0, 3, 6 and so on
NUM_TRAIN = 17


def source_of(mltype='classification', **options):
    return MemorySource(range(3 * NUM_TRAIN - 2), mltype=mltype, shape=(3, 6, 9), **options)


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    """A trainer of each kind of labels, and what it should serve."""
    found = {}
    for mltype in MLTYPES:
        root = tmp_path_factory.mktemp(mltype)
        source = source_of(mltype)
        write_cache(source, root)
        found[mltype] = ImageTrainer(open_cache(root, KEY), 4), source
    yield found
    for trainer, _ in found.values():
        trainer.close()


@pytest.fixture
def train(opened):
    return opened['classification'][0].train


def pairs_of(source, group='train'):
    return [
        (source.image_of(pair_id), source.label_of(pair_id)) for pair_id in source.ids_of(group)
    ]


def same_pair(one, other):
    return (
        one[0].dtype == other[0].dtype
        and same_arrays(one[0], other[0])
        and same_label(one[1], other[1])
    )


def same_arrays(one, other):
    return one.shape == other.shape and bool((one == other).all())


def same_pairs(some, others):
    some, others = list(some), list(others)
    return len(some) == len(others) and all(map(same_pair, some, others))


# ---- groups


@pytest.mark.parametrize('mltype', MLTYPES)
def test_groups_hold_their_pairs_in_order(opened, mltype):
    trainer, source = opened[mltype]
    assert trainer.groups == ('train', 'test', 'validate')
    assert list(trainer.classes) == CLASSES[mltype]
    assert (trainer.mltype, trainer.batch_size, trainer.is_whole) == (mltype, 4, True)
    for group in trainer.groups:
        partition = trainer[group]
        assert partition.ids.tolist() == source.ids_of(group)
        assert partition.classes == trainer.classes
        assert same_pairs(partition, pairs_of(source, group))
        assert same_pairs((partition[i] for i in range(len(partition))), pairs_of(source, group))
    assert same_pairs(trainer.validate, pairs_of(source, 'validate'))
    assert 'train: 17, test: 16, validate: 16' in repr(trainer)


def test_groups_of_other_names_and_groups_without_pairs(tmp_path):
    source = MemorySource(range(5))
    source.group_of = lambda pair_id: ('grün', 'holdout')[pair_id % 2]
    write_cache(source, tmp_path)
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        assert trainer.groups == ('grün', 'holdout')
        assert trainer['holdout'].ids.tolist() == [1, 3]
        assert len(trainer.train) == len(trainer['validate']) == 0
        assert list(trainer.train) == list(trainer.test.batch_generator()) == []
        assert trainer.train.images[:].shape == (0, 3, 8, 8)
        assert trainer.train.labels[:].shape == (0, 3)
        with pytest.raises(NotFoundError, match="did you mean 'holdout'"):
            trainer['hold out']
    with pytest.raises(DataError, match='was closed'):
        trainer['holdout'][0]


def test_the_published_lines(opened, capsys):
    b, source = opened['object_detection']
    print(len(b.train))
    for x, y in b.train[:5]:
        print(x, y)
    printed = capsys.readouterr().out
    assert printed.startswith('17\n')
    for x, y in pairs_of(source)[:5]:
        assert f'{x} {y}\n' in printed


# ---- indices


INDICES = st.one_of(
    st.slices(NUM_TRAIN),
    st.lists(st.integers(-NUM_TRAIN, NUM_TRAIN - 1), max_size=12),
    st.lists(st.booleans(), min_size=NUM_TRAIN, max_size=NUM_TRAIN),
)


def chosen(items, index):
    """What an index means, of a list."""
    if isinstance(index, slice):
        return items[index]
    if index and isinstance(index[0], bool):
        return [item for item, is_in in zip(items, index, strict=True) if is_in]
    return [items[i] for i in index]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(index=INDICES, as_array=st.booleans(), then=st.slices(5))
@pytest.mark.parametrize('mltype', MLTYPES)
def test_every_index_means_what_it_means_of_a_list(opened, mltype, index, as_array, then):
    trainer, source = opened[mltype]
    wanted = chosen(pairs_of(source), index)
    if as_array and not isinstance(index, slice):
        index = np.array(index, bool if index and isinstance(index[0], bool) else np.int16)
    found = trainer.train[index]
    assert isinstance(found, Partition)
    assert same_pairs(found, wanted)
    assert same_pairs(found[then], wanted[then])
    images, labels = trainer.train.images[index], trainer.train.labels[index]
    assert images.shape == (len(wanted), 3, 6, 9)
    assert labels.__class__ is (list if mltype == 'object_detection' else np.ndarray)
    assert len(labels) == len(wanted)
    for (x, y), image, label in zip(wanted, images, labels, strict=True):
        assert same_arrays(x, image)
        assert same_label(y, label)


@pytest.mark.parametrize('index', [0, -1, 16, -17, np.int64(3), np.uint8(5)])
def test_one_pair_by_number(opened, index):
    trainer, source = opened['segmentation']
    wanted = pairs_of(source)[index]
    assert same_pair(trainer.train[index], wanted)
    assert same_arrays(trainer.train.images[index], wanted[0])
    assert same_label(trainer.train.labels[index], wanted[1])


@pytest.mark.parametrize('index', [17, -18, [0, 17], [-18], [True] * 16])
def test_there_is_no_such_pair(train, index):
    for view in (train, train.images, train.labels):
        with pytest.raises(IndexError, match=r'17 pairs|there are 17'):
            view[index]


@pytest.mark.parametrize('index', [None, 'train', 1.0, [0.5], ['a'], [[1]], True, (1, None)])
def test_what_stands_for_no_pairs(train, index):
    with pytest.raises(ConfigError, match='stands for no pairs'):
        train[index]


@pytest.mark.parametrize('mltype', MLTYPES)
def test_what_was_read_may_be_written_to(opened, mltype):
    trainer, source = opened[mltype]
    for x, y in [trainer.train[0], next(iter(trainer.train)), trainer.train[0]]:
        assert same_pair((x, y), pairs_of(source)[0])
        x[...] = 0
        if isinstance(y, np.ndarray):
            y[...] = 0
    images = trainer.train.images
    assert (images.shape, images.dtype) == ((17, 3, 6, 9), np.uint8)
    assert all(map(same_arrays, images, [x for x, _ in pairs_of(source)]))
    assert all(map(same_label, trainer.train.labels, [y for _, y in pairs_of(source)]))


# ---- flips


def flipped_by_hand(image, label, mltype, horizontal, vertical):
    """Pixel by pixel; boxes as the pixels they cover."""
    _, height, width = image.shape
    turned = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            to_row = height - 1 - row if vertical else row
            to_column = width - 1 - column if horizontal else column
            turned[:, to_row, to_column] = image[:, row, column]
    if mltype == 'segmentation':
        label = flipped_by_hand(label[None], None, '', horizontal, vertical)[0][0]
    if mltype == 'object_detection':
        label = [
            [box_by_hand(box, height, width, horizontal, vertical) for box in boxes]
            for boxes in label
        ]
    return turned, label


def box_by_hand(box, height, width, horizontal, vertical):
    left, top, right, bottom = map(int, box)
    covered = np.zeros((1, height, width), np.uint8)
    covered[:, top:bottom, left:right] = 1
    turned, _ = flipped_by_hand(covered, None, '', horizontal, vertical)
    rows, columns = np.flatnonzero(turned[0].any(1)), np.flatnonzero(turned[0].any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


SIDES = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(
    mltype=st.sampled_from(MLTYPES),
    height=SIDES,
    width=SIDES,
    seed=st.integers(0, 99),
    horizontal=st.booleans(),
    vertical=st.booleans(),
    channels_last=st.booleans(),
)
def test_flips_agree_with_loops_and_undo_themselves(
    mltype, height, width, seed, horizontal, vertical, channels_last
):
    shape = (2, height, width)
    image = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    label = label_of(seed, mltype, shape)
    kind = build_label_kind(mltype, CLASSES[mltype])
    preparer = Preparer(Preparation(channels_last=channels_last), shape, image.dtype, kind)

    def flip(image, label):
        (out,) = preparer.new_images(1)
        preparer.write_image(image, out, horizontal=horizontal, vertical=vertical)
        image = out.transpose(2, 0, 1) if channels_last else out
        return image, preparer.label(label, horizontal=horizontal, vertical=vertical)

    once = flip(image, label)
    assert same_pair(once, flipped_by_hand(image, label, mltype, horizontal, vertical))
    assert same_pair(flip(*once), (image, label))


def turns_of(pair, mltype, horizontal, vertical):
    """All that may become of a pair."""
    return {
        (h, v): flipped_by_hand(*pair, mltype, h, v)
        for h in {False, horizontal}
        for v in {False, vertical}
    }


@pytest.mark.parametrize('mltype', MLTYPES)
@pytest.mark.parametrize(('horizontal', 'vertical'), [(True, False), (False, True), (True, True)])
def test_batches_flip_images_and_labels_together(opened, mltype, horizontal, vertical):
    trainer, source = opened[mltype]
    turns = [turns_of(pair, mltype, horizontal, vertical) for pair in pairs_of(source)]
    batches = trainer.train.batch_generator(
        5, shuffle=False, flip_horizontal=horizontal, flip_vertical=vertical, seed=1
    )
    counts = dict.fromkeys(turns[0], 0)
    for _ in range(6):
        pairs = [pair for x, y in batches for pair in zip(x, y, strict=True)]
        for found, allowed in zip(pairs, turns, strict=True):
            (turn,) = [turn for turn, wanted in allowed.items() if same_pair(found, wanted)]
            counts[turn] += 1
    # of 102 pairs each turn gets its share, within four standard deviations
    share = 1 / len(counts)
    spread = 4 * np.sqrt(102 * share * (1 - share))
    assert all(abs(count - 102 * share) < spread for count in counts.values()), counts


# ---- batches


def ids_in(batches, source):
    """Which pairs the images of batches are, batch by batch."""
    by_bytes = {source.image_of(pair_id).tobytes(): pair_id for pair_id in source.ids}
    return [[by_bytes[image.tobytes()] for image in x] for x, _ in batches]


def in_one(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize('mltype', MLTYPES)
def test_batches_in_order(opened, mltype):
    trainer, source = opened[mltype]
    batches = trainer.train.batch_generator(shuffle=False)
    assert len(batches) == 5
    sizes = []
    pairs = []
    for x, y in batches:
        assert x.shape[1:] == (3, 6, 9)
        assert x.dtype == np.uint8
        if mltype == 'object_detection':
            assert isinstance(y, list)
        else:
            assert y.shape[1:] == ((3,) if mltype == 'classification' else (6, 9))
        sizes.append(len(x))
        pairs += zip(x, y, strict=True)
    assert sizes == [4, 4, 4, 4, 1]
    assert same_pairs(pairs, pairs_of(source))


@pytest.mark.parametrize(('size', 'drop_last', 'sizes'), [
    (1, False, [1] * 17), (4, True, [4] * 4), (17, True, [17]), (18, True, []), (18, False, [17]),
])  # fmt: skip
def test_sizes_of_batches(train, size, drop_last, sizes):
    batches = train.batch_generator(size, drop_last=drop_last)
    assert len(batches) == len(sizes)
    assert [len(x) for x, _ in batches] == sizes


def test_each_epoch_has_an_order_of_its_own_that_its_seed_brings_back(opened):
    trainer, source = opened['classification']
    batches = trainer.train.batch_generator(5, seed=3)
    epochs = [in_one(ids_in(batches, source)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == source.ids_of('train')
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = trainer.train.batch_generator(8, seed=3)
    assert [in_one(ids_in(again, source)) for _ in range(3)] == epochs
    others = trainer.train.batch_generator(5), trainer.train.batch_generator(5)
    first, second = (in_one(ids_in(one, source)) for one in others)
    assert first != second


def test_flips_come_from_the_seed_too(train):
    def epoch(seed, size):
        batches = train.batch_generator(size, flip_horizontal=True, flip_vertical=True, seed=seed)
        return np.concatenate([x for x, _ in batches])

    assert (epoch(1, 4) == epoch(1, 5)).all()
    assert (epoch(1, 4) != epoch(2, 4)).any()


def test_a_loop_goes_on_epoch_after_epoch(opened):
    trainer, source = opened['classification']
    batches = trainer.train.batch_generator(5, seed=3, loop=True)
    assert len(batches) == 4
    endless = iter(batches)
    found = ids_in((next(endless) for _ in range(12)), source)
    endless.close()
    epochs = [in_one(found[start : start + 4]) for start in (0, 4, 8)]
    once = trainer.train.batch_generator(5, seed=3)
    assert epochs == [in_one(ids_in(once, source)) for _ in range(3)]
    for nothing in (trainer.train[:0], trainer.train[:4]):
        with pytest.raises(DataError, match='would never end'):
            nothing.batch_generator(5, loop=True, drop_last=True)


def test_several_epochs_at_once(opened):
    trainer, source = opened['classification']
    batches = trainer.train.batch_generator(5, seed=3)
    one, other = [], []
    for first, second in zip(batches, batches, strict=True):
        one.append(first)
        other.append(second)
    again = trainer.train.batch_generator(5, seed=3)
    assert [ids_in(one, source), ids_in(other, source)] == [ids_in(again, source) for _ in range(2)]


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'uint32', 'bool'])
def test_rescaled_images_are_between_0_and_1(tmp_path, dtype):
    source = source_of(dtype=dtype)
    write_cache(source, tmp_path)
    largest = 1 if dtype == 'bool' else np.iinfo(dtype).max
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        ((x, _),) = trainer.train.batch_generator(shuffle=False, rescale=True)
    assert x.dtype == np.float32
    assert x.min() >= 0
    assert x.max() <= 1
    wanted = np.stack([image for image, _ in pairs_of(source)]).astype(np.float64) / largest
    np.testing.assert_allclose(x, wanted, rtol=1e-6)


@pytest.mark.parametrize('dtype', ['int16', 'float32', 'float64'])
def test_what_has_no_range_is_not_rescaled(tmp_path, dtype):
    write_cache(source_of(dtype=dtype), tmp_path)
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        for ask in (trainer.train.batch_generator, trainer.train.as_torch):
            with pytest.raises(ConfigError, match=f'images of {dtype} have no range'):
                ask(rescale=True)
        halved = trainer.train.batch_generator(image_transform=lambda image: image / 2)
        assert next(iter(halved))[0].dtype.kind == 'f'


@pytest.mark.parametrize(('pad', 'size'), [((6, 9), (6, 9)), ((8, 16), (8, 16)), (12, (12, 12))])
@pytest.mark.parametrize('mltype', MLTYPES)
def test_padding_is_zeros_at_the_right_and_the_bottom(opened, mltype, pad, size):
    trainer, source = opened[mltype]
    turns = [turns_of(pair, mltype, True, True) for pair in pairs_of(source)]
    batches = trainer.train.batch_generator(
        shuffle=False, pad=pad, flip_horizontal=True, flip_vertical=True, seed=0
    )
    pairs = [pair for x, y in batches for pair in zip(x, y, strict=True)]
    for (x, y), allowed in zip(pairs, turns, strict=True):
        assert x.shape == (3, *size)
        assert not x[:, 6:].any()
        assert not x[:, :, 9:].any()
        if mltype == 'segmentation':
            assert y.shape == size
            assert not y[6:].any()
            assert not y[:, 9:].any()
            y = y[:6, :9]
        assert any(same_pair((x[:, :6, :9], y), wanted) for wanted in allowed.values())


def test_channels_last(train):
    options = {'shuffle': False, 'rescale': True, 'pad': 10, 'flip_vertical': True, 'seed': 5}
    first = [x for x, _ in train.batch_generator(**options)]
    last = [x for x, _ in train.batch_generator(channels_last=True, **options)]
    for x, turned in zip(first, last, strict=True):
        assert turned.shape == (len(x), 10, 10, 3)
        assert turned.flags.c_contiguous
        assert (turned.transpose(0, 3, 1, 2) == x).all()


@pytest.mark.parametrize('pad', [None, 9])
def test_transforms_see_what_would_be_given_one_by_one_and_in_order(opened, pad):
    trainer, _ = opened['segmentation']
    seen = []

    def image_transform(image):
        assert threading.current_thread() is threading.main_thread()
        seen.append(image.copy())
        image += 1
        return image.mean((0, 1))

    def label_transform(label):
        seen.append(label.copy())
        label[0, 0] = 7
        return int(label.sum())

    options = {'shuffle': False, 'rescale': True, 'channels_last': True, 'pad': pad,
               'flip_horizontal': True, 'seed': 2}  # fmt: skip
    plain = list(trainer.train.batch_generator(**options))
    changed = trainer.train.batch_generator(
        image_transform=image_transform, label_transform=label_transform, **options
    )
    for (x, y), (image, label) in zip(plain, changed, strict=True):
        assert all(map(same_arrays, [*x, *y], seen))
        np.testing.assert_allclose(image, (x + 1).mean((1, 2)), rtol=1e-5)
        y[:, 0, 0] = 7
        assert label.tolist() == y.sum((1, 2)).tolist()
        seen.clear()


@pytest.mark.parametrize('mltype', ['classification', 'segmentation'])
def test_labels_that_get_different_shapes_are_a_list(opened, mltype):
    trainer, _ = opened[mltype]
    for _, y in trainer.train.batch_generator(label_transform=np.flatnonzero):
        assert len(y) in (1, 4)
    assert isinstance(
        next(iter(trainer.train.batch_generator(17, label_transform=np.flatnonzero)))[1], list
    )
    for _, y in trainer.train.batch_generator(label_transform=str):
        assert isinstance(y, list)


@pytest.mark.parametrize(
    'transform', [lambda image: None, lambda image: image[:, : 1 + image[0, 0, 0] % 5]]
)
def test_images_that_cannot_be_stacked_are_named(train, transform):
    with pytest.raises(DataError, match='image_transform gave'):
        list(train.batch_generator(17, image_transform=transform))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'batch_size': 0}, 'batch_size=0'),
        ({'batch_size': 2.5}, 'batch_size=2.5'),
        ({'batch_size': True}, 'batch_size=True'),
        ({'shuffle': 'no'}, "shuffle='no'"),
        ({'rescale': 255}, 'rescale=255'),
        ({'flip_horizontal': None}, 'flip_horizontal=None'),
        ({'loop': 1}, 'loop=1'),
        ({'pad': 0}, 'pad=0'),
        ({'pad': (8,)}, r'pad=\(8,\)'),
        ({'pad': 'same'}, "pad='same'"),
        ({'pad': 8}, 'are 6 x 9 pixels already'),
        ({'pad': (5, 20)}, 'are 6 x 9 pixels already'),
        ({'image_transform': 'flip'}, "image_transform='flip'"),
        ({'seed': -1}, 'seed=-1'),
        ({'seed': 'x'}, "seed='x'"),
    ],
)
def test_options_that_are_none(train, options, words):
    with pytest.raises(ConfigError, match=words):
        train.batch_generator(**options)


def test_the_size_that_batch_was_called_with_is_the_one_of_all_batches(tmp_path):
    write_cache(source_of(), tmp_path)
    with ImageTrainer(open_cache(tmp_path, KEY), 7) as trainer:
        assert [len(x) for x, _ in trainer.train[:9].batch_generator()] == [7, 2]
        assert len(next(iter(trainer.train.batch_generator(3)))[0]) == 3
        with pytest.raises(ConfigError, match='batch_size=0'):
            ImageTrainer(open_cache(tmp_path, KEY), 0)


def read_all_ways(trainer, source):
    right = same_pairs(trainer.train, pairs_of(source))
    sizes = [len(x) for x, _ in trainer.train.batch_generator(4)]
    os._exit(0 if right and sizes == [4, 4, 4, 4, 1] else 1)


def test_a_forked_process_reads_with_threads_of_its_own(opened):
    trainer, source = opened['segmentation']
    batches = iter(trainer.train.batch_generator(2))
    # there are threads, and they are at work
    next(batches)
    child = in_child(read_all_ways, trainer, source)
    child.join(20)
    assert child.exitcode == 0
    assert len(list(batches)) == 8


def test_a_damaged_image_ends_the_epoch(tmp_path):
    source = source_of()
    write_cache(source, tmp_path)
    (part,) = (tmp_path / KEY).glob('images-*')
    data = bytearray(part.read_bytes())
    place = data.index(source.image_of(27).tobytes()[:40])
    data[place + 20] ^= 1
    part.write_bytes(data)
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        for read in (trainer.train, trainer.train.images, trainer.train.batch_generator(2)):
            with pytest.raises(DataError, match='image of pair 27'):
                list(read)


def test_memory_stays_flat(tmp_path):
    source = MemorySource(range(2000), shape=(3, 64, 64))
    write_cache(source, tmp_path)
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        everything = trainer.train
        list(everything[:100])
        peaks = []
        for read in (
            everything,
            everything.batch_generator(),
            everything.batch_generator(rescale=True, loop=False, flip_vertical=True),
        ):
            tracemalloc.start()
            for x, _ in read:
                assert len(x)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # 667 images are 8 MB; a batch of 32 is 0.4 MB, of float32 1.6
    assert peaks[0] < 6e6
    assert peaks[1] < 3e6
    assert peaks[2] < 7e6


def test_a_slow_reader_does_not_fill_the_memory(tmp_path):
    source = MemorySource(range(2000), shape=(3, 64, 64))
    source.group_of = lambda pair_id: 'train'
    write_cache(source, tmp_path)
    image = 3 * 64 * 64
    with ImageTrainer(open_cache(tmp_path, KEY)) as trainer:
        for read, most in (
            (trainer.train, (2 * num_threads() + 1) * 64 * image),
            (trainer.train.batch_generator(), 3 * 32 * image),
        ):
            tracemalloc.start()
            items = iter(read)
            next(items)
            time.sleep(0.3)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            items.close()
            assert peak < 1.2 * most + 1e6


# ---- torch


@pytest.mark.parametrize('mltype', MLTYPES)
def test_pairs_as_a_dataset_of_torch(opened, mltype):
    trainer, source = opened[mltype]
    dataset = trainer.train.as_torch()
    assert isinstance(dataset, Dataset)
    assert len(dataset) == NUM_TRAIN
    for index, (image, label) in enumerate(pairs_of(source)):
        x, y = dataset[index]
        assert x.dtype == torch.uint8
        if mltype != 'object_detection':
            y = y.numpy()
        assert same_pair((x.numpy(), y), (image, label))
    with pytest.raises(IndexError):
        dataset[NUM_TRAIN]


@pytest.mark.parametrize('pad', [None, 10])
@pytest.mark.parametrize('mltype', MLTYPES)
def test_datasets_of_torch_flip_pad_rescale_and_transform(opened, mltype, pad):
    trainer, source = opened[mltype]
    turns = [turns_of(pair, mltype, True, True) for pair in pairs_of(source)]
    size = (6, 9) if pad is None else (10, 10)
    seen = []
    dataset = trainer.train.as_torch(
        rescale=True,
        flip_horizontal=True,
        flip_vertical=True,
        pad=pad,
        image_transform=lambda image: image * 255,
        label_transform=lambda label: seen.append(label) or len(seen),
    )
    torch.manual_seed(0)
    for index, allowed in enumerate(turns):
        x, y = dataset[index]
        assert (x.dtype, tuple(x.shape), y) == (torch.float32, (3, *size), len(seen))
        label = seen[-1]
        if mltype == 'segmentation':
            label = label[:6, :9]
        label = label if mltype == 'object_detection' else label.numpy()
        image = x[:, :6, :9].round().numpy().astype(np.uint8)
        assert any(same_pair((image, label), wanted) for wanted in allowed.values())
    # what a seed brought once, it brings again
    epochs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        epochs.append(torch.stack([x for x, _ in dataset]))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def double(image):
    return image * 2


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_loader_workers_read_for_themselves(opened, context):
    trainer, source = opened['segmentation']
    dataset = trainer.train.as_torch(rescale=True, image_transform=double)
    # this process has read already, so that a forked worker finds open files
    dataset[0]
    workers = 2 if context == 'fork' else 1
    loader = DataLoader(dataset, 4, num_workers=workers, multiprocessing_context=context)
    pairs = [pair for x, y in loader for pair in zip(x, y, strict=True)]
    for (x, y), (image, label) in zip(pairs, pairs_of(source), strict=True):
        np.testing.assert_allclose(x.numpy(), image / 127.5, rtol=1e-6)
        assert same_label(y.numpy(), label)


def test_boxes_are_collated_into_a_list(opened):
    trainer, source = opened['object_detection']
    dataset = trainer.train.as_torch()
    loader = DataLoader(dataset, 5, collate_fn=dataset.collate)
    found = [(x, label) for batch, y in loader for x, label in zip(batch, y, strict=True)]
    assert [label for _, label in found] == [label for _, label in pairs_of(source)]
    trainer, source = opened['classification']
    dataset = trainer.train.as_torch()
    x, y = dataset.collate([dataset[0], dataset[1]])
    assert (tuple(x.shape), tuple(y.shape)) == ((2, 3, 6, 9), (2, 3))


def test_what_is_pickled_opens_the_same_files(opened):
    trainer, source = opened['object_detection']
    again = pickle.loads(pickle.dumps(trainer))
    assert (again.batch_size, again.groups) == (4, trainer.groups)
    part = pickle.loads(pickle.dumps(trainer.train[3:8]))
    assert len(pickle.dumps(trainer.train[3:8])) < 2000
    again.close()
    assert same_pairs(part, pairs_of(source)[3:8])
