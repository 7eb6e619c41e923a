"""Training: a state, one step, one epoch as one compiled program, and a fit with selection."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from led_jax.model import LED, Elbo
from led_jax.numerics import device_part, device_rows
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
      key: PRNG key of the step, the same on every device.
      x: the device's part of the batch, `[n, *x_shape]`.
      kl_weight: weight of the KL, see `objectives.negative_elbo`.
      axis_name: mapped axis over whose devices the batch is split, and gradients and terms are
        averaged; None for one device alone.

    Returns:
      The new parameters and optimizer state, and the batch means of the bound's terms.
    """
    gradient, terms = jax.grad(
        lambda params: negative_elbo(led, params, key, x, kl_weight, axis_name), has_aux=True
    )(params)
    # The mean over one device would be a copy of the gradient.
    if axis_name is not None and jax.lax.axis_size(axis_name) > 1:
        gradient, terms = jax.lax.pmean((gradient, terms), axis_name)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, terms


@jax.jit
def is_finite(tree: Any) -> Array:
    """Whether no float in a pytree is NaN or infinite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


class Steps(NamedTuple):
    """What the steps of an epoch, or of a part of one, came to.

    Attributes:
      terms: the bound's terms `[num_steps]`, batch means.
      updated: `[num_steps]`, False where a step was skipped.
    """

    terms: Elbo
    updated: Array

    def mean(self) -> Elbo:
        """The terms' means over the steps that were not skipped; NaN if all were."""
        return jax.tree.map(lambda term: term.mean(where=self.updated), self.terms)


def epoch_rows(state: TrainState, num_rows: int, batch_size: int) -> Array:
    """The rows of an epoch's batches, `[num_steps, batch_size]`: a random order of all rows.

    The last `num_rows % batch_size` of them sit out, other ones in every epoch.

    Raises:
      ValueError: if batch_size exceeds the number of rows.
    """
    if batch_size > num_rows:
        raise ValueError(f"epoch: expected at least batch_size={batch_size} rows, got {num_rows}")
    rows = jax.random.permutation(_epoch_keys(state)[0], num_rows)
    return rows[: num_rows - num_rows % batch_size].reshape(-1, batch_size)


def make_epoch(
    led: LED,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    dynamic: bool = False,
    kl_warmup: float = 0.0,
    axis_name: str | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Array], tuple[TrainState, Steps]]:
    """Builds the function that trains for one epoch, as one compiled program.

    Args:
      led: the model.
      optimizer: the optimizer.
      batch_size: rows a step, on all devices together; the rows left over sit out, other ones in
        every epoch.
      dynamic: whether rows are grey levels 0..255, binarized afresh with P(1) = level / 255.
      kl_warmup: number of epochs over which the KL's weight rises to 1.
      axis_name: mapped axis over whose devices every batch is split evenly; None for one device
        alone.
      skip_nonfinite: leave the state as it was in steps that would give it, or the terms, a NaN or
        an infinity. Without, such a step spoils all later ones, which `is_finite` tells at the
        end of the epoch; checking every step takes time.

    Returns:
      `epoch(state, data) -> (state, steps)` for data `[n, *x_shape]` of uint8, the same on every
      device. The state passed in is consumed: its buffers are used for the new one.

    Raises:
      ValueError: if batch_size is not positive or, when called, exceeds the number of rows.
    """
    if batch_size < 1:
        raise ValueError(f"make_epoch: batch_size must be positive, got {batch_size}")
    make_step = partial(_make_step, led, optimizer, dynamic, kl_warmup, axis_name, skip_nonfinite)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: TrainState, data: Array) -> tuple[TrainState, Steps]:
        rows = epoch_rows(state, len(data), batch_size)
        if axis_name is not None:
            rows = device_part(rows, axis_name, axis=1)
        step = make_step(state, len(rows))
        (params, opt_state), result = jax.lax.scan(
            lambda carry, inputs: step(carry, (inputs[0], data[inputs[1]])),
            (state.params, state.opt_state),
            (jnp.arange(len(rows)), rows),
        )
        return TrainState(params, opt_state, state.key, state.epoch + 1), result

    return epoch


def make_steps(
    led: LED,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    dynamic: bool = False,
    kl_warmup: float = 0.0,
    axis_name: str | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Array, Array], tuple[TrainState, Steps]]:
    """As `make_epoch`, but of a part of an epoch, on batches that the caller picked.

    Args:
      led: the model.
      optimizer: the optimizer.
      num_steps: steps an epoch.
      dynamic: as in `make_epoch`.
      kl_warmup: as in `make_epoch`.
      axis_name: as in `make_epoch`.
      skip_nonfinite: as in `make_epoch`.

    Returns:
      `steps(state, first, x) -> (state, steps)` for the number of x's first step in the epoch and
      x `[k, n, *x_shape]` of uint8, the device's part of k batches. It consumes the state. The
      epoch's last step counts the epoch as finished.
    """
    make_step = partial(_make_step, led, optimizer, dynamic, kl_warmup, axis_name, skip_nonfinite)

    @partial(jax.jit, donate_argnums=0)
    def steps(state: TrainState, first: Array, x: Array) -> tuple[TrainState, Steps]:
        step = make_step(state, num_steps)
        numbers = first + jnp.arange(len(x))
        (params, opt_state), result = jax.lax.scan(
            step, (state.params, state.opt_state), (numbers, x)
        )
        finished = (first + len(x) == num_steps).astype(state.epoch.dtype)
        return TrainState(params, opt_state, state.key, state.epoch + finished), result

    return steps


def _epoch_keys(state: TrainState) -> Array:
    """Keys of an epoch's order and of its steps."""
    return jax.random.split(jax.random.fold_in(state.key, state.epoch))


def _make_step(
    led: LED,
    optimizer: optax.GradientTransformation,
    dynamic: bool,
    kl_warmup: float,
    axis_name: str | None,
    skip_nonfinite: bool,
    state: TrainState,
    num_steps: int,
):
    """The body of a scan over the steps of the epoch that `state` begins."""
    step_key, dtype = _epoch_keys(state)[1], jnp.result_type(float)

    def step(carry, inputs):
        i, x = inputs
        key, binarize_key = jax.random.split(jax.random.fold_in(step_key, i))
        x = x.astype(dtype)
        if dynamic:
            draw = device_rows(jax.random.uniform, binarize_key, x.shape, axis_name)
            x = (draw < x / 255).astype(dtype)
        kl_weight = 1.0
        if kl_warmup:
            kl_weight = jnp.minimum(1.0, (state.epoch + i / num_steps) / kl_warmup)
        params, opt_state, terms = train_step(
            led, optimizer, carry[0], carry[1], key, x, kl_weight, axis_name
        )
        new = params, opt_state
        if not skip_nonfinite:
            return new, Steps(terms, jnp.array(True))
        updated = is_finite((new, terms))
        return jax.tree.map(partial(jnp.where, updated), new, carry), Steps(terms, updated)

    return step


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
