"""Evaluation of models with a tower for texts and one for pictures: who embeds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from docarray import Document, DocumentArray

from finetuner.callback import EvaluationCallback
from finetuner.data.checks import build_named_dataset
from finetuner.data.contents import LABEL_TAG, copy_document, is_text
from finetuner.data.datasets import ClassDataset, TextImageDataset
from finetuner.excepts import ConfigError, DataError, unknown_name


def choose_towers(description: EvaluationCallback, towers: Sequence[str]) -> EvaluationCallback:
    """Say of queries and index which tower embeds them.

    Args:
        description: its data are datasets.
        towers: names of the one of texts and of the one of pictures.

    Returns:
        The same with `model` and, where there is an index, `index_model`: as the user named them
        or, where they did not, by what the Documents hold.

    Raises:
        ConfigError: a tower has no such name.
        DataError: Documents of one side are for both towers, or not for the one that was named.
    """
    queries: Any = description.query_data
    index: Any = description.index_data
    model = _tower('query_data', queries, 'model', description.model, towers)
    if index is None:
        if description.index_model not in (None, model):
            raise ConfigError(
                f'EvaluationCallback: index_model={description.index_model!r} has nothing to '
                'embed: give index_data'
            )
        return replace(description, model=model)
    index_model = _tower('index_data', index, 'index_model', description.index_model, towers)
    return replace(description, model=model, index_model=index_model)


def _tower(
    side: str, dataset: ClassDataset, option: str, asked: str | None, towers: Sequence[str]
) -> str:
    if asked is not None:
        if asked not in towers:
            raise ConfigError(f'EvaluationCallback: {unknown_name(option, asked, towers)}')
        _check_contents(side, dataset, option, asked, takes_texts=asked == towers[0])
        return asked
    texts = [is_text(dataset.document(index)) for index in range(len(dataset))]
    if any(texts) and not all(texts):
        raise DataError(
            f'{side} of the EvaluationCallback: {dataset.position_of(texts.index(True))} holds a '
            f'text and {dataset.position_of(texts.index(False))} a picture: give one kind, or say '
            f'{option}, {" or ".join(map(repr, towers))}'
        )
    return towers[0] if texts[0] else towers[1]


def _check_contents(
    side: str, dataset: ClassDataset, option: str, asked: str, takes_texts: bool
) -> None:
    for index in range(len(dataset)):
        doc = dataset.document(index)
        holds = bool(doc.text) if takes_texts else any((doc.uri, doc.blob, doc.tensor is not None))
        if not holds:
            raise DataError(
                f'{side} of the EvaluationCallback: {dataset.position_of(index)} holds no '
                f'{"text" if takes_texts else "picture"}, which {option}={asked!r} embeds'
            )


def split_pairs(description: EvaluationCallback) -> EvaluationCallback:
    """Make queries of the texts of text-image pairs, and an index of their pictures.

    Args:
        description: its `query_data` are pairs.

    Raises:
        DataError: they are not.
        ConfigError: there is an index besides.
    """
    if description.index_data is not None:
        raise ConfigError(
            'EvaluationCallback: with multi_modal the texts of query_data are looked for among its '
            'pictures: leave out index_data'
        )
    pairs: Any = description.query_data
    dataset = build_named_dataset(pairs, 'query_data')
    if not isinstance(dataset, TextImageDataset):
        raise DataError(
            f'query_data: with multi_modal it takes text-image pairs, and this is {dataset.kind}'
        )
    sides: tuple[list[Document], list[Document]] = ([], [])
    seen: set[int] = set()
    for item, (text, side) in enumerate(dataset.label_values.tolist()):
        if side == 0 and text in seen:
            # the same text would be the same query
            continue
        seen.add(text)
        chunk = copy_document(dataset.document(item))
        chunk.tags[LABEL_TAG] = text
        sides[side].append(chunk)
    queries, index = (DocumentArray(docs) for docs in sides)
    return replace(description, query_data=queries, index_data=index, multi_modal=False)
