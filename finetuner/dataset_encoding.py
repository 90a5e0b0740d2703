"""Embed whole data sets: the public function, whose work `finetuner.bulk` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from finetuner.bulk.encoding import EncodedSummary


def encode_dataset(
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    artifact: str | Path | None = None,
    *,
    model: str | None = None,
    model_options: dict[str, Any] | None = None,
    content: str | None = None,
    id: str | None = None,
    keep: Sequence[str] = (),
    format: Literal['parquet', 'numpy'] = 'parquet',
    rows_per_shard: int = 10_000,
    batch_size: int = 32,
    select_model: str | None = None,
    device: str | None = None,
    engine: str = 'auto',
    precision: str = 'auto',
    num_workers: int = 1,
    num_threads: int | None = None,
    max_failed: float | None = None,
    restart: bool = False,
    ray_address: str | None = None,
    show_progress: bool = True,
) -> EncodedSummary:
    """Embed a whole data set, from files to files, in memory that does not grow with it.

    The output is written in shards, each whole or not there. The same call again goes on where one
    was killed, and does nothing where all is done. `finetuner.bulk.open_encoded` reads it.

    Args:
        input: files and folders, or patterns such as `'data/*.parquet'`; see docs/encoding.md.
        output: folder of the shards.
        artifact: as for `get_model`. Either this, or `model`.
        model: a pretrained model, as for `build_model`.
        model_options: of the pretrained model.
        content: column of the texts, the pictures or their paths; None for `text`, or `image`, `uri`
            or `blob`, whichever there is.
        id: column of the ids; None for `id`. Where there is none, rows are called by their file and
            their place in it, from 0.
        keep: columns that are copied to the output.
        format: `parquet`, or `numpy` for a `.npy` and a JSON Lines file with the rest a shard.
        rows_per_shard: at most so many rows in a shard.
        batch_size: as for `encode`.
        select_model: as for `get_model`.
        device: `cpu` or `cuda`; None takes a GPU where there is one.
        engine: `onnx`, `openvino`, `torch` or `torch-compiled`; `auto` is, on a CPU, what the artifact
            says is fastest, or ONNX Runtime.
        precision: `fp32`, `int8`, on a GPU `fp16` or `bf16`; `auto` is what the artifact says.
        num_workers: processes that encode; 1 is this one. With a Ray cluster, actors.
        num_threads: of each; None divides the cores of this machine, and is 1 with a Ray cluster.
        max_failed: so many rows may fail: a number, or a share of all below 1; None: all may.
        restart: throw away what the output holds.
        ray_address: of a Ray cluster that does the work: `auto`, `host:port` or `local`; or of its
            jobs API, such as `http://127.0.0.1:8265`, to which this is submitted.
        show_progress: a bar, where there is a terminal.

    Returns:
        How much was done. Rows that cannot be embedded are listed in the manifests, inputs that
        cannot be read in `missing`.

    Raises:
        ConfigError: an argument, or a column, is wrong, or what it needs is not installed.
        ConflictError: the output was begun with another model, option or input; or another process
            is writing there.
        DataError: there is no input, or more rows failed than may.
        ArtifactError: there is no such artifact, or it is damaged.
        NotFoundError: no artifact of that id or alias.
    """
    from finetuner.api import find_artifact
    from finetuner.bulk.encoding import encode_files
    from finetuner.bulk.options import BulkOptions
    from finetuner.bulk.showing import progress_bar

    options = BulkOptions(
        output=Path(output).expanduser().absolute(),
        artifact=None if artifact is None else find_artifact(artifact).absolute(),
        model=model,
        model_name=str(model if artifact is None else artifact),
        model_options=model_options,
        content=content,
        id=id,
        keep=(keep,) if isinstance(keep, str) else tuple(keep),
        format=format,
        rows_per_shard=rows_per_shard,
        batch_size=batch_size,
        select_model=select_model,
        device=device,
        engine=engine,
        precision=precision,
        num_workers=num_workers,
        num_threads=num_threads,
        max_failed=max_failed,
        restart=restart,
        ray_address=ray_address,
    )
    inputs = [input] if isinstance(input, str | Path) else list(input)
    with progress_bar(show_progress) as show:
        if options.by_job:
            from finetuner.bulk.ray_job import encode_by_job

            names = {field.name: getattr(options, field.name) for field in fields(options)}
            address = str(names.pop('ray_address'))
            return encode_by_job(address, _as_nodes_see(inputs), names, show)
        return encode_files([str(each) for each in inputs], options, show)


def _as_nodes_see(inputs: Sequence[str | Path]) -> list[str]:
    """Paths that do not depend on where this process works."""
    return [str(Path(each).expanduser().absolute()) for each in inputs]
