"""Losses and miners by name: against naive loops, with options, and with words for what is wrong."""

import itertools
import math

import numpy as np
import pytest
import pytorch_metric_learning.losses
import torch

from finetuner.excepts import ConfigError
from finetuner.training.losses import (
    LOSSES,
    MINERS,
    PAIR_LOSSES,
    TEXT_IMAGE_LOSSES,
    build_loss,
    build_miner,
)
from finetuner.training.objectives import build_objective

DIMENSION, NUM_CLASSES = 8, 4
# arguments without a default in pytorch-metric-learning
NEEDED = {'RankedListLoss': {'margin': 1, 'Tn': 0}}


def toy_batch(seed=0, items=4):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(NUM_CLASSES * items, DIMENSION, generator=generator)
    return embeddings, torch.arange(NUM_CLASSES).repeat_interleave(items)


def naive_triplet_loss(embeddings, labels, margin, normalize=True):
    """Mean over the triplets that break the margin, by three loops."""
    vectors = embeddings.numpy().astype(np.float64)
    if normalize:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    losses = []
    for anchor, positive, negative in itertools.permutations(range(len(vectors)), 3):
        if labels[anchor] == labels[positive] != labels[negative]:
            near = np.linalg.norm(vectors[anchor] - vectors[positive])
            far = np.linalg.norm(vectors[anchor] - vectors[negative])
            losses.append(max(0.0, near - far + margin))
    return np.mean([loss for loss in losses if loss > 0])


@pytest.mark.parametrize('margin', [0.05, 0.5])
def test_triplet_loss_equals_naive_loops(margin):
    embeddings, labels = toy_batch()
    loss = build_loss('TripletMarginLoss', {'margin': margin}, DIMENSION, NUM_CLASSES)
    expected = naive_triplet_loss(embeddings, labels, margin)
    assert float(loss(embeddings, labels)) == pytest.approx(expected, rel=1e-4)


def test_options_of_the_distance_reach_it():
    embeddings, labels = toy_batch()
    options = {'margin': 0.2, 'distance': {'name': 'LpDistance', 'normalize_embeddings': False}}
    loss = build_loss('TripletMarginLoss', options, DIMENSION, NUM_CLASSES)
    expected = naive_triplet_loss(embeddings, labels, 0.2, normalize=False)
    assert float(loss(embeddings, labels)) == pytest.approx(expected, rel=1e-4)


def test_parts_by_name():
    loss = build_loss(
        'ContrastiveLoss',
        {
            'distance': 'CosineSimilarity',
            'pos_margin': 1,
            'neg_margin': 0,
            'reducer': 'MeanReducer',
            'embedding_regularizer': 'LpRegularizer',
        },
        DIMENSION,
        NUM_CLASSES,
    )
    assert type(loss.distance).__name__ == 'CosineSimilarity'
    assert type(loss.reducer.reducers['pos_loss']).__name__ == 'MeanReducer'
    assert type(loss.embedding_regularizer).__name__ == 'LpRegularizer'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(LOSSES))
def test_every_loss_runs_and_has_a_gradient(name):
    embeddings, labels = toy_batch()
    embeddings.requires_grad_(True)
    loss = build_loss(name, NEEDED.get(name), DIMENSION, NUM_CLASSES)
    kind = 'class'
    if name in PAIR_LOSSES:
        kind, labels = 'scored_pair', labels / 4
    elif name in TEXT_IMAGE_LOSSES:
        kind, labels = 'text_image_pair', torch.stack([labels, torch.arange(16) % 2], dim=1)
    value = build_objective(kind, loss)(embeddings, labels)
    assert torch.is_tensor(value)
    assert value.ndim == 0
    assert math.isfinite(float(value))
    value.backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize('name', sorted(MINERS))
def test_every_miner_picks_tuples_that_a_loss_takes(name):
    torch.manual_seed(0)
    embeddings, labels = toy_batch()
    miner = build_miner(name, None)
    tuples = miner(embeddings, labels)
    assert len(tuples) in (3, 4)
    anchors, positives = tuples[0], tuples[1]
    assert len(anchors)
    assert torch.equal(labels[anchors], labels[positives])
    negatives = tuples[-1]
    other = anchors if len(tuples) == 3 else tuples[2]
    assert (labels[other] != labels[negatives]).all()
    loss = build_loss('TripletMarginLoss', None, DIMENSION, NUM_CLASSES)
    assert math.isfinite(float(loss(embeddings, labels, tuples)))


def test_hard_miner_equals_a_naive_search():
    embeddings, labels = toy_batch(5)
    vectors = torch.nn.functional.normalize(embeddings)
    distances = torch.cdist(vectors, vectors)
    found = build_miner('BatchHardMiner', {})(embeddings, labels)
    for anchor, positive, negative in zip(*(t.tolist() for t in found), strict=True):
        same = [i for i in range(16) if labels[i] == labels[anchor] and i != anchor]
        others = [i for i in range(16) if labels[i] != labels[anchor]]
        assert positive == max(same, key=lambda i: float(distances[anchor, i]))
        assert negative == min(others, key=lambda i: float(distances[anchor, i]))


@pytest.mark.parametrize(
    ('alias', 'name'),
    [
        ('SiameseLoss', 'ContrastiveLoss'),
        ('TripletLoss', 'TripletMarginLoss'),
        ('NTXLoss', 'NTXentLoss'),
    ],
)
def test_older_names(alias, name):
    assert type(build_loss(alias, None, DIMENSION, NUM_CLASSES)).__name__ == name


def test_losses_with_weights_learn_of_dimension_and_classes():
    loss = build_loss('ArcFaceLoss', {'margin': 20}, 12, 7)
    assert tuple(loss.W.shape) == (12, 7)
    assert build_loss('ProxyAnchorLoss', None, 12, 7).proxies.shape == (7, 12)
    # what the user says goes before what is known
    assert build_loss('ArcFaceLoss', {'num_classes': 9}, 12, 7).W.shape == (12, 9)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('TripletMarginLos', None, "unknown loss 'TripletMarginLos': did you mean 'TripletMargin"),
        ('triplet_loss', None, "'TripletLoss'"),
        ('CrossBatchMemory', None, 'unknown loss'),
        ('BaseMetricLossFunction', None, 'unknown loss'),
        ('TripletMarginLoss', {'margn': 1}, "unknown option of loss.*did you mean 'margin'"),
        ('TripletMarginLoss', {'distance': 'Cosine'}, "unknown distance.*'CosineSimilarity'"),
        ('TripletMarginLoss', {'distance': {'p': 1}}, 'unknown distance None'),
        (
            'TripletMarginLoss',
            {'distance': {'name': 'LpDistance', 'q': 1}},
            "unknown option of distance LpDistance 'q'",
        ),
        ('TripletMarginLoss', {'reducer': 'DoNothingReducer'}, 'unknown reducer'),
        ('RankedListLoss', None, "RankedListLoss does not accept.*'margin' and 'Tn'"),
        ('MarginLoss', {'learn_beta': True, 'num_classes': 'x'}, 'MarginLoss does not accept'),
    ],
)
def test_wrong_losses(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(name, options, DIMENSION, NUM_CLASSES)


def test_wrong_miners():
    with pytest.raises(ConfigError, match=r"unknown miner.*did you mean 'BatchHardMiner'"):
        build_miner('BatchHardminer', None)
    with pytest.raises(ConfigError, match=r"did you mean 'margin'"):
        build_miner('TripletMarginMiner', {'margins': 1})
    with pytest.raises(ConfigError, match='no miner'):
        build_miner(None, {'margin': 1})
    assert build_miner(None, None) is None
    assert build_miner(None, {}) is None


def ntxent_tuples(seed, num=14):
    """All pairs of some items, or some pairs of them: anchors without negatives, and the reverse."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (num,), generator=generator)
    if seed % 2 == 0:
        return labels, None
    kept = torch.rand(num, num, generator=generator) < 0.2
    same = labels[:, None] == labels[None, :]
    pairs = (torch.nonzero(kept & mask, as_tuple=True) for mask in (same, ~same))
    return labels, tuple(itertools.chain(*pairs))


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('distance', [None, 'LpDistance', 'DotProductSimilarity'])
def test_ntxent_is_that_of_pytorch_metric_learning(seed, distance):
    labels, tuples = ntxent_tuples(seed)
    options = {'temperature': 0.2, **({'distance': distance} if distance else {})}
    ours = build_loss('NTXentLoss', options, 5, 4)
    theirs = pytorch_metric_learning.losses.NTXentLoss(0.2, distance=ours.distance)
    results = []
    for loss in (ours, theirs):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(14, 5, generator=generator, dtype=torch.float64)
        embeddings.requires_grad_()
        value = loss(embeddings, labels, tuples)
        value.backward()
        results.append((value.detach(), embeddings.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_ntxent_of_a_large_batch_takes_little_memory():
    num = 1_200
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(num, 8, generator=generator))
    # the original would take 7 GB
    found = build_loss('NTXentLoss', None, 8, 4)(embeddings, torch.arange(num) // 2)
    similarity = embeddings @ embeddings.T / 0.07
    similarity.fill_diagonal_(-torch.inf)
    other = torch.arange(num) ^ 1
    expected = torch.nn.functional.cross_entropy(similarity, other)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
