"""Fits a density to samples or to an unnormalised log-density: variational inference, no VAE.

Both ways take a density, parameters to start from and a key, and run in one compiled loop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from led_jax.densities import Density
from led_jax.training import adam

Params = Any
LogDensity = Callable[[Array], Array]


class Fit(NamedTuple):
    """A fitted density's parameters.

    Attributes:
      params: the parameters after the last step.
      losses: `[num_steps]`, the loss of each step's batch in nats.
    """

    params: Params
    losses: Array


class Evidence(NamedTuple):
    """An estimate of log Z, the logarithm of an unnormalised density's integral, in nats.

    Attributes:
      log_z: log of the mean importance weight; too low on average, by less with more samples.
      standard_error: of `log_z`, from the spread of the weights.
      elbo: mean of the log-weights, a lower bound of log Z: the gap is KL(q || p).
    """

    log_z: Array
    standard_error: Array
    elbo: Array


def to_samples(
    density: Density,
    params: Params,
    key: Array,
    samples: Array,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
) -> Fit:
    """Maximum likelihood: minimises KL(p || q) up to the constant entropy of p.

    Args:
      density: q, whose `log_prob` should be its cheap direction.
      params: parameters to start from.
      key: PRNG key of the batches.
      samples: draws from p, `[n, *event_shape]`.
      num_steps: steps of Adam, with a cosine decay of the rate to zero.
      batch_size: samples a step, drawn with replacement.
      learning_rate: the rate at the start.

    Returns:
      `Fit`; a loss is the batch's mean of -log q.

    Raises:
      ValueError: if a number is not positive.
    """

    def loss(params: Params, key: Array, step: Array) -> Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(samples))
        return -density.log_prob(params, samples[rows]).mean()

    _check_positive("to_samples", num_samples=len(samples), batch_size=batch_size)
    return _minimise(loss, params, key, num_steps, learning_rate)


def to_log_density(
    density: Density,
    params: Params,
    key: Array,
    log_density: LogDensity,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    annealing_steps: int = 0,
) -> Fit:
    """Variational inference: minimises KL(q || p), with gradients through q's samples.

    Args:
      density: q, whose `sample_and_log_prob` should be its cheap direction.
      params: parameters to start from.
      key: PRNG key of the samples.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`; differentiable.
      num_steps: steps of Adam, with a cosine decay of the rate to zero.
      batch_size: samples a step.
      learning_rate: the rate at the start.
      annealing_steps: steps until log p counts in full; its weight rises linearly from 1/10, so
        that q spreads over separate modes before it fits them (as Rezende and Mohamed, 2015,
        anneal, https://arxiv.org/abs/1505.05770).

    Returns:
      `Fit`; a loss is the batch's mean of log q - weight log p, after the annealing at least -log Z
      on average.

    Raises:
      ValueError: if a number is not positive (annealing_steps: negative, or not below num_steps),
        or log_density returns another shape.
    """

    def loss(params: Params, key: Array, step: Array) -> Array:
        weight = jnp.minimum(0.1 + 0.9 * step / annealing_steps, 1.0) if annealing_steps else 1.0
        log_p, log_q = _log_densities(density, params, key, log_density, batch_size)
        return (log_q - weight * log_p).mean()

    _check_positive("to_log_density", num_steps=num_steps, batch_size=batch_size)
    if not 0 <= annealing_steps < num_steps:
        raise ValueError(
            f"to_log_density: annealing_steps must be from 0 to num_steps - 1 = {num_steps - 1}, "
            f"got {annealing_steps}"
        )
    return _minimise(loss, params, key, num_steps, learning_rate)


def evidence(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int = 10_000
) -> Evidence:
    """Estimates log Z by importance sampling from the density.

    Args:
      density: q, of which samples are drawn.
      params: its parameters.
      key: PRNG key.
      log_density: log p up to the constant that is wanted, from `[n, *event_shape]` to `[n]`.
      num_samples: number of samples.

    Returns:
      `Evidence`, of scalars.

    Raises:
      ValueError: if there are not at least 2 samples, or log_density returns another shape.
    """
    if num_samples < 2:
        raise ValueError(f"evidence: num_samples must be 2 or more, got {num_samples}")
    log_p, log_q = _log_densities(density, params, key, log_density, num_samples)
    log_weights = log_p - log_q
    log_z = jax.nn.logsumexp(log_weights) - math.log(num_samples)
    relative_spread = jnp.exp(log_weights - log_z).std(ddof=1)
    return Evidence(log_z, relative_spread / math.sqrt(num_samples), log_weights.mean())


def _log_densities(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int
) -> tuple[Array, Array]:
    """log p(x) and log q(x) at samples x of q, each `[num_samples]`."""
    x, log_prob = density.sample_and_log_prob(params, key, (num_samples,))
    target = log_density(x)
    if jnp.shape(target) != (num_samples,):
        raise ValueError(
            f"log_density: expected {num_samples} values, [{num_samples}], for an x of shape "
            f"{x.shape}, got {jnp.shape(target)}; sum over the event's axes only"
        )
    return target, log_prob


def _minimise(
    loss: Callable[[Params, Array, Array], Array],
    params: Params,
    key: Array,
    num_steps: int,
    learning_rate: float,
) -> Fit:
    _check_positive("fit", num_steps=num_steps, learning_rate=learning_rate)
    optimizer = adam(learning_rate, num_steps)

    def step(carry, key_and_step):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, *key_and_step)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def run(params: Params, key: Array) -> Fit:
        start = params, optimizer.init(params)
        keys_and_steps = jax.random.split(key, num_steps), jnp.arange(num_steps)
        (params, _), losses = jax.lax.scan(step, start, keys_and_steps)
        return Fit(params, losses)

    return run(params, key)


def _check_positive(name: str, **numbers: float) -> None:
    for argument, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}: {argument} must be positive, got {number}")
