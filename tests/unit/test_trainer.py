"""The loop: learns, repeats itself by seed, stops at nonsense, and tells callbacks in order."""

import copy
import math

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.data.loading import build_dataset
from finetuner.excepts import TrainingError
from finetuner.training.callbacks import embed_all
from finetuner.training.losses import build_loss, build_miner
from finetuner.training.objectives import Objective
from finetuner.training.optimization import build_optimizer, build_schedule
from finetuner.training.progress import ProgressReport, bar_fields, describe
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.step import to_device
from finetuner.training.trainer import (
    BaseCallback,
    Trainer,
    resolve_device,
    seed_everything,
)
from tests.conftest import make_vector_docs

BATCH, ITEMS = 16, 4


def loader_of(docs, seed=0, batch_size=BATCH):
    shape = BatchShape(batch_size, ITEMS)
    return Pipeline(None, seed=seed).training_loader(build_dataset(docs), shape)


def trainer_of(
    model, callbacks=(), learning_rate=0.01, loss=None, optimizer='Adam', miner=None, **options
):
    loss = loss or build_loss('TripletMarginLoss', None, 5, 4)
    optimizers = [build_optimizer(optimizer, model.parameters(), learning_rate)]
    if list(loss.parameters()):
        optimizers.append(build_optimizer('SGD', loss.parameters(), learning_rate))
    objective = Objective(loss, miner)
    return Trainer(model, objective, optimizers, callbacks=callbacks, **options)


def share_of_right_neighbours(model, docs):
    """Share of the items whose nearest other item is of their class."""
    model.eval()
    with torch.no_grad():
        embeddings = torch.nn.functional.normalize(model(torch.from_numpy(docs.tensors)))
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    labels = np.array(docs[:, 'tags__finetuner_label'])
    return float(np.mean(labels == labels[similarity.argmax(1).numpy()]))


class Recorder(BaseCallback):
    """Writes down every event with the place it came at."""

    def __init__(self):
        self.events = []
        self.losses = []
        self.rates = []

    def on_fit_begin(self, trainer):
        self.events.append('fit_begin')

    def on_epoch_begin(self, trainer):
        self.events.append(f'epoch_begin {trainer.state.epoch}')

    def on_train_batch_end(self, trainer):
        state = trainer.state
        self.events.append(f'batch {state.batch}/{state.num_batches} step {state.step}')
        self.losses.append(state.loss)
        self.rates.append(state.learning_rate)

    def on_val_end(self, trainer):
        self.events.append('val_end')

    def on_epoch_end(self, trainer):
        self.events.append(f'epoch_end {trainer.state.epoch} {sorted(trainer.state.metrics)}')

    def on_train_end(self, trainer):
        self.events.append('train_end')

    def on_fit_end(self, trainer):
        self.events.append('fit_end')


def noisy_docs():
    """Three telling dimensions drowned in noise of three others."""
    random = np.random.default_rng(3)
    docs = make_vector_docs(seed=3)
    for doc in docs:
        doc.tensor[3:] = 6 * random.normal(size=3)
        doc.tensor = doc.tensor.astype(np.float32)
    return docs


def test_it_overfits_a_toy_problem(tiny_network):
    docs = noisy_docs()
    before = share_of_right_neighbours(copy.deepcopy(tiny_network), docs)
    state = trainer_of(tiny_network).fit(loader_of(docs), 40)
    assert before < 0.7
    assert share_of_right_neighbours(tiny_network, docs) == 1.0
    assert state.step == 40 * 2
    assert state.weights_epoch == 39
    assert not tiny_network.training


def test_the_same_seed_gives_the_same_weights(tiny_network, vector_docs):
    def train(seed):
        model = copy.deepcopy(tiny_network)
        model.insert(0, torch.nn.Dropout(0.2))
        seed_everything(seed)
        trainer_of(model).fit(loader_of(vector_docs, seed), 2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(train(7), train(7))
    assert not torch.equal(train(7), train(8))


def test_first_loss_and_step_equal_a_hand_written_loop(tiny_network, vector_docs):
    model, by_hand = tiny_network, copy.deepcopy(tiny_network)
    recorder = Recorder()
    trainer_of(model, [recorder]).fit(loader_of(vector_docs), 1)
    loss_fn = build_loss('TripletMarginLoss', None, 5, 4)
    # the same kernel: a bias before a normalisation has gradients that are nothing but rounding
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=True)
    by_hand.train()
    losses = []
    for inputs, labels in loader_of(vector_docs):
        optimizer.zero_grad()
        loss = loss_fn(by_hand(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert recorder.losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_events_come_in_order(tiny_network, vector_docs):
    recorder = Recorder()
    trainer_of(tiny_network, [recorder]).fit(
        loader_of(vector_docs), 2, loader_of(vector_docs, seed=1)
    )
    epochs = [
        [
            f'epoch_begin {epoch}',
            f'batch 0/2 step {2 * epoch + 1}',
            f'batch 1/2 step {2 * epoch + 2}',
            'val_end',
            f"epoch_end {epoch} ['train_loss', 'val_loss']",
        ]
        for epoch in (0, 1)
    ]
    assert recorder.events == ['fit_begin', *epochs[0], *epochs[1], 'train_end', 'fit_end']


def test_losses_are_means_over_batches(tiny_network, vector_docs):
    recorder = Recorder()
    val_batches = list(loader_of(vector_docs, seed=5))
    trainer = trainer_of(tiny_network, [recorder])
    state = trainer.fit(loader_of(vector_docs), 1, val_batches)
    assert state.train_loss == pytest.approx(sum(recorder.losses) / 2)
    loss_fn = build_loss('TripletMarginLoss', None, 5, 4)
    tiny_network.eval()
    with torch.no_grad():
        expected = [float(loss_fn(tiny_network(x), y)) for x, y in val_batches]
    assert state.val_loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert state.metrics == {'train_loss': state.train_loss, 'val_loss': state.val_loss}


def test_validation_changes_nothing(tiny_network, vector_docs):
    with_validation = copy.deepcopy(tiny_network)
    trainer_of(tiny_network).fit(loader_of(vector_docs), 2)
    trainer_of(with_validation).fit(loader_of(vector_docs), 2, list(loader_of(vector_docs, seed=9)))
    for name, tensor in tiny_network.state_dict().items():
        assert torch.equal(tensor, with_validation.state_dict()[name]), name


@pytest.mark.parametrize('freeze', [True, False])
def test_batch_norm_statistics(tiny_network, vector_docs, freeze):
    before = copy.deepcopy(tiny_network.state_dict())
    trainer_of(tiny_network, freeze_batch_norm=freeze).fit(
        loader_of(vector_docs), 2, list(loader_of(vector_docs))
    )
    after = tiny_network.state_dict()
    for name in ('1.running_mean', '1.running_var', '1.num_batches_tracked'):
        assert torch.equal(before[name], after[name]) == freeze
    # scale and shift are trained either way
    assert not torch.equal(before['1.weight'], after['1.weight'])


class TurnsToNan(torch.nn.Module):
    """A loss that is not a number from its third call on."""

    def __init__(self, bad=math.nan):
        super().__init__()
        self.calls = 0
        self.bad = bad

    def forward(self, embeddings, labels):
        self.calls += 1
        return embeddings.sum() * (self.bad if self.calls >= 4 else 1e-4)


@pytest.mark.parametrize(('bad', 'shown'), [(math.nan, 'nan'), (math.inf, '(inf|nan)')])
def test_a_loss_that_is_no_number_ends_training(tiny_network, vector_docs, bad, shown):
    recorder = Recorder()
    trainer = trainer_of(tiny_network, [recorder], loss=TurnsToNan(bad))
    with pytest.raises(
        TrainingError,
        match=rf'the loss became -?{shown} in epoch 2, batch 2 of 2, at learning rate 0.01',
    ):
        trainer.fit(loader_of(vector_docs), 5)
    assert recorder.events[-1] == 'batch 0/2 step 3'


def test_lbfgs_steps_as_torch_does(tiny_network, vector_docs):
    by_hand = copy.deepcopy(tiny_network).train()
    batches = list(loader_of(vector_docs))
    recorder = Recorder()
    trainer_of(tiny_network, [recorder], optimizer='LBFGS', learning_rate=0.1).fit(batches, 1)
    loss_fn = build_loss('TripletMarginLoss', None, 5, 4)
    optimizer = torch.optim.LBFGS(by_hand.parameters(), lr=0.1)
    losses = []
    for inputs, labels in batches:

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = loss_fn(by_hand(inputs), labels)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    assert recorder.losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(tiny_network.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize('optimizer', ['Adam', 'LBFGS'])
def test_weights_of_the_loss_are_learned(tiny_network, vector_docs, optimizer):
    loss = build_loss('ArcFaceLoss', None, 5, 4)
    before = loss.W.detach().clone()
    trainer_of(tiny_network, loss=loss, optimizer=optimizer).fit(loader_of(vector_docs), 1)
    assert not torch.equal(before, loss.W.detach().cpu())


def test_the_miner_decides_what_the_loss_sees(tiny_network, vector_docs):
    class Nothing(torch.nn.Module):
        def forward(self, embeddings, labels):
            empty = torch.zeros(0, dtype=torch.int64)
            return empty, empty, empty

    recorder = Recorder()
    trainer_of(tiny_network, [recorder], miner=Nothing()).fit(loader_of(vector_docs), 1)
    assert recorder.losses == [0.0, 0.0]
    mined = Recorder()
    trainer_of(tiny_network, [mined], miner=build_miner('BatchHardMiner', None)).fit(
        loader_of(vector_docs), 1
    )
    assert all(loss > 0 for loss in mined.losses)


def test_the_schedule_is_stepped_each_batch_or_epoch(tiny_network, vector_docs):
    def learned(step_on):
        recorder = Recorder()
        model = copy.deepcopy(tiny_network)
        optimizer = build_optimizer('SGD', model.parameters(), 0.1)
        schedule = build_schedule('linear', optimizer, {'scheduler_step': step_on}, 2, 2)
        loss = build_loss('TripletMarginLoss', None, 5, 4)
        trainer = Trainer(model, loss, [optimizer], schedule=schedule, callbacks=[recorder])
        trainer.fit(loader_of(vector_docs), 2)
        return recorder.rates

    assert learned('batch') == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert learned('epoch') == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_frozen_parameters_stay(tiny_network, vector_docs):
    tiny_network[0].requires_grad_(False)
    before = tiny_network[0].weight.clone()
    optimizers = [
        build_optimizer('AdamW', [p for p in tiny_network.parameters() if p.requires_grad], 0.1)
    ]
    loss = build_loss('TripletMarginLoss', None, 5, 4)
    Trainer(tiny_network, loss, optimizers).fit(loader_of(vector_docs), 1)
    assert torch.equal(before, tiny_network[0].weight)


def test_progress_values(tiny_network, vector_docs):
    told, steps, epochs = [], [], []
    report = ProgressReport(
        told.append, lambda *args: steps.append(args), lambda *args: epochs.append(args)
    )
    trainer_of(tiny_network, [report]).fit(loader_of(vector_docs), 2)
    assert [(t['epoch'], t['batch']) for t in told] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all((t['num_epochs'], t['num_batches']) == (2, 2) for t in told)
    assert all(t['images_per_second'] > 0 for t in told)
    assert told[-1]['seconds_left'] == 0
    assert [step for step, _, _ in steps] == [1, 2, 3, 4]
    assert [epoch for _, epoch, _ in steps] == [0, 0, 1, 1]
    assert steps[0][2] == {'loss': told[0]['loss'], 'learning_rate': 0.01}
    assert [epoch for epoch, _ in epochs] == [0, 1]
    mean = (told[0]['loss'] + told[1]['loss']) / 2
    assert epochs[0][1] == {'train_loss': pytest.approx(mean)}


def test_bar_fields_count_over_all_epochs(tiny_network, vector_docs):
    trainer = trainer_of(tiny_network)
    trainer.fit(loader_of(vector_docs), 1)
    state = trainer.state
    state.epoch, state.num_epochs, state.batch, state.num_batches = 1, 3, 4, 10
    state.seconds_left, state.items_per_second, state.loss = 65.2, 12.34, 0.5
    fields = bar_fields(describe(state))
    assert (fields['completed'], fields['total']) == (15, 30)
    assert (fields['epoch'], fields['left'], fields['loss']) == ('2/3', '1:05', '0.5000')


def test_embed_all_keeps_order_and_mode(tiny_network, vector_docs):
    tiny_network.train()
    whole = Pipeline(None).evaluation_set(build_dataset(vector_docs), 32, 0)
    parts = Pipeline(None).evaluation_set(build_dataset(vector_docs), 5, 0)
    expected = embed_all(tiny_network, whole.loader, 'cpu')
    assert tiny_network.training
    assert expected.dtype == np.float32
    np.testing.assert_allclose(embed_all(tiny_network, parts.loader, 'cpu'), expected, atol=1e-6)
    tiny_network.eval()
    with torch.no_grad():
        direct = tiny_network(torch.from_numpy(vector_docs.tensors)).numpy()
    np.testing.assert_allclose(expected, direct, atol=1e-6)


def test_to_device_keeps_the_shape_of_inputs():
    tensor = torch.ones(2)
    moved = to_device({'a': [tensor, (tensor, 'text')]}, torch.device('cpu'))
    assert moved['a'][1][1] == 'text'
    assert torch.equal(moved['a'][0], tensor)
    assert isinstance(moved['a'][1], tuple)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_without_a_gpu_the_cpu_is_taken(caplog):
    with caplog.at_level('INFO', logger='finetuner'):
        assert resolve_device('cuda') == 'cpu'
    assert 'No GPU' in caplog.text


def test_inputs_of_several_tensors(vector_docs):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, inputs):
            return self.linear(inputs['left'] + inputs['right'])

    def collate(items):
        stacked = torch.stack([torch.from_numpy(item) for item in items])
        return {'left': stacked, 'right': -0.5 * stacked}

    docs = DocumentArray(
        Document(tensor=doc.tensor, tags={'finetuner_label': doc.tags['finetuner_label']})
        for doc in vector_docs
    )
    torch.manual_seed(0)
    model = Two()
    shape = BatchShape(BATCH, ITEMS)
    loader = Pipeline(None, collate).training_loader(build_dataset(docs), shape)
    before = model.linear.weight.detach().clone()
    trainer_of(model).fit(loader, 1)
    assert not torch.equal(before, model.linear.weight.detach())
