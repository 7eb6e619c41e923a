"""The core abstraction: a flow is three pure functions, and combinators return flows again."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax.descriptions import constructor, describe

Params = Any

ScanCost = Literal["low", "high"]

# Depth up to which `repeat` unrolls a stack, by its `scan_cost`. Deeper stacks are one `lax.scan`,
# whose compile time does not depend on depth. On a CPU, training steps of MADE layers are faster
# unrolled; those of coupling layers take about the same time either way (results/benchmark.md).
# Read whenever a stack is applied; parameters do not depend on it.
MAX_UNROLL: dict[ScanCost, int] = {"low": 4, "high": 12}


class InitFn(Protocol):
    """Creates the parameters: a pytree of trainable floats."""

    def __call__(self, key: Array, x: Array, context: Array | None = None, /) -> Params:
        """`x`, `context`: examples that fix shapes and dtype, with any leading batch axes."""
        ...


class TransformFn(Protocol):
    """Maps `[..., *event_shape]` to the same shape, with the log-determinant `[...]`."""

    def __call__(
        self, params: Params, x: Array, context: Array | None = None, /
    ) -> tuple[Array, Array]:
        """`context`: `[..., context_dim]`; `x` may have more batch axes, in front of those."""
        ...


class Flow(NamedTuple):
    """An invertible map from a base space to a target space, as pure functions.

    Attributes:
      init: `(key, x, context=None) -> params`.
      apply: `(params, x, context=None) -> (y, log_det)` with `y = f(x)` and
        `log_det = log|det df/dx|`.
      inverse: `(params, y, context=None) -> (x, log_det)` with `x = f^-1(y)` and
        `log_det = log|det df^-1/dy|`.

    `x` and `y` are `[..., *event_shape]` with any number of batch axes, zero included; `log_det`
    is `[...]`; the float dtype of the input is kept. The x of `init` is an example of an event of
    the base. Events of base and target have the same shape, except for `simplex`, which maps D - 1
    entries to D entries that sum to one: its log_det is that of the map to the first D - 1, and
    densities on the simplex are with respect to the volume of these.
    """

    init: InitFn
    apply: TransformFn
    inverse: TransformFn

    __repr__ = describe


@constructor
def chain(*flows: Flow, event_ndims: int = 1) -> Flow:
    """The composition that applies the first flow first.

    >>> from led_jax import flows
    >>> chain(flows.reverse(), flows.reverse()).apply(((), ()), jnp.arange(3.0))[0].tolist()
    [0.0, 1.0, 2.0]

    Args:
      *flows: flows on events of one shape; `chain()` is the identity.
      event_ndims: number of event axes; only used by the identity.

    Returns:
      A flow whose parameters are a tuple, one entry for each flow.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        params = []
        for flow, flow_key in zip(flows, jax.random.split(key, len(flows)), strict=True):
            params.append(flow.init(flow_key, x, context))
            x, _ = flow.apply(params[-1], x, context)
        return tuple(params)

    def compose(directions: list[tuple[TransformFn, int]]) -> TransformFn:
        def transform(params: Params, x: Array, context: Array | None = None):
            found = len(params) if isinstance(params, tuple | list) else type(params).__name__
            _check_entries("chain", found, len(flows))
            log_det = None
            for direction, i in directions:
                x, term = direction(params[i], x, context)
                log_det = term if log_det is None else log_det + term
            if log_det is None:
                log_det = jnp.zeros(x.shape[: x.ndim - event_ndims], x.dtype)
            return x, log_det

        return transform

    return Flow(
        init,
        compose([(flow.apply, i) for i, flow in enumerate(flows)]),
        compose([(flow.inverse, i) for i, flow in reversed(list(enumerate(flows)))]),
    )


@constructor
def invert(flow: Flow) -> Flow:
    """The inverse map as a flow: `apply` and `inverse` are exchanged, and so are base and target.

    For example, an inverse autoregressive flow becomes a masked autoregressive flow.

    >>> flow = invert(chain())
    >>> flow
    invert(chain())
    """
    return Flow(flow.init, flow.inverse, flow.apply)


@constructor
def repeat(
    layer: Flow | Callable[[Any], Flow],
    depth: int,
    constants: Any = None,
    event_ndims: int = 1,
    scan_cost: ScanCost = "high",
) -> Flow:
    """A stack of `depth` layers of one shape, each with parameters of its own.

    Equals `chain` of the layers, with the same parameters for the same key. The layer is traced
    only once, and deep stacks are a `lax.scan`, so that compile time is bounded.

    >>> flow = repeat(lambda i: chain(), 3, np.arange(3))
    >>> flow.apply(flow.init(jax.random.key(0), jnp.zeros(2)), jnp.zeros((4, 2)))[1].shape
    (4,)

    Args:
      layer: a flow, or a function from one layer's constants to a flow. The flow's functions are
        traced once for all layers, so that the constants are tracers there.
      depth: number of layers; 0 gives the identity.
      constants: pytree of arrays `[depth, ...]`; layer i gets the slices [i].
      event_ndims: number of event axes; only used by the identity.
      scan_cost: how much slower a layer is in a scan than unrolled. It only decides up to which
        depth the stack is unrolled (`MAX_UNROLL`).

    Returns:
      A flow whose parameters are one layer's pytree with a leading axis of length `depth`.

    Raises:
      ValueError: if depth is negative, or constants do not have `depth` slices; from the flow's
        functions, if the parameters are those of a stack of another depth.
    """
    if depth < 0:
        raise ValueError(f"repeat: depth must be 0 or more, got {depth}")
    for leaf in jax.tree.leaves(constants):
        if len(leaf) != depth:
            raise ValueError(f"repeat: constants must have {depth} slices, got {len(leaf)}")

    def make(layer_constants: Any) -> Flow:
        return layer if isinstance(layer, Flow) else layer(layer_constants)

    slices = [jax.tree.map(operator.itemgetter(i), constants) for i in range(depth)]
    for layer_constants in slices:
        make(layer_constants)  # Concrete constants, to validate them: tracers cannot be.

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        def body(x, key_and_constants):
            key, layer_constants = key_and_constants
            flow = make(layer_constants)
            params = flow.init(key, x, context)
            return flow.apply(params, x, context)[0], params

        keys = jax.random.split(key, depth)
        # With jit disabled, a scan of length 0 cannot infer the types of its results.
        is_eager = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        with jax.disable_jit(is_eager and depth > 0):
            return jax.lax.scan(body, x, (keys, constants), length=depth)[1]

    def traced_once(direction: str) -> Callable[..., Any]:
        return jax.jit(lambda constants, *args: getattr(make(constants), direction)(*args))

    functions = [traced_once(direction) for direction in Flow._fields]
    unrolled = chain(
        *(Flow(*(partial(function, s) for function in functions)) for s in slices),
        event_ndims=event_ndims,
    )

    def along(direction: str, reverse: bool) -> TransformFn:
        def transform(params: Params, x: Array, context: Array | None = None):
            for leaf in jax.tree.leaves(params):
                _check_entries("repeat", len(leaf) if jnp.ndim(leaf) else "a scalar", depth)
            if depth <= MAX_UNROLL[scan_cost]:
                return getattr(unrolled, direction)(_unstack(params, depth), x, context)

            def body(x, params_and_constants):
                params, layer_constants = params_and_constants
                return getattr(make(layer_constants), direction)(params, x, context)

            # For the gradient only the layers' inputs are kept; everything else, many times larger
            # in a deep stack, is recomputed.
            body = jax.checkpoint(body, prevent_cse=False)
            x, log_dets = jax.lax.scan(body, x, (params, constants), depth, reverse)
            return x, log_dets.sum(0)

        return transform

    return Flow(init, along("apply", reverse=False), along("inverse", reverse=True))


def _unstack(params: Params, depth: int) -> tuple[Params, ...]:
    """Splits stacked parameters into those of each layer.

    By `split`, because its gradient is one concatenation. The gradient of indexing a layer is an
    array of the whole stack's size, zero outside the layer, and `depth` of them would be added up.
    """
    leaves, treedef = jax.tree.flatten(params)
    pieces = [jax.lax.split(leaf, (1,) * depth) for leaf in leaves]
    layers = zip(*pieces, strict=True) if leaves else [()] * depth
    return tuple(treedef.unflatten([piece.squeeze(0) for piece in layer]) for layer in layers)


@constructor
def flatten(flow: Flow, event_shape: tuple[int, ...]) -> Flow:
    """Turns a flow on vectors `[..., D]` into one on events of shape `event_shape` with D entries.

    >>> flow = flatten(chain(), (2, 3))
    >>> flow.apply(flow.init(jax.random.key(0), jnp.zeros((2, 3))), jnp.ones((5, 2, 3)))[0].shape
    (5, 2, 3)

    Raises:
      ValueError: (from the flow's functions) if an input does not end in `event_shape`.
    """
    event_shape = tuple(event_shape)

    def to_vector(x: Array) -> Array:
        batch_ndims = x.ndim - len(event_shape)
        if batch_ndims < 0 or x.shape[batch_ndims:] != event_shape:
            raise ValueError(
                f"flow: expected x of shape [..., {', '.join(map(str, event_shape))}], "
                f"got {x.shape}; reshape it, or build the flow with this event shape"
            )
        return x.reshape(*x.shape[:batch_ndims], int(np.prod(event_shape)))

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return flow.init(key, to_vector(x), context)

    def along(direction: TransformFn) -> TransformFn:
        def transform(params: Params, x: Array, context: Array | None = None):
            y, log_det = direction(params, to_vector(x), context)
            return y.reshape(*y.shape[:-1], *event_shape), log_det

        return transform

    return Flow(init, along(flow.apply), along(flow.inverse))


def _check_entries(name: str, found: int | str, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected parameters of {expected} layers, got {found}")
