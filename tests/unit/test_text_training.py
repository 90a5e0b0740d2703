"""Runs on texts: each kind of data teaches, the artifact opens everywhere, the wrong is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.artifact import load_artifact
from finetuner.config import RunConfig
from finetuner.data import CSVOptions, join_pairs, open_documents
from finetuner.evaluation import METRICS, evaluate_embeddings
from finetuner.excepts import ConfigError, ContentError, DataError, PictureError
from finetuner.inference import build_engine, load_engine
from finetuner.models.backbones import TextSpec
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import get_backbone
from finetuner.runs.runner import data_references, execute_run, validate_run
from tests.conftest import make_picture_docs
from tests.unit.test_runner import Observer
from tests.unit.tiny_encoder import DIMENSION, write_tiny_encoder

COLOURS, THINGS = ('red', 'green', 'blue'), ('shoe', 'hat', 'coat')
TEXTS = [f'{size} {c} {thing}' for thing in THINGS for c in COLOURS for size in ('small', 'large')]
# of one word, and of more than the model takes
UNSEEN = ['cat', 'the dog with the left hat and the right shoe', 'large coat of a cat ' * 20]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp('tiny') / 'encoder')


def config(encoder, **parameters):
    base = {'model': str(encoder), 'train_data': 'train', 'loss': 'TripletMarginLoss', 'epochs': 1}
    base |= {'learning_rate': 3e-3, 'scheduler': 'constant', 'batch_size': 12, 'num_workers': 0}
    return RunConfig.from_parameters({**base, 'device': 'cpu', **parameters})


def validate(encoder, docs, more=None, **parameters):
    chosen, data = config(encoder, **parameters), {'train': docs, **(more or {})}
    validate_run(chosen, {key: data[name] for key, name in data_references(chosen).items()})


def execute(encoder, directory, docs, more=None, **parameters):
    """Check a run and let it go; `more` is data by the names that the parameters call it."""
    observer, data = Observer(), {'train': docs, **(more or {})}
    validate(encoder, docs, more, **parameters)
    execute_run(config(encoder, **parameters), data.__getitem__, directory, observer)
    return observer


def unit_vectors(model, texts):
    vectors = finetuner.encode(model, texts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cosines(model, texts, others):
    return (unit_vectors(model, texts) * unit_vectors(model, others)).sum(axis=1)


# kinds of data, each with a measure of what it teaches, more being better


def labelled():
    return DocumentArray(Document(text=t, tags={'finetuner_label': t.split()[2]}) for t in TEXTS)


def joined():
    pairs = [(TEXTS[0], 'dog'), *((text, f'the cat with a {text}') for text in TEXTS)]
    return join_pairs((Document(text=query), Document(text=text)) for query, text in pairs)


def tightness(model, docs):
    """How much nearer to each other texts of one label are than texts of two."""
    vectors = unit_vectors(model, [doc.text for doc in docs])
    labels = np.array([doc.tags['finetuner_label'] for doc in docs])
    similar, same = vectors @ vectors.T, labels[:, None] == labels[None, :]
    return similar[same & ~np.eye(len(docs), dtype=bool)].mean() - similar[~same].mean()


# the negative has the words of the root, the positive has not
SESSIONS = [
    (f'{colour} {thing}', f'the {other} {colour[0]}', f'small {colour} {thing}')
    for thing, other in (('shoe', 'dog'), ('hat', 'cat'))
    for colour in COLOURS
]


def sessions():
    docs = DocumentArray(Document(text=texts[0]) for texts in SESSIONS)
    for doc, (_, positive, negative) in zip(docs, SESSIONS, strict=True):
        doc.matches = [Document(text=positive), Document(text=negative)]
        doc.matches[0].tags['finetuner_label'], doc.matches[1].tags['finetuner_label'] = 1, -1
    return docs


def preference(model, docs):
    """How much nearer to the roots the positives are than the negatives."""
    roots, positives, negatives = (list(texts) for texts in zip(*SESSIONS, strict=True))
    return (cosines(model, roots, positives) - cosines(model, roots, negatives)).mean()


def unlabelled():
    return DocumentArray(Document(text=text) for text in TEXTS)


def spread(model, docs):
    """How far apart texts are that differ in one word."""
    return -cosines(model, TEXTS[::2], TEXTS[1::2]).mean()


PAIRS = [(f'{colour} shoe', f'left {colour} dog', 1) for colour in COLOURS]
PAIRS += [(f'{colour} shoe', f'small {colour} shoe', 0) for colour in COLOURS]


def scored_pairs():
    return DocumentArray(
        Document(chunks=[Document(text=one), Document(text=other)], tags={'finetuner_score': score})
        for one, other, score in PAIRS
    )


def agreement(model, docs):
    """How near to the scores the cosines are."""
    one, other, scores = (list(values) for values in zip(*PAIRS, strict=True))
    return -np.abs(cosines(model, one, other) - scores).mean()


PAIR_LOSS = {'loss': 'CosineSimilarityLoss'}
INSTANCE_LOSS = {'loss': 'NTXentLoss'}
OF_PAIRS = {'loss': 'NTXentLoss', 'num_items_per_class': 2}
KINDS = {
    'class': (labelled, {'loss': 'MultiSimilarityLoss'}, tightness),
    'queries': (joined, OF_PAIRS, tightness),
    'session': (sessions, {}, preference),
    'instance': (unlabelled, INSTANCE_LOSS, spread),
    'scored_pair': (scored_pairs, PAIR_LOSS, agreement),
}


@pytest.fixture(scope='module', params=KINDS)
def trained(request, encoder, tmp_path_factory):
    """An artifact of a kind, the losses of its epochs, and the measure of what it was to learn."""
    build, parameters, measure = KINDS[request.param]
    directory = tmp_path_factory.mktemp(request.param) / 'artifact'
    observer = execute(encoder, directory, build(), epochs=15, to_onnx=True, **parameters)
    losses = [values['train_loss'] for _, values in observer.epochs]
    return directory, losses, lambda model: measure(model, build())


def test_each_kind_teaches(encoder, trained):
    directory, losses, measure = trained
    assert np.mean(losses[-3:]) < 0.75 * losses[0]
    assert measure(load_engine(directory)) > measure(build_engine(str(encoder))) + 0.2


def test_torch_and_onnx_give_the_same(trained):
    engines = [load_engine(trained[0], is_onnx=is_onnx) for is_onnx in (False, True)]
    for texts in (TEXTS + UNSEEN, *([text] for text in UNSEEN)):
        one, other = (unit_vectors(engine, texts) for engine in engines)
        assert (one * other).sum(axis=1).min() >= 0.9999


# what is asked of the model


@pytest.mark.parametrize(
    ('parameters', 'inputs', 'dimension'),
    [
        ({'output_dim': 5}, TextSpec(32), 5),
        ({'model_options': {'pooler': 'max'}}, TextSpec(32, 'max'), DIMENSION),
        ({'model_options': {'pooler': 'cls', 'max_length': 6}, 'output_dim': 3}, TextSpec(6, 'cls'), 3),
    ],
)  # fmt: skip
def test_what_is_asked_for_reaches_the_artifact(encoder, tmp_path, parameters, inputs, dimension):
    from sentence_transformers import SentenceTransformer

    execute(encoder, tmp_path / 'a', labelled(), **parameters)
    found = load_artifact(tmp_path / 'a').spec
    finetuner.save(finetuner.get_model(tmp_path / 'a'), tmp_path / 'again')
    assert load_artifact(tmp_path / 'again').spec == found
    assert (found.inputs, found.dimension) == (inputs, dimension)
    peer = SentenceTransformer(str(tmp_path / 'a'), device='cpu')
    assert peer.max_seq_length == inputs.max_length
    expected = peer.encode(TEXTS + UNSEEN)
    assert expected.shape[1] == dimension
    vectors = finetuner.encode(finetuner.get_model(tmp_path / 'again'), TEXTS + UNSEEN)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def weights_of(directory):
    return load_artifact(directory).build_model().state_dict()


def changed(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


OUTPUT = ('dense.weight', 'dense.bias', 'LayerNorm.weight', 'LayerNorm.bias')
LAST_LAYER = {f'backbone.transformer.encoder.layer.1.output.{name}' for name in OUTPUT}


@pytest.mark.parametrize(
    ('output_dim', 'trained'), [(None, LAST_LAYER), (4, {'projection_head.0.linear.weight'})]
)
def test_freezing_leaves_the_rest_as_it_is(encoder, tmp_path, output_dim, trained):
    one, other, docs = tmp_path / 'a', tmp_path / 'b', labelled()
    execute(encoder, one, docs, freeze=True, output_dim=output_dim)
    execute(encoder, other, docs, freeze=True, model_artifact=str(one))
    before = build_embedding_model(get_backbone(str(encoder)), output_dim=output_dim).state_dict()
    assert changed(before, weights_of(one)) == trained
    assert changed(weights_of(one), weights_of(other)) == trained


# evaluation, and going on

EVALUATION = {
    'name': 'EvaluationCallback',
    'options': {
        'query_data': 'queries', 'index_data': 'index', 'limit': 3,
        'gather_examples': True, 'num_example_queries': 3,
    },
}  # fmt: skip


def sides(docs):
    """Queries and index: small things and large ones."""
    return {'queries': docs[::2], 'index': docs[1::2]}


@pytest.fixture(scope='module')
def parent(encoder, tmp_path_factory):
    """An artifact that evaluated itself, and what its observer heard."""
    directory = tmp_path_factory.mktemp('parent') / 'first'
    given = {**KINDS['class'][1], 'callbacks': [EVALUATION], 'output_dim': 6, 'epochs': 8}
    given['model_options'] = {'pooler': 'max', 'max_length': 20}
    return directory, execute(encoder, directory, labelled(), sides(labelled()), **given)


def test_retrieval_is_measured_before_and_after(encoder, parent):
    directory, observer = parent
    (_, before), (_, after), (_, p_values) = observer.evaluations
    assert set(before) == {f'encoder_{name}' for name in METRICS}
    assert after['encoder_recall_at_k'] > before['encoder_recall_at_k'] + 0.05
    engine, labels = load_engine(directory, is_onnx=False), [text.split()[2] for text in TEXTS[::2]]
    queries, index = (finetuner.encode(engine, TEXTS[start::2]) for start in (0, 1))
    expected = evaluate_embeddings(queries, labels, index, labels, limit=3)
    assert after == pytest.approx({f'encoder_{name}': v for name, v in expected.items()})
    assert p_values['encoder_recall_at_k'] < 0.5
    metrics = {'before': before, 'after': after, 'p_value': p_values}
    assert load_artifact(directory).metrics == metrics


def test_example_results_are_named_by_their_texts(parent):
    for found in parent[1].results.values():
        assert list(found) == TEXTS[:6:2]
        assert all(len({*texts} & {*TEXTS[1::2]}) == 3 for texts in found.values())


def test_examples_that_begin_alike_are_all_there(encoder, tmp_path):
    docs = labelled()
    for doc in docs:
        doc.text = f'{"the small left coat of the dog with the large hat and " * 2}{doc.text}'
    observer = execute(encoder, tmp_path / 'a', docs, sides(docs), callbacks=[EVALUATION])
    assert len(observer.results['after']) == 3


def test_training_goes_on_from_an_artifact(encoder, parent, tmp_path):
    directory, first = parent
    docs, given = labelled(), {'model_artifact': str(directory), 'callbacks': [EVALUATION]}
    again = execute(encoder, tmp_path / 'a', docs, sides(docs), learning_rate=1e-12, **given)
    found = load_artifact(tmp_path / 'a')
    assert (found.spec, found.manifest['parent']) == (load_artifact(directory).spec, 'first')
    # it begins where its parent ended, and at such a rate stays there
    for _, metrics in again.evaluations[:2]:
        assert metrics == pytest.approx(first.evaluations[1][1])


@pytest.mark.parametrize(
    ('parameters', 'message'),
    [
        ({'model': 'all-MiniLM-L6-v2'}, "'all-MiniLM-L6-v2' is not that of .* pass model='{}'"),
        ({'model': 'resnet18'}, "model 'resnet18' is not that of the artifact .* pass model='{}'"),
        ({'output_dim': 4}, 'output_dim are those of the artifact .*: leave them out'),
        ({'model_options': {'pooler': 'cls'}}, r'model_options .* are those of the artifact'),
    ],
)
def test_an_artifact_keeps_its_model(encoder, parent, parameters, message):
    with pytest.raises(ConfigError, match=message.format('encoder')):
        validate(encoder, labelled(), model_artifact=str(parent[0]), **parameters)


def test_an_artifact_needs_no_other_folder(tmp_path):
    folder = write_tiny_encoder(tmp_path / 'encoder')
    execute(folder, tmp_path / 'a', labelled())
    folder.rename(tmp_path / 'elsewhere')
    validate(folder, labelled(), model_artifact=str(tmp_path / 'a'))


def test_validation_data(encoder, tmp_path):
    docs = labelled()
    given = {'epochs': 2, 'callbacks': [{'name': 'BestModelCheckpoint'}]}
    one = execute(encoder, tmp_path / 'a', docs, {'e': docs[3:9]}, eval_data='e', **given)
    for doc in docs:
        doc.tags['finetuner_label'] = doc.text.partition(' ')[2]
    other = execute(encoder, tmp_path / 'b', docs, val_split=0.3, num_items_per_class=2, **given)
    assert load_artifact(tmp_path / 'b').manifest['num_documents'] == 12
    assert all(np.isfinite(values['val_loss']) for _, values in one.epochs + other.epochs)


# files


LABELS = [(text, text.split()[2]) for text in TEXTS]
FILES = {
    'labelled.csv': (''.join(f'{a},{b}\n' for a, b in LABELS), 18, {}),
    'queries.csv': (''.join(f'{a},a {a} of the cat\n' for a in TEXTS), 36, OF_PAIRS),
    'scores.tsv': (''.join(f'{a}\t{b}\t{score}\n' for a, b, score in PAIRS), 6, PAIR_LOSS),
    'labelled.jsonl': (''.join(f'{{"text": "{a}", "label": "{b}"}}\n' for a, b in LABELS), 18, {}),
}


@pytest.mark.parametrize('name', FILES)
def test_files_are_trained_on(encoder, tmp_path, name):
    content, num_documents, parameters = FILES[name]
    (tmp_path / name).write_text(content)
    options = CSVOptions(is_labeled=True) if name == 'labelled.csv' else None
    docs = open_documents(tmp_path / name, options)
    observer = execute(encoder, tmp_path / 'a', docs, **parameters)
    assert load_artifact(tmp_path / 'a').manifest['num_documents'] == num_documents
    assert observer.epochs[0][1]['train_loss'] > 0


# what is refused


def with_pictures(*positions, docs=None):
    docs = labelled() if docs is None else docs
    for position in positions:
        docs[position].text, docs[position].blob = '', make_picture_docs(1, 1)[0].blob
    return docs


def with_text(text):
    docs = labelled()
    docs[4].text = text
    return docs


PICTURES = {'model': 'mobilenet_v3_small', 'model_options': {'weights': 'none', 'input_size': 32}}
HELD = 'holds a picture or a tensor, not text: give it a text, or choose a model for pictures'
EMPTY = 'train_data: Document 4: content is empty: set text'
WRONG = [
    (with_pictures(5), {}, ContentError, f'train_data: Document 5 {HELD}'),
    (with_pictures(3, 9), {}, ContentError, f'2 texts .* Document 9 {HELD}.*on_broken=.skip'),
    (with_pictures(*range(18)), {'on_broken': 'skip'}, ContentError, f'18 .* Document 0 {HELD}'),
    (labelled(), PICTURES, PictureError, r"0 holds text \('small red shoe'\), .*give.*text model"),
    (with_text(''), {}, DataError, EMPTY),
    (with_text(' \n'), {}, DataError, EMPTY),
    (labelled(), {'model_options': {'poler': 'cls'}}, ConfigError, "'poler': did you mean 'pooler'"),
    (labelled(), {'model_options': {'max_length': 41}}, ConfigError, '41 is more than the 40 tokens'),
    (scored_pairs(), {}, ConfigError, 'scored pairs: use CosineSimilarityLoss'),
    (with_text("\ud800"), {}, DataError, "half a character"),
    (labelled(), {"model": "./nowhere"}, ConfigError, "there is no folder"),
]  # fmt: skip


@pytest.mark.parametrize(('docs', 'parameters', 'error', 'message'), WRONG)
def test_what_is_wrong_is_refused_at_the_door(encoder, docs, parameters, error, message):
    with pytest.raises(error, match=message):
        validate(encoder, docs, **parameters)


@pytest.mark.parametrize(('name', 'data'), [('eval_data', 'index'), ('query_data', 'queries')])
def test_pictures_to_evaluate_on_are_refused(encoder, name, data):
    docs = labelled()
    more = {**sides(docs), data: with_pictures(3, docs=sides(docs)[data])}
    with pytest.raises(ContentError, match=rf'^(callbacks\.0\.)?{name}: Document 3 {HELD}'):
        validate(encoder, labelled(), more, eval_data='index', callbacks=[EVALUATION])


def test_pictures_among_texts_are_left_out(encoder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='finetuner'):
        execute(encoder, tmp_path / 'a', with_pictures(5, 9), on_broken='skip')
    assert load_artifact(tmp_path / 'a').manifest['num_documents'] == 16
    assert 'train_data: 2 texts cannot be read, and with them 2 of 18 Documents' in caplog.text
    assert all(f'Left out: Document {position} {HELD}' in caplog.text for position in (5, 9))
