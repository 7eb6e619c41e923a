"""Named data sets of one file each: made-up files, and the real ones if they are available."""

from pathlib import Path

import numpy as np
import pytest

from led_jax.data import binarize, cast, load
from led_jax.data.files import NAMED

RNG = np.random.default_rng(0)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A directory with files of the published shapes, all zeros after the first 50 rows."""
    directory = tmp_path_factory.mktemp("named")
    for named in NAMED.values():
        shapes = {**named.shapes, **named.labels}
        arrays = {key: np.zeros(shape, np.uint8) for key, shape in shapes.items()}
        for array in arrays.values():
            top = 256 if array.ndim > 1 else 10
            array[:50] = RNG.integers(0, top, (50, *array.shape[1:]))
        np.savez_compressed(directory / named.file, **arrays)  # pyright: ignore
    return str(directory)


@pytest.mark.slow
def test_grey_levels_stay_or_are_drawn(data_dir):
    published = np.load(Path(data_dir, "mnist_grey.npz"))["train"].reshape(-1, 784)
    kept = load("mnist", data_dir=data_dir, values="scaled_levels")
    assert [len(getattr(kept, split)) for split in SPLITS] == [50_000, 10_000, 10_000]
    assert kept.image_shape == (28, 28)
    np.testing.assert_array_equal(kept.train, published[:50_000].astype(np.float32) / 255)
    static = load("mnist", data_dir=data_dir)
    dynamic = load("mnist", data_dir=data_dir, binarize="dynamic")
    assert static.prepare is cast and dynamic.prepare is binarize
    np.testing.assert_array_equal(dynamic.train, published[:50_000])
    assert set(np.unique(static.train)) == {0, 1}
    np.testing.assert_array_equal(static.test, dynamic.test)
    assert abs(static.train[:50].mean() - published[:50].mean() / 255) < 0.02


def test_silhouettes_are_inverted(data_dir):
    dataset = load("caltech101_silhouettes", data_dir=data_dir)
    packed = np.load(Path(data_dir, "caltech101_silhouettes_28_split1.npz"))
    np.testing.assert_array_equal(dataset.valid, 1 - np.unpackbits(packed["val"], axis=1))
    assert [len(getattr(dataset, split)) for split in SPLITS] == [4_100, 2_264, 2_307]


def test_faces_are_split_by_the_seed(data_dir):
    first, other = (
        load("freyfaces", data_dir=data_dir, values="scaled_levels", seed=seed) for seed in (0, 1)
    )
    assert first.image_shape == (28, 20)
    assert [len(getattr(first, split)) for split in SPLITS] == [1_565, 200, 200]
    assert (first.test != other.test).any()
    rows = np.concatenate([getattr(first, split) for split in SPLITS])
    published = np.load(Path(data_dir, "freyfaces.npz"))["images"].reshape(-1, 560) / 255
    np.testing.assert_array_equal(
        np.sort(rows, 0), np.sort(published.astype(np.float32), 0)
    )  # Each pixel's levels are all there.


@pytest.mark.parametrize(
    ("name", "file", "keys"),
    [
        ("mnist", "mnist_grey.npz", ("train", "test")),
        ("caltech101_silhouettes", "caltech101_silhouettes_28_split1.npz", ("train", "test")),
    ],
)
def test_labels_of_named_files(data_dir, name, file, keys):
    dataset = load(name, data_dir=data_dir, condition="labels")
    published = np.load(Path(data_dir, file))
    for key in keys:
        found = dataset.rows(key)[1].argmax(1)
        np.testing.assert_array_equal(found, published[f"{key}_labels"][: len(found)])
    assert dataset.rows("valid")[1].shape == (len(dataset.valid), 10)


def test_missing_and_altered_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="freyfaces.npz as --data_dir; data_dir is not giv"):
        load("freyfaces")
    with pytest.raises(FileNotFoundError, match="directory with the file caltech101_.* has none"):
        load("caltech101_silhouettes", data_dir=str(tmp_path))
    np.savez(tmp_path / "freyfaces.npz", images=np.zeros((3, 28, 20), np.uint8))
    with pytest.raises(ValueError, match=r"images is uint8 \(3, 28, 20\), expected uint8 \(1965,"):
        load("freyfaces", data_dir=str(tmp_path))


def test_values_that_the_data_do_not_have(data_dir):
    for name in ("caltech101_silhouettes", "digits", "binarized_mnist"):
        with pytest.raises(ValueError, match=f"{name}.* black and white"):
            load(name, data_dir=data_dir, values="scaled_levels")
    with pytest.raises(ValueError, match="black and white already.*binarize='dynamic'"):
        load("caltech101_silhouettes", data_dir=data_dir, binarize="dynamic")
    with pytest.raises(ValueError, match="freyfaces has no labels to condition on"):
        load("freyfaces", data_dir=data_dir, condition="labels")
    with pytest.raises(ValueError, match="binary pixels are no data for a likelihood"):
        load("mnist", data_dir=data_dir, values="scaled_levels", binarize="dynamic")


def test_the_published_files(real_dir):
    if not all(Path(real_dir, named.file).is_file() for named in NAMED.values()):
        pytest.skip("LED_JAX_DATA_DIR lacks one of the named files")
    faces = load("freyfaces", data_dir=real_dir, values="scaled_levels")
    assert round(255 * float(faces.train.min())) >= 8 and faces.train.max() < 1
    silhouettes = load("caltech101_silhouettes", data_dir=real_dir)
    # The object is 1 and fills the middle more than the border.
    images = silhouettes.train.reshape(-1, 28, 28)
    assert images[:, 12:16, 12:16].mean() > 0.6 > 0.2 > images[:, 0].mean()
    digits = load("mnist", data_dir=real_dir, binarize="dynamic")
    assert digits.train[0].max() == 255 and 0.1 < digits.test.mean() < 0.15
