"""What a backbone is, what may be asked of it, and how contents become its input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, validator

from finetuner.config import whole_number_fields
from finetuner.excepts import ConfigError
from finetuner.models.options import LoraOptions, PicturePooler, PoolerOptions, pooler_field

Modality = Literal['image', 'text', 'text-image']

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH_SIZE = 16  # of the vision transformers
TOKENIZER = 'tokenizer.json'  # in the folder of a text model
POOLERS = ('mean', 'cls', 'max')
# what the transformer itself makes of a text, its own projection included: that of CLIP
OWN_POOLER = 'own'
# the two towers of a model of texts and pictures, as Finetuner called them
TEXT_TOWER, VISION_TOWER = TOWERS = ('clip-text', 'clip-vision')


class PictureOptions(BaseModel):
    """`model_options` of every picture backbone.

    Attributes:
        input_size: side in pixels that pictures are resized to; None takes the backbone's own.
        train_input_size: the same while training only; None takes `input_size`. A network trained
            on smaller pictures than it is later shown trains faster and often searches better
            (Touvron et al., Fixing the train-test resolution discrepancy, 2019).
        weights: `pretrained`, `none` (random), or the path of a state dict saved by torch
            (`.pth`, `.pt`) or safetensors.
        pooler: of convolutional networks, how the values at all positions of a picture become one:
            their `mean`, their `max`, or their generalised mean `gem` (Radenovic et al.,
            Fine-tuning CNN Image Retrieval with No Human Annotation, 2018); None takes the `mean`.
        pooler_options: of `gem`, its arguments.
    """

    input_size: int | None = Field(None, ge=32, le=1024)
    train_input_size: int | None = Field(None, ge=32, le=1024)
    weights: str = 'pretrained'
    pooler: Literal['mean', 'gem', 'max'] | None = None
    pooler_options: PoolerOptions | None = None

    _whole_numbers = whole_number_fields('input_size', 'train_input_size')
    _pooler = pooler_field('pooler')

    @validator('pooler_options')
    def _options_are_of_gem(
        cls, value: PoolerOptions | None, values: dict[str, Any]
    ) -> PoolerOptions | None:
        if value is not None and values.get('pooler') != 'gem':
            raise ValueError(
                "only the pooler gem takes options, such as {'pooler': 'gem', 'pooler_options': "
                "{'p': 4.0}}: leave them out"
            )
        return value

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


class TextOptions(BaseModel):
    """`model_options` of every text backbone.

    Attributes:
        pooler: how the embeddings of tokens become one: their `mean`, that of the first token
            (`cls`), or the `max` in each dimension; None takes what the backbone was trained with.
        max_length: tokens of a text at most, the special ones included; what is beyond is cut off.
            None takes the backbone's own.
        weights: `pretrained`, or `none` (random).
        lora: train low-rank adapters of its layers in the place of its weights (Hu et al., LoRA,
            2021); the artifact has them merged into the weights. None trains the weights.
    """

    pooler: Literal['mean', 'cls', 'max'] | None = None
    max_length: int | None = Field(None, ge=4, le=32_768)
    weights: Literal['pretrained', 'none'] = 'pretrained'
    lora: LoraOptions | None = None

    _whole_numbers = whole_number_fields('max_length')

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


class TextImageOptions(BaseModel):
    """`model_options` of every model with a tower for texts and one for pictures.

    Attributes:
        input_size: see `PictureOptions`.
        train_input_size: see `PictureOptions`.
        max_length: see `TextOptions`.
        weights: `pretrained`, or `none` (random), of both towers.
    """

    input_size: int | None = Field(None, ge=32, le=1024)
    train_input_size: int | None = Field(None, ge=32, le=1024)
    max_length: int | None = Field(None, ge=4, le=32_768)
    weights: Literal['pretrained', 'none'] = 'pretrained'

    _whole_numbers = whole_number_fields('input_size', 'train_input_size', 'max_length')

    class Config:
        """Frozen, nothing unknown."""

        frozen = True
        extra = 'forbid'


ModelOptions = PictureOptions | TextOptions | TextImageOptions


@dataclass(frozen=True)
class Backbone:
    """A pretrained model that `fit` and `build_model` know by name.

    Attributes:
        name: what users write.
        task: `image-to-image` and the like, as Finetuner called it.
        dimension: length of the embedding it gives without a projection head.
        architecture: family, for tables.
        description: one line for tables.
        weights: where pretrained weights come from.
    """

    name: str
    task: str
    dimension: int
    architecture: str
    description: str
    weights: str

    modality: ClassVar[Modality]
    options: ClassVar[type[PictureOptions] | type[TextOptions] | type[TextImageOptions]]

    @property
    def left_out_options(self) -> tuple[str, ...]:
        """Names of options of its kind that it does not take."""
        return ()


@dataclass(frozen=True)
class PictureBackbone(Backbone):
    """A backbone that embeds pictures.

    Attributes:
        input_size: side of the square picture it was trained on, in pixels.
        builder: name of the function in `models.vision` that constructs it.
        head: dotted names of the modules that tailor replaces by identities.
        mean: per-channel mean of pictures scaled to 0..1.
        std: per-channel standard deviation of pictures scaled to 0..1.
        fixed_input_size: whether a size other than `input_size` changes the architecture.
        source: where its files lie, as of `TextBackbone`; empty where the builder knows.
        pooling: dotted name of the module that makes one value of those at all positions, None for
            networks without one.
    """

    input_size: int
    builder: str
    head: tuple[str, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fixed_input_size: bool = False
    source: str = ''
    pooling: str | None = None

    modality = 'image'
    options = PictureOptions

    @property
    def left_out_options(self) -> tuple[str, ...]:
        """Names of options of its kind that it does not take."""
        return () if self.pooling else ('pooler', 'pooler_options')


@dataclass(frozen=True)
class TextBackbone(Backbone):
    """A transformer that embeds texts.

    Attributes:
        source: where its files lie: `package:NAME` for those that a package carries, a folder, or
            its name on the Hugging Face hub.
    """

    source: str

    modality = 'text'
    options = TextOptions


@dataclass(frozen=True)
class TextImageBackbone(Backbone):
    """Two backbones whose embeddings of a text and of a picture can be compared, once trained.

    Attributes:
        text: the tower of texts.
        picture: the tower of pictures.
        joined: whether the two were not trained together: the tower of pictures gets a projection
            head that takes its embeddings to where those of the texts are.
    """

    text: TextBackbone
    picture: PictureBackbone
    joined: bool = True

    modality = 'text-image'
    options = TextImageOptions


def check_output_dim(backbone: TextImageBackbone, output_dim: int | None) -> None:
    """Check that the length asked for can be had.

    Raises:
        ConfigError: the towers have projections of their own.
    """
    if output_dim is not None and not backbone.joined:
        raise ConfigError(
            f'output_dim={output_dim}: the towers of {backbone.name} have their projections, of '
            f'length {backbone.dimension}: leave it out'
        )


@dataclass(frozen=True)
class PictureSpec:
    """How a picture becomes the input of a model, and its positions one; kept in the artifact.

    Attributes:
        input_size: side in pixels; pictures enter as uint8 `[batch, input_size, input_size, 3]`.
        mean: per-channel mean in 0..1, subtracted inside the graph.
        std: per-channel standard deviation in 0..1, divided by inside the graph.
        pooler: of convolutional networks.
    """

    input_size: int
    mean: tuple[float, ...] = field(default=IMAGENET_MEAN)
    std: tuple[float, ...] = field(default=IMAGENET_STD)
    pooler: PicturePooler = field(default=PicturePooler())

    modality: ClassVar[Modality] = 'image'


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes the input of a model, and its tokens one embedding; kept in the artifact.

    Attributes:
        max_length: tokens of a text at most, the special ones included.
        pooler: one of `POOLERS`, or `OWN_POOLER`.
        normalize: whether embeddings leave the model at length 1.
    """

    max_length: int
    pooler: str = 'mean'
    normalize: bool = False

    modality: ClassVar[Modality] = 'text'


@dataclass(frozen=True)
class TextImageSpec:
    """How the contents of a pair become the input of two towers; kept in the artifact.

    Attributes:
        text: of the tower of texts.
        picture: of the tower of pictures.
    """

    text: TextSpec
    picture: PictureSpec

    modality: ClassVar[Modality] = 'text-image'


InputSpec = PictureSpec | TextSpec | TextImageSpec
