import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from led_jax.data import binarize, cast, load, tfds

SPLITS = ("train", "valid", "test")


def levels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 28, 28)).astype(np.uint8)


# Images to rows, without tensorflow.


@pytest.mark.parametrize(
    ("n", "held_out"), [(60_000, 10_000), (50_000, 10_000), (49_999, 4_999), (19_280, 1_928)]
)
def test_validation_is_the_end_of_train(n, held_out):
    train = np.zeros((n, 28, 28), np.uint8)
    train[n - held_out :] = 255
    dataset = tfds.from_images("toy", {"train": train, "test": levels(3)})
    assert len(dataset.train) == n - held_out and not dataset.train.any()
    assert len(dataset.valid) == held_out and dataset.valid.all()


def test_published_validation_split_is_used():
    images = {
        "train": levels(20),
        "validation": np.full((2, 28, 28), 255, np.uint8),
        "test": levels(3),
    }
    dataset = tfds.from_images("toy", images)
    assert len(dataset.train) == 20
    np.testing.assert_array_equal(dataset.valid, np.ones((2, 784)))


def test_static_draw_is_seeded_and_dynamic_changes_train_only():
    images = {"train": levels(200), "test": levels(20, seed=1)}
    static, again, other = (tfds.from_images("toy", images, seed=seed) for seed in (0, 0, 1))
    dynamic = tfds.from_images("toy", images, dynamic=True)
    assert dynamic.prepare is binarize and static.prepare is cast
    np.testing.assert_array_equal(dynamic.train, images["train"][:180].reshape(180, 784))
    for split in SPLITS:
        draw = getattr(static, split)
        assert set(np.unique(draw)) == {0, 1}
        np.testing.assert_array_equal(draw, getattr(again, split))
        assert np.any(draw != getattr(other, split))
        if split != "train":
            np.testing.assert_array_equal(draw, getattr(dynamic, split))
    assert static.train.mean() == pytest.approx(images["train"][:180].mean() / 255, abs=0.01)


def test_labels_go_with_their_rows():
    """Each image's grey level tells its label."""
    labels = {"train": np.arange(30) % 3, "test": np.arange(6) % 3}
    images = {
        key: np.repeat(100 * of_split + 55, 784).astype(np.uint8).reshape(-1, 28, 28)
        for key, of_split in labels.items()
    }
    dataset = tfds.from_images("toy", images, values="levels", labels=labels)
    for split, count in zip(SPLITS, (27, 3, 6), strict=True):
        rows, context = dataset.rows(split)
        assert rows.shape == (count, 784) and context.shape == (count, 3)
        np.testing.assert_array_equal(rows[:, 0], 100 * context.argmax(1) + 55)
    images["validation"], labels["validation"] = levels(2), np.array([2, 0])
    dataset = tfds.from_images("toy", images, values="levels", labels=labels)
    np.testing.assert_array_equal(dataset.rows("valid")[1], [[0, 0, 1], [1, 0, 0]])
    assert len(dataset.train) == 30
    with pytest.raises(ValueError, match=r"toy: expected labels of \['test', .* got \['test'\]"):
        tfds.from_images("toy", images, labels={"test": labels["test"]})
    with pytest.raises(ValueError, match="toy: labels of test are hidden"):
        tfds.from_images("toy", images, labels=labels | {"test": np.full(6, -1)})


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_split(missing):
    images = {"train": levels(20), "test": levels(3), "extra": levels(3)}
    del images[missing]
    with pytest.raises(
        ValueError, match=r"toy: expected splits 'train' and 'test', found \['extra"
    ):
        tfds.from_images("toy", images)


def test_binary_images_are_not_grey_levels():
    with pytest.raises(ValueError, match="no level above 1"):
        tfds.from_images("toy", {"train": levels(20) & 1, "test": levels(3)})


def test_train_too_small_to_hold_any_out():
    with pytest.raises(ValueError, match="toy: valid has shape"):
        tfds.from_images("toy", {"train": levels(9), "test": levels(3)})


def test_28_by_28_grey_is_left_as_it_is():
    images = levels(5).reshape(5, 28, 28, 1)
    rows = images.reshape(5, 784)
    np.testing.assert_array_equal(tfds.to_grey(images), rows)
    np.testing.assert_array_equal(tfds.to_grey(np.repeat(images, 3, axis=-1)), rows)
    np.testing.assert_array_equal(tfds.to_grey(images, invert=True), 255 - rows)


def test_colour_becomes_luminance():
    colours = np.zeros((4, 28, 28, 3), np.uint8)
    colours[[0, 1, 2], ..., [0, 1, 2]] = 255
    colours[3] = 255
    np.testing.assert_array_equal(tfds.to_grey(colours)[:, 0], [76, 150, 29, 255])


def test_area_average_by_hand():
    blocks = np.kron(levels(1).reshape(28, 28), np.ones((2, 3), np.uint8))
    np.testing.assert_array_equal(tfds.to_grey(blocks[None, ..., None]), levels(1).reshape(1, 784))
    # 42 pixels to 28: target 0 covers pixel 0 and half of pixel 1, target 1 the rest of both.
    ramp = np.zeros((1, 42, 28, 1), np.uint8)
    ramp[0, 0], ramp[0, 1], ramp[0, 2] = 30, 90, 210
    np.testing.assert_array_equal(tfds.to_grey(ramp).reshape(28, 28)[:3, 0], [50, 170, 0])


def test_omniglot_shape_of_dark_strokes():
    page = np.full((1, 105, 105, 3), 255, np.uint8)
    page[0, 30:45, 15:90] = 0  # target rows 8..11 and columns 4..23, whole
    rows = tfds.to_grey(page, invert=True).reshape(28, 28)
    expected = np.zeros((28, 28), np.uint8)
    expected[8:12, 4:24] = 255
    np.testing.assert_array_equal(rows, expected)


@settings(deadline=None, max_examples=30)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.just(2), st.integers(1, 110), st.integers(1, 110), st.sampled_from([1, 3])),
        elements=st.integers(0, 255),
    )
)
def test_resizing_keeps_mean_and_range(images):
    rows = tfds.to_grey(images)
    assert rows.shape == (2, 784) and rows.dtype == np.uint8
    grey = images @ (np.ones(1) if images.shape[-1] == 1 else np.array([0.299, 0.587, 0.114]))
    np.testing.assert_allclose(rows.mean(axis=1), grey.mean(axis=(1, 2)), atol=1.0 + 1e-9)
    assert rows.min() >= images.min() and rows.max() <= images.max()


# The real library.


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("tensorflow")
    return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def fakes(library):
    """Registers small sets with the library: three good ones, and bad ones."""

    class Fake(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")
        SHAPE, COUNTS = (28, 28, 1), {"train": 40, "test": 6}
        LABELLED = False
        pkg_dir_path = None

        def _info(self):
            features = {"image": library.features.Image(shape=self.SHAPE)}
            if self.LABELLED:
                features["label"] = library.features.ClassLabel(num_classes=3)
            return library.core.DatasetInfo(
                builder=self, features=library.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                split: self._generate_examples(n, seed)
                for seed, (split, n) in enumerate(self.COUNTS.items())
            }

        def _generate_examples(self, n, seed):
            for i, image in enumerate(images_of(self.SHAPE, n, seed)):
                label = {"label": int(image[0, 0, 0]) % 3} if self.LABELLED else {}
                yield i, {"image": image, **label}

    class FakeGrey(Fake):
        pass

    class FakePages(Fake):
        SHAPE, COUNTS = (105, 105, 3), {"train": 20, "test": 3, "validation": 4, "small1": 2}

    class FakeLabelled(Fake):
        LABELLED = True

    class FakeVarying(Fake):
        SHAPE = (None, None, 3)

    class FakeUntested(Fake):
        COUNTS = {"train": 20, "small1": 2}

    class FakeText(Fake):
        def _info(self):
            features = {"text": library.features.Text()}
            return library.core.DatasetInfo(
                builder=self, features=library.features.FeaturesDict(features)
            )

    class FakeBroken(Fake):
        def _split_generators(self, dl_manager):
            raise RuntimeError("the host is gone")


def images_of(shape, n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


def by_row(array):
    return array[np.lexsort(array.T)]


def test_library_set_by_name(fakes, tmp_path):
    static = load("fake_grey", data_dir=str(tmp_path))
    dynamic = load("fake_grey", data_dir=str(tmp_path), binarize="dynamic")
    again = load("fake_grey", data_dir=str(tmp_path))
    assert static.name == "fake_grey" and static.image_shape == (28, 28)
    assert [len(getattr(static, split)) for split in SPLITS] == [36, 4, 6]
    for split in SPLITS:
        np.testing.assert_array_equal(getattr(static, split), getattr(again, split))
    published = {row.tobytes() for row in images_of((28, 28, 1), 40, 0)}
    assert {row.tobytes() for row in dynamic.train} < published


def test_library_set_with_labels(fakes, tmp_path):
    dataset = load("fake_labelled", data_dir=str(tmp_path), binarize="dynamic", condition="labels")
    rows, context = dataset.rows("train")
    assert context.shape == (36, 3)
    np.testing.assert_array_equal(context.argmax(1), rows[:, 0] % 3)
    with pytest.raises(ValueError, match=r"(?s)fake_grey: expected a feature 'label'.*Image"):
        load("fake_grey", data_dir=str(tmp_path), condition="labels")


def test_library_set_of_another_shape(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_DARK_ON_LIGHT", ("fake_pages",))
    dataset = load("fake_pages:1.0.0", data_dir=str(tmp_path), binarize="dynamic")
    assert [len(getattr(dataset, split)) for split in SPLITS] == [20, 4, 3]
    expected = tfds.to_grey(images_of((105, 105, 3), 20, 0), invert=True)
    np.testing.assert_array_equal(by_row(dataset.train), by_row(expected))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fake_varying", ValueError, r"(?s)one fixed size.*\(None, None, 3\)"),
        ("fake_text", ValueError, r"(?s)expected a feature 'image'.*Text"),
        ("fake_untested", ValueError, r"expected splits .* found \['small1', 'train'\]"),
        ("fake_broken", OSError, "could not prepare 'fake_broken': the host is gone"),
        ("no_such_set", ValueError, "'no_such_set': expected digits, .* not found"),
        ("fake_grey:9.9.9", ValueError, "'fake_grey:9.9.9': expected"),
        ("../x", ValueError, "'../x': expected"),
    ],
)
def test_library_set_that_cannot_be_used(fakes, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load(name, data_dir=str(tmp_path))


def test_altered_record_is_an_error(fakes, tmp_path):
    load("fake_grey", data_dir=str(tmp_path))
    (record,) = tmp_path.glob("fake_grey/1.0.0/fake_grey-test.tfrecord*")
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 1
    record.write_bytes(content)
    with pytest.raises(OSError, match="could not read 'fake_grey'"):
        load("fake_grey", data_dir=str(tmp_path))


def test_real_binarized_mnist_from_the_library(library, real_amat_dir, real_rows, tmp_path):
    from tensorflow_datasets.core.download import resource

    builder = library.builder("binarized_mnist", data_dir=tmp_path)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for url, info in builder.url_infos.items():
        target = downloads / resource.get_dl_fname(url, info.checksum)
        target.symlink_to(real_amat_dir / info.filename)
        about = {"dataset_names": ["binarized_mnist"], "urls": [url]}
        target.with_name(target.name + ".INFO").write_text(json.dumps(about))
    builder.download_and_prepare(download_dir=downloads)
    dataset = load("binarized_mnist", data_dir=str(tmp_path))
    for split in SPLITS:
        found, expected = (
            np.packbits(rows[split] if rows is real_rows else getattr(rows, split), axis=1)
            for rows in (dataset, real_rows)
        )
        np.testing.assert_array_equal(by_row(found), by_row(expected))
