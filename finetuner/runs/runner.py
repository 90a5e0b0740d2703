"""From a run's config to its artifact: check it, train, evaluate, export. No database, no Jina."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from docarray import Document

from finetuner.artifact import TrainingRecord, save_artifact
from finetuner.augmentation import Augmentation, build_augmentation
from finetuner.config import RunConfig
from finetuner.excepts import ConfigError, ContentError
from finetuner.inputs import PictureReader
from finetuner.models.backbones import PictureSpec, TextSpec
from finetuner.runs.plan import Plan, check_contents, make_plan
from finetuner.training.losses import build_loss, build_miner, learns_class_weights
from finetuner.training.objectives import Objective, build_objective, check_objective_runs
from finetuner.training.optimization import build_optimizer, build_schedule
from finetuner.training.setup import Pipeline, build_callbacks

if TYPE_CHECKING:
    import torch

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


def validate_run(config: RunConfig, data: Mapping[str, Sequence[Document]]) -> None:
    """Check everything about a run that can be known before it exists.

    Args:
        config: its `model_artifact`, if any, being a path.
        data: Documents under 'train_data', 'eval_data', 'callbacks.<i>.query_data' and
            'callbacks.<i>.index_data'.

    Raises:
        ConfigError: a name, option or combination in the config is wrong.
        DataError: the Documents cannot be trained or evaluated on; positions are named.
        ArtifactError: the artifact to continue from is damaged.
    """
    plan = make_plan(config, data)
    training = _build_training(config, plan, _NoModel())
    kind = plan.train.kind
    check_objective_runs(training.objective, kind, plan.spec.dimension, plan.num_classes)
    if config.on_broken == 'stop':
        check_contents(plan)


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
    device = resolve_device(config.device)
    _log_plan(config, plan, device)
    model = _build_model(config, plan)
    metrics: dict[str, dict[str, float]] = {}

    def report(stage: Literal['before', 'after'], values: dict[str, float]) -> None:
        # several evaluations each bring metrics under names of their own
        metrics.setdefault(stage, {}).update(values)
        observer.evaluation(stage, metrics[stage])

    _train(config, plan, model, device, observer, report)
    logger.info('Writing the artifact')
    record = TrainingRecord(
        config={
            **config.dict(),
            'batch_size': plan.batch.size,
            'augmentation': plan.augmentation,
            'learning_rate': plan.learning_rate,
        },
        metrics=metrics,
        parent=config.model_artifact and Path(config.model_artifact).name,
        num_documents=plan.train.num_documents,
    )
    _save(config, plan, model, record, artifact_directory)


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


def _build_model(config: RunConfig, plan: Plan) -> EmbeddingModel:
    from finetuner.models.tailor import build_embedding_model, freeze_all_but_last

    if plan.parent is None:
        return build_embedding_model(
            plan.backbone, config.model_options, config.output_dim, config.freeze
        )
    model = plan.parent.build_model()
    if config.freeze:
        freeze_all_but_last(model.backbone, keep_last=plan.spec.output_dim is None)
    return model


class _NoModel:
    """Stands in for a model while options are checked."""

    def parameters(self) -> list[Any]:
        """A convolution's weights, a matrix and a vector, as networks have them."""
        import torch

        return [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2, 1, 1), (2, 2), (2,))]


@dataclass(frozen=True)
class _Training:
    """What the trainer is made of, built once to check it and once to use it."""

    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    schedule: Any


def _build_training(
    config: RunConfig, plan: Plan, model: Any, batches_per_epoch: int = 1
) -> _Training:
    if plan.validation is not None and learns_class_weights(config.loss):
        raise ConfigError(
            f'loss {config.loss} learns weights for the classes of the training data, so it cannot '
            'judge validation data: leave out eval_data and val_split, or use EvaluationCallback'
        )
    loss = build_loss(config.loss, config.loss_options, plan.spec.dimension, plan.num_classes)
    miner = build_miner(config.miner, config.miner_options)
    objective = build_objective(plan.train.kind, loss, miner)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = [
        build_optimizer(config.optimizer, trained, plan.learning_rate, config.optimizer_options)
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
        options = dict(options)
        rate = options.pop('lr', plan.learning_rate)
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
    config: RunConfig,
    plan: Plan,
    model: EmbeddingModel,
    device: str,
    observer: RunObserver,
    report: Callable[[Literal['before', 'after'], dict[str, float]], None],
) -> None:
    from finetuner.training.progress import ProgressReport
    from finetuner.training.trainer import Trainer

    pipeline = Pipeline(
        plan.reader.read,
        plan.reader.collate_fn,
        num_workers=config.num_workers,
        seed=config.seed,
        on_broken=config.on_broken,
    )
    with pipeline:
        augmented = _training_read(plan)
        loader = pipeline.training_loader(plan.train, plan.batch, augmented)
        val_loader = None
        if plan.validation is not None:
            val_loader = pipeline.training_loader(
                plan.validation,
                plan.validation_batch,
                augmented if plan.validation.kind == 'instance' else None,
            )
        training = _build_training(config, plan, model, len(loader))
        callbacks = build_callbacks(
            plan.callbacks, plan.backbone.name, pipeline, report, observer.examples
        )
        watch = ProgressReport(observer.progress, observer.step_metrics, observer.epoch_metrics)
        trainer = Trainer(
            model,
            training.objective,
            training.optimizers,
            schedule=training.schedule,
            callbacks=[*callbacks, watch],
            device=device,
            freeze_batch_norm=_freezes_batch_norm(config),
        )
        trainer.fit(loader, config.epochs, val_loader)
        loader.log_broken()


def _training_read(plan: Plan) -> Callable[[Document], Any]:
    """How a Document becomes an input in training: pictures may be smaller, and varied."""
    reader = plan.train_reader
    if not isinstance(reader, PictureReader):
        return reader.read
    augmentation = build_augmentation(plan.augmentation, reader.size)
    return functools.partial(_augmented, reader=reader, augmentation=augmentation)


def _augmented(doc: Document, reader: PictureReader, augmentation: Augmentation | None) -> Any:
    picture = reader.read(doc)
    return picture if augmentation is None else augmentation(picture)


def _freezes_batch_norm(config: RunConfig) -> bool:
    """Keep pretrained statistics, which small batches would ruin; an untrained net has none."""
    if config.freeze_batch_norm is not None:
        return config.freeze_batch_norm
    return config.model_options.get('weights') != 'none'


def _save(
    config: RunConfig,
    plan: Plan,
    model: EmbeddingModel,
    record: TrainingRecord,
    directory: Path,
) -> None:
    inputs = plan.reader.batch(_first_inputs(plan))
    save_artifact(
        directory, model, plan.spec, record, onnx_inputs=inputs, onnx_required=config.to_onnx
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


def _log_plan(config: RunConfig, plan: Plan, device: str) -> None:
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
        plan.learning_rate,
        f' ({config.scheduler})' if config.scheduler else '',
        plan.batch.size,
        '' if plan.augmentation == 'none' else f', augmentation {plan.augmentation}',
        config.epochs,
        config.seed,
    )
