import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, random_params

from led_jax import decoders, encoders, networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


@pytest.mark.slow
def test_mlp_is_a_plain_network_with_a_linear_last_layer():
    network = networks.MLP((5, 4, 3))
    x = np.asarray(normal((2, 6, 7)))
    params = jax.device_get(random_params(network.init, x)["params"])
    h = x
    for i in range(3):
        h = h @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        h = np.maximum(h, 0) if i < 2 else h
    assert h.shape == (2, 6, 3) and np.any(h < 0)
    actual = jax.jit(network.apply)({"params": params}, x)
    np.testing.assert_allclose(actual, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: encoders.mlp_encoder(50), lambda: decoders.mlp_decoder(9)]
)
def test_the_papers_networks_have_two_hidden_layers_of_200(make):
    params = jax.eval_shape(make().init, KEY, np.zeros((2, 64)))
    assert params["Dense_0"]["kernel"].shape == (64, 200)
    assert params["Dense_1"]["kernel"].shape == (200, 200)
    assert params["Dense_2"]["kernel"].shape[0] == 200 and len(params) == 3


def test_the_papers_resconv_has_three_strided_blocks_and_a_layer_of_450():
    encoder, decoder = encoders.resconv_encoder((28, 28), 32), decoders.resconv_decoder((28, 28))
    x, z = np.zeros((2, 784)), np.zeros((2, 32))
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


@pytest.mark.slow
@pytest.mark.parametrize("image_shape,weight_norm", [((9, 6), False), ((1, 2), True)])
def test_resconv_takes_images_of_any_size(image_shape, weight_norm):
    kwargs = {"features": (2, 3), "hidden": 4, "weight_norm": weight_norm}
    encoder = encoders.resconv_encoder(image_shape, 3, context_dim=2, **kwargs)
    decoder = decoders.resconv_decoder(image_shape, **kwargs)
    size = image_shape[0] * image_shape[1]
    x = np.random.default_rng(0).integers(0, 2, (2, 5, size)).astype(float)
    params = random_params(encoder.init, x), random_params(decoder.init, normal((3,)))

    def log_prob(params, x):
        mean, log_std, context = encoder.apply(params[0], x)
        assert mean.shape == log_std.shape == (*x.shape[:-1], 3)
        assert context.shape == (*x.shape[:-1], 2)
        z = mean + log_std + context.sum(-1, keepdims=True)
        return decoder.log_prob(params[1], z, x)

    @jax.jit
    def compute(params):
        value, pullback = jax.vjp(lambda params: log_prob(params, x), params)
        return value, log_prob(params, x[1, 2]), pullback(jnp.ones_like(value))[0]

    value, one, gradient = jax.device_get(compute(params))
    assert value.shape == (2, 5)
    np.testing.assert_allclose(value[1, 2], one, rtol=1e-4)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("latent_shape,num_blocks", [((4, 3, 2), 1), ((2, 2, 3), 2)])
@pytest.mark.parametrize("context_maps", [None, 2])
def test_spatial_networks_keep_a_map(latent_shape, num_blocks, context_maps):
    kwargs = {"features": (2, 3), "weight_norm": context_maps is None}
    encoder = encoders.spatial_encoder((7, 6), latent_shape, context_maps=context_maps, **kwargs)
    decoder = decoders.spatial_decoder((7, 6), latent_shape, **kwargs)
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


@pytest.mark.parametrize("image_shape", [(8,), (8, 0), (8, 8, 3, 1)])
def test_convolutional_networks_refuse_what_is_no_image(image_shape):
    message = r"image_shape must be \(H, W\) or \(H, W, C\), all positive"
    for make in (
        lambda: encoders.resconv_encoder(image_shape, 2),
        lambda: decoders.resconv_decoder(image_shape),
        lambda: encoders.spatial_encoder(image_shape, (4, 4, 2)),
        lambda: decoders.spatial_decoder(image_shape, (4, 4, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_spatial_networks_refuse_other_latent_shapes():
    for make in (encoders.spatial_encoder, decoders.spatial_decoder):
        with pytest.raises(
            ValueError, match=r"images \(28, 28\) to \(14, 14\), \(7, 7\), \(4, 4\);"
        ):
            make((28, 28), (8, 8, 2))
    decoder = decoders.spatial_decoder((8, 8), (4, 4, 2), (3,))
    with pytest.raises(
        ValueError, match=r"expected z of shape \[\.\.\., 4, 4, C\], got \(4, 2, 2\)"
    ):
        decoder.init(KEY, normal((4, 2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("num_params", [1, 2])
def test_colours_are_the_last_axis_of_every_parameter(num_params):
    """A network whose last bias alone is not zero: number p * C + c for parameter p, colour c."""
    module = networks.ResConvDecoder((6, 5, 3), (4, 4), 8, False, num_params)
    params = random_params(module.init, np.zeros((2, 7)), scale=0.0)
    numbers = np.arange(3.0 * num_params)
    params["params"]["ResBlock_1"]["Conv_1"]["bias"] = numbers
    out = np.asarray(jax.jit(module.apply)(params, normal((2, 7))))
    out = out.reshape(2, num_params, 6, 5, 3)
    expected = numbers.reshape(num_params, 1, 1, 3)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))
    encoder, x = encoders.resconv_encoder((6, 5, 3), 4, (4,), 8), np.zeros((2, 90))
    shapes = jax.eval_shape(encoder.init, KEY, x)
    assert shapes["ResBlock_0"]["Conv_0"]["kernel"].shape == (3, 3, 3, 8)
    assert jax.eval_shape(encoder.apply, shapes, x).mean.shape == (2, 4)
