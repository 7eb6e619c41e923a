"""Fits a density to samples or to an unnormalised log-density: variational inference, no VAE.

Both ways take a density, parameters to start from and a key, and train by `training.epochs`.
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
"""Steps between records, where there are no rows to pass over."""

_CHOICE_SAMPLES = 4096
"""Fresh samples of each restart, by which the best is chosen."""


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

    A part of the samples is held out, and the parameters that score it best are returned: a
    flexible flow fits a few hundred rows far too closely otherwise.

    Args:
      density: q, whose `log_prob` should be its cheap direction.
      params: parameters to start from; with restarts those of each along a first axis, as from
        `jax.vmap(density.init, (0, None))`.
      key: PRNG key of the part held out and of the batches.
      samples: draws from p, `[n, *event_shape]`: floats, or integers, which become the default
        float.
      num_steps: steps to train, to a whole number of passes over the samples.
      batch_size: samples a step, at most all of them.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      valid_fraction: part of the samples to hold out; 0 holds none, and the last parameters count.
      patience: passes without a better held-out score after which it stops; None never does.
      num_restarts: number of fits, in one program side by side, on the same batches, each with an
        optimizer of its own; the pass and the fit that score the held-out samples best are
        returned. None takes params as one start.
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after each pass.
      context: `[n, context_dim]`, one for each sample.

    Returns:
      `Fit`; a loss is the batch's mean of -log q. With restarts the losses are the means over all
      of them, those of held-out samples the best one's. A warning says so where the samples are
      so far from zero, for their spread, that q hardly begins to score them.

    Raises:
      ValueError: if a number is not positive, samples or contexts are not finite, there are not
        as many contexts as samples, params are not those of so many restarts, or restarts have no
        samples held out to be chosen by.
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

    A second call compiles nothing where density, log_density (the same function), optimizer and
    all numbers are those of a call before.

    Args:
      density: q, whose `sample_and_log_prob` should be its cheap direction.
      params: parameters to start from; with restarts those of each along a first axis, as from
        `jax.vmap(density.init, (0, None))`.
      key: PRNG key of the samples.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`; differentiable.
      num_steps: steps to train, to a whole number of hundreds where there are more than that.
      batch_size: samples a step.
      learning_rate: Adam's rate at the start of a cosine decay to zero.
      annealing_steps: steps until log p counts in full; its weight rises linearly from 1/10, so
        that q spreads over separate modes before it fits them (as Rezende and Mohamed, 2015,
        anneal, https://arxiv.org/abs/1505.05770).
      path_gradient: leave the score of q out of the gradient, which is then that of the samples'
        paths and has no noise where q is p: "sticking the landing", as `objectives.stl`. The
        density scores its own samples a second time, which inverts a flow at every step.
      num_restarts: number of fits, in one program side by side, each with samples and optimizer of
        its own; the one with the least KL on fresh samples is returned. None takes params as one
        start.
      optimizer: any optax transformation; None takes Adam at `learning_rate`.
      callback: called with `training.Progress` after every hundred steps.

    Returns:
      `Fit`; a loss is the batch's mean of log q - weight log p, after the annealing at least -log Z
      on average. With restarts the losses are the means over all of them.

    Raises:
      ValueError: if a number is not positive (annealing_steps: negative, or not below num_steps),
        log_density returns another shape, or params are not those of so many restarts.
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
    nothing = np.zeros((steps, 0), np.float32)  # A row without entries is a step.
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
    measure = once_for_equal(_restart_losses, density, log_density, num_restarts)
    losses = measure(result.params, choice_key)
    return _restart(result, int(np.argmin(np.nan_to_num(losses, nan=np.inf))))


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
    return evidence_from(log_weights(density, params, key, log_density, num_samples))


@checked
def log_weights(
    density: Density, params: Params, key: Array, log_density: LogDensity, num_samples: int
) -> Array:
    """Logarithms of importance weights, log p(x) - log q(x) at samples x of q, `[num_samples]`.

    The arguments are those of `evidence`; under `jit` and `vmap` it serves many keys at once.
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
      log_weights: `[n]`, as of `log_weights`.

    Raises:
      ValueError: if there are fewer than 25 weights, or one of them is not a number.
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
    """Samples of p by importance resampling: samples of q, drawn again by their weights.

    Rubin (1988), sampling importance resampling. In the limit of many proposals the samples are
    from p itself, not from q; what `evidence` says of the weights says how far that is trusted.
    Draws are systematic (Kitagawa, 1996): each proposal comes as often as its share of the weights
    says, rounded up or down, in random order.

    Args:
      density: q, of which proposals are drawn.
      params: its parameters.
      key: PRNG key.
      log_density: log p up to a constant, from `[n, *event_shape]` to `[n]`.
      num_samples: number of samples; those above the effective sample size are mostly repeated.
      num_proposals: number of draws from q.

    Returns:
      `[num_samples, *event_shape]`.

    Raises:
      ValueError: if a number is not positive, or log_density returns another shape.
    """
    _check_positive("resample", num_samples=num_samples, num_proposals=num_proposals)
    key, draw_key, order_key = jax.random.split(key, 3)
    x, log_q = density.sample_and_log_prob(params, key, (num_proposals,))
    log_weights = _checked(log_density, x) - log_q
    if not isinstance(log_weights, Tracer) and not bool((log_weights < jnp.inf).all()):
        raise ValueError("resample: expected log-weights, log p - log q, none NaN or +inf")
    shares = jnp.cumsum(jax.nn.softmax(log_weights))
    points = jnp.arange(num_samples) + jax.random.uniform(draw_key)
    rows = jnp.searchsorted(shares / shares[-1], points / num_samples)
    rows = jnp.minimum(rows, num_proposals - 1)  # Rounding may take the last point to 1.
    return x[jax.random.permutation(order_key, rows)]


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
    log_weights = np.asarray(as_real("pareto_k: log_weights", log_weights), np.float64)
    if log_weights.ndim != 1 or len(log_weights) < 25 or not log_weights.max() < math.inf:
        raise ValueError(
            "pareto_k: expected 25 or more log_weights [n], none NaN or +inf, got shape "
            f"{log_weights.shape}"
        )
    weights = np.sort(np.exp(log_weights - log_weights.max()))
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

    A tuple, which equals another one of equal fields: so `training` finds the program of an earlier
    call again.
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
    """The sum of an objective over restarts, whose parameters lie along a first axis."""

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
        # One that diverges stands still (see `_of_each`), and does not hold up the others.
        is_good = jnp.isfinite(values)
        total = jnp.where(is_good, values, 0).sum()
        return total, {"log_prob": -total / is_good.sum()}


class _ScoreOfRestarts(NamedTuple):
    """`_score` of each restart, by its number."""

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


@lru_cache(maxsize=16)
def _restart_losses(density: Density, log_density: LogDensity, num_restarts: int) -> Any:
    """Minus the mean log-weight of each restart, on fresh samples: a function of params and key."""

    def loss(params: Params, key: Array) -> Array:
        return -log_weights(density, params, key, log_density, _CHOICE_SAMPLES).mean()

    return jax.jit(lambda params, key: jax.vmap(loss)(params, jax.random.split(key, num_restarts)))


@lru_cache(maxsize=16)
def _default_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    return adam(learning_rate, num_steps)


@lru_cache(maxsize=16)
def _of_each(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for every entry of the parameters' first axis by itself.

    An entry whose gradient is not finite stays where it is.
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
    """The fit, and the restart that scored held-out samples best in the best epoch."""
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
            "standardise the samples, or let the flow begin with flows.invert(flows.actnorm()) and "
            "initialise it with them",
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
