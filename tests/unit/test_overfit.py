"""Each kind of data teaches a small network what it says, and nothing is learned without training."""

import copy
import itertools
import logging

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.excepts import DataError
from finetuner.training.trainer import BaseCallback

SIGNAL, NOISE = 4, 12
LENGTH = SIGNAL + NOISE


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(LENGTH, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))


def vector(random: np.random.Generator, signal: np.ndarray) -> np.ndarray:
    """A signal drowned in noise: distances as they come say nothing of it."""
    noise = 3 * random.normal(size=NOISE)
    return np.concatenate([signal + 0.1 * random.normal(size=SIGNAL), noise]).astype(np.float32)


def class_data(seed: int) -> DocumentArray:
    random = np.random.default_rng(seed)
    centres = np.eye(SIGNAL)
    return DocumentArray(
        Document(tensor=vector(random, centres[label]), tags={'finetuner_label': label})
        for label in range(SIGNAL)
        for _ in range(8)
    )


def session_data(seed: int) -> DocumentArray:
    random = np.random.default_rng(seed)
    docs = DocumentArray()
    for _ in range(16):
        signal, other = np.eye(SIGNAL)[random.permutation(SIGNAL)[:2]]
        root = Document(tensor=vector(random, signal))
        root.matches = [
            Document(
                tensor=vector(random, signal if label == 1 else other),
                tags={'finetuner_label': label},
            )
            for label in (1, -1, 1, -1)
        ]
        docs.append(root)
    return docs


def instance_data(seed: int) -> DocumentArray:
    random = np.random.default_rng(seed)
    signals = random.permutation(list(itertools.product([-1, 1], repeat=SIGNAL)))
    return DocumentArray(Document(tensor=vector(random, signal)) for signal in signals)


def augment(doc: Document) -> np.ndarray:
    """A view: the signal as it is, everything else drawn anew."""
    noise = 3 * np.random.normal(size=NOISE)
    return np.concatenate([doc.tensor[:SIGNAL], noise]).astype(np.float32)


def scored_pairs(seed: int) -> DocumentArray:
    random = np.random.default_rng(seed)
    docs = DocumentArray()
    for number in range(24):
        first, other = np.eye(SIGNAL)[random.permutation(SIGNAL)[:2]]
        score = number % 3 / 2
        second = score * first + (1 - score) * other
        chunks = [Document(tensor=vector(random, signal)) for signal in (first, second)]
        docs.append(Document(chunks=chunks, tags={'finetuner_score': score}))
    return docs


def embedded(model: torch.nn.Module, vectors: list[np.ndarray]) -> np.ndarray:
    """Embeddings of length 1, `[n, 8]`."""
    docs = DocumentArray(Document(tensor=vector) for vector in vectors)
    finetuner.embed(docs, model)
    return docs.embeddings / np.linalg.norm(docs.embeddings, axis=1, keepdims=True)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first[:, None] - second[None], axis=2)


def class_success(model: torch.nn.Module, docs: DocumentArray) -> float:
    """Share of Documents whose nearest neighbour is of their class."""
    labels = np.array(docs[:, 'tags__finetuner_label'])
    vectors = embedded(model, [doc.tensor for doc in docs])
    apart = distances(vectors, vectors)
    np.fill_diagonal(apart, np.inf)
    return float((labels[apart.argmin(axis=1)] == labels).mean())


def session_success(model: torch.nn.Module, docs: DocumentArray) -> float:
    """Share of sessions in which all positive matches are nearer to the root than all negatives."""
    right = 0
    for doc in docs:
        root, *matches = embedded(model, [d.tensor for d in (doc, *doc.matches)])
        apart = np.linalg.norm(np.array(matches) - root, axis=1)
        positive = np.array([match.tags['finetuner_label'] == 1 for match in doc.matches])
        right += apart[positive].max() < apart[~positive].min()
    return right / len(docs)


def instance_success(model: torch.nn.Module, docs: DocumentArray) -> float:
    """Share of views that are nearer to another view of their instance than to one of any other."""
    np.random.seed(7)
    one, other = (embedded(model, [augment(doc) for doc in docs]) for _ in range(2))
    return float((distances(one, other).argmin(axis=1) == np.arange(len(docs))).mean())


def pair_success(model: torch.nn.Module, docs: DocumentArray) -> float:
    """Share of pairs whose cosine is within 0.15 of their score."""
    first, second = (embedded(model, [doc.chunks[i].tensor for doc in docs]) for i in range(2))
    scores = np.array(docs[:, 'tags__finetuner_score'])
    return float((np.abs((first * second).sum(axis=1) - scores) < 0.15).mean())


KINDS = {
    'class': (class_data, class_success, {'loss': 'TripletMarginLoss'}),
    'session': (session_data, session_success, {'loss': 'TripletMarginLoss'}),
    'instance': (instance_data, instance_success, {'loss': 'NTXentLoss', 'preprocess_fn': augment}),
    'scored_pair': (scored_pairs, pair_success, {'loss': 'CosineSimilarityLoss'}),
}


class ValidationLosses(BaseCallback):
    """Notes the validation loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_epoch_end(self, trainer) -> None:
        self.losses.append(trainer.state.val_loss)


@pytest.mark.parametrize('kind', KINDS)
def test_a_kind_is_learned(kind):
    build, success, options = KINDS[kind]
    docs, model = build(seed=0), network()
    assert success(copy.deepcopy(model), docs) < 0.6
    finetuner.fit(model, docs, epochs=150, learning_rate=0.01, seed=0, **options)
    assert success(model, docs) > 0.95


@pytest.mark.parametrize('kind', KINDS)
def test_the_seed_decides(kind):
    build, _, options = KINDS[kind]

    def trained(seed: int) -> torch.Tensor:
        model = finetuner.fit(network(), build(0), epochs=2, batch_size=8, seed=seed, **options)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize('kind', KINDS)
def test_validation_loss_of_each_kind(kind):
    build, _, options = KINDS[kind]
    validation = ValidationLosses()
    finetuner.fit(
        network(),
        build(0),
        # less than a batch of the training data
        eval_data=build(1)[:12],
        epochs=40,
        learning_rate=0.01,
        callbacks=[validation],
        **options,
    )
    assert len(validation.losses) == 40
    assert np.isfinite(validation.losses).all()
    assert min(validation.losses) < 0.9 * validation.losses[0], 'what is learned holds elsewhere'


@pytest.mark.parametrize('kind', KINDS)
def test_validation_data_of_another_kind_is_refused(kind):
    build, _, options = KINDS[kind]
    other = class_data if kind != 'class' else instance_data
    with pytest.raises(DataError, match=f'eval_data is of kind .*train_data of {kind}'):
        finetuner.fit(network(), build(0), eval_data=other(0), epochs=1, **options)


def positions_of(docs: DocumentArray) -> dict[bytes, str]:
    """The name of every Document, match and chunk, by its content."""
    found = {}
    for position, doc in enumerate(docs):
        if doc.tensor is not None:
            found[doc.tensor.tobytes()] = f'Document {position}'
        for number, match in enumerate(doc.matches):
            found[match.tensor.tobytes()] = f'Document {position}, match {number}'
        for number, chunk in enumerate(doc.chunks):
            found[chunk.tensor.tobytes()] = f'Document {position}, chunk {number}'
    return found


BROKEN = {
    'class': {'Document 0', 'Document 9'},
    'session': {'Document 0', 'Document 3, match 1'},
    'instance': {'Document 0', 'Document 9'},
    'scored_pair': {'Document 0, chunk 1', 'Document 9, chunk 0'},
}


@pytest.mark.parametrize('kind', KINDS)
def test_what_cannot_be_loaded_is_skipped_or_stops(kind, caplog):
    build, success, options = KINDS[kind]
    docs, model = build(seed=0), network()
    names = positions_of(docs)
    makes_input = options.get('preprocess_fn', lambda doc: doc.tensor)

    def load(doc: Document) -> np.ndarray:
        name = names[doc.tensor.tobytes()]
        if name in BROKEN[kind]:
            raise OSError(f'the disk says no to {name}')
        return makes_input(doc)

    options = {**options, 'preprocess_fn': load}
    with pytest.raises(DataError, match=r'^Document \d.*cannot be preprocessed: OSError: the disk'):
        finetuner.fit(model, docs, epochs=1, **options)
    caplog.set_level(logging.WARNING)
    finetuner.fit(model, docs, epochs=150, learning_rate=0.01, on_broken='skip', **options)
    told = [r.getMessage() for r in caplog.records if 'Left out' in r.getMessage()]
    assert len(told) <= 2 * len(BROKEN[kind]), 'not once an epoch'
    for name in BROKEN[kind]:
        assert f'{name} cannot be preprocessed: OSError: the disk says no to {name}' in str(told)
    assert success(model, docs) > 0.85


@pytest.mark.parametrize('on_broken', ['stop', 'skip'])
def test_a_mistake_in_preprocess_fn_stops_either_way(on_broken):
    def fails(doc: Document) -> np.ndarray:
        return doc.tensor[:, 0]

    with pytest.raises(DataError, match='Document 0 cannot be preprocessed: IndexError'):
        finetuner.fit(network(), class_data(0), preprocess_fn=fails, on_broken=on_broken, epochs=1)


def test_when_nothing_can_be_loaded_there_is_no_training():
    def fails(doc: Document) -> np.ndarray:
        raise OSError('no disk')

    with pytest.raises(DataError, match=r'nothing is left to load: .*32 in all.*no disk'):
        finetuner.fit(network(), class_data(0), preprocess_fn=fails, on_broken='skip', epochs=1)
