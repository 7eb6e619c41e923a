"""Data sets from the user's own arrays, in memory or in an `.npz` file."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from led_jax.data.contexts import make_context
from led_jax.data.dataset import SPLITS, Dataset, Prepare, binarize, cast
from led_jax.data.draws import bernoulli, check_seed, random_words
from led_jax.data.npz import names_of, read_npz
from led_jax.data.rows import check_rows

_ORDER_STREAM = 3  # Streams 1 and 2 draw the pixels of valid and test.


def from_arrays(
    train: ArrayLike,
    valid: ArrayLike | None = None,
    test: ArrayLike | None = None,
    *,
    name: str = "arrays",
    split: Sequence[float] | None = None,
    seed: int = 0,
    values: str = "unit",
    prepare: Prepare = cast,
    labels: Mapping[str, ArrayLike] | None = None,
) -> Dataset:
    """Makes a data set of three arrays, or of one array that it splits.

    >>> import numpy as np
    >>> dataset = from_arrays(np.eye(20).reshape(20, 4, 5), split=(0.5, 0.25, 0.25), seed=1)
    >>> dataset.image_shape, dataset.train.shape, dataset.test.shape
    ((4, 5), (10, 20), (5, 20))

    Args:
        train: `[n, H, W]`, `[n, H, W, C]` or `[n, D]`, of bool, integer or float dtype; rows are
            flattened.
        valid: rows of the same shape, for the selection of the best epoch; None if `test` is None.
        test: rows of the same shape.
        name: name of the data in results and checkpoints.
        split: if `train` is given alone, the fractions of it that become train, valid and test:
            positive, of sum 1. None: 0.8, 0.1 and 0.1.
        seed: seed of the split, and of the binary pixels of valid and test.
        values: kind of values that the model's likelihood takes (`Likelihood.values`): see
            `check_rows`.
        prepare: function applied to training rows before every step. `binarize` draws binary
            pixels: all arrays are then grey levels 0..255, and valid and test are drawn once.
        labels: for a conditional model, labels `[n]` or covariates `[n, C]` of each array given,
            see `make_context`.

    Returns:
        The data set, its splits as uint8 or float32 `[n, D]`.

    Raises:
        ValueError: an argument, shape, dtype or value is not as described, or a split is empty.
    """
    check_seed(seed)
    arrays = {"train": train, "valid": valid, "test": test}
    arrays = {key: np.asarray(array) for key, array in arrays.items() if array is not None}
    image_shape = arrays["train"].shape[1:]
    if len(image_shape) not in (1, 2, 3):
        raise ValueError(
            f"{name}: train has shape {list(arrays['train'].shape)}, expected [n, H, W], "
            "[n, H, W, C] or [n, D]"
        )
    for key, array in arrays.items():
        if array.shape[1:] != image_shape:
            raise ValueError(
                f"{name}: {key} has shape {list(array.shape)}, expected rows of shape "
                f"{list(image_shape)}, as those of train"
            )
    if prepare is binarize:
        if values != "unit":
            raise ValueError(f"{name}: binary pixels are no data for a likelihood of {values!r}")
        values = "levels"
    rows = {key: check_rows(f"{name}: {key}", a, values) for key, a in arrays.items()}
    context = None
    if labels is not None:
        context = make_context(name, labels, {key: len(array) for key, array in rows.items()})
    if rows.keys() == {"train"}:
        ends = _ends(name, len(rows["train"]), (0.8, 0.1, 0.1) if split is None else split)
        rows = split_rows(rows["train"], ends, seed)
        context = context and split_rows(context["train"], ends, seed)
    elif rows.keys() != set(SPLITS) or split is not None:
        raise ValueError(
            f"{name}: expected train, valid and test, or train alone and a split; got "
            f"{', '.join(rows)}" + (f" and split={tuple(split)}" if split is not None else "")
        )
    if prepare is binarize:
        if max(array.max() for array in rows.values()) <= 1:
            raise ValueError(f"{name} has no level above 1, expected grey levels 0..255")
        for stream in (1, 2):
            key = SPLITS[stream]
            rows[key] = bernoulli(rows[key], 255, seed=seed, stream=stream)
    return Dataset(name, image_shape, **rows, prepare=prepare, context=context)


def load_npz(
    path: str | os.PathLike,
    *,
    split: Sequence[float] | None = None,
    seed: int = 0,
    values: str = "unit",
    prepare: Prepare = cast,
    condition: str = "",
) -> Dataset:
    """Loads a data set from an `.npz` file, without unpickling anything.

    Args:
        path: the file, with arrays `train`, `valid` and `test`, or `train` alone, and perhaps
            labels, `train_labels` and so on.
        split: as in `from_arrays`.
        seed: as in `from_arrays`.
        values: as in `from_arrays`.
        prepare: as in `from_arrays`.
        condition: "labels" makes the labels the context of a conditional model; "" does not read
            them.

    Returns:
        The data set; its name is the file's without `.npz`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has other arrays, or as in `read_npz` and `from_arrays`.
    """
    names = names_of(path)
    wanted = [name for name in names if not name.endswith("_labels")]
    if set(wanted) not in ({"train"}, set(SPLITS)):
        raise ValueError(
            f"{path}: expected arrays train, valid and test, or train alone, and perhaps *_labels; "
            f"it has {', '.join(names) or 'none'}"
        )
    arrays = read_npz(path, wanted)
    labels = None
    if condition:
        labels = read_npz(path, [f"{key}_labels" for key in wanted])
        labels = {key.removesuffix("_labels"): array for key, array in labels.items()}
    return from_arrays(
        **arrays,
        name=Path(path).stem,
        split=split,
        seed=seed,
        values=values,
        prepare=prepare,
        labels=labels,
    )


def from_grey(
    name: str,
    splits: Mapping[str, np.ndarray],
    *,
    values: str = "unit",
    dynamic: bool = False,
    seed: int = 0,
    labels: Mapping[str, ArrayLike] | None = None,
) -> Dataset:
    """Makes a data set of grey or colour levels, which are binarized only for `unit` values.

    Args:
        name: name of the data set.
        splits: uint8 levels 0..255 of `train`, `valid` and `test`, `[n, H, W]` or `[n, H, W, C]`.
        values: kind of values that the model's likelihood takes. For `unit`, binary pixels are
            drawn with P(1) = level / 255; for others the levels are not changed.
        dynamic: draw training pixels afresh for every step, those of valid and test once.
        seed: seed of the draw.
        labels: as in `from_arrays`.

    Raises:
        ValueError: as in `from_arrays`.
    """
    if values == "unit" and not dynamic:
        splits = {
            key: bernoulli(splits[key], 255, seed=seed, stream=stream)
            for stream, key in enumerate(SPLITS)
        }
    train, valid, test = (splits[key] for key in SPLITS)
    return from_arrays(
        train,
        valid,
        test,
        name=name,
        seed=seed,
        values=values,
        prepare=binarize if dynamic else cast,
        labels=labels,
    )


def split_rows(rows: np.ndarray, ends: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """Splits rows into train, valid and test, in a random order that every platform reproduces."""
    order = np.argsort(random_words(seed, _ORDER_STREAM, len(rows)), kind="stable")
    return dict(zip(SPLITS, np.split(rows[order], ends), strict=True))


def _ends(name: str, num_rows: int, parts: Sequence[float]) -> list[int]:
    """The row numbers at which train and valid end."""
    if (
        np.shape(parts) != (3,)
        or not min(parts) > 0
        or not math.isclose(sum(parts), 1, abs_tol=1e-6)
    ):
        raise ValueError(
            f"{name}: split is {parts}, expected three positive parts of sum 1, such as "
            "0.8, 0.1, 0.1"
        )
    ends = [round(num_rows * end) for end in (parts[0], parts[0] + parts[1])]
    if not 0 < ends[0] < ends[1] < num_rows:
        raise ValueError(
            f"{name}: split {tuple(parts)} of {num_rows} rows leaves one of train, valid and test "
            "empty"
        )
    return ends
