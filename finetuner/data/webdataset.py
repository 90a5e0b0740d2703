"""WebDataset shards: tars whose files stand together by key, a Document for each key.

The layout is that of the library `webdataset`, which is not used: with it come opening of any address
by shell commands, unpickling, and files skipped without a word.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from docarray import Document

from finetuner.data.contents import LABEL_TAG, MODALITIES, normalise_label, shown_value
from finetuner.data.folders import PICTURE_SUFFIXES
from finetuner.excepts import ConfigError, DataError
from finetuner.storage.archives import TarMember, shown_text, tar_members
from finetuner.uris import DEFAULT_POLICY

CONTENTS = ('image', 'text', 'pair')
KEY_TAG = '__key__'

_LOGGER = logging.getLogger(__name__)
_PICTURES = tuple(suffix.removeprefix('.') for suffix in PICTURE_SUFFIXES)
_TEXT, _LABEL, _JSON = 'txt', 'cls', 'json'
_MAX_TEXT_BYTES = 16 * 1024 * 1024
_BUFFER_BYTES = 256 * 1024
# of one key, and endings that the warning about them tells apart
_MOST_MEMBERS = 100
_MOST_COUNTED = 1_000
_NAMES_SHOWN = 5


class SampleForm(NamedTuple):
    """What of a sample is taken.

    Attributes:
        content: `'image'`, `'text'`, or `'pair'` for both; None for what there is, where that is clear.
        label: ending of the file, or key of the sample's json, that holds the label; None for `cls`
            where there is one.
    """

    content: str | None = None
    label: str | None = None

    def check(self) -> None:
        """Refuse what no sample has.

        Raises:
            ConfigError: `content` is none of these, or pairs are to have labels.
        """
        if self.content is not None and self.content not in CONTENTS:
            raise ConfigError(
                f'content={shown_value(self.content)}: of WebDataset shards it is one of '
                f'{", ".join(CONTENTS)}'
            )
        if self.label is not None and (not isinstance(self.label, str) or not self.label):
            raise ConfigError(
                f'label={shown_value(self.label)}: of WebDataset shards it is the ending of a file '
                'or a key of the json'
            )
        if self.content == 'pair' and self.label is not None:
            raise ConfigError(f"label={self.label!r} beside content='pair', and pairs have none")


Sample = dict[str, bytes | str]


class BrokenSampleError(DataError):
    """A sample that cannot be taken, in a shard whose others can."""


def read_samples(
    path: Path, form: SampleForm, chosen: Callable[[int], bool] | None = None
) -> Iterator[tuple[str, Sample]]:
    """Read the samples of a shard in order, one at a time.

    Args:
        path: of the shard.
        form: what of them is taken; nothing else is read.
        chosen: takes the place of a sample, from 0, and says whether it is read; None for all.

    Yields:
        What to call the sample, and its files by their ending in lower case, with the key as
        `'__key__'`.

    Raises:
        DataError: no tar, damaged, or it holds links, a file too large, or the same file twice.
    """
    for where, _, sample in read_each_sample(path, form, chosen):
        if isinstance(sample, BrokenSampleError):
            raise sample
        yield where, sample


def read_each_sample(
    path: Path, form: SampleForm, chosen: Callable[[int], bool] | None = None
) -> Iterator[tuple[str, str, Sample | BrokenSampleError]]:
    """Read the samples of a shard as `read_samples` does, and go on after one that is broken.

    Yields:
        What to call the sample, its key, and its files, or why they cannot be taken.

    Raises:
        DataError: no tar, damaged, or it holds links.
    """
    ignored: Counter[str] = Counter()
    with _opened(path) as file:
        for number, (key, members) in enumerate(_groups(path, file)):
            if chosen is not None and not chosen(number):
                continue
            where = f'sample {shown_text(key)} of {path.name!r}'
            sample: Sample | BrokenSampleError
            try:
                sample = _sample(where, key, members, form, file, ignored)
            except BrokenSampleError as error:
                sample = error
            yield where, key, sample
    if ignored:
        endings = ', '.join(sorted(ignored)[:_NAMES_SHOWN])
        more = ', ...' if len(ignored) > _NAMES_SHOWN else ''
        _LOGGER.warning(
            '%d files in %r were skipped, for their endings (%s%s): read are %s, txt, cls and json',
            ignored.total(),
            str(path),
            endings,
            more,
            ', '.join(_PICTURES),
        )


def count_samples(path: Path) -> int:
    """Count the samples of a shard; only what stands before its files is read."""
    with _opened(path) as file:
        return sum(1 for _ in _groups(path, file))


def sample_document(where: str, sample: Sample, form: SampleForm) -> Document:
    """Make a Document of a sample, as `read_samples` gives it.

    | files | Document |
    |---|---|
    | a picture or `txt`, with a label | class data |
    | the same alone | an instance |
    | a picture and `txt` | a text-image pair |

    The object in `json` becomes its tags, and the key the tag `__key__`.

    Raises:
        DataError: it holds too little, too much, or what cannot be read.
    """
    return _Sample(where, sample, form).document()


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open('rb', buffering=_BUFFER_BYTES)
    except OSError as error:
        raise DataError(f'{str(path)!r} cannot be read: {error.strerror or error}') from error


def _groups(path: Path, file: IO[bytes]) -> Iterator[tuple[str, list[tuple[str, TarMember]]]]:
    """Files that stand together and are called alike up to the first dot, with their endings."""
    last: str | None = None
    members: list[tuple[str, TarMember]] = []
    try:
        for member in tar_members(path, file):
            key, ending = _key_and_ending(member.name)
            if not key:
                continue
            if key != last and last is not None:
                yield last, members
                members = []
            last = key
            members.append((ending.lower(), member))
            if len(members) > _MOST_MEMBERS:
                raise DataError(
                    f'sample {shown_text(key)} of {path.name!r} has more than {_MOST_MEMBERS} files'
                )
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f'{str(path)!r} cannot be read as tar: {error}') from error
    if last is not None:
        yield last, members


def _key_and_ending(name: str) -> tuple[str, str]:
    """Split at the first dot of the last part of a path; no key for what belongs to none."""
    folder, slash, base = name.rpartition('/')
    stem, dot, ending = base.partition('.')
    # what says something of the shard itself is called '__...__'; hidden files have no stem
    first = name.partition('/')[0]
    is_meta = first.startswith('__') and first.endswith('__')
    if not stem or not dot or is_meta:
        return '', ''
    return f'{folder}{slash}{stem}', ending


def _sample(
    where: str,
    key: str,
    members: list[tuple[str, TarMember]],
    form: SampleForm,
    file: IO[bytes],
    ignored: Counter[str],
) -> Sample:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise BrokenSampleError(f'{where}: its name is not UTF-8') from error
    wanted = _endings(form, {ending for ending, _ in members})
    sample: Sample = {KEY_TAG: key}
    for ending, (_, start, size) in members:
        if ending not in wanted:
            if len(ignored) < _MOST_COUNTED:
                ignored[ending[:20]] += 1
            continue
        if ending in sample:
            raise BrokenSampleError(f'{where}: its {ending} is there twice')
        most = DEFAULT_POLICY.max_bytes if ending in _PICTURES else _MAX_TEXT_BYTES
        if size > most:
            raise BrokenSampleError(
                f'{where}: its {ending} has {size:,} bytes, and at most {most:,} are read'
            )
        try:
            file.seek(start)
            data = file.read(size)
        except OSError as error:
            raise DataError(f'{where}: its {ending} cannot be read: {error}') from error
        if len(data) != size:
            raise DataError(f'{where}: its {ending} ends early: the file was changed')
        sample[ending] = data
    return sample


def _endings(form: SampleForm, there: set[str]) -> set[str]:
    """The endings of the files to be read."""
    contents = {
        None: (*_PICTURES, _TEXT),
        'image': _PICTURES,
        'text': (_TEXT,),
        'pair': (*_PICTURES, _TEXT),
    }
    label = form.label if form.label in there else _LABEL
    return {*contents[form.content], label, _JSON}


class _Sample:
    """One sample on its way to a Document."""

    def __init__(self, where: str, sample: Sample, form: SampleForm) -> None:
        self._where = where
        self._sample: dict[str, Any] = sample
        self._form = form
        self._json = self._read_json()

    def document(self) -> Document:
        pictures = [ending for ending in _PICTURES if ending in self._sample]
        has_text = _TEXT in self._sample
        if len(pictures) > 1:
            self._refuse(f'there are several pictures, {" and ".join(pictures)}: leave one')
        needed, is_there = {
            None: ('a picture or txt', bool(pictures) or has_text),
            'image': ('a picture', bool(pictures)),
            'text': ('txt', has_text),
            'pair': ('a picture and txt', bool(pictures) and has_text),
        }[self._form.content]
        if not is_there:
            found = ', '.join(ending for ending in self._sample if ending != KEY_TAG)
            self._refuse(
                f'there is no content: {needed} is needed, and {found or "nothing that is read"} is '
                f'there; pictures end in {" ".join(_PICTURES)}'
            )
        tags = {**self._json, KEY_TAG: self._sample[KEY_TAG]}
        if pictures and has_text:
            return self._pair(pictures[0], tags)
        label = self._label()
        if label is not None:
            tags[LABEL_TAG] = label
        if pictures:
            return Document(blob=self._picture(pictures[0]), tags=tags)
        return Document(text=self._text(), tags=tags)

    def _pair(self, picture: str, tags: dict[str, Any]) -> Document:
        is_labelled = self._form.label is not None or _LABEL in self._sample or LABEL_TAG in tags
        if is_labelled and self._form.content is None:
            self._refuse(
                "there are a picture, a text and a label: say which of them count by content='image', "
                "content='text' or, for pairs, content='pair'"
            )
        tags.pop(LABEL_TAG, None)
        doc = Document(tags=tags)
        doc.chunks = [Document(text=self._text()), Document(blob=self._picture(picture))]
        for chunk, modality in zip(doc.chunks, MODALITIES, strict=True):
            chunk.modality = modality
        return doc

    def _picture(self, ending: str) -> bytes:
        data = self._sample[ending]
        if not data:
            self._refuse(f'its {ending} is empty')
        return data

    def _text(self) -> str:
        text = self._decoded(_TEXT)
        if not text or text.isspace():
            self._refuse('its txt is empty')
        return text

    def _label(self) -> int | str | None:
        name = self._form.label
        if name is not None and name not in self._sample:
            if name not in self._json:
                self._refuse(
                    f'there is no label: neither a file that ends in .{name} nor a key {name!r} of '
                    'its json'
                )
            try:
                return normalise_label(self._json[name])
            except DataError as error:
                self._refuse(f'{error}; {name!r} of its json is the label, an int or a str', error)
        name = name or _LABEL
        if name not in self._sample:
            return None
        text = self._decoded(name).strip()
        try:
            return normalise_label(int(text))
        except ValueError as error:
            self._refuse(
                f'its {name} is {shown_value(text)}, not a whole number below 2**53: put labels of '
                'another form into json, and give its key as label=',
                error,
            )

    def _read_json(self) -> dict[str, Any]:
        if _JSON not in self._sample:
            return {}
        try:
            found = json.loads(self._decoded(_JSON), parse_constant=_refuse_constant)
            if '\\ud' in self._decoded(_JSON).lower():
                # half a surrogate pair is JSON, but no text that could be stored
                json.dumps(found, ensure_ascii=False).encode('utf-8')
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            self._refuse(f'its json is not valid: {error}', error)
        if not isinstance(found, dict):
            self._refuse(f'its json is a {type(found).__name__}, not an object')
        return found

    def _decoded(self, ending: str) -> str:
        try:
            return self._sample[ending].decode('utf-8')
        except UnicodeDecodeError as error:
            self._refuse(f'its {ending} is not UTF-8: {error}', error)

    def _refuse(self, problem: str, cause: Exception | None = None) -> NoReturn:
        raise DataError(f'{self._where}: {problem}') from cause


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON number')
