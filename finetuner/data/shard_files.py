"""Which files are shards, and how those of each ending are opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from docarray import Document

from finetuner.data.patterns import expand_patterns
from finetuner.data.record_forms import Pair
from finetuner.data.records import Chosen, JsonLinesShard, ParquetShard, Shard
from finetuner.data.webdataset import SampleForm, count_samples, read_samples, sample_document
from finetuner.excepts import ConfigError, DataError

SHARD_ENDINGS = ('.parquet', '.tar', '.jsonl', '.ndjson', '.docs')
_SAME = {'.ndjson': '.jsonl'}


class WebDatasetShard(Shard):
    """A tar of samples."""

    def __init__(self, path: Path, form: SampleForm) -> None:
        super().__init__(path)
        self._form = form

    def rows(
        self, group: int | None = None, chosen: Chosen | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read samples; of those not chosen only the headers."""
        return read_samples(self.path, self._form, chosen)

    def num_rows(self, group: int | None = None) -> int:
        """Count the samples."""
        return count_samples(self.path)

    def document(self, where: str, row: Any) -> Document | Pair:
        """Make a Document of a sample."""
        return sample_document(where, row, self._form)


class StoredShard(Shard):
    """A file of Documents."""

    def rows(
        self, group: int | None = None, chosen: Chosen | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Read Documents; those not chosen are not decoded."""
        with self._opened() as docs:
            if chosen is None:
                numbered: Iterator[tuple[int, Document]] = enumerate(docs)
            else:
                numbered = ((place, docs[place]) for place in range(len(docs)) if chosen(place))
            for place, doc in numbered:
                yield f'Document {place} of {self.path.name!r}', doc

    def num_rows(self, group: int | None = None) -> int:
        """Read the number in the file's header."""
        with self._opened() as docs:
            return len(docs)

    def document(self, where: str, row: Any) -> Document | Pair:
        """The Document itself."""
        return row

    def _opened(self) -> Any:
        from finetuner.data.stored.files import StoredDocuments

        try:
            return StoredDocuments(self.path)
        except OSError as error:
            raise DataError(
                f'{str(self.path)!r} cannot be read: {error.strerror or error}'
            ) from error


def open_shards(
    source: Any,
    on_broken: Literal['stop', 'skip'] = 'stop',
    content: str | None = None,
    label: str | None = None,
) -> list[Shard]:
    """Find the shards of a data set; none is read yet.

    Args:
        source: a path, a pattern (see `finetuner.data.patterns`), or a list of them.
        on_broken: as for `open_documents`.
        content: of WebDataset shards, see `SampleForm`.
        label: the same.

    Raises:
        ConfigError: `content` or `label` with other shards, or no such one.
        DataError: there are none, one is not there or there twice, or they are of several forms, or
            of one that is not read in shards.
    """
    paths = expand_patterns(source)
    endings = {_SAME.get(ending, ending) for ending in (path.suffix.lower() for path in paths)}
    others = sorted(endings.difference(SHARD_ENDINGS))
    if others:
        first = next(path for path in paths if path.suffix.lower() in others)
        raise DataError(
            f'{str(first)!r} is no shard: several files are read as one where they end in '
            f'{" ".join(SHARD_ENDINGS)}'
        )
    if len(endings) > 1:
        raise DataError(
            f'the shards end in {" and ".join(sorted(endings))}: those of a data set are of one form'
        )
    ending = endings.pop()
    form = SampleForm(content, label)
    if ending == '.tar':
        form.check()
        return [WebDatasetShard(path, form) for path in paths]
    if content is not None or label is not None:
        raise ConfigError(
            f'content={content!r}, label={label!r}: they are for WebDataset shards (.tar), and these '
            f'end in {ending}: leave them out'
        )
    if ending == '.docs':
        return [StoredShard(path) for path in paths]
    kind = ParquetShard if ending == '.parquet' else JsonLinesShard
    return [kind(path, on_broken) for path in paths]
