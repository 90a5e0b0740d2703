"""Open and resize pictures: the one place that does, for training, evaluation and serving.

An embedding must not depend on which way a picture took to the model, so every picture, whatever
its source, leaves here as `[size, size, 3]` uint8 RGB, made in the same way:

- The format is read from the header and must be one of `PicturePolicy.formats`; the number of
  pixels is checked before anything is decoded. Of animations only the first frame is seen.
- JPEG is decoded at the smallest of libjpeg's scales that still covers `size`, still WebP by
  OpenCV, everything else (other formats, CMYK, 16 bits, palettes, transparency) by Pillow.
- Orientation notes (EXIF) are obeyed, transparency is laid on white, grey becomes RGB, 16 bits
  become 8 by their high byte, colour profiles are ignored.
- The whole picture is resized to a square, without cropping and without keeping its proportions:
  averaging areas where it shrinks (`INTER_AREA`), bilinear where it grows.
- Data that ends early is an error, never half a picture.
"""

import io
import os
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image

from finetuner.excepts import PictureError
from finetuner.uris import DEFAULT_POLICY, PicturePolicy, read_uri, too_many_bytes

if TYPE_CHECKING:
    from docarray import Document

__all__ = [
    'PicturePolicy',
    'fit_picture',
    'load_picture',
    'open_picture',
    'picture_of',
    'read_uri',
    'resize_pixels',
]

# Each goes through all pixels again. Encoders make ten of them; a hundred thousand fit into a file.
_MAX_SCANS = 50
_START_OF_SCAN = b'\xff\xda'
_END_OF_IMAGE = 0xD9
# TEM, and the start of an image: no length follows, so what comes next is not to be stepped over
_WITHOUT_LENGTH = (0x01, 0xD8)
# larger than any JPEG: it is then not decoded at a smaller scale
_FULL_SIZE = 1 << 16
# what follows a scan: a marker that is neither a stuffed byte, nor a restart, nor filling
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')

# Pillow warns once for each odd TIFF or EXIF entry. What matters of it comes back as an error.
warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.TiffImagePlugin')


def picture_of(
    doc: 'Document',
    size: int,
    position: int | str | None = None,
    policy: PicturePolicy = DEFAULT_POLICY,
) -> np.ndarray:
    """Load the picture of a Document from its tensor, its blob or its uri, in this order.

    Args:
        doc: Document with a picture as its content.
        size: height and width of the result, in pixels.
        position: place of the Document in its array, or what errors call it.
        policy: what may be opened.

    Returns:
        `[size, size, 3]` uint8, RGB.

    Raises:
        PictureError: the Document holds no picture, or one that cannot be opened; says why.
    """
    name = position if isinstance(position, str) else 'Document'
    if isinstance(position, int):
        name = f'Document {position}'
    if doc.tensor is not None:
        source: Any = doc.tensor
    elif doc.blob is not None and len(doc.blob):
        source = doc.blob
    elif doc.uri:
        source = doc.uri
    elif doc.text:
        raise PictureError(
            f'{name} holds text ({doc.text[:40]!r}), not a picture: give it a tensor, a blob or '
            'a uri, or choose a text model'
        )
    else:
        raise PictureError(f'{name} is empty: it has no tensor, no blob and no uri')
    try:
        return load_picture(source, size, policy)
    except PictureError as error:
        if source is doc.uri and source[:200] not in str(error):
            # errors of reading name the file, those of decoding know of none
            name = f'{name} ({source[:200]})'
        raise PictureError(f'{name}: {error}') from error


def load_picture(
    source: Any,
    size: int,
    policy: PicturePolicy = DEFAULT_POLICY,
) -> np.ndarray:
    """Open a picture and resize the whole of it to a square, as the module says.

    Args:
        source: a path or URI (`file:`, `http:`, `https:`, `data:`) as str or Path; an encoded
            picture as bytes; a Pillow image; or an array (NumPy or torch) `[H, W, 3]`, `[H, W]`,
            `[H, W, 1]`, `[H, W, 4]` or with the channels first, holding integers in 0..255 or
            floats in 0..1. An array that could be both is taken as channels last.
        size: height and width of the result, in pixels.
        policy: what may be opened.

    Returns:
        `[size, size, 3]` uint8, RGB, contiguous and owned by the caller.

    Raises:
        PictureError: the picture cannot be opened or is not allowed; says why.
        ValueError: size is not a positive integer.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f'size={size!r} is not a positive number of pixels')
    if isinstance(source, str | os.PathLike):
        source = read_uri(source, policy)
    if isinstance(source, bytes | bytearray | memoryview):
        pixels, orientation = _decode(bytes(source), int(size), policy)
    elif isinstance(source, Image.Image):
        pixels, orientation = _from_pillow(source)
    elif hasattr(source, '__array__'):
        pixels, orientation = _from_array(source), 1
    else:
        raise PictureError(
            f'a {type(source).__name__} is not a picture: give a path, a URI, bytes, an array or '
            'a Pillow image'
        )
    # Always a copy: a picture of the right size already would else share its source's memory.
    return np.array(_upright(_resize(pixels, int(size)), orientation), order='C')


def open_picture(data: bytes, policy: PicturePolicy = DEFAULT_POLICY) -> np.ndarray:
    """Open an encoded picture at the size it has.

    Args:
        data: the file's bytes.
        policy: what may be opened.

    Returns:
        `[H, W, 3]` uint8, RGB, upright.

    Raises:
        PictureError: the picture cannot be opened or is not allowed; says why.
    """
    return np.ascontiguousarray(_upright(*_decode(data, _FULL_SIZE, policy)))


def fit_picture(data: bytes, most: int, policy: PicturePolicy = DEFAULT_POLICY) -> np.ndarray:
    """Open an encoded picture to look at, in its proportions.

    Args:
        data: the file's bytes.
        most: the longer side of the result in pixels; a smaller picture stays as it is.
        policy: what may be opened.

    Returns:
        `[H, W, 3]` uint8, RGB, upright.

    Raises:
        PictureError: the picture cannot be opened or is not allowed; says why.
    """
    pixels = _upright(*_decode(data, most, policy))
    height, width = pixels.shape[:2]
    scale = min(1.0, most / max(height, width))
    sides = max(1, round(height * scale)), max(1, round(width * scale))
    return np.ascontiguousarray(resize_pixels(pixels, *sides))


def _decode(data: bytes, size: int, policy: PicturePolicy) -> tuple[np.ndarray, int]:
    """Decode to `[H, W, 3]` uint8 of at least `size` where the file has that; and orientation."""
    if not data:
        raise PictureError('the picture is empty (0 bytes)')
    if len(data) > policy.max_bytes:
        raise too_many_bytes('the picture', policy)
    image = _open(data, policy)
    width, height = image.size
    if width * height > policy.max_pixels:
        raise PictureError(
            f'the picture has {width} x {height} = {width * height:,} pixels, more than the '
            f'{policy.max_pixels:,} allowed: make it smaller'
        )
    is_jpeg = image.format in ('JPEG', 'MPO')
    if is_jpeg and _num_scans(data) > _MAX_SCANS:
        raise PictureError(
            f'the picture is a JPEG of more than {_MAX_SCANS} scans, which takes far longer to '
            'decode than any needs: save it anew'
        )
    if is_jpeg and image.mode in ('L', 'RGB'):
        pixels = _decode_jpeg(data, size)
        if pixels is not None:
            return pixels, _orientation(image)
    if image.format == 'WEBP' and image.mode == 'RGB' and not getattr(image, 'is_animated', False):
        return _decode_webp(data), _orientation(image)
    return _from_pillow(image)


def _guarded(action: Callable[[], Any]) -> Any:
    """Call into a decoder; whatever it raises over hostile data means: cannot be opened."""
    try:
        return action()
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PictureError(f'the picture cannot be opened: {reason}') from error


def _open(data: bytes, policy: PicturePolicy) -> Image.Image:
    def identify() -> Image.Image | None:
        try:
            # MPO is how Pillow calls a JPEG with a second picture behind it, as phones make.
            return Image.open(io.BytesIO(data), formats=policy.formats)
        except Image.UnidentifiedImageError:
            return None
        except Image.DecompressionBombError as error:
            # Pillow's own limit, for all of the process, comes first where ours is far below it
            raise ValueError(
                f'it has more pixels than the {policy.max_pixels:,} allowed: make it smaller'
            ) from error

    image = _guarded(identify)
    if image is not None:
        return image
    try:
        found = Image.open(io.BytesIO(data)).format
    except Exception:  # noqa: BLE001  only to name the format; the refusal below stands anyway
        found = None
    if found and found not in policy.formats:
        raise PictureError(
            f'the picture cannot be opened: format {found} is not one of '
            f'{", ".join(policy.formats)}'
        )
    raise PictureError(
        f'not a picture, or too damaged to be one: its {len(data):,} bytes start with {data[:16]!r}'
    )


def _num_scans(data: bytes) -> int:
    """How many scans a JPEG has; those of pictures inside its notes do not count."""
    if data.count(_START_OF_SCAN) <= _MAX_SCANS:
        return 0
    found = 0
    # decoders, too, pass over what is no marker
    marker = _MARKER.search(data, 2)
    while marker and data[marker.start() + 1] != _END_OF_IMAGE:
        at = marker.start()
        found += data[at : at + 2] == _START_OF_SCAN
        bare = data[at + 1] in _WITHOUT_LENGTH
        length = 0 if bare else int.from_bytes(data[at + 2 : at + 4], 'big')
        marker = _MARKER.search(data, at + 2 + length)
    return found


def _decode_jpeg(data: bytes, size: int) -> np.ndarray | None:
    """Decode at the smallest scale that covers `size`; `None` where Pillow had better look."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, colorspace='RGB', min_height=size, min_width=size)
    except ValueError as error:
        # Strict decoding also stops at harmless oddities, which Pillow takes, but Pillow does not
        # notice every early end.
        if 'premature end' in str(error).lower():
            raise PictureError(f'the picture cannot be opened: {error}') from error
        return None


def _decode_webp(data: bytes) -> np.ndarray:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = _guarded(lambda: cv2.imdecode(np.frombuffer(data, np.uint8), flags))
    if pixels is None:
        raise PictureError('the picture cannot be opened: its WebP data is damaged or ends early')
    return pixels


def _from_pillow(image: Image.Image) -> tuple[np.ndarray, int]:
    def convert() -> np.ndarray:
        image.load()
        if image.mode.startswith('I;16'):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.stack([grey] * 3, axis=-1)
        if image.mode in ('I', 'F'):
            raise ValueError(f'mode {image.mode} (32 bits a channel) has no fixed range')
        if image.has_transparency_data:
            colours = image.convert('RGBA')
            white = Image.new('RGBA', colours.size, 'white')
            return np.asarray(Image.alpha_composite(white, colours).convert('RGB'))
        return np.asarray(image.convert('RGB'))

    pixels = _guarded(convert)
    if 0 in pixels.shape:
        raise PictureError(f'the picture is empty ({image.width} x {image.height} pixels)')
    return pixels, _orientation(image)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  damaged notes do not make the picture unreadable
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def resize_pixels(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize without cropping: averaging areas where it shrinks, bilinear where it grows.

    Args:
        pixels: `[H, W]` or `[H, W, bands]` of uint8, uint16, int16, float32 or float64.
        height: of the result.
        width: of the result.
    """
    import cv2

    # INTER_AREA averages only if both sides shrink: so shrink what is too long, then enlarge.
    smaller = (min(pixels.shape[1], width), min(pixels.shape[0], height))
    if smaller != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    return resize_pixels(pixels, size, size)


def _from_array(source: Any) -> np.ndarray:
    try:
        # a tensor of torch that learns is a picture like any other
        array = np.asarray(source.detach() if hasattr(source, 'detach') else source)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition('. ')[0]
        raise PictureError(f'a {type(source).__name__} is not a picture: {reason}') from error
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise PictureError(
            f'an array of shape {list(np.shape(source))} is not a picture: [H, W, 3], [H, W], '
            '[H, W, 1], [H, W, 4] and [3, H, W] are'
        )
    if array.dtype != np.uint8:
        array = _to_bytes(array)
    if array.shape[2] == 4:
        return _from_pillow(Image.fromarray(np.ascontiguousarray(array), 'RGBA'))[0]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    floats = np.issubdtype(array.dtype, np.floating)
    if not floats and not np.issubdtype(array.dtype, np.integer):
        raise PictureError(f'an array of {array.dtype} is not a picture: integers or floats are')
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= (1 if floats else 255)):
        raise PictureError(
            f'an array of {array.dtype} with values from {low:.6g} to {high:.6g} is not a '
            'picture: integers are in 0..255, floats in 0..1'
        )
    return np.rint(array * 255.0).astype(np.uint8) if floats else array.astype(np.uint8)
