"""What the precisions of an artifact are measured on: the run's evaluation data, and how it is searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
# of a larger index, so many are searched, of classes drawn with the run's seed
_MAX_INDEX = 10_000


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

    def recall(self, embeddings: Sequence[np.ndarray]) -> float:
        """The mean recall of embeddings, one array for each of `sides`."""
        labels = [[_label(side.data, i) for i in range(len(side.data))] for side in self.sides]
        ids = [[side.data.document(i).id for i in range(len(side.data))] for side in self.sides]
        values = evaluate_queries(
            embeddings[0],
            labels[0],
            None if self.index is None else embeddings[1],
            None if self.index is None else labels[1],
            self.limit,
            self.distance,
            self.exclude_self,
            ids[0],
            None if self.index is None else ids[1],
        )
        return mean_metrics(values)['recall_at_k']


def search_of(plan: Plan) -> Search | None:
    """What the run evaluates: its first EvaluationCallback's, or its labelled eval_data."""
    evaluation = next((c for c in plan.callbacks if isinstance(c, EvaluationCallback)), None)
    if evaluation is None:
        validation = plan.validation
        if not isinstance(validation, ClassDataset) or validation.class_sizes.min() < 2:
            return None
        evaluation = EvaluationCallback(query_data=validation)
    seed = plan.config.seed
    queries: Any = sample(evaluation.query_data, evaluation.query_sample_size, seed)  # type: ignore[arg-type]
    index: Any = evaluation.index_data
    queries, index = _fewer(queries, index, seed)
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


def _fewer(queries: ClassDataset, index: Any, seed: int) -> tuple[ClassDataset, Any]:
    """Leave classes out until the index is as large as it may be."""
    searched = queries if index is None else index
    if len(searched) <= _MAX_INDEX:
        return queries, index
    labels = np.array([str(_label(searched, place)) for place in range(len(searched))])
    wanted = np.array([str(_label(queries, place)) for place in range(len(queries))])
    classes, sizes = np.unique(labels, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(classes))
    kept = classes[order[: max(1, int((sizes[order].cumsum() <= _MAX_INDEX).sum()))]]
    queries = queries.subset(np.flatnonzero(np.isin(wanted, kept)))
    return queries, None if index is None else index.subset(np.flatnonzero(np.isin(labels, kept)))


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
