"""Contexts of conditional models, from the labels or covariates of a data set's rows."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


def make_context(
    name: str, arrays: Mapping[str, ArrayLike], num_rows: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Checks labels or covariates of each split, and makes contexts of them.

    Args:
        name: name of the data in error messages.
        arrays: by split, labels `[n]` of integer or bool dtype, or covariates `[n, C]`.
        num_rows: number of rows n by split.

    Returns:
        Contexts by split. Labels become one-hot rows `[n, C]` of uint8, where C is the number of
        different labels in all splits and the smallest label comes first; covariates become float32
        `[n, C]`.

    Raises:
        ValueError: splits, numbers of rows, dtypes or widths do not match, or a covariate is NaN
            or infinite.
    """
    contexts = {key: np.asarray(array) for key, array in arrays.items()}
    if contexts.keys() != num_rows.keys():
        raise ValueError(
            f"{name}: expected labels of {', '.join(num_rows)}, got them of "
            f"{', '.join(contexts) or 'none'}"
        )
    width = next(iter(contexts.values())).shape[1:]
    for key, array in contexts.items():
        if array.shape[1:] != width or array.shape[:1] != (num_rows[key],) or array.ndim > 2:
            raise ValueError(
                f"{name}: labels of {key} have shape {list(array.shape)}, expected "
                f"{[num_rows[key], *width][:2]}: [n] labels or [n, C] covariates of its n rows"
            )
        if array.dtype.kind not in ("buif" if width else "bui"):
            raise ValueError(
                f"{name}: labels of {key} have dtype {array.dtype}, expected whole numbers [n], or "
                "numbers [n, C]"
            )
    if not width:
        labels = np.unique(np.concatenate(list(contexts.values())))
        return {key: (a[:, None] == labels).astype(np.uint8) for key, a in contexts.items()}
    for key, array in contexts.items():
        contexts[key] = array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: labels of {key} have values that are NaN or infinite")
    return contexts
