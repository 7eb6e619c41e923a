"""Numerical building blocks that flows, densities and networks share."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def as_float(name: str, x: ArrayLike | Sequence[Any]) -> Array:
    """Converts an argument to a JAX array of floats.

    Floats keep their dtype (float64 only if JAX has it enabled). Integers and bools become the
    default float.

    Args:
      name: name of the argument in the error message.
      x: numbers, as a JAX or NumPy array, a scalar or nested sequences.

    Raises:
      ValueError: if x is complex, or does not hold numbers.
    """
    if isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return x
    x = as_real(name, x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x)
    # NumPy arrays are cast by NumPy: JAX would first wrap integers wider than its own.
    return jnp.asarray(x.astype(jnp.result_type(float)))


def as_real(name: str, x: ArrayLike | Sequence[Any]) -> Array | np.ndarray:
    """Converts an argument to an array of real numbers; JAX and NumPy arrays are not changed.

    Raises:
      ValueError: if x is complex, or does not hold numbers.
    """
    if not isinstance(x, Array | np.ndarray):
        try:
            x = jnp.asarray(x)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: expected real numbers ({error})") from error
    if not (x.dtype == bool or any(jnp.issubdtype(x.dtype, kind) for kind in _REAL)):
        raise ValueError(f"{name}: expected real numbers, got {x.dtype}")
    return x


_REAL = (jnp.floating, jnp.integer)


def softplus(x: Array) -> Array:
    """log(1 + e^x), elementwise and without overflow.

    The same value as `jax.nn.softplus`, which uses `logaddexp` and is slower.
    """
    magnitude = jnp.abs(x)
    # Not max(x, 0): at 0, JAX's derivatives of it and of |x| would add up to 0, and not to 1/2.
    return 0.5 * x + 0.5 * magnitude + jnp.log1p(jnp.exp(-magnitude))


def log_sigmoid(x: Array) -> Array:
    """log(1 / (1 + e^-x)), elementwise and without overflow."""
    return -softplus(-x)


@jax.custom_jvp
def relu(x: Array) -> Array:
    """max(x, 0), elementwise, with a gradient that is computed from the output.

    The next layer's product keeps this output for its own gradient, so that the input need not be
    kept as well.
    """
    if not x.ndim:
        return jnp.maximum(x, 0)
    # In two pieces, because XLA would otherwise keep the input and recompute the output from it.
    return jnp.concatenate([jnp.maximum(half, 0) for half in jnp.array_split(x, 2, -1)], -1)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = relu(*primals)
    return y, jnp.where(y > 0, tangents[0], 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def reverse_gradient(x: Array, scale: float) -> Array:
    """The identity, whose backward pass multiplies the gradient by -scale, for adversaries."""
    return x


reverse_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, g: (-scale * g,))


def match_rank(x: Array | np.ndarray, ndim: int) -> Array:
    """`x` with axes of length 1 in front, so that it has `ndim` axes.

    This makes broadcasting over batch axes explicit, as `jax_numpy_rank_promotion="raise"` demands.
    """
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def log_mean_exp(x: Array, axis: int) -> Array:
    """log 1/K sum_k e^(x_k) over an axis of length K."""
    return jax.nn.logsumexp(x, axis=axis) - math.log(x.shape[axis])


def widened(x: Array) -> Array:
    """`x` in float32 if its dtype is narrower, for sums and differences that need more bits."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def dtype_of(params: Any, default: Any) -> Any:
    """The common dtype of a tree of floats, or `default` for a tree without leaves."""
    leaves = jax.tree.leaves(params)
    return jnp.result_type(*leaves) if leaves else default


def is_key(x: Any) -> bool:
    """Whether x is an array of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
