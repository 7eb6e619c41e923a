import numpy as np
import pytest

from led_jax.data import binarize, check_rows, fingerprint, from_arrays, load

RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 2, (40, 4, 3)).astype(bool)
GREY = RNG.integers(0, 256, (40, 4, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (12,)])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_three_arrays_of_any_shape_and_dtype(shape, dtype):
    x = BITS.reshape(-1, *shape).astype(dtype)
    dataset = from_arrays(x[:20], x[20:25], x[25:], name="mine")
    assert dataset.image_shape == shape and dataset.name == "mine"
    for rows, expected in ((dataset.train, x[:20]), (dataset.valid, x[20:25])):
        assert rows.dtype == np.uint8
        np.testing.assert_array_equal(rows, expected.reshape(-1, 12))
    np.testing.assert_array_equal(dataset.test, x[25:].reshape(-1, 12))


def test_numbers_between_zero_and_one_stay_what_they_are():
    dataset = from_arrays(GREY / 255)
    assert dataset.train.dtype == np.float32 and dataset.train.shape == (32, 12)
    assert set(dataset.train.ravel()) <= set((GREY / 255).astype(np.float32).ravel())


def test_a_split_is_a_partition_drawn_once_by_its_seed():
    x = np.arange(101)[:, None] / 101
    split = (0.5, 0.3, 0.2)
    first, again, other = (from_arrays(x, split=split, seed=seed) for seed in (0, 0, 1))
    parts = [first.train, first.valid, first.test]
    assert [len(part) for part in parts] == [50, 31, 20]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts), 0), x.astype(np.float32))
    np.testing.assert_array_equal(first.train, again.train)
    assert len(np.intersect1d(first.test, other.test)) < 15
    last = x[-20:].astype(np.float32)
    assert len(np.intersect1d(first.test, last)) < 15


def test_grey_levels_are_drawn_where_that_is_asked_for():
    x = np.tile(np.arange(256, dtype=np.uint8), (400, 1))
    dataset = from_arrays(x, x, x, prepare=binarize)
    np.testing.assert_array_equal(dataset.train, x)
    for rows in (dataset.valid, dataset.test):
        assert set(np.unique(rows)) == {0, 1}
        np.testing.assert_allclose(rows.mean(0), np.arange(256) / 255, atol=0.13)
    assert (dataset.valid != dataset.test).any()


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"train": GREY}, {}, "from 0 to 255, expected 0 and 1, or numbers in .*Bernoulli"),
        ({"train": -BITS.astype(int)}, {}, "values from -1 to 0, expected 0 and 1"),
        ({"train": BITS[0]}, {"split": (0.9, 0.05, 0.05)}, "leaves one of .* empty"),
        ({"train": BITS[:, 0, 0]}, {}, r"train has shape \[40\], expected \[n, H, W\]"),
        ({"train": BITS[None, :, None]}, {}, r"expected \[n, H, W\]"),
        ({"train": BITS[:0]}, {}, r"shape \[0, 4, 3\], expected .* n >= 1"),
        ({"train": BITS.astype(str)}, {}, "dtype <U5"),
        ({"train": BITS.astype(object)}, {}, "dtype object"),
        ({"train": np.full((9, 2), np.nan)}, {}, "18 values that are NaN .* row 0, entry 0"),
        (
            {"train": BITS, "test": BITS},
            {},
            "expected train, valid and test, or .* got train, test",
        ),
        ({"train": BITS, "valid": BITS, "test": BITS[:, :2]}, {}, r"test has shape \[40, 2, 3\]"),
        ({"train": BITS, "valid": BITS, "test": BITS[:0]}, {}, "test has shape .* n >= 1"),
        ({"train": BITS, "valid": BITS, "test": BITS}, {"split": (1, 1, 1)}, "and split="),
        ({"train": BITS}, {"split": (0.8, 0.2)}, "three positive parts"),
        ({"train": BITS}, {"split": (0.8, 0.3, -0.1)}, "three positive parts"),
        ({"train": BITS}, {"split": (0.8, 0.1, 0.2)}, "three positive parts of sum 1"),
        ({"train": BITS}, {"split": (np.nan, 0.1, 0.2)}, "three positive parts"),
        ({"train": BITS}, {"prepare": binarize}, "no level above 1"),
        ({"train": GREY / 2}, {"prepare": binarize}, "expected whole numbers 0..255"),
    ],
)
def test_what_is_wrong_is_said(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**arrays, **options)


@pytest.mark.parametrize(
    ("values", "good", "bad"),
    [
        ("unit", [0.5, 1.0], [0.5, 1.5]),
        ("levels", [3, 255.0], [0.5, 3]),
        ("real", [-1e30, 2], [1e300, 0]),
    ],
)
def test_each_kind_of_values(values, good, bad):
    np.testing.assert_allclose(check_rows("x", np.array([good]), values), np.float32([good]))
    with pytest.raises(ValueError, match="x has"):
        check_rows("x", np.array([bad]), values)


@pytest.mark.parametrize("values", ["below 300", "below 0", "below", "grey"])
def test_no_kind_of_values(values):
    """An entry of a row is a byte: categories above 255 would wrap to others."""
    with pytest.raises(ValueError, match=f"values is '{values}', expected 'below K' with a K from"):
        check_rows("x", np.zeros((2, 3)), values)


def test_a_file_is_its_arrays(tmp_path):
    np.savez(tmp_path / "mine.npz", train=BITS, train_labels=np.array([{}] * 40))
    expected = from_arrays(BITS, split=(0.6, 0.2, 0.2), seed=4, name="mine")
    for name, data_dir in ((f"{tmp_path}/mine.npz", None), ("mine.npz", str(tmp_path))):
        dataset = load(name, data_dir=data_dir, split=(0.6, 0.2, 0.2), seed=4)
        assert dataset.name == "mine" and dataset.image_shape == (4, 3)
        for found, array in zip(dataset[2:5], expected[2:5], strict=True):
            np.testing.assert_array_equal(found, array)
    np.savez(tmp_path / "three.npz", train=GREY, valid=GREY[:5], test=GREY[:7])
    dataset = load(f"{tmp_path}/three.npz", binarize="dynamic")
    assert dataset.prepare is binarize and len(dataset.test) == 7


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": BITS}, "expected arrays train, valid and test, or train alone.*it has images"),
        ({"train": BITS, "test": BITS}, "it has train, test"),
        ({"train": BITS, "extra": BITS}, "it has train, extra"),
        ({}, "it has none"),
        ({"train": np.array([{}] * 9)}, "train holds Python objects, which are never unpickled"),
        ({"train": GREY}, "mine: train has values from 0 to 255"),
    ],
)
def test_a_wrong_file(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(f"{tmp_path}/mine.npz")


def test_a_split_goes_with_a_file():
    with pytest.raises(ValueError, match="'digits' has splits of its own"):
        load("digits", split=(0.8, 0.1, 0.1))
    with pytest.raises(FileNotFoundError, match="mine.npz is not an existing file"):
        load("mine.npz")


def test_labels_go_with_their_rows():
    x = np.arange(60, dtype=np.float32)[:, None] / 60
    labels, split = np.arange(60) % 3 + 5, (0.5, 0.25, 0.25)
    dataset = from_arrays(x, split=split, seed=1, labels={"train": labels})
    whole = from_arrays(
        x[:30],
        x[30:40],
        x[40:],
        labels={"train": labels[:30], "valid": labels[30:40], "test": labels[40:]},
    )
    for data in (dataset, whole):
        for key in ("train", "valid", "test"):
            rows, context = data.rows(key)
            assert context.dtype == np.uint8
            own = np.rint(rows[:, 0] * 60).astype(int)
            np.testing.assert_array_equal(context, np.eye(3)[own % 3])
    covariates = from_arrays(x, split=split, seed=1, labels={"train": 10 * x})
    np.testing.assert_allclose(covariates.rows("test")[1], 10 * covariates.test)
    assert from_arrays(x).rows("train")[1:] == ()
    assert fingerprint(dataset) != fingerprint(dataset._replace(context=None))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": np.zeros(39, int)}, r"labels of train have shape \[39\], expected \[40\]"),
        ({"train": np.zeros(40)}, "labels of train have dtype float64, expected whole numbers"),
        ({"train": np.zeros((40, 2, 2))}, r"shape \[40, 2, 2\], expected \[40, 2\]"),
        ({"train": np.full((40, 2), np.nan)}, "labels of train have values that are NaN"),
        ({"valid": np.zeros(40, int)}, "expected labels of train, got them of valid"),
    ],
)
def test_labels_that_do_not_match(labels, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(BITS, labels=labels)


def test_labels_by_name(tmp_path):
    from sklearn import datasets

    images, digits = datasets.load_digits(return_X_y=True)
    dataset = load("digits", condition="labels")
    assert dataset.rows("valid")[1].shape == (250, 10)
    found = np.concatenate([dataset.rows(key)[1] for key in ("train", "valid", "test")])
    np.testing.assert_array_equal(found.sum(0), np.bincount(digits))
    # A pixel that distinguishes zeros from the other digits.
    middle = 8 * 4 + 4
    train, context = dataset.rows("train")
    mean = (images[digits == 0, middle] / 16).mean()
    assert abs(train[context[:, 0] == 1, middle].mean() - mean) < 0.1 < train[:, middle].mean()
    np.savez(tmp_path / "mine.npz", train=BITS, train_labels=np.arange(40) % 4)
    mine = load(f"{tmp_path}/mine.npz", condition="labels")
    assert mine.rows("train")[1].shape == (32, 4)
    np.savez(tmp_path / "mine.npz", train=BITS)
    with pytest.raises(ValueError, match="no array train_labels; it has train"):
        load(f"{tmp_path}/mine.npz", condition="labels")
    with pytest.raises(ValueError, match="'binarized_mnist' has no labels to condition on"):
        load("binarized_mnist", condition="labels")
    with pytest.raises(ValueError, match="condition is 'label', expected '' or 'labels'"):
        load(condition="label")
