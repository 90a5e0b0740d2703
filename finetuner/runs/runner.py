"""From a run's config to its artifact: check it, train, evaluate, export. No database, no Jina."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from docarray import Document

from finetuner.artifact import TrainingRecord, save_artifact
from finetuner.config import RunConfig
from finetuner.excepts import ContentError
from finetuner.inputs import PictureReader
from finetuner.models.backbones import PictureSpec, TextSpec
from finetuner.runs.plan import Plan, check_contents, make_plan
from finetuner.runs.training_parts import (
    build_training,
    build_training_loaders,
    check_training,
    freezes_batch_norm,
    step_options,
    with_own_callbacks,
)
from finetuner.training.setup import Pipeline, build_callbacks

if TYPE_CHECKING:
    from finetuner.models.embedding_model import EmbeddingModel

logger = logging.getLogger('finetuner.run')

_NUM_EXPORT_INPUTS = 16


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
    check_training(plan)
    if config.on_broken == 'stop':
        check_contents(plan)
    return plan.config


def execute_run(
    config: RunConfig,
    load_data: Callable[[str], Sequence[Document]],
    artifact_directory: Path,
    observer: RunObserver,
) -> None:
    """Train what a config says and write the artifact.

    Args:
        config: its `model_artifact`, if any, being a path.
        load_data: gives the Documents behind a reference.
        artifact_directory: where the artifact goes; complete when this returns.
        observer: told how it goes.

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

    _train(plan, model, device, observer, report)
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


def _train(
    plan: Plan,
    model: EmbeddingModel,
    device: str,
    observer: RunObserver,
    report: Callable[[Literal['before', 'after'], dict[str, float]], None],
) -> None:
    from finetuner.training.progress import ProgressReport
    from finetuner.training.trainer import Trainer

    config = plan.config
    pipeline = Pipeline(
        plan.reader.read,
        plan.reader.collate_fn,
        num_workers=config.num_workers,
        seed=config.seed,
        on_broken=config.on_broken,
    )
    with pipeline:
        loader, val_loader = build_training_loaders(plan, pipeline)
        training = build_training(plan, model, len(loader))
        callbacks = build_callbacks(
            plan.callbacks,
            plan.backbone.name,
            pipeline,
            report,
            observer.examples,
            plan.spec.matryoshka_dims,
        )
        callbacks = with_own_callbacks(callbacks, plan, model, loader, pipeline)
        watch = ProgressReport(observer.progress, observer.step_metrics, observer.epoch_metrics)
        trainer = Trainer(
            model,
            training.objective,
            training.optimizers,
            schedule=training.schedule,
            callbacks=[*callbacks, watch],
            device=device,
            freeze_batch_norm=freezes_batch_norm(config),
            step_options=step_options(plan, len(loader)),
        )
        trainer.fit(loader, config.epochs, val_loader)
        loader.log_broken()


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
                *_extras(config),
            ]
        ),
        config.epochs,
        config.seed,
    )


def _extras(config: RunConfig) -> list[str]:
    """What a step does beyond the plain one, for the log."""
    lengths = ', '.join(map(str, config.matryoshka_dims))
    said = {
        f'{config.micro_batch_size} at a time': config.micro_batch_size,
        f'also cut to {lengths}': lengths,
        'hard negatives': config.hard_negatives,
        f'averaged weights ({config.ema_decay})': config.ema_decay,
        'compiled': config.compile_model,
    }
    return [f', {what}' for what, asked in said.items() if asked]
