"""Numerical building blocks that flows, densities and networks share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import register


def softplus(x: Array) -> Array:
    """log(1 + e^x), elementwise and without overflow.

    The same value as `jax.nn.softplus`, which goes through the costlier `logaddexp`.
    """
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + e^-x)), elementwise and without overflow."""
    return -softplus(-x)


@jax.custom_jvp
def relu(x: Array) -> Array:
    """max(x, 0), elementwise, with a gradient that reads the output rather than the input.

    A network's products need the output for their gradients anyway, so the input need not be kept.
    """
    if not x.ndim:
        return jnp.maximum(x, 0)
    # In one piece XLA would keep the input all the same, and compute the output from it again.
    return jnp.concatenate([jnp.maximum(half, 0) for half in jnp.array_split(x, 2, -1)], -1)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


register("led_jax.numerics.relu", relu)


def is_key(x: Any) -> bool:
    """Whether x is an array of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
