import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, random_params

from led_jax import LED, decoders, densities, encoders, flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_lu_is_the_product_of_its_factors(x64):
    flow, x = flows.lu((4,)), np.asarray(normal((6, 4)))
    params = random_params(flow.init, x)
    raw = np.asarray(params["bias"]).reshape(4, 4)
    lower = np.tril(raw, -1) + np.eye(4)
    upper = np.triu(raw, 1) + np.diag(np.exp(np.diag(raw)))
    apply = jax.jit(flow.apply)
    y, log_det = apply(params, x)
    np.testing.assert_allclose(y, x @ (lower @ upper).T, rtol=1e-10)
    expected = np.linalg.slogdet(lower @ upper)[1]
    np.testing.assert_allclose(log_det, np.full(6, expected), rtol=1e-10)
    fresh = jax.jit(flow.init)(KEY, x)
    np.testing.assert_array_equal(apply(fresh, x)[0], x)


def test_householder_is_the_product_of_reflections(x64):
    flow, x = flows.householder((4,), 3), np.asarray(normal((6, 4)))
    params = random_params(flow.init, x)
    q = np.eye(4)
    for v in np.asarray(params["bias"]).reshape(3, 4):
        q = q @ (np.eye(4) - 2 * np.outer(v, v) / (v @ v))
    np.testing.assert_allclose(jax.jit(flow.apply)(params, x)[0], x @ q.T, rtol=1e-10)
    np.testing.assert_allclose(q @ q.T, np.eye(4), atol=1e-12)
    with pytest.raises(ValueError, match="num_reflections must be positive, got 0"):
        flows.householder((4,), 0)


def test_behind_the_encoder_lu_makes_a_gaussian_of_full_covariance(x64):
    led = LED(
        encoders.mlp_encoder(3, (5,), context_dim=2),
        flows.lu((3,), context_dim=2),
        densities.standard_normal((3,)),
        decoders.mlp_decoder(4, (5,)),
    )
    x, z = normal((2, 4)), np.asarray(normal((2, 3), seed=5))
    params = random_params(led.init, x)

    @jax.jit
    def results(params, x, z):
        _, _, context = encoding = led.encoding(params, x)

        def image(b, i):
            return led.posterior.apply(params["posterior"], b, context[i])[0]

        matrices = [jax.jacfwd(image)(jnp.zeros(3), i) for i in range(2)]
        return encoding, led.posterior_log_prob(params, z, encoding), matrices

    (mean, log_std, _), log_prob, matrices = jax.device_get(results(params, x, z))
    for i, matrix in enumerate(matrices):
        covariance = matrix @ np.diag(np.exp(2 * log_std[i])) @ matrix.T
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.01
        expected = scipy.stats.multivariate_normal(matrix @ mean[i], covariance).logpdf(z[i])
        np.testing.assert_allclose(log_prob[i], expected, rtol=1e-9)
