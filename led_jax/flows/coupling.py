"""Coupling layers: part of the event passes unchanged; the rest is transformed, given that part."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows import masks
from led_jax.flows.base import Flow, Params, TransformFn, chain, flatten, repeat
from led_jax.flows.conditioners import Conditioner, MakeConditioner, make_conditioner, mlp
from led_jax.flows.permutations import permute, permute_by
from led_jax.flows.transformers import Transformer, affine
from led_jax.numerics import match_rank


@constructor
def coupling(
    mask: np.ndarray, conditioner: MakeConditioner, transformer: Transformer = affine
) -> Flow:
    """A coupling layer: y_a = x_a and y_b = transformer(x_b; conditioner(x_a)).

    Dinh, Sohl-Dickstein and Bengio (2016), eq. 7 and 8, https://arxiv.org/abs/1605.08803. Both
    directions cost one pass of the conditioner. `mlp` reads x_a and emits parameters for x_b only;
    `convnet` reads the whole map, with zeros in place of x_b, and emits parameters for all entries.

    >>> import jax
    >>> flow = coupling(np.array([True, False, True]), mlp((8,)))
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      mask: booleans of the event's shape; True marks x_a, which passes unchanged.
      conditioner: network from x_a (and the context) to the transformer's parameters.
      transformer: elementwise map applied to x_b.

    Returns:
      A flow on events of the mask's shape.

    Raises:
      ValueError: if the mask is not boolean, or is True everywhere or nowhere, or the conditioner
        is autoregressive; from the flow's functions, if the input, the context or the parameters
        have the wrong shapes.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.all() or not mask.any():
        raise ValueError(
            "coupling: expected a boolean mask that is True somewhere and False somewhere, got "
            f"dtype {mask.dtype} with {np.count_nonzero(mask)} of {mask.size} entries set"
        )
    if _sees_whole_event(conditioner, transformer, mask.size):
        return flatten(_couple_in_place(mask.ravel(), conditioner, transformer), mask.shape)
    order = np.argsort(~mask.ravel(), kind="stable")
    layer = _couple_halves(int(mask.sum()), conditioner, transformer)
    return flatten(chain(permute(order), layer, permute(np.argsort(order))), mask.shape)


@constructor
def real_nvp(
    event_shape: tuple[int, ...],
    depth: int,
    hidden: Sequence[int] = (100,),
    mask: str = "random",
    *,
    transformer: Transformer = affine,
    context_dim: int | None = None,
    seed: int = 0,
    conditioner: Callable[..., MakeConditioner] = mlp,
    mixing: Flow | None = None,
) -> Flow:
    """A stack of coupling layers with fully connected or convolutional conditioners.

    Layers come in pairs: the second one transforms the entries that the first one passes, so that
    two layers transform every entry. Dinh, Sohl-Dickstein and Bengio (2016),
    https://arxiv.org/abs/1605.08803. Both directions cost one pass of each conditioner, so that the
    cheap direction is the transformer's (`Transformer.cheap`).

    >>> import jax
    >>> flow = real_nvp((6,), 4, hidden=(8,))
    >>> params = flow.init(jax.random.key(0), jnp.zeros(6))
    >>> flow.apply(params, jnp.zeros((5, 6)))[1].shape
    (5,)

    Args:
      event_shape: shape of the event, of two entries or more.
      depth: number of coupling layers; 0 gives the identity.
      hidden: widths of each conditioner's hidden layers.
      mask: "random" (a random half for each pair of layers), "checkerboard" or "channel".
      transformer: elementwise map of each layer.
      context_dim: width of the context that the conditioners read; None ignores any context.
      seed: seed of the random masks.
      conditioner: makes the layers' conditioner from `hidden` and `context_dim`: `mlp`, or for maps
        `partial(convnet, event_shape)`.
      mixing: a flow on vectors of the event's D entries, such as `lu((D,))` or `householder((D,))`,
        that is applied before each coupling, with parameters of its own for each layer. It takes
        the place of Glow's 1 x 1 convolutions (Kingma and Dhariwal, 2018, section 3.2,
        https://arxiv.org/abs/1807.03039).

    Returns:
      A flow on events of the given shape. Its parameters are `(((), layers), ())`, where `layers`
      are those of a conditioner with a leading axis of length `depth`. With a mixing flow they are
      `(mixing, (), layers, ())`, where `mixing` are its parameters with the same leading axis. With
      a conditioner that reads the whole event, such as `convnet`, they are `layers` or
      `(mixing, layers)`.

    Raises:
      ValueError: if the mask is unknown or does not split the event, if depth is negative or the
        widths are not positive, or the conditioner is autoregressive; from the flow's functions, if
        the input, the context or the parameters have the wrong shapes.
    """
    event_shape = tuple(event_shape)
    size = int(np.prod(event_shape))
    network = make_conditioner("real_nvp", conditioner, hidden, context_dim)
    in_place = _sees_whole_event(network, transformer, size)
    passing = _passing(event_shape, depth, mask, seed, halves=not in_place)
    if in_place:
        passing[1::2] = ~passing[1::2]

        def in_place_layer(mask: Array) -> Flow:
            layer = _couple_in_place(mask, network, transformer)
            return layer if mixing is None else chain(mixing, layer)

        return flatten(repeat(in_place_layer, depth, passing, scan_cost="low"), event_shape)
    layer = _couple_halves(size // 2, network, transformer)
    orders = np.argsort(~passing, -1, kind="stable")
    orders[1::2] = orders[1::2, ::-1]
    if mixing is not None:

        def mixed(there: Array, back: Array) -> Flow:
            return chain(mixing, permute_by(there, back), layer, permute_by(back, there))

        stack = repeat(
            lambda orders: mixed(*orders), depth, (orders, np.argsort(orders)), scan_cost="low"
        )
        return flatten(stack, event_shape)
    # From the order of one layer to that of the next is a single permutation.
    identity = np.arange(size)
    orders = np.stack([identity, *orders, identity])
    steps = np.stack([np.argsort(a)[b] for a, b in zip(orders, orders[1:], strict=False)])
    constants = steps[:-1], np.argsort(steps[:-1])
    stack = repeat(
        lambda orders: chain(permute_by(*orders), layer), depth, constants, scan_cost="low"
    )
    return flatten(chain(stack, permute(steps[-1])), event_shape)


def _passing(
    event_shape: tuple[int, ...], depth: int, mask: str, seed: int, *, halves: bool
) -> np.ndarray:
    """For each layer, the mask of entries that its pair's first layer passes, `[depth, D]`."""
    makers = {
        "random": lambda pair: masks.random_half(event_shape, seed + pair),
        "checkerboard": lambda pair: masks.checkerboard(event_shape),
        "channel": lambda pair: masks.channel(event_shape),
    }
    if mask not in makers:
        raise ValueError(f"real_nvp: mask must be one of {sorted(makers)}, got {mask!r}")
    size = int(np.prod(event_shape))
    passing = np.zeros((max(depth, 0), size), bool)
    for i in range(depth):
        passing[i] = makers[mask](i // 2).ravel()
        count = passing[i].sum()
        if count == 0 or (halves and count != size // 2):
            raise ValueError(
                f"real_nvp: a {mask!r} mask does not split an event of shape {event_shape} into "
                "halves; choose another mask, or an event of two entries or more"
            )
    return passing


def _sees_whole_event(conditioner: MakeConditioner, transformer: Transformer, size: int) -> bool:
    kind = conditioner(transformer.num_params, size).kind
    if kind == "autoregressive":
        raise ValueError(
            "coupling: expected a conditioner for coupling layers, as mlp(...) or convnet(...); "
            "got an autoregressive one"
        )
    return kind == "whole"


def _couple_in_place(
    mask: np.ndarray | Array, conditioner: MakeConditioner, transformer: Transformer
) -> Flow:
    """A coupling on vectors for a conditioner of the kind "whole"; the mask may be traced."""

    def network(x: Array) -> Conditioner:
        return conditioner(transformer.num_params, x.shape[-1])

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return network(x).init(key, jnp.where(match_rank(mask, x.ndim), x, 0), context)

    def couple(transform) -> TransformFn:
        def fn(params: Params, x: Array, context: Array | None = None):
            passes = match_rank(mask, x.ndim)
            passing, rest = jnp.where(passes, x, 0), jnp.where(passes, 0, x)
            raw = network(x).apply(params, passing, context)
            rest, log_det = transform(raw, rest)
            return jnp.where(passes, x, rest), jnp.where(passes, 0, log_det).sum(-1)

        return fn

    return Flow(init, couple(transformer.apply), couple(transformer.inverse))


def _couple_halves(
    num_passing: int, conditioner: MakeConditioner, transformer: Transformer
) -> Flow:
    """A coupling on vectors whose first `num_passing` entries pass unchanged.

    It is computed with entries as the first axis and the batch as the last, which is faster on a
    CPU; the transposes of one layer and the next cancel (docs/performance.md).
    """

    def network(x: Array) -> Conditioner:
        return conditioner(transformer.num_params, x.shape[-1] - num_passing)

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return network(x).init(key, x[..., :num_passing], context)

    def couple(transform) -> TransformFn:
        def fn(params: Params, x: Array, context: Array | None = None):
            batch_shape = x.shape[:-1]
            passing, rest = jnp.split(jnp.moveaxis(x, -1, 0), [num_passing])
            raw = network(x).apply(params, jnp.moveaxis(passing, 0, -1), context)
            raw = jnp.moveaxis(raw, (-1, -2), (0, 1))
            # A transformer is elementwise in all axes of raw `[..., P, D]` but P: the batch may be
            # its last axis.
            rest, log_det = transform(raw.reshape(*raw.shape[:2], -1), rest.reshape(len(rest), -1))
            y = jnp.concatenate([passing, rest.reshape(len(rest), *batch_shape)])
            return jnp.moveaxis(y, 0, -1), log_det.sum(0).reshape(batch_shape)

        return fn

    return Flow(init, couple(transformer.apply), couple(transformer.inverse))
