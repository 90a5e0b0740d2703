"""For each argument of `fit(model=<module>)`, a training that shows what it does."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import TestCase

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray
from pytorch_metric_learning import losses

import finetuner
from finetuner.callback import EarlyStopping
from finetuner.columns import dataset
from finetuner.data import CSVOptions
from finetuner.excepts import ConfigError, DataError
from finetuner.training.trainer import BaseCallback
from tests.conftest import make_vector_docs
from tests.unit.fit_harness import Training, watched

CASES: dict[str, Callable[[Path], None]] = {}
RATE = 1e-3
CUT = {'to_embedding_model': True, 'input_size': (6,)}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Enter a case under the name of the argument that it shows."""
    CASES[function.__name__] = function
    return function


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
    )


def fit(trained=None, docs=None, **options) -> tuple[torch.nn.Module, Training]:
    """Train a network on 32 vectors of 4 classes; also gives what was seen of it."""
    given = {'epochs': 1, 'batch_size': 32, 'loss': 'TripletMarginLoss', 'learning_rate': RATE}
    given = {name: value for name, value in {**given, **options}.items() if value != 'left out'}
    with (watch := watched()):
        tuned = finetuner.fit(
            network() if trained is None else trained,
            make_vector_docs() if docs is None else docs,
            **given,
        )
    return tuned, watch.seen[0]


def moves(tuned, training):
    before = training.before
    return {
        name: float((tensor.float() - before[name].float()).abs().max())
        for name, tensor in tuned.state_dict().items()
    }


def moved(tuned, training):
    return {name for name, distance in moves(tuned, training).items() if distance > 0}


def reference(loss, options=None):
    """A loss of pytorch-metric-learning of the untrained network on all vectors."""
    docs = make_vector_docs()
    labels = torch.tensor([int(doc.tags['finetuner_label']) for doc in docs])
    return loss(network().train()(torch.from_numpy(docs.tensors)), labels)


class Watch(BaseCallback):
    """Keeps the loss, the rate and the validation loss of each step and epoch."""

    def __init__(self):
        self.losses, self.rates, self.val_losses = [], [], []

    def on_train_batch_end(self, trainer):
        self.losses.append(trainer.state.loss)
        self.rates.append(trainer.state.learning_rate)

    def on_epoch_end(self, trainer):
        self.val_losses.append(trainer.state.val_loss)


def seen_by(**options):
    watch = Watch()
    fit(callbacks=[watch], **options)
    return watch


@case
def model(tmp):
    mine = network(3)
    tuned, training = fit(mine)
    assert tuned is mine
    first = network(3).state_dict()
    assert all(torch.equal(tensor, first[n]) for n, tensor in training.before.items()
               if 'num_batches' not in n)  # fmt: skip


@case
def train_data(tmp):
    docs = make_vector_docs(seed=5)
    _, training = fit(docs=docs)
    rows = {row.numpy().tobytes() for inputs, _ in training.batches for row in inputs}
    assert rows == {doc.tensor.tobytes() for doc in docs}


@case
def eval_data(tmp):
    assert seen_by().val_losses == [None]
    docs = make_vector_docs(seed=5)
    watch, idle = Watch(), network().eval()
    fit(idle, eval_data=docs, learning_rate=1e-12, freeze_batch_norm=True, callbacks=[watch])
    labels = torch.tensor([int(doc.tags['finetuner_label']) for doc in docs])
    expected = losses.TripletMarginLoss()(idle(torch.from_numpy(docs.tensors)), labels)
    assert watch.val_losses == [pytest.approx(expected.item(), rel=1e-4)]


@case
def epochs(tmp):
    assert len(seen_by(epochs=3).val_losses) == 3


@case
def batch_size(tmp):
    _, training = fit(batch_size=16)
    assert [len(labels) for labels in training.labels] == [16, 16]
    _, training = fit(batch_size='left out')
    assert [len(labels) for labels in training.labels] == [32]


@case
def loss(tmp):
    for name in ('TripletMarginLoss', 'ContrastiveLoss'):
        expected = reference(getattr(losses, name)()).item()
        assert seen_by(loss=name).losses == [pytest.approx(expected, rel=1e-4)]
    own = losses.TripletMarginLoss(margin=0.7)
    assert seen_by(loss=own).losses == [pytest.approx(reference(own).item(), rel=1e-4)]


@case
def configure_optimizer(tmp):
    tuned, training = fit(
        configure_optimizer=lambda model: torch.optim.SGD(model[3].parameters(), lr=0.5)
    )
    plain = network().train()
    labels = torch.arange(32) // 8
    losses.TripletMarginLoss()(
        plain(torch.from_numpy(make_vector_docs().tensors)), labels
    ).backward()
    expected = training.before['3.weight'] - 0.5 * plain[3].weight.grad
    torch.testing.assert_close(tuned[3].weight.detach(), expected)
    assert '0.weight' not in moved(tuned, training)


@case
def learning_rate(tmp):
    for rate in (1e-3, 1e-4):
        # the first step of Adam is the rate
        assert moves(*fit(learning_rate=rate))['3.weight'] == pytest.approx(rate, rel=0.01)


@case
def scheduler_step(tmp):
    def configure(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    given = {'configure_optimizer': configure, 'epochs': 2, 'batch_size': 16}
    assert seen_by(scheduler_step='batch', **given).rates == [1.0, 0.5, 0.25, 0.125]
    assert seen_by(scheduler_step='epoch', **given).rates == [1.0, 1.0, 0.5, 0.5]


@case
def device(tmp):
    has_gpu = torch.cuda.is_available()
    for asked, found in {'cpu': 'cpu', 'cuda': 'cuda' if has_gpu else 'cpu'}.items():
        with TestCase().assertLogs('finetuner.training', 'INFO') as logs:
            logging.getLogger('finetuner.training').info('logs take one line at least')
            tuned, training = fit(device=asked)
        assert training.trainer.device.type == found
        assert next(tuned.parameters()).device.type == found
        assert ('No GPU that torch can use' in str(logs.output)) == (asked != found)


@case
def preprocess_fn(tmp):
    _, training = fit(preprocess_fn=lambda doc: doc.tensor * 0 + 7)
    assert all((inputs == 7).all() for inputs, _ in training.batches)


@case
def collate_fn(tmp):
    _, training = fit(collate_fn=lambda items: torch.from_numpy(np.stack(items)) * 0 + 3)
    assert all((inputs == 3).all() for inputs, _ in training.batches)


@case
def num_items_per_class(tmp):
    for items in (2, 4):
        _, training = fit(batch_size=8, num_items_per_class=items)
        assert {n for ls in training.labels for n in Counter(ls).values()} == {items}
    # all four classes by default
    _, training = fit(batch_size=8)
    assert {len(Counter(labels)) for labels in training.labels} == {4}


@case
def callbacks(tmp):
    watch, stopping = Watch(), EarlyStopping('train_loss', patience=1, min_delta=10)
    fit(epochs=6, callbacks=[watch, stopping])
    assert len(watch.losses) == 2


@case
def num_workers(tmp):
    assert fit()[1].children == 0
    assert fit(num_workers=1)[1].children == 1


@case
def to_embedding_model(tmp):
    mine = network()
    tuned, _ = fit(mine, layer_name='relu_3', **CUT)
    assert tuned is not mine
    assert tuned(torch.zeros(2, 6)).shape == (2, 16)
    assert fit(mine)[0] is mine


@case
def input_size(tmp):
    with pytest.raises(ConfigError, match='input_size is needed'):
        fit(to_embedding_model=True)
    with pytest.raises(ConfigError, match=r'input_size=\(7,\)'):
        fit(to_embedding_model=True, input_size=(7,))
    assert fit(**CUT)[0](torch.zeros(2, 6)).shape == (2, 5)


@case
def input_dtype(tmp):
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.EmbeddingBag(10, 4)

        def forward(self, numbers):
            return self.table(numbers)

    docs = DocumentArray(
        Document(tensor=np.array([i % 4, 5]), tags={'finetuner_label': i % 4}) for i in range(16)
    )
    given = {'to_embedding_model': True, 'input_size': (2,), 'batch_size': 16}
    assert fit(Words(), docs, input_dtype='int64', **given)[0](torch.zeros(1, 2).long()).shape == (
        1, 4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match='does not run on an input'):
        fit(Words(), docs, **given)


@case
def layer_name(tmp):
    assert fit(layer_name='linear_1', **CUT)[0](torch.zeros(2, 6)).shape == (2, 16)
    assert fit(**CUT)[0](torch.zeros(2, 6)).shape == (2, 5)
    with pytest.raises(ConfigError, match='need to_embedding_model=True'):
        fit(layer_name='linear_1')


@case
def freeze(tmp):
    def weights(**options):
        return {n for n in moved(*fit(**options, **CUT)) if n.endswith(('weight', 'bias'))}

    assert weights() == {f'{i}.{name}' for i in (0, 1, 3) for name in ('weight', 'bias')}
    assert weights(freeze=['linear_1', '1']) == {'3.weight', '3.bias'}
    assert weights(freeze=True, output_dim=2) == {'projection_head.weight'}


@case
def projection_head(tmp):
    head = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh())
    before = copy.deepcopy(head.state_dict())
    tuned, training = fit(projection_head=head, **CUT)
    assert tuned(torch.full((2, 6), 100.0)).abs().max() <= 1
    started = training.before['projection_head.0.weight']
    assert torch.equal(started, before['0.weight'])
    assert 'projection_head.0.weight' in moved(tuned, training)


@case
def output_dim(tmp):
    assert fit(output_dim=2, **CUT)[0](torch.zeros(2, 6)).shape == (2, 2)


@case
def freeze_batch_norm(tmp):
    assert '1.running_mean' in moved(*fit())
    assert '1.running_mean' not in moved(*fit(freeze_batch_norm=True))


@case
def csv_options(tmp):
    path = tmp / 'words.csv'
    path.write_text(''.join(f'{i % 4} {i},class {i % 4}\n' for i in range(16)))

    def numbers(doc):
        return np.array((doc.text.split() * 6)[:6], dtype=np.float32)

    given = {'preprocess_fn': numbers, 'batch_size': 16}
    _, training = fit(docs=str(path), csv_options=CSVOptions(is_labeled=True), **given)
    assert sorted(training.labels[0]) == sorted(list(range(4)) * 4)
    with pytest.raises(DataError):  # pairs, and 'class 0' is no number
        fit(docs=str(path), **given)


def vector_dataset(tmp):
    """The vectors of `make_vector_docs`, with their classes and with which half they are of."""

    @dataset(sql_file=tmp / 'vectors.sql', data_dir=tmp / 'vectors')
    class Vectors:
        vector: np.ndarray
        number: int

        def negative(vector: np.ndarray) -> np.ndarray:
            return -vector

        def half(number: int) -> bool:
            return number < 2

    Vectors.extend(
        {'vector': doc.tensor, 'number': doc.tags['finetuner_label']} for doc in make_vector_docs()
    )
    return Vectors


@case
def content(tmp):
    made = vector_dataset(tmp)
    sums = []
    for docs, given in (
        (None, {}),
        (made, {'content': 'vector', 'label': 'number'}),
        (made, {'content': 'negative', 'label': 'number'}),
    ):
        _, training = fit(docs=docs, **given)
        sums.append(sum(float(inputs.double().sum()) for inputs, _ in training.batches))
    assert sums[0] == pytest.approx(sums[1]) == pytest.approx(-sums[2]) != 0
    with pytest.raises(ConfigError, match='it could be vector, negative'):
        fit(docs=made, label='number')


@case
def label(tmp):
    made = vector_dataset(tmp)
    for name, count in (('number', 4), ('half', 2)):
        _, training = fit(docs=made, content='vector', label=name)
        assert len(set(training.labels[0])) == count
    _, training = fit(docs=made, content='vector', loss='NTXentLoss', batch_size=12)
    assert len(set(training.labels[0])) == 6, 'without one each is its own'


@case
def views_per_instance(tmp):
    docs = DocumentArray(Document(tensor=doc.tensor) for doc in make_vector_docs())
    given = {'loss': 'NTXentLoss', 'batch_size': 12}
    for views in (2, 3):
        _, training = fit(docs=docs, views_per_instance=views, **given)
        assert {n for ls in training.labels for n in Counter(ls).values()} == {views}


@case
def on_broken(tmp):
    docs = make_vector_docs()

    def preprocess(doc):
        if doc.id == docs[9].id:
            raise OSError('gone')
        return doc.tensor

    with pytest.raises(DataError, match='Document 9 cannot be preprocessed'):
        fit(docs=docs, preprocess_fn=preprocess)
    _, training = fit(docs=docs, preprocess_fn=preprocess, on_broken='skip')
    assert [len(labels) for labels in training.labels] == [31]


@case
def seed(tmp):
    def tuned(seed):
        model, training = fit(seed=seed, batch_size=16)
        return training.labels, torch.cat([p.detach().flatten() for p in model.parameters()])

    (labels, first), (_, again), (others, other) = tuned(1), tuned(1), tuned(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert labels != others
