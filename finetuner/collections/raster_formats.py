"""Which rasters are opened, and what they say of themselves.

GDAL opens addresses as gladly as files, and files that name addresses: a VRT or the description of
a map server fetches when it is read. Here a raster is a local file in a format that keeps its
pixels in itself, or in a file beside it of its own name; no other format is ever tried. What GDAL
would look for beyond the pixels (masks, overviews, the list of files) is never asked for, since the
file may say that it is anywhere.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetuner.collections.geometry import Transform
from finetuner.collections.raster_containers import check_container
from finetuner.collections.systems import opens_grids
from finetuner.excepts import DataError

# GDAL's names. Left out is each format whose files name others (VRT, WMS, MRF, ERS, PDS, PCIDSK),
# that looks for any format in what it holds (GRIB: a VRT in place of a JPEG 2000 is read), or that
# runs SQL of the file (GPKG, MBTiles: SQL can geocode).
FORMATS = (
    *('GTiff', 'JP2OpenJPEG', 'NITF', 'HFA', 'PNG', 'JPEG', 'WEBP', 'GIF', 'BIGGIF', 'BMP', 'TGA'),
    *('PNM', 'SGI', 'XPM', 'ENVI', 'EHdr', 'ISCE', 'GenBin', 'AAIGrid', 'GRASSASCIIGrid', 'ISG'),
    *('XYZ', 'ZMap', 'GXF', 'GSAG', 'GSBG', 'GS7BG', 'SAGA', 'RST', 'PCRaster', 'RRASTER'),
    *('ROI_PAC', 'DTED', 'SRTMHGT', 'USGSDEM', 'BT', 'HF2', 'SIGDEM', 'Terragen', 'Leveller'),
    *('NWT_GRD', 'NWT_GRC', 'GTX', 'NTv2', 'LOSLAS', 'CTable2', 'BYN', 'NGSGEOID', 'NOAA_B'),
    *('KRO', 'LAN', 'LCP', 'FIT', 'VICAR', 'IRIS'),
)
# tried after those, on files that `check_container` lets pass
CONTAINERS = ('netCDF', 'BAG', 'S102', 'S104', 'S111', 'HDF5')

# where GDAL looks for a coordinate system
_BESIDE = tuple(
    each
    for suffix in ('.aux.xml', '.prj', '.hdr', '.xml', '.ref', '.rdc')
    for each in (suffix, suffix.upper())
)
_MOST_BESIDE = 64 << 20

_OPENING = {
    # nothing opened here is on a network; this says so to GDAL too
    'CPL_VSIL_CURL_ALLOWED_EXTENSIONS': '.none',
    # else it makes up the pixels of a PNG that ends early
    'GDAL_PNG_WHOLE_IMAGE_OPTIM': 'NO',
}
_READING = {
    'PNG': {'GDAL_PNG_WHOLE_IMAGE_OPTIM': 'NO'},
    # else it takes the grey that libjpeg puts in place of what it cannot read
    'JPEG': {'GDAL_ERROR_ON_LIBJPEG_WARNING': 'YES'},
}


@dataclass(frozen=True)
class RasterHeader:
    """What a raster says of itself.

    Attributes:
        height: pixels.
        width: pixels.
        dtypes: of each band, by numpy's names.
        nodata: of each band the value of pixels that are none, where it has one.
        transform: from (column, row) to the map, see `Frame`; None where the file has none.
        crs: `EPSG:n` where that says it all, else WKT; None where the file has none.
        sensors: that took it, where the file says so.
    """

    height: int
    width: int
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    transform: Transform | None
    crs: str | None
    sensors: tuple[str, ...]


def _read_in_one_thread() -> None:
    # GDAL's threads stayed with the parent: a child that waited for them would wait forever.
    _OPENING['GDAL_NUM_THREADS'] = '1'


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_read_in_one_thread)


def local_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of a local file.

    Raises:
        DataError: it is no path, or one that GDAL takes for something else.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or '\0' in text:
        raise DataError(f'path {path!r} is none: give the path of a local file')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'path {text!r} is no UTF-8, as GDAL needs it: rename the file') from error
    full = os.path.abspath(os.path.expanduser(text))
    # below /vsi GDAL has its own files, many of them on a network
    if full.startswith('/vsi') or (not os.path.exists(full) and ':' in text):
        raise DataError(
            f'{text!r} is no local file: addresses, archives and parts of files are not opened; '
            'download or extract it first and give the path'
        )
    return full


def options_of(dataset: Any) -> AbstractContextManager[Any]:
    """What GDAL needs to be told while it reads pixels of a dataset."""
    options = _READING.get(dataset.driver)
    # Where there is nothing to tell, telling it takes as long as reading a few pixels.
    return _options(options) if options else nullcontext()


def _options(options: dict[str, str]) -> AbstractContextManager[Any]:
    from rasterio import Env
    from rasterio.session import DummySession

    return Env(DummySession(), **options)


def gdal_errors() -> tuple[type[Exception], ...]:
    """What rasterio raises where GDAL cannot do what it is asked to."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import CRSError, RasterioError

    return CPLE_BaseError, CRSError, RasterioError


def open_dataset(path: str) -> Any:
    """The rasterio dataset of a file.

    Args:
        path: what `local_path` returned.

    Raises:
        DataError: it is no raster that is read here.
    """
    from rasterio.io import DatasetReader

    _check_beside(Path(path))
    # Its frame says so. The warning names this module: whoever uses rasterio still gets theirs.
    module = __name__.replace('.', r'\.')
    warnings.filterwarnings('ignore', 'Dataset has no geotransform', module=module)
    with _options(_OPENING):
        # `rasterio.open` takes one driver only
        try:
            return DatasetReader(Path(path), driver=list(FORMATS), sharing=False)
        except gdal_errors() as error:
            reason = error
        check_container(path)
        try:
            return DatasetReader(Path(path), driver=list(CONTAINERS), sharing=False)
        except gdal_errors() as error:
            name, stem = Path(path).name, Path(path).stem
            raise DataError(
                f'{path!r} is no raster that is read here, or is damaged: {reason}. Files that '
                'only say where pixels are (VRT, WMS, tile indexes), GRIB and databases are not '
                f'opened: `gdal_translate -of GTiff {name} {stem}.tif` makes a GeoTIFF'
            ) from error


def _check_beside(path: Path) -> None:
    """Refuse a coordinate system in a file beside it for which PROJ would open yet another one."""
    for name in dict.fromkeys((path.name, path.stem)):
        for suffix in _BESIDE:
            beside = path.with_name(name + suffix)
            if not beside.is_file():
                continue
            with beside.open('rb') as file:
                text = file.read(_MOST_BESIDE).decode('latin-1')
            if opens_grids(text):
                raise DataError(
                    f'{str(path)!r} is not opened: the coordinate system in {beside.name!r} beside it '
                    'names a file'
                )


def header_of(dataset: Any, path: str) -> RasterHeader:
    """What an open raster says of itself.

    Raises:
        DataError: that cannot be read, or the file is too short for it.
    """
    if dataset.driver == 'ENVI':
        _check_size(dataset, path)
    transform = None if dataset.transform.is_identity else tuple(dataset.transform)[:6]
    # without a transform nothing is anywhere, so that the system says nothing either
    crs = dataset.crs if transform is not None else None
    try:
        with _options(_OPENING):
            return RasterHeader(
                height=dataset.height,
                width=dataset.width,
                dtypes=tuple(dataset.dtypes),
                nodata=tuple(dataset.nodatavals),
                transform=transform,
                crs=_name_of(crs) if crs else None,
                sensors=_sensors_of(dataset),
            )
    except (ValueError, KeyError) as error:
        raise DataError(f'what {path!r} says of itself cannot be read: {error}') from error


def _check_size(dataset: Any, path: str) -> None:
    """Refuse a raw file that ends early, the rest of which GDAL gives as zeros."""
    tags = dataset.tags(ns='ENVI')
    if tags.get('file_compression', '0') != '0':
        return
    num_bytes = sum(np.dtype(dtype).itemsize for dtype in dataset.dtypes)
    num_bytes = num_bytes * dataset.height * dataset.width + int(tags.get('header_offset', 0))
    if os.path.getsize(path) < num_bytes:
        raise DataError(
            f'{path!r} is damaged or incomplete: it has {os.path.getsize(path):,} bytes, and its '
            f'header says {num_bytes:,}'
        )


def _name_of(crs: Any) -> str:
    """`EPSG:n` where that is the same system, else WKT."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    code = crs.to_epsg()
    try:
        is_it = code is not None and CRS.from_epsg(code) == crs
    except CRSError:
        is_it = False
    return f'EPSG:{code}' if is_it else crs.to_wkt()


def _sensors_of(dataset: Any) -> tuple[str, ...]:
    """From the vendor's files beside it (GDAL's domain IMAGERY), or from its tag SENSOR."""
    for name in (dataset.tags(ns='IMAGERY').get('SATELLITEID'), dataset.tags().get('SENSOR')):
        if name and name.strip():
            return (name.strip(),)
    return ()
