"""The two `fit`s of Finetuner: a backbone by name gives a run, a module of one's own is trained."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from docarray import Document

from finetuner.client import callback_parameters, get_client, opened
from finetuner.excepts import ConfigError, unknown_name
from finetuner.run import Run

if TYPE_CHECKING:
    import torch

    from finetuner.callback import CallbackDescription
    from finetuner.data.csv import CSVOptions
    from finetuner.data.sharded_batches import ShardedBatches
    from finetuner.data.sources import HasRowDocuments, HasTrainingDocuments

    TrainingData = (
        str | os.PathLike[str] | Iterable[Document] | HasTrainingDocuments | HasRowDocuments
    )

_CALLBACK_DATA = ('query_data', 'index_data')


def fit_backbone(
    model: str,
    train_data: TrainingData,
    eval_data: TrainingData | None = None,
    val_split: float = 0.0,
    model_artifact: str | None = None,
    run_name: str | None = None,
    description: str | None = None,
    experiment_name: str | None = None,
    model_options: dict[str, Any] | None = None,
    loss: str | None = None,
    miner: str | None = None,
    miner_options: dict[str, Any] | None = None,
    optimizer: str = 'Adam',
    optimizer_options: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    epochs: int = 5,
    batch_size: int | None = None,
    callbacks: list[CallbackDescription] | None = None,
    scheduler: str | None = None,
    scheduler_options: dict[str, Any] | None = None,
    freeze: bool = False,
    output_dim: int | None = None,
    device: str = 'cuda',
    num_workers: int = 4,
    to_onnx: bool = False,
    csv_options: CSVOptions | None = None,
    public: bool = False,
    num_items_per_class: int = 4,
    sampler: str = 'auto',
    loss_optimizer: str | None = None,
    loss_optimizer_options: dict[str, Any] | None = None,
    loss_options: dict[str, Any] | None = None,
    freeze_batch_norm: bool | None = None,
    augmentation: str | None = None,
    whiten: bool | None = None,
    views_per_instance: int = 2,
    on_broken: str = 'stop',
    seed: int = 0,
    micro_batch_size: int | None = None,
    matryoshka_dims: list[int] | None = None,
    hard_negatives: bool = False,
    ema_decay: float | None = None,
    precision: str = 'auto',
    compile_model: bool = False,
    checkpoint_seconds: float = 300.0,
    export_precision: str = 'fp32',
    max_recall_loss: float = 0.01,
    content: str | None = None,
    label: str | None = None,
    num_processes: int = 1,
    num_nodes: int = 1,
) -> Run:
    """Start a run that fine-tunes a backbone, in a process of its own, and return at once.

    Args:
        model: name of the backbone; see `list_models()`.
        train_data: Documents, the name of pushed ones, or what `finetuner.data.open_documents`
            opens: a CSV, JSON Lines, Parquet, WebDataset, `.docs` or SQLite file, a pattern or list of
            such, a folder of pictures, an iterator, a declared dataset or rows of it. Its kind decides how it is trained on; see
            docs/data.md.
        eval_data: the same, for the validation loss.
        val_split: share of `train_data` (of its classes, where it has classes) held out for the
            validation loss when there is no `eval_data`.
        model_artifact: id, alias or path of an artifact to go on from.
        run_name: made up when None; unique within the experiment.
        description: free text.
        experiment_name: group of runs; `default` when None.
        model_options: see `list_model_options()`; `input_size` and `weights` for pictures, `lora`
            for texts.
        loss: class in pytorch-metric-learning's losses; None, as for whatever else has a recipe
            (learning_rate, scheduler, train_input_size, whiten), takes what was measured to be
            good for the model and the kind of data; see docs/training.md.
        miner: class in its miners, None for none.
        miner_options: arguments of the miner.
        optimizer: class in `torch.optim`.
        optimizer_options: arguments of the optimizer.
        learning_rate: the highest of the schedule; None takes the recipe's, 1e-4 with another
            loss.
        epochs: times the data is gone through.
        batch_size: Documents (roots, matches, chunks and views each count) in a batch; None takes
            up to 128, as the data allows.
        callbacks: instances of the classes in `finetuner.callback`.
        scheduler: `linear`, `cosine`, `cosine_with_restarts`, `polynomial`, `constant`,
            `constant_with_warmup`; None takes the recipe's, usually `cosine`.
        scheduler_options: `num_warmup_steps`, `num_training_steps`, `scheduler_step`,
            `num_cycles`, `power`.
        freeze: train the last layer only, or the projection head when there is one; what comes
            before is computed once for all epochs where it can be.
        output_dim: length of the embedding; attaches a projection head.
        device: `cuda`, where there is a GPU, or `cpu`.
        num_workers: processes that decode, at most the cores there are; none where one process
            keeps up.
        to_onnx: fail when the ONNX graph cannot be exported; it is exported anyway where it can.
        csv_options: how CSV files given as data are read.
        public: kept in the run's config; it shares nothing while there is one user.
        num_items_per_class: of class data, Documents of each class in a batch.
        sampler: of class data, `class` or `random`; `auto` for what fits the kind of data.
        loss_optimizer: for losses with weights of their own; None takes `optimizer`.
        loss_optimizer_options: its arguments; `lr` too.
        loss_options: arguments of the loss.
        freeze_batch_norm: keep the statistics of batch normalisation; None does with pretrained
            weights.
        augmentation: how training pictures and texts are varied: `none`, `light` or `strong`; None
            takes the recipe's, `strong` for unlabelled pictures, and `none` for all other.
        whiten: of class data, whether a linear map is fitted to the embeddings in which Documents
            of one class scatter alike in all directions; None takes the recipe's.
        views_per_instance: of unlabelled data, views of each Document in a batch.
        on_broken: `stop` at a picture that cannot be opened, or `skip` it; it is named either way.
        seed: of everything drawn at random.
        micro_batch_size: Documents of a batch that go through the model at a time: a batch of 2,048
            then takes the memory of so many, and the time of two passes; None all at once, or as
            many as memory holds.
        matryoshka_dims: lengths at which the beginning of an embedding shall be good as well.
        hard_negatives: of class data, whether classes that the model confuses, looked for in all
            of it before each epoch, stand together in batches.
        ema_decay: keep an exponential moving average of the weights, this much of it at each step,
            such as 0.99; None keeps the last weights.
        precision: that training computes in: `fp32`, `bf16`, `fp16`; `auto` takes what is fastest
            on the device.
        compile_model: compile the model for training, which takes minutes and pays on long runs.
        checkpoint_seconds: time between checkpoints within an epoch, for `Run.resume` to go on
            from; there is one at the end of each epoch, too.
        export_precision: that the artifact is to be served in: `fp32`; `int8`, which is written,
            measured and taken; `auto` takes the fastest of both, in each engine installed, that
            loses no more recall than `max_recall_loss` on the run's evaluation data; see
            docs/precision.md.
        max_recall_loss: share of fp32's `recall_at_k` that may be lost: 0.01 lets 0.800 become
            0.792.
        content: of declared datasets given as data, those of callbacks too, the column of the
            contents; None where only one can be meant. Of WebDataset shards see docs/data.md.
        label: of the same, the column of the labels; None trains without.
        num_processes: that train together, on all nodes: each embeds a part of every batch, and all
            see the whole of it as negatives. One for each GPU, or for some cores; see
            docs/clusters.md.
        num_nodes: machines that they are spread over, evenly; more than one needs
            `FINETUNER_LAUNCHER=ray`.

    Returns:
        The run, CREATED or STARTED.

    Raises:
        ConfigError: an argument is unknown, out of range or contradicts another.
        DataError: the Documents cannot be trained or evaluated on; says which and why.
        NotFoundError: pushed data or the artifact does not exist.
    """
    parameters = dict(locals())
    # looked through twice, and it may be an iterator
    given = list(parameters.pop('callbacks') or ())
    reading = (parameters.pop('csv_options'), on_broken)
    columns = (parameters.pop('content'), parameters.pop('label'))
    _check_columns(*columns, train_data, eval_data, given)
    configs, data = callback_parameters(given, *reading, *columns)
    data['train_data'] = opened(parameters.pop('train_data'), *reading, *columns)
    if parameters.pop('eval_data') is not None:
        data['eval_data'] = opened(eval_data, *reading, *columns)
    client = get_client()
    return Run.from_dict(client, client.fit({**parameters, 'callbacks': configs}, data))


def fit_own_model(
    model: torch.nn.Module,
    train_data: TrainingData | ShardedBatches,
    eval_data: TrainingData | None = None,
    epochs: int = 10,
    batch_size: int = 256,
    loss: str | torch.nn.Module = 'SiameseLoss',
    configure_optimizer: Callable[[torch.nn.Module], Any] | None = None,
    learning_rate: float = 1e-3,
    scheduler_step: str = 'batch',
    device: str = 'cpu',
    preprocess_fn: Callable[[Any], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_items_per_class: int | None = None,
    callbacks: Sequence[Any] | None = None,
    num_workers: int = 0,
    to_embedding_model: bool = False,
    input_size: tuple[int, ...] | None = None,
    input_dtype: str = 'float32',
    layer_name: str | None = None,
    freeze: bool | list[str] = False,
    projection_head: torch.nn.Module | None = None,
    output_dim: int | None = None,
    freeze_batch_norm: bool = False,
    csv_options: CSVOptions | None = None,
    views_per_instance: int = 2,
    on_broken: str = 'stop',
    seed: int = 0,
    content: str | None = None,
    label: str | None = None,
) -> torch.nn.Module:
    """Train a model of one's own in this process.

    Args:
        model: maps a batch to embeddings; or any model, with `to_embedding_model`.
        train_data: Documents, or what `finetuner.data.open_documents` opens; see docs/data.md. Or
            `finetuner.data.ShardedBatches`, which stream; they have a `batch_size`, `preprocess_fn`,
            `collate_fn`, `num_items_per_class` and `views_per_instance` of their own, where several
            processes train they need `num_batches`, and for losses with weights of classes `classes`.
        eval_data: the same, for the validation loss.
        epochs: times the data is gone through.
        batch_size: Documents in a batch; the default is made smaller for data that is less.
        loss: class in pytorch-metric-learning's losses (`SiameseLoss` and `TripletLoss` are known
            too), `CosineSimilarityLoss`, or a loss module.
        configure_optimizer: takes the model, returns an optimizer, or one and a scheduler.
        learning_rate: of Adam, without `configure_optimizer`.
        scheduler_step: `batch` or `epoch`.
        device: `cpu` or `cuda`.
        preprocess_fn: takes a Document, returns one input; called at each access.
        collate_fn: makes a batch of a list of inputs; None stacks them.
        num_items_per_class: Documents of each class in a batch; None divides the batch among all.
        callbacks: instances of the classes in `finetuner.callback`, or of
            `finetuner.training.trainer.BaseCallback`.
        num_workers: processes that preprocess.
        to_embedding_model: cut the model after a layer first; see
            `finetuner.models.tailor.to_embedding_model` for this and the next arguments.
        input_size: shape of one input.
        input_dtype: its torch dtype.
        layer_name: layer whose output is the embedding.
        freeze: freeze the backbone, or the layers named.
        projection_head: attached at the end.
        output_dim: attaches a linear projection head of that length instead.
        freeze_batch_norm: keep the statistics of batch normalisation.
        csv_options: how CSV files given as data are read.
        views_per_instance: of unlabelled data, views of each Document in a batch; they differ
            where `preprocess_fn` draws at random.
        on_broken: `stop` at a Document whose `preprocess_fn` raises OSError or DataError, or
            `skip` it.
        seed: of everything drawn at random.
        content: of declared datasets given as data, those of callbacks too, the column of the
            contents; None where only one can be meant. Of WebDataset shards see docs/data.md.
        label: of the same, the column of the labels; None trains without.

    Returns:
        The trained model: the one given, unless it was cut.

    Raises:
        ConfigError: an argument is out of range, or the model does not fit the data.
        DataError: the Documents cannot be trained on; says which and why.
        TrainingError: the loss became infinite or not a number.
    """
    from finetuner.data.sharded_batches import ShardedBatches
    from finetuner.models import tailor
    from finetuner.training.module_fit import ModuleFitOptions, fit_module
    from finetuner.training.module_sources import DEFAULT_BATCH_SIZE

    given = list(callbacks or ())
    _check_columns(content, label, train_data, eval_data, given)
    if to_embedding_model:
        model = tailor.to_embedding_model(
            model, input_size, input_dtype, layer_name, freeze, projection_head, output_dim
        )
    elif layer_name or freeze or projection_head or output_dim:
        raise ConfigError(
            'layer_name, freeze, projection_head and output_dim change the model: they need '
            'to_embedding_model=True and input_size'
        )
    options = ModuleFitOptions(
        epochs=epochs,
        # the default is no demand: data smaller than it makes one batch
        batch_size=None if batch_size == DEFAULT_BATCH_SIZE else batch_size,
        loss=loss,
        configure_optimizer=configure_optimizer,
        learning_rate=learning_rate,
        scheduler_step=scheduler_step,  # type: ignore[arg-type]
        device=device,
        preprocess_fn=preprocess_fn,
        collate_fn=collate_fn,
        num_items_per_class=num_items_per_class,
        callbacks=_with_documents(given, content, label, on_broken),
        num_workers=num_workers,
        freeze_batch_norm=freeze_batch_norm,
        views_per_instance=views_per_instance,
        on_broken=on_broken,  # type: ignore[arg-type]
        seed=seed,
    )
    reading = (csv_options, on_broken, content, label)
    train_docs: Any = train_data
    if not isinstance(train_data, ShardedBatches):
        train_docs = _own_documents('train_data', train_data, *reading)
    eval_docs = None
    if eval_data is not None:
        eval_docs = _own_documents('eval_data', eval_data, *reading)
    fit_module(model, train_docs, eval_docs, options)
    return model


def _own_documents(name: str, data: Any, *reading: Any) -> Any:
    docs = opened(data, *reading)
    if isinstance(docs, str):
        raise ConfigError(
            f'{name} {data!r} is no file, and pushed data is for models known by name: give '
            'Documents or a path'
        )
    return docs


def _check_columns(
    content: str | None,
    label: str | None,
    train_data: Any,
    eval_data: Any,
    callbacks: Sequence[Any],
) -> None:
    """Refuse names of columns where neither data nor callbacks bring a dataset."""
    from finetuner.data.sources import check_columns

    others = [getattr(callback, name, None) for callback in callbacks for name in _CALLBACK_DATA]
    check_columns(content, label, [train_data, eval_data, *others])


def _with_documents(
    callbacks: Iterable[Any], content: str | None, label: str | None, on_broken: str
) -> tuple[Any, ...]:
    """The callbacks, with Documents in place of datasets."""
    from finetuner.data.sources import HasRowDocuments

    def with_documents(callback: Any) -> Any:
        given = {name: getattr(callback, name, None) for name in _CALLBACK_DATA}
        made = {
            name: opened(value, None, on_broken, content, label)
            for name, value in given.items()
            if isinstance(value, HasRowDocuments)
        }
        return replace(callback, **made) if made else callback

    return tuple(map(with_documents, callbacks))


@overload
def fit(model: str, train_data: TrainingData, *args: Any, **kwargs: Any) -> Run: ...
@overload
def fit(
    model: torch.nn.Module, train_data: TrainingData | ShardedBatches, *args: Any, **kwargs: Any
) -> torch.nn.Module: ...


def fit(*args: Any, **kwargs: Any) -> Run | torch.nn.Module:
    """Fine-tune a backbone by name (`fit_backbone`), or a model of one's own (`fit_own_model`).

    Which one is decided by `model`, the first argument: a name starts a run in a process of its
    own and returns its `Run`; a `torch.nn.Module` is trained here and returned.
    """
    model = args[0] if args else kwargs.get('model')
    target = fit_backbone if model is None or isinstance(model, str) else fit_own_model
    known = inspect.signature(target).parameters
    for name in kwargs:
        if name not in known:
            raise ConfigError(unknown_name('parameter', name, known))
    return target(*args, **kwargs)


# what tools and people see: the signature of the published function
fit.__signature__ = inspect.signature(fit_backbone)  # type: ignore[attr-defined]
