"""Likelihoods: what the outputs of a decoder's network say of one entry of x.

A likelihood is elementwise. `decoders.decoder` puts it on top of any network and sums over the
entries.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from led_jax.densities import normal_log_prob
from led_jax.descriptions import constructor, describe
from led_jax.numerics import softplus


class Likelihood(NamedTuple):
    """p(x_i | raw_i) for each entry i of x `[..., D]`, from outputs raw `[..., P, D]`.

    Attributes:
      num_params: number P of outputs that an entry takes.
      log_prob: `(raw, x) -> [..., D]`, in nats; batch axes of raw and x broadcast.
      mean: `raw -> [..., D]`.
      sample: `(key, raw) -> [..., D]`.
      values: which x it takes: "unit" for [0, 1], "levels" for whole numbers 0..255, "real" for
        any; see `led_jax.data.check_rows`.
    """

    num_params: int
    log_prob: Callable[[Array, Array], Array]
    mean: Callable[[Array], Array]
    sample: Callable[[Array, Array], Array]
    values: str = "real"

    __repr__ = describe


@constructor
def bernoulli() -> Likelihood:
    """Bernoulli(x; sigmoid(raw)), for x in {0, 1}.

    For x between 0 and 1, `log_prob` is the mean of log p over a draw of a pixel with P(1) = x.
    """

    def log_prob(raw: Array, x: Array) -> Array:
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
        return normal_log_prob((x - mean(raw)) / std) - math.log(std)

    def sample(key: Array, raw: Array) -> Array:
        out = mean(raw)
        return out + std * jax.random.normal(key, out.shape, out.dtype)

    return Likelihood(1, log_prob, mean, sample)
