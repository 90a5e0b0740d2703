"""Real rasters, written with rasterio."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

UTM = {'crs': 'EPSG:32613', 'transform': Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)}
TILED = {'tiled': True, 'blockxsize': 32, 'blockysize': 16}


def pixels(bands: int, height: int, width: int, dtype: str) -> np.ndarray:
    """`[bands, height, width]` at random, over most of what the dtype holds."""
    generator = np.random.default_rng(bands * height * width)
    if np.dtype(dtype).kind == 'f':
        return generator.normal(0, 1000, (bands, height, width)).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (bands, height, width), dtype, endpoint=True)


def write(path: Path, array: np.ndarray, driver: str = 'GTiff', **options: Any) -> Path:
    """A raster of these pixels; options are rasterio's."""
    bands, height, width = array.shape
    size = {'count': bands, 'height': height, 'width': width, 'dtype': array.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', NotGeoreferencedWarning)
        with rasterio.open(path, 'w', driver=driver, **size, **options) as dataset:
            dataset.write(array)
    return path
