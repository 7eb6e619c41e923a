"""Arrays from untrusted `.npz` files."""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_BYTES = 2**32
"""Limit in bytes on the unpacked arrays of a file; a larger file raises it to its own size."""


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


def names_of(path: str | os.PathLike) -> list[str]:
    """The names of the arrays in an `.npz` file; reads none of the arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no `.npz` file.
    """
    with _opened(Path(path)) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(
    path: str | os.PathLike, names: Sequence[str], max_bytes: int = MAX_BYTES
) -> dict[str, np.ndarray]:
    """Reads arrays of numbers, without unpickling anything.

    All headers are checked before the first array is read: a file of zeros can be compressed a
    thousandfold, and a header can promise any size.

    Args:
        path: the `.npz` file.
        names: names of the arrays to read; others are ignored.
        max_bytes: limit on the unpacked size of all these arrays together; a file that is larger
            raises it to its own size.

    Returns:
        The arrays by name, of bool, integer or float dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no `.npz` file, is damaged or too large, lacks a name, or an array does
            not hold numbers.
    """
    path = Path(path)
    with _opened(path) as archive:
        found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if missing := sorted(set(names) - set(found)):
            raise ValueError(f"{path}: no array {', '.join(missing)}; it has {', '.join(found)}")
        headers = {name: _header(path, archive, found[name]) for name in names}
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
        if size > (limit := max(max_bytes, path.stat().st_size)):
            raise ValueError(
                f"{path}: unpacks to {size} bytes, expected at most {limit}; save larger arrays "
                "with numpy.savez, which does not compress"
            )
        try:
            arrays = {}
            for name in names:
                with archive.open(found[name]) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
            return arrays
        except Exception as error:  # A damaged archive can fail in a dozen ways.
            raise ValueError(f"{path}: damaged: {error}") from error


def _opened(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not an existing file")
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # Damaged files make `zipfile` raise anything.
        raise ValueError(f"{path}: not an .npz file as numpy.savez writes it: {error}") from error


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    name = info.filename.removesuffix(".npy")
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(file)
            start = file.tell()
    except Exception as error:
        raise ValueError(f"{path}: {name} has no readable header of an array: {error!r}") from error
    if dtype.kind not in "buif":
        kind = "Python objects, which are never unpickled" if dtype.hasobject else str(dtype)
        raise ValueError(f"{path}: {name} holds {kind}; expected bool, integers or floats")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or info.file_size - start != size:
        raise ValueError(
            f"{path}: {name} is {dtype} {shape}, {size} bytes, but its entry has "
            f"{info.file_size - start}: damaged"
        )
    return _Header(shape, dtype)
