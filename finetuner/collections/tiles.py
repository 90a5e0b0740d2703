"""Images as people feed them - arrays, pictures, windows of rasters - read into one form and checked."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from finetuner.collections.geometry import Frame
from finetuner.excepts import ConfigError, DataError, PictureError
from finetuner.images import PicturePolicy, open_picture, read_uri
from finetuner.uris import DEFAULT_POLICY

if TYPE_CHECKING:
    pass

# how the bytes of an image are to be read: as numbers, or as the picture that was given
RAW, PICTURE = 'raw', 'picture'
_KINDS = 'biuf'
RASTER_SUFFIXES = ('.tif', '.tiff', '.jp2', '.img', '.nc', '.hgt')
_MOST_BANDS = 1024
# pixels of a picture whose size is told where it is not that of its collection
_ALWAYS_DECODED = 4_000_000
# as many as a picture's file may hold
MOST_PIXELS = DEFAULT_POLICY.max_pixels
_EXPECTED = (
    'an image is an array [bands, height, width] or [height, width, bands], a dask array, a Pillow '
    'image, the path or the bytes of a picture, a Document, or a window of a Raster'
)


@runtime_checkable
class RasterLike(Protocol):
    """What lies on a map and is read when asked: a window of a `Raster`."""

    frame: Frame

    def read(self) -> np.ndarray:
        """The pixels, `[bands, height, width]`."""
        ...


@dataclass(frozen=True)
class PlacedImage:
    """Pixels that were read already, and where on a map they lie.

    Attributes:
        pixels: `[bands, height, width]`.
        frame: of them.
        sensors: that took them.
    """

    pixels: np.ndarray
    frame: Frame
    sensors: tuple[str, ...] = ()

    def read(self) -> np.ndarray:
        """The pixels."""
        return self.pixels


@dataclass(frozen=True)
class ImageForm:
    """What all images of a collection share.

    Attributes:
        shape: bands, height, width.
        dtype: NumPy's name of it, such as `uint8`.
    """

    shape: tuple[int, int, int]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the pixels of an image."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Tile:
    """An image that was read.

    Attributes:
        data: its bytes, as they are kept.
        encoding: `RAW` or `PICTURE`.
        form: of its pixels.
        frame: where it lies.
        source: what it came as: `array`, `picture` or `raster`.
        sensors: that took it, where that is known.
    """

    data: bytes
    encoding: str
    form: ImageForm
    frame: Frame
    source: str
    sensors: tuple[str, ...] = ()

    @property
    def checksum(self) -> int:
        """CRC-32 of the bytes."""
        return zlib.crc32(self.data)


def read_tile(image: Any, tile_size: Sequence[int], policy: PicturePolicy = DEFAULT_POLICY) -> Tile:
    """Read an image that is to be fed.

    Args:
        image: see the error message.
        tile_size: height and width that it must have.
        policy: what may be opened.

    Raises:
        DataError: it is no image, or of another size.
        PictureError: it cannot be opened; says why.
    """
    height, width = tile_size
    if isinstance(image, RasterLike):
        pixels = _pixels_of(image.read(), height, width)
        sensors = tuple(getattr(image, 'sensors', ()))
        return _raw(pixels, image.frame, 'raster', sensors)
    image = _content_of(image)
    if isinstance(image, str | os.PathLike):
        if os.fspath(image).lower().endswith(RASTER_SUFFIXES):
            return _read_raster(image, tile_size)
        image = read_uri(image, policy)
    if isinstance(image, bytes | bytearray | memoryview):
        return _read_picture(bytes(image), height, width, policy)
    frame = Frame(height, width)
    if _is_pillow(image):
        return _raw(_pixels_of(_of_pillow(image), height, width), frame, 'picture')
    if hasattr(image, 'compute'):
        image = image.compute()
    if hasattr(image, 'detach'):
        image = image.detach()
    if not hasattr(image, '__array__'):
        raise DataError(f'{_EXPECTED}: not a {type(image).__name__}')
    return _raw(_pixels_of(np.asarray(image), height, width), frame, 'array')


def pixels_of(data: bytes, encoding: str, form: ImageForm) -> np.ndarray:
    """The pixels of kept bytes.

    Args:
        data: as a `Tile` holds them.
        encoding: `RAW` or `PICTURE`.
        form: of the image.

    Returns:
        `[bands, height, width]`, owned by the caller.

    Raises:
        DataError: the bytes are damaged.
    """
    if encoding == PICTURE:
        # it was let in once
        pixels = open_picture(data, PicturePolicy(max_bytes=max(1, len(data))))
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        if pixels.shape != form.shape:
            raise DataError(f'a kept picture is {list(pixels.shape)}, not {list(form.shape)}')
        return pixels
    if len(data) != form.num_bytes:
        raise DataError(f'a kept image has {len(data):,} bytes, not {form.num_bytes:,}')
    return np.frombuffer(data, np.dtype(form.dtype).newbyteorder('<')).reshape(form.shape).copy()


def check_tile_size(tile_size: Any) -> tuple[int, int]:
    """Height and width of the images of a collection; ConfigError for what is none."""
    values = tile_size.tolist() if isinstance(tile_size, np.ndarray) else tile_size
    is_pair = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 2
    if is_pair and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        height, width = values
        if all(1 <= value <= MOST_PIXELS and value == int(value) for value in values):
            if height * width <= MOST_PIXELS:
                return int(height), int(width)
            raise ConfigError(
                f'tile_size={list(values)}: an image has {MOST_PIXELS:,} pixels at most'
            )
    raise ConfigError(
        f'tile_size={str(tile_size)[:80]}: it takes [height, width] of the images in pixels, such as '
        '[256, 256]'
    )


def _content_of(image: Any) -> Any:
    """What a Document holds; anything else as it is."""
    from docarray import Document

    if not isinstance(image, Document):
        return image
    if image.tensor is not None:
        return image.tensor
    if image.blob is not None and len(image.blob):
        return image.blob
    if image.uri:
        return image.uri
    raise DataError('the Document holds no image: it has no tensor, no blob and no uri')


def _is_pillow(image: Any) -> bool:
    from PIL import Image

    return isinstance(image, Image.Image)


def _of_pillow(image: Any) -> np.ndarray:
    # bands that a picture does not have are not made up; palettes and the like become colours
    if image.mode not in ('L', 'RGB', 'RGBA', 'LA', 'I;16', 'I', 'F', '1'):
        image = image.convert('RGB')
    try:
        return np.asarray(image)
    except (OSError, ValueError) as error:
        raise PictureError(f'the picture cannot be opened: {error}') from error


def _read_picture(data: bytes, height: int, width: int, policy: PicturePolicy) -> Tile:
    pixels = open_picture(data, _policy_for(height * width, policy))
    if pixels.shape[:2] != (height, width):
        raise DataError(
            f'the picture is {pixels.shape[0]} x {pixels.shape[1]} pixels, and the images of this '
            f'collection {height} x {width}: resize it, or give the collection its tile_size'
        )
    form = ImageForm((pixels.shape[2], height, width), 'uint8')
    return Tile(data, PICTURE, form, Frame(height, width), 'picture')


def _policy_for(num_pixels: int, policy: PicturePolicy) -> PicturePolicy:
    """What is far too large for a collection is not even decoded; what is a little so, is told of."""
    return replace(policy, max_pixels=min(policy.max_pixels, 4 * num_pixels + _ALWAYS_DECODED))


def _read_raster(path: Any, tile_size: Sequence[int]) -> Tile:
    from finetuner.collections.raster import Raster

    with Raster(path) as raster:
        _, height, width = raster.shape
        return read_tile(raster.window(0, 0, height, width), tile_size)


def _pixels_of(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """`[bands, height, width]`, in native byte order and in one piece."""
    if array.dtype.kind not in _KINDS:
        raise DataError(f'an image of {array.dtype} cannot be kept: whole numbers and floats can')
    if array.ndim == 2:
        array = array[None]
    is_last = array.ndim == 3 and array.shape[:2] == (height, width)
    if is_last and array.shape[1:] != (height, width):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[1:] != (height, width):
        raise DataError(
            f'the image is {list(array.shape)}: this collection takes [bands, {height}, {width}], '
            f'[{height}, {width}, bands] or [{height}, {width}], its tile_size'
        )
    if not 1 <= len(array) <= _MOST_BANDS:
        raise DataError(f'the image has {len(array)} bands: 1 to {_MOST_BANDS} are taken')
    dtype = np.dtype(np.uint8) if array.dtype.kind == 'b' else array.dtype.newbyteorder('=')
    return np.ascontiguousarray(array, dtype)


def _raw(pixels: np.ndarray, frame: Frame, source: str, sensors: tuple[str, ...] = ()) -> Tile:
    bands, height, width = pixels.shape
    form = ImageForm((bands, height, width), pixels.dtype.name)
    if (frame.height, frame.width) != (height, width):
        raise DataError(f'the image is {height} x {width} pixels, its frame is not: {frame}')
    little = pixels.astype(pixels.dtype.newbyteorder('<'), copy=False)
    return Tile(little.tobytes(), RAW, form, frame, source, sensors)
