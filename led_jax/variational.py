"""Fits a density to samples or to an unnormalised log-density: variational inference, no VAE.

Both ways take a density, parameters to start from and a key, and train by `training.epochs`.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from scipy.special import logsumexp

from led_jax.checks import checked
from led_jax.data import Dataset
from led_jax.densities import Density
from led_jax.numerics import as_float
from led_jax.objectives import Objective, maximum_likelihood
from led_jax.training import Progress, adam, fit

Params = Any
LogDensity = Callable[[Array], Array]
Callback = Callable[[Progress], object]

_STEPS_AN_EPOCH = 100
"""Steps between records, where there are no rows to pass over."""


class Fit(NamedTuple):
    """A fitted density's parameters.

    Attributes:
      params: by maximum likelihood those of the best epoch on the held-out samples, else the last.
      losses: `[num_epochs]`, the mean loss of each epoch's steps in nats.
      valid_losses: `[num_epochs]`, the mean loss of the samples held out; empty without any.
    """

    params: Params
    losses: np.ndarray
    valid_losses: np.ndarray


class Evidence(NamedTuple):
    """An estimate of log Z, the logarithm of an unnormalised density's integral, in nats.

    Everything here is computed from draws of q, and presumes that q reaches wherever p has mass: of
    a mode that q misses, none of these numbers can know.

    Attributes:
      log_z: log of the mean importance weight; too low on average, by less with more samples.
      standard_error: of `log_z`, from the spread of the weights. It means something where pareto_k
        is below 0.7.
      elbo: mean of the log-weights, a lower bound of log Z: the gap is KL(q || p).
      effective_sample_size: (sum w)^2 / sum w^2 of the weights w, from 1 to their number.
      pareto_k: shape of the weights' upper tail, see `pareto_k`.
    """

    log_z: float
    standard_error: float
    elbo: float
    effective_sample_size: float
    pareto_k: float


@checked
def to_samples(
    density: Density,
    params: Params,
    key: Array,
    samples: Array | np.ndarray,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    valid_fraction: float = 0.1,
    patience: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    callback: Callback = lambda progress: None,
) -> Fit:
    """Maximum likelihood: minimises KL(p || q) up to the constant entropy of p.

    A part of the samples is held out, and the parameters that score it best are returned: a
    flexible flow fits a few hundred rows far too closely otherwise.

    Args:
      density: q, whose `log_prob` should be its cheap direction.
      params: parameters to start from.
      key: PRNG key of the part held out and of the batches.
      samples: draws from p, `[n, *event_shape]`: floats, or integers, which become the default
        float.
      num_steps: steps to train, to a whole number of passes over the samples.
      batch_size: samples a step, at most all of them.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      valid_fraction: part of the samples to hold out; 0 holds none, and the last parameters count.
      patience: passes without a better held-out score after which it stops; None never does.
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after each pass.

    Returns:
      `Fit`; a loss is the batch's mean of -log q. A warning says so where the samples are so far
      from zero, for their spread, that q hardly begins to score them.

    Raises:
      ValueError: if a number is not positive, or samples are not finite.
    """
    samples = np.asarray(as_float("samples", samples))
    if not samples.ndim:
        raise ValueError("to_samples: samples must be [n, *event_shape], got a number")
    _check_positive(
        "to_samples",
        num_samples=len(samples),
        batch_size=batch_size,
        num_steps=num_steps,
        learning_rate=learning_rate,
    )
    if not np.isfinite(samples).all():
        rows = np.flatnonzero(~np.isfinite(samples).reshape(len(samples), -1).all(1))
        raise ValueError(
            f"to_samples: expected finite samples, got NaN or infinity in {len(rows)} rows, the "
            f"first of them row {rows[0]}"
        )
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"to_samples: valid_fraction must be in [0, 1), got {valid_fraction}")
    try:
        jax.eval_shape(density.log_prob, params, samples[:1])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"to_samples: samples or params do not fit the density: {error}"
        ) from error
    _warn_of_far_samples(density, params, samples)
    split_key, fit_key = jax.random.split(key)
    samples = samples[np.asarray(jax.random.permutation(split_key, len(samples)))]
    num_valid = int(valid_fraction * len(samples))
    valid, train = samples[:num_valid], samples[num_valid:]
    batch_size = min(batch_size, len(train))
    return _fit(
        density,
        params,
        fit_key,
        Dataset("samples", train.shape[1:], train, valid, valid[:0], _as_they_are),
        maximum_likelihood(),
        num_epochs=max(1, round(num_steps * batch_size / len(train))),
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        patience=patience,
        callback=callback,
    )


@checked
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
    optimizer: optax.GradientTransformation | None = None,
    callback: Callback = lambda progress: None,
) -> Fit:
    """Variational inference: minimises KL(q || p), with gradients through q's samples.

    Args:
      density: q, whose `sample_and_log_prob` should be its cheap direction.
      params: parameters to start from.
      key: PRNG key of the samples.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`; differentiable.
      num_steps: steps to train, to a whole number of hundreds where there are more than that.
      batch_size: samples a step.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      annealing_steps: steps until log p counts in full; its weight rises linearly from 1/10, so
        that q spreads over separate modes before it fits them (as Rezende and Mohamed, 2015,
        anneal, https://arxiv.org/abs/1505.05770).
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after every hundred steps.

    Returns:
      `Fit`; a loss is the batch's mean of log q - weight log p, after the annealing at least -log Z
      on average.

    Raises:
      ValueError: if a number is not positive (annealing_steps: negative, or not below num_steps),
        or log_density returns another shape.
    """

    def loss(model: Any, params: Params, own: Params, key: Array, x: Array, step: Array):
        weight = jnp.minimum(0.1 + 0.9 * step / annealing_steps, 1.0) if annealing_steps else 1.0
        log_p, log_q = _log_densities(model, params, key, log_density, batch_size)
        value = (log_q - weight * log_p).mean()
        return value, {"log_prob": -value}

    _check_positive(
        "to_log_density", num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate
    )
    if not 0 <= annealing_steps < num_steps:
        raise ValueError(
            f"to_log_density: annealing_steps must be from 0 to num_steps - 1 = {num_steps - 1}, "
            f"got {annealing_steps}"
        )
    steps = min(num_steps, _STEPS_AN_EPOCH)
    nothing = np.zeros((steps, 0), np.float32)  # A row without entries is a step.
    return _fit(
        density,
        params,
        key,
        Dataset("nothing", (0, 0), nothing, nothing[:0], nothing[:0], _as_they_are),
        Objective(lambda key, model, params, x: (), loss),
        num_epochs=round(num_steps / steps),
        batch_size=1,
        learning_rate=learning_rate,
        optimizer=optimizer,
        callback=callback,
    )


@checked
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
      `Evidence`, of Python floats. A warning says so where its Pareto k is above 0.7.

    Raises:
      ValueError: if there are not at least 25 samples, or log_density returns another shape.
    """
    if num_samples < 25:
        raise ValueError(f"evidence: num_samples must be 25 or more, got {num_samples}")
    log_p, log_q = _log_densities(density, params, key, log_density, num_samples)
    log_weights = np.asarray(log_p - log_q, np.float64)
    log_z = np.logaddexp.reduce(log_weights) - math.log(num_samples)
    weights = np.exp(log_weights - log_z)
    k = pareto_k(log_weights)
    if not k <= 0.7:
        warnings.warn(
            f"evidence: the importance weights have a Pareto k of {k:.2f}, above 0.7: their tail "
            "is too heavy for log_z and its error to be trusted. Fit the density longer, or take "
            "a more flexible one",
            stacklevel=2,
        )
    return Evidence(
        log_z=float(log_z),
        standard_error=float(weights.std(ddof=1) / math.sqrt(num_samples)),
        elbo=float(log_weights.mean()),
        effective_sample_size=float(weights.sum() ** 2 / (weights**2).sum()),
        pareto_k=k,
    )


def pareto_k(log_weights: Array | np.ndarray) -> float:
    """Shape k of a generalised Pareto distribution fitted to the largest importance weights.

    Weights have finite moments up to the order 1 / k: below 0.5 an estimate's error falls as
    1 / sqrt(n), and above 0.7 it is not to be trusted. Vehtari et al. (2024), section 3,
    https://arxiv.org/abs/1507.02646, by the estimator of Zhang and Stephens (2009).

    Args:
      log_weights: logarithms of the weights, up to a constant, `[n]`.

    Returns:
      k; 0 where the largest weights are all equal.

    Raises:
      ValueError: if there are fewer than 25 weights, or one of them is not a number.
    """
    log_weights = np.sort(np.asarray(log_weights, np.float64))
    if log_weights.ndim != 1 or len(log_weights) < 25 or not log_weights[-1] < math.inf:
        raise ValueError(
            "pareto_k: expected 25 or more log-weights [n], none NaN or +inf, got shape "
            f"{log_weights.shape}"
        )
    weights = np.exp(log_weights - log_weights[-1])
    size = math.ceil(min(0.2 * len(weights), 3 * math.sqrt(len(weights))))
    excess = weights[-size:] - weights[-size - 1]
    excess = excess[excess > 0]
    if len(excess) < 5:
        return 0.0
    # A weighted mean over a grid of b = -k / scale, by the profile likelihood.
    grid_size = 30 + math.isqrt(len(excess))
    grid = 1 - np.sqrt(grid_size / (np.arange(grid_size) + 0.5))
    grid = grid / (3 * excess[int(len(excess) / 4 + 0.5) - 1]) + 1 / excess[-1]
    k = np.log1p(-grid[:, None] * excess).mean(1)
    log_likelihood = len(excess) * (np.log(-grid / k) - k - 1)
    b = grid @ np.exp(log_likelihood - logsumexp(log_likelihood))
    k = np.log1p(-b * excess).mean()
    # A weak prior at 0.5 steadies it.
    return float((len(excess) * k + 10 * 0.5) / (len(excess) + 10))


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


def _as_they_are(key: Array, rows: Array) -> Array:
    return rows


def _fit(
    density: Density,
    params: Params,
    key: Array,
    dataset: Dataset,
    objective: Objective,
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    optimizer: optax.GradientTransformation | None,
    patience: int | None = None,
    callback: Callback,
) -> Fit:
    if optimizer is None:
        optimizer = adam(learning_rate, num_epochs * (len(dataset.train) // batch_size))
    losses = []

    def record(progress: Progress) -> None:
        losses.append(-progress.train["log_prob"])
        callback(progress)

    def score(model: Any, params: Params, key: Array, x: Array) -> dict[str, Array]:
        return {"log_prob": model.log_prob(params, x)}

    progress = fit(
        density._replace(init=lambda key, x, context=None: params),
        optimizer,
        dataset,
        key,
        num_epochs,
        objective=objective,
        batch_size=batch_size,
        score=score,
        select="log_prob",
        patience=patience,
        callback=record,
    )
    valid = [-r["valid_log_prob"] for r in progress.history]
    return Fit(progress.params, np.array(losses), np.array(valid))


def _warn_of_far_samples(density: Density, params: Params, samples: np.ndarray) -> None:
    far = np.abs(samples.mean(0)) > 100 * samples.std(0)
    if not far.any():
        return
    score = float(jax.jit(density.log_prob)(params, samples[:256]).mean())
    if score < -100 * samples[0].size:
        warnings.warn(
            f"to_samples: means of up to {np.abs(samples.mean(0)).max():.3g} lie over 100 standard "
            f"deviations from zero, and the density starts at {score:.3g} nats a sample: "
            "standardise the samples, or let the flow begin with flows.invert(flows.actnorm()) and "
            "initialise it with them",
            stacklevel=4,
        )


def _check_positive(name: str, **numbers: float) -> None:
    for argument, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: {argument} must be positive and finite, got {number}")
