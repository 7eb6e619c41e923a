"""Learned linear maps: a product of triangular matrices, and an orthogonal matrix."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params, flatten
from led_jax.flows.conditioners import init_linear, linear_in_context
from led_jax.numerics import widened


@constructor
def lu(event_shape: tuple[int, ...], context_dim: int | None = None) -> Flow:
    """y = L U x, for L lower triangular with ones on its diagonal and U upper triangular.

    The factors of Kingma and Dhariwal (2018), eq. 10 and 11, https://arxiv.org/abs/1807.03039,
    without their permutation (`permute`), and with positive entries on U's diagonal. As the flow of
    a posterior it gives the encoder's diagonal Gaussian a full covariance. The log-determinant is
    the sum of the logarithms of U's diagonal; the inverse is two triangular solves.

    >>> flow = lu((3,))
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      context_dim: width of a context; the matrix below is then bias + context @ kernel. None makes
        it a parameter. A fresh flow is the identity either way.

    Returns:
      A flow whose parameters are `{"bias": [D * D]}`, a matrix in row-major order: L below its
      diagonal, U above it, and the logarithms of U's diagonal on it. With a context there is also
      `"context": {"kernel": [context_dim, D * D]}`.

    Raises:
      ValueError: (from the flow's functions) if the input, the context or the parameters have the
        wrong shapes.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return init_linear(jnp.zeros(x.shape[-1] ** 2, x.dtype), context_dim, x, context)

    def read(params: Params, x: Array, context: Array | None) -> tuple[Array, Array, Array]:
        """L and U `[..., D, D]`, and the logarithms of U's diagonal `[..., D]`."""
        size = x.shape[-1]
        raw = linear_in_context("lu", params, size * size, context_dim, x, context)
        matrix = raw.reshape(*raw.shape[:-1], size, size)
        log_diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        lower = with_diagonal(jnp.tril(matrix, -1), jnp.ones_like(log_diagonal))
        return lower, with_diagonal(jnp.triu(matrix, 1), jnp.exp(log_diagonal)), log_diagonal

    def log_det(log_diagonal: Array, x: Array) -> Array:
        return jnp.broadcast_to(log_diagonal.sum(-1), x.shape[:-1]).astype(x.dtype)

    def apply(params: Params, x: Array, context: Array | None = None):
        lower, upper, log_diagonal = read(params, x, context)
        y = times(lower, times(upper, widened(x)))
        return y.astype(x.dtype), log_det(log_diagonal, x)

    def inverse(params: Params, y: Array, context: Array | None = None):
        lower, upper, log_diagonal = read(params, y, context)
        x = _solve(upper, _solve(lower, widened(y), lower=True), lower=False)
        return x.astype(y.dtype), log_det(-log_diagonal, y)

    return flatten(Flow(init, apply, inverse), event_shape)


@constructor
def householder(
    event_shape: tuple[int, ...], num_reflections: int = 8, context_dim: int | None = None
) -> Flow:
    """y = Q x, for Q a product of reflections I - 2 v v' / |v|^2; it preserves volume.

    Tomczak and Welling (2016), eq. 8 and 9, https://arxiv.org/abs/1611.09630. Products of D
    reflections reach all orthogonal matrices with determinant (-1)^D.

    >>> flow = householder((3,), 2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.inverse(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      num_reflections: number of reflections.
      context_dim: width of a context; the vectors v are then bias + context @ kernel. None makes
        them parameters.

    Raises:
      ValueError: if num_reflections is not positive; else as in `lu`.
    """
    if num_reflections < 1:
        raise ValueError(f"householder: num_reflections must be positive, got {num_reflections}")

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        start = jax.random.normal(key, (num_reflections * x.shape[-1],), x.dtype)
        return init_linear(start, context_dim, x, context)

    def along(reverse: bool):
        def transform(params: Params, x: Array, context: Array | None = None):
            count = num_reflections * x.shape[-1]
            raw = linear_in_context("householder", params, count, context_dim, x, context)
            vectors = unit_vectors(raw.reshape(*raw.shape[:-1], num_reflections, x.shape[-1]))
            y = reflect(vectors, widened(x), reverse)
            return y.astype(x.dtype), jnp.zeros(x.shape[:-1], x.dtype)

        return transform

    return flatten(Flow(init, along(reverse=True), along(reverse=False)), event_shape)


def unit_vectors(vectors: Array) -> Array:
    """Scales vectors `[..., D]` to length one; vectors of zeros are not changed."""
    squares = (vectors * vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(vectors.dtype).tiny))


def reflect(vectors: Array, x: Array, reverse: bool = False) -> Array:
    """Reflects x by H unit vectors `[..., H, D]` in turn; `reverse` starts with the last one."""
    for i in range(vectors.shape[-2])[:: -1 if reverse else 1]:
        v = vectors[..., i, :]
        x = x - 2 * (v * x).sum(-1, keepdims=True) * v
    return x


def times(matrix: Array, x: Array) -> Array:
    """Matrices `[..., D, D]` times vectors `[..., D]`, whose batch axes broadcast."""
    return jnp.einsum("...ij,...j->...i", matrix, x, precision="highest")


def with_diagonal(matrix: Array, diagonal: Array) -> Array:
    """Matrices `[..., D, D]` with their diagonals replaced by `[..., D]`."""
    i = jnp.arange(matrix.shape[-1])
    return matrix.at[..., i, i].set(diagonal)


def _solve(matrix: Array, x: Array, *, lower: bool) -> Array:
    """Solves matrix v = x for v, with one triangular matrix, or one for each x."""
    size = x.shape[-1]
    if matrix.size == size * size:  # One matrix: all vectors are columns of one solve.
        columns = x.reshape(math.prod(x.shape[:-1]), size).T
        one = matrix.reshape(size, size)
        solved = jax.lax.linalg.triangular_solve(one, columns, left_side=True, lower=lower)
        return solved.T.reshape(x.shape)
    each = jnp.broadcast_to(matrix, (*x.shape[:-1], size, size))
    solved = jax.lax.linalg.triangular_solve(each, x[..., None], left_side=True, lower=lower)
    return solved.squeeze(-1)
