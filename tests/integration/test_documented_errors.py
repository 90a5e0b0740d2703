"""The errors that README and docs show, provoked."""

import json
import re
import typing
from pathlib import Path

import pytest
from docarray import Document, DocumentArray
from emoji_data import load_emoji

import finetuner
from finetuner import callback, excepts
from finetuner.data import CSVOptions
from finetuner.excepts import ConfigError, DataError
from tests.conftest import make_picture_docs
from tests.integration.test_documented import BLOCK, code_spans, table_rows, text_of


def class_docs(number: int, num_classes: int) -> DocumentArray:
    return DocumentArray(
        Document(text='some', tags={'finetuner_label': index % num_classes})
        for index in range(number)
    )


def fit_on(docs: DocumentArray | str, **arguments: typing.Any) -> None:
    finetuner.fit(
        'efficientnet-lite0', docs, device='cpu', **{'num_workers': 0, 'batch_size': 8} | arguments
    )


def missing_labels() -> None:
    docs = class_docs(1000, 10)
    for index in (3, 8):
        docs[index].tags = {}
    fit_on(docs)


def fractional_label() -> None:
    docs = class_docs(40, 10)
    docs[4].tags['finetuner_label'] = 5.5
    fit_on(docs)


def empty_content() -> None:
    docs = class_docs(40, 10)
    docs[2].text = ''
    fit_on(docs)


def one_label() -> None:
    fit_on(DocumentArray(Document(text='a', tags={'finetuner_label': 'shoe'}) for _ in range(40)))


def too_few_classes() -> None:
    fit_on(make_picture_docs(10, 16), batch_size=128, num_items_per_class=4)


def query_without_answer() -> None:
    queries, index = make_picture_docs(50, 1), make_picture_docs(50, 1)
    queries[7].tags['finetuner_label'] = 'hat'
    evaluation = callback.EvaluationCallback(queries, index)
    fit_on(make_picture_docs(), callbacks=[evaluation])


def failing_preprocess() -> None:
    import torch

    docs = make_picture_docs()
    docs[5].blob = b'no picture'
    finetuner.fit(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)),
        docs,
        batch_size=24,
        preprocess_fn=lambda doc: doc.convert_blob_to_image_tensor().tensor.astype('float32'),
    )


def mixed_kinds() -> None:
    docs = make_picture_docs()
    for doc in docs[:2]:
        doc.matches.append(Document(text='b', tags={'finetuner_label': 1}))
    fit_on(docs)


def same_ids() -> None:
    docs = make_picture_docs()
    docs[3].id = docs[7].id = 'a'
    fit_on(docs)


def sessions(labels: tuple[int, ...]) -> DocumentArray:
    docs = DocumentArray(Document(text='a') for _ in range(10))
    for doc in docs:
        doc.matches = [Document(text='b', tags={'finetuner_label': label}) for label in labels]
    return docs


def match_of_another_label() -> None:
    docs = sessions((1, -1))
    docs[4].matches[1].tags['finetuner_label'] = 0
    fit_on(docs)


def sessions_without_negatives() -> None:
    fit_on(sessions((1, 1, 1, 1)))


def scored_pairs(scores: list[float]) -> DocumentArray:
    return DocumentArray(
        Document(
            chunks=[Document(text='a'), Document(text='b')], tags={'finetuner_score': float(score)}
        )
        for score in scores
    )


def score_that_is_no_number() -> None:
    fit_on(scored_pairs([0, 1, float('nan')]), loss='CosineSimilarityLoss')


def equal_scores() -> None:
    fit_on(scored_pairs([1] * 12), loss='CosineSimilarityLoss')


def loss_of_classes_on_sessions() -> None:
    fit_on(sessions((1, -1)), loss='ArcFaceLoss')


def short_row() -> None:
    rows = [f'text {number},{number % 3}\n' for number in range(11)]
    Path('shoes.csv').write_text(''.join([*rows, 'text\n']))
    fit_on('shoes.csv', csv_options=CSVOptions(is_labeled=True))


def broken_pictures() -> None:
    docs = make_picture_docs()
    for doc in docs[8:11]:
        doc.blob = b'no picture'
    fit_on(docs)


CASES = {
    'must be of one kind': mixed_kinds,
    'the id': same_ids,
    'a match has the label 0': match_of_another_label,
    'matches of these 10 sessions': sessions_without_negatives,
    'finetuner_score nan': score_that_is_no_number,
    'have the score 1': equal_scores,
    'cannot learn from sessions': loss_of_classes_on_sessions,
    'row at line 12': short_row,
    'pictures cannot be opened': broken_pictures,
    'label is missing': missing_labels,
    'is not a whole number': fractional_label,
    'content is empty': empty_content,
    "have the label 'shoe'": one_label,
    'classes in a batch': too_few_classes,
    'no Document of index_data': query_without_answer,
    'cannot be preprocessed': failing_preprocess,
}


def test_every_error_in_the_chapter_on_data_is_tried():
    messages = [code_spans(cells[0])[0] for cells in table_rows('docs/data.md', 'message')]
    for message in messages:
        assert sum(part in message for part in CASES) == 1, message
    assert len(messages) == len(CASES)


@pytest.mark.parametrize('part', CASES)
def test_errors_read_as_the_chapter_on_data_says(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = [code_spans(cells[0])[0] for cells in table_rows('docs/data.md', 'message')]
    (message,) = [message for message in messages if part in message]
    with pytest.raises((DataError, ConfigError), match=re.escape(message.rstrip('.').strip())):
        CASES[part]()
    assert finetuner.list_runs() == []


def test_the_error_in_the_readme_is_real():
    shown = next(
        json.loads(body) for _, body in BLOCK.findall(text_of('README.md')) if '{"error"' in body
    )
    error = getattr(excepts, shown['error'])
    with pytest.raises(error, match=re.escape(shown['message'].partition(' Known:')[0])):
        finetuner.fit('efficientnet-lite0', load_emoji('train')[:40], epoch=5)
