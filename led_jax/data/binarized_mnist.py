"""Statically binarized MNIST (Larochelle & Murray 2011), from files or from tensorflow-datasets."""

import hashlib
import logging
import os
import secrets
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from led_jax.data import tfds
from led_jax.data.dataset import SPLITS, Dataset, from_rows

CACHE = "binarized_mnist_packed.npz"
_NAME = "binarized_mnist"
_SIDE = 28
_PIXELS = _SIDE * _SIDE
_MAX_CACHE_BYTES = 8 * 10**6  # 70,000 rows of 98 bytes, with a margin


class _Published(NamedTuple):
    """One published text file: lines of 784 zeros and ones with single spaces between."""

    file: str
    rows: int
    sha256: str
    packed_sha256: str  # of np.packbits(rows, axis=1), which the cache holds


PUBLISHED = {
    "train": _Published(
        "binarized_mnist_train.amat",
        50_000,
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
    ),
    "valid": _Published(
        "binarized_mnist_valid.amat",
        10_000,
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
    ),
    "test": _Published(
        "binarized_mnist_test.amat",
        10_000,
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
        "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
    ),
}

_log = logging.getLogger(__name__)


def load_binarized_mnist(data_dir: str | None = None) -> Dataset:
    """Loads the 50,000 / 10,000 / 10,000 published binary images of 28 x 28 pixels.

    Sources, in this order: the packed cache in `data_dir`; the three published `.amat` files in
    `data_dir`, from which the cache is then written; the set as tensorflow-datasets has prepared it
    in `data_dir`. If `data_dir` is None, tensorflow-datasets reads it from its default directory,
    or downloads it there. The files keep the published order of the rows; tensorflow-datasets has
    the same rows in another order.

    Args:
        data_dir: an existing directory, or None.

    Returns:
        The data set `binarized_mnist`, with rows of 784 pixels.

    Raises:
        FileNotFoundError: there is none of the three sources, or only some of the `.amat` files.
        ValueError: a file differs from the published one.
    """
    if data_dir is None:
        return _from_tfds(None)
    cache = Path(data_dir, CACHE)
    paths = {split: Path(data_dir, published.file) for split, published in PUBLISHED.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if cache.is_file():
        try:
            return _dataset(_read_cache(cache))
        except ValueError as error:
            if missing:
                raise
            _log.warning("%s; reading the .amat files instead", error)
    if len(missing) == len(paths):
        return _from_tfds(data_dir)
    if missing:
        raise FileNotFoundError(f"{_NAME}: {data_dir} lacks {', '.join(missing)}")
    packed = {split: _read_amat(path, PUBLISHED[split]) for split, path in paths.items()}
    _write_cache(cache, packed)
    return _dataset(packed)


def _dataset(packed: dict[str, np.ndarray]) -> Dataset:
    train, valid, test = (np.unpackbits(packed[split], axis=1) for split in SPLITS)
    return from_rows(_NAME, (_SIDE, _SIDE), train, valid, test)


def _from_tfds(data_dir: str | None) -> Dataset:
    try:
        # Nothing is downloaded into a given directory: nobody asked for it, and it could retry for
        # minutes.
        if data_dir is not None and not any(Path(data_dir, _NAME).glob("*/dataset_info.json")):
            raise FileNotFoundError(f"nothing prepared by tensorflow-datasets in {data_dir}")
        rows, _ = tfds.read_images(_NAME, data_dir, tfds.flat)
    except (ImportError, OSError) as error:
        files = ", ".join(published.file for published in PUBLISHED.values())
        where = "data_dir is not given" if data_dir is None else f"not in {data_dir}"
        raise FileNotFoundError(
            f"{_NAME}: looked for {CACHE}, then for {files} ({where}), then for {_NAME} of "
            f"tensorflow-datasets ({error}). Pass a directory that holds the three published "
            f"files as --data_dir; or {tfds.INSTALL}, and leave --data_dir out to let it download"
        ) from error
    return from_rows(_NAME, (_SIDE, _SIDE), rows["train"], rows["validation"], rows["test"])


def _read_amat(path: Path, published: _Published) -> np.ndarray:
    """Returns the rows of one published file, packed: uint8 `[rows, 98]`."""
    size, found = published.rows * _PIXELS * 2, path.stat().st_size
    if found != size:
        raise ValueError(
            f"{path}: size is {found} bytes, expected {size}: truncated or altered (compressed, or "
            "with other line ends); pass the file as it was published"
        )
    content = path.read_bytes()
    _check_sha256(path, content, published.sha256)
    text = np.frombuffer(content, np.uint8).reshape(published.rows, 2 * _PIXELS)
    return np.packbits(text[:, ::2] & 1, axis=1)  # the last bit of ASCII "0" is 0, of "1" is 1


def _read_cache(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_CACHE_BYTES:
            raise ValueError(f"unpacks to {size} bytes, expected at most {_MAX_CACHE_BYTES}")
        with np.load(path, allow_pickle=False) as archive:
            packed = {split: archive[split] for split in PUBLISHED}
    except Exception as error:  # a damaged archive can fail in a dozen ways
        raise ValueError(f"{path}: cannot be read as a packed data set: {error!r}") from error
    for split, published in PUBLISHED.items():
        array, shape = packed[split], (published.rows, _PIXELS // 8)
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(
                f"{path}: {split} is {array.dtype} {array.shape}, expected uint8 {shape}"
            )
        _check_sha256(f"{path}: {split}", array.tobytes(), published.packed_sha256)
    return packed


def _write_cache(path: Path, packed: dict[str, np.ndarray]) -> None:
    """Writes the cache atomically; if the directory is not writable, logs a warning."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                np.savez_compressed(file, **packed)  # pyright: ignore[reportArgumentType]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s: no cache written: %s", path, error)


def _check_sha256(what: object, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{what}: SHA-256 is {found}, expected {expected}: truncated or altered")
