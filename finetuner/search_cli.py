"""The commands `finetuner evaluate` and `finetuner mine`, over what `finetuner encode` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetuner.console import tell

_Label = Annotated[str, typer.Option(help='Column of the labels, kept by `encode --keep`.')]
_Distance = Annotated[str, typer.Option(help='cosine, euclidean or sqeuclidean.')]
_Workers = Annotated[int, typer.Option('--workers', min=1, help='Processes, or tasks of Ray.')]
_Ray = Annotated[str | None, typer.Option('--ray', help='A Ray cluster: auto, host:port or local.')]
_Json = Annotated[bool, typer.Option('--json', help='As JSON, for programs.')]


def add_commands(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(evaluate)
    app.command()(mine)


def evaluate(
    query: Annotated[Path, typer.Argument(help='Folder of encoded data.')],
    index: Annotated[
        Path | None,
        typer.Argument(help='The same; without, queries are searched among each other.'),
    ] = None,
    label: _Label = 'label',
    k: Annotated[int, typer.Option('-k', min=1, help='Neighbours that are looked at.')] = 20,
    distance: _Distance = 'cosine',
    engine: Annotated[str, typer.Option(help='exact, or faiss in float32.')] = 'exact',
    include_self: Annotated[
        bool, typer.Option('--include-self', help='Let queries find the row of their own id.')
    ] = False,
    workers: _Workers = 1,
    ray_address: _Ray = None,
    as_json: _Json = False,
) -> None:
    """Measure how well encoded data finds what has its label."""
    from finetuner.bulk.searching import evaluate_shards

    metrics = evaluate_shards(
        query,
        index,
        label,
        k,
        distance,
        workers,
        ray_address,
        engine,  # type: ignore[arg-type]
        exclude_self=not include_self,
    )
    tell(metrics, as_json, '\n'.join(f'{name:<18} {value:.4f}' for name, value in metrics.items()))


def mine(
    query: Annotated[Path, typer.Argument(metavar='ANCHORS', help='Folder of encoded data.')],
    output: Annotated[Path, typer.Argument(help='To be written: .parquet')],
    index: Annotated[
        Path | None, typer.Option(help='Where to look for negatives; without, among the anchors.')
    ] = None,
    label: _Label = 'label',
    k: Annotated[int, typer.Option('-k', min=1, help='Negatives of each anchor.')] = 10,
    skip: Annotated[int, typer.Option(min=0, help='Nearest ones that are left out.')] = 0,
    distance: _Distance = 'cosine',
    workers: _Workers = 1,
    ray_address: _Ray = None,
    as_json: _Json = False,
) -> None:
    """Write, for each anchor, the nearest items of other labels."""
    from finetuner.bulk.searching import mine_negatives

    done = mine_negatives(query, index, output, label, k, skip, distance, workers, ray_address)
    shown = {**vars(done), 'output': str(done.output)}
    without = f', {done.num_without:,} of them without a negative' if done.num_without else ''
    tell(shown, as_json, f'{done.output}: {done.num_anchors:,} anchors{without}')
