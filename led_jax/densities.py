"""Explicit densities: base distributions and their images under flows."""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.flows.base import Flow

Params = Any


class SampleFn(Protocol):
    """Draws samples together with their log-densities."""

    def __call__(
        self, params: Params, key: Array, sample_shape: tuple[int, ...] = (), /
    ) -> tuple[Array, Array]:
        """Returns x `[*sample_shape, *event_shape]` and log p(x) `[*sample_shape]`."""
        ...


class InitFn(Protocol):
    """Creates the parameters: a pytree of trainable floats."""

    def __call__(self, key: Array, x: Array, /) -> Params:
        """`x`: an example that fixes shapes and dtype, with any leading batch axes."""
        ...


class LogProbFn(Protocol):
    """Scores points."""

    def __call__(self, params: Params, x: Array, /) -> Array:
        """Returns log p(x) in nats, `[...]` for x `[..., *event_shape]`."""
        ...


class Density(NamedTuple):
    """A density with an exact log-probability and exact samples, as pure functions.

    Attributes:
      init: `(key, x) -> params`.
      log_prob: `(params, x) -> [...]`, in nats.
      sample_and_log_prob: `(params, key, sample_shape=()) -> (x, log_prob)`.
    """

    init: InitFn
    log_prob: LogProbFn
    sample_and_log_prob: SampleFn


def normal_log_prob(x: Array) -> Array:
    """log N(x; 0, 1), elementwise, in nats."""
    return -0.5 * (x * x + math.log(2 * math.pi))


def standard_normal(event_shape: tuple[int, ...]) -> Density:
    """N(0, I) on events of the given shape."""

    def log_prob(params: Params, x: Array) -> Array:
        log_normalizer = 0.5 * math.log(2 * math.pi) * math.prod(event_shape)
        return -0.5 * jnp.square(x).sum(_event_axes(x, event_shape)) - log_normalizer

    def sample_and_log_prob(params: Params, key: Array, sample_shape: tuple[int, ...] = ()):
        x = jax.random.normal(key, (*sample_shape, *event_shape))
        return x, log_prob(params, x)

    return Density(lambda key, x: (), log_prob, sample_and_log_prob)


def uniform(event_shape: tuple[int, ...]) -> Density:
    """The uniform density on (0, 1)^D: log-density 0 inside, -inf outside."""

    def log_prob(params: Params, x: Array) -> Array:
        inside = ((x >= 0) & (x <= 1)).all(_event_axes(x, event_shape))
        return jnp.where(inside, 0, -jnp.inf).astype(x.dtype)

    def sample_and_log_prob(params: Params, key: Array, sample_shape: tuple[int, ...] = ()):
        x = jax.random.uniform(key, (*sample_shape, *event_shape))
        return x, jnp.zeros(sample_shape, x.dtype)

    return Density(lambda key, x: (), log_prob, sample_and_log_prob)


def transformed(base: Density, flow: Flow) -> Density:
    """The density of y = f(x) for x from `base` and f from `flow`: the change of variables.

    log p(y) = log p_base(f^-1(y)) + log|det df^-1/dy|. Huang et al. (2017), section 4. A sample is
    scored on the way out, without inverting the flow.

    Args:
      base: density of x.
      flow: map from x to y.

    Returns:
      A density whose parameters are `{"base": ..., "flow": ...}`.
    """

    def init(key: Array, x: Array) -> Params:
        base_key, flow_key = jax.random.split(key)
        return {"base": base.init(base_key, x), "flow": flow.init(flow_key, x)}

    def log_prob(params: Params, x: Array) -> Array:
        x, log_det = flow.inverse(params["flow"], x)
        return base.log_prob(params["base"], x) + log_det

    def sample_and_log_prob(params: Params, key: Array, sample_shape: tuple[int, ...] = ()):
        x, log_prob = base.sample_and_log_prob(params["base"], key, sample_shape)
        x, log_det = flow.apply(params["flow"], x)
        return x, log_prob - log_det

    return Density(init, log_prob, sample_and_log_prob)


def _event_axes(x: Array, event_shape: tuple[int, ...]) -> tuple[int, ...]:
    if x.shape[x.ndim - len(event_shape) :] != tuple(event_shape) or x.ndim < len(event_shape):
        shape = ", ".join(map(str, event_shape))
        raise ValueError(f"density: expected an input of shape [..., {shape}], got {x.shape}")
    return tuple(range(-len(event_shape), 0))
