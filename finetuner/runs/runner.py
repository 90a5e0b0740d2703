"""From a run's config to its artifact: check it, train, evaluate, export. No database, no Jina."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from docarray import Document

from finetuner.artifact import TrainingRecord, save_artifact
from finetuner.config import RunConfig
from finetuner.data.datasets import ClassDataset
from finetuner.data.samplers import SequentialSampler
from finetuner.excepts import ConfigError, ContentError
from finetuner.inputs import PictureReader
from finetuner.models.backbones import PictureSpec, TextSpec
from finetuner.models.whitening import Whitening
from finetuner.runs.feeding import build_feed
from finetuner.runs.findings import Findings, NoFindings
from finetuner.runs.plan import Plan, check_contents, make_plan
from finetuner.runs.probing import probe_run
from finetuner.training.losses import build_loss, build_miner, learns_class_weights
from finetuner.training.objectives import Objective, build_objective, check_objective_runs
from finetuner.training.optimization import (
    LAYER_DECAY,
    build_model_optimizer,
    build_optimizer,
    build_schedule,
)
from finetuner.training.setup import Pipeline, build_callbacks
from finetuner.training.trainer import BaseCallback
from finetuner.training.whitening import WhiteningFit, whitening_sample

if TYPE_CHECKING:
    import torch

    from finetuner.models.embedding_model import EmbeddingModel

logger = logging.getLogger('finetuner.run')

_NUM_EXPORT_INPUTS = 16
_EMBED_BATCH_SIZE = 64


class RunObserver(Protocol):
    """Whoever watches a run; the runner knows no more of it than this."""

    def progress(self, values: dict[str, Any]) -> None:
        """Epoch, num_epochs, batch, num_batches, loss, images_per_second, seconds_left."""

    def step_metrics(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Named values of one step."""

    def epoch_metrics(self, epoch: int, values: dict[str, float]) -> None:
        """Named values of one epoch."""

    def evaluation(self, stage: Literal['before', 'after'], metrics: dict[str, float]) -> None:
        """Retrieval metrics before and after training."""

    def examples(self, stage: Literal['before', 'after'], results: dict[str, list[str]]) -> None:
        """Example results before and after training."""


def validate_run(config: RunConfig, data: Mapping[str, Sequence[Document]]) -> RunConfig:
    """Check everything about a run that can be known before it exists.

    Args:
        config: its `model_artifact`, if any, being a path.
        data: Documents under 'train_data', 'eval_data', 'callbacks.<i>.query_data' and
            'callbacks.<i>.index_data'.

    Returns:
        The config with what it left open filled in.

    Raises:
        ConfigError: a name, option or combination in the config is wrong.
        DataError: the Documents cannot be trained or evaluated on; positions are named.
        ArtifactError: the artifact to continue from is damaged.
    """
    plan = make_plan(config, data)
    training = _build_training(plan, _stand_in())
    kind = plan.train.kind
    check_objective_runs(training.objective, kind, plan.spec.dimension, plan.train.num_classes)
    if config.on_broken == 'stop':
        check_contents(plan)
    return plan.config


def execute_run(
    config: RunConfig,
    load_data: Callable[[str], Sequence[Document]],
    artifact_directory: Path,
    observer: RunObserver,
    findings: Findings | None = None,
) -> None:
    """Train what a config says and write the artifact.

    Args:
        config: its `model_artifact`, if any, being a path.
        load_data: gives the Documents behind a reference.
        artifact_directory: where the artifact goes; complete when this returns.
        observer: told how it goes.
        findings: what earlier runs measured; None for nothing.

    Raises:
        FinetunerError: the config, the data or the training failed; says why.
    """
    from finetuner.training.trainer import resolve_device, seed_everything

    seed_everything(config.seed)
    plan = make_plan(config, {key: load_data(ref) for key, ref in data_references(config).items()})
    config = plan.config
    device = resolve_device(config.device)
    _log_plan(plan, device)
    model = _build_model(plan)
    metrics: dict[str, dict[str, float]] = {}

    def report(stage: Literal['before', 'after'], values: dict[str, float]) -> None:
        # several evaluations each bring metrics under names of their own
        metrics.setdefault(stage, {}).update(values)
        observer.evaluation(stage, metrics[stage])

    _train(plan, model, device, observer, report, findings or NoFindings())
    logger.info('Writing the artifact')
    record = TrainingRecord(
        config=config.dict(),
        metrics=metrics,
        parent=config.model_artifact and Path(config.model_artifact).name,
        num_documents=plan.train.num_documents,
    )
    _save(plan, model, record, artifact_directory)


def data_references(config: RunConfig) -> dict[str, str]:
    """The references to stored Documents in a config, under the keys of `validate_run`."""
    references = {'train_data': config.train_data}
    if config.eval_data is not None:
        references['eval_data'] = config.eval_data
    for position, callback in enumerate(config.callbacks):
        for option in ('query_data', 'index_data'):
            if callback.options.get(option) is not None:
                references[f'callbacks.{position}.{option}'] = callback.options[option]
    return references


def _build_model(plan: Plan) -> EmbeddingModel:
    from finetuner.models.tailor import build_embedding_model, freeze_backbone

    config = plan.config
    if plan.parent is None:
        return build_embedding_model(
            plan.backbone,
            config.model_options,
            config.output_dim,
            config.freeze,
            plan.spec.whitening,
        )
    model = plan.parent.build_model()
    if config.freeze:
        freeze_backbone(model)
    return model


def _stand_in() -> torch.nn.Module:
    """A convolution, a matrix and vectors, as networks have them, to check options on."""
    import torch

    return torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.Linear(2, 2))


@dataclass(frozen=True)
class _Training:
    """What the trainer is made of, built once to check it and once to use it."""

    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    schedule: Any


def _build_training(plan: Plan, model: Any, batches_per_epoch: int = 1) -> _Training:
    config = plan.config
    if config.loss is None or config.learning_rate is None:
        raise ValueError('the plan names a loss and a learning rate')
    if plan.validation is not None and learns_class_weights(config.loss, config.loss_options):
        raise ConfigError(
            f'loss {config.loss} learns weights for the classes of the training data, so it cannot '
            'judge validation data: leave out eval_data and val_split, or use EvaluationCallback'
        )
    loss = build_loss(config.loss, config.loss_options, plan.spec.dimension, plan.train.num_classes)
    miner = build_miner(config.miner, config.miner_options)
    objective = build_objective(plan.train.kind, loss, miner, plan.batch.size)
    if config.optimizer == 'LBFGS' and config.loss == 'CrossBatchMemory':
        raise ConfigError(
            'optimizer LBFGS computes the loss several times a step, and CrossBatchMemory would '
            'remember the batch each time: take another optimizer, such as AdamW'
        )
    optimizers = [
        build_model_optimizer(
            config.optimizer, model, config.learning_rate, config.optimizer_options
        )
    ]
    of_loss = list(loss.parameters())
    if of_loss:
        # a loss with weights of its own learns them beside the model's
        named = config.loss_optimizer or config.optimizer
        if named == 'LBFGS':
            raise ConfigError(
                f'loss {config.loss} has weights of its own, which LBFGS cannot learn beside the '
                "model's: name another loss_optimizer, such as SGD"
            )
        options = config.loss_optimizer_options or (
            {} if config.loss_optimizer else config.optimizer_options
        )
        options = {name: value for name, value in options.items() if name != LAYER_DECAY}
        rate = options.pop('lr', config.learning_rate)
        optimizers.append(build_optimizer(named, of_loss, rate, options))
    elif config.loss_optimizer or config.loss_optimizer_options:
        raise ConfigError(
            f'loss {config.loss} has no parameters to optimize: leave out loss_optimizer and '
            'loss_optimizer_options'
        )
    schedule = build_schedule(
        config.scheduler,
        optimizers[0],
        config.scheduler_options,
        config.epochs,
        batches_per_epoch,
    )
    return _Training(objective, optimizers, schedule)


def _train(
    plan: Plan,
    model: EmbeddingModel,
    device: str,
    observer: RunObserver,
    report: Callable[[Literal['before', 'after'], dict[str, float]], None],
    findings: Findings,
) -> None:
    from finetuner.training.progress import ProgressReport
    from finetuner.training.trainer import Trainer

    config = plan.config
    frozen_norm = _freezes_batch_norm(config)
    feed = build_feed(plan, model, device, frozen_norm)
    plan, feed = probe_run(plan, feed, device, frozen_norm, findings)
    config = plan.config
    with feed.pipeline as pipeline:
        loader, val_loader = feed.loaders(plan)
        training = _build_training(plan, model, len(loader))
        callbacks = build_callbacks(
            plan.callbacks, plan.backbone.name, pipeline, report, observer.examples
        )
        callbacks += _whitening(plan, model, pipeline)
        watch = ProgressReport(observer.progress, observer.step_metrics, observer.epoch_metrics)
        trainer = Trainer(
            feed.model,
            training.objective,
            training.optimizers,
            schedule=training.schedule,
            callbacks=[*callbacks, watch],
            device=device,
            freeze_batch_norm=frozen_norm,
        )
        trainer.fit(loader, config.epochs, val_loader)
        loader.log_broken()


def _whitening(plan: Plan, model: EmbeddingModel, pipeline: Pipeline) -> list[BaseCallback]:
    """What fits the model's whitening, if it has one that is not fitted yet."""
    found = [m for m in model.modules() if isinstance(m, Whitening) and not m.fitted]
    if not found or not isinstance(plan.train, ClassDataset):
        return []
    sampled = whitening_sample(plan.train, plan.config.seed)
    sampler = SequentialSampler(len(sampled), _EMBED_BATCH_SIZE)
    first, last = (
        pipeline.loader(sampled, sampler, preprocess_fn=reader.read)
        for reader in (plan.train_reader, plan.reader)
    )
    return [WhiteningFit(found[0], first, last, np.asarray(sampled.labels))]


def _freezes_batch_norm(config: RunConfig) -> bool:
    """Keep pretrained statistics, which small batches would ruin; an untrained net has none."""
    if config.freeze_batch_norm is not None:
        return config.freeze_batch_norm
    return config.model_options.get('weights') != 'none'


def _save(
    plan: Plan,
    model: EmbeddingModel,
    record: TrainingRecord,
    directory: Path,
) -> None:
    inputs = plan.reader.batch(_first_inputs(plan))
    save_artifact(
        directory, model, plan.spec, record, onnx_inputs=inputs, onnx_required=plan.config.to_onnx
    )


def _first_inputs(plan: Plan) -> list[Any]:
    """A few inputs that can be read, to compare the graph with the model on."""
    dataset = plan.train
    inputs: list[Any] = []
    reason = None
    for index in range(len(dataset)):
        if len(inputs) == _NUM_EXPORT_INPUTS:
            break
        try:
            inputs.append(plan.reader.read(dataset.document(index), dataset.position_of(index)))
        except ContentError as error:
            reason = error
    if not inputs:
        raise plan.reader.error(f'no content of the training data can be read: {reason}')
    return inputs


def _log_plan(plan: Plan, device: str) -> None:
    config = plan.config
    inputs, takes = plan.spec.inputs, ''
    if isinstance(inputs, PictureSpec) and isinstance(plan.train_reader, PictureReader):
        takes = f'at {inputs.input_size} pixels ({plan.train_reader.size} in training)'
    elif isinstance(inputs, TextSpec):
        takes = f'of texts of up to {inputs.max_length} tokens'
    logger.info(
        'Model %s %s, embeddings of length %d, on %s',
        plan.backbone.name,
        takes,
        plan.spec.dimension,
        device,
    )
    logger.info(
        'Training on %d Documents (%s): %s, %s, learning rate %g%s, batches of %d%s, %d epochs, '
        'seed %d',
        plan.train.num_documents,
        plan.train.kind,
        config.loss,
        config.optimizer,
        config.learning_rate,
        f' ({config.scheduler})' if config.scheduler else '',
        plan.batch.size,
        ''.join(
            [
                '' if plan.augmentation == 'none' else f', augmentation {plan.augmentation}',
                ', whitening' if config.whiten else '',
            ]
        ),
        config.epochs,
        config.seed,
    )
