"""Whether a change is more than chance: against scipy, and against all permutations by hand."""

import itertools
import logging
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from finetuner.console import console, print_changes
from finetuner.data.loading import build_dataset
from finetuner.evaluation import METRICS, evaluate_embeddings, evaluate_queries
from finetuner.model_spec import TrainingRecord, model_card
from finetuner.significance import change_text, p_value_text, paired_p_values
from finetuner.training.callbacks import EvaluationOptions, RetrievalEvaluation
from finetuner.training.setup import Pipeline
from finetuner.training.trainer import Trainer
from tests.conftest import make_vector_docs
from tests.unit.tiny_artifacts import make_spec


def p_of(before, after):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return paired_p_values({'m': before}, {'m': after})['m']


def randomisation_p(before, after):
    """The exact test: each query's before and after swapped or not, in every combination."""
    differences = np.subtract(after, before)
    seen = abs(differences.mean())
    signs = itertools.product([1, -1], repeat=len(differences))
    return np.mean([abs((differences * sign).mean()) >= seen - 1e-12 for sign in signs])


@pytest.mark.parametrize('gain', [0.0, 0.02, 0.1])
def test_p_values_are_those_of_scipy(gain):
    random = np.random.default_rng(3)
    before = random.integers(0, 4, 60) / 3
    after = np.clip(before + random.normal(gain, 0.2, 60), 0, 1)
    assert p_of(torch.tensor(before), torch.tensor(after)) == ttest_rel(before, after).pvalue
    assert p_of(before, after) == p_of(after, before) == p_of(before, after)


def test_p_values_agree_with_the_exact_randomisation_test():
    random = np.random.default_rng(5)
    for gain in (0.0, 0.1, 0.3):
        before = random.random(12)
        after = before + random.normal(gain, 0.2, 12)
        assert p_of(before, after) == pytest.approx(randomisation_p(before, after), abs=0.02)


@pytest.mark.parametrize(
    ('before', 'after', 'expected'),
    [
        ([0.3, 1.0, 0.0], [0.3, 1.0, 0.0], 1.0),
        ([0.3], [0.9], 1.0),
        ([0.3], [0.3], 1.0),
        ([0.0, 0.0], [1.0, 1.0], 0.5),
        ([0.0] * 5, [1.0] * 5, 2**-4),
        ([0.1, 0.7, 0.4], [0.2, 0.8, 0.5], 0.25),
    ],
)
def test_where_t_is_not_defined(before, after, expected):
    assert p_of(np.array(before), np.array(after)) == expected
    assert expected == randomisation_p(before, after)


def test_it_is_never_nan_with_many_queries():
    assert p_of(np.zeros(5000), np.ones(5000)) == 0
    assert not math.isnan(p_of(np.zeros(5000), np.eye(1, 5000)[0]))


def test_it_leaves_nothing_in_the_home(tmp_path):
    code = (
        'import os, numpy as np; from finetuner.significance import paired_p_values; '
        'print(paired_p_values({"m": np.array([0, 1, 1, 0.])}, {"m": np.array([1, 1, 1, 0.])})); '
        'print(os.environ.get("IR_DATASETS_HOME"))'
    )
    environment = {**os.environ, 'HOME': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "{'m': 0.3910022189557705}\nNone\n", done.stderr
    assert not (tmp_path / '.ir_datasets').exists()


def test_other_queries_cannot_be_compared():
    with pytest.raises(ValueError, match=r'm: \(2,\) before and \(3,\) after'):
        p_of(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize(
    ('p_value', 'text'), [(0.0, 'p < 0.001'), (0.00099, 'p < 0.001'), (0.0421, 'p = 0.042'),
                          (0.001, 'p = 0.001'), (1.0, 'p = 1.000')]
)  # fmt: skip
def test_words(p_value, text):
    assert p_value_text(p_value) == text
    assert change_text(0.5349, 0.741, p_value) == f'0.535 -> 0.741 ({text})'


def test_values_of_queries_average_to_the_metrics():
    random = np.random.default_rng(0)
    embeddings, labels = random.normal(size=(30, 4)), list(range(10)) * 3
    values = evaluate_queries(embeddings, labels, limit=5)
    assert list(values) == list(METRICS)
    assert all(value.shape == (30,) and value.dtype == torch.float64 for value in values.values())
    means = evaluate_embeddings(embeddings, labels, limit=5)
    assert means == {name: value.mean().item() for name, value in values.items()}
    # of one query alone: what it finds among the others
    alone = evaluate_embeddings(
        embeddings[4:5], [4], np.delete(embeddings, 4, 0), labels[:4] + labels[5:], limit=5,
    )  # fmt: skip
    assert alone == pytest.approx({name: value[4].item() for name, value in values.items()})


def evaluated(model, change):
    """Reports of an evaluation around something that changes the model."""
    sets = Pipeline(None).evaluation_set(build_dataset(make_vector_docs()), 8, 0)
    reports = {}
    evaluation = RetrievalEvaluation(
        'tiny', sets, None, EvaluationOptions(limit=3),
        lambda stage, values: reports.setdefault(stage, {}).update(values), lambda *_: None,
    )  # fmt: skip
    trainer = Trainer(model, torch.nn.Identity(), [torch.optim.SGD(model.parameters(), lr=0.1)])
    evaluation.on_fit_begin(trainer)
    again = RetrievalEvaluation(
        'tiny', sets, None, EvaluationOptions(limit=3),
        lambda stage, values: reports.setdefault(f'again {stage}', {}).update(values),
        lambda *_: None,
    )  # fmt: skip
    again.load_state_dict(evaluation.state_dict())
    change(model)
    trainer.state.weights_revision += 1
    evaluation.on_fit_end(trainer)
    again.on_fit_end(trainer)
    return reports


def test_an_evaluation_reports_p_values(tiny_network, caplog):
    def spoil(model):
        model[3].weight.data.zero_()  # all embeddings become equal

    with caplog.at_level(logging.INFO, 'finetuner'):
        reports = evaluated(tiny_network, spoil)
    assert set(reports['p_value']) == {f'tiny_{name}' for name in METRICS}
    assert all(0 <= value < 0.05 for value in reports['p_value'].values())
    name = 'tiny_recall_at_k'
    assert reports['before'][name] != reports['after'][name]
    shown = change_text(*(reports[stage][name] for stage in ('before', 'after', 'p_value')))
    assert f'recall_at_k {shown}' in caplog.text
    # what was found before training survives an interruption
    assert reports['again p_value'] == reports['p_value']


def test_without_a_change_p_is_one(tiny_network):
    reports = evaluated(tiny_network, lambda model: None)
    assert reports['before'] == reports['after']
    assert set(reports['p_value'].values()) == {1.0}


def test_changes_are_printed_and_on_the_card():
    metrics = {
        'before': {'m_recall': 0.5349, 'other': 0.5},
        'after': {'m_recall': 0.741, 'other': 0.5},
        'p_value': {'m_recall': 1e-9},
    }
    with console.capture() as shown:
        print_changes(*metrics.values())
    assert '0.535 -> 0.741 (p < 0.001)' in shown.get()
    assert 'other' not in shown.get()
    card = model_card(make_spec(), TrainingRecord(metrics=metrics))
    assert '| metric | before | after | change |\n|---|---|---|---|\n' in card
    assert '| m_recall | 0.5349 | 0.7410 | p < 0.001 |\n| other | 0.5000 | 0.5000 |  |' in card
    assert 'nan' not in card
