import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, randomise

from led_jax import densities, flows, variational

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

MEAN, COV = np.array([0.5, -1.0]), np.array([[1.5, 0.6], [0.6, 0.5]])
GAUSSIAN = scipy.stats.multivariate_normal(MEAN, COV)
LOG_Z = math.log(2 * math.pi) + 0.5 * math.log(np.linalg.det(COV)) + 0.25  # As below.


def unnormalised(x):
    centred = x - MEAN.astype(np.float32)
    precision = np.linalg.inv(COV).astype(np.float32)
    return 0.25 - 0.5 * jnp.einsum("...i,ij,...j", centred, precision, centred)


def affine_density(invert=False):
    """Holds every Gaussian, up to the bound of the scales."""
    flow = flows.autoregressive(flows.made((8,), activation=lambda x: x))
    flow = flows.chain(flow, flows.actnorm())
    return densities.transformed(
        densities.standard_normal((2,)), flows.invert(flow) if invert else flow
    )


def test_reverse_kl_finds_a_gaussian_and_its_evidence():
    density = affine_density()
    params = density.init(KEY, jnp.zeros(2))
    before = variational.evidence(density, params, KEY, unnormalised)
    result = variational.to_log_density(
        density, params, jax.random.key(1), unnormalised, num_steps=500, learning_rate=2e-2
    )
    assert result.losses.shape == (5,) and result.valid_losses.shape == (0,)  # One a hundred steps.
    np.testing.assert_allclose(result.losses[-1], -LOG_Z, atol=0.02)
    estimate = variational.evidence(density, result.params, KEY, unnormalised)
    assert LOG_Z - before.elbo > 0.5 > 0.02 > abs(LOG_Z - estimate.elbo)
    assert abs(estimate.log_z - LOG_Z) < max(4 * estimate.standard_error, 1e-4)
    assert before.standard_error > 5 * estimate.standard_error
    x = normal((20, 2))
    np.testing.assert_allclose(
        density.log_prob(result.params, x), GAUSSIAN.logpdf(x), atol=0.2, rtol=0.05
    )


def test_maximum_likelihood_reaches_the_samples_own_gaussian():
    samples = np.random.default_rng(0).multivariate_normal(MEAN, COV, 5000).astype(np.float32)
    density = affine_density(invert=True)
    params = density.init(KEY, jnp.asarray(samples))
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
    nll, floor = -density.log_prob(result.params, samples).mean(), -best.logpdf(samples).mean()
    assert floor - 1e-4 < nll < floor + 0.01
    np.testing.assert_allclose(result.losses[-5:].mean(), floor, atol=0.05)
    assert result.losses.shape == (26,) and result.valid_losses.shape == (0,)


def test_evidence_of_a_mixture_by_a_flexible_flow():
    """Two modes, so that no affine layer fits: log Z is -0.7 by construction."""

    def log_density(x):
        modes = densities.normal_log_prob(2 * (x[..., None] - jnp.array([-1.5, 1.5]))).sum(-2)
        return jax.nn.logsumexp(modes, -1) - math.log(2) + 2 * math.log(2) - 0.7

    flow = flows.iaf((2,), 1, hidden=(16,), transformer=flows.spline(6))
    density = densities.transformed(densities.standard_normal((2,)), flow)
    params = density.init(KEY, jnp.zeros(2))
    result = variational.to_log_density(
        density, params, KEY, log_density, num_steps=500, batch_size=128, learning_rate=1e-2
    )
    estimate = variational.evidence(density, result.params, jax.random.key(5), log_density, 5000)
    assert abs(estimate.log_z + 0.7) < 4 * estimate.standard_error < 0.1
    assert -0.9 < estimate.elbo < -0.7


@pytest.mark.parametrize(
    ("num_steps", "annealing_steps", "missing"),
    [(5, 0, 0.0), (5, 3, (0.9 + 0.6 + 0.3) / 5), (4, 3, (0.9 + 0.6 + 0.3) / 4), (2, 1, 0.9 / 2)],
)
def test_annealing_raises_the_weight_of_the_target_from_a_tenth_to_one(
    num_steps, annealing_steps, missing
):
    result = variational.to_log_density(
        densities.mixture_of_normals((1,), 1),
        {"logits": jnp.zeros(1), "mean": jnp.zeros((1, 1)), "log_std": jnp.zeros((1, 1))},
        KEY,
        lambda x: jnp.full(len(x), 1e4),
        num_steps=num_steps,
        annealing_steps=annealing_steps,
        learning_rate=1e-9,
    )
    np.testing.assert_allclose(result.losses, [1e4 * (missing - 1)], rtol=1e-3, atol=5)


def test_evidence_is_exact_where_the_density_is_the_target():
    density = affine_density()
    params = randomise(density.init(KEY, jnp.zeros(2)))
    # The inverse direction is another computation.
    estimate = variational.evidence(
        density, params, KEY, lambda x: density.log_prob(params, x) + 3, 50
    )
    np.testing.assert_allclose(estimate[:3], (3, 0, 3), atol=1e-4)
    assert estimate.effective_sample_size == pytest.approx(50)
    assert {type(number) for number in estimate} == {float}


def test_the_standard_error_is_that_of_repetition():
    base = densities.standard_normal((1,))

    def estimate(key):
        return variational.evidence(
            base, (), key, lambda x: -0.5 * ((x[:, 0] - 0.3) / 0.9) ** 2, 400
        )

    many = np.array([estimate(key) for key in jax.random.split(KEY, 200)])
    log_z, standard_error, elbo, size, k = many.T
    np.testing.assert_allclose(log_z.std(), standard_error.mean(), rtol=0.2)
    expected = math.log(0.9 * math.sqrt(2 * math.pi))
    assert abs(log_z.mean() - expected) < 4 * log_z.std() / math.sqrt(200)
    assert elbo.mean() < expected and np.all(size < 400) and np.all(size > 300)


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
        with pytest.raises(ValueError, match="expected 25 or more log-weights"):
            variational.pareto_k(wrong)


def test_evidence_warns_where_it_cannot_be_trusted():
    """A normal of standard deviation 5 through samples of one with 1: weights without a mean."""
    with pytest.warns(UserWarning, match="Pareto k of .*, above 0.7"):
        estimate = variational.evidence(
            densities.standard_normal((2,)), (), KEY, lambda x: -(x**2).sum(-1) / 50, 2000
        )
    assert estimate.pareto_k > 0.7


def wide_normal(x):
    return -(x**2).sum(-1) / 18


def test_a_flow_that_scales_finds_a_wide_normal():
    """Log Z of N(0, 3^2 I) in two dimensions, from a start at scale 1."""
    flow = flows.chain(flows.real_nvp((2,), 2, hidden=(8,)), flows.actnorm())
    density = densities.transformed(densities.standard_normal((2,)), flow)
    params = density.init(KEY, normal((100, 2)))
    result = variational.to_log_density(
        density,
        params,
        KEY,
        wide_normal,
        num_steps=400,
        batch_size=64,
        learning_rate=2e-2,
    )
    estimate = variational.evidence(density, result.params, jax.random.key(5), wide_normal)
    log_z = math.log(2 * math.pi * 9)
    assert abs(estimate.log_z - log_z) < max(4 * estimate.standard_error, 1e-4)
    assert log_z - 0.02 < estimate.elbo < log_z + 1e-3


MIXTURE = densities.mixture_of_normals((2,), 12)


def fit_mixture(samples, **options):
    """An easy way to fit 40 rows too closely: twelve components with free deviations."""
    params = MIXTURE.init(KEY, jnp.asarray(np.asarray(samples, np.float32)))
    kwargs = {"num_steps": 300, "batch_size": 20, "learning_rate": 5e-2} | options
    return params, variational.to_samples(MIXTURE, params, KEY, samples, **kwargs)


@pytest.fixture(scope="module")
def overfitted():
    samples = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    records = []
    _, result = fit_mixture(samples, valid_fraction=0.5, callback=records.append)
    return samples, result, records


def test_the_best_parameters_on_the_samples_held_out_are_returned(overfitted):
    samples, result, records = overfitted
    assert len(result.losses) == len(result.valid_losses) == len(records) == 300
    best = result.valid_losses.argmin()
    assert best < 299 and result.valid_losses[-1] > result.valid_losses[best] + 0.5
    assert result.losses[-1] < result.losses[best] - 0.3
    jax.tree.map(np.testing.assert_array_equal, result.params, records[best].state.params)
    # Fresh samples are scored better by the best parameters than by the last.
    fresh = normal((2000, 2), seed=9)
    best_score, last_score = (
        MIXTURE.log_prob(params, fresh).mean()
        for params in (result.params, records[-1].state.params)
    )
    assert best_score > last_score + 0.3


def test_patience_stops_after_so_many_passes_without_a_better_score(overfitted):
    samples, whole, _ = overfitted
    _, result = fit_mixture(samples, valid_fraction=0.5, patience=7)
    stopped, best = len(result.losses), result.valid_losses.argmin()
    assert stopped == best + 1 + 7 < 300
    np.testing.assert_array_equal(result.valid_losses, whole.valid_losses[:stopped])


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
    fits = density.init(KEY, samples)
    params = jax.tree.map(jnp.zeros_like, fits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="to_samples: means of up to 1e[+]04.*standardise"):
            variational.to_samples(density, params, KEY, samples, num_steps=1)
        variational._warn_of_far_samples(density, fits, samples.astype(np.float32))
