"""What the precisions of an artifact are measured on: the run's evaluation data, and how it is searched."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.callback import EvaluationCallback
from finetuner.data.datasets import ClassDataset
from finetuner.evaluation import evaluate_queries, mean_metrics
from finetuner.excepts import ContentError
from finetuner.inputs import InputReader, TextImageReader
from finetuner.models.backbones import TEXT_TOWER, TOWERS, VISION_TOWER
from finetuner.training.callback_building import sample

if TYPE_CHECKING:
    from finetuner.data.labelled import LabelledDataset
    from finetuner.runs.plan import Plan

NUM_CALIBRATION = 128
# of a larger index, so many are searched, drawn with the run's seed
_MAX_INDEX = 10_000
_NOTHING_TO_SEARCH = (
    'the run has nothing to search: an EvaluationCallback, or eval_data with classes, says what is'
)


@dataclass(frozen=True)
class Side:
    """Documents that a model embeds: the queries, or the index.

    Attributes:
        data: holds them.
        places: of the items of `data`.
        tower: that embeds them, `''` being the only one.
    """

    data: LabelledDataset[Any]
    places: Sequence[int]
    tower: str


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Attributes:
        queries: to search with.
        index: to search among; None for the queries among each other.
        limit: neighbours looked at.
        distance: see `evaluate_queries`.
        exclude_self: likewise.
    """

    queries: Side
    index: Side | None
    limit: int
    distance: str
    exclude_self: bool

    @property
    def sides(self) -> list[Side]:
        """Both, or the one that there is."""
        return [self.queries] if self.index is None else [self.queries, self.index]

    def takes(self, tower: str) -> bool:
        """Whether a tower embeds any of it."""
        return any(side.tower == tower for side in self.sides)

    def among(self, sides: Sequence[Side]) -> Search:
        """The same search among other Documents, a side for each of `sides`."""
        return replace(self, queries=sides[0], index=None if self.index is None else sides[1])

    def recall(self, embeddings: Sequence[np.ndarray]) -> float | None:
        """The mean recall of embeddings, one array for each of `sides`.

        Queries that have nothing to find, which is what Documents that could not be read leave, do
        not count; None where there is no other.
        """
        labels = [[_label(side.data, place) for place in side.places] for side in self.sides]
        ids = [[side.data.document(place).id for place in side.places] for side in self.sides]
        there = Counter(labels[-1])
        themselves = set(zip(ids[-1], labels[-1], strict=True)) if self.exclude_self else set()
        asked = [
            number
            for number, query in enumerate(zip(ids[0], labels[0], strict=True))
            if there[query[1]] > (self.index is None or query in themselves)
        ]
        if not asked:
            return None
        values = evaluate_queries(
            embeddings[0][asked],
            [labels[0][number] for number in asked],
            None if self.index is None else embeddings[1],
            None if self.index is None else labels[1],
            self.limit,
            self.distance,
            self.exclude_self,
            [ids[0][number] for number in asked],
            None if self.index is None else ids[1],
        )
        return mean_metrics(values)['recall_at_k']


def search_of(plan: Plan) -> Search | str:
    """What the run evaluates: its first EvaluationCallback's, or its labelled eval_data.

    Returns:
        The search; in words, why there is none that recall could be taken of.
    """
    evaluation = next((c for c in plan.callbacks if isinstance(c, EvaluationCallback)), None)
    if evaluation is None:
        validation = plan.validation
        if not isinstance(validation, ClassDataset) or validation.class_sizes.min() < 2:
            return _NOTHING_TO_SEARCH
        evaluation = EvaluationCallback(query_data=validation)
    seed = plan.config.seed
    queries: Any = sample(evaluation.query_data, evaluation.query_sample_size, seed)  # type: ignore[arg-type]
    index: Any = evaluation.index_data
    fewer = _fewer(queries, index, seed)
    if isinstance(fewer, str):
        return fewer
    queries, index = fewer
    size = len(queries if index is None else index)
    limit = evaluation.limit
    if 2 * limit > size:
        # what finds most of the index whatever the vectors are tells nothing of them
        sizes: dict[Any, int] = {}
        for place in range(size):
            label = _label(queries if index is None else index, place)
            sizes[label] = sizes.get(label, 0) + 1
        limit = min(limit, max(1, max(sizes.values()) - (index is None)))
    towers = isinstance(plan.reader, TextImageReader)
    names = [evaluation.model, evaluation.index_model or evaluation.model]
    query_tower, index_tower = (name if towers and name else '' for name in names)
    return Search(
        Side(queries, range(len(queries)), query_tower),
        None if index is None else Side(index, range(len(index)), index_tower),
        limit,
        evaluation.distance,
        evaluation.exclude_self,
    )


def _fewer(queries: ClassDataset, index: Any, seed: int) -> tuple[ClassDataset, Any] | str:
    """Draw of a large index, as many of each class as there is room for; or why recall is none.

    Classes that no query has are left out first: of them, nothing is to be found.
    """
    labels = _labels(queries if index is None else index)
    wanted = labels if index is None else _labels(queries)
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    kept = classes
    if len(labels) > _MAX_INDEX:
        generator = np.random.default_rng(seed)
        asked = generator.permutation(np.flatnonzero(np.isin(classes, wanted)))
        # two of a class: a query that stands in the index itself has another to find
        asked = asked[np.minimum(sizes[asked], 2).cumsum() <= _MAX_INDEX]
        room = range(_MAX_INDEX + 1)
        most = bisect.bisect_right(
            room, _MAX_INDEX, key=lambda each: int(np.minimum(sizes[asked], each).sum())
        )
        order = generator.permutation(len(labels))
        order = order[np.argsort(codes[order], kind='stable')]
        # which of its class each is, in the order they are drawn
        number = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
        drawn = np.sort(order[(number < most - 1) & np.isin(codes[order], asked)])
        kept = classes[asked]
        if index is None:
            queries = queries.subset(drawn)
        else:
            queries = queries.subset(np.flatnonzero(np.isin(wanted, kept)))
            index = index.subset(drawn)
    if not np.isin(wanted, kept).any():
        return 'no query has a class that is in the index: there is nothing to find'
    if len(kept) < 2:
        return (
            'the Documents to search are of fewer than two classes: any vectors find the right ones'
        )
    return queries, index


def _labels(data: Any) -> np.ndarray:
    return np.array([str(_label(data, place)) for place in range(len(data))], dtype=np.str_)


def tower_reader(plan: Plan, tower: str) -> InputReader:
    """What reads the contents that a tower takes."""
    reader = plan.reader
    if isinstance(reader, TextImageReader):
        return {TEXT_TOWER: reader.text, VISION_TOWER: reader.picture}[tower]
    return reader


def calibration_inputs(plan: Plan, tower: str) -> list[Any]:
    """Inputs of training Documents, spread over all of them."""
    reader, data, places = tower_reader(plan, tower), plan.train, _items(plan, tower)
    inputs = []
    for number in spread(len(places), NUM_CALIBRATION):
        try:
            inputs.append(reader.read(data.document(places[number])))
        except ContentError:
            # named already, where training left it out
            continue
    return inputs


def some_documents(plan: Plan, tower: str) -> Side:
    """Training Documents to compare vectors on where nothing is searched."""
    places = _items(plan, tower)
    return Side(
        plan.train, [places[number] for number in spread(len(places), NUM_CALIBRATION)], tower
    )


def _items(plan: Plan, tower: str) -> range:
    """The items of the training data that are for a tower: of pairs, every second one."""
    step, first = (2, TOWERS.index(tower)) if tower else (1, 0)
    return range(first, len(plan.train), step)


def spread(size: int, most: int) -> list[int]:
    """So many positions of so many, from the first to the last, evenly."""
    return np.linspace(0, size - 1, min(size, most)).round().astype(int).tolist()


def _label(data: Any, place: int) -> Any:
    return data.classes[data.labels[place]]
