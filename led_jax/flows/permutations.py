"""Volume-preserving flows that reorder the entries of a vector."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow


@constructor
def permute(order: np.ndarray | Array) -> Flow:
    """y_i = x_order[i] on vectors `[..., D]`.

    >>> permute(np.array([2, 0, 1])).apply((), jnp.arange(3.0))[0].tolist()
    [2.0, 0.0, 1.0]

    Args:
      order: a permutation of 0..D-1, as integers `[D]`.

    Raises:
      ValueError: if `order` is not a permutation; a traced one is trusted.
    """
    if isinstance(order, Tracer):
        return permute_by(order, jnp.argsort(order))
    order = np.asarray(order)
    if sorted(order.ravel().tolist()) != list(range(order.size)) or order.ndim != 1:
        raise ValueError(
            f"permute: order must be a permutation of 0..{order.size - 1}, got {order}"
        )
    return permute_by(order, np.argsort(order))


@constructor
def permute_by(order: np.ndarray | Array, inverse_order: np.ndarray | Array) -> Flow:
    """`permute` with the inverse order given: a traced order needs no sorting. Checks neither.

    >>> flow = permute_by(np.array([2, 0, 1]), np.array([1, 2, 0]))
    >>> flow.inverse((), jnp.arange(3.0))[0].tolist()
    [1.0, 2.0, 0.0]
    """

    def take(x: Array, indices) -> Array:
        if x.shape[-1:] != (len(indices),):
            raise ValueError(f"permute: expected x of shape [..., {len(indices)}], got {x.shape}")
        if isinstance(indices, np.ndarray):
            # The identity and the reversal are slices, because the gradient of a slice is a slice,
            # and that of a gather a scatter.
            for step in (1, -1):
                if (indices == np.arange(len(indices))[::step]).all():
                    return x[..., ::step]
        rows = jnp.moveaxis(jnp.asarray(x), -1, 0).at[indices]
        return jnp.moveaxis(rows.get(mode="promise_in_bounds", unique_indices=True), 0, -1)

    return _reorder(lambda x: take(x, order), lambda y: take(y, inverse_order))


@constructor
def reverse() -> Flow:
    """y_i = x_{D-1-i} on vectors `[..., D]`.

    >>> reverse().apply((), jnp.arange(3.0))[0].tolist()
    [2.0, 1.0, 0.0]
    """

    def flip(x: Array) -> Array:
        # In two pieces, because XLA would otherwise recompute, in each layer, the entries from all
        # layers before it.
        low, high = jnp.array_split(x, 2, -1)
        return jnp.concatenate([high[..., ::-1], low[..., ::-1]], -1)

    return _reorder(flip, flip)


def _reorder(apply, inverse) -> Flow:
    def transform(reorder):
        return lambda params, x, context=None: (reorder(x), jnp.zeros(x.shape[:-1], x.dtype))

    return Flow(lambda key, x, context=None: (), transform(apply), transform(inverse))
