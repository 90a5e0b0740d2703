"""What losses are given of each kind of data, against the same thing written out by hand."""

import itertools

import numpy as np
import pytest
import torch

from finetuner.excepts import ConfigError
from finetuner.training.losses import (
    LOSSES,
    PAIR_LOSSES,
    TEXT_IMAGE_LOSSES,
    TUPLE_LOSSES,
    CosineSimilarityLoss,
    build_loss,
    build_miner,
)
from finetuner.training.objectives import (
    Objective,
    ScoredPairObjective,
    SessionObjective,
    TextImageObjective,
    build_objective,
    check_objective_runs,
    session_pairs,
    session_triplets,
)

# two whole sessions, a root cut off alone, one without negatives, and one without positives
LABELS = torch.tensor(
    [(4, 0), (4, 1), (4, -1), (4, 1), (4, -1), (9, 0), (9, 1), (2, 0), (0, 0), (0, -1), (7, 0)]
)
NEEDED = {'RankedListLoss': {'margin': 0.4, 'Tn': 10}, 'ManifoldLoss': {}}


def written_out(labels):
    """Pairs and triplets, found one by one."""
    rows = list(enumerate(labels.tolist()))
    positives, negatives, triplets = set(), set(), set()
    for (i, (session, type_)), (j, (other, other_type)) in itertools.product(rows, rows):
        if type_ == 0 and session == other and i != j:
            (positives if other_type == 1 else negatives).add((i, j))
    for (i, j), (k, n) in itertools.product(positives, negatives):
        if i == k:
            triplets.add((i, j, n))
    return positives, negatives, triplets


def as_sets(indices):
    return [set(zip(*(t.tolist() for t in part), strict=True)) for part in indices]


def test_pairs_and_triplets_are_those_of_the_sessions_and_no_others():
    positives, negatives, triplets = written_out(LABELS)
    found = session_pairs(LABELS)
    assert as_sets([found[:2], found[2:]]) == [positives, negatives]
    assert as_sets([session_triplets(LABELS)]) == [triplets]
    assert [len(each) for each in (positives, negatives, triplets)] == [3, 3, 4]


@pytest.mark.parametrize('seed', range(20))
def test_random_sessions(seed):
    generator = np.random.default_rng(seed)
    rows = []
    for session in generator.permutation(6):
        types = generator.choice([1, -1], generator.integers(0, 6))
        rows += [(session, 0), *((session, type_) for type_ in types)]
    labels = torch.tensor(np.array(rows))
    positives, negatives, triplets = written_out(labels)
    found = session_pairs(labels)
    assert as_sets([found[:2], found[2:]]) == [positives, negatives]
    assert as_sets([session_triplets(labels)]) == [triplets]


def test_a_batch_without_matches_says_nothing():
    embeddings = torch.randn(2, 4, requires_grad=True)
    objective = build_objective('session', build_loss('TripletMarginLoss', None, 4, 2))
    loss = objective(embeddings, torch.tensor([(0, 0), (1, 0)]))
    loss.backward()
    assert loss.item() == 0


def takes_exactly_the_pairs(name):
    """Whether a loss gives the same for the same pairs whatever the labels say."""
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(len(LABELS), 8), dim=1)
    results = []
    for labels in (
        torch.arange(len(LABELS)),
        torch.zeros(len(LABELS), dtype=torch.int64),
        torch.arange(len(LABELS)) % 3,
    ):
        # built anew: some keep a state
        torch.manual_seed(0)
        loss = build_loss(name, NEEDED.get(name), 8, len(LABELS))
        try:
            for _ in range(2):  # a step is not the last
                given = embeddings.clone().requires_grad_()
                value = loss(given, labels, session_pairs(LABELS))
                value.backward()
        except (ValueError, RuntimeError, IndexError):
            return False
        results.append((value.item(), given.grad))
    first, first_gradient = results[0]
    return all(
        value == pytest.approx(first, abs=1e-6) and torch.allclose(grad, first_gradient, atol=1e-6)
        for value, grad in results
    )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(set(LOSSES) - {*PAIR_LOSSES, *TEXT_IMAGE_LOSSES}))
def test_which_losses_learn_from_sessions(name):
    assert takes_exactly_the_pairs(name) == (name in TUPLE_LOSSES)
    loss = build_loss(name, NEEDED.get(name), 8, len(LABELS))
    if name in TUPLE_LOSSES:
        assert type(build_objective('session', loss)) is SessionObjective
    else:
        with pytest.raises(ConfigError, match=f'{name} cannot learn from sessions.*NTXentLoss'):
            build_objective('session', loss)


def test_triplets_of_sessions_by_hand():
    torch.manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(len(LABELS), 8), dim=1)
    loss = build_loss('TripletMarginLoss', {'margin': 10.0, 'reducer': 'MeanReducer'}, 8, 2)
    found = build_objective('session', loss)(embeddings, LABELS)
    expected = [
        float((embeddings[a] - embeddings[p]).norm() - (embeddings[a] - embeddings[n]).norm() + 10)
        for a, p, n in written_out(LABELS)[2]
    ]
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)


def test_cosine_similarity_loss_by_hand():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(10, 6)).astype(np.float32)
    scores = np.repeat(generator.random(5), 2).astype(np.float32)
    expected = []
    for first, second, score in zip(embeddings[::2], embeddings[1::2], scores[::2], strict=True):
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        expected.append((cosine - score) ** 2)
    objective = build_objective('scored_pair', build_loss('CosineSimilarityLoss', None, 6, 2))
    assert type(objective) is ScoredPairObjective
    found = objective(torch.from_numpy(embeddings), torch.from_numpy(scores))
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-6)


def test_no_pairs_no_loss():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = CosineSimilarityLoss()(empty, empty, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


class OwnLoss(torch.nn.Module):
    def forward(self, embeddings, labels, tuples=None):
        return embeddings.sum() * 0 + (0 if tuples is None else len(tuples))


def test_what_does_not_go_together_is_refused_by_name():
    triplet, cosine, clip = (
        build_loss(n, None, 4, 2) for n in ('TripletMarginLoss', 'CosineSimilarityLoss', 'CLIPLoss')
    )
    with pytest.raises(ConfigError, match=r'TripletMarginLoss .* scored pairs: use CosineSim'):
        build_objective('scored_pair', triplet)
    for kind in ('class', 'session', 'instance'):
        with pytest.raises(ConfigError, match=f'CosineSimilarityLoss .* scored pairs .*{kind}'):
            build_objective(kind, cosine)
    for kind in ('class', 'session', 'instance', 'scored_pair'):
        with pytest.raises(ConfigError, match=f'CLIPLoss .* text-image pairs only.*{kind}'):
            build_objective(kind, clip)
    for loss in (triplet, cosine):
        with pytest.raises(ConfigError, match='cannot learn from text-image pairs: use CLIPLoss'):
            build_objective('text_image_pair', loss)
    assert type(build_objective('text_image_pair', clip)) is TextImageObjective
    miner = build_miner('BatchHardMiner', None)
    refusing = (('session', triplet), ('scored_pair', cosine), ('text_image_pair', clip))
    for kind, loss in refusing:
        with pytest.raises(ConfigError, match=f'BatchHardMiner mines by class .*{kind}'):
            build_objective(kind, loss, miner)
    assert type(build_objective('instance', triplet, miner)) is Objective


def test_ones_own_loss_is_given_what_the_kind_says():
    assert float(build_objective('session', OwnLoss())(torch.randn(11, 3), LABELS)) == 4
    assert float(build_objective('class', OwnLoss())(torch.randn(4, 3), torch.arange(4))) == 0


@pytest.mark.parametrize('kind', ['class', 'instance', 'session', 'scored_pair', 'text_image_pair'])
def test_options_that_fail_when_used_are_found_before(kind):
    special = {'scored_pair': 'CosineSimilarityLoss', 'text_image_pair': 'CLIPLoss'}
    name = special.get(kind, 'TripletMarginLoss')
    check_objective_runs(build_objective(kind, build_loss(name, None, 4, 3)), kind, 4, 3)

    class Failing(torch.nn.Module):
        def forward(self, *_):
            raise RuntimeError('never works')

    with pytest.raises(ConfigError, match='Failing does not run with these options: never works'):
        check_objective_runs(build_objective(kind, Failing()), kind, 4, 3)
