"""Which parameters the public stacks have: saved models depend on it."""

import importlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, converter

from led_jax import flows
from led_jax.flows import base

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

# The attribute `made` of led_jax.flows is the function, not this module.
MADE = importlib.import_module("led_jax.flows.made")
GOLDEN = Path(__file__).parents[1] / "golden"
DEPTHS = (0, 1, 4, 12, 16)


def stacks():
    """Name, flow, event shape and width of the context of each stack in the golden file."""
    image = (2, 4, 2)
    makers = {
        "real_nvp": (flows.real_nvp, (5,), (100,), 3),
        "real_nvp wide": (flows.real_nvp, (600,), (300,), None),
        "real_nvp spline": (
            partial(flows.real_nvp, transformer=flows.rational_quadratic),
            (6,),
            (16, 8),
            None,
        ),
        "convnet": (
            partial(flows.real_nvp, mask="channel", conditioner=partial(flows.convnet, image)),
            image,
            (8,),
            24,
        ),
        "iaf": (flows.iaf, (5,), (20, 30), 3),
        "iaf wide": (flows.iaf, (300,), (512, 320), None),
        "iaf deep_sigmoid": (partial(flows.iaf, transformer=flows.deep_sigmoid), (2,), (9,), None),
        "pixelcnn": (
            partial(flows.iaf, conditioner=partial(flows.pixelcnn, image)),
            image,
            (8, 6),
            24,
        ),
    }
    for name, (make, event_shape, hidden, context_dim) in makers.items():
        for depth in DEPTHS:
            flow = make(event_shape, depth, hidden=hidden, context_dim=context_dim)
            yield f"{name}, depth {depth}", flow, event_shape, context_dim
    mixed = partial(flows.real_nvp, hidden=(4,), mixing=flows.lu((5,), context_dim=3))
    for name, make in {
        "planar": flows.planar,
        "radial": flows.radial,
        "triangular_sylvester": flows.triangular_sylvester,
        "householder_sylvester": flows.householder_sylvester,
        "orthogonal_sylvester": partial(flows.orthogonal_sylvester, num_columns=3),
        "real_nvp mixed": mixed,
    }.items():
        for depth in DEPTHS:
            yield f"{name}, depth {depth}", make((5,), depth, context_dim=3), (5,), 3
    for make in (flows.lu, flows.householder):
        yield make.__name__, make((5,), context_dim=3), (5,), 3


def described(flow, event_shape, context_dim):
    """Path of each parameter, with its shape and dtype, as "float32[4, 5]"."""
    x = jax.ShapeDtypeStruct((2, *event_shape), jnp.float32)
    context = None if context_dim is None else jax.ShapeDtypeStruct((2, context_dim), jnp.float32)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(flow.init, KEY, x, context))
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


@pytest.mark.slow
def test_parameters_are_those_of_the_golden_file():
    """A change here makes saved models unreadable.

    If it is intended, replace the file by `parameters.json.new`, which a failing run writes beside
    it.
    """
    found = {name: described(*stack) for name, *stack in stacks()}
    path = GOLDEN / "parameters.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    if found != expected:
        path.with_suffix(".json.new").write_text(json.dumps(found, indent=1) + "\n")
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    assert not differing, f"if these are wanted, mv {path}.new {path}"


def test_parameters_depend_on_no_threshold(monkeypatch):
    stack = flows.iaf((300,), 3, hidden=(512,)), (300,), None
    before = described(*stack)
    monkeypatch.setattr(base, "MAX_UNROLL", dict.fromkeys(base.MAX_UNROLL, 0))
    monkeypatch.setattr(MADE, "_num_blocks", lambda rows, columns: 3)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert described(flows.iaf((300,), 3, hidden=(512,)), (300,), None) == before


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_made_computes_the_same_in_any_number_of_blocks(monkeypatch, x64, num_blocks):
    network = flows.made((12, 9), context_dim=2)(3, 5)
    x, context = np.sin(np.arange(20.0)).reshape(4, 5), np.ones(2)
    params = jax.eval_shape(network.init, KEY, x, context)
    params = jax.tree.map(lambda p: np.sin(np.arange(1.0 * p.size)).reshape(p.shape), params)

    def value_and_gradient():
        def loss(params, x):
            raw = network.apply(params, x, context)
            return jnp.sum(jnp.sin(raw)), raw

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    expected = value_and_gradient()
    monkeypatch.setattr(MADE, "_num_blocks", lambda rows, columns: num_blocks)
    for a, b in zip(*map(jax.tree.leaves, (value_and_gradient(), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


FIXTURE = np.load(GOLDEN / "parameters_290305c.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", converter.CASES)
def test_parameters_of_before_they_were_stacked_give_the_same_numbers(x64, name):
    """Log-densities, images and gradients equal those of the old code at the same parameters."""
    make, event_shape, context_dim, depth, max_unroll = converter.CASES[name]
    tree = converter.to_tree(json.loads(str(FIXTURE[f"{name}/tree"])))
    new = jax.eval_shape(make().init, KEY, *converter.inputs(event_shape, context_dim))

    def to_layout(params):
        return converter.convert(params, new, depth, max_unroll)

    found = jax.eval_shape(to_layout, converter.parameters(tree))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, new)
    actual = converter.evaluate(name, tree, to_layout)
    expected = {
        key.partition("/")[2]: value
        for key, value in FIXTURE.items()
        if key.startswith(f"{name}/") and not key.endswith("/tree")
    }
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(np.abs(value).max(), 1e-30)
        np.testing.assert_allclose(actual[key] / scale, value / scale, rtol=1e-6, atol=1e-6)
