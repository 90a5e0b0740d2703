"""A transformer small enough to train in a test, in a folder as `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from finetuner.models.transformers_import import import_transformers

WORDS = [
    'red',
    'green',
    'blue',
    'shoe',
    'hat',
    'coat',
    'left',
    'right',
    'small',
    'large',
    'the',
    'a',
    'of',
    'and',
    'with',
    'dog',
    'cat',
]
DIMENSION = 16
NUM_POSITIONS = 40


def write_tiny_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer of a few words and letters; returns its vocabulary."""
    transformers = import_transformers()
    letters = 'abcdefghijklmnopqrstuvwxyz0123456789.;,'
    tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *WORDS]
    tokens += [f'{prefix}{letter}' for prefix in ('', '##') for letter in letters]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]',
        special_tokens=[(name, vocabulary[name]) for name in ('[CLS]', '[SEP]')],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token='[PAD]',
        unk_token='[UNK]',
        cls_token='[CLS]',
        sep_token='[SEP]',
        model_max_length=32,
    ).save_pretrained(folder)
    return vocabulary


def write_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a BERT of two layers with a vocabulary of a few words and letters."""
    transformers = import_transformers()
    vocabulary = write_tiny_tokenizer(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=DIMENSION,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=NUM_POSITIONS,
    )
    # wide enough that texts differ before any training
    network = transformers.BertModel(config)
    with torch.no_grad():
        network.embeddings.word_embeddings.weight.mul_(20)
    network.save_pretrained(folder)
    return folder


CLIP_SIZE = 32


def write_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write a CLIP of two layers a tower, for pictures of 32 pixels."""
    transformers = import_transformers()
    vocabulary = write_tiny_tokenizer(folder)
    torch.manual_seed(seed)
    shared = {
        'hidden_size': DIMENSION,
        'intermediate_size': 32,
        'num_hidden_layers': 2,
        'num_attention_heads': 2,
        'projection_dim': 12,
    }
    config = transformers.CLIPConfig(
        text_config={
            **shared,
            'vocab_size': len(vocabulary),
            'max_position_embeddings': NUM_POSITIONS,
            'eos_token_id': vocabulary['[SEP]'],
            'bos_token_id': vocabulary['[CLS]'],
            'pad_token_id': vocabulary['[PAD]'],
        },
        vision_config={**shared, 'image_size': CLIP_SIZE, 'patch_size': 16},
        projection_dim=12,
    )
    network = transformers.CLIPModel(config)
    with torch.no_grad():
        # wide enough that texts and pictures differ before any training
        network.text_model.embeddings.token_embedding.weight.mul_(50)
        network.vision_model.embeddings.patch_embedding.weight.mul_(10)
    network.save_pretrained(folder)
    return folder
