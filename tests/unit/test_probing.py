"""Choices at the start of a run: what fits in memory, how many processes load, what is remembered."""

import copy
import json
import logging

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.config import Settings
from finetuner.models.tailor import build_embedding_model
from finetuner.runs import probing, worker
from finetuner.runs.feeding import build_feed
from finetuner.runs.findings import FindingsFile, NoFindings
from finetuner.runs.followers import Followers
from finetuner.runs.plan import make_plan
from finetuner.runs.probing import probe_run
from finetuner.training import step_cost
from tests.conftest import make_picture_docs
from tests.unit import test_runner, test_text_training
from tests.unit.tiny_encoder import write_tiny_encoder


class Known:
    """Knows what a step costs, as if it had been measured."""

    def __init__(self, item_seconds, item_bytes=1.0):
        self.values = {'item_seconds': item_seconds, 'item_bytes': item_bytes}

    def recall(self, key):
        return self.values

    def remember(self, key, values):
        raise AssertionError('what is known is not measured')


def prepared(docs=None, findings=None, frozen_norm=True, **parameters):
    config = test_runner.config(**parameters)
    plan = make_plan(config, {'train_data': make_picture_docs() if docs is None else docs})
    model = build_embedding_model(plan.backbone, config.model_options, config.output_dim)
    feed = build_feed(plan, model, 'cpu', frozen_norm)
    return probe_run(plan, feed, 'cpu', frozen_norm, findings or NoFindings())


def test_a_batch_that_fits_stays_whole(caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        plan, _ = prepared()
    assert plan.config.micro_batch_size is None
    assert 'Batches of 12 fit in memory' in caplog.text


def test_a_batch_that_does_not_fit_goes_in_parts(caplog, monkeypatch):
    monkeypatch.setattr(step_cost, 'items_in_memory', lambda model, item_bytes: 7)
    with caplog.at_level(logging.INFO, logger='finetuner'):
        plan, _ = prepared()
    assert plan.config.micro_batch_size == 4
    assert plan.batch.size == plan.config.batch_size == 12
    assert 'they go through the model 4 at a time' in caplog.text
    plan, _ = prepared(micro_batch_size=6)
    assert plan.config.micro_batch_size == 6


@pytest.mark.parametrize(
    ('parameters', 'reason'),
    [
        ({'frozen_norm': False}, 'batch normalisation takes the statistics of a whole one'),
        ({'optimizer': 'LBFGS'}, 'LBFGS computes the loss several times a step'),
    ],
)
def test_a_batch_that_cannot_go_in_parts_stays_whole(caplog, monkeypatch, parameters, reason):
    """The step would refuse parts, which the user has not asked for."""
    monkeypatch.setattr(step_cost, 'items_in_memory', lambda model, item_bytes: 7)
    plan, _ = prepared(**parameters)
    assert plan.config.micro_batch_size is None
    assert reason in caplog.text


def test_what_was_measured_is_remembered(monkeypatch, tmp_path):
    findings = FindingsFile(tmp_path / 'measured.json')
    prepared(findings=findings)
    found = json.loads((tmp_path / 'measured.json').read_text())
    (key,) = found
    assert key.startswith('mobilenet_v3_small; inputs 32 x 32 x 3; ')
    assert found[key]['item_bytes'] > 1e5
    # nothing is measured again, but for another size, or where other weights are trained
    measured = []
    measure = step_cost.measure_step
    monkeypatch.setattr(
        step_cost, 'measure_step', lambda *args: measured.append(0) or measure(*args)
    )
    prepared(findings=findings)
    assert not measured
    prepared(findings=findings, model_options={'weights': 'none', 'input_size': 64})
    prepared(findings=findings, output_dim=8)
    prepared(findings=findings, output_dim=8)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ('item_seconds', 'asked', 'chosen'), [(100.0, 2, 0), (1e-9, 2, 2), (1e-9, 0, 0)]
)
def test_processes_load_where_one_cannot_keep_up(caplog, item_seconds, asked, chosen):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        _, feed = prepared(findings=Known(item_seconds), num_workers=asked)
    assert feed.pipeline.num_workers == chosen
    assert (f'Loading: {chosen} processes; one alone loads ' in caplog.text) == bool(asked)


def test_what_is_kept_in_memory_is_read_once(monkeypatch):
    trial = probing._Trial([np.zeros(1)] * 2, read_seconds=1.0, vary_seconds=0.0)
    monkeypatch.setattr(probing, '_read_some', lambda plan, feed: trial)
    monkeypatch.setattr(probing, '_batch', lambda plan, feed, contents: np.zeros(1))
    monkeypatch.setattr(probing, '_step', lambda *args: {'item_seconds': 10.0, 'item_bytes': 1})
    monkeypatch.setattr('finetuner.training.step.to_device', lambda inputs, device: inputs)
    # a tenth of the step when it is read in each epoch, a fiftieth when in one of five
    assert prepared(epochs=1, num_workers=2)[1].pipeline.num_workers == 2
    assert prepared(epochs=5, num_workers=2)[1].pipeline.num_workers == 0


def test_augmentation_counts_in_each_epoch():
    plan, feed = prepared(findings=Known(1.0), augmentation='strong', num_workers=1)
    trial = probing._read_some(plan, feed)
    assert trial.vary_seconds > 0
    assert probing._read_some(*prepared(findings=Known(1.0))).vary_seconds == 0


def test_texts_are_tried_at_their_longest(tmp_path):
    encoder = write_tiny_encoder(tmp_path / 'encoder')
    docs = copy.deepcopy(test_text_training.labelled())
    docs += DocumentArray([Document(text='red ' * 20, tags={'finetuner_label': 'shoe'})])
    config = test_text_training.config(encoder)
    plan = make_plan(config, {'train_data': docs})
    model = build_embedding_model(plan.backbone, {}, None)
    feed = build_feed(plan, model, 'cpu', True)
    trial = probing._read_some(plan, feed)
    assert len(trial.contents[0]) == 22
    inputs = probing._batch(plan, feed, trial.contents)
    assert inputs['input_ids'].shape == inputs['attention_mask'].shape == (8, 32)
    findings = FindingsFile(tmp_path / 'measured.json')
    probe_run(plan, feed, 'cpu', True, findings)
    assert 'inputs 32;' in next(iter(json.loads((tmp_path / 'measured.json').read_text())))


def test_broken_data_is_left_to_loading():
    docs = make_picture_docs()
    for doc in docs[1:]:
        doc.blob = b'gone'
    plan, feed = prepared(docs, num_workers=2)
    assert plan.config.micro_batch_size is None
    assert feed.pipeline.num_workers == 2


def test_a_run_chooses_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        test_runner.execute(tmp_path / 'a', epochs=1, num_workers=1)
    assert 'Batches of 12 fit in memory' in caplog.text
    assert 'Loading: ' in caplog.text


def test_findings_survive_damage_and_stay_out_of_the_way(tmp_path, caplog):
    path = tmp_path / 'measured.json'
    findings = FindingsFile(path)
    assert findings.recall('a') is None
    findings.remember('a', {'x': 1.5})
    findings.remember('b', {'y': 2})
    assert FindingsFile(path).recall('a') == {'x': 1.5}
    assert [file.name for file in tmp_path.iterdir()] == ['measured.json']
    for damage in ('{"a": {"x": 1', '[]', '{"a": 3}', '{"a": {"x": "1"}}', '\x00'):
        path.write_text(damage)
        assert findings.recall('a') is None
        findings.remember('c', {'z': 3})
        assert findings.recall('c') == {'z': 3}
    with caplog.at_level(logging.INFO, logger='finetuner'):
        FindingsFile(tmp_path / 'absent' / 'measured.json').remember('a', {'x': 1})
    assert 'is not remembered' in caplog.text


def test_workers_remember_in_the_home(finetuner_home):
    settings = Settings.from_environment()
    execute = worker._runner(settings, Followers(settings, 1))
    findings = execute.keywords['findings']
    findings.remember('a', {'x': 1})
    assert json.loads((finetuner_home / 'measured.json').read_text()) == {'a': {'x': 1}}
