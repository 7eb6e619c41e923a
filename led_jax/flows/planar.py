"""Planar and radial flows: they move x along one direction, or towards or away from one point."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params, flatten, repeat
from led_jax.flows.conditioners import init_linear, linear_in_context
from led_jax.flows.transformers import bracketed_root, implicit_inverse
from led_jax.numerics import softplus, widened

SOFTPLUS_INVERSE_OF_ONE = math.log(math.e - 1)


@constructor
def planar(event_shape: tuple[int, ...], depth: int, context_dim: int | None = None) -> Flow:
    """A stack of planar layers, y = x + u' tanh(w.x + b).

    Rezende and Mohamed (2015), eq. 10 to 12, https://arxiv.org/abs/1505.05770. By their appendix
    A.1, u' = u + (softplus(w.u) - 1 - w.u) w / |w|^2, which makes the map invertible. The inverse
    solves one monotone scalar equation a layer, for w.x, to rounding error, and is differentiated
    by the implicit function theorem.

    >>> flow = planar((3,), 2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.apply(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      depth: number of layers; 0 gives the identity.
      context_dim: width of a context; w, u and b are then bias + context @ kernel, as in amortised
        inference. None makes them parameters. A fresh flow is the identity either way.

    Returns:
      A flow whose parameters are `{"bias": [depth, 2 D + 1]}`, with w, u and b one after the other.
      With a context there is also `"context": {"kernel": [depth, context_dim, 2 D + 1]}`.

    Raises:
      ValueError: if depth is negative; from the flow's functions, if the input, the context or the
        parameters have the wrong shapes.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        w = jax.random.normal(key, x.shape[-1:], x.dtype) / math.sqrt(x.shape[-1])
        u = SOFTPLUS_INVERSE_OF_ONE * w / _square(w)
        return init_linear(jnp.concatenate([w, u, 0 * w[:1]]), context_dim, x, context)

    def read(params: Params, x: Array, context: Array | None) -> tuple[Array, Array, Array, Array]:
        """The layer's w and u' `[..., D]`, 1 + w.u' and b `[...]`."""
        size = x.shape[-1]
        raw = linear_in_context("planar", params, 2 * size + 1, context_dim, x, context)
        w, u, b = raw[..., :size], raw[..., size:-1], raw[..., -1]
        product = (w * u).sum(-1)
        slope = softplus(product)
        return w, u + ((slope - 1 - product) / _square(w))[..., None] * w, slope, b

    def apply(params: Params, x: Array, context: Array | None = None):
        w, u, slope, b = read(params, x, context)
        inner = (w * widened(x)).sum(-1) + b
        y = widened(x) + u * jnp.tanh(inner)[..., None]
        return y.astype(x.dtype), residual_tanh(slope, inner)[1].astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        w, u, slope, b = read(params, y, context)
        outer = (w * widened(y)).sum(-1) + b
        inner, log_det = inverse_residual_tanh(jnp.broadcast_to(slope, outer.shape), outer)
        x = widened(y) - u * jnp.tanh(inner)[..., None]
        return x.astype(y.dtype), log_det.astype(y.dtype)

    return flatten(repeat(Flow(init, apply, inverse), depth), event_shape)


@constructor
def radial(event_shape: tuple[int, ...], depth: int, context_dim: int | None = None) -> Flow:
    """A stack of radial layers, y = x + beta' (x - c) / (alpha + |x - c|).

    Rezende and Mohamed (2015), eq. 13 and 14, https://arxiv.org/abs/1505.05770, with
    alpha = softplus(a) and, by their appendix A.2, beta' = softplus(b) - alpha, which makes the map
    invertible. The inverse is in closed form: the distance |x - c| solves a quadratic equation.

    >>> flow = radial((3,), 2)
    >>> params = flow.init(jax.random.key(0), jnp.zeros(3))
    >>> flow.inverse(params, jnp.zeros((4, 3)))[1].shape
    (4,)

    Args:
      event_shape: shape of an event of D entries.
      depth: number of layers; 0 gives the identity.
      context_dim: width of a context; c, a and b are then bias + context @ kernel. None makes them
        parameters. A fresh flow is the identity either way.

    Returns:
      A flow whose parameters are `{"bias": [depth, D + 2]}`, with c, a and b one after the other.
      With a context there is also `"context": {"kernel": [depth, context_dim, D + 2]}`.

    Raises:
      ValueError: as in `planar`.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        center = jax.random.normal(key, x.shape[-1:], x.dtype)
        start = jnp.full(2, SOFTPLUS_INVERSE_OF_ONE, x.dtype)
        return init_linear(jnp.concatenate([center, start]), context_dim, x, context)

    def read(params: Params, x: Array, context: Array | None) -> tuple[Array, Array, Array]:
        """The center c `[..., D]`, alpha and alpha + beta' `[..., 1]`."""
        raw = linear_in_context("radial", params, x.shape[-1] + 2, context_dim, x, context)
        return raw[..., :-2], softplus(raw[..., -2:-1]), softplus(raw[..., -1:])

    def log_det(alpha: Array, total: Array, radius: Array, size: int) -> Array:
        # Logarithms of 1 + beta' / (alpha + r) and of d|y - c| / dr, from positive terms only.
        log_scale = jnp.log(radius + total) - jnp.log(radius + alpha)
        log_slope = jnp.log(radius * (radius + 2 * alpha) + alpha * total)
        return ((size - 1) * log_scale + log_slope - 2 * jnp.log(radius + alpha)).squeeze(-1)

    def apply(params: Params, x: Array, context: Array | None = None):
        center, alpha, total = read(params, x, context)
        radius = _norm(widened(x) - center)
        y = center + (widened(x) - center) * ((radius + total) / (radius + alpha))
        return y.astype(x.dtype), log_det(alpha, total, radius, x.shape[-1]).astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        center, alpha, total = read(params, y, context)
        outer = _norm(widened(y) - center)
        # The root of r^2 + b r = alpha |y - c|, in the form without cancellation for b's sign.
        b = total - outer
        root = jnp.sqrt(b * b + 4 * alpha * outer)
        is_far = b < 0
        near = 2 * alpha * outer / jnp.where(is_far, 1, b + root)
        radius = jnp.where(is_far, (root - b) / 2, near)
        x = center + (widened(y) - center) * ((radius + alpha) / (radius + total))
        return x.astype(y.dtype), -log_det(alpha, total, radius, y.shape[-1]).astype(y.dtype)

    return flatten(repeat(Flow(init, apply, inverse), depth), event_shape)


def residual_tanh(slope: Array, x: Array) -> tuple[Array, Array]:
    """y = x + (slope - 1) tanh(x) and log dy/dx, elementwise; increasing for slope > 0."""
    t = jnp.tanh(x)
    return x + (slope - 1) * t, jnp.log(t * t + (1 - t * t) * slope)


def _solve(slope: Array, y: Array) -> tuple[Array, Array]:
    def fn(x: Array) -> tuple[Array, Array]:
        return residual_tanh(slope, x)

    reach = jnp.abs(slope - 1)
    x = bracketed_root(fn, y, y - reach, y + reach)
    return x, -fn(x)[1]


inverse_residual_tanh: Callable[[Array, Array], tuple[Array, Array]] = implicit_inverse(
    residual_tanh, _solve
)
"""`(slope, y) -> (x, log dx/dy)`, the inverse of `residual_tanh` for arrays of one shape."""


def _square(w: Array) -> Array:
    return jnp.maximum((w * w).sum(-1), jnp.finfo(w.dtype).tiny)


def _norm(x: Array) -> Array:
    """The length of x `[..., D]`, `[..., 1]`, with a gradient of zero at zero."""
    square = (x * x).sum(-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
