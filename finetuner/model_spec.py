"""What an artifact says of its model: how it is built, where it comes from, and its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.excepts import ArtifactError
from finetuner.models.zoo import PictureSpec

MANIFEST = 'artifact.json'


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build an embedding model again, its weights aside.

    Attributes:
        backbone: its name in the zoo.
        dimension: length of the embedding.
        picture: how a picture becomes the model's input.
        output_dim: length asked of the projection head, None without one.
    """

    backbone: str
    dimension: int
    picture: PictureSpec
    output_dim: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Read what `asdict` gave.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        try:
            picture = values['picture']
            mean, std = (tuple(map(float, picture[name])) for name in ('mean', 'std'))
            size, dimension = int(picture['input_size']), int(values['dimension'])
            if dimension < 1 or not 1 <= size <= 1024 or {len(mean), len(std)} != {3}:
                raise ValueError('dimension, input_size, mean or std is out of range')
            return cls(
                backbone=str(values['backbone']),
                dimension=dimension,
                picture=PictureSpec(size, mean, std),
                output_dim=None if values['output_dim'] is None else int(values['output_dim']),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f'{MANIFEST} does not describe its model: {error!r}') from error


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
    lines = [
        f'# Embedding model from {spec.backbone}',
        '',
        f'Maps pictures, resized to {spec.picture.input_size} x {spec.picture.input_size} pixels, '
        f'to embeddings of length {spec.dimension}. Compare them by cosine.',
        '',
        '```python',
        'import finetuner',
        "model = finetuner.get_model('<this directory>')",
        "embeddings = finetuner.encode(model=model, data=['picture.jpg'])",
        '```',
    ]
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
