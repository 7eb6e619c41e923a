import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from support import KEY, gated_iaf, normal, random_params, randomise
from support.cases import smooth_made, smooth_mlp

from led_jax import densities, flows
from led_jax.flows import base

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def layer():
    mask = np.array([True, False, True])
    return flows.chain(flows.coupling(mask, smooth_mlp(context_dim=2)), flows.reverse())


def test_chain_applies_the_first_flow_first():
    double = flows.Flow(
        lambda key, x, context=None: (),
        lambda params, x, context=None: (2 * x, x.shape[-1] * jnp.log(2.0)),
        lambda params, y, context=None: (y / 2, -y.shape[-1] * jnp.log(2.0)),
    )
    actnorm = flows.actnorm()
    params = ((), {"shift": np.array([1.0, 2.0]), "log_scale": np.zeros(2)})
    flow = flows.chain(double, actnorm)
    y, log_det = jax.jit(flow.apply)(params, np.array([3.0, 4.0]))
    np.testing.assert_allclose(y, [7, 10])
    np.testing.assert_allclose(log_det, 2 * np.log(2), rtol=1e-6)
    x, log_det = jax.jit(flow.inverse)(params, y)
    np.testing.assert_allclose(x, [3, 4])
    np.testing.assert_allclose(log_det, -2 * np.log(2), rtol=1e-6)


def test_chain_initialises_each_flow_with_what_reaches_it():
    x = 5 + 3 * np.asarray(normal((200, 2)))
    params = jax.jit(flows.chain(flows.actnorm(), flows.actnorm()).init)(KEY, x)
    np.testing.assert_allclose(params[0]["log_scale"], -np.log(x.std(0)), rtol=1e-4)
    np.testing.assert_allclose(params[1]["shift"], 0, atol=1e-5)
    np.testing.assert_allclose(params[1]["log_scale"], 0, atol=1e-5)


def test_invert_exchanges_the_directions():
    flow = layer()
    x, context = normal((4, 3)), normal((4, 2))
    params = random_params(flow.init, x, context)
    inverted = flows.invert(flow)
    for function, expected, first in (
        (inverted.apply, flow.inverse, params),
        (inverted.inverse, flow.apply, params),
        (inverted.init, flow.init, KEY),
    ):
        chex.assert_trees_all_equal(
            jax.jit(function)(first, x, context), jax.jit(expected)(first, x, context)
        )
    assert np.abs(jax.jit(flow.apply)(params, x, context)[1]).min() > 1e-3


def set_max_unroll(monkeypatch, depth):
    monkeypatch.setattr(base, "MAX_UNROLL", dict.fromkeys(base.MAX_UNROLL, depth))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_stack_unrolled_or_scanned_equals_the_chain_of_its_layers(monkeypatch, depth):
    flow, chained = flows.repeat(layer(), depth), flows.chain(*[layer()] * depth)
    x, context = normal((4, 3)), normal((4, 2))

    def stack(layers):
        return jax.tree.map(lambda *p: np.stack(p), *layers)

    fresh = jax.jit(chained.init)(KEY, x, context)
    chex.assert_trees_all_close(jax.jit(flow.init)(KEY, x, context), stack(fresh), rtol=1e-6)
    layers = randomise(fresh)

    def values_and_gradient(flow, params):
        def loss(params):
            outputs = flow.apply(params, x, context), flow.inverse(params, x, context)
            return sum(jnp.sum(out**2) for out in jax.tree.leaves(outputs)), outputs

        gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
        return outputs, gradient

    outputs, gradient = values_and_gradient(chained, layers)
    for max_unroll in (12, 0):  # Read when the flow is applied, so one flow will do.
        set_max_unroll(monkeypatch, max_unroll)
        actual = values_and_gradient(flow, stack(layers))
        chex.assert_trees_all_close(actual, (outputs, stack(gradient)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_both_modes_and_second_derivatives_with_respect_to_a_stacks_parameters(x64):
    flow = flows.repeat(layer(), 2)
    x, context = normal((3,)), normal((2,))
    params = random_params(flow.init, x, context)

    def log_density(scale, shift):
        moved = jax.tree.map(lambda p: p * scale + shift, params)
        y, log_det = flow.apply(moved, x, context)
        return log_det - 0.5 * (y**2).sum()

    check_grads(jax.jit(log_density), (1.0, 0.1), order=2, modes=("fwd", "rev"))


def test_repeat_gives_each_layer_its_constants(monkeypatch):
    orders = np.array([[1, 2, 0], [0, 2, 1], [2, 1, 0]])
    x = np.asarray(normal((3,)))
    expected = x[orders[0]][orders[1]][orders[2]]
    flow = flows.repeat(flows.permute, 3, orders)
    params = random_params(flow.init, x)
    for max_unroll in (16, 0):
        set_max_unroll(monkeypatch, max_unroll)

        @jax.jit
        def both(x, y):
            return *flow.apply(params, x), flow.inverse(params, y)[0]

        y, log_det, again = both(x, expected)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(again, x)
        assert log_det.shape == () and np.asarray(log_det) == 0


@pytest.mark.parametrize("depth", [2, 20])
def test_repeat_says_at_once_what_is_wrong_with_constants(depth):
    with pytest.raises(ValueError, match="permute: order must be a permutation"):
        flows.repeat(flows.permute, depth, np.zeros((depth, 2), int))


@pytest.mark.slow
@pytest.mark.parametrize("scan_cost", ["low", "high"])
def test_repeat_traces_a_layer_once_and_stacks_its_parameters(scan_cost):
    calls = []

    def apply(params, x, context=None):
        calls.append(x.shape)
        return 2 * x, jnp.zeros(x.shape[:-1])

    one = flows.Flow(lambda key, x, context=None: jnp.zeros(2), apply, apply)
    for depth in (1, 4, 5, 13):
        flow = flows.repeat(one, depth, scan_cost=scan_cost)
        params = random_params(flow.init, np.ones(4))
        assert params.shape == (depth, 2)
        calls.clear()
        program = jax.make_jaxpr(flow.apply)(params, np.ones((5, 4)))
        assert calls == [(5, 4)]
        assert ("scan" in str(program)) == (depth > base.MAX_UNROLL[scan_cost])
        y, _ = jax.jit(flow.apply)(params, np.ones(4))
        np.testing.assert_array_equal(y, 2**depth * np.ones(4))


def test_program_does_not_grow_with_depth():
    def program_size(depth):
        flow = gated_iaf((4,), depth, hidden=(5,))
        x = np.zeros((2, 4))
        params = jax.eval_shape(flow.init, KEY, x)
        return len(str(jax.make_jaxpr(flow.apply)(params, x)).splitlines())

    assert program_size(18) == program_size(64) < program_size(12)


@pytest.mark.parametrize("event_shape", [(3,), (2, 3), ()])
def test_depth_zero_is_the_identity_on_any_event(event_shape):
    x = normal((4, 5, *event_shape))
    for flow in (
        flows.chain(event_ndims=len(event_shape)),
        flows.repeat(flows.reverse(), 0, event_ndims=len(event_shape)),
    ):
        params = flow.init(KEY, x)
        for direction in (flow.apply, flow.inverse):
            y, log_det = direction(params, x)
            np.testing.assert_array_equal(y, x)
            np.testing.assert_array_equal(log_det, np.zeros((4, 5)))
            assert log_det.dtype == x.dtype


def test_a_stack_of_no_layers_needs_no_jit():
    flow, x = flows.real_nvp((2,), 0), jnp.ones((3, 2))
    with jax.disable_jit():
        params = flow.init(KEY, x)
        assert flow.apply(params, x)[1].shape == (3,)
    assert jax.tree.structure(params) == jax.tree.structure(flow.init(KEY, x))


def test_flatten_reads_the_event_in_row_major_order():
    flow = flows.flatten(flows.reverse(), (2, 3))
    y, log_det = jax.jit(flow.apply)((), np.arange(12.0).reshape(2, 2, 3))
    np.testing.assert_array_equal(np.asarray(y)[0], [[5, 4, 3], [2, 1, 0]])
    np.testing.assert_array_equal(log_det, [0, 0])


def noisy_stack(name, noise):
    """A fresh stack of 64 layers with noise on the last layer of every conditioner.

    Fresh last layers and biases are zero; the other weights are normal already. Real NVP layers
    compound: a noise of 0.01 moves entries by 5 in 64 layers and comes back within 3e-6, and one of
    0.02 sends them to 4e6, where float64 fails too. IAF's gates damp: float32 stays within 5e-6 up
    to 0.05, and at 0.1 inverting them overflows.
    """
    dim = 10
    flow = {
        "real_nvp": lambda: flows.real_nvp((dim,), 64, hidden=(32,)),
        "iaf": lambda: gated_iaf((dim,), 64, hidden=(32, 32)),
    }[name]()
    x = np.asarray(normal((100, dim)))
    params = jax.jit(flow.init)(KEY, x)
    noisy = randomise(params, noise)
    # Only what starts at zero is perturbed: last layers and biases.
    params = jax.tree.map(lambda p, q: p if np.asarray(p).any() else q, params, noisy)
    return flow, params, x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_nvp", "iaf"])
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-4), ("float64", 1e-10)])
def test_round_trip_at_depth_64(name, dtype, limit):
    with jax.enable_x64(dtype == "float64"):
        flow, params, x = noisy_stack(name, 0.01)
        assert x.dtype == dtype
        apply, inverse = jax.jit(flow.apply), jax.jit(flow.inverse)
        for there, back in [(apply, inverse), (inverse, apply)]:
            y, log_det = map(np.asarray, there(params, x))
            again, log_det_back = back(params, y)
            assert np.abs(y - x).max() > 0.1
            assert np.abs(again - x).max() < limit
            assert np.abs(log_det + log_det_back).max() < limit


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real_nvp", "iaf", "maf"])
def test_training_at_depth_64_stays_finite(name):
    """Value and gradient at the default initialisation, and through 100 Adam steps of float32."""
    stack = {
        "real_nvp": lambda: flows.real_nvp((8,), 64, hidden=(16,)),
        "iaf": lambda: gated_iaf((8,), 64, hidden=(16, 16)),
        "maf": lambda: flows.invert(gated_iaf((8,), 64, hidden=(16, 16))),
    }[name]()
    density = densities.transformed(densities.standard_normal((8,)), stack)
    data, optimizer = normal((100, 64, 8), dtype="float32"), optax.adam(1e-3)

    @jax.jit
    def train(key):
        params = density.init(key, data[0])

        def step(state, x):
            params, opt_state = state
            loss, gradient = jax.value_and_grad(lambda p: -density.log_prob(p, x).mean())(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), (loss, gradient)

        state = params, optimizer.init(params)
        (params, _), (losses, gradients) = jax.lax.scan(step, state, data)
        return params, losses, optax.tree.norm(gradients)

    params, losses, norm = jax.tree.map(np.asarray, train(KEY))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, losses, norm)))
    # The entropy is 8 x 1.42 nats: nothing drifts away from the data's own density.
    assert losses[-1] < max(losses[0], 8 * 1.42) + 1


def test_negative_depth_and_missing_constants_are_errors():
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        flows.repeat(flows.reverse(), -1)
    with pytest.raises(ValueError, match="constants must have 3 slices, got 2"):
        flows.repeat(flows.permute, 3, np.array([[0, 1], [1, 0]]))


@pytest.mark.slow
@pytest.mark.parametrize("depth,other", [(0, 1), (1, 0), (2, 3), (3, 2), (17, 18), (18, 4)])
def test_parameters_of_another_depth_are_an_error(depth, other):
    x = normal((3,))
    params = random_params(flows.repeat(flows.actnorm(), depth).init, x)
    flow = flows.repeat(flows.actnorm(), other)
    for direction in (flow.apply, flow.inverse):
        with pytest.raises(ValueError, match=f"expected parameters of {other} layers, got {depth}"):
            direction(params, x)
        with pytest.raises(ValueError, match=f"parameters of {other} layers, got a scalar"):
            direction(np.zeros(()), x)
    chain = flows.chain(flows.actnorm(), flows.actnorm())
    for wrong, found in (((params,), "1"), (params, "dict")):
        with pytest.raises(
            ValueError, match=f"chain: expected parameters of 2 layers, got {found}"
        ):
            chain.apply(wrong, x)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    depth=st.integers(0, 3),
    dim=st.integers(1, 4),
    batch=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 9),
)
def test_any_depth_size_and_batch_goes_there_and_back(depth, dim, batch, seed):
    one = flows.chain(flows.autoregressive(smooth_made((4,))), flows.reverse(), flows.actnorm())
    flow = flows.repeat(one, depth)
    x = normal((*batch, dim), seed)
    params = random_params(flow.init, x, seed=seed)
    y, log_det = jax.jit(flow.apply)(params, x)
    again, log_det_back = jax.jit(flow.inverse)(params, y)
    assert log_det.shape == log_det_back.shape == tuple(batch)
    np.testing.assert_allclose(again, x, atol=1e-4)
    np.testing.assert_allclose(log_det_back, -np.asarray(log_det), atol=1e-4)
