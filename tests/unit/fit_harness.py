"""Runs of `fit` from its arguments to its artifact, in this process, and all that is seen of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.artifact import Artifact, load_artifact
from finetuner.client import get_client
from finetuner.columns import dataset
from finetuner.config import Settings
from finetuner.excepts import RunFailedError
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import get_backbone
from finetuner.run import Run
from finetuner.runs import processes, runner, worker
from finetuner.runs.followers import Followers
from finetuner.training.trainer import Trainer
from tests.conftest import make_picture_docs
from tests.unit.tiny_encoder import write_tiny_encoder

RATE = 1e-3
COLOURS, THINGS = ('red', 'green', 'blue'), ('shoe', 'hat', 'coat')
TEXTS = [f'{size} {c} {thing}' for thing in THINGS for c in COLOURS for size in ('small', 'large')]


@dataclass
class Training:
    """What was seen of a training loop.

    Attributes:
        trainer: that ran it.
        before: weights it began with.
        loss_before: weights of the loss it began with.
        batches: of training, (inputs, labels) as the model got them.
        children: most processes started by this one that lived while it trained.
    """

    trainer: Trainer
    before: dict[str, torch.Tensor]
    loss_before: list[torch.Tensor]
    batches: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    children: int = 0

    @property
    def loss_after(self) -> list[torch.Tensor]:
        """Weights of the loss it ended with."""
        return copies(self.trainer._objective.parameters())

    @property
    def labels(self) -> list[list[int]]:
        """Labels of each batch."""
        return [labels.tolist() for _, labels in self.batches]


@dataclass
class Ran:
    """What a run left behind."""

    run: Run
    training: Training
    artifact: Artifact
    logs: str
    steps: list[dict[str, float]]
    epochs: list[dict[str, float]]

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the artifact."""
        return json.loads((self.artifact.directory / 'artifact.json').read_text())

    @property
    def after(self) -> dict[str, torch.Tensor]:
        """Weights of the artifact."""
        return self.artifact.build_model().state_dict()

    @property
    def rates(self) -> list[float]:
        """Learning rate of each step."""
        return [step['learning_rate'] for step in self.steps]

    @property
    def moves(self) -> dict[str, float]:
        """How far each of the weights went, at most."""
        before = self.training.before
        return {n: float((t - before[n]).abs().max()) for n, t in self.after.items() if t.numel()}

    @property
    def moved(self) -> set[str]:
        """Names of the weights that are others now."""
        return {name for name, distance in self.moves.items() if distance > 0}


class _Seen:
    """A loader that remembers what it yields."""

    def __init__(self, loader: Any, training: Training) -> None:
        self._loader, self._training = loader, training
        # such as a server of forks that another test of this process has started
        self._others = set(psutil.Process().children())

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Any:
        for batch in self._loader:
            self._training.batches.append(batch)
            children = set(psutil.Process().children()) - self._others
            living = sum(child.status() != psutil.STATUS_ZOMBIE for child in children)
            self._training.children = max(self._training.children, living)
            yield batch


def copies(tensors: Any) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def watched() -> Any:
    """Within this block every training loop is written down; gives the list of them."""
    seen: list[Training] = []
    fit = Trainer.fit

    def recorded(self: Trainer, train_loader: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.model.state_dict()
        before = dict(zip(state, copies(state.values()), strict=True))
        training = Training(self, before, copies(self._objective.parameters()))
        seen.append(training)
        return fit(self, _Seen(train_loader, training), *args, **kwargs)

    watch = patch.object(Trainer, 'fit', recorded)
    watch.seen = seen  # type: ignore[attr-defined]
    return watch


class _Heard:
    """An observer that passes on what it hears and keeps the values of steps and epochs."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def step_metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        self.steps.append(values)
        self._recorder.step_metrics(step, epoch, values)

    def epoch_metrics(self, epoch: int, values: dict[str, float]) -> None:
        self.epochs.append(values)
        self._recorder.epoch_metrics(epoch, values)


def submit(**parameters: Any) -> Run:
    """`fit` with a worker that does nothing: the run is there and has not begun."""
    given = {'epochs': 1, 'device': 'cpu', 'num_workers': 0, 'learning_rate': RATE}
    given |= {
        'scheduler': 'constant',
        'loss': 'TripletMarginLoss',
        'batch_size': 18,
        'num_items_per_class': 6,
    }
    given = {name: value for name, value in {**given, **parameters}.items() if value != 'left out'}
    with patch.object(processes, 'WORKER_COMMAND', ('true',)):
        return finetuner.fit(**given)


def fit(**parameters: Any) -> Ran:
    """A run from its arguments to its artifact, in this process.

    Args:
        **parameters: of `fit_backbone`; quick ones stand in for those not given, 'left out' for
            their own default.

    Raises:
        RunFailedError: it failed.
    """
    run = submit(**parameters)
    heard: list[_Heard] = []

    settings = Settings.from_environment()
    client: Any = get_client()
    number = client._workspace.runs.get_run(run.experiment_name, run.name).id
    execute_as_worker: Any = worker._runner(settings, Followers(settings, number))

    def execute(config: Any, load_data: Any, directory: Path, recorder: Any, files: Path) -> None:
        heard.append(_Heard(recorder))
        execute_as_worker(config, load_data, directory, heard[0], files)

    wholes: list[dict[str, torch.Tensor]] = []
    build_model = runner._build_model

    def build(plan: Any) -> Any:
        # where the frozen part is computed ahead, the training loop sees the rest alone
        model = build_model(plan)
        state = model.state_dict()
        wholes.append(dict(zip(state, copies(state.values()), strict=True)))
        return model

    with patch.object(runner, '_build_model', build), (watch := watched()):
        finished = worker.run_worker(number, settings, execute)
    if not finished:
        raise RunFailedError(f'{run.status()["details"]}')
    artifact = load_artifact(client.find_artifact(run.artifact_id))
    # later tests have homes of their own
    logging.getLogger('finetuner').setLevel(logging.NOTSET)
    training = replace(watch.seen[0], before=wholes[0])
    return Ran(run, training, artifact, run.logs(), heard[0].steps, heard[0].epochs)


class World:
    """Runs on a tiny text encoder and on an untrained network for pictures; equal ones once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = self._encoder(0)
        self._ran: dict[str, Ran] = {}

    def _encoder(self, seed: int) -> Path:
        """It leaves nothing out at random, so that losses and steps can be computed again."""
        folder = write_tiny_encoder(self.folder / f'encoder-{seed}', seed)
        config = json.loads((folder / 'config.json').read_text())
        config |= {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
        (folder / 'config.json').write_text(json.dumps(config))
        return folder

    @cached_property
    def other_encoder(self) -> Path:
        """With other weights."""
        return self._encoder(1)

    def text(self, docs: Any = None, **parameters: Any) -> Ran:
        """A run of one step on 18 texts, as they are; `docs` in their place."""
        given = {'model': str(self.encoder), 'augmentation': 'none', **parameters}
        given['train_data'] = docs or text_docs()
        return self._once('text', docs is None, given)

    def picture(self, **parameters: Any) -> Ran:
        """A run of one step on 12 pictures."""
        options = {'weights': 'none', 'input_size': 32}
        given = {'model': 'efficientnet-lite0', 'model_options': options, 'batch_size': 12}
        given |= {'num_items_per_class': 3, 'train_data': picture_docs(), **parameters}
        return self._once('picture', True, given)

    def _once(self, kind: str, cached: bool, given: dict[str, Any]) -> Ran:
        key = kind + repr(sorted((k, v) for k, v in given.items() if k != 'train_data'))
        if not cached:
            return fit(**given)
        if key not in self._ran:
            self._ran[key] = fit(**given)
        return self._ran[key]

    def embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        """What the encoder makes of texts before any training; gradients reach its weights."""
        tokens = self.model.backbone.tokenizer(list(texts), padding=True, return_tensors='pt')
        return self.model(tokens)

    @cached_property
    def model(self) -> Any:
        """The encoder before any training."""
        return build_embedding_model(get_backbone(str(self.encoder))).eval()

    def loss(self, loss: Any, miner: Any = None, texts: Sequence[str] = TEXTS) -> torch.Tensor:
        """A loss of pytorch-metric-learning of the encoder before any training."""
        embeddings, labels = self.embeddings(texts), torch.arange(len(texts)) // 6
        return loss(embeddings, labels, miner(embeddings, labels) if miner else None)

    def gradients(self, loss: Any) -> dict[str, torch.Tensor]:
        """Of that loss, by the names of the weights; none where it does not reach."""
        self.model.zero_grad()
        self.loss(loss).backward()
        found = self.model.named_parameters()
        return {name: p.grad.clone() for name, p in found if p.grad is not None}


def text_docs(times: int = 1, labelled: bool = True) -> DocumentArray:
    """18 texts so many times, of the classes 0, 1 and 2."""
    return DocumentArray(
        Document(
            text=f'{text}{" a" * time}', tags={'finetuner_label': place // 6} if labelled else {}
        )
        for time in range(times)
        for place, text in enumerate(TEXTS)
    )


def text_dataset(folder: Path) -> Any:
    """The 18 texts as a declared dataset: `text`, `longer` computed of it, `number` as `text_docs` has
    it, and `half`."""

    @dataset(sql_file=folder / 'texts.sql', data_dir=folder / 'texts')
    class Texts:
        text: str
        number: int
        half: bool

        def longer(text: str) -> str:
            return f'{text} a'

    Texts.rows.delete()
    Texts.extend(
        {'text': text, 'number': place // 6, 'half': place < 9} for place, text in enumerate(TEXTS)
    )
    return Texts


def picture_docs() -> DocumentArray:
    """Twelve pictures of 32 pixels, of four classes."""
    return make_picture_docs(4, 3)


def embed(ran: Ran, texts: Sequence[str]) -> np.ndarray:
    """What a run's artifact makes of texts."""
    engine = finetuner.get_model(str(ran.artifact.directory), is_onnx=False, device='cpu')
    return finetuner.encode(engine, list(texts))
