import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from led_jax.data.draws import bernoulli, random_words


def test_golden_words():
    assert random_words(0, 0, 2).tolist() == [11749869230777074271, 4976686463289251617]


@pytest.mark.parametrize("top", [1, 16, 255])
def test_frequencies_are_the_probabilities(top):
    n = 40_000
    levels = np.repeat(np.unique(np.linspace(0, top, 9).astype(np.uint8))[:, None], n, axis=1)
    means = bernoulli(levels, top, seed=0, stream=0).mean(axis=1)
    p = levels[:, 0] / top
    assert means[0] == 0 and means[-1] == 1
    np.testing.assert_array_less(abs(means - p), 5 * np.sqrt(p * (1 - p) / n) + 1e-12)


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_side=0, max_dims=3)),
    st.integers(0, 2**70),
    st.integers(0, 3),
)
def test_a_draw_is_binary_repeatable_and_certain_at_the_ends(levels, seed, stream):
    draw = bernoulli(levels, 255, seed=seed, stream=stream)
    assert draw.dtype == np.uint8 and draw.shape == levels.shape and np.all(draw <= 1)
    assert not draw[levels == 0].any() and draw[levels == 255].all()
    np.testing.assert_array_equal(draw, bernoulli(levels, 255, seed=seed, stream=stream))


def test_brighter_pixels_are_drawn_from_the_same_numbers():
    low, high = (np.full(1000, level, np.uint8) for level in (60, 200))
    assert np.all(bernoulli(low, 255, seed=1, stream=0) <= bernoulli(high, 255, seed=1, stream=0))


def test_seeds_and_streams_are_unrelated():
    levels = np.full(100_000, 8, np.uint8)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**32 + 1, 0)]
    draws = np.array([bernoulli(levels, 16, seed=seed, stream=stream) for seed, stream in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert abs(correlation).max() < 0.02
