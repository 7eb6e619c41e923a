from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, random_params

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def dense(params, x):
    return np.asarray(x) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])


@pytest.mark.slow
def test_mlp_is_a_plain_network():
    network = flows.mlp((6, 5), activation=jnp.tanh)(2, 3)
    x = normal((4, 7))
    params = random_params(network.init, x)
    h = np.tanh(dense(params["dense_0"], x))
    h = np.tanh(dense(params["dense_1"], h))
    expected = dense(params["dense_2"], h).reshape(4, 2, 3)
    actual = jax.jit(network.apply)(params, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [flows.mlp, flows.made])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_a_fresh_conditioner_emits_zeros_from_live_hidden_layers(make, context_dim):
    x = normal((4, 5))
    context = None if context_dim is None else normal((4, 2))
    network = make((16, 16), context_dim=context_dim)(2, 5)
    params = jax.device_get(jax.jit(network.init)(KEY, x, context))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        out = network.apply(params, x, context)
        return jnp.sum(out**2), out

    _, out = gradient(params)
    assert out.shape == (4, 2, 5)
    np.testing.assert_array_equal(out, np.zeros((4, 2, 5)))
    # Once leaves of zeros are moved, gradients reach every leaf: no hidden layer is dead.
    of_moved, _ = gradient(jax.tree.map(lambda p: p if p.any() else p + 0.1, params))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_moved))


@pytest.mark.parametrize("hidden", [(), (0,), (8, -1)])
@pytest.mark.parametrize("make", [flows.mlp, flows.made])
def test_widths_must_be_positive(make, hidden):
    with pytest.raises(ValueError, match="hidden must be .* of 1 or more|widths, got hidden="):
        make(hidden)


def test_made_wants_its_own_width():
    network = flows.made((4,))(2, 5)
    with pytest.raises(ValueError, match=r"made: expected x of shape \[\.\.\., 5\], got \(3, 4\)"):
        network.init(KEY, normal((3, 4)))


def jacobians(dim, hidden, context_dim):
    """d out[p, i] / d x[j] and d out[p, i] / d context[k], at one point."""
    network = flows.made(hidden, context_dim=context_dim, activation=jnp.tanh)(2, dim)
    x = normal((dim,))
    context = None if context_dim is None else normal((context_dim,))
    # Weak enough that no tanh saturates to a slope of zero.
    params = random_params(network.init, x, context, scale=0.3 if dim <= 5 else 0.05)

    def f(x, context):
        return network.apply(params, x, context)

    argnums = (0,) if context is None else (0, 1)
    return [np.asarray(j) for j in jax.jit(jax.jacfwd(f, argnums))(x, context)]


@pytest.mark.slow
@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize(
    "dim,hidden",
    [(1, (4,)), (1, (300, 300)), (2, (1,)), (2, (6, 5)), (3, (600,)), (5, (5, 9)), (5, (40,))]
    + [(50, (50, 70)), (50, (300, 260)), (300, (310, 520))],
)
def test_made_output_i_depends_on_exactly_the_inputs_before_i(dim, hidden, context_dim):
    if dim == 2 and context_dim:
        hidden = (*(max(w, 2) for w in hidden),)  # A unit for each degree, including 0.
    of_x, *of_context = jacobians(dim, hidden, context_dim)
    allowed = np.tri(dim, k=-1, dtype=bool)
    for p in range(2):
        np.testing.assert_array_equal(of_x[p] != 0, allowed)
    for jacobian in of_context:
        assert np.all(jacobian != 0)


@pytest.mark.slow
@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize("dim,hidden", [(5, (2,)), (50, (7,)), (50, (12, 300)), (50, (60, 9))])
def test_made_narrower_than_its_input_stays_autoregressive(dim, hidden, context_dim):
    """With fewer units than degrees some dependences are lost; forbidden ones stay out."""
    of_x, *of_context = jacobians(dim, hidden, context_dim)
    narrow = min(hidden)
    for p in range(2):
        assert np.all(of_x[p][~np.tri(dim, k=-1, dtype=bool)] == 0)
        # Degrees are spread evenly, so that at most the last `step` inputs before i are lost.
        step = -(-dim // narrow)
        assert np.all(of_x[p][np.tri(dim, k=-step - 1, dtype=bool)] != 0)
    for jacobian in of_context:
        assert np.all(jacobian != 0)


def raster(event_shape):
    """Row, column and channel of every entry, in raster order."""
    return np.stack(np.unravel_index(np.arange(np.prod(event_shape)), event_shape), -1)


def map_jacobians(make, event_shape, hidden, context_maps):
    """As `jacobians`, of a conditioner on maps; context entries are by position, then map."""
    context_dim = event_shape[0] * event_shape[1] * context_maps or None
    network = make(event_shape, hidden, context_dim=context_dim, activation=jnp.tanh)(
        2, np.prod(event_shape)
    )
    x = normal((np.prod(event_shape),))
    context = None if context_dim is None else normal((context_dim,))
    params = random_params(network.init, x, context, scale=0.2)

    def f(x, context):
        return network.apply(params, x, context)

    argnums = (0,) if context is None else (0, 1)
    return [np.asarray(j) for j in jax.jit(jax.jacfwd(f, argnums))(x, context)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "event_shape,depth",
    [
        ((4, 4, 2), 3),
        ((5, 5, 1), 1),
        ((3, 6, 1), 2),
        ((1, 4, 2), 1),
        ((4, 1, 1), 2),
        ((1, 1, 3), 1),
    ],
)
def test_pixelcnn_sees_all_that_comes_before_within_its_reach(event_shape, depth):
    """What it sees is a whole rectangle of the rows above: there is no blind spot."""
    (of_x,) = map_jacobians(flows.pixelcnn, event_shape, (5,) * depth, 0)
    entries = raster(event_shape)
    row, column, channel = np.moveaxis(entries[:, None] - entries, -1, 0)
    above = (0 < row) & (row <= depth + 1) & (abs(column) <= depth)
    left = (row == 0) & (0 < column) & (column <= depth + 1)
    same_pixel = (row == 0) & (column == 0) & (channel > 0)
    for p in range(2):
        np.testing.assert_array_equal(of_x[p] != 0, above | left | same_pixel)
    if depth + 1 >= max(event_shape[:2]):  # Then the reach is the whole map.
        np.testing.assert_array_equal(of_x[0] != 0, np.tri(len(entries), k=-1, dtype=bool))


@pytest.mark.slow
@pytest.mark.parametrize("make", [flows.convnet, flows.pixelcnn])
def test_a_map_reads_its_context_where_it_is(make):
    row, column = np.moveaxis(raster((4, 5))[:, None] - raster((4, 5)), -1, 0)
    if make is flows.convnet:  # One convolution follows the context's layer.
        hidden, reach = (4,), (abs(row) <= 1) & (abs(column) <= 1)
    else:
        hidden, reach = (4, 4), (row == 0) & (0 <= column) & (column <= 1)
    _, of_context = map_jacobians(make, (4, 5, 2), hidden, 3)
    expected = np.broadcast_to(reach[None, :, None, :, None], (2, 20, 2, 20, 3))
    np.testing.assert_array_equal(of_context.reshape(expected.shape) != 0, expected)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_convnet_sees_its_neighbourhood(depth):
    (of_x,) = map_jacobians(flows.convnet, (6, 5, 2), (4,) * depth, 0)
    entries = raster((6, 5, 2))
    row, column, _ = np.moveaxis(entries[:, None] - entries, -1, 0)
    expected = (abs(row) <= depth + 1) & (abs(column) <= depth + 1)
    for p in range(2):
        np.testing.assert_array_equal(of_x[p] != 0, expected)


@pytest.mark.parametrize("make", [flows.convnet, flows.pixelcnn])
def test_bad_maps(make):
    with pytest.raises(ValueError, match="hidden must be .* of 1 or more|widths, got hidden="):
        make((2, 2, 1), ())
    for shape in ((4, 2), (4, 0, 1)):
        with pytest.raises(ValueError, match=r"event_shape must be \(H, W, C\), got \(4, "):
            make(shape)
    for context_dim, asked in ((5, "a multiple of 4"), (0, "1 or more")):
        with pytest.raises(ValueError, match=f"must be {asked}, got {context_dim}"):
            make((2, 2, 3), context_dim=context_dim)
    with pytest.raises(ValueError, match=r"events \(2, 2, 1\), so .* \[\.\.\., 4\], got \(3, 5\)"):
        make((2, 2, 1))(2, 5).init(KEY, normal((3, 5)))
