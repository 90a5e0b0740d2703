"""A training that was interrupted, at any batch, ends with the same bits as one that was not."""

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.augmentation import build_augmentation
from finetuner.config import OPTIMIZERS, SCHEDULERS
from finetuner.data.loading import build_dataset
from finetuner.excepts import CheckpointError
from finetuner.training.callbacks import (
    BestWeights,
    EvaluationOptions,
    RetrievalEvaluation,
    Stopping,
)
from finetuner.training.checkpointing import SUMMARY, Checkpoints, read_checkpoint
from finetuner.training.losses import build_loss, build_miner
from finetuner.training.objectives import build_objective
from finetuner.training.optimization import build_optimizer, build_schedule
from finetuner.training.setup import BatchShape, Pipeline
from finetuner.training.trainer import BaseCallback, Trainer, seed_everything
from tests.conftest import make_vector_docs
from tests.unit.test_every_loss import CLASS_LOSSES, NEEDED

DIMENSION = 5
EPOCHS = 3


class KilledError(BaseException):
    """Stands for the end of the process."""


class Killer(BaseCallback):
    """Ends training at an event after some step, before the checkpoint that would follow."""

    def __init__(self, step=-1, event='on_train_batch_end'):
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, trainer):
        if trainer.state.step == self.step:
            raise KilledError


class Seen(BaseCallback):
    """Writes down what comes after which step."""

    def __init__(self):
        self.events = []

    def on_epoch_begin(self, trainer):
        self.events.append(('epoch begins', trainer.state.epoch))

    def on_train_batch_end(self, trainer):
        state = trainer.state
        self.events.append((state.epoch, state.batch, state.step, state.loss, state.learning_rate))

    def on_epoch_end(self, trainer):
        self.events.append((trainer.state.epoch, dict(trainer.state.metrics)))

    def on_fit_end(self, trainer):
        self.events.append(('end', trainer.state.weights_epoch))


class Setting:
    """How a training is put together, again and again; as in processes of their own."""

    def __init__(
        self,
        loss='TripletMarginLoss',
        loss_options=None,
        miner=None,
        optimizer='Adam',
        options=None,
        scheduler='cosine',
        scheduler_options=None,
        callbacks=None,
        validation=False,
        read=None,
        docs=None,
        num_workers=0,
        model=None,
        epochs=EPOCHS,
    ):
        self.__dict__.update(locals())
        self.docs = make_vector_docs() if docs is None else docs

    def build_model(self):
        if self.model is not None:
            return self.model()
        return torch.nn.Sequential(
            torch.nn.Linear(6, 16, bias=self.optimizer != 'Muon'),
            torch.nn.BatchNorm1d(16, affine=self.optimizer != 'Muon'),
            torch.nn.Dropout(0.3),
            torch.nn.ReLU(),
            torch.nn.Linear(16, DIMENSION, bias=self.optimizer != 'Muon'),
        )

    def fit(self, directory=None, killer=None, seconds=1e-9, num_workers=None, seed=None):
        """Train in a new trainer; its model, objective and what was seen."""
        seed_everything(0)
        dataset = build_dataset(self.docs)
        workers = self.num_workers if num_workers is None else num_workers
        with Pipeline(self.read, num_workers=workers, seed=0) as pipeline:
            shape = BatchShape(8, 2)
            loader = pipeline.training_loader(dataset, shape)
            val_loader = None
            if self.validation:
                # drawn and augmented anew each time, as unlabelled validation data is
                val_loader = pipeline.training_loader(dataset, BatchShape(4, 2))
            loss = build_loss(self.loss, self.loss_options, DIMENSION, dataset.num_classes)
            objective = build_objective('class', loss, self.miner and build_miner(self.miner, {}))
            model = self.build_model()
            trained = list(model.parameters())
            optimizers = [build_optimizer(self.optimizer, trained, 0.01, self.options)]
            if list(loss.parameters()):
                optimizers.append(build_optimizer('Adam', loss.parameters(), 0.01))
            schedule = build_schedule(
                self.scheduler, optimizers[0], self.scheduler_options, self.epochs, len(loader)
            )
            seen, told = Seen(), []
            callbacks = self.callbacks(pipeline, told) if self.callbacks else []
            trainer = Trainer(
                model, objective, optimizers, schedule, [*callbacks, seen, killer or Killer()]
            )
            # another process's generators stand anywhere
            if directory is not None and (directory / SUMMARY).exists():
                seed_everything(99 if seed is None else seed)
            checkpoints = Checkpoints(directory, seconds) if directory is not None else None
            trainer.fit(loader, self.epochs, val_loader, checkpoints)
        return model, objective, seen.events, told


def bits(module):
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def assert_the_same(found, expected):
    assert bits(found[0]) == bits(expected[0]), 'weights'
    assert bits(found[1]) == bits(expected[1]), 'loss'
    assert found[2] == expected[2][len(expected[2]) - len(found[2]) :], 'events'
    assert found[3] == expected[3], 'reports'


def check(setting, directory, steps, seconds=1e-9, event='on_train_batch_end', num_workers=None):
    """Kill a training once at each of the steps, and go on; compare with one left alone."""
    expected = setting.fit()
    for step in steps:
        with pytest.raises(KilledError):
            setting.fit(directory, Killer(step, event), seconds, num_workers)
    found = setting.fit(directory, Killer(), seconds)
    assert len(found[2]) < len(expected[2]), 'it did not go on but begin again'
    assert_the_same(found, expected)


def test_the_setting_says_something():
    one, again = Setting().fit(), Setting(num_workers=2).fit()
    assert_the_same(one, again)
    assert bits(one[0]) != bits(Setting(optimizer='SGD').fit()[0])
    assert len([event for event in one[2] if len(event) == 5]) == EPOCHS * 4


# killed after every batch: each is trained in a process of its own
STEPS = range(1, EPOCHS * 4 + 1)


@pytest.mark.parametrize(
    'options',
    [
        {'optimizer': 'Adam'},
        {'optimizer': 'SGD', 'options': {'momentum': 0.9, 'nesterov': True}, 'scheduler': None},
        {'loss': 'ProxyAnchorLoss'},
        {
            'loss': 'CrossBatchMemory',
            'loss_options': {
                'loss': 'ContrastiveLoss',
                'memory_size': 20,
                'miner': 'BatchHardMiner',
            },
        },
        {'miner': 'DistanceWeightedMiner', 'validation': True},
        {'scheduler_options': {'scheduler_step': 'epoch'}, 'validation': True},
    ],
    ids=lambda options: '-'.join(str(value) for value in options.values())[:40],
)
def test_killed_after_every_batch(tmp_path, options):
    check(Setting(**options), tmp_path, STEPS)


@pytest.mark.parametrize('step', STEPS)
def test_killed_once_with_checkpoints_after_epochs_alone(tmp_path, step):
    if step <= 4:
        setting = Setting()
        with pytest.raises(KilledError):
            setting.fit(tmp_path, Killer(step), seconds=1e9)
        assert read_checkpoint(tmp_path) is None
        assert_the_same(setting.fit(tmp_path, Killer(), seconds=1e9), setting.fit())
    else:
        check(Setting(), tmp_path, [step], seconds=1e9)


@pytest.mark.parametrize('event', ['on_epoch_end', 'on_train_end', 'on_fit_end'])
@pytest.mark.parametrize('seconds', [1e-9, 1e9])
def test_killed_between_epochs_and_at_the_end(tmp_path, event, seconds):
    steps = [8, 12] if event == 'on_epoch_end' else [12, 12]
    check(Setting(), tmp_path, steps, seconds, event)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_goes_on(tmp_path, name):
    scheduler = SCHEDULERS[OPTIMIZERS.index(name) % len(SCHEDULERS)]
    check(Setting(optimizer=name, scheduler=scheduler), tmp_path, [3, 6])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CLASS_LOSSES)
def test_every_loss_goes_on(tmp_path, name):
    check(Setting(loss=name, loss_options=NEEDED.get(name), epochs=2), tmp_path, [3, 6])


def pictures():
    random = np.random.default_rng(0)
    return DocumentArray(
        Document(
            tensor=random.integers(0, 256, (24, 24, 3), dtype=np.uint8),
            tags={'finetuner_label': label},
        )
        for label in range(4)
        for _ in range(8)
    )


class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16 * 16 * 3, DIMENSION)

    def forward(self, inputs):
        return self.inner(torch.nn.functional.dropout(inputs.float().flatten(1) / 255, 0.1))


@pytest.mark.parametrize('workers', [(0, 0), (2, 2), (0, 2), (2, 0)], ids=str)
def test_strong_augmentation_with_any_number_of_workers(tmp_path, workers):
    augment = build_augmentation('strong', 16)
    setting = Setting(
        docs=pictures(),
        read=lambda doc: augment(doc.tensor),
        model=Flat,
        validation=True,
        num_workers=workers[0],
    )
    check(setting, tmp_path, [2, 5, 7], num_workers=workers[1])


def evaluated(pipeline, told):
    """Evaluation, best weights and early stopping, as a run puts them together."""
    dataset = build_dataset(make_vector_docs(items_per_class=3, seed=5))
    queries = pipeline.evaluation_set(dataset, 4, 0)
    return [
        RetrievalEvaluation(
            'model',
            queries,
            None,
            EvaluationOptions(limit=3, steps_per_interval=3, num_examples=2),
            lambda *values: told.append(values),
            lambda *values: told.append(values),
        ),
        BestWeights('train_loss', 'max'),
        Stopping('recall_at_k', 'auto', 3, 0.9, None),
    ]


@pytest.mark.parametrize('steps', [range(1, 17), [5], [8], [15, 16, 16]], ids=str)
def test_callbacks_go_on(tmp_path, steps):
    setting = Setting(callbacks=evaluated, epochs=9)
    expected = setting.fit()
    # the second epoch's loss is the highest: its weights come back; the fourth epoch is the last
    assert expected[2][-1] == ('end', 1)
    assert len([event for event in expected[2] if len(event) == 5]) == 16
    stages = [stage for stage, _ in expected[3]]
    assert stages == ['before', 'before', 'after', 'after', 'p_value']
    check(setting, tmp_path, steps)


def test_another_training_does_not_go_on_from_it(tmp_path):
    with pytest.raises(KilledError):
        Setting().fit(tmp_path, Killer(5))
    for other, message in [
        (Setting(callbacks=evaluated), 'other callbacks'),
        (Setting(validation=True), 'other validation data'),
        (Setting(model=lambda: torch.nn.Linear(6, DIMENSION)), 'does not fit'),
        (Setting(loss='ProxyAnchorLoss'), 'does not fit'),
    ]:
        with pytest.raises(CheckpointError, match=message):
            other.fit(tmp_path)


def test_a_damaged_checkpoint_is_left_aside(tmp_path, caplog):
    with pytest.raises(KilledError):
        Setting().fit(tmp_path, Killer(5))
    (next(tmp_path.glob('*.pt'))).write_bytes(b'torn')
    found = Setting().fit(tmp_path, Killer(), seed=7)
    assert 'Training begins anew: the checkpoint is damaged' in caplog.text
    assert len(found[2]) == len(Setting().fit()[2])


def test_who_watches_is_told_where_it_begins(tmp_path, monkeypatch):
    told, saved, original = [], [], Checkpoints

    def watched(directory, seconds):
        return original(
            directory, seconds, lambda *place: told.append(place), lambda: saved.append(1)
        )

    monkeypatch.setattr(f'{__name__}.Checkpoints', watched)
    with pytest.raises(KilledError):
        Setting().fit(tmp_path, Killer(6))
    Setting().fit(tmp_path, Killer())
    assert told == [(0, 0), (5, 1)]
    # after each of 12 batches, and of 3 epochs
    assert len(saved) == 15


@pytest.mark.parametrize(('cost', 'num_saves'), [(0.0, EPOCHS), (100.0, 1)])
def test_saving_takes_little_of_the_time(tmp_path, monkeypatch, cost, num_saves):
    """Where it is slow and epochs are short, not every epoch is saved after."""
    saved = []

    class Slow(Checkpoints):
        def save(self, trainer):
            super().save(trainer)
            saved.append(trainer.state.epoch)
            self._cost = cost

    monkeypatch.setattr(f'{__name__}.Checkpoints', Slow)
    Setting().fit(tmp_path, Killer(), seconds=1e9)
    assert saved == list(range(num_saves))


def test_training_goes_on_where_no_checkpoint_can_be_written(tmp_path, caplog):
    (tmp_path / f'.{SUMMARY}').mkdir()  # where a file should be
    found = Setting().fit(tmp_path, Killer())
    assert 'Training goes on without a new checkpoint' in caplog.text
    assert not list(tmp_path.glob('*.pt'))
    assert_the_same(found, Setting().fit())
