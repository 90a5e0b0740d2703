"""Whitening: similar things scatter alike in all directions, and are found more often for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.data.datasets import ClassDataset
from finetuner.evaluation import evaluate_embeddings
from finetuner.models.whitening import Whitening
from finetuner.training import whitening
from finetuner.training.whitening import can_whiten, whitening_sample

NUM_CLASSES, PER_CLASS, DIMENSION = 60, 5, 8


def clouds(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Classes told apart by two directions of eight, and drowned by how they scatter in others."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
    centres = generator.normal(size=(NUM_CLASSES, DIMENSION)) * [2, 2, *[0.05] * (DIMENSION - 2)]
    scatter = generator.normal(size=(len(labels), DIMENSION)) * [0.1, 0.1, *[1.5] * (DIMENSION - 2)]
    mixing = np.linalg.qr(generator.normal(size=(DIMENSION, DIMENSION)))[0]
    return torch.from_numpy((centres[labels] + scatter) @ mixing + 5).float(), labels


def fitted(values: torch.Tensor, labels: np.ndarray, **arguments: object) -> Whitening:
    module = Whitening(values.shape[1], **arguments)
    module.fit(values, labels)
    return module


def r_precision(values: torch.Tensor, labels: np.ndarray) -> float:
    ids = [str(number) for number in range(len(labels))]
    metrics = evaluate_embeddings(
        values.numpy(),
        labels.tolist(),
        values.numpy(),
        labels.tolist(),
        query_ids=ids,
        index_ids=ids,
    )
    return metrics['r_precision']


def test_it_passes_on_what_it_gets_until_it_is_fitted():
    values, labels = clouds()
    module = Whitening(DIMENSION, output_dim=3)
    assert module(values) is values
    module.fit(values, labels)
    assert module(values).shape == (len(values), 3)


def test_similar_things_scatter_alike_in_all_directions(monkeypatch):
    monkeypatch.setattr('finetuner.models.whitening._SHRINKAGE', 0)
    values, labels = clouds()
    out = fitted(values, labels)(values).double().numpy()
    means = np.stack([out[labels == label].mean(axis=0) for label in range(NUM_CLASSES)])
    within = np.cov(out - means[labels], rowvar=False)
    np.testing.assert_allclose(within / within[0, 0], np.eye(DIMENSION), atol=1e-3)
    assert np.linalg.norm(out, axis=1).mean() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize('output_dim', [None, 4])
def test_more_is_found_also_of_classes_it_was_not_fitted_to(output_dim):
    values, labels = clouds()
    module = fitted(values[: 40 * PER_CLASS], labels[: 40 * PER_CLASS], output_dim=output_dim)
    others, of_others = values[40 * PER_CLASS :], labels[40 * PER_CLASS :]
    before, after = (r_precision(each, of_others) for each in (others, module(others)))
    assert after > 1.5 * before


def test_fewer_things_than_dimensions():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 64, generator=generator)
    out = fitted(values, np.repeat(np.arange(10), 2))(values)
    assert out.isfinite().all()
    assert out.norm(dim=1).mean() == pytest.approx(1, abs=1e-3)


def test_equal_things_do_not_break_it():
    values = torch.ones(20, 4)
    assert fitted(values, np.repeat(np.arange(10), 2))(values).isfinite().all()


def test_roots_keep_signs_and_have_slopes():
    module = fitted(*clouds(), takes_roots=True)
    values = torch.tensor([[-4.0, 0, 9, 0, 0, 0, 0, 0]], requires_grad=True)
    rooted = module._rooted(values)
    torch.testing.assert_close(rooted[0, :3], torch.tensor([-2.0, 0, 3]), atol=1e-3, rtol=0)
    rooted.sum().backward()
    assert values.grad.isfinite().all()


def test_no_optimizer_changes_it():
    module = fitted(*clouds())
    assert not [p for p in module.parameters() if p.requires_grad]


def dataset(*counts: int) -> ClassDataset:
    return ClassDataset(
        DocumentArray(
            Document(text=f'{label} {i}', tags={'finetuner_label': label})
            for label, count in enumerate(counts)
            for i in range(count)
        )
    )


def test_what_data_it_takes():
    assert can_whiten(dataset(9, 9))
    assert not can_whiten(dataset(9, 8))
    assert not can_whiten(dataset(*[1] * 100, 2))


def test_the_sample_has_several_items_of_each_class(monkeypatch):
    data = dataset(1, 30, 2, 3, 1)
    sampled = whitening_sample(data, seed=0)
    counts = {label: list(sampled.labels).count(label) for label in set(sampled.labels)}
    assert sorted(counts.values()) == [2, 3, 8]
    assert all(not content.startswith(('0', '4')) for content, _ in sampled)
    monkeypatch.setattr(whitening, 'MAX_ITEMS', 10)
    few = whitening_sample(dataset(*[4] * 50), seed=0)
    assert len(few) == 10
    assert len(set(few.labels)) == 3
    again = whitening_sample(dataset(*[4] * 50), seed=0)
    assert [content for content, _ in few] == [content for content, _ in again]
    assert [content for content, _ in whitening_sample(dataset(*[4] * 50), seed=1)] != [
        content for content, _ in few
    ]
