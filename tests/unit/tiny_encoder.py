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


def write_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """Write a BERT of two layers with a vocabulary of a few words and letters."""
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
