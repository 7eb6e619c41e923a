import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, random_params

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def initialised_and_applied(flow, x):
    return map(np.asarray, jax.jit(lambda x: flow.apply(flow.init(KEY, x), x))(x))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(50,), (5, 10)])
@pytest.mark.parametrize("event_shape", [(3,), (2, 1, 2)])
def test_init_normalises_over_the_batch_axes(batch, event_shape):
    flow = flows.actnorm(event_ndims=len(event_shape))
    x = 4 + 3 * np.asarray(normal((*batch, *event_shape)))
    y, log_det = initialised_and_applied(flow, x)
    axes = tuple(range(len(batch)))
    np.testing.assert_allclose(y.mean(axes), np.zeros(event_shape), atol=1e-5)
    np.testing.assert_allclose(y.std(axes), np.ones(event_shape), rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(batch, -np.log(x.std(axes)).sum()), rtol=1e-5)


def test_without_batch_axes_it_starts_as_the_identity():
    x = 3 + np.asarray(normal((4,)))
    y, log_det = initialised_and_applied(flows.actnorm(), x)
    np.testing.assert_array_equal(y, x)
    assert log_det == 0


@pytest.mark.parametrize("x", [np.ones((8, 2)), np.full((8, 2), 0.1), np.array([[3.0, -7]])])
def test_constant_entries_and_single_rows_are_shifted_alone(x):
    y, log_det = initialised_and_applied(flows.actnorm(), x)
    np.testing.assert_allclose(y, np.zeros(x.shape), atol=1e-6)
    np.testing.assert_array_equal(log_det, np.zeros(len(x)))


def test_small_entries_are_scaled():
    y, _ = initialised_and_applied(flows.actnorm(), 1e-5 * np.asarray(normal((50, 2))))
    np.testing.assert_allclose(y.std(0), [1, 1], rtol=1e-4)


def test_formula(x64):
    params = {"shift": np.array([1.0, -2.0]), "log_scale": np.array([0.5, -1.0])}
    x = np.asarray(normal((3, 2)))
    y, log_det = jax.jit(flows.actnorm().apply)(params, x)
    np.testing.assert_allclose(y, (x + np.array([1, -2])) * np.exp([0.5, -1]))
    np.testing.assert_allclose(log_det, np.full(3, -0.5))


def test_wrong_event_shape():
    flow = flows.actnorm()
    params = random_params(flow.init, normal((5,)))
    for direction in (flow.apply, flow.inverse):
        for wrong in (np.zeros((3, 4)), np.zeros((3, 1)), np.zeros(())):
            with pytest.raises(ValueError, match=r"actnorm: expected .*\[\.\.\., 5\], got \("):
                direction(params, wrong)


def test_integers_are_the_floats_that_they_stand_for():
    flow = flows.actnorm()
    params = {"shift": np.array([0.5, -0.3]), "log_scale": np.array([0.2, -0.7])}

    @jax.jit
    def results(params):
        numbers = (np.array([3, 200], np.uint8), jnp.array([3.0, 200.0]))
        return [(flow.apply(params, x), flow.inverse(params, x)) for x in numbers]

    for found, wanted in zip(*map(jax.tree.leaves, results(params)), strict=True):
        np.testing.assert_array_equal(found, wanted)
