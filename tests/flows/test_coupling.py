from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, layers_of, normal, random_params, run_python
from support.cases import smooth_mlp

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def layer_order(event_shape, i, kind="random", seed=0):
    """The entries that layer i of `real_nvp` passes, and the rest, as its network orders them."""
    mask = {
        "random": lambda: flows.random_half(event_shape, seed + i // 2),
        "checkerboard": lambda: flows.checkerboard(event_shape),
        "channel": lambda: flows.channel(event_shape),
    }[kind]().ravel()
    first, second = np.flatnonzero(mask), np.flatnonzero(~mask)
    if i % 2 == 0:
        return first, second
    # The other half, in descending order. All layers pass the same number of entries: if the event
    # has an odd number of them, the lowest one of the larger half is transformed again.
    extra = len(second) - len(first)
    return second[extra:][::-1], np.concatenate([second[:extra], first[::-1]])


def in_ascending_order(params, passing, rest):
    """Parameters of the same function for a network that sees its entries in ascending order."""
    last = max(name for name in params if name.startswith("dense"))
    kernel = params["dense_0"]["kernel"][np.argsort(passing)]
    params = params | {"dense_0": params["dense_0"] | {"kernel": kernel}}

    def reorder(leaf):
        by_entry = leaf.reshape(*leaf.shape[:-1], 2, len(rest))
        return by_entry[..., np.argsort(rest)].reshape(leaf.shape)

    return params | {last: jax.tree.map(reorder, params[last])}


STACKS = [
    ((6,), "random", 4, None),
    ((5,), "random", 3, 2),
    ((4, 3, 2), "checkerboard", 3, None),
    ((1, 2, 4), "channel", 2, 2),
    ((2,), "random", 1, None),
]


@pytest.mark.slow
@pytest.mark.parametrize("event_shape,kind,depth,context_dim", STACKS)
def test_real_nvp_is_a_chain_of_couplings(event_shape, kind, depth, context_dim):
    kwargs = {"hidden": (7, 8), "context_dim": context_dim}
    flow = flows.real_nvp(event_shape, depth, mask=kind, seed=3, **kwargs)
    x = normal((4, *event_shape))
    context = None if context_dim is None else normal((4, context_dim))
    params = random_params(flow.init, x, context)
    orders = [layer_order(event_shape, i, kind, 3) for i in range(depth)]
    entries = np.arange(np.prod(event_shape)).reshape(event_shape)
    masks = [np.isin(entries, passing) for passing, _ in orders]
    chain = flows.chain(
        *(flows.coupling(mask, flows.mlp(**kwargs), flows.affine) for mask in masks)
    )
    # A coupling is a permutation, a layer, and a permutation.
    layers = layers_of(jax.device_get(params))
    assert len(layers) == depth
    chain_params = tuple(
        ((), in_ascending_order(p, *order), ()) for p, order in zip(layers, orders, strict=True)
    )
    for direction in ("apply", "inverse"):
        y, log_det = jax.jit(getattr(flow, direction))(params, x, context)
        expected = jax.jit(getattr(chain, direction))(chain_params, x, context)
        expected_y, expected_log_det = expected
        np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dim,depth", [(6, 4), (5, 3)])
def test_real_nvp_equals_distrax(dim, depth):
    distrax = pytest.importorskip("distrax")
    flow = flows.real_nvp((dim,), depth, hidden=(7,))
    x = normal((4, dim))
    params = random_params(flow.init, x)

    def layer(i, params):
        passing, rest = layer_order((dim,), i)
        mask = np.isin(np.arange(dim), passing)

        # Distrax passes all entries, zeros for those it transforms, and wants parameters of all.
        def conditioner(x):
            h = x[..., passing] @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
            out = jax.nn.relu(h) @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]
            out = out.reshape(*out.shape[:-1], 2, len(rest))
            return jnp.zeros((*x.shape[:-1], 2, dim)).at[..., rest].set(out)

        def bijector(raw):
            return distrax.ScalarAffine(raw[..., 0, :], log_scale=3 * jnp.tanh(raw[..., 1, :] / 3))

        return distrax.MaskedCoupling(jnp.asarray(mask), conditioner, bijector)

    # A distrax chain applies its last bijector first.
    layers = layers_of(jax.device_get(params))
    chain = distrax.Chain([layer(i, p) for i, p in enumerate(layers)][::-1])
    for ours, theirs in [
        (flow.apply, chain.forward_and_log_det),
        (flow.inverse, chain.inverse_and_log_det),
    ]:
        y, log_det = jax.jit(ours)(params, x)
        expected_y, expected_log_det = jax.jit(theirs)(x)
        np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-5, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def images_and_jacobians(flow, params, x):
    """Of both directions."""
    images = (lambda x: flow.apply(params, x)[0], lambda x: flow.inverse(params, x)[0])
    return [(image(x), jax.jacfwd(image)(x)) for image in images]


@pytest.mark.slow
@pytest.mark.parametrize("mask", [[True, False, False], [False, True, True]])
def test_coupling_passes_what_the_mask_marks(mask):
    mask = np.array(mask)
    flow = flows.coupling(mask, smooth_mlp())
    x = np.asarray(normal((3,)))
    results = images_and_jacobians(flow, random_params(flow.init, x), x)
    for y, jacobian in jax.device_get(results):
        np.testing.assert_array_equal(y[mask], x[mask])
        expected = np.eye(3, dtype=bool) | (~mask[:, None] & mask)
        np.testing.assert_array_equal(jacobian != 0, expected)


@pytest.mark.slow
def test_coupling_of_maps_passes_what_the_mask_marks():
    mask = flows.checkerboard((3, 3, 2))
    flow = flows.coupling(mask, flows.convnet(mask.shape, (4,), activation=jnp.tanh))
    x = np.asarray(normal(mask.shape))
    results = images_and_jacobians(flow, random_params(flow.init, x), x)
    passes = mask.ravel()
    for y, jacobian in jax.device_get(results):
        np.testing.assert_array_equal(y[mask], x[mask])
        expected = np.eye(18, dtype=bool) | (~passes[:, None] & passes)
        np.testing.assert_array_equal(jacobian.reshape(18, 18) != 0, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["random", "checkerboard", "channel"])
def test_real_nvp_of_maps_is_a_chain_of_couplings(mask):
    event_shape, depth = (3, 3, 2), 3
    network = partial(flows.convnet, event_shape)
    flow = flows.real_nvp(event_shape, depth, (4,), mask, seed=3, conditioner=network)
    x = np.asarray(normal((2, *event_shape)))
    params = random_params(flow.init, x)
    first = [
        {
            "random": lambda i=i: flows.random_half(event_shape, 3 + i // 2),
            "checkerboard": lambda: flows.checkerboard(event_shape),
            "channel": lambda: flows.channel(event_shape),
        }[mask]()
        for i in range(depth)
    ]
    masks = [m if i % 2 == 0 else ~m for i, m in enumerate(first)]
    chain = flows.chain(*(flows.coupling(m, network((4,))) for m in masks))
    y, log_det = jax.jit(flow.apply)(params, x)
    layers = tuple(layers_of(jax.device_get(params)))
    expected_y, expected_log_det = jax.jit(chain.apply)(layers, x)
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_det, expected_log_det, rtol=1e-5, atol=1e-5)
    assert np.all(np.abs(np.asarray(y) - x) > 1e-6)  # Two layers reach every entry.


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 5, 50])
@pytest.mark.parametrize("depth", [2, 3])
def test_two_layers_reach_every_entry(dim, depth):
    flow = flows.real_nvp((dim,), depth, hidden=(9,))
    x = np.asarray(normal((dim,)))
    y, _ = jax.jit(flow.apply)(random_params(flow.init, x), x)
    assert np.all(np.abs(np.asarray(y) - x) > 1e-6)


def test_seed_sets_the_random_masks():
    x = normal((20,))
    params = random_params(flows.real_nvp((20,), 2).init, x)
    outputs = [
        np.asarray(jax.jit(flows.real_nvp((20,), 2, seed=seed).apply)(params, x)[0])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[2] - outputs[0]).max() > 0.1


@pytest.mark.slow
def test_another_process_makes_the_same_function(tmp_path):
    code = """
import sys, jax, numpy as np
from led_jax import flows
flow = flows.real_nvp((9,), 6, hidden=(8,))
x = np.linspace(-2, 2, 27, dtype=np.float32).reshape(3, 9)
leaves, treedef = jax.tree.flatten(jax.eval_shape(flow.init, jax.random.key(123), x))
saved = np.load(sys.argv[1])
params = jax.tree.unflatten(treedef, [saved[f"arr_{i}"] for i in range(len(leaves))])
np.save(sys.argv[2], np.column_stack(jax.jit(flow.apply)(params, x)))
"""
    flow = flows.real_nvp((9,), 6, hidden=(8,))
    x = np.linspace(-2, 2, 27, dtype=np.float32).reshape(3, 9)
    params = random_params(flow.init, x)
    np.savez(tmp_path / "params.npz", *jax.tree.leaves(params))
    run_python(code, tmp_path / "params.npz", tmp_path / "y.npy")
    # Rounding may differ with how the two processes compile; other masks would give other numbers.
    expected = np.column_stack(jax.jit(flow.apply)(params, x))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mask,given",
    [
        (np.ones(3, bool), "dtype bool with 3 of 3"),
        (np.zeros((2, 2), bool), "dtype bool with 0 of 4"),
        (np.array([1, 0, 1]), "dtype int64 with 2 of 3"),
        (np.array([1.0, 0.0]), "dtype float64 with 1 of 2"),
    ],
)
def test_mask_must_split_the_event(mask, given):
    with pytest.raises(ValueError, match=f"expected a boolean mask that is True .*, got {given}"):
        flows.coupling(mask, smooth_mlp())


@pytest.mark.parametrize(
    "event_shape,mask,message",
    [
        ((4,), "stripes", "mask must be one of .*'checkerboard'.*'random'.*, got 'stripes'"),
        ((1,), "random", r"'random' mask does not split an event of shape \(1,\)"),
        ((1, 1, 1), "checkerboard", r"does not split an event of shape \(1, 1, 1\)"),
        ((3, 3, 2), "checkerboard", r"does not split an event of shape \(3, 3, 2\)"),
        ((4, 4, 1), "channel", r"does not split an event of shape \(4, 4, 1\)"),
        ((4,), "checkerboard", r"expected an event_shape \[H, W\] or \[H, W, C\], got \(4,\)"),
    ],
)
def test_real_nvp_masks_must_split_the_event(event_shape, mask, message):
    with pytest.raises(ValueError, match=message):
        flows.real_nvp(event_shape, 2, mask=mask)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        flows.real_nvp((4,), -1)
    with pytest.raises(ValueError, match=r"expected one or more positive widths, got hidden=\(\)"):
        flows.real_nvp((4,), 2, hidden=())
    with pytest.raises(ValueError, match="got 'stripes'"):
        flows.real_nvp((4,), 0, mask="stripes")
    with pytest.raises(ValueError, match="'channel' mask does not split an event of shape"):
        flows.real_nvp((4, 4, 1), 2, mask="channel", conditioner=partial(flows.convnet, (4, 4, 1)))


def test_couplings_are_mixed_where_a_flow_says_so(x64):
    """By hand: each mixing flow in turn, followed by that coupling of the unmixed stack."""
    dim, depth, mixing = 5, 2, flows.lu((5,))
    x = normal((4, dim))
    flow = flows.real_nvp((dim,), depth, hidden=(6,), mixing=mixing)
    params = random_params(flow.init, x)
    of_mixing, _, of_coupling, _ = params
    plain = [flows.real_nvp((dim,), i, hidden=(6,)) for i in range(depth + 1)]

    def first(count):
        """Parameters of the first couplings alone."""
        return (((), jax.tree.map(lambda leaf: leaf[:count], of_coupling)), ())

    @jax.jit
    def by_hand(y):
        log_dets = []
        for i in range(depth):
            for transform, its in (
                (mixing.apply, jax.tree.map(lambda leaf, i=i: leaf[i], of_mixing)),
                # Coupling i alone: the first i are undone, then the first i + 1 are done.
                (plain[i].inverse, first(i)),
                (plain[i + 1].apply, first(i + 1)),
            ):
                y, log_det = transform(its, y)
                log_dets.append(log_det)
        return y, sum(log_dets)

    for actual, expected in zip(jax.jit(flow.apply)(params, x), by_hand(x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    unmixed = jax.eval_shape(plain[depth].init, KEY, x)
    assert jax.tree.structure(unmixed) == jax.tree.structure(first(depth))
