"""What is said of training data: counts, sizes, and what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from docarray import Document, DocumentArray
from emoji_data import load_emoji
from PIL import Image

from finetuner.data.documents import save_documents
from finetuner.data.report import describing
from finetuner.data.report.describing import describe
from finetuner.data.report.description import Spread
from finetuner.excepts import ConfigError


def labelled(label, **content):
    return Document(tags={'finetuner_label': label}, **(content or {'text': f'content {label}'}))


def match(label, text='match'):
    return labelled(label, text=text)


def texts(*labels):
    return [labelled(label, text=f'text {n}') for n, label in enumerate(labels)]


def pictures(tmp_path, count=6, size=(40, 30)):
    docs = []
    for number in range(count):
        path = tmp_path / f'{number}.png'
        Image.new('RGB', size, (number * 20, 0, 0)).save(path)
        docs.append(labelled(number // 2, uri=str(path)))
    return docs


class Counted(list):
    """A list that counts how often it is read from end to end, and single elements."""

    def __init__(self, docs):
        super().__init__(docs)
        self.passes = 0
        self.reads = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_emoji_are_described(capsys):
    found = describe(load_emoji())
    assert (found.kind, found.num_documents, found.num_items) == ('class', 1000, 1000)
    assert found.classes.num_classes == 250
    assert found.classes.sizes == Spread(4, 4, 4)
    assert found.classes.histogram == ((4, 4, 250),)
    assert found.schemes == {'path': 1000}
    assert found.picture_formats == {'WEBP': 1000}
    assert found.picture_sizes == (Spread(96, 96, 96), Spread(96, 96, 96))
    assert found.problems == found.warnings == ()
    printed = capsys.readouterr().out
    assert 'Training data: class data' in printed
    assert '250, of 4' in printed
    assert 'No problems found.' in printed


def test_nothing_is_described():
    for docs in (DocumentArray(), []):
        found = describe(docs)
        assert (found.kind, found.num_documents) == (None, 0)
        assert 'there are no Documents' in found.problems[0]


def test_classes_of_many_sizes_are_grouped():
    labels = [label for label in range(1, 20) for _ in range(label)]
    found = describe(texts(*labels))
    assert found.classes.sizes == Spread(1, 10, 19)
    assert found.classes.histogram == ((1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 15, 8), (16, 31, 4))
    assert found.classes.biggest[0] == (19, 19)
    assert found.classes.num_single == 1
    assert '1 of 19 classes have one Document only' in found.warnings[0]


def test_sessions_are_counted_with_their_matches():
    docs = [
        Document(text=f'query {n}', matches=[match(1, f'{n}'), match(-1, 'xx'), match(-1, 'yyy')])
        for n in range(4)
    ]
    docs.append(Document(text='query 4', matches=[match(-1)]))
    found = describe(docs)
    assert (found.kind, found.num_documents, found.num_items) == ('session', 5, 18)
    assert (found.num_positives, found.num_negatives) == (4, 9)
    assert found.text_lengths == Spread(1, 3, 7)
    assert found.problems == ()
    assert found.warnings == ('1 of 5 sessions have no match labelled 1',)


def test_scores_fall_into_tenths():
    docs = [
        Document(
            chunks=[Document(text=f'a{n}'), Document(blob=b'not a picture')],
            tags={'finetuner_score': n / 20},
        )
        for n in range(21)
    ]
    found = describe(docs)
    assert (found.kind, found.num_pairs, found.num_items) == ('scored_pair', 21, 42)
    assert sum(found.scores) == 21
    assert found.scores[-1] == 3
    assert found.contents == {'text': 21, 'blob': 21}
    assert found.formats == {'unknown': 21}
    assert 'none of 21 contents is a picture of a known format' in found.warnings[0]


def test_tensors_are_told_by_shape_and_dtype():
    docs = [Document(tensor=np.full((3, 8), n, 'float32')) for n in range(5)]
    docs.append(Document(tensor=np.zeros(4)))
    docs[2].tensor[0, 0] = math.nan
    found = describe(docs)
    assert found.kind == 'instance'
    assert found.shapes == {'[3, 8] float32': 5, '[4] float64': 1}
    assert found.problems == ('Document 2: its tensor holds numbers that are not finite',)


def test_broken_pictures_are_named(tmp_path):
    docs = pictures(tmp_path, 14)
    whole = (tmp_path / '2.png').read_bytes()
    (tmp_path / '0.png').unlink()
    (tmp_path / '1.png').write_bytes(b'')
    (tmp_path / '2.png').write_bytes(whole[:-40])
    (tmp_path / '3.png').write_bytes(b'no picture')
    Image.new('1', (9000, 9000)).save(tmp_path / '4.png')
    docs[5].uri = 's3://bucket/key.png'
    docs[6].uri = str(tmp_path)
    problems = '\n'.join(describe(docs).problems)
    assert "Document 0: the file of the uri is missing ('" in problems
    assert 'Document 1: the file of the uri is empty (0 bytes)' in problems
    assert 'Document 2: the picture cannot be opened' in problems
    assert 'Document 3: not a picture, or too damaged' in problems
    assert 'Document 4: the picture has 9000 x 9000 = 81,000,000 pixels' in problems
    assert "Document 5: uris of the scheme 's3' are not read" in problems
    assert 'Document 6: the uri is not a regular file' in problems
    assert len(problems.splitlines()) == 7


def test_missing_files_are_counted_over_all_and_the_first_named():
    found = describe([labelled(n % 2, uri=f'/no/such/{n}.png') for n in range(3000)])
    assert found.num_missing == 3000
    assert found.num_openable == 0
    assert found.problems == (
        'Documents 0, 1, 2, 3, 4 and 2995 more: the file of the uri is missing '
        "(the first is '/no/such/0.png')",
    )


def test_more_than_a_few_broken_pictures_are_summed_up():
    found = describe([labelled(n % 2, blob=b'\x89PNG\r\n\x1a\n%d' % n) for n in range(30)])
    assert len(found.problems) == 6
    assert found.problems[-1] == '30 of 30 contents cannot be used; the first are above'


def test_broken_matches_and_chunks_are_named_by_their_place():
    damaged = b'\x89PNG\r\n\x1a\n'
    docs = [
        Document(text='q', matches=[match(1), labelled(-1, blob=damaged)]),
        Document(text='r', matches=[match(1), match(-1)]),
    ]
    assert describe(docs).problems[0].startswith('Document 0, match 1: not a picture')
    pairs = [
        Document(
            chunks=[Document(text=f'{n}'), Document(blob=damaged)], tags={'finetuner_score': n}
        )
        for n in (0, 1)
    ]
    assert describe(pairs).problems[0].startswith('Document 0, chunk 1: not a picture')


def test_the_kind_of_mixed_data_is_none_and_the_reason_is_given():
    found = describe([*texts(1, 1, 2, 2), Document(text='session', matches=[match(1)])])
    assert found.kind is None
    assert 'all Documents of a data set must be of one kind' in found.reason
    assert found.reason in found.problems
    assert found.num_documents == 5


def test_a_label_that_is_none_leaves_the_kind():
    found = describe([*texts(1, 1, 2, 2), labelled(2.5)])
    assert found.kind == 'class'
    assert 'Document 4: label 2.5 is not a whole number' in found.problems[0]


@pytest.mark.parametrize(
    ('docs', 'problem'),
    [
        (texts(7, 7, 7), 'all 3 Documents have the label 7: training tells classes apart'),
        (texts(1, 2, 3), 'each of the 3 labels occurs once'),
        ([Document(text='alone')], 'there is one Document only'),
        ([Document(text='q', matches=[match(1)])], 'no match is labelled -1'),
        ([1, 2], 'item 0 is a int, not a Document'),
        ([Document(text='a'), 'b'], 'item 1 is a str, not a Document'),
        ([Document(text='a'), Document(text=5)], 'Document 1: its text is 5, and takes a str'),
        ([Document(text='a'), Document(uri=Path('x'))], 'Document 1: its uri is PosixPath'),
        (
            [Document(tensor=[[1], [2, 3]]), Document(text='a')],
            'Document 0: its tensor is no array',
        ),
        ([Document(text='a'), Document()], 'Document 1: content is empty'),
        ([Document(text='a', tags={'finetuner_score': math.nan})], 'a pair has two chunks'),
    ],
)
def test_what_stops_training_is_a_problem(docs, problem):
    assert problem in '\n'.join(describe(docs).problems)


def test_repeated_ids_are_counted():
    found = describe(
        [Document(id='a', text='x'), Document(id='b', text='y'), Document(id='a', text='z')]
    )
    assert found.num_duplicate_ids == 1
    assert "the id 'a'" in found.problems[0]


def test_one_content_under_two_labels_and_repeated_texts():
    docs = texts(0, 0, 1, 1, 2, 2)
    docs[0].text, docs[3].text = 'What is  new?', 'what IS new?'
    docs[4].text = docs[5].text = 'the same'
    assert describe(docs).warnings == (
        '1 Document repeats the content of an earlier one under another label (first: Documents 0 '
        'and 3)',
        '1 Document repeats the content of an earlier one (first: Documents 4 and 5)',
    )


def test_the_same_picture_in_two_files_under_two_labels(tmp_path):
    docs = pictures(tmp_path)
    (tmp_path / '5.png').write_bytes((tmp_path / '0.png').read_bytes())
    warnings = describe(docs).warnings
    assert warnings == ('the same picture stands under two labels: Documents 0 and 5',)


def test_repeated_roots_and_pairs():
    sessions = [Document(text='query', matches=[match(1), match(-1)]) for _ in range(3)]
    assert '2 Documents repeat the root of an earlier session' in describe(sessions).warnings[0]
    pairs = [
        Document(chunks=[Document(text='a'), Document(text='b')], tags={'finetuner_score': score})
        for score in (0.1, 0.9)
    ]
    assert '1 Document repeats the contents of an earlier pair' in describe(pairs).warnings[0]


def test_http_is_not_fetched():
    # a fetch would fail and be reported as a problem
    found = describe([labelled(n // 2, uri=f'http://localhost:1/{n}.png') for n in range(4)])
    assert found.problems == ()
    assert found.schemes == {'http': 4}
    assert found.warnings == ('4 uris are http(s) addresses, which were not opened',)


def test_one_pass_and_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(describing, '_MOST_OPENED', 10)
    docs = pictures(tmp_path, 12) * 10
    docs = Counted(Document(doc, copy=True, id=str(n)) for n, doc in enumerate(docs))
    found = describe(docs)
    assert docs.passes == 1
    assert docs.reads == 10
    assert (found.num_opened, found.num_openable) == (10, 120)


def test_a_million_bytes_hold_many_documents():
    from finetuner.data.report.inventory import take_inventory

    inventory = take_inventory(texts(*[n % 7 for n in range(5000)]))
    arrays = [value for value in vars(inventory).values() if hasattr(value, 'itemsize')]
    assert len(arrays) >= 6
    assert sum(len(a) * a.itemsize for a in arrays) <= 40 * 5000


def test_a_file_of_documents(tmp_path, capsys):
    path = tmp_path / 'data.docs'
    save_documents(DocumentArray(texts(1, 1, 2, 2)), path)
    assert describe(str(path)).kind == 'class'
    assert 'data.docs' in capsys.readouterr().out.replace('\n', '')
    path.write_bytes(path.read_bytes()[:-5])
    found = describe(path)
    assert found.kind is None
    assert 'cut short' in found.problems[0]


def test_options_that_do_not_fit_are_refused(tmp_path):
    from finetuner.data.csv import CSVOptions

    with pytest.raises(ConfigError, match='csv_options are for CSV files'):
        describe(tmp_path, CSVOptions())


def test_markup_and_control_characters_in_labels_are_shown_as_they_are(capsys):
    describe(texts('[red]a', '[red]a', '[/]\x1b[31m', '[/]\x1b[31m'))
    printed = capsys.readouterr().out
    assert '[red]a' in printed
    assert '\x1b[31m' not in printed
    assert r'\x1b[31m' in printed
