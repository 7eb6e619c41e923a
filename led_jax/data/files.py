"""Published image sets by name, each from one `.npz` file of a directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from led_jax.data.arrays import from_arrays, from_grey, split_rows
from led_jax.data.dataset import SPLITS, Dataset
from led_jax.data.npz import read_npz

_Arrays = Mapping[str, np.ndarray]


class NamedFile(NamedTuple):
    """A data set's file.

    Attributes:
        file: the file's name.
        shapes: shapes of the arrays that are read, all of uint8.
        labels: shapes of the label arrays, which are read for a conditional model.
        make: `(arrays, values, dynamic, seed) -> Dataset`; the last three are as in `from_grey`.
    """

    file: str
    shapes: Mapping[str, tuple[int, ...]]
    labels: Mapping[str, tuple[int, ...]]
    make: Callable[[_Arrays, str, bool, int], Dataset]


def _mnist(arrays: _Arrays, values: str, dynamic: bool, seed: int) -> Dataset:
    def splits(train: str, test: str) -> dict[str, np.ndarray]:
        parts = *np.split(arrays[train], [50_000]), arrays[test]
        return dict(zip(SPLITS, parts, strict=True))

    labels = splits("train_labels", "test_labels") if "train_labels" in arrays else None
    return from_grey(
        "mnist",
        splits("train", "test"),
        values=values,
        dynamic=dynamic,
        seed=seed,
        labels=labels,
    )


def _freyfaces(arrays: _Arrays, values: str, dynamic: bool, seed: int) -> Dataset:
    # The sizes of the papers' splits; the splits themselves are not published.
    ends = (1_565, 1_765)
    splits = split_rows(arrays["images"], ends, seed)
    return from_grey("freyfaces", splits, values=values, dynamic=dynamic, seed=seed)


def _silhouettes(arrays: _Arrays, values: str, dynamic: bool, seed: int) -> Dataset:
    name = "caltech101_silhouettes"
    if dynamic or values != "unit":
        raise ValueError(
            f"{name} is black and white already: expected binarize='static' and a likelihood of "
            f"values 'unit', got values {values!r}" + (" and binarize='dynamic'" if dynamic else "")
        )
    # In the published file the object is 0; in the papers that train on these images it is 1.
    published = ("train", "val", "test")
    train, valid, test = (
        (1 - np.unpackbits(arrays[key], axis=1)).reshape(-1, 28, 28) for key in published
    )
    labels = None
    if "train_labels" in arrays:
        found = (arrays[f"{key}_labels"] for key in published)
        labels = dict(zip(SPLITS, found, strict=True))
    return from_arrays(train, valid, test, name=name, labels=labels)


NAMED = {
    "caltech101_silhouettes": NamedFile(
        "caltech101_silhouettes_28_split1.npz",
        {"train": (4_100, 98), "val": (2_264, 98), "test": (2_307, 98)},
        {"train_labels": (4_100,), "val_labels": (2_264,), "test_labels": (2_307,)},
        _silhouettes,
    ),
    "freyfaces": NamedFile("freyfaces.npz", {"images": (1_965, 28, 20)}, {}, _freyfaces),
    "mnist": NamedFile(
        "mnist_grey.npz",
        {"train": (60_000, 28, 28), "test": (10_000, 28, 28)},
        {"train_labels": (60_000,), "test_labels": (10_000,)},
        _mnist,
    ),
}
"""Data sets that are read from one file of a directory:

- `caltech101_silhouettes` (Marlin et al., 2010; 28 x 28, split 1: 4,100 / 2,264 / 2,307), packed
  bits with background 1, which are inverted;
- `freyfaces` (28 x 20, levels 0..255, split 1,565 / 200 / 200 by the seed);
- `mnist` (levels 0..255; the last 10,000 training images validate).
"""


def has_file(name: str, data_dir: str | None) -> bool:
    """Whether a directory holds the file of one of `NAMED`."""
    return data_dir is not None and Path(data_dir, NAMED[name].file).is_file()


def load_named(
    name: str,
    data_dir: str | None,
    *,
    values: str = "unit",
    dynamic: bool = False,
    seed: int = 0,
    condition: str = "",
) -> Dataset:
    """Loads one of `NAMED`.

    Args:
        name: name of the data set.
        data_dir: directory of its file.
        values: kind of values that the model's likelihood takes. For `unit`, binary pixels are
            drawn with P(1) = level / 255; for others the levels are not changed.
        dynamic: draw training pixels afresh for every step.
        seed: seed of the split of `freyfaces`, and of the draw.
        condition: "labels" makes the labels the context of a conditional model.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: its arrays do not have the published shapes and dtype, the data have no labels,
            or they cannot have such values.
    """
    named = NAMED[name]
    if not has_file(name, data_dir):
        where = "data_dir is not given" if data_dir is None else f"{data_dir} has none"
        raise FileNotFoundError(
            f"{name}: pass a directory with the file {named.file} as --data_dir; {where}"
        )
    if condition and not named.labels:
        raise ValueError(f"{name} has no labels to condition on")
    path, shapes = Path(data_dir or "", named.file), dict(named.shapes)
    if condition:
        shapes |= named.labels
    arrays = read_npz(path, list(shapes))
    for key, shape in shapes.items():
        if arrays[key].shape != shape or arrays[key].dtype != np.uint8:
            raise ValueError(
                f"{path}: {key} is {arrays[key].dtype} {arrays[key].shape}, expected uint8 {shape}"
            )
    return named.make(arrays, values, dynamic, seed)
