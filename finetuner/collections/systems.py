"""Coordinate systems by their names, none of which opens a file or a connection.

GDAL takes an address for a system and fetches it, a path and reads it; PROJ opens whatever file a
definition names as its grid. What comes from outside is looked at first.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from finetuner.excepts import ConfigError, DataError

if TYPE_CHECKING:
    from rasterio.crs import CRS

    from finetuner.collections.geometry import Bounds

_MOST_CHARACTERS = 20_000
# one parses the parts of another; those of real systems go some ten deep
_DEEPEST = 40
_AUTHORITY = r'(?:EPSG|ESRI|OGC|CRS|IGNF|NKG|IAU(?:_\d{4})?)'
_CODE = re.compile(rf'{_AUTHORITY}:[\w.+-]{{1,40}}', re.IGNORECASE | re.ASCII)
_URN = re.compile(r'urn:ogc:def:crs:\w{1,20}:[\w.]{0,20}:[\w.-]{1,40}', re.IGNORECASE | re.ASCII)
_OGC_ADDRESS = re.compile(
    r'https?://www\.opengis\.net/def/crs/(\w{1,20})/[\w.]{1,20}/([\w.-]{1,40})', re.ASCII
)
_NAME = re.compile(r'WGS ?84|WGS ?72|NAD27|NAD83')
_WKT = re.compile(r'[A-Za-z_]{3,40}\s*\[.*\]\s*', re.DOTALL | re.ASCII)
_PROJ = re.compile(r'\+(?:proj|type|ellps|datum|a|units)=.*', re.DOTALL)
_JSON = re.compile(r'\{.*\}\s*', re.DOTALL)
_FORMS = (_CODE, _URN, _NAME, _WKT, _PROJ, _JSON)
# what PROJ opens: grids (but for the one of the name null), catalogues, files of parameters; and
# what is no system but a way from one to another
_GRIDS = r'grids"?\s*[=,:](?!\s*"?@?null(?:["\s]|$))|\binit\s*=|parameterfile'
_OPENS = re.compile(
    rf'{_GRIDS}|\b(?:catalog|model|file)\s*=|parameter_file|\bfile\b|\bpipeline\b', re.IGNORECASE
)
_OPENS_GRIDS = re.compile(_GRIDS, re.IGNORECASE)


def check_system(text: str) -> str:
    """The name or the definition of a coordinate system that opens nothing; it may not be known.

    Args:
        text: such as `EPSG:32613`, an URN, WKT, PROJJSON or a PROJ string.

    Returns:
        What GDAL is told.

    Raises:
        ConfigError: it is none, or one that has a file or an address opened.
    """
    if not isinstance(text, str):
        raise ConfigError(_no_system(text, 'is no coordinate system'))
    is_long = len(text) > _MOST_CHARACTERS
    at_ogc = None if is_long else _OGC_ADDRESS.fullmatch(text)
    if at_ogc is not None:
        return f'{at_ogc[1]}:{at_ogc[2]}'
    if is_long or not any(form.fullmatch(text) for form in _FORMS) or _depth(text) > _DEEPEST:
        raise ConfigError(_no_system(text, 'is no coordinate system'))
    if _OPENS.search(text):
        raise ConfigError(_no_system(text, 'names a file, which is not opened'))
    return text


def system_of(text: str) -> CRS:
    """A coordinate system by its name or definition; see `check_system`.

    Raises:
        ConfigError: there is no such system, or a file would have to be opened.
    """
    from rasterio import Env
    from rasterio.crs import CRS

    from finetuner.collections.raster_formats import gdal_errors

    named = check_system(text)
    errors: tuple[type[Exception], ...] = (ValueError, TypeError, RecursionError, *gdal_errors())
    try:
        with Env():
            return CRS.from_user_input(named)
    except errors as error:
        raise ConfigError(_no_system(text, 'is no coordinate system that is known')) from error


def opens_grids(text: str) -> bool:
    """Whether a text that holds a definition among other things has PROJ open a file."""
    return _OPENS_GRIDS.search(html.unescape(text)) is not None


def moved_bounds(bounds: Bounds, source: str, target: str, densify: int = 21) -> Bounds:
    """A box in another coordinate system.

    Args:
        bounds: `(minx, miny, maxx, maxy)`.
        source: the system that they are in.
        target: the one that they are brought into.
        densify: points between two corners that are looked at as well.

    Returns:
        `(minx, miny, maxx, maxy)`; in degrees minx > maxx where it lies across the 180th meridian.

    Raises:
        ConfigError: one of them is no system.
        DataError: the box is nowhere in the other one.
    """
    from rasterio import Env
    from rasterio.warp import transform_bounds

    from finetuner.collections.raster_formats import gdal_errors

    known, wanted = system_of(source), system_of(target)
    errors: tuple[type[Exception], ...] = (ValueError, *gdal_errors())
    try:
        with Env():
            found = transform_bounds(known, wanted, *bounds, densify_pts=densify)
    except errors as error:
        raise DataError(f'{list(bounds)} cannot be placed in {target[:80]!r}: {error}') from error
    minx, miny, maxx, maxy = found
    return minx, miny, maxx, maxy


def united_longitudes(arcs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The shortest stretch of longitudes that holds several.

    Args:
        arcs: of each the western and the eastern end, -180 to 180; west > east where it lies across
            the 180th meridian. One at least.

    Returns:
        Its western and its eastern end, likewise; of two as short the one not across the meridian.
    """
    spans = [(west, (east - west) % 360 if east < west else east - west) for west, east in arcs]

    def reach(start: float) -> tuple[float, bool, float]:
        length = max((west - start) % 360 + width for west, width in spans)
        return length, start + length > 180, start

    length, is_across, west = min(reach(west) for west, _ in spans)
    if length >= 360:
        return -180.0, 180.0
    return west, west + length - 360 * is_across


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in re.findall(r'[\[\]{}]', text):
        depth += 1 if letter in '[{' else -1
        deepest = max(deepest, depth)
    return deepest


def _no_system(text: Any, what: str) -> str:
    return f"crs={str(text)[:80]!r} {what}: give a code such as 'EPSG:4326', or WKT"
