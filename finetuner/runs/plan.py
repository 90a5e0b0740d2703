"""Decide what a run's config leaves open, and check all of it against the data, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from docarray import Document

from finetuner.artifact import Artifact, ModelSpec, load_artifact
from finetuner.callback import CallbackDescription
from finetuner.config import RunConfig
from finetuner.data.checks import build_named_dataset, check_training_data
from finetuner.data.datasets import ClassDataset
from finetuner.data.documents import KIND_NAMES
from finetuner.data.labelled import LabelledDataset
from finetuner.data.loading import check_sampler
from finetuner.data.splitting import split_dataset
from finetuner.excepts import ConfigError, DataError
from finetuner.inputs import InputReader, PictureReader, TextImageReader, build_reader
from finetuner.models.backbones import (
    TOWERS,
    Backbone,
    TextImageBackbone,
    TextSpec,
    check_output_dim,
)
from finetuner.models.zoo import (
    ALIASES,
    DEFAULT_TEXT_IMAGE_BACKBONE,
    backbone_tokenizer,
    get_backbone,
    input_spec,
    parse_options,
)
from finetuner.runs.readable import find_broken, openable
from finetuner.runs.recipes import apply_recipe, most_in_a_batch
from finetuner.training.callback_descriptions import parse_callback, prepare_callbacks
from finetuner.training.matryoshka import check_lengths
from finetuner.training.setup import BatchShape, resolve_batch, validation_batch
from finetuner.training.whitening import can_whiten

logger = logging.getLogger('finetuner.run')

Dataset = LabelledDataset[Any]

# opening every picture of a large set would keep the caller waiting; training opens the others
MAX_CONTENTS_CHECKED = 10_000
_NUM_NAMED = 5


@dataclass(frozen=True)
class Plan:
    """A config with everything it leaves open decided, and its data at hand.

    Attributes:
        config: as it was given, what it left open filled in.
        reader: makes the model's inputs of Documents.
        train_reader: the same for training, where pictures may be smaller.
        train: what to train on.
        validation: what the validation loss is measured on.
        callbacks: with datasets for their evaluation data.
        batch: of training.
        validation_batch: of validation.
        augmentation: recipe by which pictures are varied in training.
    """

    config: RunConfig
    backbone: Backbone
    spec: ModelSpec
    reader: InputReader
    train_reader: InputReader
    train: Dataset
    validation: Dataset | None
    callbacks: list[CallbackDescription]
    batch: BatchShape
    validation_batch: BatchShape
    augmentation: str
    parent: Artifact | None

    def datasets(self) -> dict[str, Dataset]:
        """Every dataset, by the name that errors call it."""
        found = {'train_data': self.train}
        if self.validation is not None:
            found['eval_data'] = self.validation
        for number, callback in enumerate(self.callbacks):
            for option in ('query_data', 'index_data'):
                if getattr(callback, option, None) is not None:
                    found[f'callbacks.{number}.{option}'] = getattr(callback, option)
        return found


def make_plan(config: RunConfig, data: Mapping[str, Sequence[Document]]) -> Plan:
    """Decide what the config leaves open, and check it against the data.

    Args:
        config: its `model_artifact`, if any, being a path.
        data: Documents under 'train_data', 'eval_data', 'callbacks.<i>.query_data' and
            'callbacks.<i>.index_data'.

    Raises:
        ConfigError: a name, option or combination in the config is wrong.
        DataError: the Documents cannot be trained or evaluated on.
        ArtifactError: the artifact to continue from is damaged.
    """
    parent = load_artifact(config.model_artifact) if config.model_artifact else None
    backbone = get_backbone(config.model) if parent is None else _parent_backbone(config, parent)
    train = build_named_dataset(data['train_data'], 'train_data')
    _check_modality(backbone, train)
    check_sampler(config.sampler, train.kind)
    config = _filled_in(config, backbone, train)
    spec = _with_lengths(config, parent.spec if parent else _model_spec(config, backbone))
    config = config.copy(update={'matryoshka_dims': spec.matryoshka_dims})
    if config.model_options.get('lora') is not None:
        from finetuner.models.lora import check_lora

        check_lora(backbone, config.model_options, config.freeze)
    reader = parent.build_reader() if parent else _reader(backbone, spec)
    validation = None
    if data.get('eval_data') is not None:
        validation = build_named_dataset(data['eval_data'], 'eval_data')
        if validation.kind != train.kind:
            raise DataError(
                f'eval_data is of kind {validation.kind} and train_data of kind {train.kind}: the '
                'validation loss is that of training; for retrieval on other data use '
                'EvaluationCallback'
            )
    plan = Plan(
        config=config,
        backbone=backbone,
        spec=spec,
        reader=reader,
        train_reader=_train_reader(config, spec, reader),
        train=train,
        validation=validation,
        callbacks=_callbacks(
            config,
            data,
            validation is not None or config.val_split > 0,
            TOWERS if isinstance(backbone, TextImageBackbone) else (),
        ),
        batch=BatchShape(
            0, _items_per_class(config, train), config.views_per_instance, config.sampler
        ),
        validation_batch=BatchShape(0),
        augmentation=_augmentation(config, spec, train),
        parent=parent,
    )
    if config.on_broken == 'skip':
        plan = leave_out_broken(plan)
    return _with_batches(plan, config)


def _check_modality(backbone: Backbone, train: Dataset) -> None:
    """Pairs of texts and pictures are for models of both, and nothing else is."""
    both, pairs = isinstance(backbone, TextImageBackbone), train.kind == 'text_image_pair'
    if pairs and not both:
        raise DataError(
            'train_data: these Documents are text-image pairs, which only models with a tower for '
            f'texts and one for pictures learn from, such as {DEFAULT_TEXT_IMAGE_BACKBONE!r}, and '
            f'{backbone.name} has one tower; see docs/data.md#pairs'
        )
    if both and not pairs:
        raise DataError(
            f'train_data: these Documents are {KIND_NAMES[train.kind]}, and {backbone.name} learns '
            'from text-image pairs: two chunks, of modality text and image; see docs/data.md#pairs'
        )


def _items_per_class(config: RunConfig, train: Dataset) -> int:
    """As many as asked for, but where the batch is ours to choose, so many that none comes twice.

    Varied, an item may come twice, as one more of its class, while two classes fit into a batch.
    """
    if not isinstance(train, ClassDataset) or config.batch_size is not None:
        return config.num_items_per_class
    varied = config.augmentation not in (None, 'none')
    most = max(int(train.class_sizes.max()), len(train) // 2 if varied else 0)
    return min(config.num_items_per_class, most)


def _filled_in(config: RunConfig, backbone: Backbone, train: Dataset) -> RunConfig:
    fits = isinstance(train, ClassDataset) and can_whiten(train)
    if config.whiten and not fits:
        raise ConfigError(
            f'whiten=True fits a map to how Documents of one class differ, and these {train.kind} '
            'data do not tell: it takes class data, with several Documents of most classes'
        )
    if config.whiten and config.model_artifact is not None:
        raise ConfigError(
            'whiten=True is for the start from a pretrained model, and not together with '
            'model_artifact: leave it out'
        )
    return apply_recipe(config, backbone, train.kind, fits)


def _model_spec(config: RunConfig, backbone: Backbone) -> ModelSpec:
    inputs = input_spec(backbone, parse_options(backbone, config.model_options))
    if isinstance(backbone, TextImageBackbone):
        check_output_dim(backbone, config.output_dim)
    dimension = config.output_dim or backbone.dimension
    whitening = bool(config.whiten)
    return ModelSpec(backbone.name, dimension, inputs, config.output_dim, whitening)


def _with_lengths(config: RunConfig, spec: ModelSpec) -> ModelSpec:
    """The lengths asked for; those of the artifact that training goes on from when none are."""
    lengths = config.matryoshka_dims or spec.matryoshka_dims
    return replace(spec, matryoshka_dims=check_lengths(lengths, spec.dimension))


def _reader(backbone: Backbone, spec: ModelSpec) -> InputReader:
    return build_reader(spec.inputs, backbone_tokenizer(backbone))


def _train_reader(config: RunConfig, spec: ModelSpec, reader: InputReader) -> InputReader:
    """A reader of pictures of another size for training, the same where that is no other."""
    size = config.model_options.get('train_input_size')
    if size is None:
        return reader
    if isinstance(reader, TextImageReader):
        smaller = PictureReader(replace(spec.inputs.picture, input_size=size))  # type: ignore[union-attr]
        return TextImageReader(reader.text, smaller)
    return build_reader(replace(spec.inputs, input_size=size))


def _augmentation(config: RunConfig, spec: ModelSpec, train: Dataset) -> str:
    """The one asked for; by default two views of an unlabelled picture must differ."""
    if config.augmentation is not None:
        return config.augmentation
    of_pictures = not isinstance(spec.inputs, TextSpec)
    return 'strong' if train.kind == 'instance' and of_pictures else 'none'


def _with_batches(plan: Plan, config: RunConfig) -> Plan:
    train, validation = plan.train, plan.validation
    _check('train_data', train)
    if validation is None and config.val_split:
        train, validation = split_dataset(train, config.val_split, config.seed)
    most = most_in_a_batch(plan.backbone, train.kind)
    batch = resolve_batch(plan.batch, config.batch_size, train, most)
    _check('train_data', train, batch)
    validation_shape = batch
    if validation is not None:
        _check('eval_data', validation)
        validation_shape = validation_batch(batch, validation)
        _check('eval_data', validation, validation_shape)
    settled: dict[str, Any] = {'batch_size': batch.size, 'augmentation': plan.augmentation}
    if batch.num_items_per_class is not None:
        settled['num_items_per_class'] = batch.num_items_per_class
    return replace(
        plan,
        config=plan.config.copy(update=settled),
        train=train,
        validation=validation,
        batch=batch,
        validation_batch=validation_shape,
    )


def _parent_backbone(config: RunConfig, parent: Artifact) -> Backbone:
    """The backbone of the artifact to go on from, which must be the one that the config names."""
    backbone = parent.backbone
    name = ALIASES.get(config.model, config.model)
    if backbone.name not in (name, Path(name).expanduser().name):
        raise ConfigError(
            f'model {config.model!r} is not that of the artifact to go on from: pass '
            f'model={backbone.name!r}'
        )
    if set(config.model_options) - {'train_input_size', 'lora'} or config.output_dim is not None:
        raise ConfigError(
            'model_options (but for train_input_size and lora) and output_dim are those of the '
            'artifact that training goes on from: leave them out together with model_artifact'
        )
    return backbone


def _check(name: str, dataset: Dataset, shape: BatchShape | None = None) -> None:
    size = None if shape is None or shape.sampler == 'random' else shape.size
    items, views = (shape.num_items_per_class, shape.views_per_instance) if shape else (None, 2)
    try:
        check_training_data(dataset, size, items, views)
    except DataError as error:
        raise DataError(f'{name}: {error}') from error


def _callbacks(
    config: RunConfig,
    data: Mapping[str, Sequence[Document]],
    has_validation_data: bool,
    towers: Sequence[str],
) -> list[CallbackDescription]:
    """The callbacks' descriptions, datasets in the place of references."""
    descriptions = [
        parse_callback(
            callback.name,
            dict(callback.options),
            {
                option: data.get(f'callbacks.{position}.{option}')
                for option in ('query_data', 'index_data')
                if callback.options.get(option) is not None
            },
        )
        for position, callback in enumerate(config.callbacks)
    ]
    lengths = config.matryoshka_dims
    return prepare_callbacks(descriptions, has_validation_data, lengths, towers)  # type: ignore[return-value]


def check_contents(plan: Plan) -> None:
    """Read the contents of all data, up to 10,000 of each spread over all of it.

    Raises:
        ContentError: some cannot be read; says which, why, and how many there are.
    """
    for name, dataset in plan.datasets().items():
        broken = find_broken(dataset, plan.reader, MAX_CONTENTS_CHECKED)
        if broken:
            named = [broken[index] for index in sorted(broken)[:_NUM_NAMED]]
            more = f'; and {len(broken) - _NUM_NAMED} more' if len(broken) > _NUM_NAMED else ''
            many = f'{len(broken)} {plan.reader.failure}: ' if len(broken) > 1 else ''
            raise plan.reader.error(
                f'{name}: {many}{"; ".join(named)}{more}. Mend or remove them, or leave them out '
                "with on_broken='skip'"
            )


def leave_out_broken(plan: Plan) -> Plan:
    """Drop Documents whose contents cannot be read, as far as they are looked at before training.

    Of training data 10,000 are; those among the others are left out when their batch comes, and so
    are matches of sessions. Evaluation data is opened as a whole: what is missing in the middle of
    it would shift the rest.

    Returns:
        The plan with what is left; what is not is counted and named in the log.

    Raises:
        ContentError: nothing is left of a dataset.
    """
    reader = plan.reader
    callbacks: list[CallbackDescription] = []
    for number, callback in enumerate(plan.callbacks):
        kept: dict[str, Any] = {
            option: openable(dataset, reader, len(dataset), f'callbacks.{number}.{option}')
            for option in ('query_data', 'index_data')
            if (dataset := getattr(callback, option, None)) is not None
        }
        callbacks.append(replace(callback, **kept))
    train = openable(plan.train, reader, MAX_CONTENTS_CHECKED, 'train_data')
    validation = plan.validation
    if validation is not None:
        validation = openable(validation, reader, MAX_CONTENTS_CHECKED, 'eval_data')
    return replace(plan, train=train, validation=validation, callbacks=callbacks)
