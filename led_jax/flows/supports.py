"""Flows from R^D to other supports, and a flow on some of the entries.

A value that would round to the border of its support becomes the floating-point number next to it,
so that densities on the open support can score it. Log-determinants remain those of the exact map.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy import special

from led_jax import numerics
from led_jax.descriptions import constructor
from led_jax.flows.base import Flow, Params, TransformFn
from led_jax.numerics import log_sigmoid, match_rank, widened


@constructor
def probit() -> Flow:
    """y_i = Phi(x_i) on vectors `[..., D]`, the standard normal distribution function.

    Maps R^D to (0, 1)^D, and a standard normal to a uniform density. It has no parameters.

    >>> y, log_det = probit().apply((), jnp.zeros((4, 3)))
    >>> y.shape, log_det.shape
    ((4, 3), (4,))
    """

    def log_slope(x: Array) -> Array:
        return -0.5 * x * x - 0.5 * math.log(2 * math.pi)

    def to_line(y: Array) -> tuple[Array, Array]:
        x = special.ndtri(y)
        return x, log_slope(x)

    return _elementwise(lambda x: (special.ndtr(x), log_slope(x)), to_line, 0.0, 1.0)


@constructor
def sigmoid(low: float = 0.0, high: float = 1.0) -> Flow:
    """y_i = low + (high - low) / (1 + e^-x_i) on vectors `[..., D]`: R^D to (low, high)^D.

    A logistic density becomes a uniform one. It has no parameters.

    >>> y, _ = sigmoid(-1.0, 3.0).apply((), jnp.array([-50.0, 0.0]))
    >>> bool(y[0] > -1), float(y[1])
    (True, 1.0)

    Raises:
      ValueError: if low and high are not finite, or low is not below high.
    """
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"sigmoid: expected finite low < high, got {low} and {high}")
    log_width = math.log(high - low)

    def from_line(x: Array) -> tuple[Array, Array]:
        # Measured from the nearer border: if that is 0, y keeps full relative precision near it.
        rise, fall = ((high - low) * special.expit(u) for u in (x, -x))
        y = jnp.where(x < 0, low + rise, high - fall)
        return y, log_width + log_sigmoid(x) + log_sigmoid(-x)

    def to_line(y: Array) -> tuple[Array, Array]:
        above, below = jnp.log(y - low), jnp.log(high - y)
        return above - below, above + below - log_width

    return _elementwise(from_line, to_line, low, high)


@constructor
def softplus(low: float = 0.0) -> Flow:
    """y_i = low + log(1 + e^x_i) on vectors `[..., D]`: R^D to (low, inf)^D.

    For large x it is nearly x + low, so that the upper tail does not change. It has no parameters.

    >>> y, _ = softplus().apply((), jnp.array([0.0, 100.0]))
    >>> round(float(y[0]), 4), float(y[1])
    (0.6931, 100.0)

    Raises:
      ValueError: if low is not finite.
    """
    if not math.isfinite(low):
        raise ValueError(f"softplus: expected a finite low, got {low}")

    def to_line(y: Array) -> tuple[Array, Array]:
        log_slope = jnp.log(-jnp.expm1(low - y))
        return y - low + log_slope, log_slope

    return _elementwise(
        lambda x: (low + numerics.softplus(x), log_sigmoid(x)), to_line, low, math.inf
    )


@constructor
def exp() -> Flow:
    """y_i = e^x_i on vectors `[..., D]`: R^D to (0, inf)^D.

    A normal density becomes a log-normal one. It has no parameters.

    >>> y, log_det = exp().apply((), jnp.array([0.0, 2.0]))
    >>> float(y[0]), float(log_det)
    (1.0, 2.0)
    """

    def to_line(y: Array) -> tuple[Array, Array]:
        x = jnp.log(y)
        return x, x

    return _elementwise(lambda x: (jnp.exp(x), x), to_line, 0.0, math.inf)


@constructor
def simplex() -> Flow:
    """Stick-breaking: vectors `[..., D - 1]` to `[..., D]` of positive entries that sum to one.

    y_i = s_i (1 - y_1 - ... - y_{i-1}), with s_i = sigmoid(x_i - log(D - i)), and y_D is the
    remainder; x = 0 gives equal entries. As in the Stan Reference Manual, "Unit simplex". The
    log-determinant is that of the map to the first D - 1 entries, log y_1 + ... + log y_D. It has
    no parameters, and is the only flow whose base and target differ in size: `init` of a flow or
    density that contains it takes an x of the base's size D - 1.

    >>> y, log_det = simplex().apply((), jnp.zeros((5, 3)))
    >>> y[0].tolist(), log_det.shape
    ([0.25, 0.25, 0.25, 0.25], (5,))

    Raises:
      ValueError: (from `inverse`) if y has fewer than two entries.
    """

    def log_counts(size: int, ndim: int) -> Array:
        """log(D - i) for i = 1, ..., D - 1, where D - 1 is `size`."""
        return match_rank(np.log(np.arange(size, 0, -1)), ndim)

    def apply(params: Params, x: Array, context: Array | None = None):
        wide = widened(x)
        u = wide - log_counts(x.shape[-1], x.ndim).astype(wide.dtype)
        zero = jnp.zeros_like(u, shape=(*u.shape[:-1], 1))
        left = jnp.concatenate([zero, jnp.cumsum(log_sigmoid(-u), -1)], -1)
        log_y = left + jnp.concatenate([log_sigmoid(u), zero], -1)
        y = _inside(jnp.exp(log_y).astype(x.dtype), 0.0, 1.0)
        return y, log_y.sum(-1).astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        if not y.ndim or y.shape[-1] < 2:
            raise ValueError(f"simplex: expected vectors of two entries or more, got {y.shape}")
        wide = widened(_inside(y, 0.0, 1.0))
        # The remainder after entry i, as the sum of the later entries: 1 minus the earlier ones
        # would cancel.
        left = jnp.flip(jnp.cumsum(jnp.flip(wide, -1), -1), -1)[..., 1:]
        log_y = jnp.log(wide)
        counts = log_counts(y.shape[-1] - 1, y.ndim).astype(wide.dtype)
        x = log_y[..., :-1] - jnp.log(left) + counts
        # Densities are zero outside the simplex; the sum may be off by rounding.
        tolerance = max(1e-3, 8 * y.shape[-1] * float(jnp.finfo(y.dtype).eps))
        is_outside = (y < 0).any(-1) | (jnp.abs(widened(y).sum(-1) - 1) > tolerance)
        log_det = jnp.where(is_outside, -jnp.inf, -log_y.sum(-1))
        return x.astype(y.dtype), log_det.astype(y.dtype)

    return Flow(lambda key, x, context=None: (), apply, inverse)


@constructor
def on(columns: Sequence[int], flow: Flow) -> Flow:
    """A flow on some entries of vectors `[..., D]`; the others pass unchanged.

    >>> from led_jax.flows import chain
    >>> support = chain(on((0,), exp()), on((1, 2), sigmoid(0.0, 10.0)))
    >>> support.apply(((), ()), jnp.zeros(4))[0].tolist()
    [1.0, 5.0, 5.0, 0.0]

    Args:
      columns: indices of the entries, from 0, in the order in which the flow takes them.
      flow: a flow on vectors `[..., len(columns)]`.

    Returns:
      A flow on vectors, with the parameters of `flow`.

    Raises:
      ValueError: if columns are empty, repeated or negative; from the flow's functions, if the
        input has too few entries or `flow` changes their number.
    """
    picked = np.asarray(columns)
    is_list = picked.ndim == 1 and picked.size and picked.dtype.kind in "iu"
    if not is_list or picked.min() < 0 or len(set(picked.tolist())) < len(picked):
        raise ValueError(f"on: columns must be different integers from 0, got {picked.tolist()}")

    def select(x: Array) -> Array:
        if not x.ndim or x.shape[-1] <= picked.max():
            raise ValueError(
                f"on: expected x of shape [..., D] with an entry {picked.max()}, got {x.shape}"
            )
        return x[..., picked]

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        return flow.init(key, select(x), context)

    def along(direction: TransformFn) -> TransformFn:
        def transform(params: Params, x: Array, context: Array | None = None):
            part = select(x)
            new, log_det = direction(params, part, context)
            if new.shape != part.shape:
                raise ValueError(
                    f"on: the flow made {new.shape} of {part.shape}; it must keep the shape"
                )
            index = len(picked) + np.arange(x.shape[-1])
            index[picked] = np.arange(len(picked))
            return jnp.concatenate([new, x], -1)[..., index], log_det

        return transform

    return Flow(init, along(flow.apply), along(flow.inverse))


Elementwise = Callable[[Array], tuple[Array, Array]]


def _elementwise(from_line: Elementwise, to_line: Elementwise, low: float, high: float) -> Flow:
    """A flow from R^D to (low, high)^D, from its two directions on one entry.

    `from_line` maps x to (y, log dy/dx), and `to_line` maps y to (x, log dy/dx): the sign of the
    log-derivative is the same in both.
    """

    def apply(params: Params, x: Array, context: Array | None = None):
        y, log_slope = from_line(widened(x))
        return _inside(y.astype(x.dtype), low, high), log_slope.sum(-1).astype(x.dtype)

    def inverse(params: Params, y: Array, context: Array | None = None):
        x, log_slope = to_line(widened(_inside(y, low, high)))
        # Densities are zero outside; a y on the border may be there by rounding.
        is_outside = ((y < low) | (y > high)).any(-1)
        log_det = jnp.where(is_outside, -jnp.inf, -log_slope.sum(-1))
        return x.astype(y.dtype), log_det.astype(y.dtype)

    return Flow(lambda key, x, context=None: (), apply, inverse)


def _inside(y: Array, low: float, high: float) -> Array:
    """Clips y to the numbers next to the borders; next to a border 0, the least normal number."""
    tiny = jnp.finfo(y.dtype).tiny
    first = np.nextafter(y.dtype.type(low), y.dtype.type(high))
    last = np.nextafter(y.dtype.type(high), y.dtype.type(low))
    first = tiny if low == 0 else first
    last = -tiny if high == 0 else last
    return jnp.clip(y, first, last)
