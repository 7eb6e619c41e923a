"""Checks that data have the values that a likelihood takes, and makes rows of them."""

from typing import NamedTuple

import numpy as np


class _Values(NamedTuple):
    low: float
    high: float
    whole: bool
    expected: str


VALUES = {
    "unit": _Values(
        0,
        1,
        False,
        "0 and 1, or numbers in [0, 1], which is what a Bernoulli likelihood takes. Divide grey "
        "levels 0..255 by 255, or draw binary pixels from them, afresh for every step, by "
        "binarize='dynamic'. The Bernoulli likelihood has no use for other data: they take another "
        "one, such as gaussian, or for levels discretized_logistic (--decoder=NAME)",
    ),
    "levels": _Values(0, 255, True, "whole numbers 0..255"),
    "scaled_levels": _Values(0, 255, True, "whole numbers 0..255, as of uint8 images"),
    "real": _Values(-np.inf, np.inf, False, "real numbers"),
}
"""Kinds of values by name, and their ranges."""


def _values(name: str) -> _Values:
    below, _, number = str(name).partition(" ")
    if below == "below" and number.isdecimal() and 1 <= int(number) <= 256:
        return _Values(0, int(number) - 1, True, f"whole numbers 0..{int(number) - 1}")
    if name not in VALUES:
        raise ValueError(
            f"values is {name!r}, expected 'below K' with a K from 1 to 256, or one of "
            f"{list(VALUES)}"
        )
    return VALUES[name]


def check_rows(what: str, array: np.ndarray, values: str = "unit") -> np.ndarray:
    """Checks an array of data, and flattens it to rows.

    Args:
        what: the array's name in errors.
        array: `[n, ...]` of bool, integer or float dtype.
        values: `unit` for numbers in [0, 1], which a Bernoulli likelihood takes; `levels` for whole
            numbers 0..255; `scaled_levels` for whole numbers 0..255, which are divided by 255;
            `below K` for whole numbers 0..K - 1, K at most 256; `real` for any finite numbers.

    Returns:
        `[n, D]`: uint8 for whole numbers of the kinds `unit`, `levels` and `below K`, else float32.

    Raises:
        ValueError: the array is empty or has another dtype or other values; NaN and infinity are
            named with the first row that has them.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} has dtype {array.dtype}, expected bool, integers or floats")
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"{what} has shape {list(array.shape)}, expected [n, ...] with n >= 1 rows that are "
            "not empty"
        )
    rows = array.reshape(len(array), -1)
    if rows.dtype.kind == "f":
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32, copy=False)
        if not (finite := np.isfinite(rows)).all():
            row, entry = np.argwhere(~finite)[0]
            raise ValueError(
                f"{what} has {(~finite).sum()} values that are NaN or not finite in float32, the "
                f"first in row {row}, entry {entry}"
            )
    kind, low, high = _values(values), rows.min(), rows.max()
    whole = rows.dtype.kind != "f" or bool((rows == np.floor(rows)).all())
    if low < kind.low or high > kind.high or (kind.whole and not whole):
        raise ValueError(f"{what} has values from {low} to {high}, expected {kind.expected}")
    if values == "scaled_levels":
        return rows.astype(np.float32) / 255
    if values != "real" and whole:
        return rows.astype(np.uint8, copy=False)
    return rows.astype(np.float32, copy=False)
