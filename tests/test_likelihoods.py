import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from support import KEY, normal

from led_jax import likelihoods

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def results(likelihood, raw, x, num_draws):
    """The log-density at x, the mean, and draws, as NumPy arrays from one compilation."""

    @jax.jit
    def compute(raw, x):
        draws = likelihood.sample(KEY, jnp.broadcast_to(raw, (num_draws, *raw.shape)))
        return likelihood.log_prob(raw, x), likelihood.mean(raw), draws

    return jax.device_get(compute(raw, x))


def test_bernoulli_is_scipys(x64):
    likelihood, raw = likelihoods.bernoulli(), 3 * np.asarray(normal((5, 1, 4)))
    probability = 1 / (1 + np.exp(-raw[:, 0]))
    np.testing.assert_allclose(jax.jit(likelihood.mean)(raw), probability, rtol=1e-12)
    log_prob = jax.jit(likelihood.log_prob)
    for x in (np.zeros((5, 4)), np.ones((5, 4)), np.eye(5, 4, dtype=np.uint8)):
        expected = scipy.stats.bernoulli.logpmf(x, probability)
        np.testing.assert_allclose(log_prob(raw, x), expected, rtol=1e-9)


@pytest.mark.slow
def test_gaussian_is_scipys(x64):
    raw, x = jax.device_get((normal((5, 1, 4)), normal((3, 5, 4), seed=2)))
    log_prob, mean, draws = results(likelihoods.gaussian(0.4), raw, x, 500)
    expected = scipy.stats.norm.logpdf(x, raw[:, 0], 0.4)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    np.testing.assert_array_equal(mean, raw[:, 0])
    standard = ((draws - raw[:, 0]) / 0.4).ravel()
    assert scipy.stats.kstest(standard, scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.slow
def test_a_learned_deviation_is_scipys(x64):
    likelihood = likelihoods.learned_gaussian("network")
    raw, x = jax.device_get((normal((5, 2, 4)), normal((3, 5, 4), seed=2)))
    log_prob, _, draws = results(likelihood, raw, x, 500)
    expected = scipy.stats.norm.logpdf(x, raw[:, 0], np.exp(raw[:, 1]))
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    standard = ((draws - raw[:, 0]) * np.exp(-raw[:, 1])).ravel()
    assert scipy.stats.kstest(standard, scipy.stats.norm.cdf).pvalue > 1e-3
    # A constant entry cannot drive the density to infinity.
    far = np.array([0.0, -1e9])[:, None]
    highest = np.asarray(jax.jit(likelihood.log_prob)(far, np.zeros(1)))
    assert highest[0] == 7 - 0.5 * np.log(2 * np.pi)
    with pytest.raises(ValueError, match="scale must be one, entry or network, got 'each'"):
        likelihoods.learned_gaussian("each")


@pytest.mark.slow
def test_categorical_is_a_distribution_over_its_categories(x64):
    likelihood, raw = likelihoods.categorical(5), 2 * np.asarray(normal((5, 4)))
    numbers = np.arange(5)
    mass = scipy.special.softmax(raw, 0)
    log_prob, mean, draws = results(likelihood, raw, numbers[:, None] * np.ones(4), 4000)
    np.testing.assert_allclose(np.exp(log_prob), mass, rtol=1e-9)
    np.testing.assert_allclose(mean, numbers @ mass, rtol=1e-9)
    frequencies = (draws[..., None] == numbers).mean(0).T
    np.testing.assert_allclose(frequencies, mass, atol=4 * 0.5 / np.sqrt(4000))
    # A value that is no category has probability 0, and is refused unless it is traced.
    of_7 = jax.jit(likelihood.log_prob)(raw, np.full(4, 7.0))
    assert np.all(np.asarray(of_7) == -np.inf)
    for wrong in (7, 0.5):
        with pytest.raises(ValueError, match="x must be whole numbers 0..4, .* got x from"):
            likelihood.log_prob(raw, np.full(4, wrong))
    with pytest.raises(ValueError, match="num_categories must be 2 to 256, got 1"):
        likelihoods.categorical(1)


LEVELS = np.arange(256) / 255


def logistic_mass(raw, num_components):
    """The probabilities of 256 levels by scipy, `[256, D]`, for raw `[3 * K, D]`."""
    logits, means, log_scales = np.split(raw[:, None], 3)
    weights = scipy.special.softmax(logits, 0)
    edges = ((2 * np.arange(1, 256) - 1) / 255 - 1)[:, None]
    cdf = scipy.stats.logistic.cdf(edges, means, np.exp(log_scales))
    cdf = np.concatenate([np.zeros_like(means), cdf, np.ones_like(means)], axis=1)
    return (weights * np.diff(cdf, axis=1)).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("num_components", [1, 4])
def test_discretized_logistic_is_a_distribution_over_256_levels(x64, num_components):
    likelihood = likelihoods.discretized_logistic(num_components)
    raw = np.array(normal((3 * num_components, 6)))
    raw[-num_components:] += np.linspace(-5, 1, 6)
    log_prob, mean, draws = results(likelihood, raw, LEVELS[:, None] * np.ones(6), 4000)
    np.testing.assert_allclose(np.exp(log_prob).sum(0), 1, rtol=1e-12)
    mass = logistic_mass(raw, num_components)
    np.testing.assert_allclose(np.exp(log_prob), mass, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(mean, LEVELS @ mass, rtol=1e-9)
    np.testing.assert_allclose(255 * draws, np.round(255 * draws), atol=1e-9)
    spread = np.sqrt(LEVELS**2 @ mass - (LEVELS @ mass) ** 2)
    assert (np.abs(draws.mean(0) - LEVELS @ mass) < 4 * spread / np.sqrt(4000)).all()
    for level in (0, 1):  # The end levels, which have the tails.
        probability = mass[-level]
        error = np.sqrt(probability * (1 - probability) / 4000)
        assert (np.abs((draws == level).mean(0) - probability) < 4 * error + 1e-3).all()


@pytest.mark.slow
def test_discretized_logistic_is_finite_in_float32_however_far_off():
    likelihood = likelihoods.discretized_logistic(1)
    score = jax.jit(jax.value_and_grad(lambda r: likelihood.log_prob(r, LEVELS[:, None]).sum()))
    for log_scale in (-90.0, -7.0, 0.0, 90.0):
        value, slope = jax.device_get(score(np.array([0.0, 30.0, log_scale])[:, None]))
        assert np.isfinite(value) and np.isfinite(slope).all()
    with pytest.raises(ValueError, match="num_components must be positive, got 0"):
        likelihoods.discretized_logistic(0)


@pytest.mark.parametrize("std", [0, -1.0, float("nan"), float("inf")])
def test_a_deviation_is_positive_and_finite(std):
    with pytest.raises(ValueError, match=f"std must be positive and finite, got {std}"):
        likelihoods.gaussian(std)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        likelihoods.bernoulli,
        lambda: likelihoods.gaussian(0.5),
        lambda: likelihoods.learned_gaussian("network"),
        lambda: likelihoods.categorical(4),
        lambda: likelihoods.discretized_logistic(3),
    ],
)
def test_dtype_and_shapes_are_the_outputs(make, dtype):
    likelihood = make()
    raw, x = np.zeros((2, 3, likelihood.num_params, 4), dtype), np.ones((5, 1, 3, 4), dtype)
    out = jax.eval_shape(likelihood.log_prob, raw, x)
    assert out.shape == (5, 2, 3, 4) and out.dtype == dtype
    for draw in (
        jax.eval_shape(likelihood.sample, KEY, raw),
        jax.eval_shape(likelihood.mean, raw),
    ):
        assert draw.shape == (2, 3, 4) and draw.dtype == dtype
