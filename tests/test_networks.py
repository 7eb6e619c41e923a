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


def test_the_papers_resconv_has_three_strided_blocks_and_a_layer_of_450():
    encoder, decoder = networks.resconv_encoder((28, 28), 32), networks.resconv_decoder((28, 28))
    x, z = jnp.zeros((2, 784)), jnp.zeros((2, 32))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(encoder.init, KEY, x))
    for i, (channels, features) in enumerate([(1, 16), (16, 32), (32, 32)]):
        block = shapes[f"ResBlock_{i}"]
        assert block["Conv_0"]["kernel"] == (3, 3, channels, 2 * features)  # with the shortcut
        assert block["Conv_1"]["kernel"] == (3, 3, features, features)
    assert shapes["Dense_0"]["kernel"] == (4 * 4 * 32, 450)
    assert shapes["Dense_1"]["kernel"] == (450, 64)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(decoder.init, KEY, z))
    assert shapes["Dense_0"]["kernel"] == (32, 450)
    assert shapes["Dense_1"]["kernel"] == (450, 4 * 4 * 32)
    for i, (channels, features) in enumerate([(32, 32), (32, 16), (16, 1)]):
        block = shapes[f"ResBlock_{i}"]
        assert block["Conv_0"]["kernel"] == (3, 3, channels, channels + features)
        assert block["Conv_1"]["kernel"] == (3, 3, channels, features)


@pytest.mark.parametrize("image_shape,weight_norm", [((9, 6), False), ((1, 2), True)])
def test_resconv_takes_images_of_any_size(image_shape, weight_norm):
    kwargs = {"features": (2, 3), "hidden": 4, "weight_norm": weight_norm}
    encoder = networks.resconv_encoder(image_shape, 3, context_dim=2, **kwargs)
    decoder = networks.resconv_decoder(image_shape, **kwargs)
    size = image_shape[0] * image_shape[1]
    x = jax.random.bernoulli(KEY, 0.5, (2, 5, size)).astype(float)
    params = jax.jit(encoder.init)(KEY, x), jax.jit(decoder.init)(KEY, normal((3,)))

    @jax.jit
    def log_prob(params, x):
        mean, log_std, context = encoder.apply(params[0], x)
        assert mean.shape == log_std.shape == (*x.shape[:-1], 3)
        assert context.shape == (*x.shape[:-1], 2)
        z = mean + log_std + context.sum(-1, keepdims=True)
        return decoder.log_prob(params[1], z, x)

    params = randomise(params)
    value = log_prob(params, x)
    assert value.shape == (2, 5)
    np.testing.assert_allclose(value[1, 2], log_prob(params, x[1, 2]), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda params: log_prob(params, x).sum()))(params)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_weight_norm_parts_the_length_of_the_weights_from_their_direction():
    encoder = networks.resconv_encoder((4, 4), 2, (2,), 3, weight_norm=True)
    apply, x = jax.jit(encoder.apply), normal((5, 16))
    params = randomise(jax.jit(encoder.init)(KEY, x))

    def scaled(name):
        return jax.tree.map_with_path(
            lambda path, leaf: 3 * leaf if path[-1].key.endswith(name) else leaf, params
        )

    before = apply(params, x).mean
    np.testing.assert_allclose(apply(scaled("kernel"), x).mean, before, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(apply(scaled("scale"), x).mean - before) > 1e-3)


def test_resconv_refuses_images_of_another_size():
    encoder = networks.resconv_encoder((6, 4), 2, (2,), 3)
    with pytest.raises(ValueError, match=r"flattened images \(6, 4\), so \[\.\.\., 24\], got"):
        encoder.init(KEY, jnp.zeros((2, 25)))


@pytest.mark.parametrize("latent_shape,num_blocks", [((4, 3, 2), 1), ((2, 2, 3), 2)])
@pytest.mark.parametrize("context_maps", [None, 2])
def test_spatial_networks_keep_a_map(latent_shape, num_blocks, context_maps):
    kwargs = {"features": (2, 3), "weight_norm": context_maps is None}
    encoder = networks.spatial_encoder((7, 6), latent_shape, context_maps=context_maps, **kwargs)
    decoder = networks.spatial_decoder((7, 6), latent_shape, **kwargs)
    x, z = normal((2, 5, 42)), normal((3, 2, 5, *latent_shape))
    encoder_params, decoder_params = (
        jax.eval_shape(encoder.init, KEY, x),
        jax.eval_shape(decoder.init, KEY, z),
    )
    for params in (encoder_params, decoder_params):
        assert sum(name.startswith("ResBlock") for name in params) == num_blocks
        assert not any(name.startswith("Dense") for name in params)
    mean, log_std, context = jax.eval_shape(encoder.apply, encoder_params, x)
    assert mean.shape == log_std.shape == (2, 5, *latent_shape)
    if context_maps is None:
        assert context is None
    else:
        assert context.shape == (2, 5, latent_shape[0] * latent_shape[1] * context_maps)
    assert jax.eval_shape(decoder.log_prob, decoder_params, z, x).shape == (3, 2, 5)


def test_a_spatial_context_is_a_map_beside_mean_and_log_std():
    encoder = networks.spatial_encoder((8, 8), (4, 4, 2), (3,), context_maps=2)
    x = normal((64,))
    params = randomise(jax.jit(encoder.init)(KEY, x))
    # The context's kernels are made those of the mean, so that the two are one map.
    last = params["Conv_0"]
    params["Conv_0"] = {k: v.at[..., 4:].set(v[..., :2]) for k, v in last.items()}
    mean, _, context = jax.jit(encoder.apply)(params, x)
    np.testing.assert_allclose(context.reshape(4, 4, 2), mean, rtol=1e-5, atol=1e-6)


def test_spatial_networks_refuse_other_latent_shapes():
    for make in (networks.spatial_encoder, networks.spatial_decoder):
        with pytest.raises(
            ValueError, match=r"images \(28, 28\) to \(14, 14\), \(7, 7\), \(4, 4\);"
        ):
            make((28, 28), (8, 8, 2))
    decoder = networks.spatial_decoder((8, 8), (4, 4, 2), (3,))
    with pytest.raises(
        ValueError, match=r"expected z of shape \[\.\.\., 4, 4, C\], got \(4, 2, 2\)"
    ):
        decoder.init(KEY, normal((4, 2, 2)))


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
