import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from support import (
    KEY,
    assert_finite_where_representable,
    gated_iaf,
    normal,
    random_params,
    randomise,
)
from support.cases import smooth_made, smooth_mlp

from led_jax import densities, flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

BASES = {"normal": densities.standard_normal, "uniform": densities.uniform}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def test_normal_log_prob(x64):
    x = 4 * np.asarray(normal((50,), seed=3))
    actual = jax.jit(densities.normal_log_prob)(x)
    np.testing.assert_allclose(actual, scipy.stats.norm.logpdf(x))


@pytest.mark.slow
@pytest.mark.parametrize("event_shape", [(), (1,), (4,), (2, 3)])
def test_bases_against_scipy(x64, event_shape):
    x = normal((5, 6, *event_shape))
    axes = tuple(range(2, x.ndim))
    expected = scipy.stats.norm.logpdf(x).sum(axes)
    actual = jax.jit(densities.standard_normal(event_shape).log_prob)((), x)
    np.testing.assert_allclose(actual, expected)
    expected = scipy.stats.uniform.logpdf(x).sum(axes)
    score = jax.jit(densities.uniform(event_shape).log_prob)
    np.testing.assert_array_equal(score((), x), expected)
    inside = score((), np.random.default_rng(0).random(x.shape))
    np.testing.assert_array_equal(inside, np.zeros((5, 6)))


@pytest.mark.slow
@each_base
@pytest.mark.parametrize("event_shape", [(1,), (2, 3)])
def test_samples_of_bases(base, event_shape):
    density = base(event_shape)
    params = density.init(KEY, np.zeros(event_shape))
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = sample(params, KEY, (20, 100))
    assert x.shape == (20, 100, *event_shape) and log_prob.shape == (20, 100)
    np.testing.assert_allclose(log_prob, jax.jit(density.log_prob)(params, x), rtol=1e-6)
    reference = scipy.stats.norm if base is densities.standard_normal else scipy.stats.uniform
    assert scipy.stats.kstest(np.asarray(x).ravel(), reference.cdf).pvalue > 1e-3
    one, log_prob = sample(params, KEY)
    assert one.shape == event_shape and log_prob.shape == ()
    other, _ = sample(params, jax.random.key(1))
    assert np.all(np.asarray(other) != one)


TAILS = {
    "student_t": (lambda shape: densities.student_t(shape, 2.5), scipy.stats.t(2.5)),
    "laplace": (densities.laplace, scipy.stats.laplace),
    "logistic": (densities.logistic, scipy.stats.logistic),
}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "reference"), TAILS.values(), ids=TAILS)
def test_bases_with_other_tails(x64, base, reference):
    density = base((2, 3))
    sample = jax.jit(density.sample_and_log_prob, static_argnums=(0, 2))
    x, log_prob = sample((), KEY, (20, 100))
    assert x.shape == (20, 100, 2, 3) and log_prob.shape == (20, 100)
    assert scipy.stats.kstest(np.asarray(x).ravel(), reference.cdf).pvalue > 1e-3
    np.testing.assert_allclose(log_prob, reference.logpdf(x).sum((-1, -2)), rtol=1e-10)
    # Quadrature over y with x = sinh(y), which reaches far out.
    y = np.linspace(-30, 30, 20_001)
    log_density = jax.jit(base((1,)).log_prob)((), np.sinh(y)[:, None])
    total = (np.exp(log_density) * np.cosh(y)).sum() * (y[1] - y[0])
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.slow
def test_a_product_is_its_parts_side_by_side(x64):
    flow = gated_iaf((2,), 1, hidden=(4,), context_dim=3)
    parts = (
        densities.transformed(densities.logistic((2,)), flow),
        densities.uniform((1,)),
        densities.mixture_of_normals((3,), 2),
    )
    density = densities.product(parts, (2, 1, 3))
    params = random_params(density.init, np.zeros(6), np.zeros(3))
    context = normal((5, 3))
    x, log_prob = jax.jit(density.sample_and_log_prob, static_argnums=2)(params, KEY, (4,), context)
    assert x.shape == (4, 5, 6) and log_prob.shape == (4, 5)

    @jax.jit
    def sum_of_parts(params, x):
        pieces = x[..., :2], x[..., 2:3], x[..., 3:]
        return sum(
            part.log_prob(own, piece, context)
            for part, own, piece in zip(parts, params, pieces, strict=True)
        )

    expected = sum_of_parts(params, x)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    actual = jax.jit(density.log_prob)(params, x, context)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: densities.student_t((2,), 0.0), "df must be a positive number, got 0.0"),
        (lambda: densities.student_t((2,), np.inf), "df must be a positive number, got inf"),
        (lambda: densities.product((), ()), "got 0 parts and sizes"),
        (lambda: densities.product((densities.laplace((2,)),), (2, 1)), "got 1 parts and sizes"),
        (lambda: densities.product((densities.laplace((2,)),), (0,)), r"got 1 parts and sizes \(0"),
    ],
)
def test_wrong_tails_and_products(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.slow
def test_standardised_is_the_density_in_the_datas_own_units(x64):
    rng = np.random.default_rng(0)
    x = rng.normal([100.0, -3], [20, 0.1], (200, 2))
    context = rng.normal(1e4, 50, (200, 3))
    context[:, 1] = 7  # Constant: shifted alone.
    inner = densities.transformed(densities.standard_normal((2,)), CONDITIONAL["maf"]())
    density = densities.standardised(inner)
    params = jax.jit(lambda: density.init(KEY, x, context))()
    params |= {"density": randomise(params["density"])}
    mean, std = x.mean(0), x.std(0)
    scale = np.array([context[:, 0].std(), 1, context[:, 2].std()])
    u, c = (x - mean) / std, (context - context.mean(0)) / scale
    expected = jax.jit(inner.log_prob)(params["density"], u, c) - np.log(std).sum()
    actual, gradient = jax.jit(
        jax.value_and_grad(lambda params: density.log_prob(params, x, context).mean())
    )(params)
    np.testing.assert_allclose(actual, expected.mean(), rtol=1e-9)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((gradient["x"], gradient["context"])))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["density"]))
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    samples, scores = sample(params, KEY, (30,), context[:5])
    assert samples.shape == (30, 5, 2)
    again = jax.jit(density.log_prob)(params, samples, context[:5])
    np.testing.assert_allclose(scores, again, rtol=1e-9)
    one = densities.standardised(densities.standard_normal((2,)))
    score = jax.jit(lambda x: one.log_prob(one.init(KEY, np.zeros(2)), x))
    np.testing.assert_allclose(score(np.ones(2)), -1 - math.log(2 * math.pi))


FLOWS = {
    "real_nvp": lambda: flows.real_nvp((2,), 3, hidden=(8,)),
    "iaf": lambda: flows.iaf((2,), 2, hidden=(8,), transformer=flows.affine),
    "maf": lambda: flows.invert(gated_iaf((2,), 2, hidden=(8,))),
    "coupling": lambda: flows.coupling(np.array([True, False]), smooth_mlp(), flows.gated),
    "identity": lambda: flows.chain(),
}
each_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)


CONDITIONAL = {
    "real_nvp": lambda: flows.real_nvp((2,), 3, hidden=(8,), context_dim=3),
    "maf": lambda: flows.invert(gated_iaf((2,), 2, hidden=(8,), context_dim=3)),
}


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf).astype(dtype)), tree)


@functools.partial(jax.jit, static_argnums=0)
def init(density, x):
    return density.init(KEY, x)


def build(make, base, dim=2, noise=0.1):
    density = densities.transformed(base((dim,)), make())
    params = init(density, normal((dim,)))
    return density, randomise(params, noise)  # More noise gives tails that no grid holds.


def draw(density, params, key, num_samples, context=None):
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    return np.asarray(sample(params, key, (num_samples,), context)[0])


def on_grid(density, params, n, context=None):
    """Log-densities at the middles of n x n cells that hold nearly all of the mass."""
    x = draw(density, params, KEY, 5000, context)
    low, high = x.min(0), x.max(0)
    margin = 0.6 * (high - low)
    edges = [np.linspace(a, b, n + 1) for a, b in zip(low - margin, high + margin, strict=True)]
    middles = [(e[1:] + e[:-1]) / 2 for e in edges]
    points = np.stack(np.meshgrid(*middles, indexing="ij"), -1)
    log_prob = np.asarray(jax.jit(density.log_prob)(params, points, context))
    area = np.prod([e[1] - e[0] for e in edges])
    return log_prob, area, edges


@pytest.mark.slow
@each_flow
@each_base
def test_2d_densities_integrate_to_one(x64, make, base):
    density, params = build(make, base)
    log_prob, area, _ = on_grid(density, params, 500)
    # A uniform base has a jump at its border, which the grid resolves only to its spacing.
    tolerance = 1e-3 if base is densities.standard_normal else 1e-2
    assert abs(np.exp(log_prob).sum() * area - 1) < tolerance


@pytest.mark.slow
@each_base
@pytest.mark.parametrize("invert", [False, True])
def test_1d_densities_integrate_to_one(x64, base, invert):
    flow = flows.chain(flows.actnorm(), flows.autoregressive(smooth_made((4,))))
    density, params = build(lambda: flows.invert(flow) if invert else flow, base, 1, 0.3)
    _, log_det = jax.jit(flow.apply)(params["flow"], np.zeros(1))
    # A log-determinant of the wrong sign would be off by twice this, far above the tolerance.
    assert abs(log_det) > 0.02
    x = np.linspace(-30, 30, 600_001)
    log_prob = jax.jit(density.log_prob)(params, x[:, None])
    total = np.exp(log_prob).sum() * (x[1] - x[0])
    assert abs(total - 1) < 1e-3


@pytest.mark.slow
@each_flow
@each_base
def test_samples_are_scored_as_log_prob_scores_them(make, base):
    density, params = build(make, base)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = sample(params, KEY, (3, 50))
    assert x.shape == (3, 50, 2) and log_prob.shape == (3, 50)
    log_prob, again = np.asarray(log_prob), np.asarray(jax.jit(density.log_prob)(params, x))
    if base is densities.uniform:  # Rounding may carry a sample over the border, but very few.
        assert np.isfinite(again).mean() > 0.95
        log_prob, again = log_prob[np.isfinite(again)], again[np.isfinite(again)]
    np.testing.assert_allclose(again, log_prob, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_nvp", "maf"])
def test_samples_follow_the_density(x64, name):
    density, params = build(FLOWS[name], densities.standard_normal)
    log_prob, area, edges = on_grid(density, params, 400)
    x = draw(density, params, jax.random.key(5), 5000)
    for axis in range(2):
        marginal = np.exp(log_prob).sum(1 - axis) * area
        cdf = np.concatenate([[0], np.cumsum(marginal)])
        test = scipy.stats.kstest(x[:, axis], lambda v, e=edges[axis], c=cdf: np.interp(v, e, c))
        assert test.pvalue > 1e-3
        # Samples of the base would not pass the test above.
        assert scipy.stats.kstest(x[:, axis], scipy.stats.norm.cdf).pvalue < 1e-6


@pytest.mark.slow
def test_an_affine_flow_of_a_normal_is_scipys_normal(x64):
    """Additive couplings with linear networks are shears."""
    linear = flows.mlp((3,), activation=lambda x: x)
    flow = flows.chain(
        flows.coupling(np.array([True, False, False]), linear, flows.additive),
        flows.actnorm(),
        flows.coupling(np.array([False, True, True]), linear, flows.additive),
    )
    density = densities.transformed(densities.standard_normal((3,)), flow)
    params = random_params(density.init, normal((3,)), scale=0.5)
    images, _ = jax.jit(flow.apply)(params["flow"], np.concatenate([np.zeros((1, 3)), np.eye(3)]))
    mean = np.asarray(images)[0]
    matrix = (np.asarray(images)[1:] - mean).T
    expected = scipy.stats.multivariate_normal(mean, matrix @ matrix.T)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = jax.device_get(sample(params, KEY, (4000,)))
    np.testing.assert_allclose(log_prob, expected.logpdf(x), rtol=1e-9)
    log_prob = jax.jit(density.log_prob)(params, 2 * x)
    np.testing.assert_allclose(log_prob, expected.logpdf(2 * x), rtol=1e-9)
    error = np.abs(x.mean(0) - mean) / np.sqrt(np.diag(expected.cov) / 4000)
    assert error.max() < 4
    np.testing.assert_allclose(np.cov(x.T), expected.cov, atol=0.15 * np.abs(expected.cov).max())


def test_transformed_has_parameters_of_both():
    density, params = build(lambda: flows.actnorm(), densities.standard_normal)
    assert set(params) == {"base", "flow"}
    nested = densities.transformed(density, flows.actnorm())
    params = random_params(nested.init, normal((5, 2)))
    x = normal((4, 2), seed=5)
    inverse = jax.jit(flows.actnorm().inverse)
    once, first = inverse(params["flow"], x)
    twice, second = inverse(params["base"]["flow"], once)
    expected = scipy.stats.norm.logpdf(twice).sum(-1) + np.asarray(first) + np.asarray(second)
    np.testing.assert_allclose(jax.jit(nested.log_prob)(params, x), expected, rtol=1e-5)


@pytest.mark.slow
@each_base
def test_gradients_reach_the_flow(base):
    density, params = build(FLOWS["real_nvp"], base)
    x = draw(density, params, KEY, 20)
    x = np.where(np.isfinite(jax.jit(density.log_prob)(params, x))[:, None], x, x[0])
    gradient = jax.jit(jax.grad(lambda p: density.log_prob(p, x).mean()))(params)
    leaves = jax.tree.leaves(gradient)
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(np.any(leaf) for leaf in leaves) > len(leaves) / 2


@pytest.mark.slow
@each_base
@pytest.mark.parametrize("name", ["identity", "real_nvp", "maf"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_far_out(base, name, dtype):
    """Log-densities and samples with their gradients, at points up to 1e6."""
    density = densities.transformed(base((2,)), FLOWS[name]())
    params = cast(random_params(density.init, np.zeros(2), scale=1.0), dtype)
    x = np.asarray(normal((5, 2), seed=3)) * np.array([[0.1, 1, 1e3, 1e6, -1e6]]).T

    def scored(params, x):
        log_prob, gradient = jax.value_and_grad(density.log_prob, (0, 1))(params, x)
        # Outside of a uniform density -inf is right.
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
        x.astype(dtype),
        dtype=dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_context_conditions_samples_and_scores_alike(x64, name):
    density = densities.transformed(densities.standard_normal((2,)), CONDITIONAL[name]())
    context = np.asarray(normal((4, 3), seed=3))
    params = random_params(density.init, normal((2,)), context[0], scale=0.1)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    log_prob = jax.jit(density.log_prob)
    for sample_shape in ((), (5,), (2, 3)):
        x, scores = sample(params, KEY, sample_shape, context)
        assert x.shape == (*sample_shape, 4, 2) and scores.shape == (*sample_shape, 4)
        np.testing.assert_allclose(log_prob(params, x, context), scores, rtol=1e-9)
        # Another row's context is another density.
        others = np.asarray(log_prob(params, x, context[::-1]))
        assert np.all(np.abs(others - scores) > 1e-6)
    for row in context[:3]:
        on_cells, area, _ = on_grid(density, params, 300, row)
        assert abs(np.exp(on_cells).sum() * area - 1) < 1e-3


@each_base
def test_bases_ignore_a_context_but_draw_for_each_of_its_rows(base):
    density = base((2, 2))
    x, log_prob = density.sample_and_log_prob((), KEY, (3,), np.zeros((4, 5, 7)))
    assert x.shape == (3, 4, 5, 2, 2) and log_prob.shape == (3, 4, 5)
    assert len(np.unique(x)) > 100
    np.testing.assert_array_equal(density.log_prob((), x, np.ones((4, 5, 7))), log_prob)


def mixture(event_shape, num_components=4, location=0.0, scale=1.0, spread=2.0):
    """A mixture of unequal parts, and its parameters."""
    density = densities.mixture_of_normals(event_shape, num_components)
    shape = (num_components, *event_shape)
    params = {
        "logits": np.asarray(normal((num_components,), seed=1)),
        "mean": location + spread * scale * np.asarray(normal(shape, seed=2)),
        "log_std": math.log(scale) + 0.3 * np.asarray(normal(shape, seed=3)),
    }
    return density, params


def mixture_log_prob(params, x, event_ndims):
    """The direct sum over components, in float64."""
    logits, mean, log_std = (
        np.asarray(params[name], np.float64) for name in ("logits", "mean", "log_std")
    )
    weights = np.exp(logits) / np.exp(logits).sum()
    axes = tuple(range(-event_ndims, 0))
    parts = [
        weight * np.exp(scipy.stats.norm.logpdf(np.asarray(x, np.float64), m, s).sum(axes))
        for weight, m, s in zip(weights, mean, np.exp(log_std), strict=True)
    ]
    return np.log(sum(parts))


@pytest.mark.slow
@pytest.mark.parametrize("batch_shape", [(), (5,), (0,), (2, 3)])
@pytest.mark.parametrize("event_shape", [(1,), (3,), (2, 2)])
def test_a_mixture_is_the_sum_of_its_components(x64, event_shape, batch_shape):
    density, params = mixture(event_shape)
    x = 2 * np.asarray(normal((*batch_shape, *event_shape), seed=5))
    score = jax.jit(density.log_prob)
    actual = score(params, x)
    assert actual.shape == batch_shape
    np.testing.assert_allclose(actual, mixture_log_prob(params, x, len(event_shape)), rtol=1e-10)
    # A constant added to the logits changes nothing.
    shifted = params | {"logits": params["logits"] + 100}
    np.testing.assert_allclose(score(shifted, x), actual, rtol=1e-10)


@pytest.mark.slow
def test_mixtures_integrate_to_one(x64):
    density, params = mixture((1,))
    x = np.linspace(-20, 20, 10_001)
    log_prob = jax.jit(density.log_prob)(params, x[:, None])
    total = np.exp(log_prob).sum() * (x[1] - x[0])
    assert abs(total - 1) < 1e-9
    density, params = mixture((2,))
    log_prob, area, _ = on_grid(density, params, 400)
    assert abs(np.exp(log_prob).sum() * area - 1) < 1e-6


@pytest.mark.slow
def test_a_mixture_under_a_linear_flow_is_a_mixture(x64):
    """As the base of a flow: each component's mean and covariance are mapped."""
    flow = flows.lu((2,))
    density = densities.transformed(densities.mixture_of_normals((2,), 3), flow)
    params, z = random_params(density.init, normal((5, 2))), normal((7, 2), seed=5)
    base = jax.device_get(params["base"])
    jacobian = jax.jit(jax.jacfwd(lambda x: flow.apply(params["flow"], x)[0]))
    matrix = np.asarray(jacobian(np.zeros(2)))
    weights = np.exp(base["logits"]) / np.exp(base["logits"]).sum()
    expected = sum(
        w * scipy.stats.multivariate_normal(matrix @ m, (matrix * np.exp(2 * s)) @ matrix.T).pdf(z)
        for w, m, s in zip(weights, base["mean"], base["log_std"], strict=True)
    )
    log_prob = jax.jit(density.log_prob)(params, z)
    np.testing.assert_allclose(np.exp(log_prob), expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("event_shape", [(3,), (2, 2)])
def test_samples_of_a_mixture_have_its_moments(event_shape):
    density, params = mixture(event_shape)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = sample(params, KEY, (20_000,))
    assert x.shape == (20_000, *event_shape)
    again = jax.jit(density.log_prob)(params, x)
    np.testing.assert_allclose(log_prob, again, rtol=1e-4, atol=1e-5)
    weights = scipy.special.softmax(np.asarray(params["logits"], np.float64))
    means = np.asarray(params["mean"], np.float64).reshape(4, -1)
    variances = np.exp(2 * np.asarray(params["log_std"], np.float64)).reshape(4, -1)
    mean = weights @ means
    cov = np.diag(weights @ variances) + (means - mean).T @ np.diag(weights) @ (means - mean)
    x = np.asarray(x, np.float64).reshape(20_000, -1)
    assert np.max(np.abs(x.mean(0) - mean) / np.sqrt(np.diag(cov) / 20_000)) < 4
    np.testing.assert_allclose(np.cov(x.T), cov, atol=0.05 * np.diag(cov).max())
    one, log_prob = sample(params, KEY, (), np.zeros((6, 2)))
    assert one.shape == (6, *event_shape) and log_prob.shape == (6,)


@pytest.mark.slow
def test_a_mixture_far_from_the_origin_is_accurate():
    """Means of 1,000 and deviations of 0.1 in float32: expanded squares would be all rounding."""
    density, params = mixture((2,), location=1e3, scale=0.1)
    sample = jax.jit(density.sample_and_log_prob, static_argnums=2)
    x, log_prob = sample(params, KEY, (2000,))
    expected = mixture_log_prob(params, x, 1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    again = jax.jit(density.log_prob)(params, x)
    np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)
    assert expected.mean() > -1  # Only at a scale as small as 0.1.
    points = np.array([[-1e6, 1e6], [0.0, 0.0], [1e3, 1e3]])
    with_gradients = jax.jit(jax.vmap(jax.value_and_grad(density.log_prob, (0, 1)), (None, 0)))
    value, gradient = with_gradients(params, points)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


@pytest.mark.slow
def test_a_mixture_starts_on_rows_of_the_data():
    rows = 10 * np.asarray(normal((50, 2)))
    for num_components in (3, 60):  # Fewer than the rows, or more.
        params = jax.device_get(init(densities.mixture_of_normals((2,), num_components), rows))
        distance = np.linalg.norm(params["mean"][:, None] - rows, axis=-1)
        assert distance.min(1).max() < 0.1
        assert len(set(distance.argmin(1))) > num_components / 3
        assert not np.any(params["logits"]) and not np.any(params["log_std"])
    # Without rows to choose from, means are around the only row, or around 0.
    for x, center in ((np.full(2, 500.0), 500), (np.full((1, 2), 500.0), 500), (rows[:0], 0)):
        mean = np.asarray(init(densities.mixture_of_normals((2,), 9), x)["mean"])
        assert mean.shape == (9, 2) and len(np.unique(mean[:, 0])) == 9
        assert np.abs(mean - center).max() < 5


def test_a_mixture_has_components():
    with pytest.raises(ValueError, match="num_components must be positive, got 0"):
        densities.mixture_of_normals((2,), 0)


def resampled_line(num_draws=100_000, num_attempts=5):
    """A resampled normal that accepts few draws near its mean."""
    density = densities.resampled((1,), hidden=(2,), num_draws=num_draws, num_attempts=num_attempts)
    layers = {
        "dense_0": {"kernel": [[2.0, -3.0]], "bias": [-0.5, -1.0]},
        "dense_1": {"kernel": [[2.0], [1.0]], "bias": [-3.0]},
    }
    is_list = lambda leaf: isinstance(leaf, list)  # noqa: E731
    return density, {"base": (), "acceptance": jax.tree.map(np.array, layers, is_leaf=is_list)}


LINE = np.linspace(-9, 9, 20_001)


def acceptance(params, x):
    """a(x) by hand, for the rows `[n, D]`."""
    layers = params["acceptance"]
    h = np.maximum(x @ layers["dense_0"]["kernel"] + layers["dense_0"]["bias"], 0)
    return scipy.special.expit(h @ layers["dense_1"]["kernel"] + layers["dense_1"]["bias"])[:, 0]


@pytest.mark.slow
def test_a_resampled_density_by_quadrature(x64):
    """Acceptance rate, formula and integral with many draws, and the error with few draws."""
    density, params = resampled_line()
    normal, a = scipy.stats.norm.pdf(LINE), acceptance(params, LINE[:, None])
    cell = LINE[1] - LINE[0]
    rate = (normal * a).sum() * cell
    assert 0.05 < rate < 0.6
    estimate = jax.jit(densities.acceptance_rate, static_argnums=(0, 3))
    found, error = map(float, estimate(density, params, KEY, 50_000))
    assert abs(found - rate) < 4 * error < 0.1 * rate
    refusal = 1 - rate
    expected = normal * (a * (refusal ** np.arange(4)).sum() + refusal**4)
    np.testing.assert_allclose(expected.sum() * cell, 1, rtol=1e-6)
    assert np.abs(expected - normal).sum() * cell > 0.3
    actual = np.exp(jax.jit(density.log_prob)(params, LINE[:, None]))
    bound = np.sqrt((1 - rate) / (rate * 100_000))
    np.testing.assert_allclose(actual, expected, rtol=4 * bound)
    np.testing.assert_allclose(actual.sum() * cell, 1, rtol=4 * bound)
    few, _ = resampled_line(num_draws=200)
    ratio = np.exp(jax.jit(few.log_prob)(params, LINE[:, None])) / expected
    assert 1e-4 < np.abs(ratio - 1).max() < 4 * np.sqrt((1 - rate) / (rate * 200))
    with pytest.raises(ValueError, match="expected a resampled density .* standard_normal"):
        densities.acceptance_rate(densities.standard_normal((1,)), (), KEY, 10)


@pytest.mark.slow
def test_samples_of_a_resampled_density(x64):
    density, params = resampled_line()
    x, log_prob = jax.jit(density.sample_and_log_prob, static_argnums=2)(params, KEY, (5000,))
    score = jax.jit(density.log_prob)
    np.testing.assert_allclose(log_prob, score(params, x), rtol=1e-9)
    cumulative = np.cumsum(np.exp(score(params, LINE[:, None]))) * (LINE[1] - LINE[0])
    cdf = lambda z: np.interp(z, LINE, cumulative)  # noqa: E731
    assert scipy.stats.kstest(np.asarray(x)[:, 0], cdf).pvalue > 1e-3
    assert scipy.stats.kstest(np.asarray(x)[:, 0], scipy.stats.norm.cdf).pvalue < 1e-9


def test_a_fresh_resampled_density_learns():
    """Its acceptance is 1/2 everywhere, and has a gradient all the same."""
    density, x = densities.resampled((2,), hidden=(4,)), 0.3 * normal((50, 2))
    params = density.init(KEY, x)
    gradient = jax.jit(jax.grad(lambda p: density.log_prob(p, x).mean()))(params)
    assert np.abs(gradient["acceptance"]["dense_1"]["kernel"]).max() > 0.01


@pytest.mark.slow
def test_gradients_of_a_resampled_density_see_the_normaliser(x64):
    """Against gradients of the same formula with the rate by quadrature."""
    density, params = resampled_line(1_000_000, num_attempts=30)
    rows, line = np.linspace(-1, 2, 9)[:, None], LINE[:, None]

    def log_acceptance(params, x):
        layers = params["acceptance"]
        h = jax.nn.relu(x @ layers["dense_0"]["kernel"] + layers["dense_0"]["bias"])
        logit = h @ layers["dense_1"]["kernel"] + layers["dense_1"]["bias"]
        return jax.nn.log_sigmoid(logit[:, 0])

    def exact(params):
        weights = jnp.exp(densities.normal_log_prob(line[:, 0])) * (LINE[1] - LINE[0])
        refusal = 1 - (weights * jnp.exp(log_acceptance(params, line))).sum()
        attempts = sum(refusal**k for k in range(29))
        a = jnp.exp(log_acceptance(params, rows))
        return jnp.log(a * attempts + refusal**29).mean()

    found = jax.jit(jax.grad(lambda p: density.log_prob(p, rows).mean()))(params)
    expected = jax.jit(jax.grad(exact))(params)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max() + 1e-3)
    moved = jax.tree.map(lambda leaf: leaf + 1e-9, params)
    score = jax.jit(density.log_prob)
    change = np.asarray(score(moved, rows)) - np.asarray(score(params, rows))
    assert 1e-6 < np.abs(change).max() < 0.05  # Other draws, too: 1e-9 alone changes less.


@pytest.mark.slow
def test_a_resampled_density_of_a_context_and_a_flow_as_its_base():
    base = densities.transformed(densities.standard_normal((2, 1)), flows.lu((2, 1)))
    density = densities.resampled((2, 1), base, (4,), num_draws=30, context_dim=3)
    x, context = normal((5, 4, 2, 1)), np.asarray(normal((4, 3), seed=3))
    params = random_params(density.init, x, context, scale=1.0)
    score = jax.jit(density.log_prob)
    log_prob = np.asarray(score(params, x, context))
    assert log_prob.shape == (5, 4)
    assert np.abs(score(params, x, context + 1) - log_prob).max() > 0.1
    z, log_prob = jax.jit(density.sample_and_log_prob, static_argnums=2)(params, KEY, (6,), context)
    assert z.shape == (6, 4, 2, 1)
    np.testing.assert_allclose(log_prob, score(params, z, context), atol=1e-4)
    for attempts, draws in ((1, 9), (2, 0)):
        with pytest.raises(ValueError, match=f"got {attempts} and {draws}"):
            densities.resampled((2,), num_attempts=attempts, num_draws=draws)


ALL = {
    "normal": (densities.standard_normal((2,)), ()),
    "uniform": (densities.uniform((2,)), ()),
    "student_t": (densities.student_t((2,), 3.0), ()),
    "laplace": (densities.laplace((2,)), ()),
    "product": (
        densities.product((densities.logistic((1,)), densities.uniform((1,))), (1, 1)),
        ((), ()),
    ),
    "mixture": (densities.mixture_of_normals((2,), 3), None),
    "transformed": (
        densities.transformed(densities.standard_normal((2,)), flows.chain(flows.actnorm())),
        None,
    ),
    "resampled": (densities.resampled((2,), hidden=(4,), num_draws=50), None),
    "transformed mixture": (
        densities.transformed(densities.mixture_of_normals((2,), 3), flows.lu((2,))),
        None,
    ),
}
each = pytest.mark.parametrize("name", ALL)


def made(name, dtype=jnp.float32):
    density, params = ALL[name]
    if params is None:
        params = random_params(density.init, np.zeros(2))
    return density, cast(params, dtype)


@pytest.mark.slow
@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_floats_keep_their_dtype(name, dtype):
    density, params = made(name, dtype)
    x = np.array([[0.5, 0.25], [0.75, 0.125]], dtype)
    score = jax.jit(density.log_prob)
    actual = score(params, x)
    assert actual.dtype == dtype
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    expected = score(*cast((params, x), np.float32))
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected, rtol=tolerance, atol=4 * tolerance
    )
    fresh = jax.eval_shape(density.init, KEY, x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(fresh))


@pytest.mark.slow
def test_half_precision_is_summed_in_single():
    x = jnp.full((300,), 20, jnp.float16)  # The sum of squares is beyond the dtype's range.
    actual = densities.standard_normal((300,)).log_prob((), x)
    expected = scipy.stats.norm.logpdf(20) * 300
    np.testing.assert_allclose(np.float64(actual), expected, rtol=1e-3)
    density, params = densities.mixture_of_normals((300,), 1), {}
    params["logits"] = jnp.zeros(1, jnp.float16)
    params["mean"] = params["log_std"] = jnp.zeros((1, 300), jnp.float16)
    np.testing.assert_allclose(np.float64(density.log_prob(params, x)), expected, rtol=1e-3)


@each
@pytest.mark.parametrize(
    "points",
    [
        [[0, 1], [1, 1]],
        np.array([[0, 1], [1, 1]]),
        np.array([[0, 1], [1, 1]], np.uint8),
        np.array([[False, True], [True, True]]),
        np.array([[0.0, 1], [1, 1]]),
        jnp.array([[0, 1], [1, 1]], jnp.int8),
    ],
    ids=lambda points: f"{type(points).__name__}-{getattr(points, 'dtype', '')}",
)
def test_other_numbers_become_the_default_float(name, points):
    density, params = made(name)
    expected = density.log_prob(params, np.array([[0, 1], [1, 1]], np.float32))
    actual = density.log_prob(params, points)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, expected)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: density.init(KEY, points)))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_integers_are_neither_wrapped_nor_cast():
    normal_ = densities.standard_normal((1,))
    assert normal_.log_prob((), np.array([[200]], np.uint8)) == pytest.approx(-20000.919)
    assert normal_.log_prob((), np.array([[70000]])) == pytest.approx(-2.45e9)
    assert densities.uniform((1,)).log_prob((), np.array([7])) == -np.inf


def test_a_base_of_another_size_is_refused_when_parameters_are_made():
    density = densities.transformed(densities.standard_normal((3,)), flows.actnorm())
    with pytest.raises(ValueError, match=r"expected x of shape \[..., 3\], got \(5, 4\)"):
        density.init(KEY, np.ones((5, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_standardised_refuses_data_without_moments(value):
    density = densities.standardised(densities.standard_normal((2,)))
    x, bad = np.eye(4, 2), np.eye(4, 2)
    bad[3, 1] = value
    with pytest.raises(ValueError, match="standardised: expected finite x"):
        density.init(KEY, bad)
    with pytest.raises(ValueError, match="standardised: expected finite context"):
        density.init(KEY, x, bad)


@each
def test_complex_numbers_are_refused(name):
    density, params = made(name)
    with pytest.raises(ValueError, match="x: expected real numbers, got complex64$"):
        density.log_prob(params, np.ones((3, 2), np.complex64))


@pytest.mark.slow
def test_contexts_come_through_the_same_door():
    density = densities.transformed(densities.standard_normal((2,)), CONDITIONAL["real_nvp"]())
    params = random_params(density.init, np.zeros(2), [0, 1, 2])
    expected, scores = density.sample_and_log_prob(params, KEY, (), jnp.array([[0.0, 1, 2]]))
    for context in ([[0, 1, 2]], np.array([[0, 1, 2]]), np.array([[0.0, 1, 2]])):
        x, again = density.sample_and_log_prob(params, KEY, (), context)
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(again, scores)
        log_prob = density.log_prob(params, x, context)
        np.testing.assert_allclose(log_prob, scores, rtol=1e-5)
    for call in (density.sample_and_log_prob, densities.standard_normal((2,)).sample_and_log_prob):
        with pytest.raises(ValueError, match="context: expected real numbers, got complex64$"):
            call(params, KEY, (), np.ones((1, 3), np.complex64))


@pytest.mark.parametrize(
    "base", [*BASES.values(), lambda shape: densities.mixture_of_normals(shape, 3)]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (4, 3)])
def test_wrong_event_shape(base, shape):
    density = base((2,))
    params = random_params(density.init, np.zeros(2))
    with pytest.raises(ValueError, match=r"density: expected x of shape \[\.\.\., 2\], got"):
        density.log_prob(params, np.zeros(shape))
