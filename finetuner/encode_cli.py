"""The command `finetuner encode`: one file to another, or a whole data set to shards."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from finetuner.console import tell
from finetuner.excepts import ConfigError


def encode(
    model: Annotated[
        str | None,
        typer.Argument(help='Of one file: artifact id, alias, directory or zip, or a model.'),
    ] = None,
    data: Annotated[
        Path | None, typer.Argument(exists=True, help='A .txt of lines, or as for fit.')
    ] = None,
    file: Annotated[
        Path | None,
        typer.Argument(metavar='[OUTPUT]', help='.npy: embeddings; .docs: Documents.'),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option('--input', '-i', help="Files, folders, 'data/*.parquet'; again for more."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option('--output', '-o', help='Folder of the shards.')
    ] = None,
    artifact: Annotated[
        str | None, typer.Option(help='Id, alias, directory or zip of a fine-tuned model.')
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option('--model', help='In its place: a pretrained model.')
    ] = None,
    content: Annotated[
        str | None, typer.Option(help='Column of the contents, if not text, image, uri or blob.')
    ] = None,
    ids: Annotated[str | None, typer.Option('--id', help='Column of the ids, if not id.')] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help='Column that is copied; again for more.')
    ] = None,
    format_name: Annotated[str, typer.Option('--format', help='parquet or numpy.')] = 'parquet',
    rows_per_shard: Annotated[int, typer.Option(min=1)] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    select_model: Annotated[str | None, typer.Option(help='clip-text or clip-vision.')] = None,
    device: Annotated[str | None, typer.Option(help='cpu or cuda.')] = None,
    engine: Annotated[str, typer.Option(help='onnx, openvino, torch or torch-compiled.')] = 'auto',
    precision: Annotated[str, typer.Option(help='fp32, int8, fp16 or bf16.')] = 'auto',
    workers: Annotated[
        int, typer.Option('--workers', min=1, help='Processes, or actors of Ray.')
    ] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help='Of each worker.')] = None,
    max_failed: Annotated[
        str | None, typer.Option(help='Rows that may fail: 100, 0.01 or 1%. [default: all]')
    ] = None,
    restart: Annotated[
        bool, typer.Option('--restart', help='Throw away what the output holds.')
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help='A Ray cluster: auto, host:port or local.')
    ] = None,
    onnx: Annotated[bool, typer.Option('--onnx', help='Of one file: run the ONNX graph.')] = False,
    as_json: Annotated[bool, typer.Option('--json', help='As JSON, for programs.')] = False,
) -> None:
    """Embed one file, or a whole data set in shards.

    finetuner encode MODEL DATA OUTPUT: what a file or folder holds, in its order, in memory.

    finetuner encode --input 'data/*.parquet' --output out/ --artifact A: data of any size, in shards.
    The same command again goes on where it was killed. Rows that fail are listed in
    out/part-*.json. The exit code is 1 when an input could not be read, 2 when nothing can be done.
    """
    if inputs is None:
        if model is None or data is None or file is None:
            raise ConfigError(
                'give MODEL DATA OUTPUT for one file, or --input, --output and --artifact (or '
                '--model) for a whole data set; see finetuner encode --help'
            )
        if output is not None or artifact is not None or pretrained is not None:
            raise ConfigError('--output, --artifact and --model go with --input')
        _encode_file(model, data, file, batch_size, onnx, select_model, as_json)
        return
    if model is not None or output is None:
        raise ConfigError('--input goes with --output and --artifact (or --model), by their names')
    if onnx:
        raise ConfigError('--onnx is of one file: with --input say --engine onnx')
    import finetuner

    # Ray, too, prints there
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        summary = finetuner.encode_dataset(
            inputs,
            output,
            artifact,
            model=pretrained,
            content=content,
            id=ids,
            keep=keep or (),
            format=format_name,  # type: ignore[arg-type]
            rows_per_shard=rows_per_shard,
            batch_size=batch_size,
            select_model=select_model,
            device=device,
            engine=engine,
            precision=precision,
            num_workers=workers,
            num_threads=threads,
            max_failed=_share(max_failed),
            restart=restart,
            ray_address=ray,
            show_progress=not as_json,
        )
    _tell_summary(summary, as_json)


def _tell_summary(summary: Any, as_json: bool) -> None:
    done = f'{summary.num_rows - summary.num_failed:,} embeddings'
    failed = f', {summary.num_failed:,} rows failed' if summary.num_failed else ''
    reused = f', {summary.num_reused:,} of them from before' if summary.num_reused else ''
    text = (
        f'{summary.output}: {done} in {summary.num_shards:,} shards{reused}{failed}; '
        f'{summary.seconds:.1f} s, {summary.rows_per_second:,.0f} rows/s'
    )
    tell({**asdict(summary), 'output': str(summary.output)}, as_json, text)
    for lost in summary.missing:
        rows = '' if lost.start is None else f' rows {lost.start:,} to {lost.stop - 1:,}'
        typer.echo(f'finetuner: missing: {lost.source}{rows}: {lost.reason}', err=True)
    if summary.missing:
        raise typer.Exit(1)


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text.removesuffix('%'))
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ConfigError(
            f'--max-failed {text}: give a number of rows, such as 100, or a share: 0.01 or 1%'
        )
    if not text.endswith('%'):
        return number
    # of 100 % and more, all may
    return number / 100 if number < 100 else None


def _encode_file(
    model: str,
    data: Path,
    output: Path,
    batch_size: int,
    onnx: bool,
    select_model: str | None,
    as_json: bool,
) -> None:
    import numpy as np
    from docarray import Document, DocumentArray

    import finetuner
    from finetuner.data.sources import open_documents
    from finetuner.data.stored.storing import save_documents
    from finetuner.models.zoo import ALIASES, BACKBONES

    if output.suffix not in ('.npy', '.docs'):
        raise ConfigError(f'{output} cannot be written: allowed endings are .npy and .docs')
    load = finetuner.build_model if model in BACKBONES or model in ALIASES else finetuner.get_model
    engine = load(model, batch_size=batch_size, is_onnx=onnx, select_model=select_model)
    if data.suffix == '.txt':
        lines = data.read_text(encoding='utf-8').splitlines()
        docs = DocumentArray(Document(text=line) for line in lines if line.strip())
    else:
        docs = DocumentArray(open_documents(data, None))
    finetuner.encode(engine, docs, batch_size)
    if output.suffix == '.docs':
        save_documents(docs, output)
    else:
        unfinished = output.with_name(f'.{output.name}.part.npy')
        np.save(unfinished, np.asarray(docs.embeddings, np.float32))
        unfinished.replace(output)
    found = {'path': str(output), 'num_documents': len(docs), 'dimension': engine.dimension}
    text = f'{output}: {len(docs)} embeddings of {engine.dimension} numbers'
    tell(found, as_json, text)
