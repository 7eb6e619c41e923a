import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, random_params

from led_jax import encoders, networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


@pytest.mark.parametrize("context_dim", [None, 4])
def test_mlp_encoder_splits_its_outputs(context_dim):
    encoder = encoders.mlp_encoder(3, (8, 9), context_dim=context_dim)
    x = normal((5, 7))
    params = random_params(encoder.init, x)
    network = networks.MLP((8, 9, 6 + (context_dim or 0)))
    apply = jax.jit(lambda p: (encoder.apply(p, x), network.apply({"params": p}, x)))
    (mean, log_std, context), out = jax.device_get(apply(params))
    np.testing.assert_array_equal(mean, out[:, :3])
    np.testing.assert_array_equal(log_std, out[:, 3:6])
    if context_dim is None:
        assert context is None
    else:
        np.testing.assert_array_equal(context, out[:, 6:])


@pytest.mark.slow
def test_weight_norm_parts_the_length_of_the_weights_from_their_direction():
    encoder = encoders.resconv_encoder((4, 4), 2, (2,), 3, weight_norm=True)
    apply, x = jax.jit(encoder.apply), normal((5, 16))
    params = jax.device_get(random_params(encoder.init, x))

    def scaled(name):
        return jax.tree.map_with_path(
            lambda path, leaf: 3 * leaf if path[-1].key.endswith(name) else leaf, params
        )

    before, of_kernel, of_scale = (
        np.asarray(apply(p, x).mean) for p in (params, scaled("kernel"), scaled("scale"))
    )
    np.testing.assert_allclose(of_kernel, before, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(of_scale - before) > 1e-3)


def test_resconv_refuses_images_of_another_size():
    encoder = encoders.resconv_encoder((6, 4), 2, (2,), 3)
    with pytest.raises(ValueError, match=r"flattened images \(6, 4\), so \[\.\.\., 24\], got"):
        encoder.init(KEY, np.zeros((2, 25)))


@pytest.mark.slow
def test_a_spatial_context_is_a_map_beside_mean_and_log_std():
    encoder = encoders.spatial_encoder((8, 8), (4, 4, 2), (3,), context_maps=2)
    x = normal((64,))
    params = jax.device_get(random_params(encoder.init, x))
    # With the weights of the mean copied to the context, the two are the same map.
    last = params["Conv_0"]
    params["Conv_0"] = {k: v[..., [0, 1, 2, 3, 0, 1]] for k, v in last.items()}
    mean, _, context = jax.device_get(jax.jit(encoder.apply)(params, x))
    np.testing.assert_allclose(context.reshape(4, 4, 2), mean, rtol=1e-5, atol=1e-6)


def test_wrong_widths():
    encoder = encoders.gaussian_encoder(nn.Dense(5), 2)
    params = random_params(encoder.init, normal((3,)))
    with pytest.raises(ValueError, match=r"encoder: expected 4 outputs, the network has \(2, 5\)"):
        encoder.apply(params, normal((2, 3)))


ENCODERS = {
    "mlp": lambda: encoders.mlp_encoder(2, (5,), context_dim=2),
    "resconv": lambda: encoders.resconv_encoder((4, 3), 2, (2,), 5, context_dim=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_a_context_is_read_and_broadcasts_against_x(name):
    encoder = ENCODERS[name]()
    x, context = jax.device_get((normal((4, 12)), normal((3, 1, 5), seed=2)))
    params = random_params(encoder.init, x[0], context[0, 0])

    @jax.jit
    def apply(params, x, context):
        whole = jnp.broadcast_to(x, (3, 4, 12)), jnp.broadcast_to(context, (3, 4, 5))
        return encoder.apply(params, x, context), encoder.apply(params, *whole)

    actual, expected = jax.device_get(apply(params, x, context))
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == (3, 4, 2)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(actual.mean[0] - actual.mean[1]) > 1e-6)


@pytest.mark.slow
def test_without_fully_connected_layers_no_context_is_read():
    encoder = encoders.spatial_encoder((4, 4), (2, 2, 1), (2,))
    with pytest.raises(ValueError, match=r"encoder: .* no context, got one of shape \(2, 3\)"):
        jax.eval_shape(encoder.init, KEY, normal((2, 16)), normal((2, 3)))


class Noisy(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(self.rate, deterministic=False)(nn.Dense(4)(x))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def test_a_module_of_more_than_parameters_is_refused():
    encoder = encoders.gaussian_encoder(Normalised(), 2)
    with pytest.raises(ValueError, match="Normalised: .*nothing but parameters.*batch_stats"):
        jax.eval_shape(encoder.init, KEY, normal((3, 5)))
    encoder = encoders.gaussian_encoder(Noisy(0.5), 2)
    params = jax.eval_shape(encoder.init, KEY, normal((3, 5)))
    with pytest.raises(ValueError, match="Noisy: .*draws nothing at random"):
        jax.eval_shape(encoder.apply, params, normal((3, 5)))
