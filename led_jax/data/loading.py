"""Data sets by name."""

import os
from collections.abc import Sequence

from led_jax.data.arrays import load_npz
from led_jax.data.binarized_mnist import load_binarized_mnist
from led_jax.data.dataset import Dataset, cast
from led_jax.data.dataset import binarize as draw
from led_jax.data.digits import load_digits
from led_jax.data.draws import check_seed
from led_jax.data.files import NAMED, has_file, load_named
from led_jax.data.tfds import load_tfds


def load(
    name: str = "digits",
    *,
    data_dir: str | None = None,
    binarize: str = "static",
    seed: int = 0,
    split: Sequence[float] | None = None,
    values: str = "unit",
    condition: str = "",
) -> Dataset:
    """Loads a data set of images by its name, or the arrays of an `.npz` file.

    Args:
        name: `digits` (8 x 8, needs no download), `binarized_mnist`, `caltech101_silhouettes` and
            `freyfaces` (see `files.NAMED`), `mnist`, any other image set of tensorflow-datasets
            (`fashion_mnist`, `omniglot`, ...; made 28 x 28 and grey to be binarized), or
            `FILE.npz`, see `load_npz`.
        data_dir: an existing directory, in which the published files of `binarized_mnist`, the file
            of a set of `files.NAMED`, the sets of tensorflow-datasets, or `FILE.npz` are looked
            for; None: the default directory of tensorflow-datasets. `digits` reads no files.
        binarize: `static`: every split is drawn once; `dynamic`: `train` stays grey, and is drawn
            afresh for every step. Sets that are binary already are `static` only. Arrays of an
            `.npz` are not binarized, or with `dynamic` must be grey levels 0..255.
        seed: seed of the static draw, and of the split of an `.npz` and of `freyfaces`;
            `binarized_mnist` has none. It is part of the data, not of a run: likelihoods are
            comparable only between models of the same draw.
        split: for an `.npz` that has `train` alone, see `from_arrays`.
        values: kind of values that the model's likelihood takes, see `check_rows`. Images are
            binarized for `unit`; for others the levels are not changed.
        condition: "labels" makes labels the context of a conditional model: those of the set, or
            `train_labels` and so on of an `.npz`. `[n]` labels become one-hot rows, `[n, C]`
            covariates are not changed: see `make_context`. "": no context.

    Returns:
        The data set.

    Raises:
        ValueError: an argument is not as described, or the data are not as expected.
        FileNotFoundError: `data_dir` or the files to read do not exist.
        OSError: tensorflow-datasets could not prepare or read the set.
    """
    if binarize not in ("static", "dynamic"):
        raise ValueError(f"binarize is {binarize!r}, expected 'static' or 'dynamic'")
    if condition not in ("", "labels"):
        raise ValueError(f"condition is {condition!r}, expected '' or 'labels'")
    check_seed(seed)
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}, expected a string, such as 'digits'")
    if not isinstance(data_dir, str | os.PathLike | None):
        raise ValueError(f"data_dir is {data_dir!r}, expected a path or None")
    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
        if not os.path.isdir(data_dir):
            raise FileNotFoundError(f"data_dir {data_dir!r} is not an existing directory")
    dynamic = binarize == "dynamic"
    if name.endswith(".npz"):
        path = os.path.join(data_dir or "", os.path.expanduser(name))
        prepare = draw if dynamic else cast
        return load_npz(
            path, split=split, seed=seed, values=values, prepare=prepare, condition=condition
        )
    if split is not None:
        raise ValueError(f"data set {name!r} has splits of its own: split goes with FILE.npz")
    # Without its file, mnist is read by tensorflow-datasets, which has none of the others.
    if name in NAMED and (name != "mnist" or has_file(name, data_dir)):
        return load_named(
            name, data_dir, values=values, dynamic=dynamic, seed=seed, condition=condition
        )
    if name in ("digits", "binarized_mnist") and values != "unit":
        raise ValueError(
            f"data set {name!r} has black and white pixels, no data for a likelihood of {values!r}"
        )
    if name == "digits":
        return load_digits(dynamic=dynamic, seed=seed, condition=condition)
    if name == "binarized_mnist":
        if condition:
            raise ValueError("data set 'binarized_mnist' has no labels to condition on")
        if dynamic:
            raise ValueError(
                "binarize is 'dynamic', but binarized_mnist is already binary: use "
                "binarize='static', or name='mnist' for the grey levels"
            )
        return load_binarized_mnist(data_dir)
    return load_tfds(name, data_dir, values=values, dynamic=dynamic, seed=seed, condition=condition)
