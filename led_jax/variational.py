"""Fits a density to samples or to an unnormalised log-density, without a VAE.

`to_samples` and `to_log_density` both take a density, initial parameters and a key, and train by
`training.fit`.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from scipy.special import logsumexp

from led_jax.checks import checked
from led_jax.data import Dataset
from led_jax.densities import Density
from led_jax.numerics import as_float, as_real
from led_jax.objectives import Objective, maximum_likelihood
from led_jax.training import Progress, TrainState, adam, fit, once_for_equal

Params = Any
LogDensity = Callable[[Array], Array]
Callback = Callable[[Progress], object]

_STEPS_AN_EPOCH = 100
"""Number of steps that count as an epoch in `to_log_density`, which has no data."""

_CHOICE_SAMPLES = 4096
"""Number of fresh samples of each restart by which `to_log_density` chooses the best."""


class Fit(NamedTuple):
    """A fitted density's parameters.

    Attributes:
      params: the parameters after the epoch with the lowest loss of held-out samples; without
        held-out samples, after the last epoch.
      losses: `[num_epochs]`, the mean loss of each epoch's steps in nats.
      valid_losses: `[num_epochs]`, the mean loss of the held-out samples; empty without any.
    """

    params: Params
    losses: np.ndarray
    valid_losses: np.ndarray


class Evidence(NamedTuple):
    """An estimate of log Z, the logarithm of an unnormalised density's integral, in nats.

    All attributes are computed from samples of q, and assume that q has mass wherever p has: none
    of them shows a mode of p that q misses.

    Attributes:
      log_z: log of the mean importance weight; too low on average, by less with more samples.
      standard_error: standard error of `log_z`, from the spread of the weights. It is reliable only
        if pareto_k is below 0.7.
      elbo: mean of the log-weights, a lower bound of log Z in expectation: the gap is KL(q || p).
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
    num_restarts: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    callback: Callback = lambda progress: None,
    context: Array | np.ndarray | None = None,
) -> Fit:
    """Maximum likelihood: minimises KL(p || q) up to the constant entropy of p.

    With a context for each sample, q is the conditional density q(x|c), and samples of (x, c) from
    a simulator give the posterior of x at every c: neural posterior estimation (Papamakarios and
    Murray, 2016, https://arxiv.org/abs/1605.06376). `densities.standardised` brings samples and
    contexts to mean 0 and variance 1 within q.

    A fraction of the samples is held out, and the parameters with the best held-out score are
    returned: a flexible flow overfits to a few hundred rows otherwise.

    Args:
      density: q, whose `log_prob` should be its cheap direction.
      params: initial parameters; with restarts, those of all restarts stacked along a first axis,
        as from `jax.vmap(density.init, (0, None))`.
      key: PRNG key of the choice of held-out samples and of the batches.
      samples: draws from p, `[n, *event_shape]`: floats, or integers, which become the default
        float.
      num_steps: number of steps, rounded to a whole number of passes over the samples.
      batch_size: samples a step; reduced to the number of training samples if there are fewer.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      valid_fraction: fraction of the samples to hold out; with 0, the last parameters are returned.
      patience: passes without a better held-out score after which training stops; None never stops.
      num_restarts: number of fits that run side by side in one program, on the same batches, each
        with its own optimizer state; the parameters of the fit and the pass with the best held-out
        score are returned. None runs one fit, whose params have no first axis of restarts.
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after each pass.
      context: `[n, context_dim]`, one for each sample.

    Returns:
      `Fit`; a loss is the batch's mean of -log q. With restarts, `losses` are means over all of
      them, and `valid_losses` those of the best one in each pass. Warns if the samples are far from
      zero, relative to their spread, and the initial q gives them a very low density.

    Raises:
      ValueError: if a number is not positive, samples or contexts are not finite, there are not as
        many contexts as samples, params do not have num_restarts entries along their first axis,
        or there are restarts but no held-out samples to choose by.
      FloatingPointError: as in `training.epochs`.
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
    _check_finite("samples", samples)
    if context is not None:
        context = np.asarray(as_float("context", context))
        if context.ndim != 2 or len(context) != len(samples):
            raise ValueError(
                f"to_samples: expected a context [{len(samples)}, context_dim], one row for each "
                f"sample, got {context.shape}"
            )
        _check_finite("context", context)
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"to_samples: valid_fraction must be in [0, 1), got {valid_fraction}")
    _check_restarts("to_samples", params, num_restarts)
    num_valid = int(valid_fraction * len(samples))
    if num_restarts is not None and not num_valid:
        raise ValueError(
            f"to_samples: expected a valid_fraction that holds samples out, by which the best of "
            f"{num_restarts} restarts is chosen, got {valid_fraction} of {len(samples)} samples"
        )
    try:
        some = None if context is None else context[:256]
        one = params if num_restarts is None else jax.tree.map(lambda leaf: leaf[0], params)
        jax.eval_shape(density.log_prob, one, samples[:256], some)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"to_samples: samples or params do not fit the density: {error}"
        ) from error
    _warn_of_far_samples(density, one, samples, some)
    split_key, fit_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(split_key, len(samples)))
    parts = {"train": order[num_valid:], "valid": order[:num_valid], "test": order[:0]}
    batch_size = min(batch_size, len(parts["train"]))
    dataset = Dataset(
        "samples",
        samples.shape[1:],
        **{name: samples[part] for name, part in parts.items()},
        prepare=_as_they_are,
        context=context if context is None else {n: context[part] for n, part in parts.items()},
    )
    result, best = _fit(
        density,
        params,
        fit_key,
        dataset,
        maximum_likelihood(),
        num_epochs=max(1, round(num_steps * batch_size / len(dataset.train))),
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        num_restarts=num_restarts,
        patience=patience,
        callback=callback,
    )
    return result if num_restarts is None else _restart(result, best)


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
    path_gradient: bool = False,
    num_restarts: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    callback: Callback = lambda progress: None,
) -> Fit:
    """Variational inference: minimises KL(q || p), with gradients through q's samples.

    A second call compiles nothing if density, log_density (the same function object), optimizer and
    all numbers are those of an earlier call.

    Args:
      density: q, whose `sample_and_log_prob` should be its cheap direction.
      params: initial parameters; with restarts, those of all restarts stacked along a first axis,
        as from `jax.vmap(density.init, (0, None))`.
      key: PRNG key of the samples.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`; differentiable.
      num_steps: number of steps; above 100, it is rounded to a multiple of 100.
      batch_size: samples a step.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      annealing_steps: number of steps in which the weight of log p rises linearly from 1/10 to 1,
        so that q spreads over separate modes before it fits them (as in Rezende and Mohamed, 2015,
        https://arxiv.org/abs/1505.05770). 0 does not anneal.
      path_gradient: whether to leave the score of q out of the gradient. What remains, the gradient
        through the samples, has no noise if q = p: "sticking the landing", as `objectives.stl`. The
        density scores its own samples a second time, which inverts a flow at every step.
      num_restarts: number of fits that run side by side in one program, each with its own samples
        and optimizer state; the one with the smallest KL on fresh samples is returned. None runs
        one fit, whose params have no first axis of restarts.
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after every hundred steps.

    Returns:
      `Fit`; a loss is the batch's mean of log q - weight log p. After annealing its expectation is
      at least -log Z. With restarts, the losses are means over all of them.

    Raises:
      ValueError: if a number is not positive (annealing_steps: negative, or not below num_steps),
        log_density returns another shape, or params do not have num_restarts entries along their
        first axis.
      FloatingPointError: if no step of an epoch is finite, or as in `training.epochs`.
    """
    _check_positive(
        "to_log_density", num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate
    )
    if not 0 <= annealing_steps < num_steps:
        raise ValueError(
            f"to_log_density: annealing_steps must be from 0 to num_steps - 1 = {num_steps - 1}, "
            f"got {annealing_steps}"
        )
    _check_restarts("to_log_density", params, num_restarts)
    steps = min(num_steps, _STEPS_AN_EPOCH)
    nothing = np.zeros((steps, 0), np.float32)  # Each empty row makes one step.
    fit_key, choice_key = jax.random.split(key)
    divergence = _Divergence(log_density, batch_size, annealing_steps, path_gradient)
    try:
        result, _ = _fit(
            density,
            params,
            key if num_restarts is None else fit_key,
            Dataset("nothing", (0, 0), nothing, nothing[:0], nothing[:0], _as_they_are),
            Objective(_nothing, divergence),
            num_epochs=round(num_steps / steps),
            batch_size=1,
            learning_rate=learning_rate,
            optimizer=optimizer,
            num_restarts=num_restarts,
            callback=callback,
        )
    except FloatingPointError as error:
        raise FloatingPointError(
            f"to_log_density: {error}. A log-density whose support has borders is NaN or infinite "
            "beyond them: end the flow in the support, by flows.softplus, sigmoid, exp or simplex, "
            "or flows.on for some of the entries"
        ) from error
    if num_restarts is None:
        return result
    measure = _restart_losses(density, log_density, num_restarts)
    losses = measure(result.params, choice_key)
    return _restart(result, int(np.argmin(np.nan_to_num(losses, nan=np.inf))))


@checked
def evidence(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int = 10_000
) -> Evidence:
    """Estimates log Z by importance sampling from the density.

    Args:
      density: q, from which samples are drawn.
      params: its parameters.
      key: PRNG key.
      log_density: unnormalised log p, whose log Z is estimated, from `[n, *event_shape]` to `[n]`.
      num_samples: number of samples.

    Returns:
      `Evidence`, of Python floats. Warns if the Pareto k is above 0.7.

    Raises:
      ValueError: if there are not at least 25 samples, log_density returns another shape, a
        log-weight is NaN or +inf, or all of them are -inf.
    """
    if num_samples < 25:
        raise ValueError(f"evidence: num_samples must be 25 or more, got {num_samples}")
    return evidence_from(log_weights(density, params, key, log_density, num_samples))


@checked
def log_weights(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int
) -> Array:
    """Logarithms of importance weights, log p(x) - log q(x) at samples x of q, `[num_samples]`.

    The arguments are those of `evidence`. It may be called within `jit`, and `vmap` over keys.

    Raises:
      ValueError: if num_samples is not positive, or log_density returns another shape.
    """
    if num_samples < 1:
        raise ValueError(f"log_weights: num_samples must be 1 or more, got {num_samples}")
    log_p, log_q = _log_densities(density, params, key, log_density, num_samples)
    return log_p - log_q


def evidence_from(log_weights: Array | np.ndarray) -> Evidence:
    """`evidence` from logarithms of importance weights, log p - log q at samples of q.

    >>> estimate = evidence_from(np.full(50, 3.0))
    >>> round(estimate.log_z, 6), round(estimate.effective_sample_size, 6)
    (3.0, 50.0)

    Args:
      log_weights: `[n]`, as from the function `log_weights`.

    Raises:
      ValueError: if there are fewer than 25 weights, a logarithm is NaN or +inf, or all are -inf.
    """
    log_weights = np.asarray(as_real("evidence_from: log_weights", log_weights), np.float64)
    k = pareto_k(log_weights)
    log_z = np.logaddexp.reduce(log_weights) - math.log(len(log_weights))
    weights = np.exp(log_weights - log_z)
    if not k <= 0.7:
        warnings.warn(
            f"evidence: the importance weights have a Pareto k of {k:.2f}, above 0.7: their tail "
            "is too heavy for log_z and its error to be trusted. Fit the density longer, or take "
            "a more flexible one",
            stacklevel=2,
        )
    return Evidence(
        log_z=float(log_z),
        standard_error=float(weights.std(ddof=1) / math.sqrt(len(weights))),
        elbo=float(log_weights.mean()),
        effective_sample_size=float(weights.sum() ** 2 / (weights**2).sum()),
        pareto_k=k,
    )


@checked
def resample(
    density: Density,
    params: Params,
    key: Array,
    log_density: LogDensity,
    num_samples: int,
    num_proposals: int = 10_000,
) -> Array:
    """Samples of p by importance resampling: samples of q are drawn again by their weights.

    Rubin (1988), sampling importance resampling. In the limit of many proposals the samples are
    from p itself, not from q; the Pareto k of `evidence` tells whether to trust this. Resampling is
    systematic (Kitagawa, 1996): a proposal with the share w of all weights occurs w * num_samples
    times, rounded up or down. The order is random.

    Args:
      density: q, from which proposals are drawn.
      params: its parameters.
      key: PRNG key.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`.
      num_samples: number of samples; if it is above the effective sample size, many are repeated.
      num_proposals: number of draws from q.

    Returns:
      `[num_samples, *event_shape]`.

    Raises:
      ValueError: if a number is not positive, log_density returns another shape, or (unless traced)
        a log-weight is NaN or +inf, or all of them are -inf.
    """
    _check_positive("resample", num_samples=num_samples, num_proposals=num_proposals)
    key, draw_key, order_key = jax.random.split(key, 3)
    x, log_q = density.sample_and_log_prob(params, key, (num_proposals,))
    log_weights = _checked(log_density, x) - log_q
    largest = log_weights.max()  # NaN if one of them is.
    if not isinstance(largest, Tracer) and not bool(jnp.isfinite(largest)):
        raise ValueError(
            "resample: expected log-weights, log p - log q, of which none is NaN or +inf and some "
            f"are finite; the largest is {largest}"
        )
    shares = jnp.cumsum(jax.nn.softmax(log_weights))
    points = jnp.arange(num_samples) + jax.random.uniform(draw_key)
    rows = jnp.searchsorted(shares / shares[-1], points / num_samples)
    rows = jnp.minimum(rows, num_proposals - 1)  # Rounding may take the last point to 1.
    return x[jax.random.permutation(order_key, rows)]


def pareto_k(log_weights: Array | np.ndarray) -> float:
    """Shape k of a generalised Pareto distribution fitted to the largest importance weights.

    Weights have finite moments up to the order 1 / k. For k below 0.5 the error of an estimate
    falls as 1 / sqrt(n); above 0.7 estimates are not reliable. Vehtari et al. (2024), section 3,
    https://arxiv.org/abs/1507.02646, with the estimator of Zhang and Stephens (2009).

    Args:
      log_weights: logarithms of the weights, up to a constant, `[n]`.

    Returns:
      k. If fewer than five of the largest weights exceed the next smaller one, it is 0 where their
      excess over it is less than a tenth of all weight, as when all are equal, and infinity
      otherwise.

    Raises:
      ValueError: if there are fewer than 25 weights, a logarithm is NaN or +inf, or all are -inf.
    """
    log_weights = np.asarray(as_real("pareto_k: log_weights", log_weights), np.float64)
    if log_weights.ndim != 1 or len(log_weights) < 25 or not math.isfinite(log_weights.max()):
        raise ValueError(
            "pareto_k: expected 25 or more log_weights [n], of which none is NaN or +inf and some "
            f"are finite; got shape {log_weights.shape}"
            + (f" and a largest of {log_weights.max()}" if log_weights.size else "")
        )
    weights = np.sort(np.exp(log_weights - log_weights.max()))
    size = math.ceil(min(0.2 * len(weights), 3 * math.sqrt(len(weights))))
    excess = weights[-size:] - weights[-size - 1]
    excess = excess[excess > 0]
    if len(excess) < 5:  # Too few for a fit. Estimates rest on them if they carry much weight.
        return 0.0 if excess.sum() < 0.1 * weights.sum() else math.inf
    # A weighted mean over a grid of b = -k / scale, by the profile likelihood.
    grid_size = 30 + math.isqrt(len(excess))
    grid = 1 - np.sqrt(grid_size / (np.arange(grid_size) + 0.5))
    grid = grid / (3 * excess[int(len(excess) / 4 + 0.5) - 1]) + 1 / excess[-1]
    k = np.log1p(-grid[:, None] * excess).mean(1)
    log_likelihood = len(excess) * (np.log(-grid / k) - k - 1)
    b = grid @ np.exp(log_likelihood - logsumexp(log_likelihood))
    k = np.log1p(-b * excess).mean()
    # A weak prior at 0.5, worth 10 weights, reduces the variance of k.
    return float((len(excess) * k + 10 * 0.5) / (len(excess) + 10))


def _log_densities(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int
) -> tuple[Array, Array]:
    """log p(x) and log q(x) at samples x of q, each `[num_samples]`."""
    x, log_prob = density.sample_and_log_prob(params, key, (num_samples,))
    return _checked(log_density, x), log_prob


def _checked(log_density: LogDensity, x: Array) -> Array:
    try:
        target = log_density(x)
    except TypeError as error:
        raise TypeError(
            f"log_density: expected a function of jax.numpy from {x.shape} to [{len(x)}]; jax.vmap "
            f"makes one of a function of a single point: {error}"
        ) from error
    if jnp.shape(target) != x.shape[:1]:
        raise ValueError(
            f"log_density: expected {len(x)} values, [{len(x)}], for an x of shape "
            f"{x.shape}, got {jnp.shape(target)}; sum over the event's axes only"
        )
    return target


def _as_they_are(key: Array, rows: Array) -> Array:
    return rows


def _score(
    model: Density, params: Params, key: Array, x: Array, context: Array | None = None
) -> dict[str, Array]:
    return {"log_prob": model.log_prob(params, x, context)}


class _Divergence(NamedTuple):
    """E_q[log q - weight log p].

    A NamedTuple, which equals another one with equal fields: so `training` reuses the program that
    an earlier call compiled.
    """

    log_density: LogDensity
    batch_size: int
    annealing_steps: int
    path_gradient: bool

    def __call__(
        self, model: Density, params: Params, own: Params, key: Array, rows: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        weight = 1.0
        if self.annealing_steps:
            weight = jnp.minimum(0.1 + 0.9 * step / self.annealing_steps, 1.0)
        x, log_q = model.sample_and_log_prob(params, key, (self.batch_size,))
        if self.path_gradient:
            log_q = model.log_prob(jax.lax.stop_gradient(params), x)
        value = (log_q - weight * _checked(self.log_density, x)).mean()
        return value, {"log_prob": -value}


class _OfRestarts(NamedTuple):
    """The sum of an objective over restarts, whose parameters are stacked along a first axis."""

    objective: Objective
    num_restarts: int

    def __call__(
        self,
        model: Density,
        params: Params,
        own: Params,
        key: Array,
        rows: Array,
        step: Array,
        *context: Array,
    ) -> tuple[Array, dict[str, Array]]:
        def loss(params: Params, key: Array) -> Array:
            return self.objective.loss(model, params, own, key, rows, step, *context)[0]

        values = jax.vmap(loss)(params, jax.random.split(key, self.num_restarts))
        # A restart that diverges stops (see `_of_each`), and does not affect the others.
        is_good = jnp.isfinite(values)
        total = jnp.where(is_good, values, 0).sum()
        return total, {"log_prob": -total / is_good.sum()}


class _ScoreOfRestarts(NamedTuple):
    """`_score` of each restart, under its number as the name."""

    num_restarts: int

    def __call__(
        self,
        model: Density,
        params: Params,
        key: Array,
        x: Array,
        context: Array | None = None,
    ) -> dict[str, Array]:
        log_probs = jax.vmap(model.log_prob, (0, None, None))(params, x, context)
        return {str(i): log_probs[i] for i in range(self.num_restarts)}


def _best(valid: dict[str, float]) -> float:
    """The best restart's score; NaN where none has one."""
    return max((v for v in valid.values() if not math.isnan(v)), default=math.nan)


def _restart(result: Fit, number: int) -> Fit:
    return result._replace(params=jax.tree.map(lambda leaf: leaf[number], result.params))


@once_for_equal
def _restart_losses(density: Density, log_density: LogDensity, num_restarts: int) -> Any:
    """A function of params and key: minus the mean log-weight of each restart on fresh samples."""

    def loss(params: Params, key: Array) -> Array:
        return -log_weights(density, params, key, log_density, _CHOICE_SAMPLES).mean()

    return jax.jit(lambda params, key: jax.vmap(loss)(params, jax.random.split(key, num_restarts)))


@lru_cache(maxsize=16)
def _default_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    return adam(learning_rate, num_steps)


@lru_cache(maxsize=16)
def _of_each(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer with a separate state for every entry of the parameters' first axis.

    An entry whose gradient is not finite is not updated.
    """
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=2**30)
    return optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))


def _nothing(key: Array, model: Any, params: Params, x: Array) -> Params:
    return ()


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
    num_restarts: int | None = None,
    patience: int | None = None,
    callback: Callback,
) -> tuple[Fit, int]:
    """The fit, and the number of the restart with the best held-out score in the best epoch."""
    if optimizer is None:
        num_steps = num_epochs * (len(dataset.train) // batch_size)
        optimizer = _default_optimizer(learning_rate, num_steps)
    score, select = _score, "log_prob"
    if num_restarts is not None:
        optimizer = _of_each(optimizer)
        objective = Objective(_nothing, _OfRestarts(objective, num_restarts))
        score, select = _ScoreOfRestarts(num_restarts), _best
    losses = []

    def record(progress: Progress) -> None:
        if not progress.train:
            raise FloatingPointError(
                f"the log-density or its gradient is finite in none of {progress.skipped} steps"
            )
        losses.append(-progress.train["log_prob"])
        callback(progress)

    params = jax.tree.map(jnp.asarray, params)
    start = TrainState(params, (), optimizer.init((params, ())), key, jnp.zeros((), jnp.int32))
    progress = fit(
        density,
        optimizer,
        dataset,
        key,
        num_epochs,
        objective=objective,
        batch_size=batch_size,
        score=score,
        select=select,
        patience=patience,
        callback=record,
        resume=Progress(start, start),
    )
    scores = {
        record["epoch"]: [v for name, v in record.items() if name.startswith("valid_")]
        for record in progress.history
    }
    best = np.nanargmax(scores[int(progress.best.epoch)]) if scores else 0
    valid = [-np.nanmax(score) for score in scores.values()]
    return Fit(progress.params, np.array(losses), np.array(valid)), int(best)


def _warn_of_far_samples(
    density: Density, params: Params, samples: np.ndarray, context: np.ndarray | None
) -> None:
    far = np.abs(samples.mean(0)) > 100 * samples.std(0)
    if not far.any():
        return
    score = float(jax.jit(density.log_prob)(params, samples[:256], context).mean())
    if score < -100 * samples[0].size:
        warnings.warn(
            f"to_samples: means of up to {np.abs(samples.mean(0)).max():.3g} lie over 100 standard "
            f"deviations from zero, and the density starts at {score:.3g} nats a sample: "
            "standardise the samples, or take densities.standardised(density), initialised with "
            "them",
            stacklevel=4,
        )


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
        raise ValueError(
            f"to_samples: expected finite {name}, got NaN or infinity in {len(rows)} rows, the "
            f"first of them row {rows[0]}"
        )


def _check_restarts(name: str, params: Params, num_restarts: int | None) -> None:
    if num_restarts is None:
        return
    _check_positive(name, num_restarts=num_restarts)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if lengths - {(num_restarts,)}:
        raise ValueError(
            f"{name}: expected params of {num_restarts} restarts along the first axis, got leaves "
            f"with {sorted(lengths)}"
        )


def _check_positive(name: str, **numbers: float) -> None:
    for argument, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: {argument} must be positive and finite, got {number}")
