from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support import KEY, normal, random_params

from led_jax import densities, flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_probit_is_the_normal_distribution_function(x64):
    x = np.linspace(-8, 8, 30).reshape(10, 3)
    y, log_det = jax.jit(flows.probit().apply)((), x)
    np.testing.assert_allclose(y, stats.norm.cdf(x), rtol=1e-12)
    np.testing.assert_allclose(log_det, stats.norm.logpdf(x).sum(-1), rtol=1e-12)


def of_numbers_and_borders(flow, x, borders):
    """What `apply` makes of x, and `inverse` of the borders of the support."""
    both = jax.jit(lambda x, borders: (*flow.apply((), x), *flow.inverse((), borders)))
    return map(np.asarray, both(x, borders))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probit_keeps_to_the_open_interval(dtype):
    x, borders = np.array([[-1e6], [-50], [0], [50], [1e6]], dtype), np.array([[0], [1]], dtype)
    y, log_det, again, _ = of_numbers_and_borders(flows.probit(), x, borders)
    assert y.dtype == log_det.dtype == dtype
    assert np.all((y > 0) & (y < 1)) and np.isfinite(log_det.astype(np.float32)).all()
    assert np.isfinite(again.astype(np.float32)).all() and again[0] < -2 and again[1] > 2


FAR = {jnp.float32: 60.0, jnp.float64: 500.0}
SUPPORTS = {
    "sigmoid": (flows.sigmoid(), 0.0, 1.0),
    "sigmoid-up-to-0": (flows.sigmoid(-3.0, 0.0), -3.0, 0.0),
    "sigmoid-wide": (flows.sigmoid(-2.0, 1e4), -2.0, 1e4),
    "softplus": (flows.softplus(), 0.0, np.inf),
    "softplus-from-5": (flows.softplus(5.0), 5.0, np.inf),
    "exp": (flows.exp(), 0.0, np.inf),
}
each_support = pytest.mark.parametrize(("flow", "low", "high"), SUPPORTS.values(), ids=SUPPORTS)


def test_a_density_is_zero_outside_of_its_support():
    for flow, outside in (
        (flows.exp(), [-3.0]),
        (flows.sigmoid(), [7.0]),
        (flows.probit(), [-0.1]),
        (flows.simplex(), [1.0, 1.0]),
        (flows.simplex(), [-0.5, 1.5]),
    ):
        density = densities.transformed(densities.logistic((1,)), flow)
        log_prob = jax.jit(partial(density.log_prob, {"base": (), "flow": ()}))
        assert np.asarray(log_prob(np.array(outside))) == -np.inf
        inside, _ = jax.jit(flow.apply)((), np.array([0.3]))
        assert np.isfinite(np.asarray(log_prob(inside)))


@pytest.mark.slow
@each_support
@pytest.mark.parametrize("dtype", FAR)
def test_log_dets_at_the_border_and_far_out(x64, flow, low, high, dtype):
    """Compares them with the log of the derivative in float64, by autodiff of the same map."""
    x = np.concatenate([np.linspace(-3, 3, 9), np.array([-1, 1]) * FAR[dtype]])[:, None]
    y, log_det = map(np.asarray, jax.jit(flow.apply)((), x.astype(dtype)))
    assert y.dtype == log_det.dtype == dtype
    assert np.all((low < y) & (y < high))

    def exact(x):  # Distance to the nearer border, which keeps its digits where y does not.
        if high == np.inf:
            return jnp.exp(x) if flow == flows.exp() else jnp.logaddexp(0.0, x)
        return (high - low) * jnp.exp(jnp.minimum(x, -x)) / (1 + jnp.exp(-jnp.abs(x)))

    slope = np.abs(jax.jit(jax.vmap(jax.grad(exact)))(x[:, 0]))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(log_det, np.log(slope), rtol=tolerance, atol=tolerance)
    # Back, where y still has the digits to tell x.
    near = np.abs(x[:, 0]) <= 3
    again, log_det_back = map(np.asarray, jax.jit(flow.inverse)((), y))
    lost = tolerance * (2e4 if flow == flows.sigmoid(-2.0, 1e4) else 20)
    np.testing.assert_allclose(again[near], x[near], rtol=lost, atol=lost)
    np.testing.assert_allclose(log_det_back[near], -log_det[near], rtol=lost, atol=lost)
    if low == 0:  # Floats near 0 keep all their digits, so that far points come back, too.
        np.testing.assert_allclose(again[-2], x[-2], rtol=tolerance)
        np.testing.assert_allclose(log_det_back[-2], -log_det[-2], rtol=tolerance)


@pytest.mark.slow
@each_support
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_supports_are_open(flow, low, high, dtype):
    x = np.array([[-1e6], [-200], [0], [200], [1e6]], dtype)
    borders = np.array([[low], [min(high, float(jnp.finfo(dtype).max))]], dtype)
    y, log_det, *back = of_numbers_and_borders(flow, x, borders)
    low, high = np.array([low, high], dtype)
    assert np.all((low < y) & (y < high)) and np.isfinite(log_det.astype(np.float32)).all()
    for part in back:
        assert np.isfinite(part.astype(np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_simplex_is_stick_breaking(x64, size):
    flow, x = flows.simplex(), 2 * np.asarray(normal((30, size)))

    @jax.jit
    def image_and_derivatives(x):
        derivatives = jax.vmap(jax.jacfwd(lambda x: flow.apply((), x)[0][:-1]))(x)
        return *flow.apply((), x), derivatives

    y, log_det, first = image_and_derivatives(x)
    left, shares = np.ones(30), []
    for i in range(size):
        shares.append(left / (1 + (size - i) * np.exp(-x[:, i])))
        left = left - shares[-1]
    np.testing.assert_allclose(y, np.stack([*shares, left], -1), rtol=1e-8)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(first)[1], rtol=1e-9)
    again, log_det_back = jax.jit(flow.inverse)((), y)
    np.testing.assert_allclose(again, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_det_back, -np.asarray(log_det), rtol=1e-9)


@pytest.mark.parametrize("dtype", FAR)
def test_simplex_far_out(x64, dtype):
    """Points where one entry has nearly all the mass, for each entry in turn."""
    x = FAR[dtype] / 4 * np.array([[1.0, 0, 0], [-1, 1, 0], [-1, -1, 1], [-1, -1, -1]])
    flow = jax.jit(flows.simplex().apply)
    y, log_det = map(np.asarray, flow((), x.astype(dtype)))
    assert np.all(y > 0) and np.all(np.diagonal(y) > 0.2)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(y.sum(-1), 1, rtol=tolerance)
    exact_y, exact = map(np.asarray, flow((), x))
    np.testing.assert_allclose(y, exact_y, rtol=10 * tolerance)
    np.testing.assert_allclose(log_det, exact, rtol=tolerance)
    np.testing.assert_allclose(log_det, np.log(exact_y).sum(-1), rtol=tolerance)
    again, log_det_back = jax.jit(flows.simplex().inverse)((), y)
    np.testing.assert_allclose(again, x, rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_allclose(log_det_back, -exact, rtol=tolerance)


@pytest.mark.slow
def test_a_density_on_the_simplex_integrates_to_one(x64):
    """A logistic-normal one of three entries, over the triangle of the first two."""
    base = densities.standard_normal((2,))
    density = densities.transformed(base, flows.chain(flows.actnorm(), flows.simplex()))
    params = random_params(density.init, np.zeros(2))
    n = 400
    edge = (np.arange(n) + 0.5) / n
    first, share = np.meshgrid(edge, edge, indexing="ij")
    second = (1 - first) * share
    points = np.stack([first, second, 1 - first - second], -1)
    log_prob = jax.jit(density.log_prob)
    probability = np.exp(log_prob(params, points)) * (1 - first)
    np.testing.assert_allclose(probability.sum() / n**2, 1, atol=1e-3)
    x, scores = jax.jit(density.sample_and_log_prob, static_argnums=2)(params, KEY, (50,))
    assert x.shape == (50, 3)
    np.testing.assert_allclose(scores, log_prob(params, x), rtol=1e-9)


def test_on_takes_its_columns_in_order_and_passes_the_rest(x64):
    scale = flows.on((3, 0), flows.chain(flows.exp(), flows.permute(np.array([1, 0]))))
    y, log_det = jax.jit(scale.apply)(((), ()), np.array([[1.0, 2, 3, 4]]))
    np.testing.assert_allclose(y, [[np.exp(4), 2, 3, np.exp(1)]])
    np.testing.assert_allclose(log_det, [5])


def of_zeros(direction, size):
    return jax.eval_shape(direction, (), np.zeros(size))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: flows.sigmoid(1.0, 1.0), "expected finite low < high, got 1.0 and 1.0"),
        (lambda: flows.sigmoid(0.0, np.inf), "expected finite low < high, got 0.0 and inf"),
        (lambda: flows.softplus(np.nan), "expected a finite low, got nan"),
        (lambda: flows.on((), flows.exp()), r"different integers from 0, got \[\]"),
        (lambda: flows.on((1, 1), flows.exp()), r"different integers from 0, got \[1, 1\]"),
        (lambda: flows.on((-1,), flows.exp()), r"different integers from 0, got \[-1\]"),
        (lambda: of_zeros(flows.on((2,), flows.exp()).apply, 2), "an entry 2, got"),
        (lambda: of_zeros(flows.on((0, 1), flows.simplex()).apply, 2), "must keep the shape"),
        (lambda: of_zeros(flows.simplex().inverse, 1), "two entries or more, got"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
