"""Numerical building blocks that flows, densities and networks share."""

import jax.numpy as jnp
from jax import Array


def softplus(x: Array) -> Array:
    """log(1 + e^x), elementwise and without overflow.

    The same value as `jax.nn.softplus`, which goes through the costlier `logaddexp`.
    """
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + e^-x)), elementwise and without overflow."""
    return -softplus(-x)
