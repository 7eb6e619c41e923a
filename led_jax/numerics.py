"""Numerical building blocks that flows, densities and networks share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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


def match_rank(x: Array | np.ndarray, ndim: int) -> Array:
    """`x` with axes of length 1 in front, so that it has `ndim` axes.

    With it, broadcasting `x` over batch axes is explicit, as `jax_numpy_rank_promotion="raise"`
    asks for.
    """
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def widened(x: Array) -> Array:
    """`x` in float32 where its dtype is narrower, for sums and differences that need the bits."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def device_part(x: Array, axis_name: str, axis: int = 0) -> Array:
    """The device's part of what every device of a mapped axis holds: `x` split evenly along `axis`.

    Raises:
      ValueError: if it does not divide evenly.
    """
    size, rest = divmod(x.shape[axis], jax.lax.axis_size(axis_name))
    if rest:
        raise ValueError(
            f"device_part: {x.shape[axis]} rows do not divide over "
            f"{jax.lax.axis_size(axis_name)} devices"
        )
    start = jax.lax.axis_index(axis_name) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def device_rows(
    draw: Callable[..., Array],
    key: Array,
    shape: tuple[int, ...],
    axis_name: str | None,
    axis: int = 0,
    **kwargs: Any,
) -> Array:
    """Random numbers for the device's rows of a batch: the same on any number of devices.

    Args:
      draw: `jax.random.normal` or another `(key, shape, **kwargs) -> array`.
      key: PRNG key, the same on every device.
      shape: shape of the device's part.
      axis_name: mapped axis over whose devices the batch is split; None for one device alone.
      axis: axis of `shape` that is split.
      **kwargs: passed on to `draw`.
    """
    if axis_name is None:
        return draw(key, shape, **kwargs)
    whole = list(shape)
    whole[axis] *= jax.lax.axis_size(axis_name)
    return device_part(draw(key, tuple(whole), **kwargs), axis_name, axis)


def is_key(x: Any) -> bool:
    """Whether x is an array of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
