"""Elementwise monotone maps: what a coupling or autoregressive layer does to one entry.

A transformer's parameters are unconstrained reals, as a network emits them. All zeros mean the
identity, or close to it, so that a layer whose conditioner starts at zero starts there too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.numerics import log_sigmoid

# Bounds |log scale| of `affine`: a layer scales by at most e^3, whatever its network emits.
_MAX_LOG_SCALE = 3.0
# `gate` closes no further than to e^-20, beyond what float32 resolves: its inverse stays finite.
_MIN_LOGIT = -20.0


class Transformer(NamedTuple):
    """An elementwise monotone map and its inverse.

    Attributes:
      num_params: number P of parameters for each entry.
      apply: `(raw, x) -> (y, log_det)` for raw `[..., P, D]` and x `[..., D]`; log_det is
        elementwise, `[..., D]`.
      inverse: `(raw, y) -> (x, log_det)`, with the log-derivative of the inverse.
    """

    num_params: int
    apply: Callable[[Array, Array], tuple[Array, Array]]
    inverse: Callable[[Array, Array], tuple[Array, Array]]


def _split(raw: Array) -> tuple[Array, Array]:
    return raw[..., 0, :], raw[..., 1, :]


def _additive_apply(raw: Array, x: Array) -> tuple[Array, Array]:
    y = x + raw[..., 0, :]
    return y, jnp.zeros_like(y)


def _additive_inverse(raw: Array, y: Array) -> tuple[Array, Array]:
    x = y - raw[..., 0, :]
    return x, jnp.zeros_like(x)


additive = Transformer(1, _additive_apply, _additive_inverse)
"""y = x + t. NICE: Dinh, Krueger and Bengio (2014), eq. 9, https://arxiv.org/abs/1410.8516."""


def _bounded_log_scale(raw: Array) -> Array:
    return _MAX_LOG_SCALE * jnp.tanh(raw / _MAX_LOG_SCALE)


def _affine_apply(raw: Array, x: Array) -> tuple[Array, Array]:
    shift, log_scale = _split(raw)
    log_scale = _bounded_log_scale(log_scale)
    y = x * jnp.exp(log_scale) + shift
    return y, jnp.broadcast_to(log_scale, y.shape)


def _affine_inverse(raw: Array, y: Array) -> tuple[Array, Array]:
    shift, log_scale = _split(raw)
    log_scale = _bounded_log_scale(log_scale)
    x = (y - shift) * jnp.exp(-log_scale)
    return x, jnp.broadcast_to(-log_scale, x.shape)


affine = Transformer(2, _affine_apply, _affine_inverse)
"""y = x e^s + t, with s = 3 tanh(raw / 3).

Real NVP: Dinh, Sohl-Dickstein and Bengio (2016), eq. 7, https://arxiv.org/abs/1605.08803.
"""


def gate(bias: float) -> Transformer:
    """Y = s x + (1 - s) m, with s = sigmoid(max(raw + bias, -20)).

    The update of inverse autoregressive flow: Kingma et al. (2016), eq. 13 to 15,
    https://arxiv.org/abs/1606.04934. A layer starts as y = sigmoid(bias) x.
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

    return Transformer(2, apply, inverse)


gated = gate(1.5)
"""`gate` with a bias of 1.5, in the middle of what Kingma et al. (2016) recommend."""
