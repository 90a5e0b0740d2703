"""What precision each of two towers is served in, where they are searched together or one alone."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray

from finetuner.artifact import INT8_ONNX
from finetuner.config import RunConfig
from finetuner.data.checks import build_named_dataset
from finetuner.inference import load_engine
from finetuner.inputs import PictureReader
from finetuner.models.backbones import TOWERS, PictureSpec
from finetuner.runs.precision import _measured
from finetuner.runs.precision_data import Search, Side
from tests.unit.test_export_precision import MUCH, TEXTS, trained
from tests.unit.tiny_encoder import CLIP_SIZE, write_tiny_clip


def make_pairs():
    rng = np.random.default_rng(0)
    return DocumentArray(
        Document(
            chunks=[
                Document(text=f'{text} {extra}', modality='text'),
                Document(
                    tensor=rng.integers(0, 256, (CLIP_SIZE, CLIP_SIZE, 3), dtype=np.uint8),
                    modality='image',
                ),
            ]
        )
        for text in TEXTS
        for extra in ('small', 'large')
    )


def test_each_of_two_towers_has_its_own(tmp_path):
    clip = write_tiny_clip(tmp_path / 'clip')
    pairs = make_pairs()
    evaluation = {
        'name': 'EvaluationCallback',
        'options': {'query_data': 'query', 'multi_modal': True, 'limit': 3},
    }
    artifact = trained(
        tmp_path / 'a',
        {'train': pairs, 'query': pairs},
        model=str(clip),
        model_options={},
        loss='CLIPLoss',
        batch_size=8,
        callbacks=[evaluation],
        export_precision='int8',
    )
    assert artifact.precision is None
    both_fp32 = artifact.tower(TOWERS[0]).precision.measurements[0].recall
    for name in TOWERS:
        tower = artifact.tower(name)
        assert tower.precision.chosen == 'int8'
        assert (tower.precision.num_queries, tower.precision.num_index) == (12, 12)
        for each in tower.precision.measurements:
            assert each.recall_loss == pytest.approx(1 - each.recall / both_fp32)
        assert f'{name}/{INT8_ONNX}' in artifact.manifest['files']
        assert '## Precision' in (tower.directory / 'README.md').read_text()
    engine = load_engine(artifact, device='cpu')
    assert engine.precision == 'int8'
    expected = load_engine(artifact, device='cpu', precision='fp32')
    picture = pairs[0].chunks[1].tensor
    docs = DocumentArray([Document(text='red shoe'), Document(tensor=picture)])
    assert engine.encode_documents(docs) == []
    others = DocumentArray([Document(text='red shoe'), Document(tensor=picture)])
    assert expected.encode_documents(others) == []
    cosine = torch.nn.functional.cosine_similarity(
        torch.tensor(docs.embeddings), torch.tensor(others.embeddings)
    )
    assert cosine.min() > 0.98
    differences = np.abs(docs.embeddings - others.embeddings).max(axis=1)
    assert differences.min() > 1e-6


@pytest.mark.parametrize('precision', ['auto', 'int8'])
def test_a_search_with_one_tower_says_nothing_of_the_other(precision, tmp_path):
    clip = write_tiny_clip(tmp_path / 'clip')
    queries = DocumentArray(
        Document(text=f'{text} {extra}', tags={'finetuner_label': text})
        for text in TEXTS
        for extra in ('small', 'large')
    )
    evaluation = {
        'name': 'EvaluationCallback',
        'options': {'query_data': 'query', 'model': 'clip-text', 'limit': 3},
    }
    artifact = trained(
        tmp_path / 'a',
        {'train': make_pairs(), 'query': queries},
        model=str(clip),
        model_options={},
        loss='CLIPLoss',
        batch_size=8,
        callbacks=[evaluation],
        export_precision=precision,
        max_recall_loss=MUCH,
    )
    texts, pictures = (artifact.tower(name).precision for name in TOWERS)
    assert (texts.num_queries, texts.limit) == (12, 3)
    assert all(each.recall is not None for each in texts.measurements)
    assert (pictures.num_queries, pictures.limit) == (0, None)
    assert pictures.measurements
    assert all(each.recall is None for each in pictures.measurements)
    if precision == 'auto':
        assert pictures.chosen == 'fp32'
        assert 'what int8 would lose is not known' in pictures.reason
    else:
        assert pictures.chosen == 'int8'
        assert 'nothing to search' in pictures.reason


def marked(towers, losing=0.009):
    """What both towers find, where each in int8 loses this share of it."""

    class Marked:
        def __init__(self, precision):
            self._value = 1.0 if precision == 'fp32' else 2.0

        def embed(self, inputs):
            if self._value == 1:
                # int8 is faster
                time.sleep(0.002)
            return np.full((len(inputs), 2), self._value, np.float32)

    class Found(Search):
        def recall(self, embeddings):
            return 0.8 * (1 - losing) ** sum(int(each[0, 0] > 1) for each in embeddings)

    docs = DocumentArray(
        Document(tensor=np.zeros((8, 8, 3), np.uint8), tags={'finetuner_label': 'a'})
        for _ in range(2)
    )
    data = build_named_dataset(docs, 'query_data')
    sides = [Side(data, range(2), tower) for tower in towers]
    search = Found(sides[0], sides[1] if len(sides) > 1 else None, 3, 'cosine', True)
    reader = PictureReader(PictureSpec(8, (0, 0, 0), (1, 1, 1)))
    engines = {(precision, 'onnx'): Marked(precision) for precision in ('fp32', 'int8')}
    return search, engines, dict.fromkeys(TOWERS, reader)


def test_what_two_towers_lose_adds_up():
    search, engines, readers = marked(TOWERS)
    plan = SimpleNamespace(config=RunConfig.from_parameters(
        {'train_data': 'x', 'export_precision': 'auto', 'max_recall_loss': 0.01}
    ))  # fmt: skip
    taken = dict.fromkeys(TOWERS, ('fp32', 'onnx'))
    first, second = TOWERS
    of_first = {first: engines, second: {('fp32', 'onnx'): engines['fp32', 'onnx']}}
    record = _measured(plan, search, search.sides, of_first, first, taken, readers, None)
    assert record.chosen == 'int8'
    base = record.measurements[0].recall
    assert base == 0.8
    taken[first] = ('int8', 'onnx')
    of_second = {first: {('int8', 'onnx'): engines['int8', 'onnx']}, second: engines}
    record = _measured(plan, search, search.sides, of_second, second, taken, readers, base)
    # 0.9 % each: one may, both may not
    assert [each.recall_loss for each in record.measurements] == pytest.approx([0.009, 0.017919])
    assert record.chosen == 'fp32'
    assert 'int8 loses 1.79 % of recall' in record.reason
