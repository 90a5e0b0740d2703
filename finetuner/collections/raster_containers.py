"""Whether a file of scientific data (HDF5, netCDF) holds all of it itself."""

from __future__ import annotations

from typing import Any

from finetuner.excepts import DataError


def check_container(path: str) -> None:
    """Refuse HDF5 that takes data from other files, and netCDF that ends early.

    A dataset in HDF5 (netCDF 4, BAG and others are such) may be bytes of any file that its reader
    may read, be put together from datasets of other files, or be a link to one. Of older netCDF
    that ends early the rest is read as zeros.

    Args:
        path: of a file; one of another kind passes.

    Raises:
        DataError: it is such a file, or cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            is_classic = file.read(3) == b'CDF'
    except OSError as error:
        raise DataError(f'file {path!r} cannot be opened: {error.strerror}') from error
    if is_classic:
        _check_classic(path)
        return
    import h5py

    if h5py.is_hdf5(path):
        _check_hdf5(path)


def _check_hdf5(path: str) -> None:
    import h5py

    def elsewhere(name: bytes, info: Any) -> bytes | None:
        if info.type == h5py.h5l.TYPE_EXTERNAL:
            return name
        if info.type != h5py.h5l.TYPE_HARD:
            return None
        item = h5py.h5o.open(file.id, name)
        if not isinstance(item, h5py.h5d.DatasetID):
            return None
        creation = item.get_create_plist()
        is_virtual = creation.get_layout() == h5py.h5d.VIRTUAL
        return name if is_virtual or creation.get_external_count() else None

    try:
        with h5py.File(path, 'r') as file:
            found = file.id.links.visit(elsewhere, info=True)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(f'{path!r} is damaged or incomplete: {error}') from error
    if found:
        raise DataError(
            f'{path!r} takes {found.decode(errors="replace")!r} from another file, which nobody '
            'named: such files are not opened; write the pixels into a GeoTIFF'
        )


def _check_classic(path: str) -> None:
    from scipy.io import netcdf_file

    try:
        # Maps each variable into memory, which fails where the file has no bytes for it.
        netcdf_file(path, 'r', mmap=True).close()
    except (OSError, ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
        raise DataError(
            f'{path!r} is damaged or incomplete, or netCDF of a kind that is not read here: {error}'
        ) from error
