import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, assert_finite_where_representable, normal, randomise
from support.cases import smooth_made, smooth_mlp

from led_jax import densities, flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

BASES = {"normal": densities.standard_normal, "uniform": densities.uniform}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def test_normal_log_prob(x64):
    x = normal((50,), seed=3) * 4
    np.testing.assert_allclose(densities.normal_log_prob(x), scipy.stats.norm.logpdf(x))


@pytest.mark.parametrize("event_shape", [(), (1,), (4,), (2, 3)])
def test_bases_against_scipy(x64, event_shape):
    x = normal((5, 6, *event_shape))
    axes = tuple(range(2, x.ndim))
    expected = scipy.stats.norm.logpdf(x).sum(axes)
    np.testing.assert_allclose(densities.standard_normal(event_shape).log_prob((), x), expected)
    expected = scipy.stats.uniform.logpdf(x).sum(axes)
    actual = densities.uniform(event_shape).log_prob((), x)
    np.testing.assert_array_equal(actual, expected)
    inside = densities.uniform(event_shape).log_prob((), jax.random.uniform(KEY, x.shape))
    np.testing.assert_array_equal(inside, np.zeros((5, 6)))


@each_base
@pytest.mark.parametrize("event_shape", [(1,), (2, 3)])
def test_samples_of_bases(base, event_shape):
    density = base(event_shape)
    params = density.init(KEY, jnp.zeros(event_shape))
    x, log_prob = density.sample_and_log_prob(params, KEY, (20, 100))
    assert x.shape == (20, 100, *event_shape) and log_prob.shape == (20, 100)
    np.testing.assert_allclose(log_prob, density.log_prob(params, x), rtol=1e-6)
    reference = scipy.stats.norm if base is densities.standard_normal else scipy.stats.uniform
    assert scipy.stats.kstest(np.asarray(x).ravel(), reference.cdf).pvalue > 1e-3
    one, log_prob = density.sample_and_log_prob(params, KEY)
    assert one.shape == event_shape and log_prob.shape == ()
    other, _ = density.sample_and_log_prob(params, jax.random.key(1))
    assert np.all(other != one)


FLOWS = {
    "real_nvp": lambda: flows.real_nvp((2,), 3, hidden=(8,)),
    "iaf": lambda: flows.iaf((2,), 2, hidden=(8,), transformer=flows.affine),
    "maf": lambda: flows.invert(flows.iaf((2,), 2, hidden=(8,))),
    "coupling": lambda: flows.coupling(np.array([True, False]), smooth_mlp(), flows.gated),
    "identity": lambda: flows.chain(),
}
each_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)


def build(make, base, dim=2):
    density = densities.transformed(base((dim,)), make())
    params = jax.jit(density.init)(KEY, normal((dim,)))
    return density, randomise(params, 0.1)  # More gives tails that no grid holds.


def on_grid(density, params, n):
    """Log-densities at the middles of n x n cells that hold all but a bit of the mass."""
    x, _ = density.sample_and_log_prob(params, KEY, (4000,))
    low, high = np.asarray(x.min(0)), np.asarray(x.max(0))
    margin = 0.6 * (high - low)
    edges = [np.linspace(a, b, n + 1) for a, b in zip(low - margin, high + margin, strict=True)]
    middles = [(e[1:] + e[:-1]) / 2 for e in edges]
    points = np.stack(np.meshgrid(*middles, indexing="ij"), -1)
    log_prob = np.asarray(jax.jit(density.log_prob)(params, jnp.asarray(points)))
    area = np.prod([e[1] - e[0] for e in edges])
    return log_prob, area, edges


@each_flow
@each_base
def test_2d_densities_integrate_to_one(x64, make, base):
    density, params = build(make, base)
    log_prob, area, _ = on_grid(density, params, 500)
    # A uniform base has a jump at its border, which the grid resolves only to its spacing.
    tolerance = 1e-3 if base is densities.standard_normal else 1e-2
    assert abs(np.exp(log_prob).sum() * area - 1) < tolerance


@each_base
@pytest.mark.parametrize("invert", [False, True])
def test_1d_densities_integrate_to_one(x64, base, invert):
    flow = flows.chain(flows.actnorm(), flows.autoregressive(smooth_made((4,))))
    density, params = build(lambda: flows.invert(flow) if invert else flow, base, 1)
    _, log_det = flow.apply(params["flow"], jnp.zeros(1))
    assert abs(log_det) > 0.1
    x = np.linspace(-30, 30, 600_001)
    total = np.exp(density.log_prob(params, jnp.asarray(x)[:, None])).sum() * (x[1] - x[0])
    assert abs(total - 1) < 1e-3


@each_flow
@each_base
def test_samples_are_scored_as_log_prob_scores_them(make, base):
    density, params = build(make, base)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = sample(params, KEY, (3, 50))
    assert x.shape == (3, 50, 2) and log_prob.shape == (3, 50)
    again = np.asarray(density.log_prob(params, x))
    if base is densities.uniform:  # Rounding may carry a sample over the border, but very few.
        assert np.isfinite(again).mean() > 0.95
        log_prob, again = log_prob[np.isfinite(again)], again[np.isfinite(again)]
    np.testing.assert_allclose(again, log_prob, atol=1e-4)


@pytest.mark.parametrize("name", ["real_nvp", "maf"])
def test_samples_follow_the_density(x64, name):
    density, params = build(FLOWS[name], densities.standard_normal)
    log_prob, area, edges = on_grid(density, params, 400)
    x, _ = density.sample_and_log_prob(params, jax.random.key(5), (5000,))
    for axis in range(2):
        marginal = np.exp(log_prob).sum(1 - axis) * area
        cdf = np.concatenate([[0], np.cumsum(marginal)])
        test = scipy.stats.kstest(
            np.asarray(x)[:, axis], lambda v, e=edges[axis], c=cdf: np.interp(v, e, c)
        )
        assert test.pvalue > 1e-3
        # The base's own samples would not pass.
        assert scipy.stats.kstest(np.asarray(x)[:, axis], scipy.stats.norm.cdf).pvalue < 1e-6


def test_an_affine_flow_of_a_normal_is_scipys_normal(x64):
    """Additive couplings with linear networks are shears."""
    linear = flows.mlp((3,), activation=lambda x: x)
    flow = flows.chain(
        flows.coupling(np.array([True, False, False]), linear, flows.additive),
        flows.actnorm(),
        flows.coupling(np.array([False, True, True]), linear, flows.additive),
    )
    density = densities.transformed(densities.standard_normal((3,)), flow)
    params = randomise(density.init(KEY, normal((3,))), 0.5)
    mean = flow.apply(params["flow"], jnp.zeros(3))[0]
    matrix = (flow.apply(params["flow"], jnp.eye(3))[0] - mean).T
    expected = scipy.stats.multivariate_normal(mean, matrix @ matrix.T)
    x, log_prob = density.sample_and_log_prob(params, KEY, (4000,))
    np.testing.assert_allclose(log_prob, expected.logpdf(x), rtol=1e-9)
    np.testing.assert_allclose(density.log_prob(params, 2 * x), expected.logpdf(2 * x), rtol=1e-9)
    error = np.abs(x.mean(0) - mean) / np.sqrt(np.diag(expected.cov) / 4000)
    assert error.max() < 4
    np.testing.assert_allclose(np.cov(x.T), expected.cov, atol=0.15 * np.abs(expected.cov).max())


def test_transformed_has_parameters_of_both():
    density, params = build(lambda: flows.actnorm(), densities.standard_normal)
    assert set(params) == {"base", "flow"}
    nested = densities.transformed(density, flows.actnorm())
    params = randomise(nested.init(KEY, normal((5, 2))))
    x = normal((4, 2), seed=5)
    once, first = flows.actnorm().inverse(params["flow"], x)
    twice, second = flows.actnorm().inverse(params["base"]["flow"], once)
    expected = scipy.stats.norm.logpdf(twice).sum(-1) + first + second
    np.testing.assert_allclose(nested.log_prob(params, x), expected, rtol=1e-5)


@each_base
def test_gradients_reach_the_flow(base):
    density, params = build(FLOWS["real_nvp"], base)
    x, _ = density.sample_and_log_prob(params, KEY, (20,))
    x = jnp.where(jnp.isfinite(density.log_prob(params, x))[:, None], x, x[0])
    gradient = jax.jit(jax.grad(lambda p: density.log_prob(p, x).mean()))(params)
    leaves = jax.tree.leaves(gradient)
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(np.any(leaf != 0) for leaf in leaves) > len(leaves) / 2


@each_base
@pytest.mark.parametrize("name", ["identity", "real_nvp", "maf"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_far_out(base, name, dtype):
    """Log-densities and samples with their gradients, at points up to 1e6."""
    density, params = build(FLOWS[name], base)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), randomise(params, 1.0))
    x = (normal((5, 2), seed=3) * np.array([[0.1, 1, 1e3, 1e6, -1e6]]).T).astype(dtype)

    def scored(params, x):
        log_prob, gradient = jax.value_and_grad(density.log_prob, (0, 1))(params, x)
        # Outside of a uniform density -inf is what it is.
        is_outside = (log_prob == -jnp.inf) & (base is densities.uniform)
        return jnp.where(is_outside, 0, log_prob), gradient

    def sampled(params, x):
        del x
        return jax.value_and_grad(lambda params: density.sample_and_log_prob(params, KEY)[1])(
            params
        )

    assert_finite_where_representable(
        lambda params, x: [jax.vmap(f, (None, 0))(params, x) for f in (scored, sampled)],
        params,
        x,
        dtype=dtype,
    )


@each_base
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (4, 3)])
def test_wrong_event_shape(base, shape):
    with pytest.raises(ValueError, match=r"density: expected an input of shape \[\.\.\., 2\], got"):
        base((2,)).log_prob((), jnp.zeros(shape))
