import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.figures import targets, universality

TARGETS = [target for suite in universality.SUITES.values() for target in suite]
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.name}-{t.event_size}")


def on_grid(target, half_width, n):
    axis = (np.arange(n) + 0.5) * 2 * half_width / n - half_width
    points = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), -1), jnp.float32)
    log_probs = jax.jit(lambda rows: jax.lax.map(target.log_prob, rows))(points)
    return axis, np.exp(np.asarray(log_probs, np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("target", universality.SUITES[2], ids=lambda target: target.name)
def test_2d_targets_integrate_to_one_and_samples_follow_them(target):
    half_width = 12
    axis, density = on_grid(target, half_width, 600)
    area = (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(density.sum() * area, 1, atol=2e-3)
    x = np.asarray(jax.jit(target.sample, static_argnums=1)(jax.random.key(0), 4000))
    assert x.shape == (4000, 2)
    for i in range(2):
        cdf = np.cumsum(density.sum(1 - i)) * area
        edges = axis + (axis[1] - axis[0]) / 2
        test = scipy.stats.kstest(x[:, i], lambda v, e=edges, c=cdf: np.interp(v, e, c))
        assert test.pvalue > 1e-3
    # This depends on correlations, too: the mean of log p over samples is minus the entropy.
    mask = density > 0
    entropy = -(density[mask] * np.log(density[mask])).sum() * area
    log_probs = np.asarray(jax.jit(target.log_prob)(x), np.float64)
    error = log_probs.std() / np.sqrt(len(x))
    assert abs(log_probs.mean() + entropy) < 4 * error + 5e-3


@pytest.mark.slow
@each_target
def test_log_prob_is_finite_far_out_with_its_gradient(target):
    x = np.full((3, target.event_size), 30, np.float32) * np.float32([[1], [-1], [0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: target.log_prob(x).sum()))(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.slow
def test_gaussian_mixtures_against_scipy():
    centres = np.random.default_rng(0).normal(size=(3, 8))
    target = targets.gaussian_mixture("three", centres, 0.7)
    x = jax.jit(target.sample, static_argnums=1)(jax.random.key(1), 50)
    density = sum(scipy.stats.multivariate_normal(c, 0.49).pdf(x) for c in centres) / 3
    np.testing.assert_allclose(jax.jit(target.log_prob)(x), np.log(density), 1e-4)


@pytest.mark.slow
def test_funnel_against_scipy():
    x = np.random.default_rng(0).normal(size=(20, 8))
    expected = scipy.stats.norm.logpdf(x[:, 0]) + sum(
        scipy.stats.norm.logpdf(x[:, i], scale=np.exp(x[:, 0] / 2) / 2) for i in range(1, 8)
    )
    actual = jax.jit(targets.funnel(8).log_prob)(np.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    samples = np.asarray(targets.funnel(8).sample(jax.random.key(0), 4000))
    standardised = 2 * samples[:, 1:] * np.exp(-samples[:, :1] / 2)
    assert scipy.stats.kstest(standardised.ravel(), scipy.stats.norm.cdf).pvalue > 1e-3
