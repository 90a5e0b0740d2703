"""A collection of image/label pairs, as people make, fill, save, share and read it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.collections.draft import DEFAULT_GROUP, Draft, at_position
from finetuner.collections.finding import Query
from finetuner.collections.place import Place, current_place
from finetuner.collections.reading import SavedPairs
from finetuner.collections.records import CollectionRecord
from finetuner.collections.spec import CollectionSpec, check_group
from finetuner.collections.store import new_key
from finetuner.collections.tiles import ImageForm
from finetuner.excepts import ConfigError, DataError

_PAGE = 1000


class TrainingSet(SavedPairs):
    """A named set of image/label pairs, in groups.

    Pairs that are fed lie on the disk until `save`, which makes all of them part of the collection, or
    none. What is fed later is saved by another `save`.

    Args:
        name: unique among the collections of its owner.
        mltype: `classification`, `object_detection` or `segmentation`.
        tile_size: height and width of all images, in pixels.
        classes: names, in the order in which labels count them; None takes them from the labels.
        partition: percentages of the pairs that go to `train`, `validate` and `test`, such as
            `[70, 20, 10]`; None leaves all in the group that they are fed to.
        description: what people should know of it.
        public: whether others may read it, once it is saved.

    Raises:
        ConfigError: one of them is not what it may be.
    """

    def __init__(
        self,
        name: str,
        mltype: str = 'classification',
        tile_size: Sequence[int] = (256, 256),
        classes: Sequence[str] | None = None,
        partition: Sequence[float] | None = None,
        description: str = '',
        public: bool = False,
    ) -> None:
        self._place = current_place()
        self._spec = CollectionSpec.checked(
            name, mltype, tile_size, classes, partition, description, public
        )
        self._record: CollectionRecord | None = None
        self._draft: Draft | None = None
        self._key = new_key()

    @classmethod
    def from_id(cls, collection_id: int) -> TrainingSet:
        """Open a collection by its number.

        Raises:
            NotFoundError: it is not there, or not shared.
        """
        place = current_place()
        return cls._opened(place, place.store.get(_number(collection_id)))

    @classmethod
    def from_name(cls, name: str) -> TrainingSet:
        """Open a collection by its name: one's own, or else the only public one of that name.

        Raises:
            NotFoundError: it is not there, or not shared; the nearest names are given.
            ConflictError: several others have published one of that name.
        """
        place = current_place()
        return cls._opened(place, place.store.find(name))

    @classmethod
    def from_doc(cls, doc: Mapping[str, Any] | TrainingSet) -> TrainingSet:
        """Open a collection by the document that describes it, or by what `search` found.

        Raises:
            ConfigError: the document has no `id`.
            NotFoundError: it is not there any more.
        """
        if isinstance(doc, TrainingSet):
            return cls.from_id(doc._saved.id)
        data = doc.get('data', doc) if isinstance(doc, Mapping) else {}
        if not isinstance(data, Mapping) or 'id' not in data:
            raise ConfigError(f'{str(doc)[:80]} is no document of a collection: it has no `id`')
        return cls.from_id(data['id'])

    @classmethod
    def _opened(cls, place: Place, record: CollectionRecord) -> TrainingSet:
        opened = cls.__new__(cls)
        opened._place = place
        opened._draft = None
        opened._key = record.key
        opened._take(record)
        return opened

    # what it is

    @property
    def id(self) -> int | None:
        """Its number; None until it is saved."""
        return None if self._record is None else self._record.id

    @property
    def name(self) -> str:
        """Its name."""
        return self._spec.name

    @property
    def mltype(self) -> str:
        """What its labels are."""
        return self._spec.mltype

    @property
    def tile_size(self) -> list[int]:
        """Height and width of its images, in pixels."""
        return list(self._spec.tile_size)

    @property
    def description(self) -> str:
        """What people should know of it."""
        return self._spec.description

    @property
    def public(self) -> bool:
        """Whether others may read it."""
        return self._spec.public

    @property
    def classes(self) -> list[str]:
        """Names of its classes so far."""
        if self._draft is not None:
            return list(self._draft.classes)
        return list(self._record.classes if self._record else self._spec.classes or ())

    @property
    def shape(self) -> list[int] | None:
        """`[bands, height, width]` of its images; None before the first."""
        return None if self._form is None else list(self._form.shape)

    @property
    def dtype(self) -> np.dtype | None:
        """Of its images; None before the first."""
        return None if self._form is None else np.dtype(self._form.dtype)

    @property
    def count(self) -> dict[str, int]:
        """How many pairs each group has, those that are not saved yet among them."""
        counts = dict(self._fresh().counts) if self._record else {}
        for group, count in self._draft.counts.items() if self._draft else ():
            counts[group] = counts.get(group, 0) + count
        return counts

    @property
    def bbox(self) -> list[float] | None:
        """`[west, south, east, north]` of its images in degrees; None where none is on a map."""
        return None if self._saved.bbox is None else list(self._saved.bbox)

    @property
    def document(self) -> dict[str, Any]:
        """What describes it, for people and programs: `data`, and `links` of the API."""
        return self._fresh().document(self.percent_cached, self._place.address)

    # filling and sharing

    def feed(self, pairs: Iterable[tuple[Any, Any]], group: str = DEFAULT_GROUP) -> None:
        """Take in pairs, one after the other; any number of them takes no memory.

        Args:
            pairs: `(image, label)` each. An image is an array (bands first or last, of any dtype), a
                dask array, a Pillow image, a path, a Document, or a window of a `Raster`. A label is,
                for classification, zeros and ones, a class or several; for object detection, boxes
                `[minx, miny, maxx, maxy]` in pixels by class; for segmentation, GeoJSON features in
                the units of the image's map, or a mask.
            group: that they belong to, any name; with a partition, pairs of `train` are divided.

        Raises:
            DataError: a pair is not like the others; its position is told. Those before it stay.
            ConflictError: there is another collection of this name.
        """
        check_group(group)
        if self._draft is None:
            self._draft = self._new_draft()
        for position, pair in enumerate(pairs):
            try:
                if not isinstance(pair, Sequence) or len(pair) != 2:
                    raise DataError(f'it takes (image, label), not a {type(pair).__name__}')
                self._draft.add(*pair, group)
            except (DataError, ConfigError) as error:
                raise at_position(error, position) from error

    def save(self) -> dict[str, Any]:
        """Save what was fed: all of it, or nothing.

        Returns:
            The document that describes the collection.

        Raises:
            ConflictError: the name is taken, or others gave the collection pairs of other classes.
        """
        store = self._place.store
        if self._record is None:
            record = store.create(self._spec, self._draft, self._key)
        elif self._draft is not None:
            record = store.append(self._record.id, self._draft)
        else:
            record = self._fresh()
        self._take(record)
        if self._draft is not None:
            self._draft.discard()
            self._draft = None
        if self._place.is_cached_when_saved:
            from finetuner.collections.caching import start_caching

            start_caching(store, record, self._place.cache)
        return self.document

    def publish(self) -> dict[str, Any]:
        """Let others find and read it; returns its document."""
        return self._change(public=True)

    def unpublish(self) -> dict[str, Any]:
        """Stop that; returns its document."""
        return self._change(public=False)

    def update(self, name: str | None = None, description: str | None = None) -> None:
        """Change its name or its description, at once where it is saved already.

        Raises:
            ConfigError: one of them is not what it may be.
            ConflictError: the name is taken.
        """
        if self._record is not None:
            self._change(name=name, description=description)
            return
        given = {'name': name, 'description': description}
        new = {key: value for key, value in given.items() if value is not None}
        self._spec = CollectionSpec.checked(**{**asdict(self._spec), **new})

    def remove(self) -> None:
        """Delete it with all its pairs; what was not saved yet, too."""
        if self._record is not None:
            from finetuner.collections.caching import forget_cache

            self._place.store.remove(self._record.id)
            forget_cache(self._place.cache, self._record.key)
            self._record = None
            self._key = new_key()
        if self._draft is not None:
            self._draft.discard()
            self._draft = None

    def release(self, version: str) -> dict[str, Any]:
        """Keep what is saved now as a version that never changes; see `finetuner.collections.releases`.

        Args:
            version: letters, digits and `. _ -`, at most 100, such as `1.0`.

        Returns:
            What is known of it, as `releases` gives it.

        Raises:
            ConfigError: the version has no such name, or the collection is not saved.
            ForbiddenError: the collection is somebody else's.
            ConflictError: there is such a version, or the collection was changed meanwhile.
        """
        return self._place.releases.make(self._fresh(), version)

    def releases(self) -> list[dict[str, Any]]:
        """What is known of its versions, in the order in which they were made."""
        return self._place.releases.list_all(self._fresh())

    def download_release(self, version: str, path: str | os.PathLike[str]) -> Path:
        """Write the archive of a version to a file, or into a directory that is there.

        Raises:
            NotFoundError: there is no such version.
            ArtifactError: its archive is not what it was.
        """
        return self._place.releases.fetch(self._fresh(), version, path)

    def __repr__(self) -> str:
        """Name, kind and counts."""
        return f'TrainingSet({self.name!r}, mltype={self.mltype!r}, id={self.id}, {self.count})'

    # below

    @property
    def _form(self) -> ImageForm | None:
        form = self._record.form or self._fresh().form if self._record else None
        return form or (None if self._draft is None else self._draft.form)

    def _take(self, record: CollectionRecord) -> None:
        super()._take(record)
        self._spec = record.spec

    def _new_draft(self) -> Draft:
        if self._record is None:
            self._place.store.check_name(self.name)
            return Draft(self._place.drafts, self._spec)
        record = self._fresh()
        return Draft(self._place.drafts, self._spec, record.form, record.classes, record.num_pairs)

    def _change(self, **changes: Any) -> dict[str, Any]:
        self._take(self._place.store.change(self._saved.id, **changes))
        return self.document


# the name that the published examples have for it
VedaCollection = TrainingSet


def search(
    text: str = '',
    bbox: Sequence[float] | None = None,
    mltype: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int = 100,
    offset: int = 0,
) -> list[TrainingSet]:
    """Find collections: one's own, and those that others have published.

    Args:
        text: words that name, description or classes must hold; beginnings of words will do.
        bbox: `[west, south, east, north]` in degrees, which the box of their images must touch.
        mltype: what their labels are.
        classes: that they must have, all of them.
        limit: at most so many.
        offset: so many are left out before them.

    Returns:
        The best first where words are asked for, else the newest.

    Raises:
        ConfigError: one of the arguments is not what it may be.
    """
    place = current_place()
    query = Query.checked(text, bbox, mltype, classes, limit, offset)
    return [TrainingSet._opened(place, record) for record in place.store.search(query)]


def _number(collection_id: Any) -> int:
    text = str(collection_id)
    if isinstance(collection_id, bool) or not text.isdecimal():
        raise ConfigError(f'id {collection_id!r}: the id of a collection is a whole number')
    return int(text)
