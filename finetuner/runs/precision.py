"""Choose, at a run's end, the precision of its artifact: by what its evaluation data says of each."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.artifact import INT8_ONNX, ONNX, ModelSpec
from finetuner.engines import InferenceEngine, OnnxEngine
from finetuner.excepts import ArtifactError, ContentError
from finetuner.inputs import InputReader, ModelInputs
from finetuner.openvino_engine import OpenvinoEngine, has_openvino
from finetuner.precision_record import (
    FP32,
    INT8,
    ONNX_ENGINE,
    OPENVINO_ENGINE,
    Candidate,
    Measurement,
    PrecisionRecord,
    fastest,
    is_within,
)
from finetuner.quantization import write_int8
from finetuner.runs.precision_data import (
    Search,
    Side,
    calibration_inputs,
    search_of,
    some_documents,
    spread,
    tower_reader,
)

if TYPE_CHECKING:
    from finetuner.runs.plan import Plan

logger = logging.getLogger('finetuner.run')

_BATCH_SIZE = 32
_TIMED_BATCHES = 4
_TIMED_ROUNDS = 3
_REFERENCE: Candidate = (FP32, ONNX_ENGINE)


def choose_precisions(
    plan: Plan, models: Mapping[str, tuple[Path, ModelSpec]]
) -> dict[str, PrecisionRecord]:
    """Write int8 graphs, measure them, and say which precision is to be taken.

    Two towers are gone through one after the other: what the second may lose is what the first has
    left of it.

    Args:
        plan: of the run; its config says what is asked for.
        models: where the graph of each lies and what it is; `''` is the only one.

    Returns:
        What was measured and chosen of each.

    Raises:
        ArtifactError: int8 was asked for, and cannot be written or run.
    """
    config = plan.config
    found_search = search_of(plan)
    search = None if isinstance(found_search, str) else found_search
    if config.export_precision == 'auto' and isinstance(found_search, str):
        reason = f'int8 was not measured: {found_search}'
        logger.warning('Precision stays fp32: %s', reason)
        return {name: _unmeasured(plan, reason) for name in models}
    missing = [name for name, (place, _) in models.items() if not (place / ONNX).is_file()]
    if missing:
        reason = 'there is no ONNX graph to write in int8'
        if config.export_precision == INT8:
            raise ArtifactError(f"export_precision='int8': {reason}")
        return {name: _unmeasured(plan, reason) for name in models}
    logger.info('Measuring the precisions of the artifact')
    found: dict[str, PrecisionRecord] = {}
    taken = dict.fromkeys(models, _REFERENCE)
    # of two towers, that of both in fp32: what the second loses adds to what the first has lost
    base: float | None = None
    for name, (place, spec) in models.items():
        readers = {tower: tower_reader(plan, tower) for tower in models}
        calibration = calibration_inputs(plan, name)
        num_calibrated, reason_against = _write(plan, place, readers[name], calibration)
        engines = {
            tower: _engines(*models[tower], readers[tower], taken[tower]) for tower in models
        }
        engines[name] = _engines(place, spec, readers[name])
        # an evaluation may search with one tower alone, which says nothing of the other
        its_search = search if search is not None and search.takes(name) else None
        sides = [some_documents(plan, name)] if its_search is None else its_search.sides
        record = _measured(plan, its_search, sides, engines, name, taken, readers, base)
        if base is None and record.measurements:
            base = record.measurements[0].recall
        if reason_against:
            record = replace(record, reason=reason_against)
        found[name] = replace(record, num_calibration=num_calibrated)
        taken[name] = (record.chosen, record.engine)
        if not record.needs_int8:
            (place / INT8_ONNX).unlink(missing_ok=True)
        logger.info('Precision %s in %s: %s', record.chosen, record.engine, found[name].reason)
    return found


def _unmeasured(plan: Plan, reason: str) -> PrecisionRecord:
    config = plan.config
    return PrecisionRecord(
        config.export_precision, FP32, ONNX_ENGINE, reason, config.max_recall_loss
    )


def _write(plan: Plan, place: Path, reader: InputReader, calibration: list[Any]) -> tuple[int, str]:
    """Write the int8 graph; how many Documents its ranges are of, and why there is none."""
    batches = [
        reader.batch(calibration[start : start + _BATCH_SIZE // 2])
        for start in range(0, len(calibration), _BATCH_SIZE // 2)
    ]
    try:
        takes_ranges = write_int8(place / ONNX, place / INT8_ONNX, batches)
    except ArtifactError as error:
        if plan.config.export_precision == INT8:
            raise
        return 0, f'there is no int8 graph: {error}'
    return (len(calibration) if takes_ranges else 0), ''


def _engines(
    place: Path, spec: ModelSpec, reader: InputReader, only: Candidate | None = None
) -> dict[Candidate, InferenceEngine]:
    """Every graph in every engine, or one alone; beginning with fp32 in ONNX Runtime."""
    built: dict[Candidate, InferenceEngine] = {}
    for precision, name in ((FP32, ONNX), (INT8, INT8_ONNX)):
        graph = place / name
        for engine in (ONNX_ENGINE, *((OPENVINO_ENGINE,) if has_openvino() else ())):
            candidate = (precision, engine)
            if not graph.is_file() or only not in (None, candidate):
                continue
            try:
                built[candidate] = (
                    OnnxEngine(graph, spec, reader, precision=precision)
                    if engine == ONNX_ENGINE
                    else OpenvinoEngine(graph, spec, reader, precision=precision)
                )
            except ArtifactError as error:
                # one that cannot run a graph of ours is none for it, and the others go on
                if candidate == _REFERENCE:
                    raise
                logger.warning('%s in %s is left out: %s', precision, engine, error)
    return built


def _measured(
    plan: Plan,
    search: Search | None,
    sides: Sequence[Side],
    engines: Mapping[str, Mapping[Candidate, InferenceEngine]],
    name: str,
    taken: Mapping[str, Candidate],
    readers: Mapping[str, InputReader],
    base: float | None,
) -> PrecisionRecord:
    """Compare the candidates of one model, the other's being settled; base is fp32's recall."""
    vectors: list[dict[Candidate, np.ndarray]] = []
    timed: list[ModelInputs] = []
    read: list[Side] = []
    for side in sides:
        embedded, batches, places = _embed(side, readers[side.tower], engines[side.tower])
        vectors.append(embedded)
        read.append(replace(side, places=places))
        timed += batches if side.tower == name else []
    if not timed:
        record = _unmeasured(plan, 'no Document to measure on could be read')
        return replace(record, chosen=INT8) if record.asked == INT8 else record
    speeds = _speeds(engines[name], timed)
    recalls: dict[Candidate, float | None] = {}
    if search is not None:
        search = search.among(read)
        for candidate in engines[name]:
            asked = [candidate if side.tower == name else taken[side.tower] for side in sides]
            recalls[candidate] = search.recall(
                [found[which] for found, which in zip(vectors, asked, strict=True)]
            )
    own = [found for found, side in zip(vectors, sides, strict=True) if side.tower == name]
    if base is None:
        base = recalls.get(_REFERENCE)
    measurements = tuple(
        _measurement(candidate, speeds[candidate], own, recalls.get(candidate), base)
        for candidate in engines[name]
    )
    return _decided(plan, measurements, search)


def _measurement(
    candidate: Candidate,
    speed: float,
    vectors: Sequence[Mapping[Candidate, np.ndarray]],
    recall: float | None,
    base: float | None,
) -> Measurement:
    cosines = np.concatenate([_cosine(found[candidate], found[_REFERENCE]) for found in vectors])
    loss = None
    if recall is not None and base is not None:
        loss = 1 - recall / base if base else 0.0
    return Measurement(
        *candidate, round(speed, 1), float(cosines.mean()), float(cosines.min()), recall, loss
    )


def _decided(
    plan: Plan, measurements: tuple[Measurement, ...], search: Search | None
) -> PrecisionRecord:
    config = plan.config
    least = config.max_recall_loss
    of_int8 = [each for each in measurements if each.precision == INT8]
    if config.export_precision == INT8:
        if not of_int8:
            raise ArtifactError(
                "export_precision='int8': no engine here runs the int8 graph, and the log says why: "
                "take another release of onnxruntime, or export_precision='auto' or 'fp32'"
            )
        best, reason = fastest(of_int8), 'int8 was asked for'
        if search is None:
            reason += ', and the run has nothing to search that would say what it loses'
    else:
        best = fastest([each for each in measurements if is_within(each, least)])
        within = [each for each in of_int8 if is_within(each, least)]
        reason = f'the fastest of those that lose at most {100 * least:g} % of recall'
        losses = [each.recall_loss for each in of_int8 if each.recall_loss is not None]
        if not of_int8:
            reason = 'the fastest of fp32: no engine here runs the int8 graph'
        elif not losses:
            reason = (
                'the fastest of fp32: nothing that the run searches is embedded by this model and '
                'can be read, so what int8 would lose is not known'
            )
        elif not within:
            lost = min(losses)
            reason = (
                f'int8 loses {100 * lost:.2f} % of recall, and at most {100 * least:g} % may be'
            )
    num_queries = num_index = 0
    if search is not None:
        num_queries = len(search.queries.places)
        num_index = len((search.index or search.queries).places)
    return PrecisionRecord(
        config.export_precision,
        best.precision,
        best.engine,
        reason,
        least,
        None if search is None else search.limit,
        num_queries,
        num_index,
        measurements=measurements,
    )


def _embed(
    side: Side, reader: InputReader, engines: Mapping[Candidate, InferenceEngine]
) -> tuple[dict[Candidate, np.ndarray], list[ModelInputs], list[int]]:
    """Embed a side with each engine; some batches, to time them on; and the places of what was read.

    A Document that cannot be read is left out: training is over, and its result is not to be lost.
    """
    found: dict[Candidate, list[np.ndarray]] = {candidate: [] for candidate in engines}
    kept: list[ModelInputs] = []
    places: list[int] = []

    def read(place: int) -> Any:
        try:
            return reader.read(side.data.document(place), side.data.position_of(place))
        except ContentError as error:
            return error

    lot = _BATCH_SIZE * reader.batches_at_once
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(side.places), lot):
            asked = side.places[start : start + lot]
            results = list(zip(asked, pool.map(read, asked), strict=True))
            good = [each for each in results if not isinstance(each[1], ContentError)]
            if not good:
                continue
            places += [place for place, _ in good]
            items = [item for _, item in good]
            chosen = list(reader.batches(items, _BATCH_SIZE))
            order = np.argsort(np.concatenate(chosen))
            batches = [reader.batch([items[place] for place in each]) for each in chosen]
            for candidate, engine in engines.items():
                vectors = np.concatenate([engine.embed(batch) for batch in batches])
                found[candidate].append(vectors[order])
            if not kept:
                kept = [batches[i] for i in spread(len(batches), _TIMED_BATCHES)]
    if len(places) < len(side.places):
        logger.warning(
            'Precision is measured without %d Documents, of %d, that cannot be read',
            len(side.places) - len(places),
            len(side.places),
        )
    nothing = np.empty((0, 1), np.float32)
    vectors_of = {
        each: np.concatenate(parts) if parts else nothing for each, parts in found.items()
    }
    return vectors_of, kept, places


def _speeds(
    engines: Mapping[Candidate, InferenceEngine], batches: Sequence[ModelInputs]
) -> dict[Candidate, float]:
    """Documents a second of each; they take turns, so that all meet the same weather."""
    num_documents = sum(
        len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
        for batch in batches
    )
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in engines}
    for _ in range(_TIMED_ROUNDS):
        for candidate, engine in engines.items():
            start = time.perf_counter()
            for batch in batches:
                engine.embed(batch)
            seconds[candidate].append(time.perf_counter() - start)
    return {
        candidate: num_documents / statistics.median(each) for candidate, each in seconds.items()
    }


def _cosine(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.sum(found * expected, axis=1) / np.maximum(lengths, 1e-12)
