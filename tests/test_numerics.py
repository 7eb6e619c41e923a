import jax
import jax.numpy as jnp
import numpy as np
import pytest

from led_jax.numerics import log_sigmoid, match_rank, relu, softplus, widened

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


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 4), (2, 3, 8)])
def test_relu_is_jax_s_in_value_and_both_modes_of_gradient(shape):
    x, tangent = jax.random.normal(jax.random.key(0), (2, *shape))
    x = x.at[..., :1].set(0) if x.ndim else x
    for actual, expected in zip(
        jax.jvp(relu, (x,), (tangent,)), jax.jvp(jax.nn.relu, (x,), (tangent,)), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)
    (actual,), (expected,) = (jax.vjp(f, x)[1](tangent) for f in (relu, jax.nn.relu))
    np.testing.assert_array_equal(actual, expected)


def test_match_rank_adds_axes_in_front():
    for x in (np.arange(3), jnp.arange(3), np.array([True])):
        matched = match_rank(x, 3)
        assert matched.shape == (1, 1, len(x)) and matched.dtype == jnp.asarray(x).dtype
        np.testing.assert_array_equal(matched[0, 0], x)


@pytest.mark.parametrize(
    "given,expected",
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_widened(x64, given, expected):
    assert widened(jnp.ones(2, given)).dtype == expected
