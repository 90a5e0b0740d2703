"""`fit` of a backbone by name on data in every form it is held in."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from docarray import Document, DocumentArray

import finetuner
from finetuner.callback import EvaluationCallback
from finetuner.client import get_client
from finetuner.data import CSVOptions, save_documents
from finetuner.data.loading import build_dataset
from finetuner.excepts import ConfigError, DataError, NotFoundError
from tests.conftest import make_picture_docs
from tests.unit.sqlite_arrays import array, written

QUICK = {
    'model_options': {'input_size': 32, 'weights': 'none'},
    'epochs': 1,
    'batch_size': 8,
    'num_workers': 0,
    'device': 'cpu',
}
LABELLED = CSVOptions(is_labeled=True)
NUM_CLASSES, EACH = 6, 4
LABELS = [number // EACH for number in range(NUM_CLASSES * EACH)]


@pytest.fixture(autouse=True, scope='module')
def finetuner_home(tmp_path_factory):
    """One home for all, as a script has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FINETUNER_HOME', str(tmp_path_factory.mktemp('home')))
        yield


@pytest.fixture(scope='module')
def pictures() -> DocumentArray:
    return make_picture_docs(NUM_CLASSES, EACH)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, pictures) -> Path:
    """`pictures/class <label>/<number>.png`, each class in a folder of its own."""
    root = tmp_path_factory.mktemp('data')
    for number, doc in enumerate(pictures):
        path = root / 'pictures' / f'class {doc.tags["finetuner_label"]}' / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(doc.blob)
    return root


def paths(folder: Path) -> list[str]:
    """Of all pictures, relative to the folder, in order of the labels."""
    found = sorted((folder / 'pictures').rglob('*.png'), key=lambda path: int(path.stem))
    return [str(path.relative_to(folder)) for path in found]


def write_csv(path: Path, rows) -> str:
    with path.open('w', newline='') as file:
        csv.writer(file).writerows(rows)
    return str(path)


def labelled_csv(folder: Path, pictures: DocumentArray) -> str:
    return write_csv(folder / 'labelled.csv', zip(paths(folder), LABELS, strict=True))


def picture_folder(folder: Path, pictures: DocumentArray) -> str:
    return str(folder / 'pictures')


def json_lines(folder: Path, pictures: DocumentArray) -> str:
    path = folder / 'data.jsonl'
    rows = zip(paths(folder), LABELS, strict=True)
    path.write_text(''.join(json.dumps({'uri': uri, 'label': n}) + '\n' for uri, n in rows))
    return str(path)


def parquet(folder: Path, pictures: DocumentArray) -> str:
    path = folder / 'data.parquet'
    table = pa.table({'image': [doc.blob for doc in pictures], 'label': LABELS})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def docs_file(folder: Path, pictures: DocumentArray) -> Path:
    pictures.save_binary(folder / 'data.docs', protocol='protobuf')
    return folder / 'data.docs'


def saved_documents(folder: Path, pictures: DocumentArray) -> str:
    save_documents(pictures, folder / 'saved.docs')
    return str(folder / 'saved.docs')


def iterator(folder: Path, pictures: DocumentArray):
    return (
        Document(uri=str(folder / path), tags={'finetuner_label': label})
        for path, label in zip(paths(folder), LABELS, strict=True)
    )


def sqlite_array(folder: Path, pictures: DocumentArray) -> DocumentArray:
    return array(folder / 'array.db', pictures)


def sqlite_file(folder: Path, pictures: DocumentArray) -> str:
    written(folder / 'file.db', pictures)
    return str(folder / 'file.db')


def pushed(folder: Path, pictures: DocumentArray) -> str:
    get_client().push_data(pictures, 'pushed pictures')
    return 'pushed pictures'


SOURCES = [
    labelled_csv,
    picture_folder,
    json_lines,
    parquet,
    docs_file,
    saved_documents,
    iterator,
    sqlite_array,
    sqlite_file,
    pushed,
]


def submitted(train_data, **options) -> dict:
    """Give data to `fit`, which checks and stores it, and have nothing trained: the run's config."""
    run = finetuner.fit('mobilenet_v3_small', train_data, **{**QUICK, **options})
    get_client().cancel_run('default', run.name)
    return run.config


def finished(train_data, **options) -> finetuner.run.Run:
    """A run that has ended well."""
    run = finetuner.fit('mobilenet_v3_small', train_data, **{**QUICK, **options})
    log = '\n'.join(run.stream_logs(interval=1))
    assert run.status()['status'] == 'FINISHED', log
    assert run.artifact_id
    return run


def picture_bytes(doc: Document) -> bytes:
    return doc.blob or Path(doc.uri).read_bytes()


def by_label(docs, labels) -> dict[int, set[bytes]]:
    found: dict[int, set[bytes]] = {}
    for doc, label in zip(docs, labels, strict=True):
        found.setdefault(label, set()).add(picture_bytes(doc))
    return found


# what comes in is what is trained on


@pytest.mark.parametrize('source', SOURCES)
def test_every_source_is_the_same_class_data(folder, pictures, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = source(folder, pictures)
    options = {'csv_options': LABELLED} if source is labelled_csv else {}
    stored = get_client().load_data(submitted(data, **options)['train_data'])
    dataset = build_dataset(stored)
    assert dataset.kind == 'class'
    assert len(stored) == len(LABELS)
    assert by_label(stored, dataset.labels) == by_label(pictures, LABELS)
    expected = {labelled_csv: '0', picture_folder: 'class 0'}.get(source, 0)
    assert dataset.classes[0] == expected


def test_a_csv_of_query_document_pairs_is_class_data(folder, pictures):
    names = paths(folder)
    # the second of each class is a query as well: what it finds is of the same class
    pairs = [
        (names[first + query], names[first + found])
        for first in range(0, len(names), EACH)
        for query, found in ((0, 1), (1, 2), (0, 3))
    ]
    stored = get_client().load_data(submitted(write_csv(folder / 'pairs.csv', pairs))['train_data'])
    dataset = build_dataset(stored)
    assert dataset.kind == 'class'
    assert len(stored) == len(names), 'each picture once'
    assert by_label(stored, dataset.labels) == by_label(pictures, LABELS)


def test_without_conversion_a_csv_gives_absolute_paths(folder, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = CSVOptions(is_labeled=True, convert_to_blob=False)
    config = submitted(labelled_csv(folder, pictures), csv_options=options)
    stored = get_client().load_data(config['train_data'])
    assert [doc.uri for doc in stored] == [str(folder / path) for path in paths(folder)]


# runs


def test_a_run_on_csv_files_throughout(folder, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = labelled_csv(folder, pictures)
    rows = list(zip(paths(folder), LABELS, strict=True))
    evaluation = write_csv(folder / 'evaluation.csv', rows[:12])
    run = finished(
        data,
        eval_data=data,
        csv_options=LABELLED,
        callbacks=[EvaluationCallback(evaluation, limit=3)],
    )
    assert 'val_loss' in run.logs()
    metrics = run.metrics()
    assert list(metrics) == ['before', 'after', 'p_value']
    assert len(get_client().load_data(run.config['eval_data'])) == len(LABELS)
    (callback,) = run.config['callbacks']
    assert len(get_client().load_data(callback['options']['query_data'])) == 12


def test_a_run_on_a_folder_with_a_part_held_out(folder):
    run = finished(folder / 'pictures', val_split=0.34, run_name='held out')
    log = run.logs()
    assert 'Training on 16 Documents (class)' in log
    assert 'val_loss' in log


def test_a_run_on_sqlite_storage_leaves_it_as_it_is(pictures, tmp_path):
    data = sqlite_array(tmp_path, pictures[:16])
    before = [(doc.id, doc.blob, dict(doc.tags)) for doc in data]
    finished(data)
    assert [(doc.id, doc.blob, dict(doc.tags)) for doc in data] == before
    assert all(doc.embedding is None for doc in data)


def test_a_run_on_pushed_data(pictures):
    reference = get_client().push_data(pictures, 'mine')
    assert finished('mine').config['train_data'] == reference


# broken files


@pytest.fixture(scope='module')
def broken_json_lines(folder, pictures) -> str:
    """The pictures again, of which one is empty and one is cut off."""
    names = paths(folder)
    for name, content in (('empty.png', b''), ('cut.png', pictures[9].blob[:60])):
        (folder / name).write_bytes(content)
    names[3], names[9] = 'empty.png', 'cut.png'
    path = folder / 'broken.jsonl'
    rows = zip(names, LABELS, strict=True)
    path.write_text(''.join(json.dumps({'uri': uri, 'label': n}) + '\n' for uri, n in rows))
    return str(path)


BROKEN = ((3, "empty.png' is empty"), (9, 'truncated'))


def test_broken_files_are_left_out_counted_and_named(broken_json_lines):
    log = finished(broken_json_lines, on_broken='skip').logs()
    assert f'2 of {len(LABELS)} Documents are left out' in log
    for position, why in BROKEN:
        lines = [line for line in log.splitlines() if f'Left out: Document {position}' in line]
        assert len(lines) == 1
        assert why in lines[0]


def test_broken_files_stop_what_would_not_skip_them(broken_json_lines):
    runs = len(finetuner.list_runs(size=100))
    for options in ({}, {'on_broken': 'stop'}):
        with pytest.raises(DataError, match=r'^train_data: 2 pictures cannot be opened') as caught:
            finetuner.fit('mobilenet_v3_small', broken_json_lines, **QUICK, **options)
        for position, why in BROKEN:
            assert f'Document {position}' in str(caught.value)
            assert why in str(caught.value)
    assert len(finetuner.list_runs(size=100)) == runs
    with pytest.raises(ConfigError, match='on_broken'):
        finetuner.fit('mobilenet_v3_small', broken_json_lines, **QUICK, on_broken='ignore')


# what is no data


@pytest.mark.parametrize('argument', ['train_data', 'eval_data'])
def test_a_text_that_is_neither_a_file_nor_a_name(pictures, argument):
    get_client().push_data(pictures, 'clothes')
    with pytest.raises(NotFoundError, match="did you mean 'clothes'"):
        finetuner.fit('mobilenet_v3_small', **{'train_data': pictures, argument: 'cloths'}, **QUICK)
    with pytest.raises(DataError, match=r"there is no file or folder 'cloths\.csv'"):
        finetuner.fit(
            'mobilenet_v3_small', **{'train_data': pictures, argument: 'cloths.csv'}, **QUICK
        )


def test_texts_are_no_pictures(tmp_path):
    path = write_csv(tmp_path / 'texts.csv', [('a cat', 'x'), ('a dog', 'y')] * 4)
    with pytest.raises(DataError, match=r'train_data: .*Document 0'):
        finetuner.fit('mobilenet_v3_small', path, csv_options=LABELLED, **QUICK)


def test_a_row_of_another_shape_is_named(folder, pictures):
    rows = [*zip(paths(folder), LABELS, strict=True)]
    rows[6] = rows[6][:1]
    path = write_csv(folder / 'short.csv', rows)
    with pytest.raises(DataError, match=r"row at line 7 of 'short\.csv'"):
        finetuner.fit('mobilenet_v3_small', path, csv_options=LABELLED, **QUICK)
