"""Every loss and miner trains a tiny model, with every distance and reducer, or is refused."""

import inspect
import math

import numpy as np
import pytest
import pytorch_metric_learning.losses as original_losses
import pytorch_metric_learning.miners as original_miners
import torch
from docarray import Document, DocumentArray

from finetuner.data.loading import build_dataset
from finetuner.excepts import ConfigError
from finetuner.training.loss_options import PARTS, allowed_parts
from finetuner.training.losses import (
    LOSSES,
    MINERS,
    PAIR_LOSSES,
    REFUSED,
    TEXT_IMAGE_LOSSES,
    TUPLE_LOSSES,
    WHOLE_BATCH_LOSSES,
    WRAPPERS,
    build_loss,
    build_miner,
)
from finetuner.training.objectives import build_objective, check_objective_runs
from finetuner.training.optimization import build_optimizer, build_schedule
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import BaseCallback, Trainer, seed_everything

pytestmark = pytest.mark.filterwarnings('ignore')

NUM_CLASSES, ITEMS, DIMENSION, BATCH = 5, 12, 8, 20
CLASS_LOSSES = sorted(set(LOSSES) - {*PAIR_LOSSES, *TEXT_IMAGE_LOSSES})
IN_MEMORY = original_losses.CrossBatchMemory.supported_losses()
# arguments without a default in pytorch-metric-learning
NEEDED = {'RankedListLoss': {'margin': 0.4, 'Tn': 1}}


def blobs(seed=0):
    """Inputs `[60, 6]` and labels: five blobs on a circle, and four directions of louder noise."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(NUM_CLASSES).repeat_interleave(ITEMS) * 2 * math.pi / NUM_CLASSES
    centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    near = centres + 0.35 * torch.randn(len(angles), 2, generator=generator)
    noise = 2 * torch.randn(len(angles), 4, generator=generator)
    return torch.cat([near, noise], dim=1), torch.arange(NUM_CLASSES).repeat_interleave(ITEMS)


def class_loader(seed=0):
    docs = DocumentArray(
        Document(tensor=vector, tags={'finetuner_label': int(label)})
        for vector, label in zip(*(part.numpy() for part in blobs(seed)), strict=True)
    )
    pipeline = Pipeline(None, seed=seed)
    return pipeline.training_loader(build_dataset(docs), BatchShape(BATCH, BATCH // NUM_CLASSES))


def share_of_same(model, seed=0):
    """Retrieval: of the eleven nearest of each item, the share that are of its blob."""
    inputs, labels = blobs(seed)
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(model(inputs))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    nearest = similarity.topk(ITEMS - 1, dim=1).indices
    return float((labels[nearest] == labels[:, None]).float().mean())


class Losses(BaseCallback):
    def __init__(self):
        self.values = []

    def on_epoch_end(self, trainer):
        self.values.append(trainer.state.train_loss)


def train(
    make_loss,
    loader=None,
    kind='class',
    miner=None,
    epochs=12,
    optimizer='Adam',
    rate=0.03,
    bias=True,
    scheduler=None,
    scheduler_options=None,
):
    """Train a linear model as a run does; its losses, and retrieval before and after."""
    seed_everything(0)
    model = torch.nn.Linear(6, DIMENSION, bias)
    loss = make_loss()
    objective = build_objective(kind, loss, miner, BATCH)
    optimizers = [build_optimizer(optimizer, model.parameters(), rate)]
    if list(loss.parameters()):
        optimizers.append(build_optimizer(optimizer, loss.parameters(), rate))
    loader = class_loader() if loader is None else loader
    schedule = build_schedule(scheduler, optimizers[0], scheduler_options, epochs, len(loader))
    recorded, before = Losses(), share_of_same(model)
    Trainer(model, objective, optimizers, schedule, [recorded]).fit(loader, epochs)
    return recorded.values, before, share_of_same(model)


def assert_learns(losses, before, after):
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])
    assert after > before + 0.1


def build(name, options=None):
    return build_loss(name, {**NEEDED.get(name, {}), **(options or {})}, DIMENSION, NUM_CLASSES)


def classes_of(module):
    return {name for name, value in vars(module).items() if inspect.isclass(value)}


def test_every_class_has_a_name_here_or_a_reason_against_it():
    assert classes_of(original_losses) == {*CLASS_LOSSES, *WRAPPERS} | (
        set(REFUSED) - classes_of(original_miners)
    )
    assert classes_of(original_miners) == set(MINERS) | (set(REFUSED) - classes_of(original_losses))
    for name in classes_of(original_losses) & set(REFUSED):
        with pytest.raises(ConfigError, match=f"unknown loss '{name}': .* has it, but .*: "):
            build_loss(name, None, DIMENSION, NUM_CLASSES)
    for name in classes_of(original_miners) & set(REFUSED):
        with pytest.raises(ConfigError, match=f"unknown miner '{name}': .* has it, but .*: "):
            build_miner(name, None)


@pytest.mark.parametrize('name', CLASS_LOSSES)
def test_every_loss_learns_classes(name):
    assert_learns(*train(lambda: build(name), epochs=20))
    check_objective_runs(build_objective('class', build(name)), 'class', DIMENSION, NUM_CLASSES)


def test_why_instance_loss_is_refused():
    losses, before, after = train(original_losses.InstanceLoss)
    assert losses[-1] < 0.5 * losses[0]
    assert after < before + 0.1


@pytest.mark.parametrize('name', TUPLE_LOSSES)
def test_losses_of_pairs_learn_from_sessions(name):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = blobs()
    batches = []
    for _ in range(4):
        rows, types = [], []
        for session in range(5):
            root = int(torch.randint(len(labels), (1,), generator=generator))
            same = torch.nonzero((labels == labels[root]) & (torch.arange(60) != root)).flatten()
            other = torch.nonzero(labels != labels[root]).flatten()
            drawn = [
                part[torch.randperm(len(part), generator=generator)[:2]] for part in (same, other)
            ]
            rows += [root, *drawn[0].tolist(), *drawn[1].tolist()]
            types += [(session, type_) for type_ in (0, 1, 1, -1, -1)]
        batches.append((inputs[rows], torch.tensor(types)))
    assert_learns(*train(lambda: build(name), batches, 'session'))
    objective = build_objective('session', build(name))
    check_objective_runs(objective, 'session', DIMENSION, NUM_CLASSES)


def test_cosine_similarity_loss_learns_from_scored_pairs():
    inputs, labels = blobs()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    scores = (labels[order[0::2]] == labels[order[1::2]]).float().repeat_interleave(2)
    batches = [(inputs[order], scores)]
    assert_learns(*train(lambda: build('CosineSimilarityLoss'), batches, 'scored_pair', epochs=60))


@pytest.mark.parametrize('name', TEXT_IMAGE_LOSSES)
@pytest.mark.parametrize('texts', ['one of each blob', 'one of each pair'])
def test_losses_learn_from_texts_and_pictures(name, texts):
    """Two items of a blob stand for a text and its picture."""
    inputs, labels = blobs()
    pairs = torch.arange(60).reshape(30, 2)
    batches = []
    for part in torch.randperm(30, generator=torch.Generator().manual_seed(0)).split(10):
        rows = pairs[part].flatten()
        numbers = labels[rows] if texts == 'one of each blob' else part.repeat_interleave(2)
        batches.append((inputs[rows], torch.stack([numbers, torch.arange(20) % 2], dim=1)))
    loss = build(name)
    weights = [parameter.detach().clone() for parameter in loss.parameters()]
    assert_learns(*train(lambda: loss, batches, 'text_image_pair'))
    for parameter, weight in zip(loss.parameters(), weights, strict=True):
        assert (parameter != weight).all()
    objective = build_objective('text_image_pair', build(name))
    check_objective_runs(objective, 'text_image_pair', DIMENSION, NUM_CLASSES)


@pytest.mark.parametrize('name', ['NTXentLoss', 'VICRegLoss', 'CrossBatchMemory'])
def test_losses_learn_from_views(name):
    """Views differ in what is noise."""
    generator = torch.Generator().manual_seed(0)
    inputs, _ = blobs()
    batches = []
    for part in torch.randperm(60, generator=generator).split(10):
        views = inputs[part].repeat_interleave(2, dim=0)
        views[:, 2:] = 2 * torch.randn(20, 4, generator=generator)
        batches.append((views, part.repeat_interleave(2)))
    options = {'loss': 'NTXentLoss', 'memory_size': 40} if name == 'CrossBatchMemory' else None
    losses, before, after = train(lambda: build(name, options), batches, 'instance')
    assert losses[-1] < 0.9 * losses[0]
    assert after > before + 0.1


@pytest.mark.parametrize('name', sorted(MINERS))
@pytest.mark.parametrize('loss', ['TripletMarginLoss', 'ContrastiveLoss'])
def test_every_miner_learns(name, loss):
    # what a miner leaves is harder in each epoch, so the loss of it need not fall
    losses, before, after = train(lambda: build(loss), miner=build_miner(name, None))
    assert np.isfinite(losses).all()
    assert after > before + 0.1


@pytest.mark.parametrize('name', sorted(MINERS))
def test_every_miner_with_every_loss(name):
    miner = build_miner(name, None)
    for loss in CLASS_LOSSES:
        if loss in WHOLE_BATCH_LOSSES:
            with pytest.raises(
                ConfigError, match=rf'{loss} takes the whole batch.*leave out {name}'
            ):
                build_objective('class', build(loss), miner)
        else:
            objective = build_objective('class', build(loss), miner)
            check_objective_runs(objective, 'class', DIMENSION, NUM_CLASSES)


@pytest.mark.parametrize('name', IN_MEMORY)
def test_every_loss_learns_with_a_memory(name):
    # a memory of two batches: while a larger one fills, losses that add up what is in it rise
    options = {'loss': name, 'memory_size': 2 * BATCH}
    assert_learns(*train(lambda: build('CrossBatchMemory', options)))


@pytest.mark.parametrize('name', sorted(MINERS))
def test_every_miner_learns_in_a_memory(name):
    miner = {'name': name, 'options': {'pos_strategy': 'hard'} if 'Easy' in name else None}
    options = {'loss': 'TripletMarginLoss', 'memory_size': 2 * BATCH, 'miner': miner}
    _, before, after = train(lambda: build('CrossBatchMemory', options))
    assert after > before + 0.1


def test_a_memory_by_hand():
    """Contrastive loss of each batch against the last ten items, those of the batch included."""
    generator = torch.Generator().manual_seed(0)
    options = {'loss': 'SiameseLoss', 'loss_options': {'reducer': 'MeanReducer'}, 'memory_size': 10}
    loss = build('CrossBatchMemory', options)
    seen = []
    for _ in range(5):
        batch = torch.nn.functional.normalize(torch.randn(4, DIMENSION, generator=generator))
        labels = torch.randint(3, (4,), generator=generator)
        start = len(seen)
        seen += list(zip(batch, labels.tolist(), strict=True))
        near, far = [], []
        for i, j in ((i, j) for i in range(4) for j in range(max(0, len(seen) - 10), len(seen))):
            distance = float((batch[i] - seen[j][0]).norm())
            if labels[i] != seen[j][1]:
                far.append(max(0.0, 1 - distance))
            elif j != start + i:
                near.append(distance)
        expected = np.mean(near or [0]) + np.mean(far or [0])
        with torch.inference_mode():
            alone = float(loss(batch, labels))
        assert alone == pytest.approx(float(loss.loss(batch, labels)))
        assert float(loss(batch.requires_grad_(), labels)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, r"name one in loss_options, such as \{'loss': 'ContrastiveLoss'\}"),
        (
            {'loss': 'ArcFaceLoss'},
            "'ArcFaceLoss'.*cannot compare a batch with a memory.*NTXentLoss",
        ),
        ({'loss': 'MultipleLosses'}, 'a run minimizes one loss'),
        ({'loss': 'NTXent'}, "did you mean 'NTXentLoss'"),
        ({'loss': 'NTXentLoss', 'memory': 9}, "option of loss CrossBatchMemory.*'memory_size'"),
        ({'loss': 'NTXentLoss', 'embedding_size': 9}, 'unknown option'),
        ({'loss': 'NTXentLoss', 'memory_size': 2.5}, 'memory_size=2.5'),
        ({'loss': 'NTXentLoss', 'loss_options': [1]}, 'no mapping of options'),
        ({'loss': 'NTXentLoss', 'loss_options': {'temprature': 1}}, "'temperature'"),
        ({'loss': 'NTXentLoss', 'miner': 'BatchHard'}, "did you mean 'BatchHardMiner'"),
        ({'loss': 'TripletMarginLoss', 'loss_options': {'swap': True}}, 'option swap'),
        ({'loss': 'NTXentLoss', 'miner': 'BatchEasyHardMiner'}, 'finds each item itself'),
    ],
)
def test_wrong_memories(options, message):
    with pytest.raises(ConfigError, match=message):
        build('CrossBatchMemory', options)


def test_where_a_memory_does_not_go():
    memory = build('CrossBatchMemory', {'loss': 'NTXentLoss', 'memory_size': 16})
    for kind in ('session', 'scored_pair'):
        with pytest.raises(ConfigError, match=f'CrossBatchMemory cannot learn from {kind[:6]}'):
            build_objective(kind, memory)
    with pytest.raises(ConfigError, match=r"HDCMiner would mine.*\{'miner': 'HDCMiner'\}"):
        build_objective('class', memory, build_miner('HDCMiner', None))
    with pytest.raises(ConfigError, match='memory_size=16 does not hold a batch of 20'):
        build_objective('class', memory, batch_size=20)
    with pytest.raises(ConfigError, match='does not hold a batch of 17'):
        memory(torch.zeros(17, DIMENSION), torch.zeros(17))
    check_objective_runs(build_objective('class', memory), 'class', DIMENSION, NUM_CLASSES)


def degenerate(case):
    """Batches as samplers may give them, and what training may make of them."""
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(12, DIMENSION, generator=generator), torch.arange(12) // 3
    if case == 'item drawn twice':
        embeddings[1] = embeddings[0]
    elif case == 'all the same':
        embeddings = embeddings[:1].repeat(12, 1)
    elif case == 'opposites':
        embeddings[1] = embeddings[3] = -embeddings[0]
    elif case == 'one class':
        labels = labels * 0
    elif case == 'nothing similar':
        labels = torch.arange(12)
    elif case == 'two items':
        embeddings, labels = embeddings[:2], labels[:2]
    elif case == 'one short':
        embeddings, labels = embeddings[:11], labels[:11]
    return embeddings.requires_grad_(), labels


CASES = ('item drawn twice', 'all the same', 'opposites', 'one class', 'nothing similar')


@pytest.mark.parametrize('case', [*CASES, 'two items', 'one short'])
def test_no_batch_breaks_a_loss(case):
    for name in CLASS_LOSSES:
        embeddings, labels = degenerate(case)
        loss = build_loss(name, NEEDED.get(name), DIMENSION, 12)(embeddings, labels)
        loss.backward()
        assert torch.isfinite(loss), name
        assert torch.isfinite(embeddings.grad).all(), name


# these take pairs of neighbours in the batch, whichever they are
@pytest.mark.parametrize('name', sorted(set(CLASS_LOSSES) - {'NPairsLoss', 'VICRegLoss'}))
def test_the_order_of_a_batch_does_not_matter(name):
    embeddings, labels = degenerate('as it should be')
    order = torch.randperm(12)
    values = []
    for shown in (torch.arange(12), order):
        torch.manual_seed(0)
        values.append(float(build(name)(embeddings[shown], labels[shown]).detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_smooth_ap_is_the_original_where_that_works():
    embeddings = torch.randn(16, DIMENSION, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) // 4
    for miner in (None, build_miner('BatchHardMiner', None)):
        tuples = miner and miner(embeddings, labels)
        expected = original_losses.SmoothAPLoss()(embeddings, labels, tuples)
        assert float(build('SmoothAPLoss')(embeddings, labels, tuples)) == pytest.approx(
            float(expected), rel=1e-5
        )


def test_smooth_ap_of_classes_of_any_size_by_hand():
    embeddings, labels = degenerate('one short')
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    embeddings, labels = embeddings[order].detach(), labels[order]
    unit = torch.nn.functional.normalize(embeddings).double()
    similarity = unit @ unit.T
    losses = []
    for query in range(11):
        same = [i for i in range(11) if labels[i] == labels[query]]
        parts = []
        for item in same:
            before = torch.sigmoid((similarity[query] - similarity[query, item]) / 0.01)
            before[item] = 1
            parts.append(before[same].sum() / before.sum())
        losses.append(1 - np.mean(parts))
    found = build('SmoothAPLoss')(embeddings, labels)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-4)


def refusal_of_distance(name, distance):
    try:
        build(name, {'distance': distance})
    except ConfigError as error:
        return str(error)
    return ''


@pytest.mark.parametrize('distance', sorted(PARTS['distance']))
@pytest.mark.parametrize('name', CLASS_LOSSES)
def test_every_distance_learns_or_is_refused(name, distance):
    refusal = refusal_of_distance(name, distance)
    if refusal:
        named = [d for d in PARTS['distance'] if d in refusal.partition(distance)[2]]
        assert not any(refusal_of_distance(name, other) for other in named)
        assert named or 'leave it out' in refusal
        return
    assert distance in allowed_parts(name, 'distance')
    losses, before, after = train(lambda: build(name, {'distance': distance}), epochs=8, rate=0.05)
    assert losses[-1] < losses[0]
    assert after > before + 0.1
