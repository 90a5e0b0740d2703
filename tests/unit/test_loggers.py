"""What loggers write, read back with the readers of those who show it."""

import json
import logging
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from docarray import Document, DocumentArray
from PIL import Image

import finetuner
from finetuner.callback import EvaluationCallback, TensorBoardLogger, WandBLogger
from finetuner.evaluation import METRICS
from finetuner.excepts import ConfigError
from finetuner.images import picture_of
from finetuner.training.callback_descriptions import parse_callback, prepare_callbacks
from finetuner.training.trainer import BaseCallback
from tests.conftest import make_picture_docs, make_vector_docs
from tests.unit.test_runner import EVALUATION, execute


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch, tmp_path):
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'WANDB_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_ERROR_REPORTING', 'false')
    monkeypatch.setenv('NETRC', str(tmp_path / 'no-netrc'))


class Seen(BaseCallback):
    """Remembers what there was to log."""

    def __init__(self):
        self.epochs, self.batches = [], []

    def on_train_batch_end(self, trainer):
        self.batches.append((trainer.state.loss, trainer.state.learning_rate))

    def on_epoch_end(self, trainer):
        self.epochs.append({**trainer.state.metrics, 'learning_rate': trainer.state.learning_rate})


def fit(model, *callbacks, **options):
    docs = make_vector_docs()
    options = {'epochs': 2, 'batch_size': 16, 'num_items_per_class': 4, **options}
    return finetuner.fit(
        model, docs, make_vector_docs(seed=2), callbacks=list(callbacks), **options
    )


def wandb_records(directory):
    """What the one offline run in a directory holds: its description, and rows of values."""
    (path,) = directory.glob('wandb/offline-run-*/*.wandb')
    until = time.monotonic() + 20
    # another process writes it, and the last record a moment after the run has ended
    while 'exit' not in (kinds := read_wandb(path)) and time.monotonic() < until:
        time.sleep(0.1)
    assert 'exit' in kinds
    rows = [
        {item.key or '.'.join(item.nested_key): json.loads(item.value_json) for item in each.item}
        for each in kinds['history']
    ]
    return kinds['run'][0], [{n: value for n, value in row.items() if n[0] != '_'} for row in rows]


def read_wandb(path):
    """The records of a file by their kind, as far as they are whole."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    kinds: dict[str, list] = {}
    store = DataStore()
    store.open_for_scan(str(path))
    while True:
        try:
            data = store.scan_data()
        except AssertionError:  # wandb's own, of a record that is being written
            return kinds
        if data is None:
            return kinds
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof('record_type')
        kinds.setdefault(kind, []).append(getattr(record, kind))


def test_wandb_has_the_values_of_epochs_and_batches(tiny_network, tmp_path):
    seen = Seen()
    arguments = {'mode': 'offline', 'dir': str(tmp_path), 'project': 'shoes', 'name': 'first'}
    logger = WandBLogger('batch', arguments)
    # named first, and yet it has what the evaluation measures
    fit(tiny_network, logger, EvaluationCallback(make_vector_docs(seed=1), limit=3), seen)
    run, rows = wandb_records(tmp_path)
    assert (run.project, run.display_name) == ('shoes', 'first')
    by_epoch = {row['epoch']: row for row in rows if 'train_loss' in row}
    assert list(by_epoch) == [1, 2]
    for epoch, values in enumerate(seen.epochs, start=1):
        assert {'train_loss', 'val_loss', 'learning_rate', *METRICS} == set(values)
        assert by_epoch[epoch] == pytest.approx({**values, 'epoch': epoch})
    batches = [row for row in rows if 'step' in row]
    assert [row['step'] for row in batches] == [1, 2, 3, 4]
    found = [(row['batch/loss'], row['batch/learning_rate']) for row in batches]
    np.testing.assert_allclose(found, seen.batches)
    assert rows[0]['epoch'] == 0
    assert set(rows[0]) == {'epoch', *METRICS}
    assert rows[-1]['final/recall_at_k'] == pytest.approx(seen.epochs[-1]['recall_at_k'])


def test_wandb_of_a_run_bears_its_name_and_config(tmp_path, finetuner_home):
    options = {'wandb_args': {'mode': 'offline'}, 'log_zero_shot': False}
    logger = {'name': 'WandBLogger', 'options': options}
    execute(
        tmp_path / 'artifact', callbacks=[EVALUATION, logger], output_dim=8, epochs=1,
        run_name='a/b', experiment_name='shoes',
    )  # fmt: skip
    run, rows = wandb_records(finetuner_home / 'wandb')
    assert (run.display_name, run.run_group) == ('a/b', 'shoes')
    assert {item.key: json.loads(item.value_json) for item in run.config.update}['output_dim'] == 8
    assert [row['epoch'] for row in rows] == [1, 1]
    assert 0 < rows[0]['learning_rate'] <= 1e-3


def test_without_a_key_training_goes_on_with_one_warning(tiny_network, tmp_path, caplog):
    before = tiny_network[0].weight.detach().clone()
    fit(tiny_network, WandBLogger('batch', {'dir': str(tmp_path), 'mode': 'online'}))
    assert not torch.equal(before, tiny_network[0].weight)
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert 'Weights & Biases does not take the values' in warning.message
    assert 'API key' in warning.message


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'wandb_args': {'projct': 'x'}}, "'projct': did you mean 'project'"),
        ({'wandb_args': {'mode': 'ofline'}}, "'ofline' is not one of online, offline"),
        ({'wandb_args': ['project']}, 'not a mapping'),
        ({'wandb_args': {'config': {'a': object()}}}, 'plain JSON values'),
        ({'wandb_args': {'config': {'a': float('nan')}}}, 'plain JSON values'),
        ({'wandb_args': {'settings': {'api_key': 'secret'}}}, 'WANDB_API_KEY'),
        ({'metrics_logger_step': 'step'}, "'step' is not one of epoch, batch"),
        ({'log_zero_shot': 1}, 'not True or False'),
    ],
)
def test_wrong_options_of_wandb(options, message):
    with pytest.raises(ConfigError, match=message):
        prepare_callbacks([parse_callback('WandBLogger', options, {})], False)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'max_embeddings': 20_000}, 'up to 10,000'),
        ({'max_embeddings': 0}, 'max_embeddings'),
        ({'log_dir': 5}, 'log_dir: 5 is not a path'),
        ({'log_embeddings': 'yes'}, 'not True or False'),
        ({'metrics_logger_step': 'epochs'}, 'is not one of epoch, batch'),
    ],
)
def test_wrong_options_of_tensorboard(options, message):
    with pytest.raises(ConfigError, match=message):
        prepare_callbacks([parse_callback('TensorBoardLogger', options, {})], False)


@pytest.mark.parametrize('logger', [WandBLogger(), TensorBoardLogger()])
def test_what_is_not_installed_is_named(logger, monkeypatch):
    package = 'wandb' if isinstance(logger, WandBLogger) else 'tensorboard'
    prepare_callbacks([logger], False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'pip install finetuner\[{package}\]'):
        prepare_callbacks([logger], False)


def scalars(directory):
    """By name: steps and values, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory)).Reload()
    return {
        name: {event.step: event.value for event in found.Scalars(name)}
        for name in found.Tags()['scalars']
    }


def projector(directory):
    """Vectors, rows of metadata with their header, and the sprite of the one projection."""
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    text = (directory / 'projector_config.pbtxt').read_text()
    (shown,) = text_format.Parse(text, ProjectorConfig()).embeddings
    vectors = np.loadtxt(directory / shown.tensor_path, delimiter='\t', ndmin=2)
    lines = (directory / shown.metadata_path).read_text().splitlines()
    sprite = None
    if shown.sprite.image_path:
        sprite = np.asarray(Image.open(directory / shown.sprite.image_path))
        assert list(shown.sprite.single_image_dim) == [64, 64]
    return vectors, [line.split('\t') for line in lines], sprite


def test_tensorboard_has_the_values_and_the_embeddings(tiny_network, tmp_path):
    seen = Seen()
    queries, index = make_vector_docs(seed=1)[::4], make_vector_docs(seed=1)[1::4]
    evaluation = EvaluationCallback(queries, index, limit=3)
    fit(tiny_network, TensorBoardLogger(tmp_path / 'logs', 'batch'), evaluation, seen)
    found = scalars(tmp_path / 'logs')
    for name in ('train_loss', 'val_loss', 'learning_rate', *METRICS):
        of_epochs = {step: value for step, value in found[name].items() if step}
        expected = {epoch: values[name] for epoch, values in enumerate(seen.epochs, start=1)}
        assert of_epochs == pytest.approx(expected), name
        assert (0 in found[name]) == (name in METRICS)
        assert (f'final/{name}' in found) == (name in METRICS)
    losses = dict(enumerate((loss for loss, _ in seen.batches), start=1))
    assert found['batch/loss'] == pytest.approx(losses)
    vectors, rows, sprite = projector(tmp_path / 'logs')
    docs = DocumentArray([*queries, *index])
    inputs = torch.from_numpy(np.stack([doc.tensor for doc in docs]))
    with torch.inference_mode():
        np.testing.assert_allclose(vectors, tiny_network(inputs).numpy(), rtol=1e-4, atol=1e-5)
    assert rows[0] == ['label', 'side', 'name']
    assert [row[0] for row in rows[1:]] == [str(int(d.tags['finetuner_label'])) for d in docs]
    assert [row[1] for row in rows[1:]] == ['query'] * 8 + ['index'] * 8
    # vectors are no pictures
    assert sprite is None


def test_a_run_has_thumbnails_and_a_place_of_its_own(tmp_path, finetuner_home, caplog):
    queries = make_picture_docs(seed=1)
    logger = {'name': 'TensorBoardLogger', 'options': {'max_embeddings': 10.0}}
    with caplog.at_level(logging.INFO, 'finetuner'):
        execute(
            tmp_path / 'artifact', callbacks=[EVALUATION, logger], output_dim=8, epochs=1,
            run_name='../up', experiment_name='shoes',
        )  # fmt: skip
    directory = finetuner_home / 'tensorboard' / 'shoes' / '_up'
    assert f'tensorboard --logdir {directory}' in caplog.text
    assert 1 in scalars(directory)['recall_at_k']
    vectors, rows, sprite = projector(directory)
    assert vectors.shape == (10, 8)
    assert len(rows) == 11
    # ten pictures stand in rows of four
    assert sprite.shape == (256, 256, 3)
    thumbnails = [picture_of(doc, 64) for doc in queries]
    for place, (_, _, name) in enumerate(rows[1:]):
        shown = next(n for n, doc in enumerate(queries) if f'({doc.id})' in name)
        top, left = 64 * (place // 4), 64 * (place % 4)
        tile = sprite[top : top + 64, left : left + 64].astype(int)
        assert abs(tile - thumbnails[shown]).max() <= 1
    assert not sprite[192:].any()


def test_texts_have_labels_and_no_thumbnails(tmp_path):
    words = ['ash\ttree', 'oak\ntree', 'red', 'blue']
    docs = DocumentArray(
        Document(text=f'{word} {n}', tags={'finetuner_label': word[:3]})
        for word in words
        for n in range(4)
    )
    model = torch.nn.Linear(3, 2)
    finetuner.fit(
        model, docs, epochs=1, batch_size=8, num_items_per_class=2,
        preprocess_fn=lambda doc: np.array([len(doc.text), ord(doc.text[0]), 1], np.float32),
        callbacks=[TensorBoardLogger(str(tmp_path))],
    )  # fmt: skip
    vectors, rows, sprite = projector(tmp_path)
    assert (vectors.shape, sprite) == ((16, 2), None)
    assert rows[1] == ['ash', 'train', 'ash tree 0']
    assert rows[5] == ['oak', 'train', 'oak tree 0']


def test_unlabelled_data_and_sessions_can_be_projected(tiny_network, tmp_path):
    unlabelled = DocumentArray(Document(tensor=doc.tensor) for doc in make_vector_docs())
    sessions = DocumentArray()
    for root in unlabelled[:8]:
        session = Document(tensor=root.tensor)
        for relation, match in zip((1, -1), unlabelled[8:10], strict=True):
            session.matches.append(
                Document(tensor=match.tensor, tags={'finetuner_label': relation})
            )
        sessions.append(session)
    for name, docs, expected in (('u', unlabelled, 20), ('s', sessions, 18)):
        logger = TensorBoardLogger(tmp_path / name, max_embeddings=20)
        finetuner.fit(tiny_network, docs, epochs=1, batch_size=8, callbacks=[logger])
        vectors, rows, _ = projector(tmp_path / name)
        assert (vectors.shape, len(rows)) == ((expected, 5), expected + 1), name


def test_a_place_that_cannot_be_written_does_not_end_training(tiny_network, tmp_path, caplog):
    (tmp_path / 'file').touch()
    fit(tiny_network, TensorBoardLogger(tmp_path / 'file' / 'below', 'batch'))
    (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert 'TensorBoard does not take the values' in warning.message


def test_nothing_stays_open_when_training_fails(tiny_network, tmp_path):
    class Failing(BaseCallback):
        def on_epoch_end(self, trainer):
            if trainer.state.epoch == 1:
                raise RuntimeError('stop')

    arguments = {'mode': 'offline', 'dir': str(tmp_path)}
    loggers = TensorBoardLogger(tmp_path / 'board'), WandBLogger(wandb_args=arguments)
    with pytest.raises(RuntimeError, match='stop'):
        fit(tiny_network, Failing(), *loggers)
    assert list(scalars(tmp_path / 'board')['train_loss']) == [1]
    assert [row['epoch'] for row in wandb_records(tmp_path)[1]] == [1]
    opened = [file.path for file in psutil.Process().open_files()]
    assert not [path for path in opened if str(tmp_path) in path]
