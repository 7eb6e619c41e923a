import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, random_params

from led_jax import Likelihood, decoders, densities, flows, likelihoods, networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def results(decoder, params, z, x, num_draws):
    """The mean, the log-density at x, and draws, as NumPy arrays from one compilation."""

    @jax.jit
    def compute(params, z, x):
        draws = decoder.sample(params, KEY, jnp.broadcast_to(z, (num_draws, *z.shape)))
        return decoder.mean(params, z), decoder.log_prob(params, z, x), draws

    return jax.device_get(compute(params, z, x))


@pytest.mark.slow
def test_bernoulli_decoder(x64):
    decoder = decoders.decoder(likelihoods.bernoulli(), nn.Dense(6))
    z = 3 * np.asarray(normal((4, 2)))
    x = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(float)
    params = jax.device_get(random_params(decoder.init, z, scale=1.0))
    probability, log_prob, draws = results(decoder, params, z, x, 4000)
    logits = z @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits)), rtol=1e-9)
    expected = scipy.stats.bernoulli.logpmf(x, probability).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9)
    assert set(np.unique(draws)) == {0, 1} and draws.dtype == z.dtype
    error = np.abs(draws.mean(0) - probability) / np.sqrt(probability * (1 - probability) / 4000)
    assert error.max() < 4.5


@pytest.mark.slow
def test_bernoulli_decoder_is_finite_at_extreme_logits():
    decoder = decoders.decoder(likelihoods.bernoulli(), nn.Dense(2))
    params = {"kernel": 1e4 * np.eye(2), "bias": np.zeros(2)}
    z, x = np.array([[1.0, -1.0], [1.0, -1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    value, pullback = jax.vjp(jax.jit(lambda p: decoder.log_prob(p, z, x)), params)
    np.testing.assert_allclose(value, [0, -2e4])
    gradient = jax.device_get(pullback(np.ones(2, np.float32)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_gaussian_decoder(x64):
    decoder = decoders.decoder(likelihoods.gaussian(0.4), nn.Dense(3))
    z, x = jax.device_get((normal((5, 2)), normal((5, 3), seed=4)))
    params = jax.device_get(random_params(decoder.init, z))
    found_mean, log_prob, draws = results(decoder, params, z, x, 2000)
    mean = z @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(found_mean, mean)
    expected = scipy.stats.norm.logpdf(x, mean, 0.4).sum(-1)
    np.testing.assert_allclose(log_prob, expected)
    standard = ((draws - mean) / 0.4).ravel()
    assert scipy.stats.kstest(standard, scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "size"), [("one", 1), ("entry", 3)])
def test_a_deviation_that_does_not_depend_on_z(x64, scale, size):
    decoder = decoders.decoder(likelihoods.learned_gaussian(scale), nn.Dense(3))
    z, x = jax.device_get((normal((5, 2)), normal((7, 5, 3), seed=4)))
    assert jax.eval_shape(decoder.init, KEY, z)["free"].shape == (size,)
    params = jax.device_get(random_params(decoder.init, z))

    @jax.jit
    def compute(params):
        slope = jax.grad(lambda p: decoder.log_prob(p, z, x).mean())(params)["free"]
        return decoder.log_prob(params, z, x), slope

    log_prob, slope = compute(params)
    mean = z @ params["network"]["kernel"] + params["network"]["bias"]
    expected = scipy.stats.norm.logpdf(x, mean, np.exp(params["free"])).sum(-1)
    np.testing.assert_allclose(log_prob, expected)
    # The gradient that fits the deviations to the residuals, against the one by hand.
    by_hand = (((x - mean) * np.exp(-params["free"])) ** 2 - 1).mean((0, 1))
    np.testing.assert_allclose(slope, by_hand if size == 3 else by_hand.sum(keepdims=True))


@pytest.mark.slow
def test_a_density_as_decoder_integrates_to_one_at_every_z(x64):
    flow = flows.real_nvp((2,), 2, hidden=(4,), context_dim=3)
    density = densities.transformed(densities.standard_normal((2,)), flow)
    decoder = decoders.density_decoder(density, (2,), networks.MLP((4, 3)), mean_samples=4000)
    z = np.asarray(normal((2, 1, 2)))
    params = random_params(decoder.init, z, scale=0.5)
    step = 0.06
    axis = np.arange(-15, 15, step)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    mass = np.exp(jax.jit(decoder.log_prob)(params, z, grid)) * step**2
    assert mass.shape == (2, len(grid))
    # The conditioner's kinks bound the sum's accuracy: 1e-5 at this step.
    np.testing.assert_allclose(mass.sum(1), 1, rtol=1e-4)
    means = mass @ grid
    assert np.abs(means[0] - means[1]).max() > 0.05  # They depend on z.
    found = jax.jit(decoder.mean)(params, z[:, 0])
    draws = jax.jit(decoder.sample)(params, KEY, np.broadcast_to(z[:, 0], (4000, 2, 2)))
    for sampled in (found, np.asarray(draws).mean(0)):
        np.testing.assert_allclose(sampled, means, atol=4 * 2 / np.sqrt(4000))


@pytest.mark.slow
def test_a_density_of_images_as_decoder_of_their_rows(x64):
    shape = (4, 6, 2)
    conditioner = partial(flows.convnet, shape)
    flow = flows.real_nvp(shape, 3, (4,), "checkerboard", context_dim=72, conditioner=conditioner)
    density = densities.transformed(densities.standard_normal(shape), flow)
    decoder = decoders.density_decoder(density, shape, networks.MLP((5, 72)), mean_samples=50)
    z, x = normal((5, 2)), np.asarray(normal((7, 5, 48), seed=1))
    params = random_params(decoder.init, z)

    @jax.jit
    def compute(params, z, x):
        code = networks.MLP((5, 72)).apply({"params": params["network"]}, z)
        expected = density.log_prob(params["density"], x.reshape(7, 5, *shape), code)
        drawn = density.sample_and_log_prob(params["density"], KEY, (), code)[0]
        log_prob, draw = decoder.log_prob(params, z, x), decoder.sample(params, KEY, z)
        return log_prob, expected, draw, drawn.reshape(5, 48)

    log_prob, expected, draw, drawn = compute(params, z, x)
    np.testing.assert_allclose(log_prob, expected)
    assert draw.shape == jax.eval_shape(decoder.mean, params, z).shape == (5, 48)
    np.testing.assert_allclose(draw, drawn)
    for wrong in (x[..., :-1], x.reshape(7, 5, *shape), np.zeros(())):
        with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 48\], got"):
            decoder.log_prob(params, z, wrong)


@pytest.mark.slow
def test_samples_of_z_broadcast_against_x():
    decoder = decoders.mlp_decoder(6, (4,))
    z, x = np.asarray(normal((7, 5, 2))), np.ones((5, 6))
    params = random_params(decoder.init, z)
    log_prob = jax.jit(decoder.log_prob)
    actual = log_prob(params, z, x)
    expected = np.stack([log_prob(params, z[k], x) for k in range(7)])
    assert actual.shape == (7, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def poisson():
    """Counts with a rate of e^raw."""

    def log_prob(raw, x):
        return x * raw[..., 0, :] - jnp.exp(raw[..., 0, :]) - jax.lax.lgamma(x + 1.0)

    def mean(raw):
        return jnp.exp(raw[..., 0, :])

    def sample(key, raw):
        return jax.random.poisson(key, mean(raw)).astype(raw.dtype)

    return Likelihood(1, log_prob, mean, sample)


def scaled_gaussian():
    """A normal whose mean and log-deviation the network emits."""

    def log_prob(raw, x):
        mean, log_std = raw[..., 0, :], jnp.tanh(raw[..., 1, :]) / 2
        return jax.scipy.stats.norm.logpdf(x, mean, jnp.exp(log_std))

    def sample(key, raw):
        mean, log_std = raw[..., 0, :], jnp.tanh(raw[..., 1, :]) / 2
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    return Likelihood(2, log_prob, lambda raw: raw[..., 0, :], sample)


SHAPE = (1, 2)
NETWORKS = {
    "mlp": lambda likelihood: decoders.mlp_decoder(2, (4,), likelihood=likelihood),
    "resconv": lambda likelihood: decoders.resconv_decoder(SHAPE, (2,), 4, likelihood=likelihood),
    "spatial": lambda likelihood: decoders.spatial_decoder(
        SHAPE, (1, 1, 2), (2,), likelihood=likelihood
    ),
}
Z_SHAPES = {"mlp": (2,), "resconv": (2,), "spatial": (1, 1, 2)}
# Each with values of an entry that have nearly all mass, and the weight of a value in a sum.
LIKELIHOODS = {
    "bernoulli": (likelihoods.bernoulli, np.arange(2.0), 1),
    "poisson": (poisson, np.arange(40.0), 1),
    "gaussian": (lambda: likelihoods.gaussian(0.7), np.linspace(-9, 9, 91), 0.2),
    "scaled": (scaled_gaussian, np.linspace(-15, 15, 151), 0.2),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_under_every_network_is_normalised(x64, name, network):
    """p(x|z) sums to one over all x, and its moments are those of `mean` and of samples."""
    make, values, weight = LIKELIHOODS[name]
    decoder = NETWORKS[network](make())
    z = np.asarray(normal((2, *Z_SHAPES[network])))
    params = random_params(decoder.init, z, scale=0.2)
    x = np.array(list(itertools.product(values, repeat=2)))
    rows = np.broadcast_to(z, (2000, *z.shape))

    @jax.jit
    def compute(params):
        log_prob = decoder.log_prob(params, z[:, None], x)
        return log_prob, decoder.mean(params, z), decoder.sample(params, KEY, rows)

    log_prob, mean, draws = map(np.asarray, compute(params))
    assert log_prob.shape == (2, len(x)) and mean.shape == (2, 2) and draws.shape == (2000, 2, 2)
    probability = np.exp(log_prob) * weight**2
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
    assert np.abs(mean[0] - mean[1]).max() > 1e-3
    np.testing.assert_allclose(probability @ x, mean, atol=1e-4)
    std = np.sqrt(np.maximum(probability @ x**2 - mean**2, 0))
    assert np.max(np.abs(draws.mean(0) - mean) / std) < 4.5 / np.sqrt(2000)
    np.testing.assert_allclose(draws.std(0), std, rtol=0.15)


@pytest.mark.parametrize("network", ["resconv", "spatial"])
def test_several_outputs_a_pixel_come_in_the_order_that_a_likelihood_reads(network):
    """The last layer's bias is a number for each output of a pixel: 3 for means, -1 for scales."""
    decoder = NETWORKS[network](scaled_gaussian())
    z = normal((5, *Z_SHAPES[network]))
    params = random_params(decoder.init, z, scale=0.0)
    params["ResBlock_0"]["Conv_1"]["bias"] = np.array([3.0, -1.0])
    x = normal((5, 2), seed=4)
    mean, log_prob = jax.jit(lambda p: (decoder.mean(p, z), decoder.log_prob(p, z, x)))(params)
    np.testing.assert_allclose(mean, np.full((5, 2), 3.0))
    expected = scipy.stats.norm.logpdf(x, 3, np.exp(np.tanh(-1) / 2)).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


@pytest.mark.slow
def test_wrong_widths():
    for likelihood in (likelihoods.bernoulli(), likelihoods.gaussian(1.0)):
        decoder = decoders.decoder(likelihood, nn.Dense(6))
        params = random_params(decoder.init, normal((2,)))
        for shape in ((3, 5), (3, 1), ()):
            with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 6\], got \("):
                decoder.log_prob(params, normal((3, 2)), np.zeros(shape))
    decoder = decoders.decoder(scaled_gaussian(), nn.Dense(5))
    params = random_params(decoder.init, normal((2,)))
    with pytest.raises(ValueError, match="takes 2 outputs an entry, but the network has 5"):
        decoder.mean(params, normal((2,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resconv"])
def test_a_context_is_read_and_broadcasts_against_z_and_x(name):
    decoder = NETWORKS[name](likelihoods.bernoulli())
    z, context, x = np.asarray(normal((7, 4, 2))), normal((4, 5), seed=2), np.ones((4, 2))
    params = random_params(decoder.init, z[0], context)

    @jax.jit
    def log_probs(params, z, x, context):
        whole = jnp.broadcast_to(x, (7, 4, 2)), jnp.broadcast_to(context, (7, 4, 5))
        cases = (x, context), whole, (x, context[::-1])
        return [decoder.log_prob(params, z, *args) for args in cases]

    actual, expected, other = jax.device_get(log_probs(params, z, x, context))
    assert actual.shape == (7, 4)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert np.all(np.abs(actual - other) > 1e-6)
    assert jax.eval_shape(decoder.mean, params, z, context).shape == (7, 4, 2)
    assert jax.eval_shape(decoder.sample, params, KEY, z, context).shape == (7, 4, 2)


def test_without_fully_connected_layers_no_context_is_read():
    decoder = NETWORKS["spatial"](likelihoods.bernoulli())
    with pytest.raises(ValueError, match=r"decoder: .* no context, got one of shape \(2, 3\)"):
        decoder.init(KEY, normal((2, 1, 1, 2)), normal((2, 3)))


def test_half_precision_is_summed_in_float32():
    """Each term is rounded by 0.003 nats in bfloat16: 3 nats in all, of the sum's own 8."""
    decoder = decoders.mlp_decoder(1000, (2,), likelihood=likelihoods.gaussian(1.0))
    z, x = np.zeros((1, 2), jnp.bfloat16), np.ones((1, 1000), jnp.bfloat16)
    shapes = jax.eval_shape(decoder.init, KEY, z)
    params = jax.tree.map(lambda p: np.zeros(p.shape, jnp.bfloat16), shapes)
    log_prob = np.asarray(jax.jit(decoder.log_prob)(params, z, x))
    expected = 1000 * scipy.stats.norm.logpdf(1)
    assert log_prob.dtype == jnp.bfloat16
    assert log_prob[0] == expected.astype(jnp.bfloat16)
