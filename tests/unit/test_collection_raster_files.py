"""Files of rasters: how many read them at once, and what of those that are damaged."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask.array  # noqa: F401  what is imported is read too
import numpy as np
import pytest
import rasterio

from finetuner.collections import raster_files
from finetuner.collections.raster import Raster, RasterWindow
from finetuner.excepts import ConfigError, DataError
from tests.unit.raster_making import TILED, UTM, pixels, write

pytestmark = [
    pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning'),
    # rasterio 1.4 multiplies as affine 2 did
    pytest.mark.filterwarnings('ignore:Use `@` matmul:PendingDeprecationWarning'),
]

# ---- what is damaged or changed


@pytest.mark.parametrize(
    ('name', 'driver', 'options'),
    [
        ('striped.tif', 'GTiff', {}),
        ('tiled.tif', 'GTiff', TILED),
        ('deflate.tif', 'GTiff', {**TILED, 'compress': 'deflate'}),
        ('lzw.tif', 'GTiff', {'compress': 'lzw'}),
        ('jpeg.tif', 'GTiff', {'compress': 'jpeg', 'photometric': 'ycbcr'}),
        ('a.png', 'PNG', {}),
        ('a.jpg', 'JPEG', {}),
        ('a.jp2', 'JP2OpenJPEG', {}),
        ('a.webp', 'WEBP', {}),
        ('a.bmp', 'BMP', {}),
        ('a.img', 'HFA', {}),
        ('a.envi', 'ENVI', {}),
    ],
)
@pytest.mark.parametrize('window', [(0, 0, 64, 96), (40, 30, 34, 56)])
def test_a_file_that_ends_early_is_an_error_or_the_same_pixels(
    tmp_path, name, driver, options, window
):
    path = write(tmp_path / name, pixels(3, 64, 96, 'uint8'), driver, **options)
    content = path.read_bytes()
    expected = Raster(path).window(*window).read()
    errors = []
    for length in [*range(0, len(content), len(content) // 9), len(content) - 1]:
        path.write_bytes(content[:length])
        try:
            found = Raster(path).window(*window).read()
        except DataError as error:
            errors.append(str(error))
        else:
            # Each band of an Erdas file is behind the pixels of the one before: it may be gone.
            assert len(found) == len(expected) or driver == 'HFA'
            np.testing.assert_array_equal(found, expected[: len(found)])
    assert len(errors) >= 3
    assert all(name in error for error in errors)


def test_a_damaged_window_is_named_and_the_others_are_read(tmp_path):
    array = pixels(1, 64, 64, 'uint8')
    path = write(
        tmp_path / 'a.tif', array, compress='deflate', tiled=True, blockxsize=32, blockysize=32
    )
    content = bytearray(path.read_bytes())
    content[-200:-100] = bytes(100)
    path.write_bytes(content)
    raster = Raster(path)
    with pytest.raises(DataError, match=r'columns 40 to 49, rows 33 to 42 of .*a\.tif.* damaged'):
        raster.window(40, 33, 10, 10).read()
    np.testing.assert_array_equal(raster.window(0, 0, 32, 64), array[:, :32])


def test_grey_in_place_of_what_a_jpeg_lost_is_not_taken(tmp_path):
    array = pixels(3, 32, 32, 'uint8').repeat(8, 1).repeat(8, 2)
    path = write(tmp_path / 'a.jpg', array, 'JPEG')
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 20] = np.random.default_rng(0).bytes(20)
    path.write_bytes(content)
    with rasterio.open(path) as dataset:
        dataset.read()
    with pytest.raises(DataError, match=r'a\.jpg.* is damaged or incomplete'):
        Raster(path).window(0, 0, 256, 256).read()


def test_nothing_is_printed_about_damage(tmp_path, capfd):
    path = write(tmp_path / 'a.png', pixels(3, 64, 64, 'uint8'), 'PNG')
    path.write_bytes(path.read_bytes()[:3000])
    (tmp_path / 'text').write_text('no raster')
    with pytest.raises(DataError):
        Raster(path).window(0, 0, 64, 64).read()
    with pytest.raises(DataError):
        Raster(tmp_path / 'text')
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('how', ['rewritten', 'replaced', 'cut', 'touched', 'removed'])
@pytest.mark.parametrize('opened_anew', [False, True])
def test_a_file_changed_underneath_is_not_read(tmp_path, how, opened_anew):
    path = write(tmp_path / 'a.tif', pixels(1, 20, 20, 'uint8'), **UTM)
    raster = Raster(path)
    window = raster.window(0, 0, 5, 5)
    window.read()
    if opened_anew:
        window = pickle.loads(pickle.dumps(window))
    time.sleep(0.02)  # a tick of the file system's clock
    if how == 'rewritten':
        write(path, pixels(1, 20, 20, 'uint8')[:, ::-1], **UTM)
    elif how == 'replaced':
        write(tmp_path / 'b.tif', pixels(3, 3, 3, 'uint8'), **UTM).replace(path)
    elif how == 'cut':
        os.truncate(path, 300)
    elif how == 'touched':
        os.utime(path)
    else:
        path.unlink()
    words = 'there is no file' if how == 'removed' else 'was changed since it was opened'
    with pytest.raises(DataError, match=rf'{words}|{words}.*a\.tif'):
        window.read()


# ---- who reads it, and when


def bytes_read() -> int:
    lines = Path('/proc/self/io').read_text().splitlines()
    return int(dict(line.split(': ') for line in lines)['rchar'])


def test_no_pixel_is_read_before_it_is_asked_for(tmp_path):
    path = write(tmp_path / 'a.tif', pixels(3, 1000, 1000, 'uint16'), **TILED, **UTM)
    Raster(path).window(0, 0, 1, 1).read()  # imports
    before = bytes_read()
    raster = Raster(path)
    windows = list(raster.iterwindows(500, (100, 100), seed=1))
    windows += raster.iterwindows(window_shape=(100, 100), order='grid')
    told = [(window.shape, window.bounds, window.dask.shape, repr(window)) for window in windows]
    assert len(told) == 600
    # 6 MB of pixels; what is read is the header and the lists of tiles
    assert bytes_read() - before < 200_000
    before = bytes_read()
    windows[0].read()
    assert 60_000 <= bytes_read() - before < 400_000


def test_threads_read_one_raster_at_once(tmp_path):
    array = pixels(4, 300, 300, 'uint16')
    raster = Raster(write(tmp_path / 'a.tif', array, compress='deflate', **TILED, **UTM))
    windows = list(raster.iterwindows(400, (40, 50), seed=3))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda window: window.read(), windows))
    for window, block in zip(windows, found, strict=True):
        expected = array[:, window.row : window.row + 40, window.column : window.column + 50]
        np.testing.assert_array_equal(block, expected)
    assert 1 <= len(raster._file._idle) <= 8


def same_in_a_fork(windows: Sequence[RasterWindow], expected: Sequence[np.ndarray]) -> bool:
    """Whether a forked process reads the same; one that hangs is ended."""
    child = os.fork()
    if child == 0:
        found = [window.read() for window in windows]
        os._exit(0 if all(map(np.array_equal, found, expected)) else 1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_a_process_forked_amid_reads_reads_too(tmp_path):
    array = pixels(4, 256, 256, 'uint8')
    raster = Raster(write(tmp_path / 'a.tif', array, **TILED))
    windows = list(raster.iterwindows(30, (60, 60), seed=4))
    expected = [window.read() for window in windows]
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            for window in windows:
                window.read()

    threads = [threading.Thread(target=read_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert same_in_a_fork(windows[:3], expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(windows[5], expected[5])


def test_a_process_is_forked_between_reads(tmp_path):
    """Amid one it would find GDAL's locks taken now and then, by threads that it does not have."""
    raster = Raster(write(tmp_path / 'a.tif', pixels(1, 20, 20, 'uint8')))
    window, has_begun, has_ended = raster.window(0, 0, 9, 9), threading.Event(), threading.Event()

    def read_slowly() -> None:
        with raster._file._lent():
            has_begun.set()
            time.sleep(0.3)
            has_ended.set()

    thread = threading.Thread(target=read_slowly)
    thread.start()
    has_begun.wait()
    assert same_in_a_fork([window], [window.read()])
    assert has_ended.is_set()
    thread.join()


def test_a_forked_process_does_not_wait_for_its_parents_threads(tmp_path, monkeypatch):
    monkeypatch.setenv('GDAL_NUM_THREADS', '4')
    array = pixels(2, 512, 512, 'uint8')
    whole = Raster(write(tmp_path / 'a.tif', array, compress='deflate', **TILED)).window(
        0, 0, 512, 512
    )
    expected = [whole.read()]
    assert same_in_a_fork([whole], expected)
    assert same_in_a_fork([whole], expected)


def read_pickled(pickled: bytes) -> np.ndarray:
    return pickle.loads(pickled).read()


def test_a_window_pickles_by_its_path_to_a_process_of_its_own(tmp_path):
    array = pixels(2, 500, 500, 'float32')
    raster = Raster(write(tmp_path / 'a.tif', array, **UTM), [2])
    window = raster.window(100, 200, 30, 40)
    pickled = pickle.dumps(window)
    assert len(pickled) < 2000
    with multiprocessing.get_context('spawn').Pool(1) as processes:
        found = processes.apply(read_pickled, (pickled,))
    np.testing.assert_array_equal(found, array[1:, 200:230, 100:140])
    copy = pickle.loads(pickle.dumps(raster))
    assert (copy.shape, copy.frame, copy.bands, copy.path) == (
        raster.shape,
        raster.frame,
        raster.bands,
        raster.path,
    )


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


def test_rasters_that_are_gone_leave_no_file_open(tmp_path):
    paths = [write(tmp_path / f'{n}.tif', pixels(1, 9, 9, 'uint8')) for n in range(20)]
    gc.collect()
    before = open_files()
    for path in paths * 10:
        Raster(path).window(0, 0, 2, 2).read()
    assert open_files() <= before + 1
    for path in paths:
        with Raster(path) as raster:
            raster.window(0, 0, 2, 2).read()
        with pytest.raises(DataError, match='no raster'):
            Raster(__file__)
        # the error keeps alive what was being opened
        with pytest.raises(ConfigError, match='bands') as failed:
            Raster(path, [2])
        assert open_files() <= before
        assert failed.value
    gc.collect()
    assert open_files() <= before


def test_many_rasters_at_once_keep_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(raster_files, '_MOST_IDLE', 10)
    arrays = [pixels(1, 9, 9, 'uint8') + n for n in range(40)]
    rasters = [Raster(write(tmp_path / f'{n}.tif', array)) for n, array in enumerate(arrays)]
    before = open_files()
    for _ in range(3):
        for raster, array in zip(rasters, arrays, strict=True):
            np.testing.assert_array_equal(raster.window(0, 0, 9, 9), array)
    assert open_files() <= before
    assert sum(len(raster._file._idle) for raster in rasters) <= 10


def test_threads_that_ended_leave_no_file_open(tmp_path):
    raster = Raster(write(tmp_path / 'a.tif', pixels(1, 90, 90, 'uint8')))
    before = open_files()
    for _ in range(30):
        thread = threading.Thread(target=raster.window(0, 0, 5, 5).read)
        thread.start()
        thread.join()
    assert open_files() <= before


def test_a_closed_raster_says_so(tmp_path):
    before = open_files()
    raster = Raster(write(tmp_path / 'a.tif', pixels(1, 9, 9, 'uint8')))
    window = raster.window(0, 0, 5, 5)
    assert open_files() > before
    raster.close()
    raster.close()
    assert open_files() == before
    for closed in (window, pickle.loads(pickle.dumps(window))):
        with pytest.raises(DataError, match=r'a\.tif.* was closed: open the raster again'):
            closed.read()


def test_opening_and_reading_warns_of_nothing_and_others_are_warned_still(tmp_path, recwarn):
    path = write(tmp_path / 'a.tif', pixels(1, 9, 9, 'uint8'))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        rasterio.open(path).close()
    recwarn.clear()
    Raster(path).window(0, 0, 5, 5).read()
    assert list(recwarn) == []


def test_rasterio_comes_in_when_a_raster_is_opened():
    program = (
        'import sys, finetuner.collections.raster\n'
        "print([name for name in ('rasterio', 'h5py', 'dask', 'affine') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert found.stdout.strip() == '[]', found.stderr
