"""What the prior of a LED may be: a `Density`, or a `Prior` that reads the model's own posterior.

A prior may read the posterior q(z|x), and nothing reads the prior: one direction, no cycles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array

from led_jax.densities import Density
from led_jax.descriptions import constructor, describe
from led_jax.encoders import Encoding

Params = Any


class Posterior(NamedTuple):
    """The model's approximate posterior q(z|x) at given parameters.

    Attributes:
      encode: `(x, context=None) -> Encoding`, the encoder's output for x `[..., *x_shape]`.
      log_prob: `(z, encoding) -> [...]`, log q(z|x) in nats; batch axes of both broadcast.
      sample_and_log_prob: `(key, encoding, sample_shape=()) -> (z, log q(z|x))`.
    """

    encode: Callable[..., Encoding]
    log_prob: Callable[[Array, Encoding], Array]
    sample_and_log_prob: Callable[..., tuple[Array, Array]]


class BoundLogProbFn(Protocol):
    """Scores points under a prior whose parameters are fixed."""

    def __call__(self, z: Array, context: Array | None = None, /) -> Array:
        """Returns log p(z|context) in nats, `[...]` for z `[..., *latent_shape]`."""
        ...


class BoundSampleFn(Protocol):
    """Draws from a prior whose parameters are fixed."""

    def __call__(
        self, key: Array, sample_shape: tuple[int, ...] = (), context: Array | None = None, /
    ) -> tuple[Array, Array]:
        """Returns z and log p(z|context), as `Density.sample_and_log_prob` does."""
        ...


class Bound(NamedTuple):
    """A prior at given parameters: what depends on these alone has been computed once.

    Attributes:
      log_prob: `(z, context=None) -> [...]`, log p(z) in nats.
      sample_and_log_prob: `(key, sample_shape=(), context=None) -> (z, log p(z))`.
    """

    log_prob: BoundLogProbFn
    sample_and_log_prob: BoundSampleFn


class Prior(NamedTuple):
    """A prior p(z) that may be made of the model's own posterior, as a VampPrior is.

    Attributes:
      init: `(key, x, posterior, context=None) -> params`, for rows x `[n, *x_shape]` of the data.
      bind: `(params, posterior) -> Bound`.
    """

    init: Callable[..., Params]
    bind: Callable[[Params, Posterior], Bound]

    __repr__ = describe


@constructor
def lift(density: Density) -> Prior:
    """The prior that is a density and reads nothing; its `init` sees draws from the posterior.

    >>> from led_jax import densities
    >>> lift(densities.standard_normal((2,)))
    lift(standard_normal((2,)))
    """

    def init(key: Array, x: Array, posterior: Posterior, context: Array | None = None) -> Params:
        z_key, density_key = jax.random.split(key)
        z, _ = posterior.sample_and_log_prob(z_key, posterior.encode(x, context))
        return density.init(density_key, z, context)

    def bind(params: Params, posterior: Posterior) -> Bound:
        def log_prob(z: Array, context: Array | None = None) -> Array:
            return density.log_prob(params, z, context)

        def sample_and_log_prob(
            key: Array, sample_shape: tuple[int, ...] = (), context: Array | None = None
        ) -> tuple[Array, Array]:
            return density.sample_and_log_prob(params, key, sample_shape, context)

        return Bound(log_prob, sample_and_log_prob)

    return Prior(init, bind)
