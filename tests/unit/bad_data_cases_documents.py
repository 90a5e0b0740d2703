"""Documents in memory that nobody can learn from, with what is said of each; and odd ones that are fine."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from docarray import Document, DocumentArray

from tests.unit.bad_data_cases_values import (
    BAD_LABELS,
    BAD_MATCH_LABELS,
    BAD_SCORES,
    EMPTY,
    KINDS,
    WRONG_FIELDS,
    captioned,
    good,
    pair,
    scored_pairs,
    session,
    sessions,
    text,
    text_image_pairs,
    with_field,
    with_label,
)

LABEL_RULE = '.*takes an int or a str; see docs/data.md#class'
MATCH_RULE = ".*: a session's matches are labelled 1 .* or -1 .*; see docs/data.md#session"
SCORE_RULE = ' is not a number from 0 to 1; see docs/data.md#pairs'


def case(name, make, expected, **options):
    return pytest.param(make, expected, options, id=name)


def mixed(kind, other):
    docs = KINDS[kind]()
    docs.insert(2, KINDS[other]()[0])
    return docs


def mixed_message(kind, other):
    if {kind, other} == {'class', 'instance'}:
        return 'label is missing, while .* set the tag .* of all Documents or of none'
    if {kind, other} == {'session', 'instance'}:
        return 'matches are missing, while .* set matches of all Documents or of none'
    return r'Document 2: these are .*, and all Documents of a data set must be of one kind'


def same_ids(*positions, count=6):
    docs = good(count)
    for position in positions:
        docs[position].id = 'same'
    return docs


def match_with_matches():
    docs = sessions()
    docs[1].matches[0].matches = [text(label=5)]
    return docs


BAD_DOCUMENTS = [
    *(
        case(f'mixed-{one}-and-{other}', partial(mixed, one, other), mixed_message(one, other))
        for one, other in itertools.permutations(KINDS, 2)
    ),
    *(
        case(f'label-{name}', partial(with_label, value), f'^Document 3: {message}{LABEL_RULE}')
        if 'empty' not in message
        else case(f'label-{name}', partial(with_label, value), f'^Document 3: {message}')
        for name, (value, message) in BAD_LABELS.items()
    ),
    *(
        case(
            f'match-label-{name}',
            partial(sessions, labels=(1, value, -1)),
            f'^Document 3: a match has the label {MATCH_RULE}',
        )
        for name, value in BAD_MATCH_LABELS.items()
        if value is not None
    ),
    *(
        case(
            f'score-{name}',
            partial(scored_pairs, score=value),
            f'^Document 3: finetuner_score .*{SCORE_RULE}',
        )
        for name, value in BAD_SCORES.items()
    ),
    *(
        case(f'field-{name}', partial(with_field, **fields), f'^Document 3: {message}')
        for name, (fields, message) in WRONG_FIELDS.items()
    ),
    # labels, missing
    case(
        'label-missing',
        lambda: [*good(), text(7), text(8)],
        '^Documents 6, 7: label is missing, while 6 others have one: set the tag',
    ),
    case(
        'match-label-missing',
        partial(sessions, labels=(1, None)),
        f'^Document 3: a match has no label{MATCH_RULE}',
    ),
    case(
        'match-label-tag-of-none',
        lambda: [*sessions(), session(matches=[text(tags={'finetuner_label': None})])],
        f'^Document 4: a match has the label None{MATCH_RULE}',
    ),
    case(
        'score-none',
        lambda: [*scored_pairs(), pair(tags={'finetuner_score': None})],
        f'^Document 4: finetuner_score None{SCORE_RULE}',
    ),
    case(
        'many-wrong-labels',
        lambda: [text(n, label=0.5) for n in range(900)],
        'Documents 0, 1, 2, 3, 4 and 895 more: label 0.5',
    ),
    case(
        'many-kinds-of-wrong',
        lambda: [text(n, label=n + 0.5) for n in range(3000)],
        'Document 2: label 2.5 .* 997 more problems of other Documents',
    ),
    # ids
    case('ids-adjacent', partial(same_ids, 2, 3), "^Document 3: the id 'same' is .*Document 2 too"),
    case(
        'ids-far-apart',
        partial(same_ids, 0, 4999, count=5000),
        "^Document 4999: the id 'same' is .*Document 0 too: give every Document an id of its own",
    ),
    case(
        'ids-all-the-same',
        partial(same_ids, *range(6)),
        "^Documents 1, 2, 3, 4, 5: the id 'same' is that of Document 0 too",
    ),
    case(
        'ids-from-an-iterator',
        lambda: iter(same_ids(1, 5)),
        "^Document 5: the id 'same' is that of Document 1 too",
    ),
    case('ids-empty', lambda: [text(n, 1, id='') for n in range(3)], "^Documents 1, 2: the id ''"),
    case(
        'ids-across-files',
        lambda: itertools.chain(same_ids(4), same_ids(1)),
        "^Document 7: the id 'same' is that of Document 4 too",
    ),
    case(
        'ids-none',
        lambda: [text(n, 1, id=None) for n in range(3)],
        'the id None .*or leave ids out',
    ),
    case('one-document-twice', lambda: good(2) * 2, '^Document 2: the id .* Document 0 too'),
    # sessions
    case('match-empty', partial(sessions, matches=[text(text='', label=1)]), f'match {EMPTY}'),
    case('root-empty', partial(sessions, text=''), f'^Document 3: content {EMPTY}'),
    case(
        'session-without-matches',
        partial(sessions, matches=[]),
        '^Document 3: matches are missing, while 3 others have some: set .* leave out',
    ),
    case(
        'match-field',
        partial(sessions, matches=[text(text=5, label=1)]),
        '^Document 3: its text is 5, and takes a str, in a match or chunk',
    ),
    case(
        'sessions-all-positive',
        lambda: [session(n, (1, 1)) for n in range(4)],
        'none of the 8 matches of these 4 sessions is labelled negative .*needs both',
    ),
    case(
        'sessions-all-negative',
        lambda: [session(n, (-1,)) for n in range(4)],
        'none of the 4 matches of these 4 sessions is labelled positive .*needs both',
    ),
    case('sessions-batch-2', sessions, 'batch_size=2 cannot hold .* at least 3', batch_size=2),
    # pairs
    case('pair-0-chunks', partial(scored_pairs, chunks=[]), '^Document 3: .*two chunks, not 0'),
    case('pair-1-chunk', partial(scored_pairs, chunks=[text()]), 'a pair has two chunks, not 1'),
    case('pair-3-chunks', partial(scored_pairs, chunks=good(3)), 'a pair has two chunks, not 3'),
    case('chunk-empty', partial(scored_pairs, chunks=[text(), text(text='')]), f'a chunk {EMPTY}'),
    case('chunks-empty', partial(scored_pairs, chunks=[Document()] * 2), f'a chunk {EMPTY}'),
    case('chunk-field', partial(scored_pairs, chunks=[text(), text(text=b'')]), '3: its text is b'),
    case(
        'score-on-plain-content',
        lambda: [*scored_pairs(), text(tags={'finetuner_score': 0.5})],
        '^Document 4: a pair has two chunks, not 0; see docs/data.md#pairs',
    ),
    case(
        'pairs-of-one-score',
        lambda: [pair(n, 0.5) for n in range(4)],
        'all 4 pairs have the score 0.5: .* more and pairs that are less similar',
    ),
    case('scored-pairs-batch-1', scored_pairs, 'batch_size=1 cannot hold a pair', batch_size=1),
    case('text-image-1-chunk', lambda: [pair(chunks=[text()])], 'two chunks, not 1'),
    *(
        case(
            f'text-image-modality-{"-".join(map(str, modalities))}',
            lambda modalities=modalities: [*text_image_pairs(), captioned(4, modalities)],
            '^Document 4: the chunks are not of modality `text` and `image`: set `modality`',
        )
        for modalities in (
            ('text', 'text'),
            ('image', 'image'),
            (None, None),
            ('text', None),
            ('text', 'audio'),
            ('Text', 'Image'),
            ('', ''),
        )
    ),
    case(
        'pair-without-score-or-modality',
        lambda: [pair(n) for n in range(3)],
        '^Documents 0, 1, 2: the chunks are not .*or give the pair a number in `finetuner_score`; '
        'queries with their documents become class data by finetuner.data.join_pairs',
    ),
    case(
        'two-images-without-score',
        lambda: [pair(chunks=[Document(uri='a.png'), Document(uri='b.png')])],
        '^Document 0: the chunks are not .*or give the pair a number in `finetuner_score`',
    ),
    case(
        'text-image-one-text',
        lambda: [captioned(0) for _ in range(3)],
        'all 3 pairs have the same text: .* at least two',
    ),
    case('text-image-batch-3', text_image_pairs, 'batch_size=3 .* whole pairs', batch_size=3),
    # too little
    case('none', list, 'there are no Documents: give at least one'),
    case('none-array', DocumentArray, 'there are no Documents: give at least one'),
    case('none-iterator', lambda: iter(()), 'there are no Documents: give at least one'),
    case('one-document', lambda: good(1), 'all 1 Documents have the label 0: .* at least two'),
    case('one-instance', lambda: [text()], 'there is one Document only: .* at least two'),
    case('one-class', lambda: [text(n, 'a') for n in range(5)], "have the label 'a': .* least two"),
    case(
        'one-class-in-two-forms',
        lambda: [text(n, label) for n, label in enumerate((1, 1.0, True, np.int64(1)))],
        'all 4 Documents have the label 1',
    ),
    case(
        'classes-of-one',
        lambda: [text(n, n) for n in range(5)],
        'each of the 5 labels occurs once: .*names the class and not the Document',
    ),
    case(
        'too-few-classes',
        good,
        'needs 4 classes in a batch, and the data has 2: use batch_size of at most 4',
        batch_size=8,
        num_items_per_class=2,
    ),
    case(
        'too-few-documents',
        good,
        'needs 8 Documents in a batch, and the data has 6: use batch_size of at most 6',
        batch_size=8,
        num_items_per_class=4,
    ),
    case(
        'batch-of-one-class',
        good,
        'puts 1 class into a batch, .*batch_size of at least 8, or num_items_per_class of at most 2',
        batch_size=4,
        num_items_per_class=4,
    ),
    case('batch-1', good, 'puts 1 class into a batch', batch_size=1),
    case('batch-0', good, 'batch_size=0 is not a whole number of at least 1', batch_size=0),
    case('batch-minus', good, 'batch_size=-4 is not a whole number', batch_size=-4),
    case('batch-half', good, 'batch_size=4.5 is not a whole number', batch_size=4.5),
    case('batch-text', good, "batch_size='4' is not a whole number", batch_size='4'),
    case(
        'items-0',
        good,
        'num_items_per_class=0 is not a whole number of at least 1',
        batch_size=4,
        num_items_per_class=0,
    ),
    case(
        'items-minus',
        good,
        'num_items_per_class=-1 is not a whole number',
        batch_size=4,
        num_items_per_class=-1,
    ),
    case(
        'views-do-not-divide',
        KINDS['instance'],
        'batch_size=5 is not a multiple of views_per_instance=2: use 4 or 6',
        batch_size=5,
    ),
    case(
        'views-fill-the-batch',
        KINDS['instance'],
        'puts one Document into a batch, .* use 8 or more',
        batch_size=4,
        views_per_instance=4,
    ),
    case(
        'views-0',
        KINDS['instance'],
        'views_per_instance=0 is not a whole number of at least 2',
        batch_size=4,
        views_per_instance=0,
    ),
    case(
        'views-1',
        KINDS['instance'],
        'views_per_instance=1 is not a whole number of at least 2',
        batch_size=4,
        views_per_instance=1,
    ),
]


def labels_of(*labels):
    return [text(n, label) for n, label in enumerate((*labels, *labels))]


def sessions_of(*labels):
    return [session(n, labels) for n in range(2)]


def pairs_of(*scores):
    return [pair(n, score) for n, score in enumerate(scores)]


# (kind, number of items)
ODD_BUT_FINE = [
    case('numpy-int', lambda: labels_of(np.int64(1), np.uint8(2)), ('class', 4)),
    case('numpy-float', lambda: labels_of(np.float32(1), np.float64(2)), ('class', 4)),
    case('numpy-bool', lambda: labels_of(np.bool_(True), np.bool_(False)), ('class', 4)),
    case('numpy-str', lambda: labels_of(np.str_('a'), np.str_('b')), ('class', 4)),
    case('bool-and-number', lambda: labels_of(True, 1.0, 1, False, 0), ('class', 10)),
    case('text-and-number', lambda: labels_of('1', 1), ('class', 4)),
    case('label-2-53', lambda: labels_of(2**53, -(2**53)), ('class', 4)),
    case('label-unicode', lambda: labels_of('Straße', '猫', '🙂'), ('class', 6)),
    case('label-with-spaces', lambda: labels_of(' a', 'a'), ('class', 4)),
    case(
        'older-labels',
        lambda: [text(n, tags={'finetuner': {'label': n % 2}}) for n in range(4)],
        ('class', 4),
    ),
    case('match-labels-float', lambda: sessions_of(1.0, -1.0), ('session', 6)),
    case('match-labels-numpy', lambda: sessions_of(np.int64(1), np.float32(-1)), ('session', 6)),
    case('match-label-true', lambda: sessions_of(True, -1), ('session', 6)),
    case(
        'one-match-id-in-two-sessions',
        lambda: [session(n, matches=[text(0, 1, id='m'), text(1, -1)]) for n in range(2)],
        ('session', 6),
    ),
    case('root-with-label', lambda: [session(n, tags={'finetuner_label': 7}) for n in range(2)],
         ('session', 6)),
    # only matches of the root are read
    case('matches-of-matches', match_with_matches, ('session', 12)),
    case('score-float32', lambda: pairs_of(np.float32(0.5), np.float64(0.25)), ('scored_pair', 4)),
    case('score-true', lambda: pairs_of(True, False), ('scored_pair', 4)),
    case('score-numpy-bool', lambda: pairs_of(np.bool_(True), np.int64(0)), ('scored_pair', 4)),
    case('score-0-and-1', lambda: pairs_of(0, 1), ('scored_pair', 4)),
    case('chunks-beside-content', lambda: [text(n, chunks=good(3)) for n in range(2)],
         ('instance', 2)),
    case('tags-none', lambda: [text(n, tags=None) for n in range(4)], ('instance', 4)),
    case('tensor-list', lambda: [Document(tensor=[1.0, 2.0]) for _ in range(4)], ('instance', 4)),
]  # fmt: skip
