"""Optimizers by name, their schedule, and parameters averaged over time: optax transformations."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from led_jax.checks import checked
from led_jax.descriptions import constructor
from led_jax.numerics import widened

Params = Any

adam = constructor(optax.adam)
adamw = constructor(optax.adamw)
adamax = constructor(optax.adamax)


@checked
def scheduled(
    make: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """An optimizer under a linear warm-up and a cosine decay to zero.

    Args:
      make: makes an optimizer from a learning rate schedule, such as `adamw` or
        `partial(adamw, weight_decay=0.1)`.
      learning_rate: the peak of the learning rate.
      num_steps: number of steps until the rate is zero.
      warmup_steps: number of steps until the rate is at its peak.
      clip_norm: largest global norm of the gradient; None does not clip.

    Raises:
      ValueError: if a number is out of its range.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"scheduled: learning_rate must be positive, got {learning_rate}")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            "scheduled: num_steps must be 1 or more, and warmup_steps from 0 to one below them, "
            f"got num_steps={num_steps} and warmup_steps={warmup_steps}"
        )
    # Without a warm-up the first step already has the peak rate.
    start = 0.0 if warmup_steps else learning_rate
    schedule = optax.warmup_cosine_decay_schedule(start, learning_rate, warmup_steps, num_steps)
    if clip_norm is None:
        return make(schedule)
    return optax.chain(optax.clip_by_global_norm(clip_norm), make(schedule))


class AveragedState(NamedTuple):
    """The state of `averaged`.

    Attributes:
      inner: the optimizer's own state.
      count: number of updates, an int32 scalar.
      average: the averaged parameters; for half precision in float32, which resolves small steps.
    """

    inner: optax.OptState
    count: Array
    average: Params


@checked
def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """An optimizer whose state also keeps an average of the parameters over the updates.

    After t updates it is the weighted average of the parameters after updates s = 1, ..., t, with
    weights proportional to decay^(t - s): an exponential moving average in which the initial
    parameters have no weight. Polyak and Juditsky (1992). The updates are the optimizer's own;
    `average_of` reads the average.

    >>> optimizer = averaged(optax.sgd(1.0), decay=0.5)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> _, state = optimizer.update(jnp.array(-3.0), state, jnp.zeros(()))  # To 3,
    >>> _, state = optimizer.update(jnp.array(-3.0), state, jnp.array(3.0))  # and to 6.
    >>> float(average_of(state, jnp.zeros(())))
    5.0

    Args:
      optimizer: the optimizer that makes the updates.
      decay: ratio of successive weights, such as 0.999; 0 gives the parameters themselves.

    Raises:
      ValueError: if decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"averaged: decay must be in [0, 1), got {decay}")

    def init(params: Params) -> AveragedState:
        average = jax.tree.map(widened, params)
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), average)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None
    ) -> tuple[Params, AveragedState]:
        assert isinstance(state, AveragedState)
        updates, inner = optimizer.update(updates, state.inner, params)
        count = state.count + 1
        weight = (1 - decay) / (1 - decay**count)

        def mix(average: Array, param: Array, update: Array) -> Array:
            new = widened(param) + widened(update)
            return average + weight.astype(average.dtype) * (new - average)

        return updates, AveragedState(
            inner, count, jax.tree.map(mix, state.average, params, updates)
        )

    return optax.GradientTransformation(init, update)


@checked
def average_of(opt_state: optax.OptState, params: Params) -> Params:
    """The average that `averaged` keeps in an optimizer's state, in the dtypes of `params`.

    Returns `params` themselves if the state has no average.
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda state: isinstance(state, AveragedState))
    for state in states:
        if isinstance(state, AveragedState):
            return jax.tree.map(lambda mean, p: mean.astype(p.dtype), state.average, params)
    return params
