"""What a folder with a text encoder says of itself, laid out as sentence-transformers lays it out.

Such a folder holds a transformer (`config.json`, weights, tokenizer) and, in `modules.json`, what
comes after it: how tokens are pooled, dense layers, whether embeddings are brought to length 1. A
folder without `modules.json` is a bare transformer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuner.excepts import ConfigError
from finetuner.models.backbones import OWN_POOLER, POOLERS, TOKENIZER, TextOptions, TextSpec
from finetuner.models.clip import clip_text_layout
from finetuner.models.transformers_import import as_config_error, import_transformers, quiet

MODULES = 'modules.json'
LENGTHS = 'sentence_bert_config.json'
TRANSFORMER, POOLING, DENSE, NORMALIZE = 'Transformer', 'Pooling', 'Dense', 'Normalize'
_DEFAULT_LENGTH = 512
# their first place is not the first of the table, but the one after that of the padding
_COUNTS_FROM_PADDING = (
    'camembert',
    'data2vec-text',
    'esm',
    'ibert',
    'longformer',
    'mpnet',
    'roberta',
    'roberta-prelayernorm',
    'xlm-roberta',
    'xlm-roberta-xl',
    'xmod',
)
_VOCABULARIES = (
    TOKENIZER,
    'vocab.txt',
    'vocab.json',
    'spiece.model',
    'sentencepiece.bpe.model',
    'tokenizer.model',
)


@dataclass(frozen=True)
class TextLayout:
    """What a folder says of its model, its weights aside.

    Attributes:
        folder: where it lies.
        transformer: where in it the transformer lies.
        spec: how texts become its input.
        head: what comes between pooling and the end: folders of dense layers, and None where
            embeddings are brought to length 1.
        dimension: length of the embedding.
        num_positions: most tokens that the transformer can take, None where it has no limit.
    """

    folder: Path
    transformer: Path
    spec: TextSpec
    head: tuple[Path | None, ...]
    dimension: int
    num_positions: int | None


def read_layout(folder: Path) -> TextLayout:
    """Read what a folder says of its model; no weights are loaded.

    Raises:
        ConfigError: it holds no transformer, or modules that are not known here.
    """
    places = _modules(folder)
    for kind, _ in places:
        if kind not in (TRANSFORMER, POOLING, DENSE, NORMALIZE):
            raise ConfigError(
                f'model {folder.name!r} has a module of the type {kind!r}; known are a Transformer, '
                'Pooling, Dense layers and Normalize. Pass the folder of its transformer alone'
            )
    order = [kind for kind, _ in places]
    after = 2 if order[1:2] == [POOLING] else 1
    if order and (order[0] != TRANSFORMER or {TRANSFORMER, POOLING} & set(order[after:])):
        raise ConfigError(
            f'model {folder.name!r} is made of {", ".join(order)}; known is a {TRANSFORMER}, its '
            f'{POOLING}, and then {DENSE} layers and {NORMALIZE}'
        )
    inner = {kind: _inside(folder, path) for kind, path in places}
    transformer = _transformer_folder(folder)
    config = load_config(transformer)
    own = clip_text_layout(config)
    if own is not None:
        own_spec, own_dimension, length = own
        return TextLayout(folder, transformer, own_spec, (), own_dimension, length)
    head = [_inside(folder, path) if kind == DENSE else None for kind, path in places[after:]]
    # the last of all is no part of the head: what fine-tuning attaches comes before it
    normalizes = bool(head) and head[-1] is None
    head = head[:-1] if normalizes else head
    dimension = int(config.hidden_size)
    for place in filter(None, head):
        dimension = int(read_json(place / 'config.json')['out_features'])
    positions = _num_positions(config)
    spec = TextSpec(
        max_length=_max_length(transformer, positions),
        pooler=_pooler(folder, inner.get(POOLING)),
        normalize=normalizes,
    )
    return TextLayout(folder, transformer, spec, tuple(head), dimension, positions)


def text_spec(layout: TextLayout, options: TextOptions) -> TextSpec:
    """How texts enter a model of this layout under these options.

    Raises:
        ConfigError: texts would be longer than its transformer can take.
    """
    asked = options.max_length
    if options.pooler and layout.spec.pooler == OWN_POOLER:
        raise ConfigError(
            f'model_options pooler: {options.pooler!r} is not for a CLIP, which pools by itself: '
            'leave it out'
        )
    if asked is not None and layout.num_positions and asked > layout.num_positions:
        raise ConfigError(
            f'model_options max_length: {asked} is more than the {layout.num_positions} tokens '
            'that the model can take'
        )
    return replace(
        layout.spec,
        max_length=asked or layout.spec.max_length,
        pooler=options.pooler or layout.spec.pooler,
    )


def _num_positions(config: Any) -> int | None:
    """The most tokens that a transformer has places for."""
    positions = getattr(config, 'max_position_embeddings', None)
    if positions and config.model_type in _COUNTS_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return positions


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with a text encoder, as transformers does.

    Raises:
        ConfigError: it has none, or one that only Python can run.
    """
    transformers = import_transformers()
    place = _transformer_folder(folder)
    # without any, transformers makes a tokenizer of no words and says nothing
    if not any((place / name).is_file() for name in _VOCABULARIES):
        raise ConfigError(
            f'model {folder.name!r} has no tokenizer: it holds none of {", ".join(_VOCABULARIES)}'
        )
    with quiet(transformers), as_config_error(folder.name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if not getattr(tokenizer, 'is_fast', False):
        raise ConfigError(
            f'model {folder.name!r} has no fast tokenizer, which is needed: save one as '
            f'{TOKENIZER} in its folder'
        )
    if read_json(folder / LENGTHS, {}).get('do_lower_case'):
        _lower_case(tokenizer.backend_tokenizer)
    return tokenizer


def _lower_case(tokenizer: Any) -> None:
    from tokenizers import normalizers

    others = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])


def load_config(folder: Path) -> Any:
    """Read the config of a transformer.

    Raises:
        ConfigError: there is none, or it is not that of a text encoder.
    """
    if not (folder / 'config.json').is_file():
        raise ConfigError(
            f'{str(folder)!r} holds no transformer: it has no config.json, as folders that '
            '`save_pretrained` wrote have'
        )
    transformers = import_transformers()
    with as_config_error(folder.name):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not getattr(config, 'hidden_size', None) and config.model_type != 'clip':
        raise ConfigError(
            f'model {folder.name!r} is no text encoder: its config has no hidden_size'
        )
    return config


def _pooler(folder: Path, place: Path | None) -> str:
    """The pooling a folder asks for; the mean where it asks for none."""
    if place is None:
        return 'mean'
    config = read_json(place / 'config.json')
    flags = {'mean_tokens': 'mean', 'cls_token': 'cls', 'max_tokens': 'max'}
    modes = [config[key] for key in ('pooling_mode',) if key in config] or [
        flags.get(flag := key.removeprefix('pooling_mode_'), flag)
        for key, value in config.items()
        if key.startswith('pooling_mode_') and value is True
    ]
    if len(modes) != 1 or modes[0] not in POOLERS:
        raise ConfigError(
            f'model {folder.name!r} pools by {" and ".join(map(str, modes)) or "nothing"}; known '
            f'are {", ".join(POOLERS)}. Pass the folder of its transformer alone, with '
            'model_options pooler'
        )
    return modes[0]


def _modules(folder: Path) -> list[tuple[str, str]]:
    """The modules that a folder lists: the last part of their types, and where they lie."""
    listed = read_json(folder / MODULES, [])
    return [(str(m.get('type', '')).rpartition('.')[2], str(m.get('path', ''))) for m in listed]


def _transformer_folder(folder: Path) -> Path:
    return _inside(folder, dict(_modules(folder)).get(TRANSFORMER, ''))


def _max_length(folder: Path, num_positions: int | None) -> int:
    """The most tokens of a text: the smallest limit that its files name."""
    limits = [
        read_json(folder / LENGTHS, {}).get('max_seq_length'),
        read_json(folder / 'tokenizer_config.json', {}).get('model_max_length'),
        num_positions,
    ]
    # tokenizers without a limit name an enormous one
    found = [int(limit) for limit in limits if limit and limit < 1_000_000]
    return min(found, default=_DEFAULT_LENGTH)


def _inside(folder: Path, path: str) -> Path:
    place = (folder / path).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise ConfigError(f'{MODULES} of {folder.name!r} names {path!r}, which leaves the folder')
    return folder / path


def read_json(path: Path, default: Any = None) -> Any:
    """Read a file of such a folder; the default stands for one that is not there.

    Raises:
        ConfigError: it is no JSON, or not there and there is no default.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        if default is not None:
            return default
        raise ConfigError(f'{path.parent.name} has no {path.name}') from None
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path.name} of {path.parent.name} cannot be read: {error}') from error
