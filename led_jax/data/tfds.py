"""Image sets of tensorflow-datasets, as binary 28 x 28 images or unchanged.

tensorflow and tensorflow-datasets are imported only when a set is read.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from led_jax.data.arrays import from_grey
from led_jax.data.dataset import Dataset

INSTALL = 'pip install "led_jax[tfds]"'
_EXPECTED = (
    "expected digits, binarized_mnist, caltech101_silhouettes, freyfaces, FILE.npz as numpy.savez "
    "writes it, or an image set of tensorflow-datasets"
)
_SIDE = 28
_DARK_ON_LIGHT = ("omniglot",)
_BATCH = 500
_LUMA = np.array([299.0, 587.0, 114.0])  # ITU-R BT.601, in thousandths


def load_tfds(
    name: str,
    data_dir: str | None = None,
    *,
    values: str = "unit",
    dynamic: bool = False,
    seed: int = 0,
    condition: str = "",
) -> Dataset:
    """Loads an image set of tensorflow-datasets, preparing it if need be.

    If the likelihood takes `unit` values, images become grey (luminance), 28 x 28 (area average)
    and then binary; `omniglot`, which is drawn in black on white, is inverted. For other values
    they are not changed, grey or in colour. Sets without a published `validation` split use the end
    of `train` for it; see `from_images`. `omniglot` is the original set, whose train and test
    splits have different alphabets, and not the 28 x 28 version of Burda et al. (2015).

    Args:
        name: name in tensorflow-datasets, perhaps with a config and a version (`emnist/letters`).
        data_dir: where tensorflow-datasets keeps prepared sets; None: its default.
        values: kind of values that the model's likelihood takes, see `check_rows`.
        dynamic: keep `train` as grey levels.
        seed: seed of the binarization draw.
        condition: "labels" makes the set's labels the context of a conditional model.

    Returns:
        The data set: binary rows of 784 pixels, or flattened images (H, W, 1) or (H, W, 3).

    Raises:
        ValueError: tensorflow-datasets is not installed or has no such set; or the set does not
            have images of one size, splits `train` and `test`, and labels if they are asked for.
        OSError: tensorflow-datasets could not prepare it, for example without a network.
    """
    invert = name.split("/")[0].split(":")[0] in _DARK_ON_LIGHT

    def convert(images: np.ndarray) -> np.ndarray:
        if values != "unit":
            return images
        return to_grey(images, invert=invert).reshape(-1, _SIDE, _SIDE)

    try:
        images, labels = read_images(name, data_dir, convert, with_labels=bool(condition))
    except ImportError as error:
        raise ValueError(
            f"data set {name!r}: {_EXPECTED}, for which: {INSTALL} ({error})"
        ) from error
    return from_images(name, images, values=values, dynamic=dynamic, seed=seed, labels=labels)


def from_images(
    name: str,
    images: Mapping[str, np.ndarray],
    *,
    values: str = "unit",
    dynamic: bool = False,
    seed: int = 0,
    labels: Mapping[str, np.ndarray] | None = None,
) -> Dataset:
    """Makes a `Dataset` of the splits of an image set.

    Without a `validation` split, the last rows of `train` are held out: 10,000 if `train` has at
    least 50,000, else a tenth. `dynamic` does not change the draw of `valid` and `test`.

    Args:
        name: name of the data set.
        images: uint8 levels `[n, H, W]` or `[n, H, W, C]` by split: `train`, `test` and perhaps
            `validation`.
        values: kind of values that the model's likelihood takes; levels are binarized only for
            `unit`.
        dynamic: keep `train` as grey levels.
        seed: seed of the binarization draw, with P(1) = level / 255.
        labels: `[n]` by the same splits, the context of a conditional model; or None.

    Returns:
        The data set.

    Raises:
        ValueError: a split is missing, the levels are not 0..255, or labels are not those of the
            images, or negative, as tensorflow-datasets marks hidden ones.
    """
    _check_splits(name, images)
    if labels is not None and labels.keys() != images.keys():
        raise ValueError(f"{name}: expected labels of {sorted(images)}, got {sorted(labels)}")
    for split, of_split in (labels or {}).items():
        if of_split.min(initial=0) < 0:
            raise ValueError(f"{name}: labels of {split} are hidden: the smallest is negative")
    if images["train"].max(initial=0) <= 1:
        raise ValueError(f"{name}: train has no level above 1, expected grey levels 0..255")
    return from_grey(
        name,
        _three(images),
        values=values,
        dynamic=dynamic,
        seed=seed,
        labels=labels and _three(labels),
    )


def _three(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Train, valid and test: without a published `validation`, the end of `train` is held out."""
    train = arrays["train"]
    if "validation" in arrays:
        valid = arrays["validation"]
    else:
        held_out = 10_000 if len(train) >= 50_000 else len(train) // 10
        train, valid = np.split(train, [len(train) - held_out])
    return {"train": train, "valid": valid, "test": arrays["test"]}


def to_grey(images: np.ndarray, *, invert: bool = False) -> np.ndarray:
    """Returns uint8 `[n, 784]`: images of `[n, H, W, 1]` or `[n, H, W, 3]`, grey and 28 x 28.

    Args:
        images: uint8 levels 0..255.
        invert: turn black on white into white on black.
    """
    grey = images[..., 0] if images.shape[-1] == 1 else np.rint(images @ _LUMA / 1000)
    if grey.shape[1:] != (_SIDE, _SIDE):
        rows, columns = (_area_weights(size) for size in grey.shape[1:])
        # Until the division all numbers are whole and below 2**53: every machine gets the same
        # levels.
        total = rows @ grey.astype(np.float64) @ columns.T
        grey = np.rint(total / (grey.shape[1] * grey.shape[2]))
    levels = grey.astype(np.uint8)
    return flat(255 - levels if invert else levels)


def flat(images: np.ndarray) -> np.ndarray:
    """Returns images of `[n, ...]` as `[n, pixels]`."""
    return images.reshape(len(images), -1)


def read_images(
    name: str,
    data_dir: str | None,
    convert: Callable[[np.ndarray], np.ndarray],
    *,
    with_labels: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Reads the splits `train`, `test` and, if there is one, `validation`.

    Args:
        name: name in tensorflow-datasets.
        data_dir: where it keeps prepared sets; None: its default.
        convert: turns a batch of images, uint8 `[n, H, W, C]`, into rows.
        with_labels: read their labels, too.

    Returns:
        The converted rows by split, and their labels `[n]` by split, or None.

    Raises:
        ImportError: tensorflow-datasets, or one of its dependencies, is not installed.
        ValueError: there is no such set, its images are not of one size, or it has no labels and
            they are asked for.
        OSError: the set could not be prepared or read.
    """
    import tensorflow as tf  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]

    try:
        # tensorflow would otherwise take all the memory of the accelerator that JAX is to use.
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        pass  # tensorflow is already running: its devices are the caller's choice
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # unknown names, configs and versions each fail in their own way
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data set {name!r}: {_EXPECTED}, which says: {reason}") from error
    _check_features(name, builder.info.features, with_labels)
    with _told_as_oserror(f"prepare {name!r}"):
        builder.download_and_prepare()
    _check_splits(name, builder.info.splits)
    splits = [split for split in ("train", "validation", "test") if split in builder.info.splits]
    with _told_as_oserror(f"read {name!r}"):
        rows, labels = {}, {}
        for split in splits:
            # Unshuffled, so that every read has the same order.
            batches = builder.as_dataset(split=split, batch_size=_BATCH, shuffle_files=False)
            images, of_images = [], []
            for batch in tfds.as_numpy(batches):
                images.append(convert(batch["image"]))
                if with_labels:
                    of_images.append(batch["label"])
            rows[split] = np.concatenate(images)
            if with_labels:
                labels[split] = np.concatenate(of_images)
        return rows, labels or None


@contextlib.contextmanager
def _told_as_oserror(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, disk, protobuf and tensorflow errors have no common base
        raise OSError(f"tensorflow-datasets could not {action}: {error}") from error


def _check_features(name: str, features: Any, with_labels: bool) -> None:
    """Raises ValueError unless a set has images of one size, grey or RGB, in uint8, and labels."""
    keys = getattr(features, "keys", tuple)()
    image = features["image"] if "image" in keys else None
    shape, dtype = getattr(image, "shape", ()), getattr(image, "np_dtype", None)
    if len(shape) != 3 or None in shape or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise ValueError(
            f"{name}: expected a feature 'image' of one fixed size, uint8 (H, W, 1) or (H, W, 3); "
            f"tensorflow-datasets has {features}"
        )
    label = features["label"] if "label" in keys else None
    is_number = getattr(label, "shape", None) == () and np.issubdtype(
        getattr(label, "np_dtype", object), np.integer
    )
    if with_labels and not is_number:
        raise ValueError(
            f"{name}: expected a feature 'label', a whole number, to condition on; "
            f"tensorflow-datasets has {features}"
        )


def _check_splits(name: str, splits: Mapping[str, Any]) -> None:
    if not {"train", "test"} <= set(splits):
        raise ValueError(f"{name}: expected splits 'train' and 'test', found {sorted(splits)}")


def _area_weights(size: int) -> np.ndarray:
    """Returns `[28, size]`: how much of each pixel lies in each target pixel, in 28ths of a pixel.

    Each row sums to `size`.
    """
    target, source = np.arange(_SIDE)[:, None], np.arange(size)
    ends = np.minimum((target + 1) * size, (source + 1) * _SIDE)
    starts = np.maximum(target * size, source * _SIDE)
    return np.maximum(ends - starts, 0).astype(np.float64)
