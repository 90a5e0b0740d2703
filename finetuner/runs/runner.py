"""From a run's config to its artifact: check it, train, evaluate, export. No database, no Jina."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from docarray import Document

from finetuner.artifact import TrainingRecord, save_artifact
from finetuner.config import RunConfig
from finetuner.excepts import ContentError
from finetuner.inputs import TextImageReader
from finetuner.models.backbones import TOWERS, TextImageBackbone
from finetuner.precision_record import FP32
from finetuner.runs.choices import SharedChoices
from finetuner.runs.feeding import build_feed
from finetuner.runs.findings import Findings, NoFindings
from finetuner.runs.plan import Plan, check_contents, make_plan
from finetuner.runs.plan_log import log_plan, log_ranks
from finetuner.runs.precision import choose_precisions
from finetuner.runs.probing import probe_run
from finetuner.runs.run_files import checkpoint_directory, epochs_directory
from finetuner.runs.training_parts import (
    build_training,
    check_training,
    freezes_batch_norm,
    step_options,
    with_own_callbacks,
)
from finetuner.significance import Stage
from finetuner.training.callback_building import LoggedRun, build_callbacks, without_reports
from finetuner.training.callbacks import ReportMetrics
from finetuner.training.checkpointing import Checkpoints
from finetuner.training.epoch_artifacts import EpochStore

if TYPE_CHECKING:
    from finetuner.models.embedding_model import EmbeddingModel
    from finetuner.models.text_image import TextImageModel
    from finetuner.training.ranks import Ranks

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

    def evaluation(self, stage: Stage, metrics: dict[str, float]) -> None:
        """Retrieval metrics before and after training, and the p-values of the change."""

    def examples(self, stage: Literal['before', 'after'], results: dict[str, list[str]]) -> None:
        """Example results before and after training."""

    def begins(self, step: int, epoch: int) -> None:
        """Training begins after so many steps and epochs: nothing told of later ones counts."""

    def write_all(self) -> None:
        """Write down what was told so far: a checkpoint follows, which counts on it."""

    def is_paused(self) -> bool:
        """Whether training should end at the next checkpoint, to go on from there later."""


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
    run_directory: Path | None = None,
    findings: Findings | None = None,
    join: Callable[[str], Ranks] | None = None,
) -> None:
    """Train what a config says and write the artifact.

    Where the environment names other processes of the run, they train together, and the first one
    alone reports and writes.

    Args:
        config: its `model_artifact`, if any, being a path.
        load_data: gives the Documents behind a reference.
        artifact_directory: where the artifact goes; complete when this returns.
        observer: told how it goes.
        run_directory: where the run's checkpoints go, and where it goes on from the last one, if
            there is one; None for a run that keeps none.
        findings: what earlier runs measured; None for nothing.
        join: meets the other processes of the run, on a device; None for
            `finetuner.training.ranks.join_ranks`.

    Raises:
        FinetunerError: the config, the data or the training failed; says why.
    """
    from finetuner.training.ranks import join_ranks, leave_ranks
    from finetuner.training.trainer import resolve_device, seed_everything

    seed_everything(config.seed)
    plan = make_plan(config, {key: load_data(ref) for key, ref in data_references(config).items()})
    config = plan.config
    device = resolve_device(config.device)
    ranks = (join or join_ranks)(device)
    log_plan(plan, device)
    if ranks.size > 1:
        log_ranks(plan, ranks.size, freezes_batch_norm(config))
    model = _build_model(plan)
    metrics: dict[str, dict[str, float]] = {}

    def report(stage: Stage, values: dict[str, float]) -> None:
        # several evaluations each bring metrics under names of their own
        metrics.setdefault(stage, {}).update(values)
        observer.evaluation(stage, metrics[stage])

    record = TrainingRecord(
        config=config.dict(),
        metrics=metrics,
        parent=config.model_artifact and Path(config.model_artifact).name,
        num_documents=plan.train.num_documents,
    )
    checkpoints = epochs = None
    if run_directory is not None:
        checkpoints = Checkpoints(
            checkpoint_directory(run_directory),
            config.checkpoint_seconds,
            observer.begins,
            observer.write_all,
            observer.is_paused,
            saves=ranks.is_first,
        )
        epochs = EpochStore(
            epochs_directory(run_directory),
            model,
            lambda model, directory: _save(plan, model, record, directory, config.to_onnx),
        )
    known = findings or NoFindings()
    _train(plan, model, device, observer, report, known, checkpoints, epochs, ranks)
    leave_ranks()
    if not ranks.is_first:
        return
    logger.info('Writing the artifact')
    _save(plan, model, record, artifact_directory, chooses=True)


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


def _build_model(plan: Plan) -> EmbeddingModel | TextImageModel:
    from finetuner.models.lora import attach_lora

    if isinstance(plan.backbone, TextImageBackbone):
        model: Any = _build_towers(plan, plan.backbone)
    else:
        model = _build_single(plan)
        attach_lora(model, plan.backbone, plan.config.model_options)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    logger.info('Training %s of %s parameters', f'{trained:,}', f'{sum(s for s, _ in sizes):,}')
    return model


def _build_single(plan: Plan) -> EmbeddingModel:
    from finetuner.models.tailor import build_embedding_model, freeze_backbone

    config = plan.config
    if plan.parent is None:
        model = build_embedding_model(
            plan.backbone, config.model_options, config.output_dim, whitening=plan.spec.whitening
        )
    else:
        model = plan.parent.build_model()
    if config.freeze:
        freeze_backbone(model)
    return model


def _build_towers(plan: Plan, backbone: TextImageBackbone) -> TextImageModel:
    from finetuner.models.tailor import freeze_backbone
    from finetuner.models.text_image import build_text_image_model

    config = plan.config
    if plan.parent is None:
        model = build_text_image_model(backbone, config.model_options, config.output_dim)
    else:
        model = plan.parent.build_towers()
    for tower in model.towers.values() if config.freeze else ():
        freeze_backbone(tower)  # type: ignore[arg-type]
    return model


def _train(
    plan: Plan,
    model: EmbeddingModel | TextImageModel,
    device: str,
    observer: RunObserver,
    report: ReportMetrics,
    findings: Findings,
    checkpoints: Checkpoints | None,
    epochs: EpochStore | None,
    ranks: Ranks,
) -> None:
    from finetuner.training.progress import ProgressReport
    from finetuner.training.trainer import Trainer

    frozen_norm = freezes_batch_norm(plan.config)
    directory = None if checkpoints is None else checkpoints.directory
    choices = SharedChoices.opened(directory, ranks)
    feed = build_feed(plan, model, device, frozen_norm, choices, ranks)
    plan, feed = probe_run(plan, feed, device, frozen_norm, findings, choices)
    config = plan.config
    with feed.pipeline as pipeline:
        loader, val_loader = feed.loaders(plan)
        training = build_training(plan, model, len(loader))
        callbacks = build_callbacks(
            plan.callbacks if ranks.is_first else without_reports(plan.callbacks),
            plan.backbone.name,
            pipeline,
            report,
            observer.examples,
            LoggedRun(config.experiment_name, config.run_name or 'run', config.dict(), plan.train),
            epochs,
            plan.spec.matryoshka_dims,
        )
        callbacks = with_own_callbacks(callbacks, plan, model, loader, pipeline, feed.read)
        if ranks.is_first:
            told = (observer.progress, observer.step_metrics, observer.epoch_metrics)
            callbacks.append(ProgressReport(*told))
        trainer = Trainer(
            feed.model,
            training.objective,
            training.optimizers,
            schedule=training.schedule,
            callbacks=callbacks,
            device=device,
            freeze_batch_norm=frozen_norm,
            step_options=step_options(plan, len(loader)),
            ranks=ranks,
        )
        trainer.fit(loader, config.epochs, val_loader, checkpoints)
        loader.add_broken(ranks.collect(loader.broken))
        loader.log_broken()


def _save(
    plan: Plan,
    model: Any,
    record: TrainingRecord,
    directory: Path,
    exports: bool = True,
    chooses: bool = False,
) -> None:
    inputs: Any = None
    if exports and isinstance(plan.reader, TextImageReader):
        inputs = {
            tower: plan.reader.batch(_first_inputs(plan, 2, first))
            for first, tower in enumerate(TOWERS)
        }
    elif exports:
        inputs = plan.reader.batch(_first_inputs(plan))
    save_artifact(
        directory,
        model,
        plan.spec,
        record,
        onnx_inputs=inputs,
        onnx_required=plan.config.to_onnx,
        backbone=plan.backbone,
        choose_precision=partial(choose_precisions, plan)
        if chooses and plan.config.export_precision != FP32
        else None,
    )


def _first_inputs(plan: Plan, step: int = 1, first: int = 0) -> list[Any]:
    """A few inputs that can be read, to compare the graph with the model on.

    Args:
        plan: of the run.
        step: every item, or every second one.
        first: where to begin.
    """
    dataset = plan.train
    inputs: list[Any] = []
    reason = None
    for index in range(first, len(dataset), step):
        if len(inputs) == _NUM_EXPORT_INPUTS:
            break
        try:
            inputs.append(plan.reader.read(dataset.document(index), dataset.position_of(index)))
        except ContentError as error:
            reason = error
    if not inputs:
        raise plan.reader.error(f'no content of the training data can be read: {reason}')
    return inputs
