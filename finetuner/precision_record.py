"""What an artifact says of its precisions: what was measured of each, and which was chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetuner.excepts import ArtifactError

FP32 = 'fp32'
INT8 = 'int8'
# of graphs
PRECISIONS = (FP32, INT8)
# `fit(export_precision=)`
EXPORT_PRECISIONS = (FP32, INT8, 'auto')
ONNX_ENGINE = 'onnx'
OPENVINO_ENGINE = 'openvino'
# what runs an exported graph
GRAPH_ENGINES = (ONNX_ENGINE, OPENVINO_ENGINE)
# precision and engine
Candidate = tuple[str, str]


@dataclass(frozen=True)
class Measurement:
    """One graph in one engine, on the run's evaluation data.

    Attributes:
        precision: of the graph, one of `PRECISIONS`.
        engine: that ran it, one of `GRAPH_ENGINES`.
        documents_per_second: embedded, once read; of the machine that wrote the artifact.
        cosine: mean over the Documents of the cosine of a vector to that of fp32.
        least_cosine: the least.
        recall: `recall_at_k`, mean over the queries; None where nothing could be searched.
        recall_loss: share of fp32's recall that is lost: `1 - recall / recall of fp32`, so less
            than 0 where more is found; of two towers, of the recall of both in fp32. None where
            nothing could be searched.
    """

    precision: str
    engine: str
    documents_per_second: float
    cosine: float
    least_cosine: float
    recall: float | None = None
    recall_loss: float | None = None


@dataclass(frozen=True)
class PrecisionRecord:
    """What was asked for, measured and chosen when the artifact was written.

    Attributes:
        asked: one of `EXPORT_PRECISIONS`.
        chosen: one of `PRECISIONS`: that of an engine for which nobody asks for another.
        engine: the fastest of those measured at that precision.
        reason: of the choice, in words.
        max_recall_loss: share of fp32's recall that may be lost.
        limit: neighbours looked at: the k of recall; None where nothing was searched.
        num_queries: searched with.
        num_index: searched among.
        num_calibration: Documents that the ranges of int8 were taken from; 0 where it needs none.
        measurements: a line for each precision and engine.
    """

    asked: str
    chosen: str
    engine: str
    reason: str
    max_recall_loss: float
    limit: int | None = None
    num_queries: int = 0
    num_index: int = 0
    num_calibration: int = 0
    measurements: tuple[Measurement, ...] = ()

    @property
    def needs_int8(self) -> bool:
        """Whether somebody may be given the int8 graph without having asked for it."""
        return self.chosen == INT8 or any(
            each.precision == INT8 and is_within(each, self.max_recall_loss)
            for each in self.measurements
        )

    def engines_for(self, precision: str | None, installed: Collection[str]) -> list[Candidate]:
        """The precisions and engines to take with what is installed, the one to prefer first.

        Args:
            precision: one of `PRECISIONS`; None takes the one to prefer.
            installed: engines, of `GRAPH_ENGINES`.

        Returns:
            Those that were measured, the fastest first, of those that lose no more than they may
            unless a precision was asked for; the chosen precision in ONNX Runtime where none was.
        """
        wanted = self.chosen if precision is None else precision
        found = [each for each in self.measurements if each.engine in installed]
        if precision is None and self.asked == 'auto':
            found = [each for each in found if is_within(each, self.max_recall_loss)]
        else:
            found = [each for each in found if each.precision == wanted]
        found.sort(key=lambda each: -each.documents_per_second)
        return [(each.precision, each.engine) for each in found] or [(wanted, ONNX_ENGINE)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> PrecisionRecord | None:
        """Read what `to_json` wrote; None where an artifact says nothing of it.

        Raises:
            ArtifactError: a value is missing, unknown or out of range.
        """
        if values is None:
            return None
        try:
            record = cls(
                asked=_one_of('asked', values['asked'], EXPORT_PRECISIONS),
                chosen=_one_of('chosen', values['chosen'], PRECISIONS),
                engine=_one_of('engine', values['engine'], GRAPH_ENGINES),
                reason=str(values['reason']),
                max_recall_loss=_number('max_recall_loss', values['max_recall_loss'], 0, 1),
                limit=None if values['limit'] is None else _count('limit', values['limit']),
                **{
                    name: _count(name, values[name])
                    for name in ('num_queries', 'num_index', 'num_calibration')
                },
                measurements=tuple(map(_measurement, values['measurements'])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f'the artifact does not describe its precision: {error!r}'
            ) from error
        return record


def is_within(measurement: Measurement, max_recall_loss: float) -> bool:
    """Whether it is fp32, or loses no more recall than it may; not where that is not known."""
    loss = measurement.recall_loss
    return measurement.precision == FP32 or (loss is not None and loss <= max_recall_loss)


def fastest(measurements: Sequence[Measurement]) -> Measurement:
    """The one of the most Documents a second; the first of equals."""
    return max(measurements, key=lambda each: each.documents_per_second)


def precision_lines(record: PrecisionRecord) -> list[str]:
    """What the model card says of it, in Markdown."""
    lines = [
        '## Precision',
        '',
        f'`{record.chosen}` in `{record.engine}` is taken where nothing else is asked for: '
        f'{record.reason}.',
    ]
    if record.num_calibration:
        lines += ['', f'The ranges of int8 are those of {record.num_calibration} Documents.']
    if not record.measurements:
        return lines
    recall = f'recall@{record.limit}' if record.limit else 'recall'
    lines += [
        '',
        f'| precision | engine | Documents/s | {recall} | lost | cosine to fp32, mean | least |',
        '|---|---|---|---|---|---|---|',
    ]
    for each in record.measurements:
        found = '' if each.recall is None else f'{each.recall:.4f}'
        lost = '' if each.recall_loss is None else f'{100 * each.recall_loss:.2f} %'
        lines.append(
            f'| {each.precision} | {each.engine} | {each.documents_per_second:,.1f} | {found} '
            f'| {lost} | {each.cosine:.5f} | {each.least_cosine:.5f} |'
        )
    if record.limit:
        lines += [
            '',
            f'{record.num_queries} queries among {record.num_index} Documents. "lost" is the share '
            f'of the recall of fp32 in ONNX Runtime (of two towers, of both in fp32); at most '
            f'{100 * record.max_recall_loss:g} % may be.',
        ]
    lines += ['', 'Documents/s are those of the machine that wrote this, contents once read.']
    return lines


def _measurement(values: Mapping[str, Any]) -> Measurement:
    recall, loss = values['recall'], values['recall_loss']
    return Measurement(
        _one_of('precision', values['precision'], PRECISIONS),
        _one_of('engine', values['engine'], GRAPH_ENGINES),
        _number('documents_per_second', values['documents_per_second'], 0),
        _number('cosine', values['cosine'], -1.001, 1.001),
        _number('least_cosine', values['least_cosine'], -1.001, 1.001),
        None if recall is None else _number('recall', recall, 0, 1),
        None if loss is None else _number('recall_loss', loss, -math.inf, 1),
    )


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f'{name} is {value!r}, not one of {", ".join(allowed)}')
    return str(value)


def _number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    number = float(value)
    if isinstance(value, bool) or not least <= number <= most or math.isinf(number):
        raise ValueError(f'{name} is {value!r}')
    return number


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f'{name} is {value!r}, not a whole number')
    return value
