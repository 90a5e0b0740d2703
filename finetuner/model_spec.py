"""What an artifact says of its model: how it is built, where it comes from, and its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetuner.excepts import ArtifactError
from finetuner.models.backbones import POOLERS, InputSpec, PictureSpec, TextSpec
from finetuner.models.options import PICTURE_POOLERS, PicturePooler

MANIFEST = 'artifact.json'


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
    """

    backbone: str
    dimension: int
    inputs: InputSpec
    output_dim: int | None = None
    whitening: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values: the specification of inputs stands under `picture` or `text`."""
        key = 'picture' if isinstance(self.inputs, PictureSpec) else 'text'
        return {
            'backbone': self.backbone,
            'dimension': self.dimension,
            key: asdict(self.inputs),
            'output_dim': self.output_dim,
            'whitening': self.whitening,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` gave.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        try:
            dimension = int(values['dimension'])
            if dimension < 1:
                raise ValueError('dimension is out of range')
            text = values.get('text')
            return cls(
                backbone=str(values['backbone']),
                dimension=dimension,
                inputs=_picture_spec(values['picture']) if text is None else _text_spec(text),
                output_dim=None if values['output_dim'] is None else int(values['output_dim']),
                whitening=bool(values.get('whitening', False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f'{MANIFEST} does not describe its model: {error!r}') from error


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
    if length < 1 or pooler not in POOLERS:
        raise ValueError('max_length or pooler is out of range')
    return TextSpec(length, pooler, bool(values['normalize']))


@dataclass(frozen=True)
class TrainingRecord:
    """Where a model comes from; kept in the artifact and shown in its card.

    Attributes:
        config: the run's `RunConfig` as JSON values, None for a model that was not trained here.
        metrics: retrieval metrics by stage, `before` and `after`.
        parent: id of the artifact that training went on from.
        num_documents: training Documents.
    """

    config: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    parent: str | None = None
    num_documents: int | None = None


def model_card(spec: ModelSpec, record: TrainingRecord) -> str:
    """The README of an artifact: what the model takes and gives, how it was trained, how it does."""
    config = record.config or {}
    lines = [f'# Embedding model from {spec.backbone}', '', *_usage(spec)]
    if record.num_documents is not None:
        named = ('loss', 'optimizer', 'learning_rate', 'epochs', 'batch_size', 'scheduler', 'seed')
        settings = ', '.join(f'{name} {config[name]}' for name in named if config.get(name))
        lines += ['', f'Trained on {record.num_documents} labelled Documents: {settings}.']
    if record.metrics:
        stages = [stage for stage in ('before', 'after') if stage in record.metrics]
        lines += ['', f'| metric | {" | ".join(stages)} |', '|---' * (len(stages) + 1) + '|']
        for name in record.metrics[stages[-1]]:
            values = [f'{record.metrics[stage].get(name, float("nan")):.4f}' for stage in stages]
            lines.append(f'| {name} | {" | ".join(values)} |')
    return '\n'.join(lines) + '\n'


def _usage(spec: ModelSpec) -> list[str]:
    """How to embed with it, in Markdown."""
    what = f'to embeddings of length {spec.dimension}. Compare them by cosine.'
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
    if isinstance(spec.inputs, TextSpec):
        lines += ['', "Or with sentence-transformers: `SentenceTransformer('<this directory>')`."]
    return lines
