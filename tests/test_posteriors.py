import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, random_params, randomise
from support.linear_gaussian import LED_MODEL, Truth, data

from led_jax import densities, descriptions, encoders, flows, objectives, posteriors
from led_jax.numerics import log_mean_exp

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

CONTEXT_DIM = 3


def hierarchical():
    """The linear-Gaussian model, with an auxiliary variable beside its two latent ones."""
    inverse = flows.iaf((1,), 2, (5,), 2 + CONTEXT_DIM, transformer=flows.affine)
    reverse = densities.transformed(densities.standard_normal((1,)), flows.invert(inverse))
    flow = flows.chain(
        flows.real_nvp((3,), 2, hidden=(5,), context_dim=CONTEXT_DIM), flows.lu((3,))
    )
    return LED_MODEL._replace(
        encoder=encoders.gaussian_encoder(nn.Dense(4 + CONTEXT_DIM), 2, CONTEXT_DIM),
        posterior=posteriors.auxiliary((2,), 1, flow, reverse),
    )


def parameters(truth, x, scale=0.1):
    """A base near the exact posterior, wider than it, and random flows."""
    led = hierarchical()
    params = random_params(led.init, x, scale=scale)
    exact = Truth(spread=1.3)
    kernel = np.linalg.lstsq(np.c_[x, np.ones(len(x))], exact.mean(x), rcond=None)[
        0
    ]  # The mean is affine in x.
    dense = params["encoder"]
    kernels = np.concatenate([kernel[:-1], np.zeros((3, 2)), dense["kernel"][:, 4:]], 1)
    biases = np.concatenate([kernel[-1], np.log(exact.std), dense["bias"][4:]])
    params["encoder"] = {"kernel": kernels, "bias": biases}
    return led, truth.params | {name: params[name] for name in ("encoder", "posterior")}


def test_importance_weights_of_a_hierarchical_posterior_are_unbiased(x64):
    """Their mean is p(x) for any reverse density r; the bound is below log p(x)."""
    truth, x = Truth(), data(6)
    led, params = parameters(truth, x)
    bounds = jax.jit(lambda params: led.elbo(params, KEY, x, (40_000,)).bound)
    bound = np.asarray(bounds(params))
    exact = truth.log_marginal(x)
    weights = np.exp(bound - exact)
    error = weights.std(0) / np.sqrt(len(weights))
    assert error.max() < 0.03
    np.testing.assert_array_less(np.abs(weights.mean(0) - 1), 4.5 * error)
    actual = jax.jit(log_mean_exp, static_argnums=1)(bound, 0)
    np.testing.assert_allclose(actual, exact, atol=0.1)
    assert (bound.mean(0) < exact - 0.02).all()
    # Another r has another bound on the same marginal.
    other = params | {
        "posterior": params["posterior"]
        | {"reverse": randomise(params["posterior"]["reverse"], 0.5, seed=3)}
    }
    looser = np.asarray(bounds(other))
    assert np.abs(looser.mean(0) - bound.mean(0)).min() > 1e-3


def test_what_takes_the_place_of_the_density_averages_to_it(x64):
    """E[e^-log q | z] = 1 / q(z|x): the mean over draws in a cell of z gives the cell's area."""
    truth, x = Truth(), data(6)
    led, params = parameters(truth, x)
    encoding = jax.tree.map(lambda leaf: leaf[0], jax.device_get(jax.jit(led.encoding)(params, x)))
    sample = jax.jit(led.posterior_sample_and_log_prob, static_argnums=3)
    z, log_q = map(np.asarray, sample(params, KEY, encoding, (200_000,)))
    low, high = np.quantile(z, 0.3, 0), np.quantile(z, 0.7, 0)
    inside = ((z > low) & (z < high)).all(1)
    # The cell's area is the mean over all draws of 1 / q(z|x), or of 0 outside of the cell.
    terms = np.where(inside, np.exp(-log_q), 0)
    error = terms.std() / np.sqrt(len(terms))
    assert abs(terms.mean() - np.prod(high - low)) < 4.5 * error < 0.05 * np.prod(high - low)


def test_a_fresh_one_is_the_encoders_normal(x64):
    led, x = hierarchical(), data(6)
    params = jax.jit(led.init)(KEY, x)
    encoding = jax.jit(led.encoding)(params, x)
    sample = jax.jit(led.posterior_sample_and_log_prob, static_argnums=3)
    z, log_q = sample(params, KEY, encoding, (5,))
    expected = scipy.stats.norm.logpdf(z, encoding.mean, np.exp(encoding.log_std)).sum(-1)
    np.testing.assert_allclose(log_q, expected, rtol=1e-9)
    assert descriptions.from_json(descriptions.to_json(led.posterior)) == led.posterior


def test_what_needs_a_density_at_a_given_z_says_so():
    led, x = hierarchical(), data(6)
    params = jax.eval_shape(led.init, KEY, x)
    with pytest.raises(ValueError, match="integral over the auxiliary variables"):
        jax.eval_shape(lambda p: objectives.stl().loss(led, p, (), KEY, x, 0), params)
    with pytest.raises(ValueError, match="posterior .* is no flow, to be inverted"):
        led.posterior_inverse(params, normal((2,)))
    with pytest.raises(ValueError, match="expected an encoder with a context"):
        jax.eval_shape(led._replace(encoder=LED_MODEL.encoder).init, KEY, x)
    with pytest.raises(ValueError, match="num_auxiliary must be positive, got 0"):
        posteriors.auxiliary((2,), 0, flows.chain(), densities.standard_normal((1,)))
