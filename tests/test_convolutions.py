import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from support import normal, random_params

from led_jax import convolutions

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def correlate(x, kernel):
    """The oracle: SciPy's correlation, without padding, channel by channel."""
    return np.stack(
        [
            sum(
                scipy.signal.correlate2d(x[..., c], kernel[:, :, c, k], "valid")
                for c in range(x.shape[-1])
            )
            for k in range(kernel.shape[-1])
        ],
        -1,
    )


def interpolate(x):
    """Doubles `[H, W, C]` bilinearly, its edges replicated: one more row and column all round."""
    for axis in (0, 1):
        size = x.shape[axis]
        positions = (np.arange(-1, 2 * size + 1) + 0.5) / 2 - 0.5
        low = np.floor(positions).astype(int)
        part = (positions - low).reshape(-1, *(1,) * (2 - axis))
        # The map is doubled before it is padded: the outermost rows repeat those next to them.
        below, above = (np.take(x, np.clip(i, 0, size - 1), axis) for i in (low, low + 1))
        x = (1 - part) * below + part * above
    return x


# Fewer outputs than inputs, and far fewer, are computed in other ways.
@pytest.mark.slow
@pytest.mark.parametrize("stride,channels,features", [(1, 2, 3), (1, 3, 2), (1, 16, 2), (2, 8, 2)])
def test_convolution_and_its_gradient(x64, stride, channels, features):
    x = np.asarray(normal((2, 5, 6, channels)))
    kernel = np.asarray(normal((3, 2, channels, features), seed=2))
    expected = np.stack([correlate(image, kernel) for image in x])[:, ::stride, ::stride]
    weight = normal(expected.shape, seed=3)

    def convolve(x, kernel):
        return convolutions.convolve(x, kernel, stride)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    @jax.jit
    def results(*args):
        gradients = [
            jax.grad(lambda *args, fn=fn: (weight * fn(*args)).sum(), (0, 1))(*args)
            for fn in (convolve, reference)
        ]
        return convolve(*args), gradients

    y, gradients = results(x, kernel)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend,batch", [("cpu", ()), ("cpu", (2, 3)), ("gpu", (2, 3))])
def test_any_batch_shape_on_every_backend(monkeypatch, batch, backend):
    x, kernel = np.asarray(normal((*batch, 4, 5, 2))), normal((3, 3, 2, 4), seed=2)
    expected = np.asarray(jax.jit(convolutions.convolve)(x.reshape(-1, 4, 5, 2), kernel))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # A new function is traced anew, for this backend.
    actual = jax.jit(lambda *args: convolutions.convolve(*args))(x, kernel)
    assert actual.shape == (*batch, 2, 3, 4)
    np.testing.assert_allclose(actual, expected.reshape(actual.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 3), (1, 1)])
def test_upsampling_is_interpolation_and_then_convolution(x64, shape):
    x, kernel = jax.device_get((normal((2, *shape, 2)), normal((3, 3, 2, 5), seed=2)))
    y = jax.jit(convolutions.upsample_and_convolve)(x, kernel)
    expected = np.stack([correlate(interpolate(image), kernel) for image in x])
    assert y.shape == (2, 2 * shape[0], 2 * shape[1], 5)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("stride,shape", [(1, (5, 4)), (2, (3, 2))])
def test_layer_pads_with_zeros(stride, shape):
    layer, x = convolutions.Conv(3, stride), normal((2, 5, 4, 2))

    @jax.jit
    def results(params, x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel, bias = params["params"]["kernel"], params["params"]["bias"]
        return layer.apply(params, x), convolutions.convolve(padded, kernel, stride) + bias

    y, expected = results(random_params(layer.init, x), x)
    assert y.shape == (2, *shape, 3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
