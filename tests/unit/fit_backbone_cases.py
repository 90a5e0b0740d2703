"""For each argument of `fit(model='...')`, a run that shows what it does; see test_fit_arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pytorch_metric_learning import losses, miners

import finetuner
from finetuner.client import get_client
from finetuner.data import CSVOptions, build_dataset
from finetuner.excepts import ConfigError, ConflictError, DataError
from tests.unit.fit_harness import (
    RATE,
    TEXTS,
    World,
    embed,
    picture_docs,
    submit,
    text_dataset,
    text_docs,
)
from tests.unit.tiny_encoder import DIMENSION

CASES: dict[str, Callable[[World], None]] = {}


def case(function: Callable[[World], None]) -> Callable[[World], None]:
    """Enter a case under the name of the argument that it shows."""
    CASES[function.__name__] = function
    return function


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def words_of(ran, world) -> Counter:
    """The texts that a run was trained on, as its batches had them."""
    tokenizer = world.model.backbone.tokenizer
    rows = (row for inputs, _ in ran.training.batches for row in inputs['input_ids'])
    return Counter(tokenizer.decode(row, skip_special_tokens=True) for row in rows)


# what is trained, and on what


@case
def model(world):
    first, other = world.text(), world.text(model=str(world.other_encoder))
    assert same(world.model.state_dict(), first.training.before)
    assert not same(world.model.state_dict(), other.training.before)
    assert (first.artifact.spec.backbone, other.artifact.spec.backbone) == (
        'encoder-0', 'encoder-1',
    )  # fmt: skip
    assert world.picture().artifact.spec.backbone == 'efficientnet-lite0'


@case
def train_data(world):
    assert words_of(world.text(), world) == Counter(TEXTS)
    docs = text_docs(2)[18:]
    ran = world.text(docs)
    assert words_of(ran, world) == Counter(doc.text for doc in docs)
    assert ran.manifest['num_documents'] == 18


@case
def eval_data(world):
    assert 'val_loss' not in world.text().epochs[0]
    docs = text_docs(2)[18:]
    ran = world.text(eval_data=docs, learning_rate=1e-12)
    expected = world.loss(losses.TripletMarginLoss(), texts=[doc.text for doc in docs])
    assert ran.epochs[0]['val_loss'] == pytest.approx(expected.item(), abs=1e-5)


@case
def val_split(world):
    docs = text_docs()
    for place, doc in enumerate(docs):
        doc.tags['finetuner_label'] = place // 2
    given = {'batch_size': 6, 'num_items_per_class': 2}
    ran = world.text(docs, val_split=0.34, **given)
    assert 'val_loss' in ran.epochs[0]
    assert 'val_loss' not in world.text(docs, **given).epochs[0]
    # three of the nine classes, whole
    assert ran.manifest['num_documents'] == 12
    assert len({label for labels in ran.training.labels for label in labels}) == 6


@case
def model_artifact(world):
    parent = world.text(learning_rate=0.01)
    ran = world.text(model_artifact=str(parent.artifact.directory))
    assert same(ran.training.before, parent.after)
    assert not same(ran.training.before, world.text().training.before)
    assert ran.manifest['parent'] == parent.artifact.directory.name


@case
def model_options(world):
    ran = world.text(model_options={'max_length': 4, 'pooler': 'cls'})
    assert (ran.artifact.spec.inputs.max_length, ran.artifact.spec.inputs.pooler) == (4, 'cls')
    assert ran.training.batches[0][0]['input_ids'].shape == (18, 4)
    assert world.text().training.batches[0][0]['input_ids'].shape == (18, 5)


@case
def output_dim(world):
    ran = world.text(output_dim=4)
    assert embed(ran, TEXTS).shape == (18, 4)
    assert embed(world.text(), TEXTS).shape == (18, DIMENSION)


@case
def csv_options(world):
    path = world.folder / 'labels.csv'
    path.write_text(''.join(f'{t},class {i // 6}\n' for i, t in enumerate(TEXTS)))
    options = CSVOptions(is_labeled=True, size=12)
    ran = world.text(str(path), csv_options=options, batch_size=12)
    assert words_of(ran, world) == Counter(TEXTS[:12])
    # without them its columns are pairs of texts
    given = {'batch_size': 'left out', 'num_items_per_class': 'left out'}
    run = submit(model=str(world.encoder), train_data=str(path), **given)
    stored = get_client().load_data(run.config['train_data'])
    assert {'class 0', *TEXTS} <= {doc.text for doc in stored}


@case
def content(world):
    made = text_dataset(world.folder)
    ran = world.text(made, content='text', label='number')
    assert words_of(ran, world) == words_of(world.text(), world)
    ran = world.text(made, content='longer', label='number')
    assert words_of(ran, world) == Counter(f'{text} a' for text in TEXTS)
    with pytest.raises(ConfigError, match='it could be text, longer'):
        submit(model=str(world.encoder), train_data=made, label='number')


@case
def label(world):
    made = text_dataset(world.folder)
    labels = [0] * 9 + [1] * 9
    for name, numbers in (('number', [i // 6 for i in range(18)]), ('half', labels)):
        ran = world.text(
            made.rows, content='text', label=name, num_items_per_class=6, batch_size=12
        )
        stored = build_dataset(get_client().load_data(ran.run.config['train_data']))
        assert list(stored.labels) == numbers
    given = {'loss': 'left out', 'batch_size': 18, 'num_items_per_class': 'left out'}
    ran = world.text(made, content='text', **given)
    assert '18 Documents (instance)' in ran.logs


@case
def on_broken(world):
    docs = text_docs()
    docs[4].text, docs[4].blob = '', picture_docs()[0].blob
    given = {'batch_size': 15, 'num_items_per_class': 5}
    with pytest.raises(DataError, match='Document 4 holds a picture'):
        world.text(docs, **given)
    ran = world.text(docs, on_broken='skip', **given)
    assert ran.manifest['num_documents'] == 17
    assert 'Left out: Document 4' in ran.logs


# what the run is called


@case
def run_name(world):
    given = {'model': str(world.encoder), 'train_data': text_docs()}
    assert submit(run_name='mine', **given).name == 'mine'
    assert finetuner.get_run('mine').name == 'mine'
    with pytest.raises(ConflictError, match='mine'):
        submit(run_name='mine', **given)


@case
def description(world):
    run = submit(model=str(world.encoder), train_data=text_docs(), description='of shoes')
    assert run.description == finetuner.get_run(run.name).description == 'of shoes'


@case
def experiment_name(world):
    given = {'model': str(world.encoder), 'train_data': text_docs()}
    there, here = submit(experiment_name='shoes', **given), submit(**given)
    assert [run.name for run in finetuner.list_runs('shoes')] == [there.name]
    assert [run.name for run in finetuner.list_runs('default')] == [here.name]


@case
def public(world):
    given = {'model': str(world.encoder), 'train_data': text_docs()}
    submit(run_name='shared', public=True, **given)
    submit(run_name='own', **given)
    shown = {run.name: run.config['public'] for run in finetuner.list_runs()}
    assert shown == {'shared': True, 'own': False}
    assert finetuner.get_run('shared').config['public'] is True


# the loss


@case
def loss(world):
    for name in ('TripletMarginLoss', 'ContrastiveLoss', 'NTXentLoss'):
        expected = world.loss(getattr(losses, name)())
        ran = world.text(loss=name)
        assert ran.steps[0]['loss'] == pytest.approx(expected.item(), rel=1e-4)


@case
def loss_options(world):
    expected = world.loss(losses.TripletMarginLoss(margin=0.5, swap=True))
    ran = world.text(loss_options={'margin': 0.5, 'swap': True})
    assert ran.steps[0]['loss'] == pytest.approx(expected.item(), rel=1e-4)
    assert ran.steps[0]['loss'] != pytest.approx(world.text().steps[0]['loss'])


@case
def miner(world):
    expected = world.loss(losses.TripletMarginLoss(), miners.BatchHardMiner())
    ran = world.text(miner='BatchHardMiner')
    assert ran.steps[0]['loss'] == pytest.approx(expected.item(), rel=1e-4)
    assert ran.steps[0]['loss'] != pytest.approx(world.text().steps[0]['loss'])


@case
def miner_options(world):
    found = []
    for options in ({'margin': 0.01}, {'margin': 0.1}):
        expected = world.loss(losses.TripletMarginLoss(), miners.TripletMarginMiner(**options))
        ran = world.text(miner='TripletMarginMiner', miner_options=options)
        found.append(ran.steps[0]['loss'])
        assert found[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert found[0] != pytest.approx(found[1])


def arc_face(world, **parameters):
    """Weights of a loss before its step and after it, and what that step had as gradient."""
    ran = world.text(loss='ArcFaceLoss', **parameters)
    (before,), (after,) = ran.training.loss_before, ran.training.loss_after
    reference = losses.ArcFaceLoss(num_classes=3, embedding_size=DIMENSION)
    reference.W.data.copy_(before)
    world.loss(reference).backward()
    return before, after, reference.W.grad


@case
def loss_optimizer(world):
    before, after, _ = arc_face(world)  # Adam, as the model: its first step is the rate
    assert float((after - before).abs().max()) == pytest.approx(RATE, rel=0.01)
    before, after, gradient = arc_face(world, loss_optimizer='SGD')
    torch.testing.assert_close(after, before - RATE * gradient)


@case
def loss_optimizer_options(world):
    options = {'lr': 0.25, 'weight_decay': 0.5}
    before, after, gradient = arc_face(world, loss_optimizer='SGD', loss_optimizer_options=options)
    torch.testing.assert_close(after, before - 0.25 * (gradient + 0.5 * before))
