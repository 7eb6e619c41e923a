import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from led_jax.flows import masks


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_random_half_marks_half(shape, seed):
    mask = masks.random_half(tuple(shape), seed)
    assert mask.dtype == bool and mask.shape == tuple(shape)
    assert mask.sum() == np.prod(shape) // 2
    np.testing.assert_array_equal(mask, masks.random_half(tuple(shape), seed))


def test_random_half_draws_another_mask_for_another_seed():
    drawn = {masks.random_half((50,), seed).tobytes() for seed in range(20)}
    assert len(drawn) == 20
    share = np.mean([masks.random_half((50,), seed) for seed in range(400)], axis=0)
    assert np.all(np.abs(share - 0.5) < 0.12)  # 4.8 standard errors.


def test_random_half_is_the_same_on_every_machine():
    assert np.flatnonzero(masks.random_half((10,), 0)).tolist() == [2, 3, 4, 6, 7]


def test_checkerboard():
    np.testing.assert_array_equal(
        masks.checkerboard((3, 4)), np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]], bool)
    )
    image = masks.checkerboard((3, 4, 2))
    assert image.dtype == bool and image.shape == (3, 4, 2)
    for c in range(2):
        np.testing.assert_array_equal(image[..., c], masks.checkerboard((3, 4)))


@pytest.mark.parametrize("shape", [(4,), (), (2, 2, 2, 2)])
def test_checkerboard_needs_rows_and_columns(shape):
    with pytest.raises(ValueError, match=r"expected an event_shape \[H, W\] or \[H, W, C\], got"):
        masks.checkerboard(shape)


def test_channel():
    mask = masks.channel((2, 1, 5))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.tile(np.array([1, 1, 0, 0, 0], bool), (2, 1, 1)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    size=st.one_of(st.integers(1, 90), st.integers(250, 600)),
    event_size=st.integers(1, 40),
    lowest=st.integers(0, 1),
)
def test_hidden_degrees_ascend_evenly_and_cover(size, event_size, lowest):
    degrees = masks.hidden_degrees(size, event_size, lowest=lowest)
    lowest = min(lowest, event_size - 1)
    assert degrees.shape == (size,) and np.issubdtype(degrees.dtype, np.integer)
    assert np.all(np.diff(degrees) >= 0)
    assert degrees[0] == lowest and degrees[-1] <= event_size - 1
    counts = np.bincount(degrees, minlength=event_size)[lowest:]
    wide = size >= 2 * len(counts) > 2
    for part in np.array_split(counts, 2) if wide else [counts]:
        assert part.max() - part.min() <= 1
    if wide:
        assert degrees[size // 2 - 1] < degrees[size // 2]
    if size >= event_size - lowest:
        assert set(degrees) == set(range(lowest, event_size))
