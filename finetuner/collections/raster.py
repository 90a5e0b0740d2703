"""Windows of large rasters, read when they are asked for."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.collections.geometry import FARTHEST, Bounds, Frame
from finetuner.collections.raster_files import RasterFile
from finetuner.collections.systems import check_system, moved_bounds
from finetuner.excepts import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    import dask.array
    from affine import Affine
    from numpy.typing import DTypeLike

_ORDERS = ('random', 'grid')


class _Placed:
    """What a raster and its windows have in common: pixels with a place on a map."""

    frame: Frame

    @property
    def crs(self) -> str | None:
        """The coordinate system, `EPSG:n` where that says it all, else WKT; None without one."""
        return self.frame.crs

    @property
    def transform(self) -> Affine | None:
        """From (column, row) to projected units; None where the frame has none."""
        from affine import Affine

        return None if self.frame.transform is None else Affine(*self.frame.transform)

    @property
    def bounds(self) -> Bounds:
        """`(minx, miny, maxx, maxy)` of all four corners, in projected units."""
        return self.frame.bounds

    def bounds_as(self, crs: str) -> Bounds | None:
        """The bounds in another coordinate system.

        Points between the corners are looked at as well, since a straight side may be bent there.

        Args:
            crs: such as `'EPSG:4326'` (then longitudes and latitudes, in this order), or WKT.

        Returns:
            `(minx, miny, maxx, maxy)`; in degrees minx > maxx where it lies across the 180th
            meridian. None where the raster has no coordinate system.

        Raises:
            ConfigError: `crs` is no coordinate system.
            DataError: the bounds are nowhere in that system.
        """
        if self.crs is None:
            return None
        check_system(crs)
        if max(map(abs, self.bounds)) > FARTHEST:
            raise DataError(f'{self!r} cannot be placed in {crs!r}: it lies nowhere on this earth')
        try:
            found = moved_bounds(self.bounds, self.crs, crs)
        except DataError as error:
            raise DataError(f'{self!r} cannot be placed in {crs!r}: {error}') from error
        if not np.isfinite(found).all():
            raise DataError(f'{self!r} cannot be placed in {crs!r}: it is out of its range')
        return found


class Raster(_Placed):
    """A GeoTIFF, or another raster that GDAL reads from a file; parts of it are read when needed.

    Threads may share one; a process that was forked, or to which it was pickled, opens the file
    anew. Pixels are given as they are: none is masked, scaled or taken for missing.

    A raster without a transform is on no map, though it may have ground control points or RPCs: its
    `transform` and `crs` are None and its bounds are pixels, until `gdalwarp` has put it on one. A
    rotated one is read row by row as it lies in the file, and its transform says how it is turned.

    Attributes:
        path: of the file, absolute.
        bands: numbers of the bands that are read, from 1, in their order.
        shape: `(bands, height, width)`.
        dtype: of the pixels, native byte order.
        frame: where it lies.
        nodata: value of the pixels that are none; None where the bands have none, or not the same.
        sensors: that took it: what its vendor's files say (GDAL's `SATELLITEID`), or its tag
            `SENSOR`; none where neither is there.
    """

    def __init__(self, path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> None:
        """Open a raster; no pixel is read.

        Args:
            path: of a local file. Addresses, GDAL's virtual files, and formats that point at pixels
                elsewhere are refused, since reading them would fetch what nobody named.
            bands: numbers of those to read, from 1; all by default.

        Raises:
            DataError: there is no such file, it is no raster that is read here, or its pixels are
                complex.
            ConfigError: there is no such band, or the bands are of different dtypes.
        """
        self._file = RasterFile(path)
        header = self._file.header
        try:
            self.path = Path(self._file.path)
            self.bands = _chosen_bands(bands, len(header.dtypes), self._file.path)
            self.dtype = _dtype_of(self.bands, header.dtypes, self._file.path)
            self.shape = (len(self.bands), header.height, header.width)
            self.frame = _frame_of(self._file)
        except (ConfigError, DataError):
            self._file.close()
            raise
        values = [header.nodata[band - 1] for band in self.bands]
        # nan is not equal to itself, but it is the same value here
        self.nodata = values[0] if len(set(map(str, values))) == 1 else None
        self.sensors = list(header.sensors)

    def window(self, column: int, row: int, height: int, width: int) -> RasterWindow:
        """A part of the raster; its pixels are read when they are asked for.

        Args:
            column: of its left edge, from 0.
            row: of its upper edge, from 0.
            height: pixels.
            width: pixels.

        Raises:
            ConfigError: it is not wholly within the raster.
        """
        column, row = _whole('column', column, 0), _whole('row', row, 0)
        height, width = _whole('height', height, 1), _whole('width', width, 1)
        if column + width > self.frame.width or row + height > self.frame.height:
            raise ConfigError(
                f'a window of {height} x {width} pixels from row {row}, column {column} ends '
                f'outside of {str(self.path)!r}, which has {self.frame.height} x {self.frame.width}'
            )
        return RasterWindow(self, column, row, height, width)

    def iterwindows(
        self,
        count: int | None = None,
        window_shape: tuple[int, int] = (256, 256),
        *,
        order: str = 'random',
        overlap: int = 0,
        seed: int | None = None,
    ) -> Iterator[RasterWindow]:
        """Windows of one size; their pixels are read when they are asked for.

        Args:
            count: how many; needed for random ones. Of a grid the first ones are given, all by
                default.
            window_shape: `(height, width)` in pixels.
            order: `'random'`: anywhere within the raster, each place as likely as any other, so
                that windows may overlap or come again. `'grid'`: side by side, row by row from the
                upper left. Only whole windows are given: what is left over at the right and lower
                edge is in none.
            overlap: how many pixels neighbours in the grid share, in both directions.
            seed: the same seed gives the same random windows, and with a larger count more of them;
                others each time by default.

        Raises:
            ConfigError: one of these is out of range, or a window is larger than the raster.
        """
        if order not in _ORDERS:
            raise ConfigError(unknown_name('order', order, _ORDERS))
        height, width = _size(window_shape)
        if height > self.frame.height or width > self.frame.width:
            raise ConfigError(
                f'window_shape=({height}, {width}) is larger than {str(self.path)!r}, which has '
                f'{self.frame.height} x {self.frame.width} pixels'
            )
        if count is not None:
            count = _whole('count', count, 1)
        overlap = _whole('overlap', overlap, 0)
        if seed is not None:
            seed = _whole('seed', seed, 0)
        if order == 'grid':
            if overlap >= min(height, width):
                raise ConfigError(
                    f'overlap={overlap} leaves no step from one window of ({height}, {width}) to '
                    f'the next: it is 0 to {min(height, width) - 1}'
                )
            return self._grid(count, height, width, overlap)
        if overlap:
            raise ConfigError(f"overlap={overlap} is of grids: give order='grid', or leave it out")
        if count is None:
            raise ConfigError("random windows need count=..., or take all with order='grid'")
        return self._random(count, height, width, np.random.default_rng(seed))

    def close(self) -> None:
        """Close the file; neither the raster nor its windows can be read any more."""
        self._file.close()

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f'Raster({str(self.path)!r}, shape={self.shape}, dtype={self.dtype})'

    def _grid(
        self, count: int | None, height: int, width: int, overlap: int
    ) -> Iterator[RasterWindow]:
        places = (
            (column, row)
            for row in range(0, self.frame.height - height + 1, height - overlap)
            for column in range(0, self.frame.width - width + 1, width - overlap)
        )
        for number, (column, row) in enumerate(places):
            if number == count:
                return
            yield RasterWindow(self, column, row, height, width)

    def _random(
        self, count: int, height: int, width: int, generator: np.random.Generator
    ) -> Iterator[RasterWindow]:
        for _ in range(count):
            column = int(generator.integers(self.frame.width - width + 1))
            row = int(generator.integers(self.frame.height - height + 1))
            yield RasterWindow(self, column, row, height, width)


@dataclass(frozen=True, repr=False)
class RasterWindow(_Placed):
    """A part of a raster, whose pixels are read each time they are asked for.

    numpy takes it for an array, and reads it. Of a raster on no map the frame says where in its
    pixels the window is.

    Attributes:
        raster: of which it is a part.
        column: of its left edge, from 0.
        row: of its upper edge, from 0.
        height: pixels.
        width: pixels.
    """

    raster: Raster
    column: int
    row: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(bands, height, width)`."""
        return len(self.raster.bands), self.height, self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return self.raster.dtype

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        """Where it lies."""
        return self.raster.frame.window(self.column, self.row, self.height, self.width)

    @property
    def sensors(self) -> list[str]:
        """That took it; see `Raster`."""
        return self.raster.sensors

    @property
    def dask(self) -> dask.array.Array:
        """`[bands, height, width]` as one block that dask reads when it computes it."""
        import dask
        import dask.array

        pixels = dask.delayed(RasterWindow.read, pure=True)(self)
        return dask.array.from_delayed(pixels, self.shape, self.dtype)

    def read(self) -> np.ndarray:
        """Its pixels, anew at each call.

        Returns:
            `[bands, height, width]` in the dtype of the raster, native byte order.

        Raises:
            DataError: the file is damaged, was changed since it was opened, is gone or was closed.
        """
        return self.raster._file.read(
            self.raster.bands, self.column, self.row, self.height, self.width
        )

    def compute(self) -> np.ndarray:
        """The same as `read`, by the name that dask's arrays have for it."""
        return self.read()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError('the pixels of a window are in its file: an array is always a copy')
        return self.read().astype(self.dtype if dtype is None else dtype, copy=False)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        raster = self.raster
        place = (self.column, self.row, self.height, self.width)
        return 'RasterWindow', *raster._file.identity, raster.bands, place

    def __repr__(self) -> str:
        return (
            f'RasterWindow({str(self.raster.path)!r}, column={self.column}, row={self.row}, '
            f'shape={self.shape}, dtype={self.dtype})'
        )


def _frame_of(file: RasterFile) -> Frame:
    header = file.header
    try:
        return Frame(header.height, header.width, header.transform, header.crs)
    except ConfigError as error:
        raise DataError(f'{file.path!r} cannot be placed: {error}') from error


def _chosen_bands(bands: Sequence[int] | None, count: int, path: str) -> tuple[int, ...]:
    if count == 0:
        raise DataError(
            f'{path!r} has no bands of its own but holds several rasters: `gdalinfo` names them, '
            'and `gdal_translate NAME one.tif` makes a file of one'
        )
    if bands is None:
        return tuple(range(1, count + 1))
    expected = f'{path!r} has the bands 1 to {count}: give a list of some of these'
    try:
        numbers = tuple(map(operator.index, bands))
    except TypeError as error:
        raise ConfigError(f'bands={bands!r}, but {expected}') from error
    if not numbers or any(number not in range(1, count + 1) for number in numbers):
        raise ConfigError(f'bands={bands!r}, but {expected}')
    return numbers


def _dtype_of(bands: tuple[int, ...], dtypes: tuple[str, ...], path: str) -> np.dtype[Any]:
    by_dtype: dict[str, list[int]] = {}
    for band in bands:
        by_dtype.setdefault(dtypes[band - 1], []).append(band)
    shown = '; '.join(f'{dtype}: {numbers}' for dtype, numbers in by_dtype.items())
    if any(dtype.startswith('complex') for dtype in by_dtype):
        raise DataError(f'{path!r} has bands of complex numbers, which are no picture ({shown})')
    if len(by_dtype) > 1:
        raise ConfigError(
            f'the bands of {path!r} are of different dtypes ({shown}): choose with bands=[...]'
        )
    return np.dtype(next(iter(by_dtype)))


def _size(window_shape: Any) -> tuple[int, int]:
    try:
        height, width = window_shape
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'window_shape={window_shape!r} is no (height, width), such as (256, 256)'
        ) from error
    return _whole('height of window_shape', height, 1), _whole('width of window_shape', width, 1)


def _whole(name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f'{name} {value!r} is no whole number from {least}')
    return number
