import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, randomise
from support.linear_gaussian import LED_MODEL, Truth, data

from led_jax import densities, objectives

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

TRUTH = {"shift": 0.3, "spread": 1.3}


def loss_of(objective, model, x):
    """The objective's loss, gradient and metrics, compiled, for parameters and a step."""

    def loss(params, step=0, key=KEY):
        return objective.loss(model, params, (), key, x, jnp.asarray(step))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_the_elbo_is_that_of_a_linear_gaussian_model(x64):
    """Mean and gradient over many draws against closed forms and their finite differences."""
    truth, x = Truth(**TRUTH), data(4)
    rows = np.repeat(x, 20_000, 0)
    (loss, metrics), gradient = loss_of(objectives.elbo(), LED_MODEL, rows)(truth.params)
    log_likelihood, log_prior, log_posterior = (term.mean() for term in truth.terms(x))
    expected = {
        "elbo": truth.elbo(x).mean(),
        "log_likelihood": log_likelihood,
        "log_prior": log_prior,
        "log_posterior": log_posterior,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].shape == ()
        np.testing.assert_allclose(metrics[name], value, atol=0.03)
    np.testing.assert_allclose(loss, -metrics["elbo"], rtol=1e-12)
    # Shifting every z by e moves the exact ELBO as the encoder's bias does.
    step = 1e-4
    slope = (Truth(0.3 + step, 1.3).elbo(x) - Truth(0.3 - step, 1.3).elbo(x)).mean() / (2 * step)
    log_scale = truth.params["posterior"]["log_scale"]
    actual = -(gradient["encoder"]["bias"][:2] * np.exp(-log_scale)).sum()
    np.testing.assert_allclose(actual, slope, atol=0.05)
    assert abs(slope) > 0.5


def test_a_gradient_is_the_slope_of_the_loss(x64):
    params, x = Truth(**TRUTH).params, data(8)
    for objective in (objectives.elbo(), objectives.elbo(0.3)):
        run = loss_of(objective, LED_MODEL, x)
        _, gradient = run(params)
        direction = randomise(jax.tree.map(jnp.zeros_like, params))
        ahead, behind = (
            run(jax.tree.map(lambda p, d, s=sign: p + s * 1e-5 * d, params, direction))[0][0]
            for sign in (1, -1)
        )
        slope = sum(
            (g * d).sum()
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)


def test_a_weight_may_be_a_schedule_of_the_step(x64):
    params, x = Truth(**TRUTH).params, data(8)
    terms = jax.tree.map(jnp.mean, LED_MODEL.elbo(params, KEY, x))
    kl = terms.log_posterior - terms.log_prior
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    warm_up = loss_of(objectives.elbo(schedule), LED_MODEL, x)
    for step, weight in ((0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0)):
        (loss, metrics), gradient = warm_up(params, step)
        np.testing.assert_allclose(loss, weight * kl - terms.log_likelihood, rtol=1e-9)
        np.testing.assert_allclose(metrics["elbo"], terms.bound, rtol=1e-9)  # At weight 1.
        (constant, _), expected = loss_of(objectives.elbo(weight), LED_MODEL, x)(params)
        np.testing.assert_allclose(constant, loss, rtol=1e-9)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


def test_objectives_without_parameters_of_their_own():
    for objective in (objectives.elbo(), objectives.maximum_likelihood()):
        assert objective.init(KEY, None, {}, jnp.zeros((2, 3))) == ()


def test_maximum_likelihood_is_the_mean_negative_log_density(x64):
    """Of N(m, s^2), whose gradient is zero at the moments of the rows and nowhere else."""
    density = densities.mixture_of_normals((2,), 1)
    x = data(50)[:, :2]
    moments = {"mean": x.mean(0)[None], "log_std": np.log(x.std(0))[None]}
    params = jax.tree.map(jnp.asarray, {"logits": np.zeros(1), **moments})
    run = loss_of(objectives.maximum_likelihood(), density, x)
    (loss, metrics), gradient = run(params)
    expected = np.log(x.std(0)).sum() + np.log(2 * np.pi) + 1  # The entropy of that normal.
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert set(metrics) == {"log_prob"}
    np.testing.assert_allclose(metrics["log_prob"], -loss)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-9)
    off = params | {"mean": params["mean"] + 0.5}
    np.testing.assert_allclose(run(off)[1]["mean"][0], 0.5 / x.var(0), rtol=1e-9)
