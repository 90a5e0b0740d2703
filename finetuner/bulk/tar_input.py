"""WebDataset shards as what is encoded: a row for each sample."""

from __future__ import annotations

from collections.abc import Iterator

from docarray import Document

from finetuner.bulk.inputs import InputFile
from finetuner.bulk.rows import Columns, Row, text_of
from finetuner.data.webdataset import (
    BrokenSampleError,
    Sample,
    SampleForm,
    count_samples,
    read_each_sample,
    sample_document,
)
from finetuner.excepts import ConfigError, DataError

_CONTENTS = ('image', 'text')
_NO_CONTENT = {'__key__', 'cls', 'json'}


class TarInput(InputFile):
    """A tar of samples, in their order: ids are their keys, kept are the tags of their Documents.

    There is no index: for the rows of a shard the headers before them are read, and nothing else.
    """

    def check_columns(self, columns: Columns) -> None:
        """See `InputFile.check_columns`."""
        if columns.content is not None and columns.content not in _CONTENTS:
            raise ConfigError(
                f'content={columns.content!r}: of the samples of {self.path.name} it is one of '
                f'{", ".join(_CONTENTS)}; encode files with other columns in a call of their own'
            )
        if columns.id is not None:
            raise ConfigError(
                f'id={columns.id!r}: the ids of {self.path.name} are the keys of its samples: leave '
                'it out, or encode files with such a column in a call of their own'
            )

    def num_rows(self, columns: Columns) -> int:
        """See `InputFile.num_rows`."""
        return count_samples(self.path)

    def rows(self, start: int, stop: int, columns: Columns) -> Iterator[Row]:
        """See `InputFile.rows`."""
        if start >= stop:
            return
        usual = columns.modality if columns.modality in _CONTENTS else None
        form = SampleForm(columns.content or usual)
        samples = read_each_sample(self.path, form, lambda number: start <= number < stop)
        for number, (where, key, sample) in enumerate(samples, start):
            yield self._row(number, where, key, sample, form, columns)
            if number + 1 == stop:
                # what comes after it is others' rows
                return

    def _row(
        self,
        number: int,
        where: str,
        key: str,
        sample: Sample | BrokenSampleError,
        form: SampleForm,
        columns: Columns,
    ) -> Row:
        # a key that is not UTF-8 can be written nowhere
        name = f'{self.path.name}:{number}' if _has_surrogates(key) else key
        try:
            if isinstance(sample, BrokenSampleError):
                raise sample
            doc = _document(where, sample, form, bool(columns.keep))
        except DataError as error:
            return Row(name, Document(), (None,) * len(columns.keep), str(error))
        kept = tuple(text_of(doc.tags.get(column)) for column in columns.keep)
        return Row(name, doc, kept)


def _document(where: str, sample: Sample, form: SampleForm, has_tags: bool) -> Document:
    contents = sample.keys() - _NO_CONTENT
    if form.content is None and 'txt' in contents and len(contents) > 1:
        raise DataError(f"{where}: there are a picture and a text: say content='image' or 'text'")
    if not has_tags:
        # nothing asks for them, so they need not be right
        sample = {ending: data for ending, data in sample.items() if ending not in ('cls', 'json')}
    doc = sample_document(where, sample, form)
    doc.modality = 'text' if doc.text else 'image'
    return doc


def _has_surrogates(text: str) -> bool:
    return any('\ud800' <= character <= '\udfff' for character in text)
