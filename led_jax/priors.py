"""Priors of a LED: a `Density`, or a `Prior` that reads the model's own posterior.

A prior may read the posterior q(z|x), but the posterior never reads the prior: there are no cycles.
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
      mixture: `encoding -> (z -> [...])`, log 1/K sum_k q(z|x_k) for an encoding of K rows.
    """

    encode: Callable[..., Encoding]
    log_prob: Callable[[Array, Encoding], Array]
    sample_and_log_prob: Callable[..., tuple[Array, Array]]
    mixture: Callable[[Encoding], Callable[[Array], Array]]


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
    """A prior at given parameters: whatever depends only on the parameters is computed once.

    Attributes:
      log_prob: `(z, context=None) -> [...]`, log p(z) in nats.
      sample_and_log_prob: `(key, sample_shape=(), context=None) -> (z, log p(z))`.
    """

    log_prob: BoundLogProbFn
    sample_and_log_prob: BoundSampleFn


class Prior(NamedTuple):
    """A prior p(z) that may depend on the model's own posterior, as a VampPrior does.

    Attributes:
      init: `(key, x, posterior, context=None) -> params`, for rows x `[n, *x_shape]` of the data.
      bind: `(params, posterior) -> Bound`.
    """

    init: Callable[..., Params]
    bind: Callable[[Params, Posterior], Bound]

    __repr__ = describe


@constructor
def lift(density: Density) -> Prior:
    """A density as a prior: it does not read the posterior, but `init` sees draws from it.

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


@constructor
def vamp(num_components: int) -> Prior:
    """The VampPrior: p(z) = 1/K sum_k q(z|u_k) for K learned pseudo-inputs u_k.

    Tomczak and Welling (2017), eq. 9, https://arxiv.org/abs/1705.07120. The parameters are the
    pseudo-inputs `[K, *x_shape]`, which start as K different rows of the data and are not
    constrained to the range of the data. They, the encoder and the posterior's flow get gradients.

    >>> vamp(500)
    vamp(500)

    Args:
      num_components: number K of pseudo-inputs, which are encoded once a step. The posterior's flow
        is inverted for each z, or for each z and pseudo-input if the encoder gives it a context.

    Raises:
      ValueError: if num_components is not positive; from `init`, if the data have fewer rows, or if
        the model is conditional on a context, which no pseudo-input has.
    """
    return _mixture_of_posteriors("vamp", num_components, lambda rows: rows)


@constructor
def data_subset(num_components: int) -> Prior:
    """p(z) = 1/K sum_k q(z|x_k) for a fixed random subset x_1, ..., x_K of the data's rows.

    The VampPrior without learned pseudo-inputs, Tomczak and Welling (2017), section 2. The
    parameters are the rows `[K, *x_shape]`, which get no gradient; the encoder and the posterior's
    flow do.

    >>> data_subset(500)
    data_subset(500)

    Args:
      num_components: number K of rows, with the costs as in `vamp`.

    Raises:
      ValueError: as in `vamp`.
    """
    return _mixture_of_posteriors("data_subset", num_components, jax.lax.stop_gradient)


def _mixture_of_posteriors(name: str, num_components: int, read: Callable[[Array], Array]) -> Prior:
    if num_components < 1:
        raise ValueError(f"{name}: num_components must be positive, got {num_components}")

    def init(key: Array, x: Array, posterior: Posterior, context: Array | None = None) -> Params:
        if context is not None:
            raise ValueError(
                f"{name}: expected a model without a context, got one of shape {context.shape}; a "
                "mixture of posteriors has no context for its rows"
            )
        if len(x) < num_components:
            raise ValueError(
                f"{name}: {num_components} components start as that many rows of the data, got "
                f"{len(x)} rows; initialise with more rows, or take fewer components"
            )
        return jax.random.choice(key, x, (num_components,), replace=False)

    def bind(params: Params, posterior: Posterior) -> Bound:
        encoding = posterior.encode(read(params))
        log_mixture = posterior.mixture(encoding)

        def log_prob(z: Array, context: Array | None = None) -> Array:
            return log_mixture(z)

        def sample_and_log_prob(
            key: Array, sample_shape: tuple[int, ...] = (), context: Array | None = None
        ) -> tuple[Array, Array]:
            component_key, z_key = jax.random.split(key)
            k = jax.random.randint(component_key, sample_shape, 0, num_components)
            z, _ = posterior.sample_and_log_prob(z_key, jax.tree.map(lambda a: a[k], encoding))
            return z, log_mixture(z)

        return Bound(log_prob, sample_and_log_prob)

    return Prior(init, bind)
