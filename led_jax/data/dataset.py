"""The type of data sets: three splits of rows, checked once."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

SPLITS: tuple[str, ...] = ("train", "valid", "test")

Prepare = Callable[[Array, Array], Array]
"""`(key, rows) -> batch`: the function applied to training rows before every step."""


def cast(key: Array, rows: Array) -> Array:
    """The rows as numbers of the default float dtype."""
    return rows.astype(jnp.result_type(float))


def binarize(key: Array, rows: Array) -> Array:
    """A fresh draw of binary pixels from grey levels 0..255, with P(1) = level / 255."""
    dtype = jnp.result_type(float)
    return (jax.random.uniform(key, rows.shape, dtype) < rows / 255).astype(dtype)


class Dataset(NamedTuple):
    """Three splits of rows, as made by `from_arrays`.

    Attributes:
        name: name of the data in results and checkpoints.
        image_shape: (H, W) or (H, W, C) for images, which are flattened to rows; else (D,).
        train: `[n, D]`, uint8 or float32: the input of `prepare`.
        valid: `[n, D]`, uint8 or float32: scored by the model as they are.
        test: `[n, D]`, as `valid`.
        prepare: `(key, rows) -> batch` of floats, applied to training rows before every step.
        context: by split, the contexts `[n, C]` of a conditional model; or None.
    """

    name: str
    image_shape: tuple[int, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    prepare: Prepare = cast
    context: Mapping[str, np.ndarray] | None = None

    def rows(self, split: str) -> tuple[np.ndarray, ...]:
        """A split's rows, and their contexts if it has some: `(x,)` or `(x, context)`."""
        context = () if self.context is None else (self.context[split],)
        return getattr(self, split), *context


def from_rows(
    name: str,
    image_shape: tuple[int, int],
    train: ArrayLike,
    valid: ArrayLike,
    test: ArrayLike,
    *,
    prepare: Prepare = cast,
    top: int = 1,
) -> Dataset:
    """Checks three splits of binary images and makes a `Dataset` of them.

    Args:
        name: name of the data in results and checkpoints.
        image_shape: (H, W) in pixels.
        train: `[n, H*W]`, whole numbers 0..top of any real dtype.
        valid: `[n, H*W]`, 0/1.
        test: `[n, H*W]`, 0/1.
        prepare: function applied to training rows before every step: `cast`, or for grey levels
            `binarize`.
        top: the largest value that `train` may hold, at most 255.

    Returns:
        The data set, its splits as uint8.

    Raises:
        ValueError: a shape, dtype or value is not as described, NaN and infinity included.
    """
    if len(image_shape) != 2 or min(image_shape) < 1:
        raise ValueError(f"{name}: image_shape is {image_shape}, expected (H, W), both positive")
    height, width = map(int, image_shape)
    tops = {"train": top, "valid": 1, "test": 1}
    arrays = [
        _checked(f"{name}: {split}", np.asarray(array), height * width, tops[split])
        for split, array in zip(SPLITS, (train, valid, test), strict=True)
    ]
    return Dataset(name, (height, width), *arrays, prepare=prepare)


def fingerprint(dataset: Dataset) -> str:
    """Returns a SHA-256 hex digest of a data set's name, shapes and values.

    Two data sets have the same fingerprint only if training on them is the same: the order of the
    rows and the name of `prepare` are part of it.
    """
    arrays = [array for split in SPLITS for array in dataset.rows(split)]
    shapes = [dataset.image_shape, *(array.shape for array in arrays)]
    digest = hashlib.sha256(json.dumps([dataset.name, _name(dataset.prepare), shapes]).encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _name(prepare: Prepare) -> str:
    if isinstance(prepare, partial):
        arguments = [*map(repr, prepare.args), *map(str, sorted(prepare.keywords.items()))]
        return f"{_name(prepare.func)}({', '.join(arguments)})"
    if not hasattr(prepare, "__name__"):
        raise ValueError(
            f"fingerprint: expected a function as prepare, which has a name: {prepare}"
        )
    return prepare.__name__


def _checked(what: str, array: np.ndarray, pixels: int, top: int) -> np.ndarray:
    """Returns `array` as uint8 `[n, pixels]` with values 0..top, or raises ValueError."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} has dtype {array.dtype}, expected whole numbers 0..{top}")
    if array.ndim != 2 or array.shape[1] != pixels or not len(array):
        raise ValueError(
            f"{what} has shape {list(array.shape)}, expected [n, {pixels}] with n >= 1: "
            "one flattened image a row"
        )
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        row, pixel = np.argwhere(~finite)[0]
        raise ValueError(
            f"{what} has {np.isnan(array).sum()} NaN and {np.isinf(array).sum()} infinite values, "
            f"the first in row {row}, pixel {pixel}"
        )
    low, high = array.min(), array.max()
    if low < 0 or high > top or (array.dtype.kind == "f" and (array != np.floor(array)).any()):
        raise ValueError(
            f"{what} has values from {low} to {high}, expected whole numbers "
            + ("0..255 (grey levels)" if top == 255 else "0 and 1 (binarize first)")
        )
    return array.astype(np.uint8, copy=False)
