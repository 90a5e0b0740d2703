"""Fine-tune on each kind of training data: `python examples/data_kinds.py KIND [LEARNING_RATE]`.

The emoji pictures serve for all of them. What a picture is similar to comes from clicks, from
nothing but the picture itself, from scores, or from labels; what is measured is the same each
time: a picture by one artist is looked for among those of the three others, for 250 concepts that
training has not seen.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from docarray import Document, DocumentArray
from emoji_data import load_emoji, load_emoji_queries_and_index

import finetuner
from finetuner.callback import EvaluationCallback

MODEL = 'efficientnet-lite0'
INPUT_SIZE = 96
# results of a search that were looked at and left
NUM_NOT_CLICKED = 4


def session_data() -> DocumentArray:
    """A click log: each picture searched for with the model as it comes, and what was clicked.

    Of the results, pictures of the same concept were clicked (1), the first of the others were
    looked at and not clicked (-1).
    """
    sessions = DocumentArray()
    for root, results in search_results():
        clicked = [doc for doc in results if is_same(root, doc)]
        ignored = [doc for doc in results if not is_same(root, doc)][:NUM_NOT_CLICKED]
        matches = [
            Document(uri=doc.uri, tags={'finetuner_label': label})
            for docs, label in ((clicked, 1), (ignored, -1))
            for doc in docs
        ]
        sessions.append(Document(uri=root.uri, matches=matches))
    return sessions


def search_results() -> Iterator[tuple[Document, list[Document]]]:
    """Each training picture with all the others, the nearest first for the model as it comes."""
    docs = load_emoji('train')
    finetuner.encode(finetuner.build_model(MODEL, {'input_size': INPUT_SIZE}), docs)
    vectors = docs.embeddings / np.linalg.norm(docs.embeddings, axis=1, keepdims=True)
    for position, order in enumerate(np.argsort(-vectors @ vectors.T, axis=1)):
        yield docs[position], [docs[int(other)] for other in order if other != position]


def is_same(one: Document, other: Document) -> bool:
    """Whether two pictures are of one concept."""
    return one.tags['concept'] == other.tags['concept']


def instance_data() -> DocumentArray:
    """The pictures and nothing else."""
    return DocumentArray(Document(uri=doc.uri) for doc in load_emoji('train'))


def scored_pair_data() -> DocumentArray:
    """Search results with a grade: the share of keywords that two concepts have in common.

    Of each search two results: one of the same concept, whose grade is 1, and the nearest other.
    """
    keywords = _keywords()
    draw = random.Random(0)
    pairs = DocumentArray()
    for root, results in search_results():
        right = draw.choice([doc for doc in results if is_same(root, doc)])
        wrong = next(doc for doc in results if not is_same(root, doc))
        for doc in (right, wrong):
            mine, theirs = (keywords[d.tags['concept']] for d in (root, doc))
            score = len(mine & theirs) / len(mine | theirs)
            chunks = [Document(uri=root.uri), Document(uri=doc.uri)]
            pairs.append(Document(chunks=chunks, tags={'finetuner_score': score}))
    return pairs


def _keywords() -> dict[str, set[str]]:
    path = Path(__file__).parent / 'emoji' / 'concepts.csv'
    with path.open(encoding='utf-8', newline='') as file:
        return {row['concept']: set(row['keywords'].split('; ')) for row in csv.DictReader(file)}


KINDS: dict[str, tuple[Callable[[], DocumentArray], dict[str, Any]]] = {
    'class': (
        load_emoji,
        # 31 classes of 4 pictures: of the 250, all but 2 fill batches
        {'loss': 'MultiSimilarityLoss', 'learning_rate': 1e-3, 'epochs': 4, 'batch_size': 124},
    ),
    'session': (
        session_data,
        {'loss': 'TripletMarginLoss', 'learning_rate': 2e-4, 'epochs': 1},
    ),
    'instance': (instance_data, {'loss': 'NTXentLoss', 'learning_rate': 1e-4, 'epochs': 2}),
    'scored_pair': (
        scored_pair_data,
        {'loss': 'CosineSimilarityLoss', 'learning_rate': 1e-4, 'epochs': 2},
    ),
}


def main(kind: str, **options: Any) -> finetuner.run.Run:
    """Fine-tune on one kind of data and print what it changed.

    Args:
        kind: one of `KINDS`.
        options: of `finetuner.fit`, in the place of those above.
    """
    make_data, recipe = KINDS[kind]
    query_data, index_data = load_emoji_queries_and_index('test')
    run = finetuner.fit(
        MODEL,
        make_data(),
        model_options={'input_size': INPUT_SIZE},
        callbacks=[EvaluationCallback(query_data, index_data, limit=3)],
        **{
            'batch_size': 128,
            'optimizer': 'AdamW',
            'scheduler': 'cosine',
            'scheduler_options': {'num_warmup_steps': 0.15},
            **recipe,
            **options,
        },
    )
    for line in run.stream_logs():
        print(line)
    name = f'{MODEL}_recall_at_k'
    before, after = (run.metrics()[stage][name] for stage in ('before', 'after'))
    print(f'{kind}: recall@3 {before:.3f} before, {after:.3f} after')
    return run


if __name__ == '__main__':
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in KINDS:
        sys.exit(f'usage: python examples/data_kinds.py {"|".join(KINDS)} [LEARNING_RATE]')
    asked = {'learning_rate': float(sys.argv[2])} if len(sys.argv) == 3 else {}
    main(sys.argv[1], **asked)
