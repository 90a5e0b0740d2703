"""Callbacks in processes: all of them in a run, and W&B without its own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

import finetuner
from finetuner.callback import (
    BestModelCheckpoint,
    EarlyStopping,
    EvaluationCallback,
    TensorBoardLogger,
    WandBLogger,
    WiSEFTCallback,
)
from finetuner.console import console
from finetuner.significance import change_text
from tests.conftest import make_picture_docs
from tests.unit.test_loggers import projector, scalars, wandb_records


def test_all_of_them(monkeypatch, finetuner_home):
    monkeypatch.setenv('WANDB_ERROR_REPORTING', 'false')
    # as if this process logged to W&B, too: the run does not depend on that one's helper
    monkeypatch.setenv('WANDB_SERVICE', 'gone')
    run = finetuner.fit(
        'mobilenet_v3_small',
        make_picture_docs(),
        val_split=0.25,
        run_name='all',
        experiment_name='shoes',
        callbacks=[
            TensorBoardLogger(metrics_logger_step='batch'),
            WandBLogger(wandb_args={'mode': 'offline', 'project': 'p'}),
            WiSEFTCallback(alpha=0.5),
            EvaluationCallback(make_picture_docs(seed=1), limit=3),
            BestModelCheckpoint('recall_at_k'),
            EarlyStopping('recall_at_k'),
        ],
        model_options={'input_size': 32, 'weights': 'none'},
        loss='TripletMarginLoss',
        epochs=2,
        batch_size=9,
        num_items_per_class=3,
        num_workers=0,
        device='cpu',
    )
    lines = '\n'.join(run.stream_logs())
    assert run.status()['status'] == 'FINISHED', lines
    assert 'WiSE-FT: the weights are 0.5' in lines
    directory = finetuner_home / 'tensorboard' / 'shoes' / 'all'
    assert f'tensorboard --logdir {directory}' in lines
    metrics = run.metrics()
    assert list(metrics) == ['before', 'after', 'p_value']
    name = 'mobilenet_v3_small_recall_at_k'
    change = change_text(*(metrics[stage][name] for stage in metrics))
    assert f'recall_at_k {change}' in lines
    with console.capture() as shown:
        run.display_metrics()
    assert change in shown.get()
    found = scalars(directory)
    assert set(found['recall_at_k']) == {0, 1, 2}
    assert found['final/recall_at_k'] == pytest.approx({2: metrics['after'][name]})
    assert projector(directory)[2].shape == (320, 320, 3)
    described, rows = wandb_records(finetuner_home / 'wandb')
    assert (described.project, described.display_name) == ('p', 'all')
    assert [row['epoch'] for row in rows] == [0, 1, 2, 2]
    card = finetuner_home / 'artifacts' / run.artifact_id / 'README.md'
    assert '| metric | before | after | change |' in card.read_text()
    manifest = json.loads(card.with_name('artifact.json').read_text())
    assert manifest['metrics']['p_value'] == metrics['p_value']


def test_a_lost_process_does_not_end_training(tmp_path):
    code = """
        import logging, sys, psutil, torch
        import finetuner
        from finetuner.callback import WandBLogger
        from finetuner.training.trainer import BaseCallback
        from tests.conftest import make_vector_docs

        class Killer(BaseCallback):
            def on_epoch_end(self, trainer):
                if trainer.state.epoch == 1:
                    found = [p for p in psutil.Process().children() if 'wandb' in p.name()]
                    for process in found:
                        process.kill()
                        process.wait()
                    print('killed', len(found))

        logging.basicConfig(level=logging.WARNING)
        model = torch.nn.Linear(6, 4)
        logger = WandBLogger('batch', {'mode': 'offline', 'dir': sys.argv[1]})
        finetuner.fit(model, make_vector_docs(), epochs=6, callbacks=[Killer(), logger])
        print('trained')
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), str(tmp_path)],
        cwd=root, capture_output=True, text=True, timeout=120,
        # or it would log to the process of this one
        env={name: value for name, value in os.environ.items() if name != 'WANDB_SERVICE'},
    )  # fmt: skip
    assert 'killed 1' in done.stdout
    assert 'trained' in done.stdout
    assert done.stderr.count('Weights & Biases does not take the values') == 1
