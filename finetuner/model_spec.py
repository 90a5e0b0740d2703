"""What an artifact says of its model: how it is built, where it comes from, and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from finetuner.excepts import ArtifactError
from finetuner.models.backbones import (
    OWN_POOLER,
    POOLERS,
    TEXT_TOWER,
    VISION_TOWER,
    InputSpec,
    PictureSpec,
    TextImageBackbone,
    TextImageSpec,
    TextSpec,
)
from finetuner.models.options import PICTURE_POOLERS, PicturePooler
from finetuner.precision_record import PrecisionRecord, precision_lines
from finetuner.significance import p_value_text

MANIFEST = 'artifact.json'
# room is made for it before the weights are looked at
_MAX_DIMENSION = 1 << 16


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build an embedding model again, its weights aside.

    Attributes:
        backbone: its name in the zoo.
        dimension: length of the embedding.
        inputs: how contents become the model's input.
        output_dim: length asked of the projection head, None without one.
        whitening: whether the projection head is a `Whitening`; of texts it is one of the
            dense layers that their folder lists.
        alignment: whether the projection head is an `Alignment`.
        matryoshka_dims: lengths at which the beginning of an embedding was trained to be a good
            embedding, in order.
    """

    backbone: str
    dimension: int
    inputs: InputSpec
    output_dim: int | None = None
    whitening: bool = False
    alignment: bool = False
    matryoshka_dims: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values: the specification of inputs stands under `picture`, `text`, or both."""
        inputs = self.inputs
        if isinstance(inputs, TextImageSpec):
            takes = asdict(inputs)
        else:
            takes = {'picture' if isinstance(inputs, PictureSpec) else 'text': asdict(inputs)}
        return {
            'backbone': self.backbone,
            'dimension': self.dimension,
            **takes,
            'output_dim': self.output_dim,
            'whitening': self.whitening,
            'matryoshka_dims': list(self.matryoshka_dims),
            'alignment': self.alignment,
        }

    def tower_specs(self, backbone: TextImageBackbone) -> dict[str, ModelSpec]:
        """What to say of each tower of a model of texts and pictures."""
        inputs = self.inputs
        if not isinstance(inputs, TextImageSpec):
            raise TypeError(f'{self.backbone} has no towers')
        text, picture, joined = backbone.text, backbone.picture, backbone.joined
        lengths = self.matryoshka_dims
        of_text = ModelSpec(text.name, self.dimension, inputs.text, self.output_dim)
        of_pictures = ModelSpec(picture.name, self.dimension, inputs.picture, alignment=joined)
        return {
            TEXT_TOWER: replace(of_text, matryoshka_dims=lengths),
            VISION_TOWER: replace(of_pictures, matryoshka_dims=lengths),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` gave.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        try:
            dimension, output_dim = int(values['dimension']), values['output_dim']
            output_dim = None if output_dim is None else int(output_dim)
            sizes = (dimension, dimension if output_dim is None else output_dim)
            if not all(1 <= size <= _MAX_DIMENSION for size in sizes):
                raise ValueError('dimension or output_dim is out of range')
            return cls(
                backbone=str(values['backbone']),
                dimension=dimension,
                inputs=_input_spec(values),
                output_dim=output_dim,
                whitening=bool(values.get('whitening', False)),
                matryoshka_dims=_lengths(values.get('matryoshka_dims', ()), dimension),
                alignment=bool(values.get('alignment', False)),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f'{MANIFEST} does not describe its model: {error!r}') from error


def _input_spec(values: Mapping[str, Any]) -> InputSpec:
    if 'text' not in values:
        return _picture_spec(values['picture'])
    text = _text_spec(values['text'])
    return TextImageSpec(text, _picture_spec(values['picture'])) if 'picture' in values else text


def _lengths(values: Sequence[Any], dimension: int) -> tuple[int, ...]:
    lengths = tuple(int(value) for value in values)
    if not all(1 <= length < dimension for length in lengths):
        raise ValueError('matryoshka_dims are out of range')
    return lengths


def _picture_spec(values: Mapping[str, Any]) -> PictureSpec:
    mean, std = (tuple(map(float, values[name])) for name in ('mean', 'std'))
    size = int(values['input_size'])
    if not 1 <= size <= 1024 or {len(mean), len(std)} != {3}:
        raise ValueError('input_size, mean or std is out of range')
    return PictureSpec(size, mean, std, _picture_pooler(values.get('pooler')))


def _picture_pooler(values: Mapping[str, Any] | None) -> PicturePooler:
    """Artifacts written before there was a choice say nothing of it."""
    if values is None:
        return PicturePooler()
    name, p, eps = str(values['name']), float(values['p']), float(values['eps'])
    if name not in PICTURE_POOLERS or not 0 < p < float('inf') or not eps > 0:
        raise ValueError('pooler is out of range')
    return PicturePooler(name, p, eps, bool(values['trainable']))


def _text_spec(values: Mapping[str, Any]) -> TextSpec:
    length, pooler = int(values['max_length']), str(values['pooler'])
    if length < 1 or pooler not in (*POOLERS, OWN_POOLER):
        raise ValueError('max_length or pooler is out of range')
    return TextSpec(length, pooler, bool(values['normalize']))


@dataclass(frozen=True)
class TrainingRecord:
    """Where a model comes from; kept in the artifact and shown in its card.

    Attributes:
        config: the run's `RunConfig` as JSON values, None for a model that was not trained here.
        metrics: retrieval metrics by stage, `before` and `after`, and p-values under `p_value`.
        parent: id of the artifact that training went on from.
        num_documents: training Documents.
    """

    config: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    parent: str | None = None
    num_documents: int | None = None


def model_card(
    spec: ModelSpec, record: TrainingRecord, precision: PrecisionRecord | None = None
) -> str:
    """The README of an artifact: what the model takes and gives, how it was trained, how it does."""
    config = record.config or {}
    lines = [f'# Embedding model from {spec.backbone}', '', *_usage(spec)]
    if spec.matryoshka_dims:
        lengths = ', '.join(map(str, spec.matryoshka_dims))
        lines += ['', f'The first {lengths} values of an embedding are embeddings, too.']
    if record.num_documents is not None:
        named = ('loss', 'optimizer', 'learning_rate', 'epochs', 'batch_size', 'scheduler', 'seed')
        settings = ', '.join(f'{name} {config[name]}' for name in named if config.get(name))
        lines += ['', f'Trained on {record.num_documents} labelled Documents: {settings}.']
    if record.metrics:
        lines += ['', *_metrics_table(record.metrics)]
    if precision is not None:
        lines += ['', *precision_lines(precision)]
    return '\n'.join(lines) + '\n'


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    stages = [stage for stage in ('before', 'after') if stage in metrics]
    p_values = metrics.get('p_value', {})
    columns = [*stages, *(['change'] if p_values else [])]
    lines = [f'| metric | {" | ".join(columns)} |', '|---' * (len(columns) + 1) + '|']
    for name in metrics[stages[-1]]:
        values = [f'{metrics[stage].get(name, float("nan")):.4f}' for stage in stages]
        if p_values:
            values.append(p_value_text(p_values[name]) if name in p_values else '')
        lines.append(f'| {name} | {" | ".join(values)} |')
    if p_values:
        lines += [
            '',
            'p: how probable a change of at least this size would be if the model were as good '
            'after as before (paired t-test over the queries).',
        ]
    return lines


def _usage(spec: ModelSpec) -> list[str]:
    """How to embed with it, in Markdown."""
    what = f'to embeddings of length {spec.dimension}. Compare them by cosine.'
    if isinstance(spec.inputs, TextImageSpec):
        return [
            f'Maps texts and pictures {what}',
            '',
            '```python',
            'import finetuner',
            f"model = finetuner.get_model('<this directory>', select_model='{TEXT_TOWER}')",
            "embeddings = finetuner.encode(model=model, data=['a text'])",
            '```',
            '',
            f'`{VISION_TOWER}` embeds pictures.',
        ]
    if isinstance(spec.inputs, PictureSpec):
        size = spec.inputs.input_size
        takes, example = f'pictures, resized to {size} x {size} pixels,', 'picture.jpg'
    else:
        takes, example = f'texts, cut to {spec.inputs.max_length} tokens,', 'a text'
    lines = [
        f'Maps {takes} {what}',
        '',
        '```python',
        'import finetuner',
        "model = finetuner.get_model('<this directory>')",
        f"embeddings = finetuner.encode(model=model, data=['{example}'])",
        '```',
    ]
    if isinstance(spec.inputs, TextSpec) and spec.inputs.pooler != OWN_POOLER:
        lines += ['', "Or with sentence-transformers: `SentenceTransformer('<this directory>')`."]
    return lines
