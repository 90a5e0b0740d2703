"""Rows of declared datasets as Documents, as training data and as collections, and collections as rows."""

from __future__ import annotations

import datetime
import io
import json
import logging
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import torch
from docarray import Document, DocumentArray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import finetuner
from finetuner.callback import EvaluationCallback
from finetuner.client import get_client
from finetuner.collections import TrainingSet
from finetuner.columns import File, dataset
from finetuner.data import open_documents
from finetuner.data.contents import content_of, load_contents
from finetuner.data.loading import build_dataset
from finetuner.excepts import ConfigError, DataError
from tests.conftest import make_vector_docs
from tests.unit.fit_harness import submit, watched

SIZE = (8, 10)


@pytest.fixture
def place(tmp_path):
    """Arguments of a dataset of its own."""
    return {'sql_file': tmp_path / 'dataset.sql', 'data_dir': tmp_path / 'dataset'}


def pixels(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def picture_file(folder, seed, suffix='.png'):
    path = folder / f'picture {seed}{suffix}'
    Image.fromarray(pixels(seed)).save(path)
    return path


def pictures(place, folder, count=4, of_each=2):
    """A dataset of pictures, and one computed of each."""

    @dataset(**place)
    class Pictures:
        image: File
        concept: str
        split: str = 'train'
        note: Optional[str] = None  # noqa: UP045 - as many write it

        def turned(image: File) -> File['png']:  # noqa: F821, UP037 - no name, an ending
            with Image.open(image.path) as picture, File.make_tmp('.png') as file:
                picture.transpose(Image.Transpose.ROTATE_90).save(file.path)
                return file

        def brightness(image: File) -> float:
            with Image.open(image.path) as picture:
                return float(np.asarray(picture).mean())

    Pictures.extend(
        {
            'image': picture_file(folder, i),
            'concept': f'c{i // of_each}',
            'split': ('train', 'test')[i % 2],
        }
        for i in range(count)
    )
    return Pictures


def holder(place, **kinds):
    """A dataset of fields of these types."""
    return dataset(**place)(type('Holder', (), {'__annotations__': kinds}))


def opened(doc):
    data = doc.blob or Path(doc.uri).read_bytes()
    return np.asarray(Image.open(io.BytesIO(data)))


# ---- Documents


def test_each_row_becomes_a_document_that_leads_back_to_it(place, tmp_path):
    made = pictures(place, tmp_path)
    made.where(concept='c0', split='test').delete()
    docs = made.to_documents(content='turned', label='concept')
    assert isinstance(docs, DocumentArray)
    assert [doc.id for doc in docs] == ['Pictures-1', 'Pictures-3', 'Pictures-4']
    assert [doc.tags for doc in docs] == [
        {'finetuner_label': 'c0', 'split': 'train', 'row': 1},
        {'finetuner_label': 'c1', 'split': 'train', 'row': 3},
        {'finetuner_label': 'c1', 'split': 'test', 'row': 4},
    ]
    by_id = {row.id: row for row in made}
    for doc in docs:
        row = by_id[doc.tags['row']]
        assert doc.uri == row.turned.path
        assert (opened(doc) == np.rot90(pixels(row.id - 1))).all()
    rows = made.where(split='train')
    assert [doc.id for doc in rows.to_documents('image')] == ['Pictures-1', 'Pictures-3']
    assert 'finetuner_label' not in rows.to_documents('image')[0].tags
    # a derived column is a tag where it is asked for, and computed then
    (doc,) = made.where(split='test').to_documents('image', tags=['brightness', 'concept', 'note'])
    assert doc.tags == {'brightness': pixels(3).mean(), 'concept': 'c1', 'row': 4}
    loaded = load_contents(docs)
    assert [doc.blob for doc in loaded] == [row.turned.read() for row in made]


CONTENTS = [
    (str, 'some text', 'text'),
    (bytes, b'\0\xff', 'blob'),
    (np.ndarray, np.arange(6, dtype=np.float32).reshape(2, 3), 'tensor'),
    (torch.Tensor, torch.arange(3), 'tensor'),
    (str | None, 'some', 'text'),
]


@pytest.mark.parametrize(('kind', 'value', 'field'), CONTENTS)
def test_a_content_of_every_type_is_the_documents(kind, value, field, place):
    made = holder(place, value=kind, number=int)
    made.add(value=value, number=3)
    (doc,) = made.to_documents('value', 'number')
    assert np.array_equal(getattr(doc, field), np.asarray(value) if field == 'tensor' else value)
    assert doc.tags == {'finetuner_label': 3, 'row': 1}
    (stored,) = open_documents(made, content='value', label='number')
    assert np.array_equal(content_of(stored), content_of(doc))


def test_a_file_of_text_is_read_and_any_other_is_named(place, tmp_path):
    made = holder(place, file=File)
    for name, data in (
        ('a.txt', 'ä b'.encode()),
        ('b.md', b'# c'),
        ('c.glb', b'glTF'),
        ('d', b'?'),
    ):
        (tmp_path / name).write_bytes(data)
        made.add(file=tmp_path / name)
    docs = made.to_documents()
    assert [doc.text for doc in docs] == ['ä b', '# c', '', '']
    assert [doc.uri for doc in docs[2:]] == [made[2].file.path, made[3].file.path]
    (tmp_path / 'e.txt').write_bytes(b'\xff\xfe')
    made.add(file=tmp_path / 'e.txt')
    with pytest.raises(DataError, match=r'Holder\.file of row 5: a text is UTF-8'):
        made.to_documents()


def test_tags_are_what_json_holds(place):
    kinds = {
        'content': bytes,
        'when': datetime.datetime,
        'number': float,
        'names': list[str],
        'more': dict,
        'flag': bool,
        'array': np.ndarray,
        'row': int,
        'finetuner_score': float,
        'finetuner': dict,
    }
    made = holder(place, **kinds)
    when = datetime.datetime(2020, 1, 2, 3, 4, 5)
    values = {'names': ['a'], 'more': {'b': None}, 'flag': True}
    others = {'array': np.zeros(2), 'row': 7, 'finetuner_score': 0.5, 'finetuner': {'label': 3}}
    made.add(content=b'x', when=when, number=float('nan'), **values, **others)
    (doc,) = made.to_documents('content')
    assert doc.tags == {**values, 'when': '2020-01-02 03:04:05', 'row': 1}
    assert json.dumps(doc.tags)
    (stored,) = open_documents(made.to_documents('content'))
    assert stored.tags == doc.tags
    (stored,) = open_documents(made, content='content')
    assert stored.tags == {'row': 1}, 'training is told nothing else'
    for tags, words in (
        (['array'], 'array is numpy.ndarray, which no tag holds'),
        (['row'], "the tag 'row' says something else"),
        (['finetuner'], 'something else'),
        (['nmaes'], "did you mean 'names'"),
        ('names', 'a list of names'),
    ):
        with pytest.raises(ConfigError, match=words):
            made.to_documents('content', tags=tags)


@pytest.mark.parametrize('kind', [str, int, bool, str | None, bool | None])
def test_labels_are_what_documents_would_have(kind, place):
    values = {str: ['b', 'a', 'b'], int: [5, -1, 5], bool: [True, False, True]}
    plain = next(each for each in values if each is kind or kind == each | None)
    made = holder(place, text=str, label=kind)
    made.extend({'text': f't{i}', 'label': value} for i, value in enumerate(values[plain]))
    naive = DocumentArray(
        Document(text=f't{i}', tags={'finetuner_label': value})
        for i, value in enumerate(values[plain])
    )
    for docs in (
        made.to_documents('text', 'label'),
        open_documents(made, None, 'stop', 'text', 'label'),
    ):
        found, wanted = build_dataset(docs), build_dataset(naive)
        assert found.kind == wanted.kind == 'class'
        assert list(found) == list(wanted)
        assert found.classes == wanted.classes


ROWS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=['Cs']), min_size=1).filter(str.strip),
        st.integers(-(2**53), 2**53) | st.none(),
        st.sampled_from(['train', 'test']),
    ),
    max_size=12,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, labelled=st.booleans())
def test_any_rows_are_the_documents_that_a_plain_loop_makes(rows, labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp('rows')
    made = holder(
        {'sql_file': folder / 'a.sql', 'data_dir': folder / 'a'},
        text=str, label=Optional[int], split=str,  # noqa: UP045 - as many write it
    )  # fmt: skip
    made.extend({'text': text, 'label': label, 'split': split} for text, label, split in rows)
    naive = [
        (f'Holder-{i}', text, {'finetuner_label': label} if labelled and label is not None else {})
        for i, (text, label, split) in enumerate(rows, 1)
        if split == 'train'
    ]
    chosen, label = made.where(split='train'), 'label' if labelled else None
    docs = chosen.to_documents('text', label, tags=[])
    tags = [{k: v for k, v in doc.tags.items() if k != 'row'} for doc in docs]
    assert [(doc.id, doc.text, t) for doc, t in zip(docs, tags, strict=True)] == naive
    if len({bool(tags) for *_, tags in naive}) > 1:
        with pytest.raises(DataError, match='is None, while others have a label'):
            open_documents(chosen, content='text', label=label)
    else:
        stored = open_documents(chosen, content='text', label=label)
        assert [(doc.id, doc.text, doc.tags) for doc in stored] == [
            (doc.id, doc.text, doc.tags) for doc in docs
        ]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ({}, 'content is missing: in Pictures it could be image, concept, split, note, turned'),
        ({'label': 'concept'}, 'it could be image, split, note, turned'),
        ({'content': 'imag'}, "content: unknown column 'imag': did you mean 'image'"),
        ({'content': 'brightness'}, "content='brightness' is float: it takes File, str, bytes"),
        ({'content': 3}, 'content=3: it takes the name of a column'),
        ({'content': 'image', 'label': 'concpt'}, "label: unknown column 'concpt'"),
        ({'content': 'image', 'label': 'brightness'}, "label='brightness' is float: it takes str"),
        ({'content': 'image', 'label': 'turned'}, "label='turned' is File"),
        ({'content': 'image', 'label': ['concept']}, 'it takes the name of a column'),
    ],
)
def test_a_column_that_cannot_be_meant_is_told_before_anything_is_computed(
    arguments, words, place, tmp_path
):
    made = pictures(place, tmp_path)
    for call in (
        made.to_documents,
        made.where(split='train').iter_documents,
        lambda **given: open_documents(made, **given),
        lambda **given: finetuner.fit('efficientnet-lite0', made, **given),
        lambda **given: finetuner.fit(torch.nn.Identity(), made.rows, **given),
    ):
        with pytest.raises(ConfigError, match=words):
            call(**arguments)


def test_the_only_column_that_can_be_meant_need_not_be_named(place):
    made = holder(place, text=str, number=int, when=datetime.datetime)
    assert list(made.to_documents(label='number')) == []
    with pytest.raises(ConfigError, match='it could be text, name'):
        holder(
            place | {'sql_file': place['sql_file'].with_name('b.sql')}, text=str, name=str
        ).to_documents()
    number = holder(place | {'sql_file': place['sql_file'].with_name('c.sql')}, number=int)
    with pytest.raises(ConfigError, match='Holder has no column of contents: these are File'):
        number.to_documents()


def test_what_is_no_content_or_no_label_is_told_by_row(place):
    made = holder(place, text=str | None, label=str)
    made.add(text='a', label='b')
    made.add(text=None, label='b')
    with pytest.raises(DataError, match=r'Holder\.text of row 2: it is None'):
        made.to_documents('text', 'label')
    made.rows.delete()
    made.add(text='a', label=' ')
    with pytest.raises(DataError, match=r"Holder\.label of row 3: label ' ' is empty"):
        made.to_documents('text', 'label')


def test_rows_that_cannot_be_computed_stop_or_are_left_out(place, caplog):
    @dataset(**place)
    class Texts:
        text: str
        label: str

        def words(text: str) -> str:
            return text.split('=')[1]

    Texts.extend({'text': text, 'label': 'x'} for text in ('a=b', 'c', 'd=e', 'f', 'g=h'))
    with pytest.raises(DataError, match=r'Texts\.words of row 2 cannot be computed: IndexError'):
        open_documents(Texts, content='words', label='label')
    with caplog.at_level(logging.WARNING, 'finetuner'):
        docs = open_documents(Texts, None, 'skip', content='words', label='label')
    assert [doc.text for doc in docs] == ['b', 'e', 'h']
    assert [doc.tags['row'] for doc in docs] == [1, 3, 5]
    assert 'left out: 2, such as 2: words of row 2: IndexError' in caplog.text


def test_a_file_that_was_taken_away_stops_or_is_left_out(place, tmp_path, caplog):
    made = pictures(place, tmp_path)
    made[1].image._store._local(made[1].image._key).unlink()
    with pytest.raises(DataError, match=r'Pictures\.image of row 2: nothing is stored'):
        open_documents(made, content='image')
    with caplog.at_level(logging.WARNING, 'finetuner'):
        docs = open_documents(made, None, 'skip', content='image')
    assert [doc.tags['row'] for doc in docs] == [1, 3, 4]
    assert 'left out: 1, such as 2' in caplog.text


def test_files_of_a_store_elsewhere_are_fetched(tmp_path):
    place = {'sql_file': tmp_path / 'dataset.sql', 'data_dir': f'memory://{tmp_path.name}'}
    made = pictures(place, tmp_path, 2)
    docs = made.to_documents('turned', 'concept')
    for i, doc in enumerate(docs):
        assert doc.uri.startswith(str(tmp_path))
        assert (opened(doc) == np.rot90(pixels(i))).all()


# ---- fit


def test_columns_are_of_datasets_alone(tmp_path):
    docs = make_vector_docs()
    for columns in ({'content': 'image'}, {'label': 'x'}):
        for model in ('efficientnet-lite0', torch.nn.Identity()):
            with pytest.raises(ConfigError, match='the data is none: leave them out'):
                finetuner.fit(model, docs, **columns)
        with pytest.raises(ConfigError, match="='"):
            open_documents(docs, **columns)
        with pytest.raises(ConfigError):
            open_documents(tmp_path, **columns)
    # an element of a list is none, either
    with pytest.raises(ConfigError, match='content='):
        open_documents([docs[0]], content='x')


def test_a_run_trains_on_the_documents_that_one_would_have_made(place, tmp_path):
    made = pictures(place, tmp_path, 8, of_each=4)
    train, test = made.where(split='train'), made.where(split='test')
    run = submit(
        model='efficientnet-lite0',
        model_options={'weights': 'none', 'input_size': 32},
        train_data=train,
        eval_data=test,
        content='turned',
        label='concept',
        callbacks=iter([EvaluationCallback(query_data=test, index_data=made)]),
        batch_size=4,
        num_items_per_class=2,
    )
    naive = {
        name: DocumentArray(
            Document(uri=row.turned.path, tags={'finetuner_label': row.concept}) for row in rows
        )
        for name, rows in (('train', train), ('test', test), ('all', made))
    }
    options = run.config['callbacks'][0]['options']
    references = {
        'train': [run.config['train_data']],
        'test': [run.config['eval_data'], options['query_data']],
        'all': [options['index_data']],
    }
    for name, found in references.items():
        wanted = build_dataset(naive[name])
        for reference in found:
            stored = build_dataset(get_client().load_data(reference))
            assert stored.kind == wanted.kind == 'class'
            assert list(stored) == list(wanted)
            assert stored.classes == wanted.classes
    assert 'content' not in run.config
    again = submit(
        model='efficientnet-lite0', model_options={'weights': 'none', 'input_size': 32},
        train_data=train, content='turned', label='concept', batch_size=4,
        num_items_per_class=2,
    )  # fmt: skip
    assert again.config['train_data'] == run.config['train_data'], (
        'equal data is the same to the byte'
    )


def vectors(place):
    """The dataset of the vectors of `make_vector_docs`, and these."""
    docs = make_vector_docs()
    made = holder(place, vector=np.ndarray, number=int)
    made.extend({'vector': doc.tensor, 'number': doc.tags['finetuner_label']} for doc in docs)
    return made, docs


def test_a_module_trains_on_a_dataset_as_on_documents(place):
    made, docs = vectors(place)
    naive = DocumentArray(
        Document(tensor=doc.tensor, tags=doc.tags, id=f'Holder-{i}')
        for i, doc in enumerate(docs, 1)
    )
    weights = []
    for data, columns in (
        (naive, {}),
        (made, {'content': 'vector', 'label': 'number'}),
        (made.rows, {'label': 'number'}),
    ):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
        callbacks = [EvaluationCallback(query_data=data)]
        with (watch := watched()):
            tuned = finetuner.fit(
                network,
                data,
                eval_data=data,
                epochs=2,
                batch_size=16,
                callbacks=callbacks,
                **columns,
            )
        weights.append((tuned.state_dict(), watch.seen[0].labels))
    for state, labels in weights[1:]:
        assert labels == weights[0][1]
        assert all(torch.equal(state[name], weights[0][0][name]) for name in state)
    with (watch := watched()):
        finetuner.fit(
            torch.nn.Linear(6, 5),
            made,
            epochs=1,
            loss='NTXentLoss',
            batch_size=16,
            content='vector',
        )
    assert {len(set(labels)) for labels in watch.seen[0].labels} == {8}, 'instances, two views each'


# ---- collections


def emoji_like(place, folder, suffixes=('.png', '.webp', '.jpg')):
    """Pictures of several formats, each with a label of every type."""

    @dataset(**place)
    class Labelled:
        image: File
        concept: str
        number: int
        flag: bool
        names: list[str]
        boxes: dict
        mask: np.ndarray
        mask_file: File['png']  # noqa: F821, UP037 - no name, an ending
        split: str = 'train'

        def array(image: File) -> np.ndarray:
            with Image.open(image.path) as picture:
                return np.asarray(picture.convert('RGB')).transpose(2, 0, 1).copy()

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array)

        def data(image: File) -> bytes:
            return image.read()

    for i, suffix in enumerate(suffixes):
        mask = np.zeros(SIZE, np.uint8)
        mask[: i + 1, :3] = i + 1
        Image.fromarray(mask).save(folder / f'mask {i}.png')
        Labelled.add(
            image=picture_file(folder, i, suffix),
            concept=f'c{i}',
            number=10 * i,
            flag=bool(i % 2),
            names=['all', f'c{i}'],
            boxes={'car': [[0, 0, i + 1, 2]]},
            mask=mask,
            mask_file=folder / f'mask {i}.png',
            split=('train', 'test')[i % 2],
        )
    return Labelled


def taking(place, content, label):
    return holder(
        {'sql_file': place['sql_file'].with_name('back.sql'), 'data_dir': place['data_dir'].with_name('back')},
        image=content, label=label, group=str | None,
    )  # fmt: skip


LABELS = [
    ('classification', 'concept', str),
    ('classification', 'number', int),
    ('classification', 'flag', bool),
    ('classification', 'names', list[str]),
    ('object_detection', 'boxes', dict),
    ('segmentation', 'mask', np.ndarray),
    ('segmentation', 'mask_file', File['png']),
]


@pytest.mark.parametrize(('mltype', 'label', 'kind'), LABELS)
def test_rows_become_pairs_and_pairs_rows(mltype, label, kind, place, tmp_path):
    made = emoji_like(place, tmp_path)
    name = f'set {label}'
    fed = made.to_training_set(name, 'image', label=label, group='split', mltype=mltype)
    assert fed.count == {'train': 2, 'test': 1}
    assert fed.tile_size == list(SIZE)
    fed.save()
    back = taking(place, File, kind)
    assert back.import_training_set(TrainingSet.from_name(name), 'image', 'label', 'group') == 3
    for row, found, suffix in zip(made, back, ('.png', '.webp', '.jpg'), strict=True):
        assert found.image.read() == row.image.read(), 'the file that it was'
        assert found.image.suffix == suffix
        assert found.group == row.split
        wanted, value = getattr(row, label), found.label
        if isinstance(wanted, File):
            assert (np.asarray(Image.open(value.path)) == np.asarray(Image.open(wanted.path))).all()
        else:
            assert np.array_equal(value, wanted) if label == 'mask' else value == wanted


@pytest.mark.parametrize('content', ['array', 'tensor', 'data'])
@pytest.mark.parametrize('kind', [np.ndarray, torch.Tensor, bytes, File, File['png']])
def test_images_of_every_type_keep_their_pixels(content, kind, place, tmp_path):
    made = emoji_like(place, tmp_path, ('.png', '.webp'))
    fed = made.to_training_set('set', content, label='concept', tile_size=SIZE)
    fed.save()
    back = taking(place, kind, str)
    back.import_training_set(fed, 'image', 'label')
    for row, found in zip(made, back, strict=True):
        image = found.image
        if isinstance(image, File | bytes):
            data = image if isinstance(image, bytes) else image.read()
            image = np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).transpose(2, 0, 1)
        assert (np.asarray(image) == row.array).all()
        assert found.label == row.concept


def test_images_that_no_picture_holds_become_arrays_or_chosen_bands(place):
    fed = TrainingSet('bands', tile_size=SIZE)
    image = np.random.default_rng(0).integers(0, 4000, (5, *SIZE)).astype(np.uint16)
    fed.feed([(image, ['cat', 'dog']), (image, [0, 0])])
    fed.save()
    back = taking(place, File, str)
    with pytest.raises(DataError, match=r'pair 1: its image is \[5, 8, 10\] of uint16'):
        back.import_training_set(fed, 'image', 'label')
    assert back.import_training_set(fed, 'image', 'label', bands=[4, 2, 0]) == 2
    wanted = [opened(doc) for doc in fed.to_documents(bands=[4, 2, 0])]
    assert all(
        (opened(d) == w).all() for d, w in zip(back.to_documents('image'), wanted, strict=True)
    )
    assert [row.label for row in back] == ['cat + dog', 'none']
    arrays = holder(
        place, image=np.ndarray, label=Optional[str], vector=Optional[np.ndarray]  # noqa: UP045
    )  # fmt: skip
    arrays.import_training_set(fed, 'image', 'label')
    assert [row.label for row in arrays] == ['cat + dog', None]
    assert all((row.image == image).all() and row.image.dtype == np.uint16 for row in arrays)
    arrays.rows.delete()
    arrays.import_training_set(fed, content='image', label='vector')
    assert [row.vector.tolist() for row in arrays] == [[1, 1], [0, 0]]
    numbers = holder(
        place | {'sql_file': place['sql_file'].with_name('n.sql')}, image=np.ndarray, label=int
    )
    with pytest.raises(
        DataError, match='pair 1: it shows 2 classes, and int holds the number of one'
    ):
        numbers.import_training_set(fed, 'image', 'label')


def test_ints_are_places_of_classes_that_have_names(place, tmp_path):
    made = emoji_like(place, tmp_path)
    for name, classes, label in (('a', ['x', 'y'], 'flag'), ('b', ['20', '10', '0'], 'number')):
        fed = made.to_training_set(name, 'image', label=label, classes=classes)
        fed.save()
        assert [point.present for point in fed] == {
            'a': [['x'], ['y'], ['x']], 'b': [['0'], ['10'], ['20']],
        }[name]  # fmt: skip
        place = place | {'sql_file': tmp_path / f'{name}.sql'}
        back = holder(place, image=File, label=int)
        back.import_training_set(fed, 'image', 'label')
        assert [row.label for row in back] == [int(getattr(row, label)) for row in made]
    with pytest.raises(DataError, match='Labelled, row 2: label 10: classes are counted 0 to 1'):
        made.to_training_set('c', 'image', label='number', classes=['x', 'y'])


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        (
            {'content': 'concept', 'label': 'concept'},
            "content='concept' is str: the content of a pair",
        ),
        ({'content': 'number', 'label': 'concept'}, "content='number' is int"),
        (
            {'content': 'image', 'label': 'boxes'},
            "label='boxes' is dict: a label of classification is",
        ),
        (
            {'content': 'image', 'label': 'concept', 'mltype': 'segmentation'},
            'a label of segmentation',
        ),
        ({'content': 'image', 'label': 'concept', 'mltype': 'x'}, "unknown mltype 'x'"),
        ({'content': 'image', 'label': 'concept', 'group': 'number'}, 'name of a group is a str'),
        ({'content': 'array', 'label': 'concept'}, 'tile_size is missing'),
        (
            {'content': 'image', 'label': 'concept', 'group': 'split', 'partition': [50, 25, 25]},
            'leave out partition',
        ),
        (
            {'content': 'image', 'label': 'concept', 'tile_size': [9, 9]},
            'Labelled, row 1: the picture',
        ),
        (
            {'content': 'image', 'label': 'image', 'mltype': 'segmentation'},
            'row 1: its mask is 8 x 10',
        ),
    ],
)
def test_what_makes_no_collection_is_told(given, words, place, tmp_path):
    made = emoji_like(place, tmp_path)
    with pytest.raises((ConfigError, DataError), match=words):
        made.to_training_set('set', **given)


def test_what_makes_no_rows_is_told(place, tmp_path):
    made = emoji_like(place, tmp_path)
    fed = made.to_training_set('set', 'image', label='concept')
    back = taking(place, File, str)
    with pytest.raises(ConfigError, match=r'save\(\) it first'):
        back.import_training_set(fed, 'image', 'label')
    fed.save()
    for columns, words in (
        ({'content': 'image', 'label': 'concept'}, r'Labelled\.number would have no value'),
        (
            {'content': 'array', 'label': 'concept'},
            "content='array' is computed: name one of the fields",
        ),
        ({'content': 'imag', 'label': 'concept'}, "did you mean 'image'"),
    ):
        with pytest.raises(ConfigError, match=words):
            made.import_training_set(fed, **columns)
    back = holder(place | {'sql_file': tmp_path / 'd.sql'}, image=File, label=dict, group=str)
    with pytest.raises(
        ConfigError, match="label='label' is dict: a label of classification is str"
    ):
        back.import_training_set(fed, 'image', 'label', 'group')
    with pytest.raises(ConfigError, match='it takes a TrainingSet, not str'):
        back.import_training_set('set', 'image', 'label', 'group')
    jpegs = holder(place | {'sql_file': tmp_path / 'j.sql'}, image=File['jpg'], label=str)
    with pytest.raises(
        DataError, match=r'pair 1: its image would be a PNG, and the column takes \.jpg'
    ):
        jpegs.import_training_set(fed, 'image', 'label')
