"""A small network of the zoo with sensible statistics, to make artifacts of in tests."""

from __future__ import annotations

import numpy as np
import torch

from finetuner.artifact import ModelSpec
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import PictureSpec, get_backbone

SIZE = 32
NAME = 'mobilenet_v3_small'


def pictures(number=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, SIZE, SIZE, 3), dtype=np.uint8)


def make_model(output_dim=16, seed=0):
    torch.manual_seed(seed)
    options = {'weights': 'none', 'input_size': SIZE}
    model = build_embedding_model(get_backbone(NAME), options, output_dim)
    # statistics of real activations: an untrained network would give every picture one embedding
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    shades = np.random.default_rng(9).integers(0, 256, (16, 1, 1, 3), dtype=np.uint8)
    with torch.no_grad():
        model.train()(torch.from_numpy(pictures(16, seed=9) // 4 + shades // 4 * 3))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def make_spec(output_dim=16):
    return ModelSpec(NAME, output_dim or 576, PictureSpec(SIZE), output_dim)


def cosine(a, b):
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def assert_same_vectors(found, expected, tolerance=1e-4):
    """Each vector within `tolerance` of its own length."""
    distance = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert distance.max() <= tolerance
