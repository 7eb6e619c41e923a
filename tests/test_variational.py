import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, randomise

from led_jax import densities, fit, flows

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
    before = fit.evidence(density, params, KEY, unnormalised)
    result = fit.to_log_density(
        density, params, jax.random.key(1), unnormalised, num_steps=500, learning_rate=2e-2
    )
    assert result.losses.shape == (500,)
    np.testing.assert_allclose(result.losses[-50:].mean(), -LOG_Z, atol=0.02)
    estimate = fit.evidence(density, result.params, KEY, unnormalised)
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
    result = fit.to_samples(
        density, params, jax.random.key(1), jnp.asarray(samples), num_steps=500, learning_rate=2e-2
    )
    best = scipy.stats.multivariate_normal(samples.mean(0), np.cov(samples.T, bias=True))
    nll, floor = -density.log_prob(result.params, samples).mean(), -best.logpdf(samples).mean()
    assert floor - 1e-4 < nll < floor + 0.01
    np.testing.assert_allclose(result.losses[-100:].mean(), floor, atol=0.05)


def test_evidence_of_a_mixture_by_a_flexible_flow():
    """Two modes, so that no affine layer fits: log Z is -0.7 by construction."""

    def log_density(x):
        modes = densities.normal_log_prob(2 * (x[..., None] - jnp.array([-1.5, 1.5]))).sum(-2)
        return jax.nn.logsumexp(modes, -1) - math.log(2) + 2 * math.log(2) - 0.7

    flow = flows.iaf((2,), 1, hidden=(16,), transformer=flows.spline(6))
    density = densities.transformed(densities.standard_normal((2,)), flow)
    params = density.init(KEY, jnp.zeros(2))
    result = fit.to_log_density(
        density, params, KEY, log_density, num_steps=500, batch_size=128, learning_rate=2e-2
    )
    estimate = fit.evidence(density, result.params, jax.random.key(5), log_density, 5000)
    assert abs(estimate.log_z + 0.7) < 4 * estimate.standard_error < 0.1
    assert -0.9 < estimate.elbo < -0.7


def test_annealing_raises_the_weight_of_the_target_from_a_tenth_to_one():
    base = densities.standard_normal((2,))

    def losses(annealing_steps):
        return fit.to_log_density(
            base,
            (),
            KEY,
            lambda x: jnp.full(len(x), 10.0),
            num_steps=5,
            annealing_steps=annealing_steps,
        ).losses

    missing = (losses(3) - losses(0)) / 10
    np.testing.assert_allclose(missing, [0.9, 0.6, 0.3, 0, 0], atol=1e-5)


def test_evidence_is_exact_where_the_density_is_the_target():
    density = affine_density()
    params = randomise(density.init(KEY, jnp.zeros(2)))
    # The inverse direction is another computation.
    estimate = fit.evidence(density, params, KEY, lambda x: density.log_prob(params, x) + 3, 50)
    np.testing.assert_allclose(estimate, (3, 0, 3), atol=1e-4)


def test_the_standard_error_is_that_of_repetition():
    base = densities.standard_normal((1,))

    def estimate(key):
        return fit.evidence(base, (), key, lambda x: -0.5 * ((x[:, 0] - 0.3) / 0.9) ** 2, 400)

    many = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 500))
    np.testing.assert_allclose(many.log_z.std(), many.standard_error.mean(), rtol=0.15)
    expected = math.log(0.9 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(many.log_z.mean(), expected, atol=0.005)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 0}, "num_steps must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
    ],
)
def test_wrong_numbers(given, message):
    base = densities.standard_normal((2,))
    with pytest.raises(ValueError, match=message):
        fit.to_log_density(base, (), KEY, unnormalised, **given)
    with pytest.raises(ValueError, match=message):
        fit.to_samples(base, (), KEY, normal((5, 2)), **given)


def test_other_wrong_arguments():
    base = densities.standard_normal((2,))
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        fit.to_samples(base, (), KEY, normal((0, 2)))
    with pytest.raises(ValueError, match="num_samples must be 2 or more, got 1"):
        fit.evidence(base, (), KEY, unnormalised, 1)
    for steps in (-1, 4):
        message = f"annealing_steps must be from 0 to num_steps - 1 = 3, got {steps}"
        with pytest.raises(ValueError, match=message):
            fit.to_log_density(base, (), KEY, unnormalised, num_steps=4, annealing_steps=steps)
    message = r"expected 7 values, \[7\], for an x of shape \(7, 2\), got \(7, 2\)"
    with pytest.raises(ValueError, match=message):
        fit.to_log_density(base, (), KEY, lambda x: -(x**2), batch_size=7)
