"""Augmentation: recipes change pictures plausibly, differently each time, the same with a seed."""

import os
import pickle
import random
import subprocess
import sys
import warnings
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from examples.emoji_data import load_emoji
from finetuner.augmentation import RECIPES, build_augmentation, build_text_augmentation
from finetuner.excepts import ConfigError, DataError
from finetuner.images import picture_of

CHANGING = [name for name in RECIPES if name != 'none']
each_recipe = pytest.mark.parametrize('name', CHANGING)


@pytest.fixture(scope='module')
def pictures():
    return [picture_of(doc, 96) for doc in load_emoji()[0:40:4]]


@each_recipe
@pytest.mark.parametrize(
    ('come', 'size'), [(96, 96), (96, 128), (128, 64), (1, 8), (8, 1), (40, 224)]
)
def test_shape_and_dtype(name, come, size):
    picture = np.random.default_rng(0).integers(0, 256, (come, come, 3), dtype=np.uint8)
    for _ in range(8):
        changed = build_augmentation(name, size)(picture)
        assert changed.shape == (size, size, 3)
        assert changed.dtype == np.uint8
        assert changed.flags.c_contiguous


@each_recipe
def test_a_seed_repeats_it_and_calls_differ(name, pictures):
    augment = build_augmentation(name, 96)
    for picture in pictures:
        torch.manual_seed(3)
        first = [augment(picture) for _ in range(6)]
        torch.manual_seed(3)
        again = [augment(picture) for _ in range(6)]
        np.testing.assert_array_equal(first, again)
        assert len({changed.tobytes() for changed in first}) == 6
        torch.manual_seed(4)
        assert any((augment(picture) != one).any() for one in first)


@each_recipe
def test_it_draws_from_torchs_generator_only(name, pictures):
    augment = build_augmentation(name, 96)
    states = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(7)
        states.append([augment(picture) for picture in pictures])
    np.testing.assert_array_equal(*states)


def test_none_is_nothing():
    assert build_augmentation('none', 96) is None


@each_recipe
def test_the_picture_stays_as_it_was(name, pictures):
    augment = build_augmentation(name, 96)
    before = pictures[0].copy()
    changed = [augment(pictures[0]) for _ in range(20)]
    np.testing.assert_array_equal(pictures[0], before)
    assert not any(np.shares_memory(one, pictures[0]) for one in changed)
    read_only = before.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert augment(read_only).shape == (96, 96, 3)
    assert augment(before[:, ::-1]).shape == (96, 96, 3)


def mean_difference(augment, pictures, calls=20):
    differences = [
        np.abs(augment(picture).astype(float) - picture).mean()
        for picture in pictures
        for _ in range(calls)
    ]
    return float(np.mean(differences))


def test_strong_changes_more_than_light(pictures):
    torch.manual_seed(0)
    light, strong = (mean_difference(build_augmentation(n, 96), pictures) for n in CHANGING)
    assert 5 < light < strong < 100


def test_values_are_plausible(pictures):
    """A grey picture stays about grey, black stays dark, and what is bright is not turned over."""
    torch.manual_seed(0)
    black, grey = (np.full((64, 64, 3), value, dtype=np.uint8) for value in (0, 128))
    for name in CHANGING:
        augment = build_augmentation(name, 64)
        for _ in range(50):
            assert augment(black).max() == 0
            changed = augment(grey)
            assert np.ptp(changed) <= 4
            assert 60 < changed.mean() < 200
        for picture in pictures:
            means = [augment(picture).mean() for _ in range(20)]
            assert abs(np.mean(means) - picture.mean()) < 60


def colour_kinds(name, calls=300):
    """How a red picture comes out: its channels, over many calls."""
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[...] = (200, 40, 40)
    augment = build_augmentation(name, 32)
    return np.array([augment(red).reshape(-1, 3).mean(axis=0) for _ in range(calls)])


def test_light_keeps_the_hue_and_strong_turns_and_removes_it():
    torch.manual_seed(0)
    light, strong = colour_kinds('light'), colour_kinds('strong')
    assert np.abs(light[:, 1] - light[:, 2]).max() < 3, 'red must stay red'
    assert (light[:, 0] > light[:, 1] + 80).all()
    grey = np.ptp(strong, axis=1) < 3
    assert 0.1 < grey.mean() < 0.3
    turned = strong[~grey]
    assert (turned[:, 1] - turned[:, 2] > 10).any(), 'towards yellow'
    assert (turned[:, 2] - turned[:, 1] > 10).any(), 'towards blue'
    assert (turned[:, 0] >= turned[:, 1:].max(axis=1) - 1).all(), 'no farther than a tenth'


def test_half_are_mirrored():
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, 32:] = 255
    for name in CHANGING:
        torch.manual_seed(0)
        augment = build_augmentation(name, 64)
        changed = [augment(picture).astype(float) for _ in range(200)]
        mirrored = [one[:, :8].mean() > one[:, -8:].mean() for one in changed]
        assert 0.35 < np.mean(mirrored) < 0.65


def edge_width(picture):
    row = picture[16, :, 0].astype(float)
    return float(np.sum((row > row.min() + 10) & (row < row.max() - 10)))


def test_strong_blurs_some(pictures):
    picture = np.zeros((224, 224, 3), dtype=np.uint8)
    picture[:, 112:] = 255
    from finetuner.augmentation import _blur

    torch.manual_seed(0)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    widths = [edge_width(_blur(pixels).permute(1, 2, 0).numpy()) for _ in range(30)]
    assert min(widths) <= 2
    assert 5 <= max(widths) <= 14


@each_recipe
def test_it_can_be_pickled_used_or_not(name, pictures):
    augment = build_augmentation(name, 96)
    for _ in range(2):
        twin = pickle.loads(pickle.dumps(augment))
        torch.manual_seed(1)
        expected = augment(pictures[0])
        torch.manual_seed(1)
        np.testing.assert_array_equal(twin(pictures[0]), expected)


def test_it_can_be_unpickled_where_torchvision_is_not_imported_yet(tmp_path, pictures):
    augment = build_augmentation('strong', 96)
    augment(pictures[0])
    file = tmp_path / 'augment.pickle'
    file.write_bytes(pickle.dumps(augment))
    code = f'import pickle; print(pickle.loads(open({str(file)!r}, "rb").read()))'
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert shown.stdout.strip() == "build_augmentation('strong', 96)", shown.stderr


def _in_child(queue, augment, picture):
    torch.manual_seed(5)
    queue.put(augment(picture))


@pytest.mark.skipif(sys.platform != 'linux', reason='loader workers are forked on Linux only')
@each_recipe
def test_it_works_in_a_forked_process(name, pictures):
    augment = build_augmentation(name, 96)
    torch.manual_seed(5)
    expected = augment(pictures[0])
    context = get_context('fork')
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, augment, pictures[0]))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('strnog', "unknown augmentation 'strnog': did you mean 'strong'"),
        ('LIGHT', "did you mean 'light'"),
        ('albumentations', 'Known: light, none, strong'),
        (None, 'unknown augmentation None'),
    ],
)
def test_unknown_recipe(name, message):
    with pytest.raises(ConfigError, match=message):
        build_augmentation(name, 96)


@pytest.mark.parametrize('size', [0, -1, 96.0, '96', True, None])
@pytest.mark.parametrize('name', RECIPES)
def test_bad_size(name, size):
    with pytest.raises(ConfigError, match='size must be a whole number of pixels'):
        build_augmentation(name, size)


@each_recipe
@pytest.mark.parametrize(
    ('picture', 'shown'),
    [
        (np.zeros((8, 8, 3)), r'\[8, 8, 3\] of float64'),
        (np.zeros((3, 8, 8), dtype=np.uint8), r'\[3, 8, 8\] of uint8'),
        (np.zeros((8, 8), dtype=np.uint8), r'\[8, 8\] of uint8'),
        (np.zeros((8, 8, 4), dtype=np.uint8), r'\[8, 8, 4\] of uint8'),
        (np.zeros((0, 8, 3), dtype=np.uint8), r'\[0, 8, 3\] of uint8'),
        ('cat.png', r'\[\] of str'),
        (None, r'\[\] of NoneType'),
    ],
)
def test_what_is_no_picture(name, picture, shown):
    with pytest.raises(DataError, match=rf"augmentation '{name}' takes pictures .* not {shown}"):
        build_augmentation(name, 8)(picture)


def test_importing_and_building_costs_nothing():
    code = (
        'import sys; from finetuner.augmentation import build_augmentation; '
        "build_augmentation('strong', 96); "
        "print({'torch', 'torchvision', 'cv2', 'PIL'} & set(sys.modules))"
    )
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    shown = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment
    )
    assert shown.stdout.strip() == 'set()'


def test_tokens_are_left_out_at_their_rate_and_special_ones_stay():
    ids = [101, *range(1000, 1040), 102]
    torch.manual_seed(0)
    for name, share in (('light', 0.3), ('strong', 0.5)):
        change = build_text_augmentation(name, {101, 102})
        texts = [change(ids) for _ in range(200)]
        assert all((text[0], text[-1]) == (101, 102) for text in texts)
        assert all(text == [*sorted(text[:-1]), 102] for text in texts), 'order is kept'
        left_out = 1 - np.mean([len(text) - 2 for text in texts]) / 40
        assert left_out == pytest.approx(share, abs=0.03)
    assert build_text_augmentation('none', {101}) is None
    with pytest.raises(ConfigError, match="'light'"):
        build_text_augmentation('lite', set())


def test_short_texts_stay_whole_and_none_is_left_empty():
    change = build_text_augmentation('strong', {101, 102})
    assert all(change([101, 5, 6, 7, 102]) == [101, 5, 6, 7, 102] for _ in range(50))
    assert all(len(change([101, 5, 6, 7, 8, 102])) > 2 for _ in range(300))
