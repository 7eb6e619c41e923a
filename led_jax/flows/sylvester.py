"""Sylvester flows: planar flows with many hidden units, y = x + Q R tanh(S Q' x + b)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params, chain, flatten, repeat
from led_jax.flows.conditioners import init_linear, linear_in_context
from led_jax.flows.linear import reflect, times, unit_vectors, with_diagonal
from led_jax.flows.permutations import reverse
from led_jax.flows.planar import inverse_residual_tanh, residual_tanh
from led_jax.numerics import widened


@constructor
def triangular_sylvester(
    event_shape: tuple[int, ...], depth: int, context_dim: int | None = None
) -> Flow:
    """A stack of triangular Sylvester layers, y = x + R tanh(S x + b).

    Van den Berg, Hasenclever, Tomczak and Welling (2018), eq. 13 and section 3.2.3,
    https://arxiv.org/abs/1803.05649. R and S are upper triangular, with diagonals in (-1, 1), which
    makes the map invertible; the determinant is the product of 1 + tanh'(.) R_ii S_ii. The order of
    the entries is reversed after each layer, which stands for the paper's alternating permutations.
    The inverse is a back substitution: it solves D monotone scalar equations a layer, one after the
    other, each to rounding error.

    >>> flow = triangular_sylvester((3,), 2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      depth: number of layers; 0 gives the identity.
      context_dim: width of a context; the numbers that R, S and b are made from are then bias +
        context @ kernel. None makes them parameters. A fresh layer only reverses the entries,
        either way.

    Raises:
      ValueError: if depth is negative; from the flow's functions, if the input, the context or the
        parameters have the wrong shapes.
    """
    layer = chain(_layer("triangular_sylvester", _reflections(0), context_dim), reverse())
    return flatten(repeat(layer, depth), event_shape)


@constructor
def householder_sylvester(
    event_shape: tuple[int, ...],
    depth: int,
    num_reflections: int = 8,
    context_dim: int | None = None,
) -> Flow:
    """A stack of Householder Sylvester layers, y = x + Q R tanh(S Q' x + b).

    Van den Berg, Hasenclever, Tomczak and Welling (2018), eq. 13 and section 3.2.2,
    https://arxiv.org/abs/1803.05649. R and S are as in `triangular_sylvester`; the orthogonal
    matrix Q is a product of Householder reflections.

    >>> flow = householder_sylvester((3,), 2, num_reflections=2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      depth: number of layers; 0 gives the identity.
      num_reflections: number of reflections a layer.
      context_dim: width of a context; the numbers that R, S, b and the reflections are made from
        are then bias + context @ kernel. None makes them parameters. A fresh flow is the identity
        either way.

    Raises:
      ValueError: if depth is negative or num_reflections is not positive; else as in
        `triangular_sylvester`.
    """
    if num_reflections < 1:
        raise ValueError(
            f"householder_sylvester: num_reflections must be positive, got {num_reflections}; "
            "triangular_sylvester has none"
        )
    layer = _layer("householder_sylvester", _reflections(num_reflections), context_dim)
    return flatten(repeat(layer, depth), event_shape)


@constructor
def orthogonal_sylvester(
    event_shape: tuple[int, ...],
    depth: int,
    num_columns: int = 8,
    context_dim: int | None = None,
) -> Flow:
    """A stack of orthogonal Sylvester layers, y = x + Q R tanh(S Q' x + b).

    Van den Berg, Hasenclever, Tomczak and Welling (2018), eq. 13 and section 3.2.1,
    https://arxiv.org/abs/1803.05649. Q has M orthonormal columns, and R and S are M x M and else as
    in `triangular_sylvester`: a layer moves x within the span of the columns. These are computed
    from free vectors by the iteration Q <- Q (3 I - Q' Q) / 2, which is exact to rounding unless a
    vector is within about 1e-6 of the span of the others. The inverse solves M monotone scalar
    equations a layer.

    >>> flow = orthogonal_sylvester((3,), 2, num_columns=2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      depth: number of layers; 0 gives the identity.
      num_columns: M, from 1 to D.
      context_dim: width of a context; the numbers that R, S, b and the columns are made from are
        then bias + context @ kernel. None makes them parameters. A fresh flow is the identity
        either way.

    Raises:
      ValueError: if depth is negative or num_columns is not from 1 to D; else as in
        `triangular_sylvester`.
    """
    size = math.prod(event_shape)
    if not 1 <= num_columns <= size:
        raise ValueError(
            f"orthogonal_sylvester: num_columns must be from 1 to {size}, the number of entries of "
            f"an event of shape {tuple(event_shape)}; got {num_columns}"
        )
    layer = _layer("orthogonal_sylvester", _columns(num_columns), context_dim)
    return flatten(repeat(layer, depth), event_shape)


class _Frame(NamedTuple):
    """A parameterisation of D x M matrices Q with orthonormal columns by free vectors.

    Attributes:
      num_columns: `D -> M`.
      num_vectors: number of vectors of D entries that Q is computed from.
      read: `[..., num_vectors, D] -> (x -> Q' x, v -> Q v)`, from the vectors to two functions.
    """

    num_columns: Callable[[int], int]
    num_vectors: int
    read: Callable[[Array], tuple[Callable[[Array], Array], Callable[[Array], Array]]]


def _reflections(number: int) -> _Frame:
    """A product of Householder reflections; the identity if `number` is 0."""

    def read(raw: Array):
        vectors = unit_vectors(raw)
        return lambda x: reflect(vectors, x), lambda v: reflect(vectors, v, reverse=True)

    return _Frame(lambda size: size, number, read)


_ORTHONORMAL_STEPS = 40  # A small singular value grows 1.5-fold a step: 1.5^40 is 1e7.


def _columns(number: int) -> _Frame:
    """The orthonormal columns that are nearest to free vectors, by an iteration."""

    def read(raw: Array):
        squares = (raw * raw).sum((-2, -1), keepdims=True)
        # Scaled so that singular values are at most 1: from above sqrt(3) the iteration diverges.
        rows = raw * jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(raw.dtype).tiny))

        def step(rows: Array, _: None) -> tuple[Array, None]:
            products = jnp.einsum("...id,...jd->...ij", rows, rows, precision="highest")
            third = jnp.einsum("...ij,...jd->...id", products, rows, precision="highest")
            return 1.5 * rows - 0.5 * third, None

        rows, _ = jax.lax.scan(step, rows, None, _ORTHONORMAL_STEPS)
        return lambda x: times(rows, x), lambda v: times(jnp.swapaxes(rows, -1, -2), v)

    return _Frame(lambda size: number, number, read)


def _layer(name: str, frame: _Frame, context_dim: int | None) -> Flow:
    """One layer. Its parameters are a vector: an M x M matrix, S's diagonal, b, Q's free vectors.

    R is the upper triangle of the matrix, and S above its diagonal is the transpose of the lower
    triangle, as in the authors' code. The diagonals go through tanh.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        m = frame.num_columns(x.shape[-1])
        matrix_key, diagonal_key, vector_key = jax.random.split(key, 3)
        matrix = jax.random.normal(matrix_key, (m, m), x.dtype) / math.sqrt(m)
        start = [
            jnp.tril(matrix, -1).ravel(),  # R is zero.
            0.1 * jax.random.normal(diagonal_key, (m,), x.dtype),
            jnp.zeros(m, x.dtype),
            jax.random.normal(vector_key, (frame.num_vectors * x.shape[-1],), x.dtype),
        ]
        return init_linear(jnp.concatenate(start), context_dim, x, context)

    def read(params: Params, x: Array, context: Array | None):
        """R and S `[..., M, M]`, b `[..., M]`, and the functions of `_Frame.read`."""
        n = x.shape[-1]
        m = frame.num_columns(n)
        count = m * (m + 2) + frame.num_vectors * n
        raw = linear_in_context(name, params, count, context_dim, x, context)
        batch_shape = raw.shape[:-1]
        matrix = raw[..., : m * m].reshape(*batch_shape, m, m)
        diagonal, b = raw[..., m * m : m * (m + 1)], raw[..., m * (m + 1) : m * (m + 2)]
        vectors = raw[..., m * (m + 2) :].reshape(*batch_shape, frame.num_vectors, n)
        own = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        lower = jnp.swapaxes(matrix, -1, -2)
        r = with_diagonal(jnp.triu(matrix, 1), jnp.tanh(own))
        s = with_diagonal(jnp.triu(lower, 1), jnp.tanh(diagonal))
        return r, s, b, frame.read(vectors)

    def apply(params: Params, x: Array, context: Array | None = None):
        r, s, b, (into, out) = read(params, x, context)
        inner = times(s, into(widened(x))) + b
        move = times(r, jnp.tanh(inner))
        log_slope = residual_tanh(_slope(r, s), inner)[1]
        y = widened(x) + out(move)
        return y.astype(x.dtype), log_slope.sum(-1).astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        r, s, b, (into, out) = read(params, y, context)
        rotated = into(widened(y))
        slope = jnp.broadcast_to(_slope(r, s), rotated.shape)
        b = jnp.broadcast_to(b, rotated.shape)
        entries = [jnp.moveaxis(a, -1, 0) for a in (rotated, slope, b)]
        rows = [jnp.moveaxis(a, -2, 0) for a in (r, s)]

        def solve(carry, entry):
            """Solves for entry i, given the entries after it: the scan starts with the last one."""
            x, h, is_i = carry
            y, slope, b, r_row, s_row = entry
            own = match(is_i, x)
            rest = y - (r_row * h).sum(-1)
            shift = (s_row * x).sum(-1) + b
            # Entry v solves v + r tanh(s v + shift) = rest. Multiplied by s, this is an equation
            # for s v + shift.
            scale, reach = ((row * own).sum(-1) for row in (s_row, r_row))
            inner, log_det = inverse_residual_tanh(slope, scale * rest + shift)
            t = jnp.tanh(inner)
            value = (rest - reach * t)[..., None]
            return (x + own * value, h + own * t[..., None], jnp.roll(is_i, -1)), log_det

        def match(is_i: Array, x: Array) -> Array:
            return is_i.reshape(*(1,) * (x.ndim - 1), -1)

        is_last = jnp.zeros(rotated.shape[-1], rotated.dtype).at[-1].set(1)
        start = jnp.zeros_like(rotated), jnp.zeros_like(rotated), is_last
        (_, h, _), log_dets = jax.lax.scan(solve, start, (*entries, *rows), reverse=True)
        x = widened(y) - out(times(r, h))
        return x.astype(y.dtype), log_dets.sum(0).astype(y.dtype)

    return Flow(init, apply, inverse)


def _slope(r: Array, s: Array) -> Array:
    """1 + R_ii S_ii, `[..., M]`."""
    return 1 + jnp.diagonal(r, axis1=-2, axis2=-1) * jnp.diagonal(s, axis1=-2, axis2=-1)
