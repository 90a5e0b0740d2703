"""Which files are opened as rasters, and that none of them makes GDAL read what nobody named."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from scipy.io import netcdf_file

from finetuner.collections import raster_formats
from finetuner.collections.raster import Raster
from finetuner.excepts import ConfigError, DataError
from tests.unit.raster_making import UTM, pixels, write

pytestmark = [
    pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning'),
    # rasterio 1.4 multiplies as affine 2 did
    pytest.mark.filterwarnings('ignore:Use `@` matmul:PendingDeprecationWarning'),
]

_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        open(sys.argv[1], 'a').write(self.path + chr(10))
        self.send_error(404)
    do_HEAD = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Fetches:
    """A server on this machine, and what was fetched from it."""

    def __init__(self, log: Path, port: str) -> None:
        self._log, self._port = log, port
        self._num_addresses = 0

    def address(self) -> str:
        """One that was not asked for yet: GDAL asks once."""
        self._num_addresses += 1
        return f'http://127.0.0.1:{self._port}/{self._num_addresses}'

    def taken(self) -> list[str]:
        paths = self._log.read_text().split() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return paths


@pytest.fixture(scope='module')
def fetches(tmp_path_factory):
    log = tmp_path_factory.mktemp('server') / 'log'
    command = [sys.executable, '-c', _SERVER, str(log)]
    # of its own process: GDAL waits for answers with the interpreter locked
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield Fetches(log, server.stdout.readline().strip())
        server.terminate()


def vrt(source: str) -> str:
    return (
        '<VRTDataset rasterXSize="20" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1">'
        f'<SimpleSource><SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand>'
        '</SimpleSource></VRTRasterBand></VRTDataset>'
    )


def map_server(url: str) -> str:
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{url}/${{z}}/${{x}}/${{y}}.png</ServerUrl>'
        '</Service><DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>1</UpperLeftY>'
        '<LowerRightX>1</LowerRightX><LowerRightY>0</LowerRightY><SizeX>200</SizeX>'
        '<SizeY>200</SizeY></DataWindow><BlockSizeX>200</BlockSizeX><BlockSizeY>200</BlockSizeY>'
        '<BandsCount>1</BandsCount></GDAL_WMS>'
    )


def cache_of(url: str) -> str:
    return (
        f'<MRF_META><CachedSource><Source>/vsicurl/{url}/a.tif</Source></CachedSource><Raster>'
        '<Size x="512" y="512" c="1"/><Compression>PNG</Compression>'
        f'<DataFile>/vsicurl/{url}/a.dat</DataFile><IndexFile>/vsicurl/{url}/a.idx</IndexFile>'
        '</Raster></MRF_META>'
    )


def read_with_gdal(path: Path, **options: Any) -> None:
    """What GDAL does with a file that nobody looked at first."""
    with suppress(rasterio.errors.RasterioError), rasterio.open(path) as dataset:
        dataset.read(**options)


# ---- what is opened


@pytest.mark.parametrize('name', ['a.vrt', 'a.xml', 'a.mrf', 'a.tif'])
def test_a_file_that_names_an_address_fetches_nothing(tmp_path, fetches, name):
    path, address = tmp_path / name, fetches.address()
    contents = {
        'a.vrt': vrt(f'/vsicurl/{address}'),
        'a.xml': map_server(address),
        'a.mrf': cache_of(address),
        # whatever it is called
        'a.tif': vrt(f'/vsicurl/{address}'),
    }
    path.write_text(contents[name])
    read_with_gdal(path)
    assert fetches.taken()
    with pytest.raises(
        DataError, match=rf'{name}.* is no raster that is read here.*gdal_translate'
    ):
        Raster(path)
    assert fetches.taken() == []


def test_an_address_within_pixels_is_not_fetched(tmp_path, fetches):
    """GDAL opens the JPEG 2000 in a GRIB as whatever it looks like."""
    options = {'crs': 'EPSG:4326', 'transform': from_origin(0, 50, 0.1, 0.1)}
    path = write(
        tmp_path / 'a.grb2',
        pixels(1, 200, 200, 'uint8'),
        'GRIB',
        DATA_ENCODING='JPEG2000',
        **options,
    )
    content = path.read_bytes()
    start = content.index(b'\xff\x4f\xff\x51')
    trap = map_server(fetches.address()).encode()
    path.write_bytes(content[:start] + trap.ljust(len(content) - start - 4) + content[-4:])
    read_with_gdal(path)
    assert fetches.taken()
    with pytest.raises(DataError, match='GRIB'):
        Raster(path)
    assert fetches.taken() == []


@pytest.mark.parametrize('where', ['tag', 'aux', 'mask', 'overview'])
def test_an_address_beside_the_pixels_is_not_fetched(tmp_path, fetches, where):
    array = pixels(1, 20, 20, 'uint8')
    path = write(tmp_path / 'a.tif', array, **UTM)
    address = f'/vsicurl/{fetches.address()}'
    if where == 'tag':
        with rasterio.open(path, 'r+') as dataset:
            dataset.update_tags(ns='OVERVIEWS', OVERVIEW_FILE=address)
    elif where == 'aux':
        path.with_name('a.tif.aux.xml').write_text(
            '<PAMDataset><Metadata domain="OVERVIEWS">'
            f'<MDI key="OVERVIEW_FILE">{address}</MDI></Metadata></PAMDataset>'
        )
    else:
        suffix = {'mask': '.msk', 'overview': '.ovr'}[where]
        path.with_name(f'a.tif{suffix}').write_text(vrt(address))
    raster = Raster(path)
    window = raster.window(0, 0, 20, 20)
    np.testing.assert_array_equal(window.read(), array)
    assert repr([*raster.sensors, raster.bounds_as('EPSG:4326'), raster.nodata])
    raster.close()
    assert fetches.taken() == []
    # where more than pixels is asked for, GDAL follows all but the mask
    read_with_gdal(path, masked=True, out_shape=(1, 10, 10))
    assert fetches.taken() or where == 'mask'


def test_a_local_vrt_is_not_followed_either(tmp_path):
    source = write(tmp_path / 'a.tif', pixels(1, 20, 20, 'uint8'), **UTM)
    path = tmp_path / 'a.vrt'
    path.write_text(vrt(str(source)))
    with rasterio.open(path) as dataset:
        assert dataset.read().any()
    with pytest.raises(DataError, match=r'gdal_translate -of GTiff a\.vrt a\.tif'):
        Raster(path)


@pytest.mark.parametrize(
    'path',
    [
        'http://127.0.0.1:9/a.tif',
        '/vsicurl/http://127.0.0.1:9/a.tif',
        '/vsizip/a.zip/a.tif',
        '/vsimem/a.tif',
        'zip://a.zip!a.tif',
        's3://bucket/a.tif',
        'WMS:http://127.0.0.1:9/',
        'NETCDF:a.nc:v',
        'GTIFF_DIR:1:a.tif',
        'MEM:::DATAPOINTER=1,PIXELS=1,LINES=1',
        'file:///a.tif',
    ],
)
def test_what_is_no_local_file_is_not_opened(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'a.tif', pixels(1, 4, 4, 'uint8'))
    with pytest.raises(DataError, match='is no local file'):
        Raster(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'text.tif').write_text('no raster')
    (tmp_path / 'empty.tif').touch()
    for path, words in [
        (tmp_path / 'missing.tif', r"there is no file '.*missing\.tif'"),
        ('', 'is no regular file'),
        (tmp_path, 'is no regular file'),
        (tmp_path / 'pipe', 'is no regular file'),
        (tmp_path / 'text.tif', r"text\.tif' is no raster that is read here"),
        (tmp_path / 'empty.tif', r"empty\.tif' is no raster that is read here"),
        (7, 'path 7 is none'),
        (None, 'path None is none'),
        (b'a.tif', "path b'a.tif' is none"),
        ('a\0.tif', 'is none'),
        (str(tmp_path / 'a\udcff.tif'), 'is no UTF-8'),
    ]:
        with pytest.raises(DataError, match=words):
            Raster(path)


def test_names_that_mean_something_to_others_are_names_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    array = pixels(1, 4, 4, 'uint8')
    for name in ('http:a.tif', 'a b?c=1#d.tif', 'ä!ö.tif', 'NETCDF:"a".nc', '-o.tif'):
        path = write(tmp_path / 'new.tif', array).rename(tmp_path / name)
        for given in (name, path, str(path), f'~/{name}'):
            raster = Raster(given)
            assert raster.path == path
            np.testing.assert_array_equal(raster.window(0, 0, 4, 4), array)
    (tmp_path / 'link').symlink_to('ä!ö.tif')
    np.testing.assert_array_equal(Raster('link').window(0, 0, 4, 4), array)


def test_formats_are_gdals_and_none_of_them_reaches_out():
    with rasterio.Env() as env:
        known = env.drivers()
    formats = {*raster_formats.FORMATS, *raster_formats.CONTAINERS}
    assert formats <= set(known)
    assert not formats & {
        *('VRT', 'GTI', 'WMS', 'WMTS', 'WCS', 'HTTP', 'STACTA', 'STACIT', 'EEDA', 'EEDAI', 'DAAS'),
        *('PLMOSAIC', 'MRF', 'GRIB', 'MEM', 'DERIVED', 'GPKG', 'MBTiles', 'Rasterlite', 'SQLite'),
        *('KMLSUPEROVERLAY', 'ERS', 'PDS', 'PDS4', 'ISIS2', 'ISIS3', 'PCIDSK', 'TIL', 'MAP'),
        *('DIMAP', 'SAFE', 'SENTINEL2', 'RS2', 'TSX', 'Zarr', 'ESRIC', 'PDF'),
    }


def test_hdf5_is_read_where_it_holds_its_pixels_itself(tmp_path):
    array = pixels(1, 20, 30, 'uint16')
    other = tmp_path / 'other.h5'
    with h5py.File(other, 'w') as file:
        file['d'] = array[0]
    np.testing.assert_array_equal(Raster(other).window(0, 0, 20, 30), array)
    (tmp_path / 'secret').write_bytes(array.tobytes())
    with h5py.File(tmp_path / 'bytes.h5', 'w') as file:
        file.create_dataset('d', (20, 30), 'uint16', external=[(str(tmp_path / 'secret'), 0, 1200)])
    with h5py.File(tmp_path / 'link.h5', 'w') as file:
        file['group/d'] = h5py.ExternalLink('other.h5', 'd')
    with h5py.File(tmp_path / 'virtual.h5', 'w') as file:
        layout = h5py.VirtualLayout((20, 30), 'uint16')
        layout[:] = h5py.VirtualSource('other.h5', 'd', (20, 30))
        file.create_virtual_dataset('group/d', layout)
    with rasterio.open(tmp_path / 'bytes.h5') as dataset:
        np.testing.assert_array_equal(dataset.read(), array)
    for name in ('bytes', 'link', 'virtual'):
        with pytest.raises(DataError, match=rf"{name}\.h5' takes '.*d' from another file"):
            Raster(tmp_path / f'{name}.h5')


def test_netcdf_is_read_and_one_that_ends_early_is_not(tmp_path):
    array = pixels(1, 20, 30, 'int16')
    path = tmp_path / 'a.nc'
    with netcdf_file(path, 'w') as file:
        file.createDimension('y', 20)
        file.createDimension('x', 30)
        file.createVariable('d', 'i2', ('y', 'x'))[:] = array[0]
    with rasterio.open(path) as dataset:
        np.testing.assert_array_equal(Raster(path).window(0, 0, 20, 30), dataset.read())
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 9):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r'a\.nc'):
            Raster(path)


def test_a_file_of_several_rasters_is_none(tmp_path):
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['d'] = file['e'] = pixels(1, 20, 30, 'uint16')[0]
        file['f'] = pixels(1, 20, 30, 'uint16')[0]
    with pytest.raises(DataError, match=r"a\.h5' has no bands of its own"):
        Raster(tmp_path / 'a.h5')


@pytest.mark.parametrize('bands', [[], [0], [1, 4], [-1], [1.0], ['1'], 2, 'ab'])
def test_bands_that_are_not_there(tmp_path, bands):
    path = write(tmp_path / 'a.tif', pixels(3, 4, 4, 'uint8'))
    with pytest.raises(ConfigError, match=r'bands=.*a\.tif.* has the bands 1 to 3'):
        Raster(path, bands)


def test_complex_pixels_are_refused(tmp_path):
    path = write(tmp_path / 'a.tif', np.ones((1, 4, 4), 'complex64'))
    with pytest.raises(DataError, match=r'a\.tif.* complex numbers.*complex64: \[1\]'):
        Raster(path)


def test_bands_of_several_dtypes_are_to_be_chosen_from(tmp_path):
    array = pixels(3, 4, 6, 'uint8')
    path = write(tmp_path / 'a.img', array, 'HFA')
    # how Erdas keeps a layer: its size, its kinds of layer and pixels, and the size of its blocks
    unsigned, signed = (struct.pack('<iiHHii', 6, 4, 1, kind, 64, 64) for kind in (3, 4))
    content = path.read_bytes()
    second = content.index(unsigned, content.index(unsigned) + 1)
    path.write_bytes(content[:second] + signed + content[second + len(signed) :])
    with pytest.raises(ConfigError, match=r'uint8: \[1, 3\]; int8: \[2\]\): choose with bands='):
        Raster(path)
    np.testing.assert_array_equal(Raster(path, [3, 1]).window(0, 0, 4, 6), array[[2, 0]])
    found = Raster(path, [2])
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found.window(0, 0, 4, 6), array[[1]].view(np.int8))


# ---- what files say of themselves


def test_nodata_is_one_value_or_none(tmp_path):
    grey = pixels(1, 4, 4, 'float32')
    assert Raster(write(tmp_path / 'a.tif', grey)).nodata is None
    assert np.isnan(Raster(write(tmp_path / 'b.tif', grey, nodata=np.nan)).nodata)
    assert Raster(write(tmp_path / 'c.tif', grey, nodata=-9999)).nodata == -9999
    path = write(tmp_path / 'd.png', pixels(3, 4, 4, 'uint8'), 'PNG')
    values = ''.join(
        f'<PAMRasterBand band="{band}"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
        for band, value in ((1, 0), (2, 0), (3, 255))
    )
    path.with_name('d.png.aux.xml').write_text(f'<PAMDataset>{values}</PAMDataset>')
    assert Raster(path).nodata is None
    assert Raster(path, [3]).nodata == 255
    assert Raster(path, [2, 1]).nodata == 0


def test_the_sensor_is_what_the_file_says(tmp_path):
    path = write(tmp_path / 'a.tif', pixels(1, 4, 4, 'uint8'), **UTM)
    assert Raster(path).sensors == []
    with rasterio.open(path, 'r+') as dataset:
        dataset.update_tags(SENSOR=' WV03_VNIR ')
    assert Raster(path).sensors == ['WV03_VNIR']
    # what DigitalGlobe delivers beside its pictures
    path.with_suffix('.IMD').write_text(
        'version = "28.3";\nBEGIN_GROUP = IMAGE_1\n\tsatId = "WV02";\n'
        '\tCatId = "1030010049699500";\nEND_GROUP = IMAGE_1\nEND;\n'
    )
    path.with_suffix('.RPB').write_text('satId = "WV02";\nEND;\n')
    assert Raster(path).sensors == ['WV02']
