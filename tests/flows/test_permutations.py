import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import normal

from led_jax import flows


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(order=st.integers(1, 8).flatmap(lambda n: st.permutations(range(n))))
def test_permute(order):
    order = np.array(order)
    x = np.asarray(normal((3, len(order))))

    # A constant order, and a traced one, as a scan over layers passes it.
    @jax.jit
    def results(traced, x):
        both = flows.permute(order), flows.permute(traced)
        return [(*flow.apply((), x), flow.inverse((), x)[0]) for flow in both]

    for y, log_det, back in results(order, x):
        np.testing.assert_array_equal(y, x[:, order])
        np.testing.assert_array_equal(log_det, np.zeros(3))
        np.testing.assert_array_equal(back, x[:, np.argsort(order)])


def test_reverse():
    flow = flows.reverse()
    for direction in (flow.apply, flow.inverse):
        y, log_det = jax.jit(direction)((), np.arange(6.0).reshape(2, 3))
        np.testing.assert_array_equal(y, [[2, 1, 0], [5, 4, 3]])
        np.testing.assert_array_equal(log_det, [0, 0])


def test_no_parameters():
    x = normal((3,))
    assert flows.reverse().init(jax.random.key(0), x) == ()
    assert flows.permute(np.array([2, 0, 1])).init(jax.random.key(0), x) == ()


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2, 1, 1], [-1, 0], [[0, 1], [1, 0]]])
def test_not_a_permutation(order):
    with pytest.raises(ValueError, match=r"permute: order must be a permutation of 0\.\.\d, got"):
        flows.permute(np.array(order))


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1, 2]])
def test_wrong_width(order):
    flow = flows.permute(np.array(order))
    for direction in (flow.apply, flow.inverse):
        with pytest.raises(
            ValueError, match=r"permute: expected x of shape \[\.\.\., 3\], got \(2,\)"
        ):
            direction((), np.zeros(2))
