"""Time and judge every engine and precision of the encoding service, against ONNX Runtime in fp32.

Pictures: EfficientNet-Lite0 as it comes, on the emoji test pictures: query `noto`, index the other
three artists. Texts: all-MiniLM-L6-v2 as it comes, on the test concepts: query the name, index the
keyword lists without the name. Int8 takes its ranges from training pictures. Contents are read
beforehand: it is the models that are timed. "moved" is how far a vector of length 1 goes, at most,
when its picture or text is embedded among 31 others. Only ratios travel between machines.

    python benchmarks/precision.py
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from docarray import Document
from rounds import Contestant, ratio, take_turns

from finetuner.artifact import ModelSpec
from finetuner.engines import InferenceEngine, OnnxEngine, TorchEngine
from finetuner.evaluation import evaluate_queries, mean_metrics
from finetuner.inputs import ModelInputs, build_reader
from finetuner.models.tailor import build_embedding_model
from finetuner.models.zoo import backbone_tokenizer, get_backbone, input_spec, parse_options
from finetuner.onnx_export import export_onnx
from finetuner.openvino_engine import OpenvinoEngine, has_openvino
from finetuner.quantization import write_int8

EMOJI = Path(__file__).parents[1] / 'examples' / 'emoji'
BATCH_SIZE = 32
NUM_CALIBRATION = 128
REFERENCE = 'onnx fp32'
LIMIT = 3


@dataclass(frozen=True)
class Task:
    """What is embedded and searched.

    Attributes:
        model: name of the backbone.
        options: its options.
        queries: to search with, one of each label.
        index: to search among, as (Document, label).
        calibration: that ranges are taken from.
    """

    model: str
    options: dict[str, int]
    queries: list[Document]
    index: list[tuple[Document, int]]
    calibration: list[Document]


def picture_task(size: int) -> Task:
    """Find what three artists drew by what the fourth did."""
    queries, index = [], []
    for label, concept in enumerate(sorted((EMOJI / 'test').iterdir())):
        for file in sorted(concept.glob('*.webp')):
            doc = Document(blob=file.read_bytes())
            if file.stem == 'noto':
                queries.append(doc)
            else:
                index.append((doc, label))
    files = sorted((EMOJI / 'train').glob('*/*.webp'))
    chosen = files[:: len(files) // NUM_CALIBRATION][:NUM_CALIBRATION]
    calibration = [Document(blob=file.read_bytes()) for file in chosen]
    return Task('efficientnet-lite0', {'input_size': size}, queries, index, calibration)


def text_task() -> Task:
    """Find the keywords of a concept by its name."""
    with (EMOJI / 'concepts.csv').open(encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['split'] == 'test']
    index = []
    for label, row in enumerate(rows):
        keywords = [word for word in row['keywords'].split('; ') if word != row['name']]
        index.append((Document(text='; '.join(keywords)), label))
    return Task('all-MiniLM-L6-v2', {}, [Document(text=row['name']) for row in rows], index, [])


class Bench:
    """A task's model in every engine and precision."""

    def __init__(self, task: Task, folder: Path, engines: Sequence[str]) -> None:
        """Export, quantise and load."""
        backbone = get_backbone(task.model)
        inputs = input_spec(backbone, parse_options(backbone, task.options))
        self.reader = build_reader(inputs, backbone_tokenizer(backbone))
        self.queries = [self.reader.read(doc) for doc in task.queries]
        self.index = [self.reader.read(doc) for doc, _ in task.index]
        self.labels = [label for _, label in task.index]
        calibration = [self.reader.read(doc) for doc in task.calibration]
        model = build_embedding_model(backbone, task.options).eval()
        spec = ModelSpec(task.model, backbone.dimension, inputs)
        graphs = {each: folder / f'{each}.onnx' for each in ('fp32', 'int8')}
        export_onnx(model, graphs['fp32'], self.reader.example())
        starts = range(0, len(calibration), 16)
        write_int8(
            graphs['fp32'],
            graphs['int8'],
            [self.reader.batch(calibration[start : start + 16]) for start in starts],
        )
        self.engines: dict[str, InferenceEngine] = {}
        for precision, graph in graphs.items():
            self.engines[f'onnx {precision}'] = OnnxEngine(graph, spec, self.reader)
        for precision, graph in graphs.items() if 'openvino' in engines else ():
            self.engines[f'openvino {precision}'] = OpenvinoEngine(graph, spec, self.reader)
        for name, backend in (('torch', None), ('torch-compiled', 'inductor')):
            if name in engines:
                built = TorchEngine(model, spec, self.reader, compile_backend=backend)
                self.engines[f'{name} fp32'] = built

    def batches(self, items: list) -> list[tuple[list[int], ModelInputs]]:
        """Positions and inputs of batches, as the service makes them."""
        chosen = self.reader.batches(items, BATCH_SIZE)
        return [(each, self.reader.batch([items[place] for place in each])) for each in chosen]

    def embed(self, engine: InferenceEngine, items: list) -> np.ndarray:
        """The embeddings of items, in order."""
        found: list[np.ndarray] = [np.empty(0)] * len(items)
        for places, inputs in self.batches(items):
            for place, vector in zip(places, engine.embed(inputs), strict=True):
                found[place] = vector
        return np.stack(found)

    def contestants(self, num_timed: int) -> dict[str, Contestant]:
        """Everybody embeds the same batches."""
        items = self.index[:: max(1, len(self.index) // num_timed)][:num_timed]
        batches = [inputs for _, inputs in self.batches(items)]

        def runs(engine: InferenceEngine) -> Callable[[], int]:
            def run() -> int:
                return sum(len(engine.embed(inputs)) for inputs in batches)

            return run

        return {name: runs(engine) for name, engine in self.engines.items()}


def reject_for_texts(bench: Bench, graph: Path) -> None:
    """Add what is not ours: scales measured beforehand, and one scale over the whole batch."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter([inputs for _, inputs in bench.batches(bench.index[:NUM_CALIBRATION])])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else dict(batch)  # type: ignore[arg-type]

    prepared, static, dynamic = (graph.with_name(f'{name}.onnx') for name in 'psd')
    quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(str(prepared), str(dynamic), per_channel=True)
    quantize_static(
        str(prepared),
        str(static),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['MatMul'],
        per_channel=True,
        extra_options={'MatMulConstBOnly': True},
    )
    spec = bench.engines[REFERENCE].spec
    for name, each in (('static', static), ('dynamic', dynamic)):
        bench.engines[f'onnx int8, {name} (not ours)'] = OnnxEngine(each, spec, bench.reader)


def moved_by_neighbours(bench: Bench, engine: InferenceEngine) -> float:
    """The farthest that a vector of length 1 goes when its item is embedded among others."""
    items = [*bench.queries[:16], *bench.index[:16]]
    among = engine.embed(bench.reader.batch(items))
    alone = np.concatenate([engine.embed(bench.reader.batch([item])) for item in items])
    among, alone = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (among, alone))
    return float(np.linalg.norm(among - alone, axis=1).max())


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each vector to its own in the other array."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.sum(found * expected, axis=1) / lengths


def print_table(title: str, bench: Bench, num_rounds: int, num_timed: int) -> None:
    """Measure, and print a line for each engine and precision, in Markdown."""
    vectors = {
        name: (bench.embed(engine, bench.queries), bench.embed(engine, bench.index))
        for name, engine in bench.engines.items()
    }
    speeds = take_turns(bench.contestants(num_timed), num_rounds)
    print(f'\n{title}\n')
    print(
        f'| engine, precision | docs/s | to {REFERENCE} | recall@{LIMIT} | MRR | cosine, least | moved |'
    )
    print('|---|---|---|---|---|---|---|')
    for name, (queries, index) in vectors.items():
        labels = list(range(len(queries)))
        found = mean_metrics(evaluate_queries(queries, labels, index, bench.labels, LIMIT))
        whole = mean_metrics(evaluate_queries(queries, labels, index, bench.labels, len(index)))
        near = cosines(np.concatenate([queries, index]), np.concatenate(vectors[REFERENCE]))
        print(
            f'| {name} | {statistics.median(speeds[name]):,.0f} '
            f'| {ratio(speeds[name], speeds[REFERENCE]):.2f} | {found["recall_at_k"]:.3f} '
            f'| {whole["reciprocal_rank"]:.3f} | {near.mean():.4f}, {near.min():.4f} '
            f'| {moved_by_neighbours(bench, bench.engines[name]):.0e} |',
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--sizes', type=int, nargs='*', default=[96, 224])
    parser.add_argument('--timed', type=int, default=128, help='Documents that are timed')
    parser.add_argument(
        '--engines',
        nargs='+',
        default=['onnx', *(['openvino'] if has_openvino() else []), 'torch'],
        choices=['onnx', 'openvino', 'torch', 'torch-compiled'],
        help='ONNX Runtime always runs: it is what all are compared with',
    )
    parser.add_argument('--rejected', action='store_true', help='other ways of int8 for texts, too')
    arguments = parser.parse_args()
    tasks = {f'Pictures, {size} px': picture_task(size) for size in arguments.sizes}
    tasks['Texts'] = text_task()
    for title, task in tasks.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(task, Path(folder), arguments.engines)
            if arguments.rejected and title == 'Texts':
                reject_for_texts(bench, Path(folder) / 'fp32.onnx')
            print_table(f'{title}, {task.model}', bench, arguments.rounds, arguments.timed)


if __name__ == '__main__':
    main()
