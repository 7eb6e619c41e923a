import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.test_util import check_grads
from support import KEY, gated_iaf, layers_of, normal, random_params
from support.cases import smooth_made

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


@partial(jax.jit, static_argnums=0)
def jacobians(flow, params, x):
    """Derivatives of the images of both directions."""
    images = (lambda x: flow.apply(params, x)[0], lambda x: flow.inverse(params, x)[0])
    return [jax.jacfwd(image)(x) for image in images]


@pytest.mark.slow
@pytest.mark.parametrize("dim,hidden", [(1, (3,)), (2, (4,)), (5, (9, 6)), (50, (60,)), (7, (3,))])
@pytest.mark.parametrize("transformer", [flows.affine, flows.gated])
def test_jacobian_is_lower_triangular_in_both_directions(dim, hidden, transformer):
    flow = flows.autoregressive(smooth_made(hidden), transformer)
    x = normal((dim,))
    params = random_params(flow.init, x, scale=0.3 if dim < 50 else 0.1)
    for jacobian in map(np.asarray, jacobians(flow, params, x)):
        assert np.all(jacobian[~np.tri(dim, dtype=bool)] == 0)
        if min(hidden) >= dim - 1:
            assert np.all(jacobian[np.tri(dim, dtype=bool)] != 0)


@pytest.mark.slow
def test_each_entry_is_transformed_by_what_the_conditioner_says_of_it():
    dim = 4
    conditioner = smooth_made((9,))
    flow = flows.autoregressive(conditioner, flows.affine)
    x = normal((dim,))

    @jax.jit
    def results(params, x):
        raw = conditioner(2, dim).apply(params, x)
        one_by_one = [flows.affine.apply(raw[:, i : i + 1], x[i : i + 1]) for i in range(dim)]
        return flow.apply(params, x), one_by_one

    (y, log_det), one_by_one = jax.tree.map(np.asarray, results(random_params(flow.init, x), x))
    for i, (entry, _) in enumerate(one_by_one):
        np.testing.assert_allclose(y[i], entry[0], rtol=1e-6)
    expected_log_det = sum(term[0] for _, term in one_by_one)
    np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 17])
def test_a_fresh_iaf_halves_its_input(depth):
    flow = gated_iaf((4,), depth, hidden=(8,))
    x = normal((3, 4))
    y, log_det = jax.jit(lambda x: flow.apply(flow.init(KEY, x), x))(x)
    np.testing.assert_allclose(y, np.asarray(x) / 2, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.full(3, -4 * np.log(2)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_iaf_reverses_the_order_between_layers(depth):
    """The stack equals layers on alternating orders, so two layers connect every pair."""
    event_shape, hidden = (4, 1), (9,)
    flow = flows.iaf(event_shape, depth, hidden=hidden, transformer=flows.affine)
    x = normal((3, *event_shape))
    layer = flows.autoregressive(flows.made(hidden), flows.affine)

    @jax.jit
    def results(params, x):
        layers = layers_of(params)
        assert len(layers) == depth
        y, log_det = x[..., 0], 0
        for i, layer_params in enumerate(layers):
            step = 1 if i % 2 == 0 else -1
            y, term = layer.apply(layer_params, y[:, ::step])
            y, log_det = y[:, ::step], log_det + term
        jacobian = jax.jacfwd(lambda x: flow.apply(params, x)[0])(x[0])
        return flow.apply(params, x), (y, log_det), jacobian[:, 0, :, 0]

    (actual, actual_log_det), (y, log_det), jacobian = results(random_params(flow.init, x), x)
    np.testing.assert_allclose(np.asarray(actual)[..., 0], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual_log_det, log_det, rtol=1e-5, atol=1e-6)
    assert np.all(np.triu(jacobian, 1) == 0) if depth == 1 else np.any(np.triu(jacobian, 1) != 0)


@pytest.mark.slow
def test_pixelcnn_jacobian_is_triangular_in_raster_order():
    event_shape, size = (4, 4, 2), 32
    conditioner = flows.pixelcnn(event_shape, (4, 4, 4), activation=jnp.tanh)
    flow = flows.autoregressive(conditioner, flows.gated)
    x = normal((size,))
    for jacobian in jacobians(flow, random_params(flow.init, x, scale=0.2), x):
        np.testing.assert_array_equal(np.asarray(jacobian) != 0, np.tri(size, dtype=bool))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stack_on_maps_sees_what_is_after_a_pixel_from_its_second_layer_on(depth):
    event_shape = (3, 3, 1)
    conditioner = partial(flows.pixelcnn, event_shape, activation=jnp.tanh)
    flow = gated_iaf(event_shape, depth, hidden=(4, 4), conditioner=conditioner)
    x = normal(event_shape)
    params = random_params(flow.init, x, scale=0.2)
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda x: flow.apply(params, x)[0]))(x)).reshape(9, 9)
    is_before = np.tri(9, dtype=bool)
    np.testing.assert_array_equal(jacobian != 0, is_before if depth == 1 else is_before | True)


@pytest.mark.slow
def test_context_of_maps_stays_aligned_in_layers_of_reversed_order():
    """If the networks do not see x, a position depends only on the context at that position."""
    event_shape = (2, 3, 2)
    conditioner = partial(flows.pixelcnn, event_shape)
    flow = gated_iaf(event_shape, 3, hidden=(4,), context_dim=12, conditioner=conditioner)
    x, context = normal(event_shape), normal((12,))
    params = random_params(flow.init, x, context)
    params = jax.tree.map_with_path(
        lambda path, leaf: (
            np.zeros_like(leaf)
            if any(f"{name}_" in jax.tree_util.keystr(path) for name in ("above", "left"))
            else leaf
        ),
        params,
    )
    jacobian = jax.jit(jax.jacfwd(lambda context: flow.apply(params, x, context)[0]))(context)
    reads = np.asarray(jacobian).reshape(6, 2, 6, 2) != 0
    np.testing.assert_array_equal(reads.any((1, 3)), np.eye(6, dtype=bool))


def test_the_default_conditioner_has_two_hidden_layers_of_512():
    for dim in (1, 50):
        flow = gated_iaf((dim,), 1)
        x = np.zeros((2, dim))
        params = jax.eval_shape(flow.init, KEY, x)
        widths = [leaf.shape[-1] for leaf in jax.tree.leaves(params)]
        assert sorted(widths) == [2 * dim, 2 * dim, 512, 512, 512, 512]
        assert jax.eval_shape(flow.apply, params, x)[0].shape == (2, dim)
        assert jax.eval_shape(flow.inverse, params, x)[0].shape == (2, dim)


TRANSFORMERS = [
    value for name in flows.__all__ if isinstance(value := getattr(flows, name), flows.Transformer)
]
SEQUENTIAL = [
    *((dim, context_dim, flows.affine) for dim in (1, 2, 50, 257) for context_dim in (None, 2)),
    *((7, 2, transformer) for transformer in TRANSFORMERS),
]


@pytest.mark.slow
@pytest.mark.parametrize("dim,context_dim,transformer", SEQUENTIAL)
def test_sequential_direction_equals_whole_passes_and_undoes_the_parallel_one(
    x64, dim, context_dim, transformer
):
    """Hidden layers are wider and narrower than the event, so degrees have many units or none."""
    conditioner = flows.made((300, 20), context_dim=context_dim)
    flow = flows.autoregressive(conditioner, transformer)
    whole = flows.autoregressive(
        lambda *sizes: conditioner(*sizes)._replace(incremental=None), transformer
    )
    y = np.asarray(normal((3, dim)))
    context = None if context_dim is None else normal((3, context_dim))
    params = random_params(flow.init, y, context, scale=0.1)

    @jax.jit
    def ways(params):
        x, log_det = flow.inverse(params, y, context)
        inverse = whole.inverse(params, y, context)
        return (x, log_det), inverse, flow.apply(params, x, context)

    (x, log_det), inverse, (again, log_det_back) = jax.tree.map(np.asarray, ways(params))
    assert np.abs(x - y).max() > 0.01
    chex.assert_trees_all_close(inverse, (x, log_det), rtol=1e-9)
    chex.assert_trees_all_close((again, -log_det_back), (y, log_det), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-5), ("bfloat16", 0.2)])
def test_sequential_direction_in_low_precision(dtype, limit):
    flow = flows.autoregressive(flows.made((9, 30), context_dim=2))
    y, context = normal((20, 6), dtype=dtype), normal((20, 2), dtype=dtype)
    params = random_params(flow.init, y, context, scale=0.1)
    x, log_det = jax.jit(flow.inverse)(params, y, context)
    again, log_det_back = jax.jit(flow.apply)(params, x, context)
    assert x.dtype == log_det.dtype == dtype
    y, log_det, again, log_det_back = map(np.asarray, (y, log_det, again, log_det_back))
    for error in (again - y, log_det + log_det_back):
        assert np.abs(error.astype(np.float32)).max() < limit


@pytest.mark.slow
def test_sequential_direction_is_differentiable(x64):
    flow = flows.autoregressive(smooth_made((9, 8), context_dim=2))
    y, context = normal((2, 4)), normal((2, 2))
    params = random_params(flow.init, y, context)
    check_grads(jax.jit(flow.inverse), (params, y, context), order=1, modes=("fwd", "rev"))


def matmul_flops(jaxpr):
    """Operations of a program's matrix products."""
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), (left, *_) = eqn.params["dimension_numbers"], eqn.invars
            flops += (
                2 * eqn.outvars[0].aval.size * math.prod(left.aval.shape[i] for i in contracted)
            )
        for value in jax.tree.leaves(eqn.params):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                inner = matmul_flops(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
                flops += eqn.params.get("length", 1) * inner
    return flops


def test_sequential_direction_costs_about_one_pass():
    flow = flows.autoregressive(flows.made((128, 128)))
    y = np.zeros((8, 20))
    params = jax.eval_shape(flow.init, KEY, y)
    one_pass = 2 * 8 * (20 * 128 + 128 * 128 + 128 * 40)
    inverse = matmul_flops(jax.make_jaxpr(flow.inverse)(params, y).jaxpr)
    assert one_pass <= inverse < 1.2 * one_pass


def test_each_direction_is_one_program():
    """The sequential direction loops over entries; it is not unrolled."""
    sizes = []
    for dim in (20, 40):
        flow = gated_iaf((dim,), 1, hidden=(8,))
        x = np.zeros((2, dim))
        params = jax.eval_shape(flow.init, KEY, x)
        sizes.append(str(jax.make_jaxpr(flow.inverse)(params, x)).count(" = "))
    assert sizes[0] == sizes[1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth must be 0 or more, got -2"):
        gated_iaf((3,), -2)
    for hidden in ((), (0, 4)):
        with pytest.raises(ValueError, match="hidden must be .* of 1 or more|widths, got hidden="):
            gated_iaf((3,), 2, hidden=hidden)


def test_parameters_of_another_flow_are_an_error():
    x = normal((3,))
    flow, other = gated_iaf((3,), 2, hidden=(5,)), gated_iaf((3,), 2, hidden=(4,))
    params = jax.eval_shape(other.init, KEY, x)
    for direction in (flow.apply, flow.inverse):
        with pytest.raises(ValueError, match="made: expected parameters of shapes .*, got"):
            jax.eval_shape(direction, params, x)


def test_conditioners_must_be_of_the_kind_that_a_layer_needs():
    for conditioner, kind in ((flows.mlp(), "passing"), (flows.convnet((1, 3, 1)), "whole")):
        with pytest.raises(ValueError, match=f"expected an autoregressive conditioner.*'{kind}'"):
            flows.autoregressive(conditioner).init(KEY, normal((3,)))
    for conditioner in (flows.made(), flows.pixelcnn((1, 2, 1))):
        with pytest.raises(ValueError, match="expected a conditioner for coupling layers"):
            flows.coupling(np.array([True, False]), conditioner)
