"""Whether data can be trained and evaluated on in batches of a given shape."""

import pytest
from docarray import Document, DocumentArray

from finetuner.data.checks import (
    build_evaluation_dataset,
    check_evaluation_data,
    check_training_data,
)
from finetuner.data.loading import build_dataset
from finetuner.excepts import DataError


def labelled(label):
    return Document(text='content', tags={'finetuner_label': label})


def class_data(*labels):
    return DocumentArray([labelled(label) for label in labels])


def session(*labels):
    return Document(text='root', matches=[labelled(label) for label in labels])


def test_good_class_data_passes():
    docs = class_data(*(list(range(10)) * 4))
    check_training_data(build_dataset(docs))
    check_training_data(build_dataset(docs), batch_size=40, num_items_per_class=4)
    check_training_data(build_dataset(docs), batch_size=20)


@pytest.mark.parametrize(
    ('labels', 'arguments', 'message'),
    [
        ([1, 1.0, True], (), 'all 3 Documents have the label 1'),
        (['a', 'b', 'c'], (), 'each of the 3 labels occurs once'),
        ([1, 1, 2, 2], (12, 4), 'needs 3 classes in a batch, and the data has 2: .* at most 8'),
        ([1, 1, 2, 2], (8, 4), 'needs 8 Documents in a batch, and the data has 4: .* at most 4'),
        ([1, 1, 2, 2], (4, 4), 'puts 1 class into .* batch_size of at least 8'),
        ([1, 1, 2, 2], (2, 4), 'puts 0 classes into'),
    ],
)
def test_too_little_class_data_says_what_is_needed(labels, arguments, message):
    with pytest.raises(DataError, match=message):
        check_training_data(build_dataset(class_data(*labels)), *arguments)


def test_advice_on_sizes_is_right():
    """What a message advises must pass."""
    docs = class_data(*([1, 2, 3] * 4))
    with pytest.raises(DataError, match=r'at most 12, or num_items_per_class of at least 6'):
        check_training_data(build_dataset(docs), 16, 4)
    check_training_data(build_dataset(docs), 12, 4)
    check_training_data(build_dataset(docs), 12, 6)


def test_single_documents_are_warned_of(caplog):
    check_training_data(build_dataset(class_data(1, 1, 2)))
    assert '1 of 2 classes have one Document only' in caplog.text


def evaluation(docs, name='query_data'):
    return build_evaluation_dataset(docs, name)


def test_evaluation_data():
    index = evaluation(class_data(1, 2, 3, 'a'), 'index_data')
    check_evaluation_data(evaluation(class_data(1.0, 'a')), index)
    with pytest.raises(
        DataError,
        match=r"^query_data: Documents 1, 3, 4 \(3 of 5\).*: no .* the label 5 or '1'; add",
    ):
        check_evaluation_data(evaluation(class_data(1, 5, 2, '1', 5)), index)
    with pytest.raises(DataError, match=r'^index_data: Document 2: label is missing'):
        evaluation(DocumentArray([*class_data(1, 2), Document(text='a')]), 'index_data')
    with pytest.raises(DataError, match=r'^query_data: there are no Documents'):
        evaluation(DocumentArray())
    with pytest.raises(DataError, match=r'^query_data: .*sessions.* class data only'):
        evaluation(DocumentArray([session(1, -1)]))


def test_sessions_need_both_labels():
    good = DocumentArray([session(1), session(-1)])
    check_training_data(build_dataset(good), 3)
    for labels, missing in (((1, 1), r'negative \(-1\)'), ((-1,), r'positive \(1\)')):
        with pytest.raises(DataError, match=f'none of the .* matches .* labelled {missing}'):
            check_training_data(build_dataset(DocumentArray([session(*labels)])))
    with pytest.raises(DataError, match=r'batch_size=2 .* use at least 3'):
        check_training_data(build_dataset(good), 2)


def test_larger_sessions_are_warned_of(caplog):
    check_training_data(build_dataset(DocumentArray([session(1, -1, 1, -1), session(1)])), 4)
    assert '1 of 2 sessions have more than batch_size=4' in caplog.text


def test_unlabelled_data_needs_two_documents_and_whole_views():
    docs = DocumentArray([Document(text=str(i)) for i in range(3)])
    check_training_data(build_dataset(docs), 4, views_per_instance=2)
    with pytest.raises(DataError, match='one Document only'):
        check_training_data(build_dataset(docs[:1]))
    with pytest.raises(DataError, match=r'batch_size=8 is not a multiple .*: use 6 or 9'):
        check_training_data(build_dataset(docs), 8, views_per_instance=3)
    with pytest.raises(DataError, match=r'one Document into a batch.* use 6 or more'):
        check_training_data(build_dataset(docs), 3, views_per_instance=3)


def pair(score, **chunk):
    chunks = [Document(text='a', **chunk), Document(text='b', **chunk)]
    return Document(chunks=chunks, tags={'finetuner_score': score})


def test_scored_pairs_need_different_scores():
    check_training_data(build_dataset(DocumentArray([pair(0.1), pair(0.9)])), 2)
    check_training_data(build_dataset(DocumentArray([pair(0.5)])), 2)
    with pytest.raises(DataError, match=r'all 2 pairs have the score 0\.5'):
        check_training_data(build_dataset(DocumentArray([pair(0.5), pair(0.5)])))


def test_text_image_pairs_need_two_texts():
    def captioned(text):
        return Document(
            chunks=[Document(text=text, modality='text'), Document(uri='a.png', modality='image')]
        )

    check_training_data(build_dataset(DocumentArray([captioned('cat'), captioned('dog')])), 4)
    with pytest.raises(DataError, match='all 2 pairs have the same text'):
        check_training_data(build_dataset(DocumentArray([captioned('cat'), captioned('cat')])))
