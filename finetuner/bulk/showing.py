"""How far encoding is, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from finetuner.bulk.encoding import BulkProgress
from finetuner.console import console


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[BulkProgress], None]]:
    """Show a bar of rows; nothing where there is no terminal.

    Yields:
        A function that takes how far it is.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn('rows'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.fields[failed]}'),
    )
    hidden = not shown or not console.is_terminal
    with Progress(*columns, console=console, disable=hidden) as progress:
        task = progress.add_task('', total=None, failed='')

        def show(now: BulkProgress) -> None:
            failed = f'{now.failed_rows:,} failed' if now.failed_rows else ''
            progress.update(task, total=now.num_rows, completed=now.done_rows, failed=failed)

        yield show
