"""For each argument of `fit(model='...')` that is about steps, weights and what comes after."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from finetuner import onnx_export
from finetuner.callback import BestModelCheckpoint, EarlyStopping, EvaluationCallback
from finetuner.excepts import RunFailedError
from finetuner.models.transformers_import import import_transformers
from finetuner.models.whitening import Whitening
from finetuner.runs import probing
from tests.unit.fit_backbone_cases import case, same, words_of
from tests.unit.fit_harness import RATE, TEXTS, embed, text_docs

# the steps


@case
def optimizer(world):
    adam = world.text()
    # its first step is the rate, wherever the gradient is not nothing
    assert max(adam.moves.values()) == pytest.approx(RATE, rel=0.01)
    sgd = world.text(optimizer='SGD')
    after = sgd.after
    for name, gradient in world.gradients(losses.TripletMarginLoss()).items():
        expected = sgd.training.before[name] - RATE * gradient
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)


@case
def optimizer_options(world):
    ran = world.text(optimizer='SGD', optimizer_options={'weight_decay': 0.1})
    after = ran.after
    for name, gradient in world.gradients(losses.TripletMarginLoss()).items():
        before = ran.training.before[name]
        expected = before - RATE * (gradient + 0.1 * before)
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)
    layer_wise = world.text(optimizer_options={'layer_wise_lr_decay': 0.5}).moves
    transformer = 'backbone.transformer'
    for place, share in (('encoder.layer.1', 1), ('encoder.layer.0', 0.5), ('embeddings', 0.25)):
        moves = [d for name, d in layer_wise.items() if name.startswith(f'{transformer}.{place}')]
        assert max(moves) == pytest.approx(RATE * share, rel=0.01)


@case
def learning_rate(world):
    ran = world.text(learning_rate=3e-5)
    assert max(ran.moves.values()) == pytest.approx(3e-5, rel=0.01)
    assert ran.rates == [3e-5]
    of_recipe = world.text(learning_rate='left out')
    # of texts with a loss of one's own, on a model that was not measured
    assert of_recipe.rates == [pytest.approx(of_recipe.run.config['learning_rate'])]
    assert 1e-6 < of_recipe.rates[0] < RATE


@case
def epochs(world):
    ran = world.text(epochs=3)
    assert (len(ran.epochs), len(ran.steps)) == (3, 3)


@case
def batch_size(world):
    ran = world.text(batch_size=4, num_items_per_class=2)
    assert {len(labels) for labels in ran.training.labels} == {4}
    left_out = world.text(batch_size='left out')
    assert [len(labels) for labels in left_out.training.labels] == [18]


@case
def num_items_per_class(world):
    for items in (2, 3):
        ran = world.text(batch_size=6, num_items_per_class=items)
        assert {n for ls in ran.training.labels for n in Counter(ls).values()} == {items}


@case
def sampler(world):
    given = {'batch_size': 6, 'num_items_per_class': 2}
    drawn = {name: world.text(sampler=name, **given) for name in ('class', 'random', 'auto')}
    composed = {
        name: [sorted(Counter(labels).values()) for labels in ran.training.labels]
        for name, ran in drawn.items()
    }
    assert composed['class'] == composed['auto'] == [[2, 2, 2]] * 3
    assert composed['random'] != composed['class']
    # each text once, however the classes fall
    assert words_of(drawn['random'], world) == Counter(TEXTS)


@case
def views_per_instance(world):
    docs = text_docs(labelled=False)
    given = {'loss': 'NTXentLoss', 'batch_size': 6}
    for views in (2, 3):
        ran = world.text(docs, views_per_instance=views, **given)
        assert {n for ls in ran.training.labels for n in Counter(ls).values()} == {views}


@case
def seed(world):
    given = {'batch_size': 6, 'num_items_per_class': 2}
    first, again = (world.text(text_docs(), seed=1, **given) for _ in range(2))
    other = world.text(seed=2, **given)
    assert same(first.after, again.after)
    assert first.training.labels == again.training.labels
    assert not same(first.after, other.after)
    assert first.training.labels != other.training.labels


@case
def scheduler(world):
    num_steps = 4
    for name in ('linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'constant'):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
        theirs = import_transformers().get_scheduler(name, optimizer, 0, num_steps)
        expected = []
        for _ in range(num_steps):
            expected.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            theirs.step()
        ran = world.text(scheduler=name, epochs=num_steps)
        assert ran.rates == pytest.approx(expected, abs=1e-6)
    options = {'num_warmup_steps': 3}
    ran = world.text(scheduler='constant_with_warmup', scheduler_options=options, epochs=num_steps)
    assert ran.rates == pytest.approx([RATE / 4, RATE / 2, RATE * 3 / 4, RATE])
    assert world.text(scheduler='left out').run.config['scheduler'] == 'cosine'


@case
def scheduler_options(world):
    def rates(name, epochs=4, batch_size=18, **options):
        items = 6 * batch_size // 18
        return world.text(
            scheduler=name, scheduler_options=options, epochs=epochs, batch_size=batch_size,
            num_items_per_class=items,
        ).rates  # fmt: skip

    assert rates('linear', num_warmup_steps=0.5) == pytest.approx(
        [RATE / 3, RATE * 2 / 3, RATE, RATE / 2]
    )
    assert rates('linear', num_training_steps=2) == pytest.approx([RATE, RATE / 2, 0, 0])
    assert rates('polynomial', power=2.0) == pytest.approx(
        [RATE * share**2 for share in (1, 0.75, 0.5, 0.25)]
    )
    # two waves: down and up again, twice
    assert rates('cosine', num_cycles=2) == pytest.approx([RATE, 0, RATE, 0], abs=1e-9)
    by_batch = rates('linear', epochs=2, batch_size=6)
    by_epoch = rates('linear', epochs=2, batch_size=6, scheduler_step='epoch')
    assert by_batch == pytest.approx([RATE * share / 6 for share in (6, 5, 4, 3, 2, 1)])
    assert by_epoch == pytest.approx([RATE] * 3 + [RATE / 2] * 3)


# what of the model moves


@case
def freeze(world):
    def layers(ran):
        return {name.rpartition('.')[0] for name in ran.moved}

    assert len(layers(world.text())) > 10
    # the last matrix, and the normalisation after it
    assert layers(world.text(freeze=True)) == {
        f'backbone.transformer.encoder.layer.1.output.{name}' for name in ('dense', 'LayerNorm')
    }
    headed = world.text(freeze=True, output_dim=4)
    assert headed.moved == {'projection_head.0.linear.weight'}


@case
def freeze_batch_norm(world):
    def statistics(ran):
        return {name for name in ran.moved if 'running_' in name}

    assert not statistics(world.picture(freeze_batch_norm=True))
    assert len(statistics(world.picture(freeze_batch_norm=False))) > 50
    # nothing is worth keeping of weights that were never trained
    assert len(statistics(world.picture())) > 50


@case
def whiten(world):
    docs = text_docs(2)
    ran = world.text(docs, whiten=True)
    plain = world.text(docs, whiten=False)
    assert any(isinstance(m, Whitening) for m in ran.training.trainer.model.modules())
    assert not any(isinstance(m, Whitening) for m in plain.training.trainer.model.modules())
    words, labels = [doc.text for doc in docs], np.arange(36) % 18 // 6

    def spread(ran):
        """How many times as far texts of a class scatter along one direction as along another."""
        vectors = embed(ran, words)
        centres = np.stack([vectors[labels == label].mean(axis=0) for label in range(3)])
        lengths = np.linalg.eigvalsh(np.cov((vectors - centres[labels]).T))
        return lengths[-1] / lengths[len(lengths) // 2]

    assert spread(ran) < 0.5 * spread(plain)


@case
def augmentation(world):
    def pixels(ran):
        return {
            picture.numpy().tobytes() for inputs, _ in ran.training.batches for picture in inputs
        }

    plain, light, strong = (
        pixels(world.picture(augmentation=name)) for name in ('none', 'light', 'strong')
    )
    assert len(plain) == len(light) == len(strong) == 12
    assert plain == pixels(world.picture())
    assert len(plain & strong) < 6
    assert len(plain & light) < 12
    assert light != strong


# around the training


@case
def callbacks(world):
    docs = text_docs()
    stopping = EarlyStopping('train_loss', patience=1, min_delta=10)
    ran = world.text(
        docs,
        epochs=6,
        callbacks=[EvaluationCallback(docs, limit=3), stopping, BestModelCheckpoint('train_loss')],
    )
    assert len(ran.epochs) == 2
    assert {stage: 'encoder-0_recall_at_k' in ms for stage, ms in ran.run.metrics().items()} == {
        'before': True, 'after': True, 'p_value': True,
    }  # fmt: skip
    assert 'recall_at_k' in ran.epochs[0]
    assert 'recall_at_k' not in world.text().epochs[0]
    first = BestModelCheckpoint('train_loss', mode='max')
    kept = world.text(docs, epochs=3, learning_rate=0.01, callbacks=[first])
    if kept.epochs[0]['train_loss'] == max(e['train_loss'] for e in kept.epochs):
        assert same(kept.after, world.text(docs, learning_rate=0.01).after)
    assert 'Kept the weights of epoch' in kept.logs


@case
def device(world):
    asked = 'No GPU that torch can use was found'
    ran = world.text(device='cpu')
    assert ran.training.trainer.device.type == 'cpu'
    assert asked not in ran.logs
    ran = world.text(device='cuda')
    assert ran.training.trainer.device.type == ('cuda' if torch.cuda.is_available() else 'cpu')
    assert (asked in ran.logs) != torch.cuda.is_available()


@case
def num_workers(world):
    assert world.text().training.children == 0
    for share, children in ((0.0, 1), (math.inf, 0)):
        with pytest.MonkeyPatch.context() as patch:
            # however little or much of the time loading takes, processes are worth it, or are not
            patch.setattr(probing, '_LOADING_SHARE', share)
            ran = world.text(text_docs(), num_workers=1)
            assert ran.training.children == children
            assert f'Loading: {children} processes' in ran.logs


@case
def to_onnx(world):
    assert world.text(to_onnx=True).artifact.onnx_path is not None
    with pytest.MonkeyPatch.context() as patch:
        # no graph can be that near to torch
        patch.setattr(onnx_export, 'LEAST_COSINE', 1.1)
        ran = world.text(text_docs(), to_onnx=False)
        assert ran.artifact.onnx_path is None
        assert 'The artifact has no ONNX graph' in ran.logs
        with pytest.raises(RunFailedError, match='the ONNX export differs from torch'):
            world.text(text_docs(), to_onnx=True)
