import jax
import jax.numpy as jnp
import numpy as np
import pytest

from led_jax.numerics import log_sigmoid, softplus

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_values_agree_with_jax(x64):
    x = jnp.linspace(-800, 800, 4001)
    np.testing.assert_allclose(softplus(x), jax.nn.softplus(x), rtol=1e-14)
    np.testing.assert_allclose(log_sigmoid(x), jax.nn.log_sigmoid(x), rtol=1e-14)


def test_slopes_are_sigmoids(x64):
    x = jnp.concatenate([jnp.linspace(-800, 800, 1000), jnp.linspace(-3, 3, 60)])
    np.testing.assert_allclose(jax.vmap(jax.grad(softplus))(x), jax.nn.sigmoid(x), atol=1e-15)
    np.testing.assert_allclose(jax.vmap(jax.grad(log_sigmoid))(x), jax.nn.sigmoid(-x), atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_stay_finite_and_dtype_is_kept(dtype):
    x = jnp.array([-1e30, -100, 0, 100, 1e30], dtype)
    for function in (softplus, log_sigmoid):
        value, slope = jax.vmap(jax.value_and_grad(function))(x)
        assert value.dtype == slope.dtype == dtype
        assert np.isfinite(value.astype(jnp.float32)).all()
        assert np.isfinite(slope.astype(jnp.float32)).all()
