"""Flows from R^D to other supports."""

import math

import jax.numpy as jnp
from jax import Array
from jax.scipy import special

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params
from led_jax.numerics import widened


@constructor
def probit() -> Flow:
    """y_i = Phi(x_i) on vectors `[..., D]`, the standard normal distribution function.

    Takes R^D to (0, 1)^D, and a standard normal to a uniform density. Values that would round to 0
    or 1 become the numbers next to them, which the dtype tells from 0 and 1; the log-determinant is
    that of x. It has no parameters.

    >>> y, log_det = probit().apply((), jnp.zeros((4, 3)))
    >>> y.shape, log_det.shape
    ((4, 3), (4,))
    """

    def inside(y: Array) -> Array:
        limits = jnp.finfo(y.dtype)
        return jnp.clip(y, limits.tiny, 1 - limits.epsneg)

    def log_slope(x: Array) -> Array:
        return (-0.5 * x * x - 0.5 * math.log(2 * math.pi)).sum(-1)

    def apply(params: Params, x: Array, context: Array | None = None):
        y = inside(special.ndtr(widened(x)).astype(x.dtype))
        return y, log_slope(widened(x)).astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        x = special.ndtri(widened(inside(y)))
        return x.astype(y.dtype), -log_slope(x).astype(y.dtype)

    return Flow(lambda key, x, context=None: (), apply, inverse)
