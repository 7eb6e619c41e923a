import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal

from led_jax import likelihoods

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_bernoulli_is_scipys(x64):
    likelihood, raw = likelihoods.bernoulli(), 3 * normal((5, 1, 4))
    probability = 1 / (1 + np.exp(-raw[:, 0]))
    np.testing.assert_allclose(likelihood.mean(raw), probability, rtol=1e-12)
    for x in (np.zeros((5, 4)), np.ones((5, 4)), np.eye(5, 4, dtype=np.uint8)):
        expected = scipy.stats.bernoulli.logpmf(x, probability)
        np.testing.assert_allclose(likelihood.log_prob(raw, x), expected, rtol=1e-9)


def test_gaussian_is_scipys(x64):
    likelihood, raw, x = likelihoods.gaussian(0.4), normal((5, 1, 4)), normal((3, 5, 4), seed=2)
    expected = scipy.stats.norm.logpdf(x, raw[:, 0], 0.4)
    np.testing.assert_allclose(likelihood.log_prob(raw, x), expected, rtol=1e-9)
    np.testing.assert_array_equal(likelihood.mean(raw), raw[:, 0])
    draws = likelihood.sample(KEY, jnp.broadcast_to(raw, (500, *raw.shape)))
    standard = ((draws - raw[:, 0]) / 0.4).ravel()
    assert scipy.stats.kstest(np.asarray(standard), scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("std", [0, -1.0, float("nan"), float("inf")])
def test_a_deviation_is_positive_and_finite(std):
    with pytest.raises(ValueError, match=f"std must be positive and finite, got {std}"):
        likelihoods.gaussian(std)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("make", [likelihoods.bernoulli, lambda: likelihoods.gaussian(0.5)])
def test_dtype_and_shapes_are_the_outputs(make, dtype):
    likelihood = make()
    raw, x = jnp.zeros((2, 3, 1, 4), dtype), jnp.ones((5, 1, 3, 4), dtype)
    out = jax.eval_shape(likelihood.log_prob, raw, x)
    assert out.shape == (5, 2, 3, 4) and out.dtype == dtype
    for draw in (
        jax.eval_shape(likelihood.sample, KEY, raw),
        jax.eval_shape(likelihood.mean, raw),
    ):
        assert draw.shape == (2, 3, 4) and draw.dtype == dtype
