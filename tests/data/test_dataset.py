from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import KEY

from led_jax.data import Dataset, binarize, cast, fingerprint
from led_jax.data.dataset import from_rows

GOOD = np.array([[0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0]], np.uint8)


GREY = {"prepare": binarize, "top": 255}


def make(train=GOOD, valid=GOOD, test=GOOD, *, name="toy", image_shape=(2, 3), **options):
    return from_rows(name, image_shape, train, valid, test, **options)


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int64, np.float32, np.float64])
def test_whole_numbers_of_any_dtype_become_uint8(dtype):
    dataset = make(GOOD.astype(dtype))
    assert dataset.train.dtype == np.uint8
    np.testing.assert_array_equal(dataset.train, GOOD)
    assert dataset.image_shape == (2, 3) and dataset.prepare is cast


def test_lists_are_arrays():
    np.testing.assert_array_equal(make(GOOD.tolist()).train, GOOD)


def test_grey_levels_are_allowed_in_train_only():
    grey = GOOD * 255
    np.testing.assert_array_equal(make(grey, **GREY).train, grey)
    with pytest.raises(ValueError, match="toy: train has values from 0 to 255, expected .*binariz"):
        make(grey)
    for split in ("valid", "test"):
        with pytest.raises(ValueError, match=f"toy: {split} has values from 0 to 255"):
            make(grey, **{split: grey}, **GREY)


def test_nan_and_infinity_are_named_with_their_place():
    bad = GOOD.astype(np.float32)
    bad[1, 4] = np.nan
    with pytest.raises(ValueError, match="valid has 1 NaN and 0 infinite.*row 1, pixel 4"):
        make(valid=bad)
    bad[0, 2] = np.inf
    with pytest.raises(ValueError, match="1 NaN and 1 infinite.*row 0, pixel 2"):
        make(valid=bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD[:, :5], r"shape \[2, 5\], expected \[n, 6\]"),
        (GOOD.reshape(2, 2, 3), r"shape \[2, 2, 3\]"),
        (GOOD[0], r"shape \[6\]"),
        (GOOD[:0], r"shape \[0, 6\].*n >= 1"),
        (np.float32(0.0), r"shape \[\]"),
        (GOOD.astype(str), "dtype <U"),
        (GOOD.astype(object), "dtype object"),
        (GOOD.astype(complex), "dtype complex"),
        (GOOD * 0.5, "values from 0.0 to 0.5"),
        (GOOD.astype(int) - 1, "values from -1 to 0"),
        (GOOD.astype(int) + 256, "values from 256 to 257"),
    ],
)
def test_bad_arrays_are_refused(bad, message):
    with pytest.raises(ValueError, match=f"toy: test has {message}"):
        make(test=bad)


@pytest.mark.parametrize("image_shape", [(6,), (2, 3, 1), (0, 6), (-2, -3)])
def test_bad_image_shape(image_shape):
    with pytest.raises(ValueError, match="image_shape"):
        make(image_shape=image_shape)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32]),
        st.tuples(st.integers(1, 3), st.integers(5, 7)),
        elements=st.integers(0, 3),
    ),
    st.sampled_from([1, 2, 255]),
)
def test_accepts_exactly_what_is_promised(array, top):
    promised = array.shape[1] == 6 and array.max() <= top
    if promised:
        np.testing.assert_array_equal(make(array, top=top).train, array)
    else:
        with pytest.raises(ValueError):
            make(array, top=top)


def test_cast_is_to_the_default_float(x64):
    for dtype in (np.uint8, np.int64, np.float32):
        batch = cast(KEY, jnp.asarray(GOOD, dtype))
        assert batch.dtype == jnp.float64
        np.testing.assert_array_equal(batch, GOOD)
    with jax.enable_x64(False):
        assert cast(KEY, jnp.asarray(GOOD)).dtype == jnp.float32


@pytest.mark.slow
def test_binarize_draws_afresh_with_the_levels_probabilities():
    levels = np.tile(np.array([0, 1, 64, 128, 254, 255], np.uint8), (20_000, 1))
    draw = jax.jit(binarize)(KEY, levels)
    assert draw.dtype == jnp.float32 and set(np.unique(draw)) == {0, 1}
    p = levels[0] / 255
    error = np.abs(draw.mean(0) - p)
    np.testing.assert_array_less(error, 5 * np.sqrt(p * (1 - p) / 20_000) + 1e-9)
    assert not draw[:, 0].any() and draw[:, 5].all()
    again, other = binarize(KEY, levels), binarize(jax.random.key(1), levels)
    np.testing.assert_array_equal(again, draw)
    assert 0.1 < np.mean(other != draw) < 0.3


def test_the_fingerprint_of_a_data_set_never_changes():
    """Checkpoints hold the fingerprint: with a new value here, all old ones would be refused."""
    assert fingerprint(make()) == "f980ad5bf012e5993fddd1e3499b901d50c596262b29af925947d89d4fd74038"


@pytest.mark.parametrize("prepare", [lambda key, rows: rows, partial(cast), partial(binarize)])
def test_what_prepares_the_rows_is_part_of_the_fingerprint(prepare):
    fingerprints = {fingerprint(make(prepare=p)) for p in (cast, binarize, prepare)}
    assert len(fingerprints) == 3


def test_fingerprint_sees_every_difference_and_nothing_else():
    flipped = GOOD.copy()
    flipped[0, 0] ^= 1
    different: list[Dataset] = [
        make(),
        make(flipped),
        make(valid=flipped),
        make(test=flipped),
        make(GOOD[::-1]),
        make(name="other"),
        make(image_shape=(3, 2)),
        make(prepare=binarize),
        make(train=np.concatenate([GOOD, GOOD[:1]]), valid=GOOD[1:]),
    ]
    assert len({fingerprint(dataset) for dataset in different}) == len(different)
    assert fingerprint(make(np.asfortranarray(GOOD.astype(np.int64)))) == fingerprint(make())
    assert fingerprint(make(np.repeat(GOOD, 2, axis=0)[::2])) == fingerprint(make())
