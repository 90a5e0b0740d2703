"""Losses of pairs: of two things with a score, and of a text with its picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class CosineSimilarityLoss(torch.nn.Module):
    """Mean squared difference between the cosine similarity of pairs and their scores.

    Takes the two embeddings of each pair `[num_pairs, dimension]` and scores `[num_pairs]` in
    0..1. After Reimers and Gurevych, Sentence-BERT (2019), section 3, regression objective.
    """

    def forward(self, first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
        """Compute the loss, a scalar; 0 for no pairs."""
        if not len(scores):
            return (first.sum() + second.sum()) * 0
        return torch.nn.functional.mse_loss(torch.cosine_similarity(first, second), scores)


class CLIPLoss(torch.nn.Module):
    """Cross entropy of finding the picture of each text in the batch, and the text of each picture.

    Similarities are divided by a temperature, which is learned. Where several pairs of a batch have
    the same text, all their pictures are right, each in equal parts. After Radford et al., Learning
    Transferable Visual Models From Natural Language Supervision (2021), section 2.3, and Khosla et
    al., Supervised Contrastive Learning (2020), for several that are right.

    Attributes:
        log_scale: logarithm of what similarities are multiplied by; a parameter.
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        """Begin with a temperature.

        Args:
            temperature: above 0.
            max_scale: similarities are multiplied by no more than this, however small the
                temperature becomes.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__()
        if not 0 < temperature <= 1e6 or not 0 < max_scale <= 1e6:
            raise ValueError('temperature and max_scale are above 0')
        self.max_scale = max_scale
        self.log_scale = torch.nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, texts: Tensor, pictures: Tensor, numbers: Tensor) -> Tensor:
        """Compute the loss, a scalar.

        Args:
            texts: `[num_pairs, dimension]`.
            pictures: `[num_pairs, dimension]`.
            numbers: `[num_pairs]` int, equal for equal texts.
        """
        normalize = torch.nn.functional.normalize
        with torch.no_grad():
            # the parameter and not its use: beyond a bound that has no gradient it would stay there
            self.log_scale.clamp_(max=math.log(self.max_scale))
        similarity = self.log_scale.exp() * normalize(texts) @ normalize(pictures).T
        right = (numbers[:, None] == numbers[None, :]).to(similarity.dtype)
        right = right / right.sum(dim=1, keepdim=True)
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(similarity, right) + cross_entropy(similarity.T, right)) / 2
