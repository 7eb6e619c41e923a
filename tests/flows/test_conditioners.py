import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, randomise

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def test_mlp_is_a_plain_network():
    network = flows.mlp((6, 5), activation=jnp.tanh)(2, 3)
    x = normal((4, 7))
    params = randomise(network.init(KEY, x)["params"])
    h = jnp.tanh(dense(params["Dense_0"], x))
    h = jnp.tanh(dense(params["Dense_1"], h))
    expected = dense(params["Dense_2"], h).reshape(4, 2, 3)
    np.testing.assert_allclose(network.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [flows.mlp, flows.made])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_a_fresh_conditioner_emits_zeros_from_live_hidden_layers(make, context_dim):
    x = normal((4, 5))
    context = None if context_dim is None else normal((4, 2))
    network = make((16, 16), context_dim=context_dim)(2, 5)
    params = network.init(KEY, x, context)["params"]
    out = network.apply({"params": params}, x, context)
    assert out.shape == (4, 2, 5)
    np.testing.assert_array_equal(out, np.zeros((4, 2, 5)))

    # ReLU layers of variance 2 / fan-in keep the scale: with a random last layer, outputs are of
    # order one.
    def loss(params):
        return jnp.sum(network.apply({"params": params}, x, context) ** 2)

    moved = jax.tree.map(lambda p: p if jnp.any(p) else p + 0.1, params)
    gradient = jax.grad(loss)(moved)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("hidden", [(), (0,), (8, -1)])
@pytest.mark.parametrize("make", [flows.mlp, flows.made])
def test_widths_must_be_positive(make, hidden):
    with pytest.raises(ValueError, match="expected one or more positive widths, got hidden="):
        make(hidden)


def test_made_wants_its_own_width():
    network = flows.made((4,))(2, 5)
    with pytest.raises(ValueError, match=r"made: expected an input \[\.\.\., 5\], got \(3, 4\)"):
        network.init(KEY, normal((3, 4)))


def jacobians(dim, hidden, context_dim):
    """d out[p, i] / d x[j] and d out[p, i] / d context[k], at one point."""
    network = flows.made(hidden, context_dim=context_dim, activation=jnp.tanh)(2, dim)
    x = normal((dim,))
    context = None if context_dim is None else normal((context_dim,))
    # Weak enough that no tanh saturates to a slope of zero.
    params = randomise(jax.jit(network.init)(KEY, x, context)["params"], 0.3 if dim <= 5 else 0.05)

    def f(x, context):
        return network.apply({"params": params}, x, context)

    argnums = (0,) if context is None else (0, 1)
    return [np.asarray(j) for j in jax.jit(jax.jacfwd(f, argnums))(x, context)]


@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize(
    "dim,hidden",
    [(1, (4,)), (1, (300, 300)), (2, (1,)), (2, (6, 5)), (3, (600,)), (5, (5, 9)), (5, (40,))]
    + [(50, (50, 70)), (50, (300, 260)), (300, (310, 520))],
)
def test_made_output_i_depends_on_exactly_the_inputs_before_i(dim, hidden, context_dim):
    if dim == 2 and context_dim:
        hidden = (*(max(w, 2) for w in hidden),)  # A unit for each degree, 0 included.
    of_x, *of_context = jacobians(dim, hidden, context_dim)
    allowed = np.tri(dim, k=-1, dtype=bool)
    for p in range(2):
        np.testing.assert_array_equal(of_x[p] != 0, allowed)
    for jacobian in of_context:
        assert np.all(jacobian != 0)


@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize("dim,hidden", [(5, (2,)), (50, (7,)), (50, (12, 300)), (50, (60, 9))])
def test_made_narrower_than_its_input_stays_autoregressive(dim, hidden, context_dim):
    """Fewer units than degrees cannot carry every dependence; none may be a forbidden one."""
    of_x, *of_context = jacobians(dim, hidden, context_dim)
    narrow = min(hidden)
    for p in range(2):
        assert np.all(of_x[p][~np.tri(dim, k=-1, dtype=bool)] == 0)
        # Evenly spread degrees: what is lost is at most the last step's inputs.
        step = -(-dim // narrow)
        assert np.all(of_x[p][np.tri(dim, k=-step - 1, dtype=bool)] != 0)
    for jacobian in of_context:
        assert np.all(jacobian != 0)
