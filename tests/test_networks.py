import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, randomise

from led_jax import networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_mlp_is_a_plain_network_with_a_linear_last_layer():
    network = networks.MLP((5, 4, 3))
    x = normal((2, 6, 7))
    params = randomise(network.init(KEY, x)["params"])
    h = x
    for i in range(3):
        h = h @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        h = np.maximum(h, 0) if i < 2 else h
    assert h.shape == (2, 6, 3) and np.any(h < 0)
    np.testing.assert_allclose(network.apply({"params": params}, x), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context_dim", [None, 4])
def test_mlp_encoder_splits_its_outputs(context_dim):
    encoder = networks.mlp_encoder(3, (8, 9), context_dim=context_dim)
    x = normal((5, 7))
    params = randomise(encoder.init(KEY, x))
    mean, log_std, context = encoder.apply(params, x)
    width = 6 + (context_dim or 0)
    out = networks.MLP((8, 9, width)).apply({"params": params}, x)
    np.testing.assert_array_equal(mean, out[:, :3])
    np.testing.assert_array_equal(log_std, out[:, 3:6])
    if context_dim is None:
        assert context is None
    else:
        np.testing.assert_array_equal(context, out[:, 6:])


@pytest.mark.parametrize(
    "make", [lambda: networks.mlp_encoder(50), lambda: networks.mlp_decoder(9)]
)
def test_the_papers_networks_have_two_hidden_layers_of_200(make):
    params = jax.eval_shape(make().init, KEY, jnp.zeros((2, 64)))
    assert params["Dense_0"]["kernel"].shape == (64, 200)
    assert params["Dense_1"]["kernel"].shape == (200, 200)
    assert params["Dense_2"]["kernel"].shape[0] == 200 and len(params) == 3


def test_bernoulli_decoder(x64):
    decoder = networks.bernoulli_decoder(nn.Dense(6))
    z = 3 * normal((4, 2))
    params = randomise(decoder.init(KEY, z), 1.0)
    probability = decoder.mean(params, z)
    logits = z @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logits)), rtol=1e-9)
    x = jax.random.bernoulli(KEY, 0.5, (4, 6)).astype(float)
    expected = scipy.stats.bernoulli.logpmf(x, probability).sum(-1)
    np.testing.assert_allclose(decoder.log_prob(params, z, x), expected, rtol=1e-9)

    draws = decoder.sample(params, KEY, jnp.broadcast_to(z, (4000, *z.shape)))
    assert set(np.unique(draws)) == {0, 1} and draws.dtype == z.dtype
    error = np.abs(draws.mean(0) - probability) / np.sqrt(probability * (1 - probability) / 4000)
    assert error.max() < 4.5


def test_bernoulli_decoder_is_finite_at_extreme_logits():
    decoder = networks.bernoulli_decoder(nn.Dense(2))
    params = {"kernel": 1e4 * jnp.eye(2), "bias": jnp.zeros(2)}
    z, x = jnp.array([[1.0, -1.0], [1.0, -1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    value = decoder.log_prob(params, z, x)
    np.testing.assert_allclose(value, [0, -2e4])
    gradient = jax.grad(lambda p: decoder.log_prob(p, z, x).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gaussian_decoder(x64):
    decoder = networks.gaussian_decoder(nn.Dense(3), 0.4)
    z, x = normal((5, 2)), normal((5, 3), seed=4)
    params = randomise(decoder.init(KEY, z))
    mean = z @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(decoder.mean(params, z), mean)
    expected = scipy.stats.norm.logpdf(x, mean, 0.4).sum(-1)
    np.testing.assert_allclose(decoder.log_prob(params, z, x), expected)
    draws = decoder.sample(params, KEY, jnp.broadcast_to(z, (2000, *z.shape)))
    standard = ((draws - mean) / 0.4).ravel()
    assert scipy.stats.kstest(np.asarray(standard), scipy.stats.norm.cdf).pvalue > 1e-3


def test_samples_of_z_broadcast_against_x():
    decoder = networks.mlp_decoder(6, (4,))
    z, x = normal((7, 5, 2)), jnp.ones((5, 6))
    params = randomise(decoder.init(KEY, z))
    actual = decoder.log_prob(params, z, x)
    expected = jnp.stack([decoder.log_prob(params, z[k], x) for k in range(7)])
    assert actual.shape == (7, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_wrong_widths():
    for decoder in (networks.mlp_decoder(6, (4,)), networks.gaussian_decoder(nn.Dense(6), 1.0)):
        params = decoder.init(KEY, normal((2,)))
        for shape in ((3, 5), (3, 1), ()):
            with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 6\], got \("):
                decoder.log_prob(params, normal((3, 2)), jnp.zeros(shape))
    encoder = networks.gaussian_encoder(nn.Dense(5), 2)
    params = encoder.init(KEY, normal((3,)))
    with pytest.raises(ValueError, match=r"encoder: expected 4 outputs, the network has \(2, 5\)"):
        encoder.apply(params, normal((2, 3)))
