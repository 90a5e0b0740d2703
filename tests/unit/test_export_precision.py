"""What precision a run's artifact is served in: measured, chosen, written down, and taken."""

import json
import re
import shutil

import pytest
from docarray import Document, DocumentArray
from onnx import helper

from finetuner.artifact import INT8_ONNX, load_artifact
from finetuner.artifact_files import hash_file
from finetuner.config import RunConfig
from finetuner.engines import OnnxEngine
from finetuner.excepts import ArtifactError, ConfigError
from finetuner.inference import load_engine
from finetuner.openvino_engine import OpenvinoEngine
from finetuner.precision_record import GRAPH_ENGINES, Measurement, PrecisionRecord
from finetuner.runs.runner import execute_run
from tests.conftest import make_picture_docs
from tests.unit.test_onnx_check import model
from tests.unit.test_runner import EVALUATION, Observer, config
from tests.unit.tiny_encoder import write_tiny_encoder

MUCH = 0.5
TEXTS = [f'{colour} {thing}' for colour in ('red', 'green', 'blue') for thing in ('shoe', 'hat')]


def trained(directory, data=None, **parameters):
    stored = {'train': make_picture_docs(), 'query': make_picture_docs(seed=1), **(data or {})}
    chosen = config(**{'epochs': 1, **parameters})
    execute_run(chosen, stored.__getitem__, directory, Observer())
    return load_artifact(directory)


@pytest.fixture(scope='module')
def auto(tmp_path_factory):
    """A run that may lose so much of its recall that int8 is allowed."""
    directory = tmp_path_factory.mktemp('auto') / 'artifact'
    return trained(
        directory,
        model='efficientnet-lite0',
        model_options={'input_size': 32},
        callbacks=[EVALUATION],
        export_precision='auto',
        max_recall_loss=MUCH,
    )


def damaged(artifact, directory, change):
    """A copy whose manifest was changed."""
    shutil.copytree(artifact.directory, directory)
    path = directory / 'artifact.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return directory


def test_all_that_was_measured_is_written_and_shown(auto):
    record = auto.precision
    assert (record.asked, record.max_recall_loss, record.limit) == ('auto', MUCH, 3)
    assert (record.num_queries, record.num_index, record.num_calibration) == (24, 24, 24)
    pairs = {(each.precision, each.engine) for each in record.measurements}
    assert pairs == {(p, e) for p in ('fp32', 'int8') for e in GRAPH_ENGINES}
    reference = next(m for m in record.measurements if (m.precision, m.engine) == ('fp32', 'onnx'))
    assert reference.cosine == pytest.approx(1, abs=1e-6)
    assert reference.recall_loss == 0
    for each in record.measurements:
        assert each.recall_loss == pytest.approx(1 - each.recall / reference.recall)
        assert each.least_cosine <= each.cosine
    allowed = [each for each in record.measurements if each.recall_loss <= MUCH]
    best = max(allowed, key=lambda each: each.documents_per_second)
    assert (record.chosen, record.engine) == (best.precision, best.engine)
    assert PrecisionRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert INT8_ONNX in auto.manifest['files']
    card = (auto.directory / 'README.md').read_text()
    assert '## Precision' in card
    assert len(re.findall(r'^\| (?:fp32|int8) \| (?:onnx|openvino) \|', card, re.M)) == 4


def test_the_measured_recall_is_that_of_the_run(auto):
    measured = auto.precision.measurements[0].recall
    assert measured == pytest.approx(auto.metrics['after']['efficientnet-lite0_recall_at_k'])


def test_what_was_chosen_is_taken(auto):
    engine = load_engine(auto, device='cpu')
    assert (engine.precision, engine.engine) == (auto.precision.chosen, auto.precision.engine)
    for name in GRAPH_ENGINES:
        int8 = load_engine(auto, precision='int8', engine=name)
        assert (int8.precision, int8.engine, int8.is_onnx) == ('int8', name, True)
        assert int8.num_bytes == (auto.directory / INT8_ONNX).stat().st_size
    assert load_engine(auto, precision='fp32', is_onnx=True).precision == 'fp32'
    assert load_engine(auto, is_onnx=False, device='cpu').precision == 'fp32'


def test_int8_that_loses_too_much_is_left(tmp_path):
    # of an untrained network, whose vectors are nearly the same, int8 keeps little
    artifact = trained(tmp_path / 'a', callbacks=[EVALUATION], export_precision='auto')
    record = artifact.precision
    assert record.chosen == 'fp32'
    losses = {each.recall_loss for each in record.measurements if each.precision == 'int8'}
    assert min(losses) > 0.01
    assert re.match(r'int8 loses [\d.]+ % of recall, and at most 1 % may be', record.reason)
    assert record.reason in (artifact.directory / 'README.md').read_text()
    assert INT8_ONNX not in artifact.manifest['files']
    assert not (artifact.directory / INT8_ONNX).exists()
    assert load_engine(artifact, device='cpu').precision == 'fp32'
    with pytest.raises(
        ArtifactError, match=r"no int8 graph \(int8 loses .*export_precision='int8'"
    ):
        load_engine(artifact, precision='int8')


def test_int8_that_was_asked_for_is_taken_whatever_it_loses(tmp_path):
    artifact = trained(tmp_path / 'a', export_precision='int8')
    record = artifact.precision
    assert (record.asked, record.chosen, record.num_queries) == ('int8', 'int8', 0)
    assert 'asked for' in record.reason
    assert all(each.recall is None for each in record.measurements)
    assert load_engine(artifact, device='cpu').precision == 'int8'


def test_labelled_eval_data_is_searched_where_nothing_else_is(tmp_path):
    data = {'eval': make_picture_docs(num_classes=3, items_per_class=4, seed=2)}
    artifact = trained(tmp_path / 'a', data, eval_data='eval', export_precision='auto')
    record = artifact.precision
    # nearly all of the index would be found: as many are looked at as there are to find
    assert (record.num_queries, record.num_index, record.limit) == (12, 12, 3)


def test_nothing_to_search_keeps_fp32(tmp_path):
    artifact = trained(tmp_path / 'a', export_precision='auto')
    assert artifact.precision.chosen == 'fp32'
    assert 'nothing to search' in artifact.precision.reason
    assert artifact.precision.measurements == ()
    assert INT8_ONNX not in artifact.manifest['files']


def test_one_class_to_search_keeps_fp32(tmp_path):
    data = {'query': make_picture_docs(num_classes=1, items_per_class=8, seed=1)}
    artifact = trained(tmp_path / 'a', data, callbacks=[EVALUATION], export_precision='auto')
    assert artifact.precision.chosen == 'fp32'
    assert 'fewer than two classes' in artifact.precision.reason
    assert artifact.precision.measurements == ()


def test_fp32_measures_nothing_and_older_artifacts_are_fp32(tmp_path):
    artifact = trained(tmp_path / 'a', callbacks=[EVALUATION])
    assert artifact.precision is None
    old = damaged(artifact, tmp_path / 'old', lambda manifest: manifest.pop('precision'))
    engine = load_engine(old, device='cpu')
    assert (engine.precision, engine.engine) == ('fp32', 'onnx')
    with pytest.raises(ArtifactError, match=r"no int8 graph: train with export_precision='int8'"):
        load_engine(old, precision='int8')


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        (('chosen',), 'int4'),
        (('engine',), 'tensorrt'),
        (('asked',), None),
        (('max_recall_loss',), 7),
        (('num_queries',), -1),
        (('num_queries',), 1.5),
        (('limit',), 'all'),
        (('measurements',), 3),
        (('measurements', 0, 'documents_per_second'), float('nan')),
        (('measurements', 0, 'documents_per_second'), float('inf')),
        (('measurements', 1, 'recall'), 1.5),
        (('measurements', 1, 'precision'), ['int8']),
        (('measurements', 1), 'fast'),
    ],
)
def test_a_damaged_record_is_refused(auto, tmp_path, path, value):
    def change(manifest):
        inner = manifest['precision']
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    with pytest.raises(ArtifactError, match='does not describe its precision'):
        load_artifact(damaged(auto, tmp_path / 'a', change))


@pytest.mark.parametrize('value', [[], 'int8', {}, 4])
def test_a_record_that_is_none_is_refused(auto, tmp_path, value):
    with pytest.raises(ArtifactError, match='does not describe its precision'):
        load_artifact(damaged(auto, tmp_path / 'a', lambda m: m.update(precision=value)))


def test_int8_that_was_chosen_must_be_there(auto, tmp_path):
    def change(manifest):
        manifest['files'].pop(INT8_ONNX)
        manifest['precision']['chosen'] = 'int8'

    directory = damaged(auto, tmp_path / 'a', change)
    (directory / INT8_ONNX).unlink()
    with pytest.raises(ArtifactError, match=f'incomplete: {INT8_ONNX} is missing'):
        load_artifact(directory)


def test_a_changed_int8_graph_is_refused(auto, tmp_path):
    directory = damaged(auto, tmp_path / 'a', lambda manifest: None)
    graph = directory / INT8_ONNX
    graph.write_bytes(graph.read_bytes()[:-1] + b'!')
    assert hash_file(graph) != auto.manifest['files'][INT8_ONNX]
    with pytest.raises(ArtifactError, match='was changed after'):
        load_artifact(directory)


def measurement(precision, engine, speed, loss):
    return Measurement(precision, engine, speed, 1.0, 1.0, 0.5, loss)


def test_the_fastest_of_what_is_installed():
    record = PrecisionRecord(
        'auto',
        'int8',
        'openvino',
        'a reason',
        0.01,
        measurements=(
            measurement('fp32', 'onnx', 10, 0.0),
            measurement('fp32', 'openvino', 12, 0.0),
            measurement('int8', 'onnx', 20, 0.02),
            measurement('int8', 'openvino', 30, 0.01),
        ),
    )
    assert record.engines_for(None, GRAPH_ENGINES)[0] == ('int8', 'openvino')
    # int8 in ONNX Runtime loses more than it may, so nobody gets it without asking
    assert record.engines_for(None, ['onnx'])[0] == ('fp32', 'onnx')
    assert record.engines_for('int8', ['onnx'])[0] == ('int8', 'onnx')
    assert record.engines_for('fp32', GRAPH_ENGINES)[0] == ('fp32', 'openvino')


def test_the_next_is_taken_where_the_fastest_cannot_be_loaded(auto, tmp_path, caplog):
    # as an older ONNX Runtime has no kernel for an operator of a newer one
    unknown = model([helper.make_node('Gelu', ['x'], ['y'])]).SerializeToString()
    speeds = {('int8', 'onnx'): 30.0, ('fp32', 'onnx'): 20.0}

    def change(manifest):
        manifest['precision']['chosen'], manifest['precision']['engine'] = 'int8', 'onnx'
        for each in manifest['precision']['measurements']:
            pair = each['precision'], each['engine']
            each['documents_per_second'], each['recall_loss'] = speeds.get(pair, 1.0), 0.0
        (tmp_path / 'a' / INT8_ONNX).write_bytes(unknown)
        manifest['files'][INT8_ONNX] = hash_file(tmp_path / 'a' / INT8_ONNX)

    artifact = load_artifact(damaged(auto, tmp_path / 'a', change))
    engine = load_engine(artifact, device='cpu')
    assert (engine.precision, engine.engine) == ('fp32', 'onnx')
    assert 'int8 in onnx, the fastest, is left out: ONNX Runtime cannot load' in caplog.text
    # what is asked for is not exchanged
    for asked in (
        {'precision': 'int8', 'engine': 'onnx'},
        {'precision': 'int8'},
        {'engine': 'onnx'},
    ):
        with pytest.raises(ArtifactError, match='cannot load the graph'):
            load_engine(artifact, device='cpu', **asked)


@pytest.mark.parametrize('asked', ['int8', 'auto'])
def test_where_no_engine_runs_int8_the_run_says_so(asked, tmp_path, monkeypatch):
    def write_unknown(source, target, batches):
        made = model([helper.make_node('Unheard', ['x'], ['y'], domain='nowhere')])
        target.write_bytes(made.SerializeToString())
        return False

    monkeypatch.setattr('finetuner.runs.precision.write_int8', write_unknown)
    if asked == 'int8':
        with pytest.raises(ArtifactError, match='no engine here runs the int8 graph'):
            trained(tmp_path / 'a', export_precision=asked, callbacks=[EVALUATION])
        return
    record = trained(tmp_path / 'a', export_precision=asked, callbacks=[EVALUATION]).precision
    assert record.chosen == 'fp32'
    assert 'no engine here runs the int8 graph' in record.reason


def test_texts_in_int8_through_a_run(tmp_path):
    encoder = write_tiny_encoder(tmp_path / 'encoder')
    docs = DocumentArray(
        Document(text=f'{text} {extra}', tags={'finetuner_label': text})
        for text in TEXTS
        for extra in ('small', 'large', 'the left of a dog and cat')
    )
    artifact = trained(
        tmp_path / 'a',
        {'train': docs, 'query': docs},
        model=str(encoder),
        model_options={},
        batch_size=8,
        callbacks=[EVALUATION],
        export_precision='int8',
    )
    record = artifact.precision
    assert record.chosen == 'int8'
    # scales of activations are taken as it runs
    assert record.num_calibration == 0
    assert {each.engine for each in record.measurements} == set(GRAPH_ENGINES)
    assert min(each.cosine for each in record.measurements) > 0.99


@pytest.mark.parametrize(
    ('parameters', 'message'),
    [
        ({'export_precision': 'int4'}, 'export_precision: unexpected value .*fp32, int8, auto'),
        ({'export_precision': None}, 'export_precision'),
        ({'max_recall_loss': 1}, 'max_recall_loss: .*less than 1'),
        ({'max_recall_loss': -0.1}, 'max_recall_loss: .*greater than or equal to 0'),
    ],
)
def test_arguments_out_of_range(parameters, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_parameters({'train_data': 'x', **parameters})


def test_both_engines_are_there():
    # the suite measures both; without OpenVINO half of it would say nothing
    assert (OnnxEngine.engine, OpenvinoEngine.engine) == GRAPH_ENGINES
