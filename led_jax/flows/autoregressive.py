"""Autoregressive flows: entry i is transformed as a function of the entries before it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params, chain, flatten, repeat
from led_jax.flows.conditioners import Conditioner, MakeConditioner, make_conditioner
from led_jax.flows.made import made
from led_jax.flows.permutations import reverse
from led_jax.flows.transformers import Transformer, affine


@constructor
def autoregressive(conditioner: MakeConditioner, transformer: Transformer = affine) -> Flow:
    """y_i = transformer(x_i; conditioner(x_1, ..., x_{i-1})) on vectors `[..., D]`.

    This is an inverse autoregressive flow (Kingma et al., 2016, https://arxiv.org/abs/1606.04934):
    `apply` costs one pass of the conditioner, `inverse` a compiled loop of D steps. With `made` the
    D steps together cost about one pass, because each computes only the hidden units of one degree;
    with a conditioner without `incremental` each step is a whole pass. `invert` gives a masked
    autoregressive flow (Papamakarios, Pavlakou and Murray, 2017, https://arxiv.org/abs/1705.07057),
    with the costs exchanged. Posteriors mostly sample: use the inverse autoregressive flow. Priors
    mostly score: use the masked one.

    >>> flow = autoregressive(made((8,)))
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      conditioner: autoregressive network, `made(...)` or `pixelcnn(...)`.
      transformer: elementwise map.

    Returns:
      A flow on vectors.

    Raises:
      ValueError: (from the flow's functions) if the conditioner is not autoregressive, or if
        the input, the context or the parameters have the wrong shapes.
    """

    def network(x: Array) -> Conditioner:
        made_for = conditioner(transformer.num_params, x.shape[-1])
        if made_for.kind != "autoregressive":
            raise ValueError(
                "autoregressive: expected an autoregressive conditioner, as made(...) or "
                f"pixelcnn(...); got one of the kind {made_for.kind!r}"
            )
        return made_for

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return network(x).init(key, x, context)

    def apply(params: Params, x: Array, context: Array | None = None):
        raw = network(x).apply(params, x, context)
        y, log_det = _transform(transformer.apply, raw, x)
        return y, log_det.sum(-1)

    def in_whole_passes(params: Params, x: Array, context: Array | None):
        def step(cache, x: Array, i: Array):
            raw = network(x).apply(params, x, context)
            return jax.lax.dynamic_slice_in_dim(raw, i, 1, -1), cache

        return (), step

    def inverse(params: Params, y: Array, context: Array | None = None):
        incremental = network(y).incremental or in_whole_passes
        cache, step = incremental(params, y, context)

        def set_entry(carry, i: Array):
            x, cache = carry
            entry_raw, cache = step(cache, x, i)
            entry = jax.lax.dynamic_slice_in_dim(y, i, 1, -1)
            entry, log_det = _transform(transformer.inverse, entry_raw, entry)
            return (jax.lax.dynamic_update_slice_in_dim(x, entry, i, -1), cache), log_det[..., 0]

        # Later entries are zero until their turn: the conditioner needs them to be finite.
        start = jnp.zeros_like(y), cache
        (x, _), log_dets = jax.lax.scan(set_entry, start, jnp.arange(y.shape[-1]))
        return x, log_dets.sum(0)

    return Flow(init, apply, inverse)


def _transform(
    transform: Callable[[Array, Array], tuple[Array, Array]], raw: Array, x: Array
) -> tuple[Array, Array]:
    """Applies `transform`; for events of fewer than 16 entries with the batch as the last axis.

    That is faster on a CPU. It is allowed because a transformer is elementwise in all axes of raw
    `[..., P, D]` but the one of the parameters, P.
    """
    if x.shape[-1] >= 16:
        return transform(raw, x)
    raw, entries = jnp.moveaxis(raw, (-1, -2), (0, 1)), jnp.moveaxis(x, -1, 0)
    outputs = transform(raw.reshape(*raw.shape[:2], -1), entries.reshape(len(entries), -1))
    y, log_det = (jnp.moveaxis(out.reshape(entries.shape), 0, -1) for out in outputs)
    return y, log_det


@constructor
def iaf(
    event_shape: tuple[int, ...],
    depth: int,
    hidden: Sequence[int] = (512, 512),
    context_dim: int | None = None,
    *,
    transformer: Transformer = affine,
    conditioner: Callable[..., MakeConditioner] = made,
) -> Flow:
    """A stack of inverse autoregressive layers with MADE or PixelCNN conditioners.

    The order of the entries is reversed between layers, and that of the context with it, so that
    event and context stay aligned if they are maps. Kingma et al. (2016),
    https://arxiv.org/abs/1606.04934. Per layer, `apply` costs one pass of the conditioner, and
    `inverse` D steps, which with MADE together cost about one pass. `apply` is the cheap direction
    unless the transformer's is `inverse` (`Transformer.cheap`).

    >>> flow = iaf((2, 3), 4, hidden=(8,))
    >>> params = flow.init(jax.random.key(0), jnp.zeros((2, 3)))
    >>> flow.apply(params, jnp.zeros((5, 2, 3)))[1].shape
    (5,)

    Args:
      event_shape: shape of the event, read in row-major order.
      depth: number of layers; 0 gives the identity.
      hidden: widths of each conditioner's hidden layers.
      context_dim: width of the context that the conditioners read; None ignores any context.
      transformer: elementwise map of each layer. The default, `affine`, shifts, and scales up or
        down; `gated`, the one of the paper, can only scale down; a spline is the identity beyond
        its bound.
      conditioner: makes the layers' conditioner from `hidden` and `context_dim`: `made`, or for
        maps `partial(pixelcnn, event_shape)`.

    Returns:
      A flow on events of the given shape.

    Raises:
      ValueError: if depth is negative or the widths are not positive; from the flow's functions,
        if the input, the context or the parameters have the wrong shapes.
    """
    network = make_conditioner("iaf", conditioner, hidden, context_dim)
    layer = autoregressive(network, transformer)
    stack = repeat(
        lambda is_reversed: chain(_reverse_context(layer, is_reversed), reverse()),
        depth,
        np.arange(depth) % 2 == 1,
    )
    # One more reversal if depth is odd, so that entry i of the output belongs to entry i of x.
    return flatten(chain(stack, reverse() if depth % 2 else chain()), event_shape)


def _reverse_context(flow: Flow, is_reversed: np.ndarray | Array) -> Flow:
    """The flow with its context reversed if `is_reversed`, which may be traced."""

    def along(function):
        def reversing(params_or_key, x: Array, context: Array | None = None):
            if context is not None and context.ndim:  # The conditioner refuses a scalar.
                context = jnp.where(is_reversed, context[..., ::-1], context)
            return function(params_or_key, x, context)

        return reversing

    return Flow(*map(along, flow))
