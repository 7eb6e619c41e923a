"""Likelihoods: the distribution of one entry of x, given the outputs of a decoder's network.

A likelihood is elementwise. `decoders.decoder` puts it on top of any network and sums over the
entries.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from led_jax.checks import check_raw
from led_jax.densities import normal_log_prob
from led_jax.descriptions import constructor, describe
from led_jax.numerics import log_sigmoid, match_rank, softplus, widened


class Likelihood(NamedTuple):
    """p(x_i | raw_i) for each entry i of x `[..., D]`, from outputs raw `[..., P, D]`.

    Attributes:
      num_params: number P of the network's outputs for each entry.
      log_prob: `(raw, x) -> [..., D]`, in nats; batch axes of raw and x broadcast.
      mean: `raw -> [..., D]`.
      sample: `(key, raw) -> [..., D]`.
      values: kind of values of x that it takes: "unit" for [0, 1], "scaled_levels" for 0/255,
        1/255, ..., 1, "real" for any, "below K" for 0, 1, ..., K - 1; see
        `led_jax.data.check_rows`.
      free: whether raw has one more row, the last, that is a parameter and does not depend on z:
        "none", one number for each entry ("entry"), or one for all entries ("one").
    """

    num_params: int
    log_prob: Callable[[Array, Array], Array]
    mean: Callable[[Array], Array]
    sample: Callable[[Array, Array], Array]
    values: str = "real"
    free: str = "none"

    __repr__ = describe


def check_values(name: str, values: str, x: Array | np.ndarray) -> None:
    """Checks that x is within the range of a likelihood's `values`, unless x is traced.

    Raises:
      ValueError: if x has other values; the message starts with `name`, the caller's.
    """
    below, _, number = values.partition(" ")
    if below not in ("unit", "scaled_levels", "below") or isinstance(x, Tracer) or not x.size:
        return
    values_of_x = np.asarray(x)
    if below == "below":
        if not ((values_of_x % 1 == 0) & (values_of_x >= 0) & (values_of_x < int(number))).all():
            raise ValueError(
                f"{name}: x must be whole numbers 0..{int(number) - 1}, as its likelihood takes "
                f"categories, got x from {values_of_x.min()} to {values_of_x.max()}"
            )
        return
    low, high = values_of_x.min(), values_of_x.max()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: x must be in [0, 1], as its likelihood takes values {values!r}, got x from "
            f"{low} to {high}; divide grey levels by 255, or take a likelihood of real numbers"
        )


@constructor
def bernoulli() -> Likelihood:
    """Bernoulli(x; sigmoid(raw)), for x in {0, 1}.

    For x between 0 and 1, `log_prob` is the expected log-probability of a binary pixel that is
    drawn with P(1) = x.

    >>> likelihood = bernoulli()
    >>> round(float(likelihood.log_prob(jnp.zeros((1, 1)), jnp.ones(1))[0]), 4)
    -0.6931
    """

    def log_prob(raw: Array, x: Array) -> Array:
        check_raw("bernoulli", 1, raw, x)
        check_values("bernoulli", "unit", x)
        logit = raw[..., 0, :]
        return x * logit - softplus(logit)

    def mean(raw: Array) -> Array:
        return jax.nn.sigmoid(raw[..., 0, :])

    def sample(key: Array, raw: Array) -> Array:
        return jax.random.bernoulli(key, mean(raw)).astype(raw.dtype)

    return Likelihood(1, log_prob, mean, sample, "unit")


@constructor
def gaussian(std: float) -> Likelihood:
    """N(x; raw, std^2), for real x.

    >>> likelihood = gaussian(std=1.0)
    >>> round(float(likelihood.log_prob(jnp.zeros((1, 1)), jnp.zeros(1))[0]), 4)
    -0.9189

    Args:
      std: standard deviation, the same for every entry.

    Raises:
      ValueError: if std is not positive and finite.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"gaussian: std must be positive and finite, got {std}")

    def mean(raw: Array) -> Array:
        return raw[..., 0, :]

    def log_prob(raw: Array, x: Array) -> Array:
        check_raw("gaussian", 1, raw, x)
        return normal_log_prob((x - mean(raw)) / std) - math.log(std)

    def sample(key: Array, raw: Array) -> Array:
        out = mean(raw)
        return out + std * jax.random.normal(key, out.shape, out.dtype)

    return Likelihood(1, log_prob, mean, sample)


@constructor
def learned_gaussian(scale: str = "one") -> Likelihood:
    """N(x; mean, e^(2 log_std)), for real x, with a learned standard deviation.

    log_std is clipped to [-7, 7], because an entry that is constant in the data would drive it to
    -infinity.

    >>> learned_gaussian("network").num_params, learned_gaussian("entry").num_params
    (2, 1)

    Args:
      scale: "one": all entries share one deviation; "entry": each entry has its own; "network": the
        network's second output is log_std, for each entry at each z.

    Raises:
      ValueError: if scale is none of these.
    """
    if scale not in ("one", "entry", "network"):
        raise ValueError(f"learned_gaussian: scale must be one, entry or network, got {scale!r}")

    def mean(raw: Array) -> Array:
        return raw[..., 0, :]

    def log_std(raw: Array) -> Array:
        return jnp.clip(raw[..., 1, :], -7, 7)

    def log_prob(raw: Array, x: Array) -> Array:
        check_raw("learned_gaussian", 2, raw, x)
        return normal_log_prob((x - mean(raw)) * jnp.exp(-log_std(raw))) - log_std(raw)

    def sample(key: Array, raw: Array) -> Array:
        out = mean(raw)
        return out + jnp.exp(log_std(raw)) * jax.random.normal(key, out.shape, out.dtype)

    if scale == "network":
        return Likelihood(2, log_prob, mean, sample)
    return Likelihood(1, log_prob, mean, sample, free=scale)


@constructor
def categorical(num_categories: int) -> Likelihood:
    """P(x = k) = softmax(raw)_k, for x in {0, 1, ..., K - 1}, whose order means nothing.

    `mean` is E[x], which treats the categories as numbers.

    >>> likelihood = categorical(4)
    >>> round(float(likelihood.log_prob(jnp.zeros((4, 1)), jnp.ones(1))[0]), 4)
    -1.3863

    Args:
      num_categories: number K of values, from 2 to 256.

    Raises:
      ValueError: if num_categories is not from 2 to 256.
    """
    if not 2 <= num_categories <= 256:
        raise ValueError(f"categorical: num_categories must be 2 to 256, got {num_categories}")

    def log_prob(raw: Array, x: Array) -> Array:
        check_raw("categorical", num_categories, raw, x)
        check_values("categorical", f"below {num_categories}", x)
        log_probs = jax.nn.log_softmax(widened(raw), -2)
        numbers = jnp.arange(num_categories, dtype=log_probs.dtype)[:, None]
        is_x = x[..., None, :].astype(log_probs.dtype) == match_rank(numbers, x.ndim + 1)
        log_prob = jnp.where(is_x, log_probs, 0).sum(-2)
        return jnp.where(is_x.any(-2), log_prob, -jnp.inf).astype(raw.dtype)

    def mean(raw: Array) -> Array:
        probs = jax.nn.softmax(widened(raw), -2)
        numbers = jnp.arange(num_categories, dtype=probs.dtype)[:, None]
        return (probs * match_rank(numbers, raw.ndim)).sum(-2).astype(raw.dtype)

    def sample(key: Array, raw: Array) -> Array:
        return jax.random.categorical(key, raw, axis=-2).astype(raw.dtype)

    return Likelihood(num_categories, log_prob, mean, sample, f"below {num_categories}")


@constructor
def discretized_logistic(num_components: int = 5) -> Likelihood:
    """A mixture of K logistics over x in {0/255, 1/255, ..., 1}: grey levels of 8 bits over 255.

    P(x) = sum_k w_k (F((c + 1/255 - m_k) / s_k) - F((c - 1/255 - m_k) / s_k)) at c = 2x - 1, with
    the logistic function F; the first and the last level also include the tail beyond them.
    Salimans et al. (2017), PixelCNN++, eq. 2, https://arxiv.org/abs/1701.05517. The network's
    outputs are K logits of w, K means m and K log-scales log s, which are clipped to [-7, 7].

    >>> discretized_logistic(2).num_params
    6

    Args:
      num_components: number K of logistics.

    Raises:
      ValueError: if num_components is not positive.
    """
    if num_components < 1:
        raise ValueError(
            f"discretized_logistic: num_components must be positive, got {num_components}"
        )

    def parts(raw: Array) -> tuple[Array, Array, Array]:
        logits, means, log_scales = jnp.split(widened(raw), 3, axis=-2)
        return logits, means, jnp.clip(log_scales, -7, 7)

    def log_prob(raw: Array, x: Array) -> Array:
        check_raw("discretized_logistic", 3 * num_components, raw, x)
        check_values("discretized_logistic", "scaled_levels", x)
        logits, means, log_scales = parts(raw)
        x = x[..., None, :].astype(means.dtype)
        inverse_scale = jnp.exp(-log_scales)
        upper = (2 * x - 1 + 1 / 255 - means) * inverse_scale
        lower = upper - 2 / 255 * inverse_scale
        # F(u) - F(l) = F(u) F(-l) (1 - e^(l - u)) avoids the difference of two close numbers.
        log_width = jnp.log(-jnp.expm1(-2 / 255 * inverse_scale))
        log_mass = (
            jnp.where(x > 1 - 0.5 / 255, 0, log_sigmoid(upper))
            + jnp.where(x < 0.5 / 255, 0, log_sigmoid(-lower))
            + jnp.where((x > 0.5 / 255) & (x < 1 - 0.5 / 255), log_width, 0)
        )
        log_weights = jax.nn.log_softmax(logits, -2)
        return jax.nn.logsumexp(log_weights + log_mass, axis=-2).astype(raw.dtype)

    def mean(raw: Array) -> Array:
        logits, means, log_scales = parts(raw)
        weights, inverse_scale = jax.nn.softmax(logits, -2), jnp.exp(-log_scales)

        def add(level: Array, total: Array) -> Array:
            # E[255 x] = sum over levels of P(255 x >= level).
            edge = (2 * level - 1) / 255 - 1
            return total + (weights * jax.nn.sigmoid((means - edge) * inverse_scale)).sum(-2)

        total = jax.lax.fori_loop(1, 256, add, jnp.zeros_like(means[..., 0, :]))
        return (total / 255).astype(raw.dtype)

    def sample(key: Array, raw: Array) -> Array:
        logits, means, log_scales = parts(raw)
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, logits, axis=-2)[..., None, :]
        m, log_scale = (jnp.take_along_axis(a, k, axis=-2)[..., 0, :] for a in (means, log_scales))
        c = m + jnp.exp(log_scale) * jax.random.logistic(noise_key, m.shape, m.dtype)
        return (jnp.clip(jnp.round((c + 1) * 127.5), 0, 255) / 255).astype(raw.dtype)

    return Likelihood(3 * num_components, log_prob, mean, sample, "scaled_levels")
