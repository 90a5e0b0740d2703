"""Every metric equals its definition, docarray's own and, where both define it, ranx's."""

import math
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray
from docarray.math import evaluation as docarray_metrics

from finetuner import evaluation
from finetuner.evaluation import evaluate_embeddings, search
from finetuner.excepts import ConfigError, DataError

NAMES = [
    'precision_at_k',
    'recall_at_k',
    'f1_score_at_k',
    'hit_at_k',
    'average_precision',
    'reciprocal_rank',
    'dcg_at_k',
    'ndcg_at_k',
    'r_precision',
]


def rows(count: int = 200, found: int = 12, seed: int = 0) -> torch.Tensor:
    """Random relevances, from none to all."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((count, found)) < rng.random((count, 1)) ** 2)


def labelled(seed: int = 0, num_query: int = 40, num_index: int = 150) -> tuple:
    """Embeddings that are near their class's centre, so that metrics are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((10, 8))
    query_labels = rng.integers(0, 10, num_query)
    index_labels = np.concatenate([np.arange(10), rng.integers(0, 10, num_index - 10)])
    near = [centres[labels] + rng.standard_normal((len(labels), 8)) * 0.8 for labels in
            (query_labels, index_labels)]  # fmt: skip
    return near[0], query_labels.tolist(), near[1], index_labels.tolist()


def call(name: str, relevant: torch.Tensor, num_relevant: torch.Tensor, k: int | None) -> list:
    metric = getattr(evaluation, name)
    if name in ('average_precision', 'reciprocal_rank', 'r_precision'):
        return metric(relevant).tolist()
    if name in ('recall_at_k', 'f1_score_at_k'):
        return metric(relevant, num_relevant, k).tolist()
    return metric(relevant, k).tolist()


def naive_dcg(row: list[bool], k: int) -> float:
    """docarray's default: the first hit as it is, the others over log2 of their rank."""
    return sum(
        float(hit) / (1 if rank == 1 else math.log2(rank))
        for rank, hit in enumerate(row[:k], start=1)
    )


@pytest.mark.parametrize('k', [1, 2, 3, 12, None])
@pytest.mark.parametrize('name', [n for n in NAMES if 'dcg' not in n])
def test_metrics_equal_docarray(name, k):
    relevant = rows()
    num_relevant = relevant.sum(1) + torch.arange(200) % 3 + 1
    peer = getattr(docarray_metrics, name)
    wanted = [
        peer(row, max_rel=most, k=k)
        for row, most in zip(relevant.int().tolist(), num_relevant.tolist(), strict=True)
    ]
    np.testing.assert_allclose(call(name, relevant, num_relevant, k), wanted, rtol=1e-12)


@pytest.mark.parametrize('k', [1, 2, 3, 12, None])
def test_dcg_and_ndcg_equal_docarray(k, monkeypatch):
    # NumPy 2 took away the one function that docarray's own need, so lend it to them here.
    monkeypatch.setattr(np, 'asfarray', lambda a: np.asarray(a, float), raising=False)
    relevant = rows()
    for name in ('dcg_at_k', 'ndcg_at_k'):
        peer = getattr(docarray_metrics, name)
        wanted = [peer(row, k=k) for row in relevant.int().tolist()]
        np.testing.assert_allclose(call(name, relevant, None, k), wanted, rtol=1e-12)
    wanted = [naive_dcg(row, k or 12) for row in relevant.tolist()]
    np.testing.assert_allclose(evaluation.dcg_at_k(relevant, k), wanted, rtol=1e-12)


def test_hand_made_figures():
    relevant = torch.tensor([[False, True, True, False]])
    three = torch.tensor([3])
    wanted = {
        'precision_at_k': 0.5,
        'recall_at_k': 2 / 3,
        'f1_score_at_k': 4 / 7,
        'hit_at_k': 1,
        'average_precision': (1 / 2 + 2 / 3) / 2,
        'reciprocal_rank': 1 / 2,
        'dcg_at_k': 1 + 1 / math.log2(3),
        'ndcg_at_k': (1 + 1 / math.log2(3)) / 2,
        'r_precision': 1 / 2,
    }
    for name, value in wanted.items():
        assert call(name, relevant, three, None) == pytest.approx([value])


def test_nothing_found_is_zero_everywhere():
    relevant = torch.zeros(2, 5, dtype=torch.bool)
    for name in NAMES:
        assert call(name, relevant, torch.tensor([3, 0]), None) == [0, 0]


@pytest.mark.parametrize(
    ('counts', 'printed'),
    [
        # How many of 250 queries found which pattern of right (1) and wrong (0) among 3: the
        # patterns are worked out from the printed figures, which leave little choice.
        (
            {'111': 213, '110': 24, '101': 4, '100': 4, '010': 2, '001': 1, '000': 2},
            [0.936, 0.936, 0.936, 0.992, 0.9826666666666665, 0.9853333333333333, 2.486170745114311],
        ),
        (
            {'111': 220, '110': 21, '101': 3, '100': 4, '011': 1, '010': 1},
            [
                0.9533333333333333,
                0.9533333333333333,
                0.9533333333333333,
                1.0,
                0.9943333333333333,
                0.996,
                2.5293130592000264,
            ],
        ),
    ],
)
def test_the_published_tables_come_out(counts, printed):
    """The two tables of the getting-started guide of Finetuner: limit 3, 3 relevant items."""
    relevant = torch.tensor(
        [[digit == '1' for digit in pattern] for pattern, n in counts.items() for _ in range(n)]
    )
    assert len(relevant) == 250
    num_relevant = torch.full((250,), 3)
    values = [np.mean(call(name, relevant, num_relevant, None)) for name in NAMES[:7]]
    assert values == pytest.approx(printed, abs=1e-12)


@pytest.mark.parametrize('name', ['precision_at_k', 'recall_at_k', 'hit_at_k', 'ndcg_at_k'])
@pytest.mark.parametrize('k', [0, -1, 13])
def test_k_must_be_among_what_was_found(name, k):
    with pytest.raises(ValueError, match=f'k={k} is not in 1..12'):
        call(name, rows(), torch.full((200,), 12), k)


def test_more_found_than_there_is_cannot_be():
    with pytest.raises(ValueError, match='query 1 found 2 relevant items, but num_relevant says'):
        evaluation.recall_at_k(torch.ones(2, 2, dtype=torch.bool), torch.tensor([2, 1]))


@pytest.mark.parametrize('distance', ['cosine', 'euclidean', 'sqeuclidean'])
@pytest.mark.parametrize('limit', [1, 3, 20, 150, 1000])
def test_evaluation_equals_docarray_from_end_to_end(distance, limit, monkeypatch):
    monkeypatch.setattr(np, 'asfarray', lambda a: np.asarray(a, float), raising=False)
    queries, query_labels, index, index_labels = labelled()
    found = DocumentArray([Document(id=f'q{i}', embedding=row) for i, row in enumerate(queries)])
    there = DocumentArray([Document(id=f'i{i}', embedding=row) for i, row in enumerate(index)])
    truth = DocumentArray(
        [
            Document(
                id=doc.id,
                matches=[Document(id=f'i{i}') for i, at in enumerate(index_labels) if at == label],
            )
            for doc, label in zip(found, query_labels, strict=True)
        ]
    )
    found.match(there, metric=distance, limit=limit)
    wanted = found.evaluate(metrics=NAMES, ground_truth=truth)
    metrics = evaluate_embeddings(queries, query_labels, index, index_labels, limit, distance)
    assert list(metrics) == NAMES
    assert all(type(value) is float for value in metrics.values())
    assert metrics == pytest.approx(wanted, rel=1e-12)


def test_evaluation_among_the_queries_equals_docarray_without_self(monkeypatch):
    monkeypatch.setattr(np, 'asfarray', lambda a: np.asarray(a, float), raising=False)
    _, _, points, labels = labelled()
    docs = DocumentArray(
        [
            Document(embedding=row, tags={'label': label})
            for row, label in zip(points, labels, strict=True)
        ]
    )
    wanted = docs.embed_and_evaluate(
        metrics=NAMES, embed_funcs=lambda batch: _embed(batch, points), exclude_self=True, limit=7
    )
    assert evaluate_embeddings(points, labels, limit=7) == pytest.approx(wanted, rel=1e-12)
    ids = [f'id{i}' for i in range(len(points))]
    named = evaluate_embeddings(
        points, labels, points, labels, limit=7, query_ids=ids, index_ids=ids
    )
    assert named == pytest.approx(wanted, rel=1e-12)


def _embed(batch: DocumentArray, points: np.ndarray) -> None:
    batch.embeddings = points[: len(batch)]


@pytest.fixture(scope='module')
def ranx() -> Iterator[ModuleType]:
    """ranx without compiling itself, which would take 40 seconds for these few rows."""
    import numba

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition('.')[0] == 'ranx']
        return {name: sys.modules.pop(name) for name in names}

    # other tests may have imported it as it is
    kept = take_out()
    numba.config.DISABLE_JIT = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import ranx

        yield ranx
    numba.config.DISABLE_JIT = False
    take_out()
    sys.modules.update(kept)


@pytest.mark.parametrize('limit', [1, 5, 150])
def test_evaluation_equals_ranx_where_both_define_it(limit, ranx):
    queries, query_labels, index, index_labels = labelled()
    distances, positions = search(queries, index, limit)
    truth = {
        f'q{q}': {f'i{i}': 1 for i, at in enumerate(index_labels) if at == label}
        for q, label in enumerate(query_labels)
    }
    run = {
        f'q{q}': {f'i{i}': -d for i, d in zip(at.tolist(), distances[q].tolist(), strict=True)}
        for q, at in enumerate(positions)
    }
    names = {
        'precision': 'precision_at_k',
        'recall': 'recall_at_k',
        'f1': 'f1_score_at_k',
        'hit_rate': 'hit_at_k',
        'mrr': 'reciprocal_rank',
    }
    if limit == len(index):  # where all relevant items are found, these have one meaning
        names |= {'map': 'average_precision', 'r-precision': 'r_precision'}
    peer = ranx.evaluate(ranx.Qrels(truth), ranx.Run(run), list(names))
    metrics = evaluate_embeddings(queries, query_labels, index, index_labels, limit)
    assert {names[name]: float(value) for name, value in peer.items()} == pytest.approx(
        {name: metrics[name] for name in names.values()}, rel=1e-9
    )


def test_self_is_left_out_by_id():
    points = np.eye(4)[[0, 0, 1, 1]]
    labels = ['a', 'a', 'b', 'b']
    index, index_labels = np.eye(4)[[2, 0, 1, 1]], ['a', 'a', 'b', 'b']
    ids, index_ids = ['1', '2', '3', '4'], ['x', '1', '3', 'y']
    together = evaluate_embeddings(points, labels, index, index_labels, limit=1)
    assert together['hit_at_k'] == 1
    apart = evaluate_embeddings(
        points, labels, index, index_labels, limit=1, query_ids=ids, index_ids=index_ids
    )
    # the first query loses its own copy (position 1) and finds nothing near; ties go to position 0
    assert apart['recall_at_k'] == pytest.approx((1 + 1 / 2 + 1 + 1 / 2) / 4)
    kept = evaluate_embeddings(
        points, labels, index, index_labels, 1, 'cosine', False, ids, index_ids
    )
    assert kept == together


def test_labels_of_every_kind():
    points = np.eye(3)[[0, 1, 0, 1]]
    wanted = evaluate_embeddings(points, [0, 1, 0, 1], limit=1)
    assert wanted['precision_at_k'] == 1
    for labels in (
        ['cat', 'dog', 'cat', 'dog'],
        np.array([0, 1, 0, 1]),
        torch.tensor([0, 1, 0, 1]),
        np.array(['cat', 'dog', 'cat', 'dog']),
        [2**62, 2**62 + 1, 2**62, 2**62 + 1],
        [1, '1', True, '1'],
        [0.0, 1, False, 1.0],
    ):
        assert evaluate_embeddings(points, labels, limit=1) == wanted


@pytest.mark.parametrize(
    ('changed', 'says'),
    [
        (
            {'query_labels': ['a', 'z']},
            r"label 'z' of query Document 1 is not in the index \(1 of 2",
        ),
        ({'index_embeddings': None}, "label 'a' of query Document 0 is not in the index besides"),
        ({'query_labels': ['a']}, 'there are 1 query labels for 2 embeddings'),
        ({'index_labels': ['a']}, 'there are 1 index labels for 3 embeddings'),
        ({'index_labels': None}, 'there are 0 index labels for 3 embeddings'),
        ({'query_labels': ['a', None]}, 'query Document 1 has no label'),
        ({'query_ids': ['1'], 'index_ids': ['1', '2', '3']}, '1 query ids for 2'),
        (
            {'query_ids': ['1', '2'], 'index_ids': ['1', '1', '3']},
            "1 ids, such as '1', are held by",
        ),
        ({'query_embeddings': [[1.0, 0], [np.nan, 0]]}, 'query Document 1 holds nan'),
    ],
)
def test_what_cannot_be_evaluated_is_named(changed, says):
    arguments = {
        'query_embeddings': np.eye(2),
        'query_labels': ['a', 'b'],
        'index_embeddings': np.ones((3, 2)),
        'index_labels': ['a', 'b', 'b'],
    }
    with pytest.raises(DataError, match=says):
        evaluate_embeddings(**{**arguments, **changed})


def test_unknown_distance_and_bad_limit():
    with pytest.raises(ConfigError, match="unknown distance 'euclid'"):
        evaluate_embeddings(np.eye(2), [1, 1], distance='euclid')
    with pytest.raises(ConfigError, match='k=0'):
        evaluate_embeddings(np.eye(2), [1, 1], limit=0)
