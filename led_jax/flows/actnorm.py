"""Activation normalisation: a trainable scale and shift for each entry."""

import jax.numpy as jnp
from jax import Array

from led_jax.checks import check_names
from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params
from led_jax.flows.conditioners import check_shapes
from led_jax.numerics import match_rank


@constructor
def actnorm(event_ndims: int = 1) -> Flow:
    """y = (x + shift) e^log_scale, entry by entry.

    Kingma and Dhariwal (2018), section 3.1, https://arxiv.org/abs/1807.03039. `init` chooses the
    parameters so that y has mean 0 and variance 1 over the batch axes of its `x`, or only mean 0
    for entries that are constant there; without batch axes it gives the identity. The flow of a
    density is initialised with data, the target of the flow: `invert(actnorm())` normalises them.

    >>> import jax
    >>> flow = actnorm()
    >>> params = flow.init(jax.random.key(0), jnp.arange(8.0).reshape(4, 2))
    >>> flow.apply(params, jnp.zeros((5, 2)))[1].shape
    (5,)

    Args:
      event_ndims: number of event axes.

    Raises:
      ValueError: (from the flow's functions) if an input does not fit the parameters.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        batch_axes = tuple(range(x.ndim - event_ndims))
        if not batch_axes:
            return {"log_scale": jnp.zeros_like(x), "shift": jnp.zeros_like(x)}
        # Constant entries, such as all entries of a single row, are only shifted.
        std = x.std(batch_axes)
        std = jnp.where(std > 1e-6 * jnp.abs(x).max(batch_axes), std, 1)
        return {"log_scale": -jnp.log(std), "shift": -x.mean(batch_axes)}

    def log_det(log_scale: Array, x: Array) -> Array:
        return jnp.broadcast_to(log_scale.sum(), x.shape[: x.ndim - event_ndims]).astype(x.dtype)

    def read(params: Params, x: Array) -> tuple[Array, Array]:
        check_names("actnorm", params, ("log_scale", "shift"))
        expected = jnp.shape(params["shift"])
        if x.shape[max(x.ndim - event_ndims, 0) :] != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"actnorm: expected x of shape [..., {shape}], got {x.shape}")
        check_shapes("actnorm", params, {"log_scale": expected, "shift": expected})
        return match_rank(params["log_scale"], x.ndim), match_rank(params["shift"], x.ndim)

    def apply(params: Params, x: Array, context: Array | None = None):
        log_scale, shift = read(params, x)
        return ((x + shift) * jnp.exp(log_scale)).astype(x.dtype), log_det(log_scale, x)

    def inverse(params: Params, y: Array, context: Array | None = None):
        log_scale, shift = read(params, y)
        return (y * jnp.exp(-log_scale) - shift).astype(y.dtype), log_det(-log_scale, y)

    return Flow(init, apply, inverse)
