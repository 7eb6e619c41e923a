import jax
import jax.numpy as jnp
import numpy as np
import pytest

from led_jax.numerics import as_float, log_sigmoid, match_rank, relu, softplus, widened

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_values_agree_with_jax(x64):
    x = jnp.linspace(-800, 800, 4001)
    np.testing.assert_allclose(softplus(x), jax.nn.softplus(x), rtol=1e-14)
    np.testing.assert_allclose(log_sigmoid(x), jax.nn.log_sigmoid(x), rtol=1e-14)


def test_slopes_are_sigmoids(x64):
    x = jnp.concatenate([jnp.linspace(-800, 800, 1000), jnp.linspace(-3, 3, 61)])
    assert 0 in x
    np.testing.assert_allclose(jax.vmap(jax.grad(softplus))(x), jax.nn.sigmoid(x), atol=1e-15)
    np.testing.assert_allclose(jax.vmap(jax.grad(log_sigmoid))(x), jax.nn.sigmoid(-x), atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_stay_finite_and_dtype_is_kept(dtype):
    x = jnp.array([-1e30, -100, 0, 100, 1e30], dtype)
    for function in (softplus, log_sigmoid):
        value, slope = jax.vmap(jax.value_and_grad(function))(x)
        assert value.dtype == slope.dtype == dtype
        assert np.isfinite(value.astype(jnp.float32)).all()
        assert np.isfinite(slope.astype(jnp.float32)).all()


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_floats_come_through_the_door_as_they_are(dtype):
    x = jnp.arange(3).astype(dtype)
    assert as_float("x", x) is x
    for other in (np.asarray(x), list(x)):
        y = as_float("x", other)
        assert y.dtype == dtype and isinstance(y, jax.Array)
        np.testing.assert_array_equal(y, x)
    assert jax.eval_shape(lambda x: as_float("x", [x, x]), x).dtype == dtype


def test_floats_of_double_precision_are_kept_where_jax_has_them(x64):
    assert as_float("x", np.ones(2)).dtype == as_float("x", [1]).dtype == jnp.float64
    assert as_float("x", np.ones(2, np.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (3, 3),
        (2.5, 2.5),
        (True, 1),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        (np.array([2**40]), [2.0**40]),  # More bits than JAX's integers have.
        (np.array([200], np.uint8), [200]),
        (np.array([True, False]), [1, 0]),
        ([], []),
    ],
)
def test_other_numbers_become_the_default_float(x, expected):
    y = as_float("x", x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (1j, "got complex64"),
        (np.ones(2, complex), "got complex"),
        ("one", "'one'"),
        (None, "None"),
        ([[1], [1, 2]], "inhomogeneous"),
        (jax.random.key(0), "got key"),
    ],
)
def test_what_is_no_real_number_is_refused_by_name(x, message):
    with pytest.raises(ValueError, match=f"^pixels: expected real numbers.*{message}"):
        as_float("pixels", x)


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
