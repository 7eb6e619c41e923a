import hashlib

import numpy as np
import pytest
from sklearn import datasets

from led_jax.data import binarize, cast, load

SPLITS = ("train", "valid", "test")


def packed_sha256(dataset) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(np.packbits(getattr(dataset, split), axis=1).tobytes())
    return digest.hexdigest()


def test_default_is_digits_with_golden_content():
    dataset = load()
    assert dataset.name == "digits" and dataset.image_shape == (8, 8) and dataset.prepare is cast
    assert [getattr(dataset, split).shape for split in SPLITS] == [(1297, 64), (250, 64), (250, 64)]
    for split in SPLITS:
        values = getattr(dataset, split)
        assert values.dtype == np.uint8 and set(np.unique(values)) == {0, 1}
    assert packed_sha256(dataset) == (
        "12ccbdd003167e219b78c2aff96f871185c22129136f0e58989b8cfeb825403c"
    )


def test_same_seed_same_arrays_other_seed_other_draw_of_the_same_images():
    first, again, other = load(seed=0), load(seed=0), load(seed=1)
    assert packed_sha256(first) == packed_sha256(again) != packed_sha256(other)
    for split in SPLITS:
        a, b = getattr(first, split), getattr(other, split)
        assert 0.05 < np.mean(a != b) < 0.25  # two unrelated images differ in about 0.35


def test_mean_of_many_draws_is_p():
    draws = np.stack([load(seed=seed).train for seed in range(64)])
    p = np.repeat(load(binarize="dynamic").train[None] / 255, 64, axis=0).mean(axis=0)
    error = draws.mean(axis=0) - p
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(draws.size) + 1e-3
    assert np.sqrt(np.mean(error**2)) == pytest.approx(np.sqrt(np.mean(p * (1 - p)) / 64), rel=0.03)


def test_train_images_are_scikit_learns_and_the_same_for_every_seed():
    levels = datasets.load_digits().data
    train = load(binarize="dynamic", seed=3).train
    np.testing.assert_array_equal(train, load(binarize="dynamic").train)
    rows = {row.tobytes() for row in np.floor(levels * 255 / 16 + 0.5).astype(np.uint8)}
    found = {row.tobytes() for row in train}
    assert found <= rows and len(found) == len(train) == 1297


def test_dynamic_keeps_grey_levels_in_train_alone():
    static, dynamic = load(), load(binarize="dynamic")
    assert dynamic.prepare is binarize and dynamic.train.dtype == np.uint8
    levels = np.unique(dynamic.train)
    np.testing.assert_array_equal(levels, [(510 * v + 16) // 32 for v in range(17)])
    assert levels[0] == 0 and levels[-1] == 255
    np.testing.assert_array_equal(dynamic.valid, static.valid)
    np.testing.assert_array_equal(dynamic.test, static.test)
    assert not static.train[dynamic.train == 0].any() and static.train[dynamic.train == 255].all()
