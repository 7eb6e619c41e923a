"""Training: a state, one step, one epoch as one compiled program, and a fit with selection."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from led_jax.model import LED, Elbo
from led_jax.objectives import negative_elbo

Params = Any


class TrainState(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      params: the model's parameters.
      opt_state: the optimizer's state.
      key: the run's key; every epoch and step folds its number into it, nothing replaces it.
      epoch: number of finished epochs, an int32 scalar.
    """

    params: Params
    opt_state: optax.OptState
    key: Array
    epoch: Array


def adam(
    learning_rate: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam under a linear warm-up and a cosine decay to zero.

    Args:
      learning_rate: the peak.
      num_steps: steps until the rate is zero.
      warmup_steps: steps until the rate is at its peak.
      clip_norm: largest global norm of the gradient; None does not clip.
    """
    # Without a warm-up the first step already has the peak rate.
    start = 0.0 if warmup_steps else learning_rate
    schedule = optax.warmup_cosine_decay_schedule(start, learning_rate, warmup_steps, num_steps)
    optimizer = optax.adam(schedule)
    return (
        optimizer
        if clip_norm is None
        else optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    )


def init_state(
    led: LED, optimizer: optax.GradientTransformation, key: Array, x: Array
) -> TrainState:
    """A fresh state.

    Args:
      led: the model.
      optimizer: the optimizer.
      key: the run's key.
      x: a batch of data `[n, *x_shape]` that fixes the shapes.
    """
    init_key, run_key = jax.random.split(key)
    params = jax.jit(led.init)(init_key, x.astype(jnp.result_type(float)))
    return TrainState(params, optimizer.init(params), run_key, jnp.zeros((), jnp.int32))


def train_step(
    led: LED,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    key: Array,
    x: Array,
    kl_weight: Array | float = 1.0,
    axis_name: str | None = None,
) -> tuple[Params, optax.OptState, Elbo]:
    """One update on a batch, written for one device.

    Args:
      led: the model.
      optimizer: the optimizer.
      params: parameters.
      opt_state: the optimizer's state.
      key: PRNG key of the step, on each device its own.
      x: the device's part of the batch, `[n, *x_shape]`.
      kl_weight: weight of the KL, see `objectives.negative_elbo`.
      axis_name: mapped axis over whose devices gradients and terms are averaged; None for one
        device alone.

    Returns:
      The new parameters and optimizer state, and the batch means of the bound's terms.
    """
    gradient, terms = jax.grad(
        lambda params: negative_elbo(led, params, key, x, kl_weight), has_aux=True
    )(params)
    if axis_name is not None:
        gradient, terms = jax.lax.pmean((gradient, terms), axis_name)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, terms


def make_epoch(
    led: LED,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    dynamic: bool = False,
    kl_warmup: float = 0.0,
) -> Callable[[TrainState, Array], tuple[TrainState, Elbo]]:
    """Builds the function that trains for one epoch, as one compiled program.

    Args:
      led: the model.
      optimizer: the optimizer.
      batch_size: rows a step; the rows left over sit out, other ones in every epoch.
      dynamic: whether rows are grey levels 0..255, binarized afresh with P(1) = level / 255.
      kl_warmup: number of epochs over which the KL's weight rises to 1.

    Returns:
      `epoch(state, data) -> (state, terms)` for data `[n, *x_shape]` of uint8; `terms` are the
      epoch's means. The state passed in is consumed: its buffers are used for the new one.

    Raises:
      ValueError: if batch_size is not positive or, when called, exceeds the number of rows.
    """
    if batch_size < 1:
        raise ValueError(f"make_epoch: batch_size must be positive, got {batch_size}")

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: TrainState, data: Array) -> tuple[TrainState, Elbo]:
        num_steps, dtype = len(data) // batch_size, jnp.result_type(float)
        if not num_steps:
            raise ValueError(
                f"epoch: expected at least batch_size={batch_size} rows, got {len(data)}"
            )
        shuffle_key, step_key = jax.random.split(jax.random.fold_in(state.key, state.epoch))
        rows = jax.random.permutation(shuffle_key, len(data))[: num_steps * batch_size]

        def step(carry, inputs):
            params, opt_state = carry
            i, rows = inputs
            key, binarize_key = jax.random.split(jax.random.fold_in(step_key, i))
            x = data[rows].astype(dtype)
            if dynamic:
                x = jax.random.bernoulli(binarize_key, x / 255).astype(dtype)
            kl_weight = 1.0
            if kl_warmup:
                kl_weight = jnp.minimum(1.0, (state.epoch + i / num_steps) / kl_warmup)
            params, opt_state, terms = train_step(
                led, optimizer, params, opt_state, key, x, kl_weight
            )
            return (params, opt_state), terms

        (params, opt_state), terms = jax.lax.scan(
            step,
            (state.params, state.opt_state),
            (jnp.arange(num_steps), rows.reshape(num_steps, batch_size)),
        )
        state = TrainState(params, opt_state, state.key, state.epoch + 1)
        return state, jax.tree.map(jnp.mean, terms)

    return epoch


def make_evaluate(led: LED, batch_size: int = 1000) -> Callable[[Params, Array, Array], Elbo]:
    """Builds the function that averages the bound's terms over a whole split.

    Returns:
      `evaluate(params, key, data) -> terms`, compiled, for data `[n, *x_shape]`: the means over
      all n rows, with one draw of z for each.
    """

    @jax.jit
    def evaluate(params: Params, key: Array, data: Array) -> Elbo:
        def terms(args: tuple[Array, Array]) -> Elbo:
            i, x = args
            return led.elbo(params, jax.random.fold_in(key, i), x.astype(jnp.result_type(float)))

        size = min(batch_size, len(data))
        whole = len(data) // size
        batches = data[: whole * size].reshape(whole, size, *data.shape[1:])
        parts = [jax.tree.map(jnp.ravel, jax.lax.map(terms, (jnp.arange(whole), batches)))]
        if len(data) % size:
            parts.append(terms((jnp.array(whole), data[whole * size :])))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves).mean(), *parts)

    return evaluate
