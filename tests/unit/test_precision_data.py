"""What the precisions of an artifact are measured on, where there is more than is needed."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from docarray import Document, DocumentArray

from finetuner.config import RunConfig
from finetuner.data.checks import build_named_dataset
from finetuner.engines import TorchEngine
from finetuner.inputs import PictureReader
from finetuner.precision_record import PrecisionRecord
from finetuner.runs import precision_data
from finetuner.runs.precision import _embed, _measured
from finetuner.runs.precision_data import Search, Side, _fewer, search_of
from tests.conftest import make_picture_docs
from tests.unit.test_export_precision import trained
from tests.unit.test_runner import EVALUATION
from tests.unit.tiny_artifacts import assert_same_vectors, make_model, make_spec

MOST = 100


@pytest.fixture(autouse=True)
def small_index(monkeypatch):
    monkeypatch.setattr(precision_data, '_MAX_INDEX', MOST)


def labelled(labels, ids='d'):
    docs = DocumentArray(
        Document(id=f'{ids}{number}', text=f't{number}', tags={'finetuner_label': label})
        for number, label in enumerate(labels)
    )
    return build_named_dataset(docs, 'index_data')


def labels_of(data):
    return Counter(data.classes[label] for label in data.labels)


def random_recall(queries, index):
    generator = np.random.default_rng(0)
    sides = [Side(data, range(len(data)), '') for data in (queries, index) if data is not None]
    search = Search(sides[0], sides[1] if index is not None else None, 20, 'cosine', True)
    return search.recall(
        [generator.normal(size=(len(side.places), 8)).astype(np.float32) for side in sides]
    )


def test_classes_larger_than_all_there_is_room_for_are_drawn_from():
    index = labelled([f'c{number % 3}' for number in range(900)])
    queries, fewer = _fewer(labelled(['c0', 'c1', 'c2'] * 5, 'q'), index, 0)
    assert len(queries) == 15
    assert labels_of(fewer) == {'c0': 33, 'c1': 33, 'c2': 33}
    # of one class alone, random vectors would find all
    assert random_recall(queries, fewer) < 0.5
    among, none = _fewer(index, None, 0)
    assert none is None
    assert labels_of(among) == {'c0': 33, 'c1': 33, 'c2': 33}
    assert random_recall(among, None) < 0.5


def test_what_small_classes_leave_large_ones_take():
    index = labelled(['a'] * 10 + ['b'] * 400 + ['c'] * 400)
    _, fewer = _fewer(labelled(['a', 'b', 'c'], 'q'), index, 0)
    assert labels_of(fewer) == {'a': 10, 'b': 45, 'c': 45}


@pytest.mark.parametrize('seed', range(5))
def test_only_classes_of_queries_are_drawn(seed):
    index = labelled([f'c{number % 50}' for number in range(500)])
    queries, fewer = _fewer(labelled(['c1', 'c2', 'absent'], 'q'), index, seed)
    assert labels_of(queries) == {'c1': 1, 'c2': 1}
    assert labels_of(fewer) == {'c1': 10, 'c2': 10}


def test_of_more_classes_than_there_is_room_for_some_are_drawn():
    index = labelled([f'c{number // 3}' for number in range(900)])
    queries, fewer = _fewer(index, index, 1)
    counts = labels_of(fewer)
    # none of which has nothing to find but itself
    assert set(counts.values()) == {2}
    assert len(fewer) == MOST
    assert set(labels_of(queries)) == set(counts)
    again = _fewer(index, index, 1)[1]
    assert [again.document(place).id for place in range(MOST)] == [
        fewer.document(place).id for place in range(MOST)
    ]
    assert 0 < random_recall(queries, fewer) < 1


def test_pairs_each_of_a_class_of_its_own_fill_the_index():
    index = labelled([f'c{number}' for number in range(900)])
    queries, fewer = _fewer(labelled([f'c{number}' for number in range(900)], 'q'), index, 0)
    assert (len(queries), len(fewer)) == (MOST, MOST)


def test_as_much_as_there_is_room_for_stays_as_it_is():
    index = labelled([f'c{number % 2}' for number in range(MOST)])
    queries = labelled(['c1'], 'q')
    assert _fewer(queries, index, 0) == (queries, index)


@pytest.mark.parametrize('size', [MOST, 5 * MOST])
def test_one_class_tells_nothing(size):
    index = labelled(['a'] * size)
    for queries, searched in ((index, None), (labelled(['a'], 'q'), index)):
        assert 'fewer than two classes' in _fewer(queries, searched, 0)


@pytest.mark.parametrize('size', [MOST, 5 * MOST])
def test_nor_do_queries_of_other_classes(size):
    found = _fewer(labelled(['c'], 'q'), labelled(['a', 'b'] * (size // 2)), 0)
    assert 'nothing to find' in found


def engine_of_pictures():
    spec = make_spec()
    return TorchEngine(make_model(), spec, PictureReader(spec.inputs))


def broken_at(docs, *positions):
    for position in positions:
        docs[position].blob = b'nonsense'
    return build_named_dataset(docs, 'index_data')


def test_a_document_that_cannot_be_read_is_left_out(caplog):
    engine = engine_of_pictures()
    data = broken_at(make_picture_docs(2, 20), 3, 30)
    side = Side(data, range(40), '')
    # with the engines' names, as they are measured
    found, batches, places = _embed(side, engine.reader, {('fp32', 'onnx'): engine})
    assert places == [place for place in range(40) if place not in (3, 30)]
    # of the first 32
    assert sum(len(batch) for batch in batches) == 30
    assert 'without 2 Documents, of 40' in caplog.text
    whole = build_named_dataset(make_picture_docs(2, 20), 'index_data')
    expected, _, _ = _embed(Side(whole, places, ''), engine.reader, {('fp32', 'onnx'): engine})
    assert_same_vectors(found['fp32', 'onnx'], expected['fp32', 'onnx'])


def measured(search, asked='auto'):
    engine = engine_of_pictures()
    plan = SimpleNamespace(
        config=RunConfig.from_parameters({'train_data': 'x', 'export_precision': asked})
    )
    engines = {'': {('fp32', 'onnx'): engine, ('int8', 'onnx'): engine}}
    taken = {'': ('fp32', 'onnx')}
    return _measured(plan, search, search.sides, engines, '', taken, {'': engine.reader}, None)


def test_recall_is_that_of_what_can_be_read():
    queries, index = make_picture_docs(3, 3, seed=1), make_picture_docs(3, 4)
    # and of class 2 nothing is left to find
    broken = Search(
        Side(broken_at(queries[:], 0), range(9), ''),
        Side(broken_at(index[:], 1, *range(8, 12)), range(12), ''),
        2, 'cosine', True,
    )  # fmt: skip
    record = measured(broken)
    assert (record.num_queries, record.num_index) == (8, 7)
    read = Search(
        Side(build_named_dataset(make_picture_docs(3, 3, seed=1)[1:6], 'q'), range(5), ''),
        Side(
            build_named_dataset(
                DocumentArray([make_picture_docs(3, 4)[i] for i in (0, *range(2, 8))]), 'i'
            ),
            range(7),
            '',
        ),
        2,
        'cosine',
        True,
    )
    assert record.measurements[0].recall == pytest.approx(measured(read).measurements[0].recall)


def test_queries_without_another_of_their_class_are_left_out_among_each_other():
    data = broken_at(make_picture_docs(3, 2), 1)
    record = measured(Search(Side(data, range(6), ''), None, 1, 'cosine', True))
    assert record.num_queries == 5
    assert record.measurements[0].recall is not None


@pytest.mark.parametrize(('asked', 'chosen'), [('auto', 'fp32'), ('int8', 'int8')])
def test_where_nothing_can_be_read_the_artifact_is_kept(asked, chosen):
    data = broken_at(make_picture_docs(2, 2), *range(4))
    record = measured(Search(Side(data, range(4), ''), None, 1, 'cosine', True), asked)
    assert (record.chosen, record.measurements) == (chosen, ())
    assert 'no Document to measure on could be read' in record.reason
    assert PrecisionRecord.from_json(record.to_json()) == record


def test_where_nothing_is_left_to_find_fp32_is_kept():
    queries = build_named_dataset(make_picture_docs(2, 2, seed=1), 'query_data')
    index = broken_at(make_picture_docs(2, 2), *range(4))
    record = measured(
        Search(Side(queries, range(4), ''), Side(index, range(4), ''), 1, 'cosine', True)
    )
    assert record.chosen == 'fp32'
    assert 'what int8 would lose is not known' in record.reason


def test_a_run_ends_well_where_a_picture_went_away(tmp_path, monkeypatch):
    queries = make_picture_docs(seed=1)
    for number, doc in enumerate(queries):
        path = tmp_path / f'{number}.png'
        path.write_bytes(doc.blob)
        doc.blob, doc.uri = None, str(path)

    def search_late(plan):
        (tmp_path / '5.png').unlink()
        return search_of(plan)

    monkeypatch.setattr('finetuner.runs.precision.search_of', search_late)
    artifact = trained(
        tmp_path / 'a', {'query': queries}, callbacks=[EVALUATION], export_precision='auto'
    )
    assert (artifact.precision.num_queries, artifact.precision.num_index) == (23, 23)
