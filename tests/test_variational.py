import functools
import math
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from support import KEY, compilations, normal, randomise

from led_jax import densities, flows, variational

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

MEAN, COV = np.array([0.5, -1.0]), np.array([[1.5, 0.6], [0.6, 0.5]])
GAUSSIAN = scipy.stats.multivariate_normal(MEAN, COV)
LOG_Z = math.log(2 * math.pi) + 0.5 * math.log(np.linalg.det(COV)) + 0.25  # As `unnormalised`.


def unnormalised(x):
    centred = x - MEAN.astype(np.float32)
    precision = np.linalg.inv(COV).astype(np.float32)
    return 0.25 - 0.5 * jnp.einsum("...i,ij,...j", centred, precision, centred)


def affine_density(invert=False):
    """A family that includes every Gaussian, up to the bound on scales."""
    flow = flows.autoregressive(flows.made((8,), activation=lambda x: x))
    flow = flows.chain(flow, flows.actnorm())
    return densities.transformed(
        densities.standard_normal((2,)), flows.invert(flow) if invert else flow
    )


PLANE = densities.transformed(densities.standard_normal((2,)), flows.actnorm())


def plane_params(shift, log_scale=0.0):
    flow = {"shift": np.full(2, shift), "log_scale": np.full(2, log_scale)}
    return {"base": (), "flow": jax.tree.map(np.float32, flow)}


@functools.partial(jax.jit, static_argnums=0)
def init(density, x):
    return density.init(KEY, x)


log_weights = jax.jit(variational.log_weights, static_argnums=(0, 3, 4))


def evidence(density, params, key, log_density, num_samples=10_000):
    """`variational.evidence`, compiled."""
    weights = log_weights(density, params, key, log_density, num_samples)
    return variational.evidence_from(weights)


@pytest.mark.slow
def test_reverse_kl_finds_a_gaussian_and_its_evidence():
    density = affine_density()
    params = init(density, np.zeros(2))
    before = evidence(density, params, KEY, unnormalised)
    result = variational.to_log_density(
        density, params, jax.random.key(1), unnormalised, num_steps=500, learning_rate=2e-2
    )
    assert result.losses.shape == (5,) and result.valid_losses.shape == (0,)  # One per 100 steps.
    np.testing.assert_allclose(result.losses[-1], -LOG_Z, atol=0.02)
    estimate = evidence(density, result.params, KEY, unnormalised)
    assert LOG_Z - before.elbo > 0.5 > 0.02 > abs(LOG_Z - estimate.elbo)
    assert abs(estimate.log_z - LOG_Z) < max(4 * estimate.standard_error, 1e-4)
    assert before.standard_error > 5 * estimate.standard_error
    x = normal((20, 2))
    log_prob = jax.jit(density.log_prob)(result.params, x)
    np.testing.assert_allclose(log_prob, GAUSSIAN.logpdf(x), atol=0.2, rtol=0.05)


@pytest.mark.slow
def test_maximum_likelihood_reaches_the_samples_own_gaussian():
    samples = np.random.default_rng(0).multivariate_normal(MEAN, COV, 5000).astype(np.float32)
    density = affine_density(invert=True)
    params = init(density, samples)
    result = variational.to_samples(
        density,
        params,
        jax.random.key(1),
        samples,
        num_steps=500,
        learning_rate=2e-2,
        valid_fraction=0,
    )
    best = scipy.stats.multivariate_normal(samples.mean(0), np.cov(samples.T, bias=True))
    nll = -np.mean(jax.jit(density.log_prob)(result.params, samples))
    floor = -best.logpdf(samples).mean()
    assert floor - 1e-4 < nll < floor + 0.01
    np.testing.assert_allclose(result.losses[-5:].mean(), floor, atol=0.05)
    assert result.losses.shape == (26,) and result.valid_losses.shape == (0,)


@pytest.mark.slow
def test_evidence_of_a_mixture_by_a_flexible_flow():
    """Two modes, so that no affine layer fits: log Z is -0.7 by construction."""

    def log_density(x):
        modes = densities.normal_log_prob(2 * (x[..., None] - jnp.array([-1.5, 1.5]))).sum(-2)
        return jax.nn.logsumexp(modes, -1) - math.log(2) + 2 * math.log(2) - 0.7

    flow = flows.iaf((2,), 1, hidden=(16,), transformer=flows.spline(6))
    density = densities.transformed(densities.standard_normal((2,)), flow)
    params = init(density, np.zeros(2))
    result = variational.to_log_density(
        density, params, KEY, log_density, num_steps=500, batch_size=128, learning_rate=1e-2
    )
    estimate = evidence(density, result.params, jax.random.key(5), log_density, 5000)
    assert abs(estimate.log_z + 0.7) < 4 * estimate.standard_error < 0.1
    assert -0.9 < estimate.elbo < -0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_steps", "annealing_steps", "missing"),
    [(5, 0, 0.0), (5, 3, (0.9 + 0.6 + 0.3) / 5), (4, 3, (0.9 + 0.6 + 0.3) / 4), (2, 1, 0.9 / 2)],
)
def test_annealing_raises_the_weight_of_the_target_from_a_tenth_to_one(
    num_steps, annealing_steps, missing
):
    result = variational.to_log_density(
        densities.mixture_of_normals((1,), 1),
        {
            "logits": np.zeros(1, np.float32),
            "mean": np.zeros((1, 1), np.float32),
            "log_std": np.zeros((1, 1), np.float32),
        },
        KEY,
        lambda x: jnp.full(len(x), 1e4),
        num_steps=num_steps,
        annealing_steps=annealing_steps,
        learning_rate=1e-9,
    )
    np.testing.assert_allclose(result.losses, [1e4 * (missing - 1)], rtol=1e-3, atol=5)


@pytest.mark.slow
def test_evidence_is_exact_where_the_density_is_the_target():
    density = affine_density()
    params = randomise(init(density, np.zeros(2)))
    # The target inverts the flow: this is another computation than the scores of samples.
    estimate = evidence(density, params, KEY, lambda x: density.log_prob(params, x) + 3, 50)
    np.testing.assert_allclose(estimate[:3], (3, 0, 3), atol=1e-4)
    assert estimate.effective_sample_size == pytest.approx(50)
    assert {type(number) for number in estimate} == {float}


@pytest.mark.slow
def test_errors_of_the_evidence_cover_the_truth():
    """200 estimates in one program: 95 % intervals hold log Z in 90 to 98 % of them."""
    base = densities.standard_normal((1,))

    def target(x):
        return -0.5 * ((x[:, 0] - 0.3) / 1.2) ** 2

    keys = jax.random.split(KEY, 200)
    weights = jax.vmap(lambda key: log_weights(base, (), key, target, 1000))(keys)
    many = np.array([variational.evidence_from(row) for row in np.asarray(weights)])
    log_z, standard_error, elbo, size, k = many.T
    expected = math.log(1.2 * math.sqrt(2 * math.pi))
    assert np.median(k) > 0.1 and k.max() < 0.7
    trusted = k < 0.5
    covers = np.abs(log_z - expected)[trusted] < 1.96 * standard_error[trusted]
    assert trusted.sum() > 150 and 0.9 < covers.mean() < 0.98
    np.testing.assert_allclose(log_z.std(), standard_error.mean(), rtol=0.2)
    assert abs(log_z.mean() - expected) < 4 * log_z.std() / math.sqrt(200)
    assert elbo.mean() < expected and np.all((size < 1000) & (size > 300))
    one = variational.evidence(base, (), keys[3], target, 1000)
    np.testing.assert_allclose(one, many[3], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_resampling_by_weights_gives_the_target():
    """A mixture of two normals through one wide one."""
    params = plane_params(0.0, 0.7)

    def target(x):
        at_1, at_minus_2 = (-0.5 * ((x - mean) ** 2).sum(-1) for mean in (1, -2))
        return jnp.logaddexp(at_1 + math.log(0.7), at_minus_2 + math.log(0.3))

    draw = jax.jit(variational.resample, static_argnums=(0, 3, 4, 5))
    x = np.asarray(draw(PLANE, params, KEY, target, 4000, 40_000))
    assert x.shape == (4000, 2)
    np.testing.assert_allclose(x.mean(0), 0.7 - 0.6, atol=0.15)
    left = 0.7 * scipy.stats.norm.cdf(-1.5) + 0.3 * scipy.stats.norm.cdf(1.5)
    assert abs((x[:, 0] < -0.5).mean() - left) < 0.04
    # In random order, and each proposal as often as its weight says, rounded up or down.
    assert abs(np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1]) < 0.1
    few = np.asarray(draw(PLANE, params, KEY, lambda x: jnp.zeros(len(x)), 5000, 50))
    rows, counts = np.unique(few, axis=0, return_counts=True)
    weights = np.exp(-np.asarray(jax.jit(PLANE.log_prob)(params, rows), np.float64))
    np.testing.assert_allclose(counts, 5000 * weights / weights.sum(), atol=2)
    with pytest.raises(ValueError, match="num_samples must be positive and finite, got 0"):
        variational.resample(PLANE, params, KEY, target, 0)


@pytest.mark.slow
def test_a_second_call_with_equal_arguments_compiles_nothing():
    """The second call has new densities, equal to the first."""
    traced = []

    def target(x):
        traced.append(1)
        return unnormalised(x)

    samples = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)

    def make():
        return densities.transformed(densities.standard_normal((2,)), flows.chain(flows.actnorm()))

    params = init(make(), np.zeros(2))

    def both(seed):
        key, options = jax.random.key(seed), {"num_steps": 4, "batch_size": 16}
        reverse = variational.to_log_density(make(), params, key, target, **options)
        forward = variational.to_samples(make(), params, key, samples, **options)
        return reverse.losses[0], forward.losses[0], forward.valid_losses[0]

    first, count = both(0), len(traced)
    with compilations() as compiled:
        again = both(1)
    assert len(traced) == count and not compiled
    assert len(set(first + again)) == 6  # Other keys, other numbers.


def standard_target(x):
    return -0.5 * (x**2).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.1, 3.0])
def test_a_default_stack_narrows_and_widens(std):
    """For a stack that cannot scale, KL(q || p) is over a nat: 194 and 1.4 for N(0, 1)."""
    density = densities.transformed(densities.standard_normal((2,)), flows.iaf((2,), 2, (16,)))
    start = init(density, np.zeros(2))

    def target(x):
        return (-0.5 * jnp.square((x - 1) / std) - math.log(std * math.sqrt(2 * math.pi))).sum(-1)

    fit = variational.to_log_density(
        density, start, KEY, target, num_steps=600, batch_size=64, learning_rate=1e-2
    )
    assert -np.mean(log_weights(density, fit.params, KEY, target, 2000)) < 0.1


def test_a_restart_that_diverges_does_not_hold_up_the_others():
    fresh, far = init(PLANE, np.zeros(2)), plane_params(1000.0, 1000.0)  # A scale of e^1000.
    start = jax.tree.map(lambda *leaves: np.stack(leaves), fresh, far)
    fit = variational.to_log_density(
        PLANE, start, KEY, standard_target, num_steps=200, num_restarts=2
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fit.params))
    assert np.isfinite(fit.losses).all()


def test_a_log_density_that_is_never_finite_is_an_error():
    start = init(PLANE, np.zeros((1, 2)))
    with pytest.raises(FloatingPointError, match="finite in none of 5 steps"):
        variational.to_log_density(PLANE, start, KEY, lambda x: jnp.nan * x[..., 0], num_steps=5)


def test_a_density_that_leaves_the_support_is_told_how_to_stay():
    def of_gamma(x):
        return (jnp.log(x) - x).sum(-1)

    start = init(PLANE, np.zeros((1, 2)))
    with pytest.raises(FloatingPointError, match="updates were skipped.* by flows.softplus"):
        variational.to_log_density(PLANE, start, KEY, of_gamma, num_steps=50)


@pytest.mark.parametrize("log_density", [lambda x: -x @ jnp.eye(2) @ x, lambda x: -np.square(x)])
def test_a_log_density_of_one_point_or_of_numpy_is_an_error(log_density):
    start = init(PLANE, np.zeros((1, 2)))
    with pytest.raises(TypeError, match=r"log_density: expected a function of jax.numpy.*jax.vmap"):
        variational.to_log_density(PLANE, start, KEY, log_density, num_steps=5)


@pytest.mark.slow
def test_of_several_restarts_each_has_an_optimizer_of_its_own_and_the_best_is_kept():
    """The far start's gradient is by far the largest: clipped with it, the near one would stay."""
    start = jax.tree.map(
        lambda *leaves: np.stack(leaves),
        plane_params(1000.0),
        plane_params(2.0),
        plane_params(9.0),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    result = variational.to_log_density(
        PLANE, start, KEY, standard_target, num_steps=1, num_restarts=3, optimizer=optimizer
    )
    shift = np.asarray(result.params["flow"]["shift"])
    assert shift.shape == (2,)
    moved = np.concatenate([2 - shift, result.params["flow"]["log_scale"]])
    np.testing.assert_allclose(np.linalg.norm(moved), 0.5, rtol=1e-3)
    assert np.all(shift < 1.9)
    with pytest.raises(ValueError, match=r"params of 2 restarts .*got leaves with \[\(3,\)\]"):
        variational.to_log_density(PLANE, start, KEY, standard_target, num_restarts=2)


@pytest.mark.slow
def test_of_restarts_on_samples_the_one_that_scores_held_out_ones_best_is_kept():
    x = 3 + np.asarray(normal((400, 2)))
    near, far = plane_params(2.0), plane_params(50.0)
    broken = plane_params(1e30, 1e30)
    start = jax.tree.map(lambda *leaves: np.stack(leaves), far, near, broken)
    settings = {"num_steps": 40, "batch_size": 100, "optimizer": optax.adam(0.1)}
    best = variational.to_samples(PLANE, start, KEY, x, num_restarts=3, **settings)
    alone = variational.to_samples(PLANE, near, KEY, x, **settings)
    chex.assert_trees_all_close(best.params, alone.params, rtol=1e-4)
    np.testing.assert_allclose(best.valid_losses, alone.valid_losses, rtol=1e-4)
    assert best.losses[-1] > 10 * alone.losses[-1]  # The mean over the two finite restarts.
    with pytest.raises(ValueError, match=r"params of 2 restarts .*got leaves with \[\(3,\)\]"):
        variational.to_samples(PLANE, start, KEY, x, num_restarts=2)
    with pytest.raises(ValueError, match="expected a valid_fraction that holds samples out"):
        variational.to_samples(PLANE, start, KEY, x, num_restarts=3, valid_fraction=0.0)


@pytest.mark.slow
def test_the_path_gradient_has_no_noise_at_the_target_and_the_same_mean():
    def step(path_gradient, params):
        result = variational.to_log_density(
            PLANE,
            params,
            KEY,
            standard_target,
            num_steps=1,
            batch_size=4000,
            path_gradient=path_gradient,
            optimizer=optax.sgd(1.0),
        )
        moves = jax.tree.map(np.subtract, result.params["flow"], params["flow"])
        return np.concatenate([moves["shift"], moves["log_scale"]])

    at_target = plane_params(0.0)
    assert np.abs(step(True, at_target)).max() < 1e-5 < 1e-3 < np.abs(step(False, at_target)).max()
    away = plane_params(0.5, 0.3)
    np.testing.assert_allclose(step(True, away), step(False, away), atol=0.1)
    assert np.abs(step(True, away)).min() > 0.3


@pytest.mark.slow
def test_posteriors_at_twenty_contexts_from_a_simulators_samples():
    """c = 10 x + noise for x from N(50, 4): the posterior at each c is known, and far from 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(50, 2, (4000, 1)).astype(np.float32)
    c = (10 * x + rng.normal(0, 15, x.shape)).astype(np.float32)
    flow = flows.iaf((1,), 1, hidden=(8,), context_dim=1, transformer=flows.affine)
    density = densities.standardised(
        densities.transformed(densities.standard_normal((1,)), flows.invert(flow))
    )
    params = jax.jit(density.init)(KEY, x, c)
    result = variational.to_samples(
        density, params, KEY, x, context=c, num_steps=500, batch_size=128, learning_rate=1e-2
    )
    assert len(result.valid_losses) == len(result.losses)
    contexts = np.linspace(470, 530, 20, dtype=np.float32)[:, None, None]
    grid = np.linspace(35, 65, 1001, dtype=np.float32)
    log_prob = jax.jit(density.log_prob)(
        result.params, np.broadcast_to(grid[:, None], (20, 1001, 1)), contexts
    )
    mass = np.exp(np.asarray(log_prob, np.float64)) * (grid[1] - grid[0])
    np.testing.assert_allclose(mass.sum(1), 1, atol=1e-3)
    precision = 1 / 4 + 100 / 225
    expected = (50 / 4 + 10 / 225 * contexts[:, 0, 0]) / precision
    mean = mass @ grid
    std = np.sqrt((mass * (grid - mean[:, None]) ** 2).sum(1))
    np.testing.assert_allclose(mean, expected, atol=0.2 / math.sqrt(precision))
    np.testing.assert_allclose(std, 1 / math.sqrt(precision), rtol=0.15)
    for wrong, message in (
        (c[:-1], r"expected a context \[4000, context_dim\].*got \(3999, 1\)"),
        (np.where(np.arange(4000)[:, None] == 7, np.nan, c), "finite context, .* row 7"),
    ):
        with pytest.raises(ValueError, match=message):
            variational.to_samples(density, params, KEY, x, context=wrong)


def test_pareto_k_is_the_tail_of_the_weights():
    rng = np.random.default_rng(0)
    for k in (0.1, 0.5, 0.9):
        weights = scipy.stats.genpareto(k).rvs(50_000, random_state=rng)
        estimates = [
            variational.pareto_k(np.log(w) + shift)
            for w, shift in zip(weights.reshape(5, -1), (0, 300, -300, 5, 0), strict=True)
        ]
        np.testing.assert_allclose(np.mean(estimates), k, atol=0.12)
    assert variational.pareto_k(np.zeros(100)) == 0
    for wrong in (np.zeros(24), np.full(30, np.nan), np.zeros((5, 10))):
        with pytest.raises(ValueError, match="expected 25 or more log_weights"):
            variational.pareto_k(wrong)


def test_evidence_warns_where_it_cannot_be_trusted():
    """A normal of standard deviation 5 by samples of one with 1: weights without a variance."""
    with pytest.warns(UserWarning, match="Pareto k of .*, above 0.7"):
        estimate = variational.evidence(
            densities.standard_normal((2,)), (), KEY, lambda x: -(x**2).sum(-1) / 50, 2000
        )
    assert estimate.pareto_k > 0.7


@pytest.mark.parametrize("log_weight", [math.nan, math.inf, -math.inf])
def test_weights_of_no_use_are_errors(log_weight):
    density = densities.standard_normal((1,))
    rest = log_weight if log_weight == -math.inf else 0.0
    log_weights = np.array([log_weight] + 99 * [rest])
    for function in (variational.pareto_k, variational.evidence_from):
        with pytest.raises(ValueError, match="none is NaN or .inf and some are finite"):
            function(log_weights)

    def log_density(x):
        return density.log_prob((), x) + log_weights

    with pytest.raises(ValueError, match="none is NaN or .inf and some are finite"):
        variational.resample(density, (), KEY, log_density, 5, 100)


def test_a_few_samples_with_all_the_weight_are_not_trusted():
    log_weights = np.full(1000, -np.inf)
    log_weights[:3] = 0.0
    assert variational.pareto_k(log_weights) == math.inf
    with pytest.warns(UserWarning, match="Pareto k of inf"):
        assert variational.evidence_from(log_weights).effective_sample_size == pytest.approx(3)
    assert variational.pareto_k(np.array([1.0] * 3 + [0.0] * 997)) == 0


def wide_normal(x):
    return -(x**2).sum(-1) / 18


@pytest.mark.slow
def test_a_flow_that_scales_finds_a_wide_normal():
    """Log Z of N(0, 3^2 I) in two dimensions, from a start at scale 1."""
    flow = flows.chain(flows.real_nvp((2,), 2, hidden=(8,)), flows.actnorm())
    density = densities.transformed(densities.standard_normal((2,)), flow)
    params = init(density, normal((100, 2)))
    result = variational.to_log_density(
        density,
        params,
        KEY,
        wide_normal,
        num_steps=400,
        batch_size=64,
        learning_rate=2e-2,
    )
    estimate = evidence(density, result.params, jax.random.key(5), wide_normal)
    log_z = math.log(2 * math.pi * 9)
    assert abs(estimate.log_z - log_z) < max(4 * estimate.standard_error, 1e-4)
    assert log_z - 0.02 < estimate.elbo < log_z + 1e-3


MIXTURE = densities.mixture_of_normals((2,), 12)


def fit_mixture(samples, **options):
    """Twelve components with free deviations, which easily overfit 40 rows."""
    params = init(MIXTURE, np.asarray(samples, np.float32))
    kwargs = {"num_steps": 300, "batch_size": 20, "learning_rate": 5e-2} | options
    return params, variational.to_samples(MIXTURE, params, KEY, samples, **kwargs)


@pytest.fixture(scope="module")
def overfitted():
    samples = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    records = []
    _, result = fit_mixture(samples, valid_fraction=0.5, callback=records.append)
    return samples, result, records


@pytest.mark.slow
def test_the_best_parameters_on_the_samples_held_out_are_returned(overfitted):
    samples, result, records = overfitted
    assert len(result.losses) == len(result.valid_losses) == len(records) == 300
    best = result.valid_losses.argmin()
    assert best < 299 and result.valid_losses[-1] > result.valid_losses[best] + 0.5
    assert result.losses[-1] < result.losses[best] - 0.3
    jax.tree.map(np.testing.assert_array_equal, result.params, records[best].state.params)
    # Fresh samples are scored better by the best parameters than by the last.
    fresh = normal((2000, 2), seed=9)
    score = jax.jit(MIXTURE.log_prob)
    best_score, last_score = (
        np.mean(score(params, fresh)) for params in (result.params, records[-1].state.params)
    )
    assert best_score > last_score + 0.3


def test_patience_stops_after_so_many_passes_without_a_better_score(overfitted):
    samples, whole, _ = overfitted
    _, result = fit_mixture(samples, valid_fraction=0.5, patience=7)
    stopped, best = len(result.losses), result.valid_losses.argmin()
    assert stopped == best + 1 + 7 < 300
    np.testing.assert_array_equal(result.valid_losses, whole.valid_losses[:stopped])


@pytest.mark.slow
def test_samples_of_other_dtypes_are_cast_at_the_door():
    integers = np.random.default_rng(0).integers(-3, 4, (40, 2))
    params, expected = fit_mixture(integers.astype(np.float32), num_steps=4)
    for samples in (integers, integers.astype(np.int8), integers.tolist(), jnp.asarray(integers)):
        _, result = fit_mixture(samples, num_steps=4)
        np.testing.assert_array_equal(result.losses, expected.losses)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.params))
    with pytest.raises(ValueError, match="^samples: expected real numbers, got complex"):
        variational.to_samples(MIXTURE, params, KEY, integers * 1j)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_named(bad):
    samples = np.zeros((10, 2, 3), np.float32)
    samples[7, 1, 2] = samples[4, 0, 1] = samples[4, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity in 2 rows, the first of them row 4"):
        variational.to_samples(densities.standard_normal((2, 3)), (), KEY, samples)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 0}, "num_steps must be positive and finite, got 0"),
        ({"batch_size": 0}, "batch_size must be positive and finite, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1.0"),
    ],
)
def test_wrong_numbers(given, message):
    base = densities.standard_normal((2,))
    with pytest.raises(ValueError, match=message):
        variational.to_log_density(base, (), KEY, unnormalised, **given)
    with pytest.raises(ValueError, match=message):
        variational.to_samples(base, (), KEY, normal((5, 2)), **given)


def test_other_wrong_arguments():
    base = densities.standard_normal((2,))
    with pytest.raises(ValueError, match="num_samples must be positive and finite, got 0"):
        variational.to_samples(base, (), KEY, normal((0, 2)))
    for fraction in (-0.1, 1.0):
        message = rf"valid_fraction must be in \[0, 1\), got {fraction}"
        with pytest.raises(ValueError, match=message):
            variational.to_samples(base, (), KEY, normal((5, 2)), valid_fraction=fraction)
    with pytest.raises(ValueError, match="num_samples must be 25 or more, got 24"):
        variational.evidence(base, (), KEY, unnormalised, 24)
    for steps in (-1, 4):
        message = f"annealing_steps must be from 0 to num_steps - 1 = 3, got {steps}"
        with pytest.raises(ValueError, match=message):
            variational.to_log_density(
                base, (), KEY, unnormalised, num_steps=4, annealing_steps=steps
            )
    message = r"expected 7 values, \[7\], for an x of shape \(7, 2\), got \(7, 2\)"
    with pytest.raises(ValueError, match=message):
        variational.to_log_density(base, (), KEY, lambda x: -(x**2), batch_size=7)


def test_samples_far_from_zero_are_said_to_be_far():
    samples = 1e4 + np.random.default_rng(0).normal(size=(40, 2))
    flow = flows.invert(flows.actnorm())
    density = densities.transformed(densities.standard_normal((2,)), flow)
    fits = init(density, samples)
    params = jax.tree.map(np.zeros_like, fits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"means of up to 1e[+]04.*densities\.standardised\("):
            variational.to_samples(density, params, KEY, samples, num_steps=1)
        variational._warn_of_far_samples(density, fits, samples.astype(np.float32), None)
