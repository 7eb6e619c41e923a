"""Transformers: elementwise monotone maps, which coupling and autoregressive layers apply.

A transformer's parameters are unconstrained reals, as a network emits them. If all are zero, it is
the identity or close to it, and so is a fresh layer, because its conditioner's output is zero.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.checks import check_raw
from led_jax.descriptions import constructor, describe, register
from led_jax.numerics import as_float, log_sigmoid, match_rank, softplus, widened

# Least logit of `gate`: its slope is at least about e^-20, so that its inverse stays finite.
_MIN_LOGIT = -20.0

# Least width and height of a spline's bin, relative to the interval, and least slope at a knot.
_MIN_BIN = 1e-3
_MIN_SLOPE = 1e-3
# softplus(_SLOPE_BIAS) + _MIN_SLOPE is 1, the slope of the identity.
_SLOPE_BIAS = math.log(math.expm1(1 - _MIN_SLOPE))


class _Transformer(NamedTuple):
    num_params: int
    apply: Callable[[Array, Array], tuple[Array, Array]]
    inverse: Callable[[Array, Array], tuple[Array, Array]]
    cheap: Literal["apply", "inverse", "both"]

    __repr__ = describe


class Transformer(_Transformer):
    """An elementwise monotone map and its inverse.

    Its functions convert integers, NumPy arrays and lists to floats, and raise a ValueError if
    `raw` has another number of parameters. The class derives from a NamedTuple so that each
    transformer can have its own `__doc__`, which `help` shows.

    Attributes:
      num_params: number P of parameters for each entry.
      apply: `(raw, x) -> (y, log_det)` for raw `[..., P, D]` and x `[..., D]`; log_det is
        elementwise, `[..., D]`.
      inverse: `(raw, y) -> (x, log_det)`, with the log-derivative of the inverse.
      cheap: the direction that has a closed form, "apply" or "inverse", if the other one searches
        for a root; or "both". A density that is mostly scored should have a flow whose `inverse` is
        cheap, one that is mostly sampled a flow whose `apply` is; `flows.invert` exchanges them.
    """

    def __new__(
        cls,
        num_params: int,
        apply: Callable[[Array, Array], tuple[Array, Array]],
        inverse: Callable[[Array, Array], tuple[Array, Array]],
        cheap: Literal["apply", "inverse", "both"],
    ) -> "Transformer":
        """A transformer whose functions check their arguments."""
        apply, inverse = _checked(num_params, apply), _checked(num_params, inverse)
        return super().__new__(cls, num_params, apply, inverse, cheap)


def _checked(
    num_params: int, transform: Callable[[Array, Array], tuple[Array, Array]]
) -> Callable[[Array, Array], tuple[Array, Array]]:
    @functools.wraps(transform)
    def checked(raw: Array, x: Array) -> tuple[Array, Array]:
        raw, x = as_float("raw", raw), as_float("x", x)
        check_raw("transformer", num_params, raw, x)
        return transform(raw, x)

    return checked


def _split(raw: Array) -> tuple[Array, Array]:
    return raw[..., 0, :], raw[..., 1, :]


def _additive_apply(raw: Array, x: Array) -> tuple[Array, Array]:
    y = x + raw[..., 0, :]
    return y, jnp.zeros_like(y)


def _additive_inverse(raw: Array, y: Array) -> tuple[Array, Array]:
    x = y - raw[..., 0, :]
    return x, jnp.zeros_like(x)


additive = register("additive", Transformer(1, _additive_apply, _additive_inverse, cheap="both"))
additive.__doc__ = (
    """y = x + t. NICE: Dinh, Krueger and Bengio (2014), eq. 9, https://arxiv.org/abs/1410.8516."""
)


def _bounded(raw: Array, bound: float) -> Array:
    return bound * jnp.tanh(raw / bound)


@constructor
def scaled(max_log_scale: float) -> Transformer:
    """y = x e^s + t, with s = m tanh(raw / m) for m = `max_log_scale`.

    Whatever its networks emit, a layer scales by e^m at most, and a stack of L layers by e^(L m).
    For inputs far from the data the scales of a deep stack are not learned: a small m bounds them.

    >>> y, log_det = scaled(0.5).apply(jnp.full((2, 1), 9.0), jnp.zeros(1))
    >>> round(float(log_det[0]), 3)
    0.5

    Raises:
      ValueError: if max_log_scale is not a positive number.
    """
    if not 0 < max_log_scale < math.inf:
        raise ValueError(f"scaled: max_log_scale must be a positive number, got {max_log_scale}")

    def split(raw: Array) -> tuple[Array, Array]:
        shift, log_scale = _split(raw)
        return shift, _bounded(log_scale, max_log_scale)

    def apply(raw: Array, x: Array) -> tuple[Array, Array]:
        shift, log_scale = split(raw)
        y = x * jnp.exp(log_scale) + shift
        return y, jnp.broadcast_to(log_scale, y.shape)

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        shift, log_scale = split(raw)
        x = (y - shift) * jnp.exp(-log_scale)
        return x, jnp.broadcast_to(-log_scale, x.shape)

    return Transformer(2, apply, inverse, cheap="both")


affine = register("affine", scaled(3.0))
affine.__doc__ = """`scaled` by at most e^3: y = x e^s + t, with s = 3 tanh(raw / 3).

Real NVP: Dinh, Sohl-Dickstein and Bengio (2016), eq. 7, https://arxiv.org/abs/1605.08803.
"""


@constructor
def gate(bias: float) -> Transformer:
    """y = s x + (1 - s) m, with s = sigmoid(max(raw + bias, -20)).

    The update of inverse autoregressive flow: Kingma et al. (2016), eq. 13 to 15,
    https://arxiv.org/abs/1606.04934. A layer starts as y = sigmoid(bias) x.

    >>> y, log_det = gate(0.0).apply(jnp.zeros((2, 1)), jnp.ones(1))
    >>> float(y[0])
    0.5
    """

    def apply(raw: Array, x: Array) -> tuple[Array, Array]:
        mean, logit = _split(raw)
        logit = jnp.maximum(logit + bias, _MIN_LOGIT)
        y = mean + jax.nn.sigmoid(logit) * (x - mean)
        return y, jnp.broadcast_to(log_sigmoid(logit), y.shape)

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        mean, logit = _split(raw)
        logit = jnp.maximum(logit + bias, _MIN_LOGIT)
        x = mean + (y - mean) * (1 + jnp.exp(-logit))
        return x, jnp.broadcast_to(-log_sigmoid(logit), x.shape)

    return Transformer(2, apply, inverse, cheap="both")


gated = register("gated", gate(1.5))
gated.__doc__ = (
    """`gate` with a bias of 1.5, in the middle of what Kingma et al. (2016) recommend."""
)


class _Bin(NamedTuple):
    """The bin of a spline that an entry is in: lower corner, sides and slopes, each `[..., D]`."""

    x: Array
    y: Array
    width: Array
    height: Array
    slope: Array
    next_slope: Array

    @property
    def chord(self) -> Array:
        return self.height / self.width

    @property
    def bend(self) -> Array:
        return self.slope + self.next_slope - 2 * self.chord

    def log_slope(self, t: Array) -> Array:
        """Log-derivative at x + t width: Durkan et al. (2019), eq. 5."""
        chord, between = self.chord, t * (1 - t)
        ends = self.next_slope * t * t + 2 * chord * between + self.slope * (1 - t) * (1 - t)
        return 2 * jnp.log(chord / (chord + self.bend * between)) + jnp.log(ends)


@constructor
def spline(num_bins: int = 8, bound: float | None = 5.0, *, periodic: bool = False) -> Transformer:
    """A monotone rational-quadratic spline, with the identity outside its interval.

    Durkan et al. (2019), eq. 4 to 8, https://arxiv.org/abs/1906.04032. A bin is no narrower and no
    lower than 1/1000 of the interval, and no slope at a knot is less than 1/1000.

    >>> spline(4).num_params
    11

    Args:
      num_bins: number of bins K.
      bound: the interval is [-bound, bound], and the slope is 1 at its ends, where linear tails
        begin: 3 K - 1 parameters. None gives the box [0, 1] with free slopes at its ends, for
        densities on (0, 1)^D: 3 K + 1 parameters.
      periodic: makes a circular spline, for angles: the interval is one turn, both of its ends have
        the same slope, and f(x + turn) = f(x) + turn. 3 K parameters. Rezende et al. (2020),
        section 2.1, https://arxiv.org/abs/2002.02428.

    Raises:
      ValueError: if num_bins is not from 1 to 999, or the bound is not positive.
    """
    if not 1 <= num_bins < 1 / _MIN_BIN:
        raise ValueError(f"spline: num_bins must be 1 to {1 / _MIN_BIN - 1:.0f}, got {num_bins}")
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"spline: bound must be positive, or None for [0, 1], got {bound}")
    low, high = (0.0, 1.0) if bound is None else (-bound, bound)
    turn = high - low
    num_params = 3 * num_bins + (0 if periodic else 1 if bound is None else -1)

    def lengths(raw: Array) -> Array:
        return turn * (_MIN_BIN + (1 - num_bins * _MIN_BIN) * jax.nn.softmax(raw, -2))

    def find_bin(raw: Array, value: Array, *, is_output: bool) -> _Bin:
        widths = lengths(raw[..., :num_bins, :])
        heights = lengths(raw[..., num_bins : 2 * num_bins, :])
        slopes = raw[..., 2 * num_bins :, :]
        if periodic:
            slopes = jnp.concatenate([slopes, slopes[..., :1, :]], -2)
        elif bound is not None:
            slopes = jnp.pad(slopes, [(0, 0)] * (raw.ndim - 2) + [(1, 1), (0, 0)])
        # Masked sums over the bins, because gathers are slow on a CPU.
        knots = low + jnp.cumsum(heights if is_output else widths, -2)[..., :-1, :]
        passed = value[..., None, :] >= knots
        end = jnp.zeros_like(passed, shape=(*passed.shape[:-2], 1, passed.shape[-1]))
        is_below = jnp.concatenate([passed, end], -2)
        is_here = jnp.concatenate([~end, passed], -2) & ~is_below

        def here(values: Array) -> Array:
            return jnp.where(is_here, values, 0).sum(-2)

        return _Bin(
            x=low + jnp.where(is_below, widths, 0).sum(-2),
            y=low + jnp.where(is_below, heights, 0).sum(-2),
            width=here(widths),
            height=here(heights),
            slope=_MIN_SLOPE + softplus(here(slopes[..., :-1, :]) + _SLOPE_BIAS),
            next_slope=_MIN_SLOPE + softplus(here(slopes[..., 1:, :]) + _SLOPE_BIAS),
        )

    def into_interval(value: Array) -> tuple[Array, Array, Array]:
        """The point at which to evaluate, by how much it was shifted, and whether it is inside."""
        moved, inside = jnp.zeros_like(value), (value > low) & (value < high)
        if periodic:
            moved = turn * jnp.floor((value - low) / turn)
            inside = jnp.ones_like(inside)
        # Clipped, so that the spline is finite outside as well, where its value is not used.
        return jnp.clip(value - moved, low, high), moved, inside

    def apply(raw: Array, x: Array) -> tuple[Array, Array]:
        inner, moved, inside = into_interval(x)
        bin = find_bin(raw, inner, is_output=False)
        t = jnp.clip((inner - bin.x) / bin.width, 0, 1)
        rise = (bin.chord * t * t + bin.slope * t * (1 - t)) / (bin.chord + bin.bend * t * (1 - t))
        y = jnp.where(inside, bin.y + bin.height * rise + moved, x)
        return y, jnp.where(inside, bin.log_slope(t), 0)

    def solve(raw: Array, y: Array) -> tuple[Array, Array]:
        inner, moved, inside = into_interval(y)
        bin = find_bin(raw, inner, is_output=True)
        rise = jnp.clip((inner - bin.y) / bin.height, 0, 1)
        # The root in [0, 1] of a t^2 + b t = c, in the form without cancellation for b's sign.
        a = bin.chord - bin.slope + rise * bin.bend
        b = bin.slope - rise * bin.bend
        c = bin.chord * rise
        q = jnp.abs(b) + jnp.sqrt(jnp.maximum(b * b + 4 * a * c, 0))
        t = jnp.clip(jnp.where(b >= 0, 2 * c / q, q / (2 * a)), 0, 1)
        x = jnp.where(inside, bin.x + bin.width * t + moved, y)
        return x, jnp.where(inside, -bin.log_slope(t), 0)

    inverse = implicit_inverse(apply, solve)
    return Transformer(num_params, _in_float32(apply), _in_float32(inverse), cheap="both")


@constructor
def sigmoid_mixture(num_units: int = 8) -> Transformer:
    """y = logit(sum_j w_j sigmoid(a_j x + b_j)), with w = softmax(raw), a = e^(3 tanh(raw / 3)).

    The deep sigmoidal flow of neural autoregressive flows: Huang et al. (2018), eq. 8,
    https://arxiv.org/abs/1804.00779. The b_j are raw numbers plus offsets spread over (-1, 1),
    because equal units would stay equal; a fresh map differs from the identity by 0.2 at most. The
    inverse is found numerically, to rounding error, and differentiated by the implicit function
    theorem.

    >>> sigmoid_mixture(4).cheap
    'apply'

    Args:
      num_units: number J of sigmoids; there are 3 J parameters.

    Raises:
      ValueError: if num_units is not positive.
    """
    if num_units < 1:
        raise ValueError(f"sigmoid_mixture: num_units must be positive, got {num_units}")

    def split(raw: Array) -> tuple[Array, Array, Array]:
        logits, log_scale, shift = (
            raw[..., i * num_units : (i + 1) * num_units, :] for i in range(3)
        )
        spread = (2 * jnp.arange(num_units, dtype=raw.dtype)[:, None] + 1) / num_units - 1
        shift = shift + match_rank(spread, raw.ndim)
        return jax.nn.log_softmax(logits, -2), _bounded(log_scale, 3.0), shift

    def apply(raw: Array, x: Array) -> tuple[Array, Array]:
        log_weight, log_scale, shift = split(raw)
        u = jnp.exp(log_scale) * x[..., None, :] + shift
        log_on, log_off = log_sigmoid(u), log_sigmoid(-u)
        on, off = log_weight + log_on, log_weight + log_off
        y = jax.nn.logsumexp(on, -2) - jax.nn.logsumexp(off, -2)
        # d log(S)/dx - d log(1 - S)/dx for the weighted sum S, as a sum of positive terms.
        terms = [
            log_scale + jax.nn.log_softmax(on, -2) + log_off,
            log_scale + jax.nn.log_softmax(off, -2) + log_on,
        ]
        return y, jax.nn.logsumexp(jnp.concatenate(terms, -2), -2)

    def solve(raw: Array, y: Array) -> tuple[Array, Array]:
        _, log_scale, shift = split(raw)
        # Each unit alone has the value y at one point; the mixture has it between these points.
        points = (y[..., None, :] - shift) * jnp.exp(-log_scale)
        x = bracketed_root(functools.partial(apply, raw), y, points.min(-2), points.max(-2))
        return x, -apply(raw, x)[1]

    inverse = implicit_inverse(apply, solve)
    return Transformer(3 * num_units, _in_float32(apply), _in_float32(inverse), cheap="apply")


def bracketed_root(
    fn: Callable[[Array], tuple[Array, Array]], y: Array, low: Array, high: Array
) -> Array:
    """Solves fn(x) = y elementwise for an increasing fn, between low and high.

    Newton's method, with bisection wherever a step leaves the bracket, and in every third step.

    Args:
      fn: `x -> (value, log-derivative)`.
      y: the values wanted.
      low: points where fn is at most y.
      high: points where fn is at least y.
    """
    limits = jnp.finfo(y.dtype)

    def goes_on(state):
        i, _, _, _, done = state
        return (i < 3 * (limits.nmant + 10)) & ~done.all()

    def step(state):
        i, x, low, high, done = state
        value, log_slope = fn(x)
        low, high = jnp.where(value <= y, x, low), jnp.where(value >= y, x, high)
        move = (y - value) * jnp.exp(-log_slope)
        done |= jnp.minimum(jnp.abs(move), high - low) <= 2 * limits.eps * (1 + jnp.abs(x))
        is_safe = (x + move >= low) & (x + move <= high) & (i % 3 < 2)
        middle = low + (high - low) / 2
        x = jnp.where(done, x, jnp.where(is_safe, x + move, middle))
        return i + 1, x, low, high, done

    middle = low + (high - low) / 2
    return jax.lax.while_loop(goes_on, step, (0, middle, low, high, jnp.zeros(y.shape, bool)))[1]


def _in_float32(
    transform: Callable[[Array, Array], tuple[Array, Array]],
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`transform` computed in float32 if its input is narrower, because sums need more bits."""

    def wide(raw: Array, x: Array) -> tuple[Array, Array]:
        y, log_det = transform(widened(raw), widened(x))
        return y.astype(x.dtype), log_det.astype(x.dtype)

    return wide


def implicit_inverse(
    apply: Callable[[Array, Array], tuple[Array, Array]],
    solve: Callable[[Array, Array], tuple[Array, Array]],
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`solve`, differentiated by the implicit function theorem, in both modes and at any order.

    For y = f(raw, x): dx = (dy - df) / (df/dx), where df is the differential of f in raw at fixed
    x.
    """

    @jax.custom_jvp
    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        return solve(raw, y)

    @inverse.defjvp
    def jvp(primals, tangents):
        (raw, y), (raw_dot, y_dot) = primals, tangents
        x, log_det = inverse(raw, y)
        _, (f_dot, log_slope_dot) = jax.jvp(lambda raw: apply(raw, x), (raw,), (raw_dot,))
        # Where f is flatter than the dtype resolves, this bound on the slope keeps it finite.
        slope = jnp.exp(jnp.minimum(log_det, -2 * math.log(jnp.finfo(y.dtype).eps)))
        x_dot = (y_dot - f_dot) * slope
        _, (_, log_slope_dot_x) = jax.jvp(lambda x: apply(raw, x), (x,), (x_dot,))
        return (x, log_det), (x_dot, -log_slope_dot - log_slope_dot_x)

    return inverse


rational_quadratic = register("rational_quadratic", spline())
rational_quadratic.__doc__ = """`spline` with 8 bins on [-5, 5] and linear tails."""

deep_sigmoid = register("deep_sigmoid", sigmoid_mixture())
deep_sigmoid.__doc__ = """`sigmoid_mixture` of 8 units."""
