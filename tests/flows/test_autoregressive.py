import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, randomise
from support.cases import smooth_made

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


@pytest.mark.parametrize("dim,hidden", [(1, (3,)), (2, (4,)), (5, (9, 6)), (50, (60,)), (7, (3,))])
@pytest.mark.parametrize("transformer", [flows.affine, flows.gated])
def test_jacobian_is_lower_triangular_in_both_directions(dim, hidden, transformer):
    flow = flows.autoregressive(smooth_made(hidden), transformer)
    x = normal((dim,))
    params = randomise(jax.jit(flow.init)(KEY, x), 0.3 if dim < 50 else 0.1)
    for direction in (flow.apply, flow.inverse):
        jacobian = jax.jit(jax.jacfwd(lambda x, f=direction: f(params, x)[0]))(x)
        assert np.all(jacobian[~np.tri(dim, dtype=bool)] == 0)
        if min(hidden) >= dim - 1:
            assert np.all(jacobian[np.tri(dim, dtype=bool)] != 0)


def test_each_entry_is_transformed_by_what_the_conditioner_says_of_it():
    dim = 4
    conditioner = smooth_made((9,))
    flow = flows.autoregressive(conditioner, flows.affine)
    x = normal((dim,))
    params = randomise(flow.init(KEY, x))
    y, log_det = flow.apply(params, x)
    raw = conditioner(2, dim).apply({"params": params}, x)
    expected_log_det = 0
    for i in range(dim):
        entry, term = flows.affine.apply(raw[:, i : i + 1], x[i : i + 1])
        np.testing.assert_allclose(y[i], entry[0], rtol=1e-6)
        expected_log_det += term[0]
    np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 17])
def test_a_fresh_iaf_halves_its_input(depth):
    flow = flows.iaf((4,), depth, hidden=(8,))
    x = normal((3, 4))
    y, log_det = flow.apply(jax.jit(flow.init)(KEY, x), x)
    np.testing.assert_allclose(y, x / 2, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(3, -4 * np.log(2)), rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_iaf_reverses_the_order_between_layers(depth):
    """The stack equals layers on alternating orders, so two layers connect every pair."""
    event_shape, hidden = (4, 1), (9,)
    flow = flows.iaf(event_shape, depth, hidden=hidden, transformer=flows.affine)
    x = normal((3, *event_shape))
    params = randomise(flow.init(KEY, x))
    layer = flows.autoregressive(flows.made(hidden), flows.affine)
    layers = [p for p in jax.tree.leaves(params, is_leaf=lambda p: isinstance(p, dict)) if p]
    assert len(layers) == depth
    y, log_det = x[..., 0], 0
    for i, layer_params in enumerate(layers):
        step = 1 if i % 2 == 0 else -1
        y, term = layer.apply(layer_params, y[:, ::step])
        y, log_det = y[:, ::step], log_det + term
    actual, actual_log_det = flow.apply(params, x)
    np.testing.assert_allclose(actual[..., 0], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual_log_det, log_det, rtol=1e-5, atol=1e-6)
    jacobian = jax.jacfwd(lambda x: flow.apply(params, x)[0])(x[0])[:, 0, :, 0]
    assert np.all(np.triu(jacobian, 1) == 0) if depth == 1 else np.any(np.triu(jacobian, 1) != 0)


def test_the_default_conditioner_has_two_hidden_layers_of_512():
    for dim in (1, 50):
        flow = flows.iaf((dim,), 1)
        x = jnp.zeros((2, dim))
        params = jax.eval_shape(flow.init, KEY, x)
        widths = [leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
        assert 512 in widths
        assert jax.eval_shape(flow.apply, params, x)[0].shape == (2, dim)
        assert jax.eval_shape(flow.inverse, params, x)[0].shape == (2, dim)


def test_each_direction_is_one_program():
    """The sequential direction loops over entries; it is not unrolled."""
    sizes = []
    for dim in (4, 40):
        flow = flows.iaf((dim,), 1, hidden=(8,))
        x = jnp.zeros((2, dim))
        params = jax.eval_shape(flow.init, KEY, x)
        sizes.append(str(jax.make_jaxpr(flow.inverse)(params, x)).count(" = "))
    assert sizes[0] == sizes[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth must be 0 or more, got -2"):
        flows.iaf((3,), -2)
    for hidden in ((), (0, 4)):
        with pytest.raises(ValueError, match="expected one or more positive widths, got hidden="):
            flows.iaf((3,), 2, hidden=hidden)
