"""What comes out of the store of collections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from finetuner.collections.geometry import Bounds, Frame
from finetuner.collections.labels import LabelKind, build_label_kind
from finetuner.collections.packs import Place
from finetuner.collections.spec import CollectionSpec
from finetuner.collections.tables import CollectionPairRow, CollectionRow
from finetuner.collections.tiles import ImageForm

EMPTY, BUILDING, COMPLETE = 'EMPTY', 'BUILDING', 'COMPLETE'
_ALL = 100


@dataclass(frozen=True)
class CollectionRecord:
    """A collection as the store had it at one moment; times are ISO strings in UTC."""

    id: int
    key: str
    owner: str
    name: str
    description: str
    mltype: str
    classes: tuple[str, ...]
    has_fixed_classes: bool
    partition: tuple[float, float, float] | None
    tile_size: tuple[int, int]
    form: ImageForm | None
    sensors: tuple[str, ...]
    source: str
    bbox: Bounds | None
    public: bool
    revision: int
    created_at: str
    updated_at: str
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def spec(self) -> CollectionSpec:
        """What it would be made with."""
        return CollectionSpec(
            self.name,
            self.mltype,
            self.tile_size,
            self.classes if self.has_fixed_classes else None,
            self.partition,
            self.description,
            self.public,
        )

    @cached_property
    def kind(self) -> LabelKind:
        """What its labels are."""
        return build_label_kind(self.mltype, self.classes)

    @property
    def num_pairs(self) -> int:
        """Of all groups."""
        return sum(self.counts.values())

    def document(self, percent_cached: int, address: str) -> dict[str, Any]:
        """The document that describes it, for people and programs that ask.

        Args:
            percent_cached: of its pairs, where it is asked for.
            address: of the API that answers its links.
        """
        mine = f'{address}/data/{self.id}'
        data = {
            'id': self.id,
            'key': self.key,
            'classes': list(self.classes),
            'has_fixed_classes': self.has_fixed_classes,
            'count': self.counts,
            'name': self.name,
            'description': self.description,
            'nclasses': len(self.classes),
            'mlType': self.mltype,
            'bbox': None if self.bbox is None else list(self.bbox),
            'tile_size': list(self.tile_size),
            'shape': None if self.form is None else list(self.form.shape),
            'dtype': None if self.form is None else self.form.dtype,
            'partition': None if self.partition is None else list(self.partition),
            'sensors': list(self.sensors),
            'source': self.source,
            'userId': self.owner,
            'public': self.public,
            'created_at': self.created_at,
            'updated_at': self.updated_at,
            'percent_cached': percent_cached if self.num_pairs else 0,
            'status': status_of(self.num_pairs, percent_cached),
            'revision': self.revision,
        }
        links = {
            'self': {'href': mine},
            'update': {'href': mine, 'method': 'PUT'},
            'publish': {'href': f'{mine}/publish', 'method': 'PUT'},
            'delete': {'href': mine, 'method': 'DELETE'},
            'create': {'href': f'{mine}/datapoints', 'method': 'POST'},
        }
        return {'data': data, 'links': links}


@dataclass(frozen=True)
class PairRecord:
    """A pair as the store had it at one moment."""

    id: int
    collection_id: int
    group: str
    place: Place
    encoding: str
    form: ImageForm
    label: bytes
    frame: Frame
    updated_at: str

    def document(self, collection: CollectionRecord) -> dict[str, Any]:
        """What is stored of it, as JSON; the pixels of the image aside."""
        frame, kind = self.frame, collection.kind
        return {
            'id': self.id,
            'dataset_id': self.collection_id,
            'group': self.group,
            'mlType': collection.mltype,
            'classes': list(collection.classes),
            'label': kind.as_json(kind.decode(self.label, frame)),
            'shape': list(self.form.shape),
            'dtype': self.form.dtype,
            'bounds': None if frame.transform is None else list(frame.bounds),
            'transform': None if frame.transform is None else list(frame.transform),
            'crs': frame.crs,
            'updated_at': self.updated_at,
        }


def status_of(num_pairs: int, percent_cached: int) -> str:
    """EMPTY, BUILDING or COMPLETE."""
    if not num_pairs:
        return EMPTY
    return COMPLETE if percent_cached == _ALL else BUILDING


# reads the kept bytes of an image
ReadImage = Callable[[PairRecord], bytes]


def collection_record(row: CollectionRow, counts: dict[str, int]) -> CollectionRecord:
    """The record of a row, read while its session is open."""
    sides = (row.west, row.south, row.east, row.north)
    return CollectionRecord(
        id=row.id,
        key=row.key,
        owner=row.owner,
        name=row.name,
        description=row.description,
        mltype=row.mltype,
        classes=tuple(row.classes),
        has_fixed_classes=row.has_fixed_classes,
        partition=None if row.partition is None else tuple(row.partition),  # type: ignore[arg-type]
        tile_size=(row.shape[1], row.shape[2]),
        form=form_of(row),
        sensors=tuple(row.sensors),
        source=row.source,
        bbox=None if None in sides else sides,  # type: ignore[arg-type]
        public=row.public,
        revision=row.revision,
        created_at=iso(row.created_at),
        updated_at=iso(row.updated_at),
        counts=counts,
    )


def form_of(row: CollectionRow) -> ImageForm | None:
    """What all images of a collection share; None before the first."""
    bands, height, width = row.shape
    return ImageForm((bands, height, width), row.dtype) if row.dtype else None


def pair_record(row: CollectionPairRow, collection: CollectionRow) -> PairRecord:
    """The record of a row, read while its session is open."""
    bands, height, width = collection.shape
    transform = row.transform and tuple(row.transform)
    return PairRecord(
        id=row.id,
        collection_id=row.collection_id,
        group=row.group_name,
        place=Place(row.pack, row.offset, row.num_bytes, row.checksum),
        encoding=row.encoding,
        form=ImageForm((bands, height, width), collection.dtype),
        label=row.label,
        frame=Frame(height, width, transform, row.crs),  # type: ignore[arg-type]
        updated_at=iso(row.updated_at),
    )


def iso(time: datetime) -> str:
    """A time as JSON holds it, such as `2018-08-22T16:46:34.838Z`."""
    return time.isoformat(timespec='milliseconds').replace('+00:00', 'Z')
