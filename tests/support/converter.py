"""Converts parameters of flows from before they were stacked to today's layout.

Up to commit 290305c a stack of up to 12 layers (4 of coupling layers) was a tuple, a MADE's kernel
was one array for each block of columns, with its longer side last, and names were flax's own.

tests/golden/parameters_290305c.npz holds what that commit computed with such parameters. It was
made in a checkout of it, with this folder copied there, by
`python -m support.converter OUTPUT.npz`.
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from led_jax import flows
from support import gated_iaf

# For each case: the flow, its event shape, its context's width, its depth, and the depth up to
# which its layers were a tuple. Where a layer is narrower than 256 units, its number of units and
# that of its degrees are both even, or it has less than two units a degree: otherwise degrees have
# changed since, and with them the function.
CASES = {
    "real_nvp-3": (lambda: flows.real_nvp((5,), 3, (6, 7), context_dim=3), (5,), 3, 3, 4),
    "real_nvp-6": (lambda: flows.real_nvp((4,), 6, (5,)), (4,), None, 6, 4),
    "iaf-1": (lambda: gated_iaf((5,), 1, (8, 6)), (5,), None, 1, 12),
    "iaf-3": (lambda: gated_iaf((4,), 3, (8,), 3), (4,), 3, 3, 12),
    "iaf-13": (lambda: gated_iaf((3,), 13, (4,)), (3,), None, 13, 12),
    "iaf-wide": (lambda: gated_iaf((5,), 2, (260, 300)), (5,), None, 2, 12),
    "iaf-wide-event": (lambda: gated_iaf((258,), 1, (257,)), (258,), None, 1, 12),
    "convnet": (
        lambda: flows.real_nvp(
            (2, 2, 2),
            2,
            (3,),
            "channel",
            context_dim=8,
            conditioner=partial(flows.convnet, (2, 2, 2)),
        ),
        (2, 2, 2),
        8,
        2,
        4,
    ),
    "pixelcnn": (
        lambda: gated_iaf((2, 3, 2), 2, (4,), 6, conditioner=partial(flows.pixelcnn, (2, 3, 2))),
        (2, 3, 2),
        6,
        2,
        12,
    ),
}


def is_network(tree):
    return isinstance(tree, dict)


def convert(old, new_shapes, depth, max_unroll):
    """The old parameters of a stack in the new layout, whose shapes are `new_shapes`."""
    networks = [n for n in jax.tree.leaves(old, is_leaf=is_network) if is_network(n)]
    assert len(networks) == (depth if depth <= max_unroll else 1)
    if depth > max_unroll:
        (stacked,) = networks
        networks = [jax.tree.map(lambda p, i=i: p[i], stacked) for i in range(depth)]
    new = jax.tree.map(lambda *p: jnp.stack(p), *map(convert_network, networks))
    return jax.tree.map(lambda _: new, new_shapes, is_leaf=is_network)


def convert_network(old):
    """A conditioner's parameters."""
    if "_MaskedDense_0" in old:
        count = sum(name.startswith("_Masked") for name in old)
        new = {f"dense_{i}": convert_masked(old, i) for i in range(count)}
    elif "MADE_0" in old:
        count = sum(name.startswith("Conv") for name in old) // 2
        stacks = {}
        for i in range(count):
            stacks |= {f"above_{i}": old[f"Conv_{2 * i}"], f"left_{i}": old[f"Conv_{2 * i + 1}"]}
            stacks[f"join_{i}"] = old[f"Dense_{i}"]
        return {"stacks": add_context(old, stacks), "pixel": convert_network(old["MADE_0"])}
    else:
        plain = [name for name in old if not name.startswith("_")]
        new = {name.lower(): old[name] for name in plain}
    return add_context(old, new)


def add_context(old, new):
    context = old.get("_ContextDense_0")
    return new if context is None else new | {"context": context["Dense_0"]}


def convert_masked(network, i):
    """One kernel and one bias of a masked layer."""
    layer = network[f"_MaskedDense_{i}"]
    num_params, columns = layer["bias"].shape
    count = 1 + max(int(name[7:]) for name in layer if name.startswith("kernel"))
    blocks = []
    for j, part in enumerate(np.array_split(np.arange(columns), count)):
        features = num_params * len(part)
        kernel = layer.get(f"kernel_{j}", jnp.zeros((0, features)))
        kernel = kernel if kernel.shape[1] == features else kernel.T
        blocks.append(kernel.reshape(len(kernel), num_params, len(part)))
    # The last block saw every row that any block saw; the rest of the rows is masked everywhere.
    rows = num_rows(network, i)
    blocks = [jnp.pad(b, ((0, rows - len(b)), (0, 0), (0, 0))) for b in blocks]
    kernel = jnp.concatenate(blocks, -1).reshape(rows, num_params * columns)
    return {"kernel": kernel, "bias": layer["bias"].reshape(-1)}


def num_rows(network, i):
    """Inputs of a masked layer: units of the one before it, or entries of the event."""
    if i > 0:
        return network[f"_MaskedDense_{i - 1}"]["bias"].shape[1]
    last = max(name for name in network if name.startswith("_Masked"))
    return network[last]["bias"].shape[1]


def parameters(tree):
    """Numbers for a tree of shapes written as "3x4", the same on every machine."""
    leaves, treedef = jax.tree.flatten(tree)
    filled = []
    for i, text in enumerate(leaves):
        shape = tuple(int(n) for n in text.split("x") if n)
        numbers = np.sin(0.7 * np.arange(1.0, 1 + np.prod(shape)) ** 2 + i).reshape(shape)
        filled.append(0.6 * numbers / np.sqrt(shape[-2] if len(shape) > 1 else 4))
    return treedef.unflatten(filled)


def to_tree(json_value):
    """A tree of strings, with the lists of JSON as the tuples that they were."""
    if isinstance(json_value, list):
        return tuple(map(to_tree, json_value))
    if isinstance(json_value, dict):
        return {name: to_tree(value) for name, value in json_value.items()}
    return json_value


def evaluate(name, tree, to_layout=lambda params: params):
    """What a case computes: `{name: array}`, in float64.

    Args:
      name: the case.
      tree: shapes of its old parameters.
      to_layout: maps old parameters to the layout of the code that runs. Gradients are with respect
        to the old parameters; of a large array, only the sums along either axis are returned.
    """
    make, event_shape, context_dim, _, _ = CASES[name]
    flow = make()
    x, context = inputs(event_shape, context_dim)

    def loss(params, x):
        outputs = {}
        for direction in ("apply", "inverse"):
            y, log_det = getattr(flow, direction)(to_layout(params), x, context)
            outputs |= {f"{direction}-y": y, f"{direction}-log_det": log_det}
        log_prob = outputs["inverse-log_det"] - 0.5 * jnp.sum(outputs["inverse-y"] ** 2)
        return (log_prob + outputs["apply-log_det"] + jnp.sum(outputs["apply-y"])).sum(), outputs

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, outputs), (of_params, of_x) = run(parameters(tree), x)
    outputs |= {"loss": value, "gradient-x": of_x}
    for i, leaf in enumerate(map(np.asarray, jax.tree.leaves(of_params))):
        sums = {"": leaf} if leaf.size <= 600 else {"-rows": leaf.sum(-1), "-columns": leaf.sum(-2)}
        outputs |= {f"gradient-{i}{kind}": value for kind, value in sums.items()}
    return {key: np.asarray(value) for key, value in outputs.items()}


def inputs(event_shape, context_dim):
    """Two points, and their contexts."""
    x = np.sin(np.arange(2.0 * np.prod(event_shape)) ** 2).reshape(2, *event_shape)
    return x, None if context_dim is None else np.cos(np.arange(2.0 * context_dim)).reshape(2, -1)


def main(path):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    arrays = {}
    for name, (make, event_shape, context_dim, _, _) in CASES.items():
        params = jax.eval_shape(make().init, jax.random.key(0), *inputs(event_shape, context_dim))
        tree = jax.tree.map(lambda p: "x".join(map(str, p.shape)), params)
        arrays[f"{name}/tree"] = np.array(json.dumps(tree))
        for key, value in evaluate(name, tree).items():
            arrays[f"{name}/{key}"] = value.astype(np.float32)
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
