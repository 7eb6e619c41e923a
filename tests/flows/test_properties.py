"""What must hold of every flow in the table, in both directions."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, assert_finite_where_representable, normal, random_params
from support.cases import CASES, CONTEXT_DIM, Case, build, smooth_made, smooth_mlp

from led_jax import flows

# The tests of all other cases are marked slow: together they take minutes.
QUICK = ("coupling-affine-5", "autoregressive-2")


def parametrize_cases(cases):
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
            for case in cases
        ],
    )


every_case = parametrize_cases(CASES)
both_directions = pytest.mark.parametrize("direction", ["apply", "inverse"])
conditional_cases = parametrize_cases(case for case in CASES if case.conditional)
# Without cases whose layers another case has in another shape or number.
FAR_CASES = [
    case
    for case in CASES
    if case.name not in ("coupling-random_half", "coupling-channel", "autoregressive-1")
    and "mixing" not in case.name
    and case.name not in ("real_nvp-0", "real_nvp-2", "real_nvp-5", "real_nvp-channel", "repeat-3")
    and case.name not in ("iaf-0", "iaf-1", "iaf-1-context", "iaf-image", "iaf-2", "maf-5")
]
# Far out each gate of an inverse multiplies by up to e^20. Between the layers of a deep stack
# entries then exceed the dtype's largest number, and all entries that depend on them are lost,
# however small they are. Single layers of gates, coupling-gated-checkerboard and autoregressive-2,
# are tried in both directions.
FAR_ONE_WAY = {"iaf-deep": ("apply",)}
EAGER_CASES = {"chain", "real_nvp-5", "repeat-3", "autoregressive-sigmoids", "iaf-deep"}
assert {case.name for case in CASES} >= EAGER_CASES

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def preserves_volume(case):
    return case.name == "householder" or "nice" in case.name or "additive" in case.name


def names_used(code):
    """Names that a function looks up, including those in nested functions."""
    inner = [names_used(const) for const in code.co_consts if hasattr(const, "co_names")]
    return set(code.co_names).union(*inner)


def test_table_has_every_public_constructor():
    functions = [case.make for case in CASES] + [smooth_mlp, smooth_made]
    used = set().union(*(names_used(function.__code__) for function in functions))
    types = {"Conditioner", "Flow", "Transformer"}
    assert set(flows.__all__) - types - used == set()


@every_case
def test_log_det_is_that_of_the_jacobian_and_round_trips(x64, case):
    flow, params, x, context, _ = build(case)

    def compiled(transform):
        def at_a_point(x, context):
            def image(x):
                y, log_det = transform(params, x, context)
                return y, (y, log_det)

            matrix, (y, log_det) = jax.jacfwd(image, has_aux=True)(x)
            return y, log_det, matrix

        return jax.jit(jax.vmap(at_a_point))

    apply, inverse = compiled(flow.apply), compiled(flow.inverse)
    for there, back in [(apply, inverse), (inverse, apply)]:
        y, log_det, matrices = map(np.asarray, there(x, context))
        _, expected = np.linalg.slogdet(matrices.reshape(len(x), x[0].size, x[0].size))
        assert y.shape == x.shape and log_det.shape == (len(x),)
        np.testing.assert_allclose(log_det, expected, rtol=1e-9, atol=1e-9)
        again, log_det_back, _ = back(y, context)
        np.testing.assert_allclose(again, x, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-8, atol=1e-8)
        # Otherwise this test would only see an identity.
        if any(leaf.size for leaf in jax.tree.leaves(params)):
            assert np.abs(y - x).max() > 0.05
            assert preserves_volume(case) == (np.abs(log_det).max() == 0)


def assert_close(actual, expected, way):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, 1e-5, 1e-5, err_msg=way)


@every_case
def test_any_batch_axes_vmap_scan_and_contexts(case):
    flow, params, x, context, jitted = build(case)

    def mapped(function, tree):
        return jax.tree.map(function, tree)

    def other_ways(transform, x, context):
        pairs = mapped(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), (x, context))
        merge = functools.partial(mapped, lambda leaf: leaf.reshape(4, *leaf.shape[2:]))
        each = jax.vmap(transform, (None, 0, 0))
        _, scanned = jax.lax.scan(lambda c, inputs: (c, each(params, *inputs)), 0, pairs)
        ways = {
            "no batch axis": transform(params, *mapped(lambda leaf: leaf[0], (x, context))),
            "two batch axes": merge(transform(params, *pairs)),
            "scan of vmap": merge(scanned),
        }
        if case.conditional:
            ways["one context"] = transform(params, x, context[0])
            ways["repeated context"] = transform(params, x, jnp.stack([context[0]] * 4))
        else:
            ways["context ignored"] = transform(params, x, x.reshape(4, -1))
        return ways

    @jax.jit
    def both(x, context):
        return [other_ways(getattr(flow, way), x, context) for way in ("apply", "inverse")]

    for direction, ways in zip(("apply", "inverse"), both(x, context), strict=True):
        expected = jax.device_get(getattr(jitted, direction)(params, x, context))
        if case.conditional:
            assert_close(ways.pop("one context"), ways.pop("repeated context"), "one context")
        for way, actual in ways.items():
            wanted = mapped(lambda leaf: leaf[0], expected) if way == "no batch axis" else expected
            assert_close(actual, wanted, f"{direction}, {way}")
        y, log_det = jax.eval_shape(
            getattr(flow, direction), params, *mapped(lambda leaf: leaf[None, :0], (x, context))
        )
        assert y.shape == (1, 0, *case.event_shape) and log_det.shape == (1, 0)


@parametrize_cases(case for case in CASES if case.name in EAGER_CASES)
@both_directions
def test_eager(case, direction):
    flow, params, x, context, jitted = build(case)
    x, context = jax.device_put((x, context))
    expected = getattr(jitted, direction)(params, x, context)
    assert_close(getattr(flow, direction)(params, x, context), expected, "eager")


def assert_error(flow, params, x, context, message):
    for function, first in ((flow.init, KEY), (flow.apply, params), (flow.inverse, params)):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(function, first, x, context)


WIDE = {
    "iaf": lambda: flows.iaf((20,), 2, hidden=(5,), context_dim=CONTEXT_DIM),
    "real_nvp": lambda: flows.real_nvp((20,), 2, hidden=(5,), context_dim=CONTEXT_DIM),
    "deep": lambda: flows.real_nvp((20,), 5, hidden=(5,), context_dim=CONTEXT_DIM),
}
more_cases = [Case(name, make, (20,), True) for name, make in WIDE.items()]


@parametrize_cases([case for case in CASES if case.conditional] + more_cases)
def test_a_context_with_more_batch_entries_than_x_is_an_error(case):
    flow, params, x, context, _ = build(case)
    for few, axes in ((x[0], r"\(\)"), (x[:1], r"\(1,\)"), (x[:3], r"\(3,\)")):
        message = rf"got \(4, {CONTEXT_DIM}\) for an input with batch axes {axes}"
        assert_error(flow, params, few, context, message)
    assert_error(flow, params, x[:1], context[None], r"got \(1, 4, 3\) .* batch axes \(1,\)")


@conditional_cases
@both_directions
def test_context_matters_and_reaches_every_layer(case, direction):
    flow, params, x, context, jitted = build(case)
    y, log_det = map(np.asarray, getattr(jitted, direction)(params, x, context))
    other_y, other_log_det = getattr(jitted, direction)(params, x, context + 1)
    assert np.all(np.abs(other_y - y).reshape(len(x), -1).max(1) > 1e-4)
    if not preserves_volume(case):
        assert np.all(np.abs(other_log_det - log_det) > 1e-5)

    # Each layer's context weights receive a gradient.
    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(getattr(flow, direction)(params, x, context)[0] ** 2)

    leaves = jax.tree_util.tree_leaves_with_path(gradient(params))
    of_context = [leaf for path, leaf in leaves if "context" in jax.tree_util.keystr(path)]
    assert of_context
    for leaf in of_context:
        assert np.all(np.abs(leaf).max((-1, -2)) > 0)


@conditional_cases
def test_missing_or_wrong_context_is_an_error(case):
    flow, params, x, context, _ = build(case)
    for wrong, given in [(None, "None"), (context[..., :2], r"\(4, 2\)"), (context[0, 0], r"\(\)")]:
        message = rf"context_dim={CONTEXT_DIM}.*\[\.\.\., {CONTEXT_DIM}\].*got {given}"
        assert_error(flow, params, x, wrong, message)


def parameters_and_shapes(case, dtype, param_dtype=None):
    flow = case.make()
    x = jax.ShapeDtypeStruct((4, *case.event_shape), dtype)
    context = jax.ShapeDtypeStruct((4, CONTEXT_DIM), dtype) if case.conditional else None
    params = jax.eval_shape(flow.init, KEY, x, context)
    if param_dtype is not None:
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, param_dtype), params)
    return [
        params,
        jax.eval_shape(flow.apply, params, x, context),
        jax.eval_shape(flow.inverse, params, x, context),
    ]


@every_case
def test_dtype_is_kept_and_parameters_are_float_arrays(case):
    for dtype in (jnp.float32, jnp.bfloat16):
        for leaf in jax.tree.leaves(parameters_and_shapes(case, dtype)):
            assert leaf.dtype == dtype and not leaf.weak_type
        _, *results = parameters_and_shapes(case, jnp.bfloat16, jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            for leaf in jax.tree.leaves(parameters_and_shapes(case, dtype)):
                assert leaf.dtype == dtype and not leaf.weak_type


@every_case
@both_directions
def test_second_call_does_not_compile_again(case, direction):
    flow, params, x, context, _ = build(case)
    traces = []

    @jax.jit
    def transform(*args):
        traces.append(1)
        return getattr(flow, direction)(*args)

    # The result y has the type of x, so that a call on y needs no new trace.
    y, _ = transform.eval_shape(params, x, context)
    transform.eval_shape(params, y, context)
    assert len(traces) == 1


@every_case
def test_a_rebuilt_flow_is_the_same_function(case):
    """Its program is the same text, constants included."""
    flow, params, x, context, _ = build(case)
    again = case.make()
    other = jax.eval_shape(again.init, jax.random.key(99), x, context)
    assert jax.tree.structure(other) == jax.tree.structure(params)
    for direction in ("apply", "inverse"):
        program, expected = (
            jax.jit(getattr(made, direction)).lower(params, x, context).as_text()
            for made in (again, flow)
        )
        assert program == expected


@parametrize_cases(
    case for case in CASES if case.name.startswith(("coupling", "real_nvp", "iaf", "maf"))
)
def test_wrong_event_shape_is_an_error(case):
    flow, params, x, context, _ = build(case)
    expected = ", ".join(map(str, case.event_shape))
    for wrong in (x[..., :1].repeat(x.shape[-1] + 1, -1), x[0][..., 0], np.zeros(())):
        message = rf"expected .*\[\.\.\., {expected}\].*got \("
        assert_error(flow, params, wrong, context, message)


@pytest.fixture(scope="module")
def unfrozen_at_the_end():
    yield
    gc.unfreeze()


@pytest.fixture
def frozen(unfrozen_at_the_end):
    """Hides existing objects from the leak check, which would look through all of them.

    They stay hidden until the end of this module, so that each test only adds what is new.
    """
    gc.collect()
    gc.freeze()


@every_case
@pytest.mark.usefixtures("frozen")
def test_no_implicit_promotion_of_ranks_or_dtypes_and_no_leaks(case):
    """With JAX's strictest settings, derivatives included."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks(),
    ):
        for dtype in (jnp.float32, jnp.bfloat16):
            flow = case.make()  # Made again, so that no layer has been traced before.
            x = jax.ShapeDtypeStruct((4, *case.event_shape), dtype)
            context = jax.ShapeDtypeStruct((CONTEXT_DIM,), dtype) if case.conditional else None
            params = jax.eval_shape(flow.init, KEY, x, context)

            def sums(params, x, context, flow=flow):
                outputs = [f(params, x, context) for f in (flow.apply, flow.inverse)]
                return sum(map(jnp.sum, jax.tree.leaves(outputs)))

            jax.eval_shape(jax.value_and_grad(sums, (0, 1)), params, x, context)


@parametrize_cases(FAR_CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_far_out(case, dtype):
    """Values and gradients at inputs up to 1e6, with parameters further out than elsewhere."""
    sizes = np.array([1, 1e3, 1e6, -1e6]).reshape(-1, *[1] * len(case.event_shape))
    x = (np.asarray(normal((4, *case.event_shape), seed=2)) * sizes).astype(dtype)
    context = normal((4, CONTEXT_DIM), seed=3, dtype=dtype) if case.conditional else None
    params = random_params(case.make().init, x, context, scale=3 * case.noise)

    def at_a_point(direction, params, x, context):
        """A point's image, and the log-density of a normal there with its gradients."""

        def log_prob(params, x):
            # Made again for float64: JAX keeps the index types of a stack's constants.
            y, log_det = getattr(case.make(), direction)(params, x, context)
            return log_det - 0.5 * (y * y).sum(), (y, log_det)

        return jax.value_and_grad(log_prob, (0, 1), has_aux=True)(params, x)

    directions = FAR_ONE_WAY.get(case.name, ("apply", "inverse"))

    def at_points(params, x, context):
        return [at_a_point(direction, params, x, context) for direction in directions]

    assert_finite_where_representable(
        jax.vmap(at_points, (None, 0, 0)), params, x, context, dtype=dtype
    )
