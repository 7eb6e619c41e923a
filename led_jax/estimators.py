"""Estimators for a trained LED: tighter bounds, the NLL, marginal matching, active units."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from led_jax.checks import checked
from led_jax.encoders import Encoding
from led_jax.model import LED
from led_jax.numerics import as_real, log_mean_exp
from led_jax.sharding import Placement, one_device

Params = Any


@checked
def importance_weighted_bound(
    led: LED,
    params: Params,
    key: Array,
    x: Array,
    num_samples: int,
    context: Array | None = None,
) -> Array:
    """log 1/K sum_k p(x, z_k) / q(z_k|x), a lower bound on log p(x) that tightens with K.

    Burda, Grosse and Salakhutdinov (2016), eq. 8, https://arxiv.org/abs/1509.00519.

    Args:
      led: the model.
      params: its parameters.
      key: PRNG key.
      x: data `[..., *x_shape]`.
      num_samples: K, all held in memory at once.
      context: `[..., C]`, what the model is conditional on.

    Returns:
      The bound in nats, `[...]`; K = 1 gives the ELBO.

    Raises:
      ValueError: if num_samples is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"bound: expected num_samples of 1 or more, got {num_samples}")
    log_weights = led.elbo(params, key, x, (num_samples,), context=context).bound
    return log_mean_exp(log_weights, axis=0)


class NLL(NamedTuple):
    """An importance-sampled estimate of -E[log p(x)], in nats.

    Attributes:
      nll: mean over the data.
      standard_error: standard error of `nll` as an estimate of the population's mean, from the
        spread of `per_example`; NaN for a single row.
      monte_carlo_error: standard error of `nll` for these data, from the spread of the importance
        weights; NaN for a single sample.
      elbo: mean over data and samples of the one-sample bound, from the same draws.
      per_example: `[n]`, the estimate of -log p(x) of each row.
      per_example_error: `[n]`, the Monte Carlo standard error of each row's estimate.
    """

    nll: float
    standard_error: float
    monte_carlo_error: float
    elbo: float
    per_example: np.ndarray
    per_example_error: np.ndarray


class _Weights(NamedTuple):
    """Running sums over importance weights w, scaled by e^-offset, for each data point."""

    offset: Array
    total: Array
    total_squares: Array
    total_log: Array


@checked
def nll(
    led: LED,
    params: Params,
    key: Array,
    x: np.ndarray | Array,
    num_samples: int = 5000,
    *,
    batch_size: int = 40,
    samples_per_chunk: int = 50,
    progress: Callable[[int], object] = lambda rows: None,
    placement: Placement | None = None,
    context: np.ndarray | Array | None = None,
) -> NLL:
    """Estimates -log p(x), or -log p(x|c), by importance sampling from q(z|x), in bounded memory.

    Each x is encoded once; its weights are summed in chunks of `samples_per_chunk`, so that memory
    grows with batch_size * samples_per_chunk and not with num_samples or n. By Jensen's inequality
    the estimate is too high on average; the bias shrinks as num_samples grows.

    Args:
      led: the model.
      params: its parameters.
      key: PRNG key.
      x: data `[n, *x_shape]`, of any dtype that casts to float32.
      num_samples: importance samples for each row.
      batch_size: rows computed at a time.
      samples_per_chunk: samples computed at a time. If it does not divide num_samples, the surplus
        of the last chunk is ignored. On a CPU a large decoder is faster with small chunks, whose
        activations fit into the caches.
      progress: called with the number of rows just finished.
      placement: the devices to compute on; None takes one. Of n devices, device d takes batches
        d, d + n, d + 2n, ...: the estimate is the same on any number of them.
      context: `[n, C]`, what the model is conditional on.

    Returns:
      `NLL`, of Python floats and NumPy arrays.

    Raises:
      ValueError: if x is empty or has values that the decoder does not take, a size is not
        positive, the context does not have as many rows as x, or an argument is traced.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, key, x, context))):
        raise ValueError(
            "nll: params, key and x must be concrete: it runs batch after batch from the host. "
            "Within jit or grad use importance_weighted_bound"
        )
    led.check_data(x)
    rows = len(x) if x.ndim else 0
    if min(rows, num_samples, batch_size, samples_per_chunk) < 1:
        raise ValueError(
            "nll: expected x of at least one row and positive sizes, got "
            f"{rows} rows, num_samples={num_samples}, batch_size={batch_size}, "
            f"samples_per_chunk={samples_per_chunk}"
        )
    if context is not None and context.shape[:1] != (len(x),):
        raise ValueError(
            f"nll: expected a context for each of {len(x)} rows, got shape {list(context.shape)}"
        )
    samples_per_chunk = min(samples_per_chunk, num_samples)
    batch_size = min(batch_size, len(x))
    arrays = (x,) if context is None else (x, context)

    placement = placement or one_device()
    size = placement.mesh.size
    params, key = placement.replicate((params, key))

    def take(array: np.ndarray | Array, rows: np.ndarray) -> Array:
        return placement.split(
            (*rows.shape, *array.shape[1:]), lambda part: np.asarray(array[rows[part[0]]])
        )

    def launch(first: int) -> _Weights:
        numbers = np.arange(first, first + size)
        # The last batches are filled up with the first rows, so that all batches have one shape and
        # run the same compiled program.
        rows = (numbers[:, None] * batch_size + np.arange(batch_size)) % len(x)
        batches = tuple(take(array, rows) for array in arrays)
        numbers = placement.split((size,), lambda part: numbers[part])
        return _sum_batches(
            led, num_samples, samples_per_chunk, placement, params, key, numbers, batches
        )

    num_batches = -(-len(x) // batch_size)
    finished = _fetch_all(launch, range(0, num_batches, size), len(x), size * batch_size, progress)
    sums = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(x)], *finished)
    per_example = math.log(num_samples) - sums.offset - np.log(sums.total)
    # Delta method: Var[log mean w] = Var[w] / (K E[w]^2).
    variance = np.maximum(sums.total_squares / sums.total**2 - 1 / num_samples, 0)
    if num_samples == 1:
        variance = np.full_like(variance, np.nan)
    spread = float(per_example.std()) if len(x) > 1 else math.nan
    return NLL(
        nll=float(per_example.mean(dtype=np.float64)),
        standard_error=spread / math.sqrt(len(x)),
        monte_carlo_error=float(np.sqrt(variance.sum(dtype=np.float64)) / len(x)),
        elbo=float(sums.total_log.mean(dtype=np.float64) / num_samples),
        per_example=per_example,
        per_example_error=np.sqrt(variance),
    )


def _fetch_all(
    launch: Callable[[int], _Weights],
    starts: range,
    num_rows: int,
    rows_a_launch: int,
    progress: Callable[[int], object],
) -> list[_Weights]:
    """Results of all launches, in order; two more are queued while the host waits for one."""
    pending, finished = [], []
    for i in starts:
        pending.append(launch(i))
        if len(pending) > 2:
            finished.append(jax.device_get(pending.pop(0)))
            progress(rows_a_launch)
    progress_left = num_rows - rows_a_launch * len(finished)
    finished += jax.device_get(pending)
    progress(progress_left)
    return finished


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sum_batches(
    led: LED,
    num_samples: int,
    samples_per_chunk: int,
    placement: Placement,
    params: Params,
    key: Array,
    numbers: Array,
    batches: tuple[Array, ...],
) -> _Weights:
    """The sums of each of k batches of n rows.

    `numbers` `[k]` are the indices of the batches among all batches, from which their keys are
    made. `batches` holds x `[k, n, *x_shape]` and, if there are contexts, these `[k, n, C]`.
    """

    def sum_batch(params: Params, key: Array, number: Array, *batch: Array) -> _Weights:
        batch_key = jax.random.fold_in(key, number)
        return _sum_weights(led, num_samples, samples_per_chunk, params, batch_key, *batch)

    def on_device(
        params: Params, key: Array, numbers: Array, batches: tuple[Array, ...]
    ) -> _Weights:
        # A loop over the batches rather than a vmap, whose batched matrix products are slower.
        return jax.lax.map(lambda batch: sum_batch(params, key, *batch), (numbers, *batches))

    spread = placement.rows().spec
    whole = placement.replicated.spec
    sums = jax.shard_map(
        on_device,
        mesh=placement.mesh,
        in_specs=(whole, whole, spread, spread),
        out_specs=spread,
        check_vma=False,
    )(params, key, numbers, batches)
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.ravel, sums), placement.replicated)


def _sum_weights(
    led: LED,
    num_samples: int,
    samples_per_chunk: int,
    params: Params,
    key: Array,
    x: Array,
    context: Array | None = None,
) -> _Weights:
    x = x.astype(jnp.result_type(float))
    if context is not None:
        context = context.astype(x.dtype)
    encoding = led.encoding(params, x, context)

    def add_chunk(sums: _Weights, i: Array) -> tuple[_Weights, None]:
        chunk_key = jax.random.fold_in(key, i)
        terms = led.elbo(params, chunk_key, x, (samples_per_chunk,), encoding, context)
        wanted = i * samples_per_chunk + jnp.arange(samples_per_chunk) < num_samples
        wanted = wanted.reshape(-1, *(1,) * (terms.bound.ndim - 1))
        log_weights = jnp.where(wanted, terms.bound, -jnp.inf)
        offset = jnp.maximum(sums.offset, log_weights.max(0))
        rescale = jnp.exp(sums.offset - offset)
        weights = jnp.exp(log_weights - offset)
        return _Weights(
            offset,
            sums.total * rescale + weights.sum(0),
            sums.total_squares * rescale**2 + (weights**2).sum(0),
            sums.total_log + jnp.where(wanted, terms.bound, 0).sum(0),
        ), None

    zeros = jnp.zeros(len(x), x.dtype)
    start = _Weights(jnp.full_like(zeros, jnp.finfo(x.dtype).min), zeros, zeros, zeros)
    num_chunks = -(-num_samples // samples_per_chunk)
    return jax.lax.scan(add_chunk, start, jnp.arange(num_chunks))[0]


@checked
def class_log_posterior(
    led: LED,
    params: Params,
    key: Array,
    x: np.ndarray | Array,
    classes: np.ndarray | Array,
    num_samples: int = 100,
    *,
    class_probs: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """log p(c|x) for each of K classes: Bayes's rule turns a conditional model into a classifier.

    p(c|x) is proportional to p(x|c) p(c), where p(x|c) is estimated as in `nll`.

    Args:
      led: a model that is conditional on a class.
      params: its parameters.
      key: PRNG key; all classes use the same draws.
      x: data `[n, *x_shape]`.
      classes: the context of each class, `[K, C]`; for one-hot labels the identity matrix.
      num_samples: importance samples for each row and class.
      class_probs: p(c), `[K]`, positive; None takes equal ones.
      **options: as in `nll`.

    Returns:
      `[n, K]`, in nats.

    Raises:
      ValueError: if class_probs are not K positive numbers, classes are not `[K, C]`, or as in
        `nll`.
    """
    classes = np.asarray(as_real("class_log_posterior: classes", classes))
    if classes.ndim < 2 or not len(classes):
        raise ValueError(
            f"class_log_posterior: expected classes [K, C], got shape {list(classes.shape)}"
        )
    probs = np.ones(len(classes)) if class_probs is None else class_probs
    probs = np.asarray(as_real("class_log_posterior: class_probs", probs))
    if probs.shape != (len(classes),) or not ((probs > 0) & np.isfinite(probs)).all():
        raise ValueError(
            f"class_log_posterior: expected {len(classes)} positive class_probs, got {class_probs}"
        )
    if not x.ndim:
        raise ValueError("class_log_posterior: expected x [n, *x_shape], got a number")
    log_prior, log_joint = np.log(probs), []
    for i, context in enumerate(classes):
        context = np.broadcast_to(context, (len(x), *context.shape))
        found = nll(led, params, key, x, num_samples, context=context, **options)
        log_joint.append(log_prior[i] - found.per_example)
    log_joint = np.stack(log_joint, 1)
    return log_joint - np.logaddexp.reduce(log_joint, axis=1, keepdims=True)


class MarginalMatching(NamedTuple):
    """The ELBO's KL split in two, at n draws of x from the data and z ~ q(z|x), in nats.

    E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z)), with the aggregated posterior
    q(z) = E_x q(z|x): Hoffman and Johnson (2016), "ELBO surgery". The prior enters only the second
    term, which is the one in Huang et al. (2017), eq. 4. The draws are independent: the mean of an
    array estimates the expectation, with a standard error of std / sqrt(n).

    Attributes:
      log_likelihood: `[n]`, log p(x|z).
      mutual_information: `[n]`, log q(z|x) - log q(z), whose mean estimates I(x; z); no entry is
        above log N, for data of N rows.
      marginal_kl: `[n]`, log q(z) - log p(z), whose mean estimates KL(q(z) || p(z)).
    """

    log_likelihood: Array
    mutual_information: Array
    marginal_kl: Array

    @property
    def kl(self) -> Array:
        """log q(z|x) - log p(z), `[n]`, whose mean estimates E_x KL(q(z|x) || p(z))."""
        return self.mutual_information + self.marginal_kl


@checked
def marginal_matching(
    led: LED,
    params: Params,
    key: Array,
    x: np.ndarray | Array,
    num_samples: int = 5000,
    *,
    samples_per_chunk: int = 100,
    progress: Callable[[int], object] = lambda samples: None,
) -> MarginalMatching:
    """Splits the ELBO's KL into mutual information and KL(q(z) || p(z)).

    The aggregated posterior is the mixture of all N components q(z|x_j), including the one that z
    was drawn from. It costs num_samples * N evaluations of a Gaussian, and as many inversions of
    the posterior flow if the encoder gives a context.

    Args:
      led: the model.
      params: its parameters.
      key: PRNG key.
      x: data `[N, *x_shape]`, of any dtype that casts to float32.
      num_samples: independent draws of a row and its z.
      samples_per_chunk: draws computed at a time; the surplus of the last chunk is ignored.
      progress: called with the number of draws just finished.

    Returns:
      `MarginalMatching`, of NumPy arrays `[num_samples]`.

    Raises:
      ValueError: if x is empty or has values that the decoder does not take, or a size is not
        positive.
    """
    rows = len(x) if x.ndim else 0
    if min(rows, num_samples, samples_per_chunk) < 1:
        raise ValueError(
            "marginal_matching: expected x of at least one row and positive sizes, got "
            f"{rows} rows, num_samples={num_samples}, "
            f"samples_per_chunk={samples_per_chunk}"
        )
    led.check_data(x)
    x = jnp.asarray(x)
    encoding = encode_all(led, params, x)
    samples_per_chunk = min(samples_per_chunk, num_samples)
    chunks = []
    for i, start in enumerate(range(0, num_samples, samples_per_chunk)):
        chunk_key = jax.random.fold_in(key, i)
        chunk = _match_draws(led, samples_per_chunk, params, chunk_key, x, encoding)
        chunks.append(jax.device_get(chunk))
        progress(min(samples_per_chunk, num_samples - start))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_samples], *chunks)


@checked
@partial(jax.jit, static_argnums=(0, 4))
def activity(led: LED, params: Params, key: Array, x: Array, num_samples: int = 50) -> Array:
    """Var_x E[z|x] of each latent variable: how far its posterior mean depends on x.

    Burda, Grosse and Salakhutdinov (2016), section 5.3, https://arxiv.org/abs/1509.00519, call a
    unit active if this is above 0.01: `(activity(...) > 0.01).sum()` counts active units. E[z|x] is
    estimated by the mean of K draws, whose own variance Var[z|x] / K is subtracted; the estimate is
    unbiased, and may be slightly negative.

    Args:
      led: the model.
      params: its parameters.
      key: PRNG key.
      x: data `[N, *x_shape]`, of two rows or more.
      num_samples: K, number of draws of z for each row, two or more.

    Returns:
      Variances `[*latent_shape]`.

    Raises:
      ValueError: if there are fewer than two rows or draws.
    """
    if not x.ndim or min(len(x), num_samples) < 2:
        raise ValueError(
            f"activity: expected two rows and two samples or more, got x of shape {x.shape} and "
            f"num_samples={num_samples}"
        )

    def moments(number_and_row: tuple[Array, Array]) -> tuple[Array, Array]:
        number, row = number_and_row
        encoding = led.encoding(params, row.astype(jnp.result_type(float)))
        draw_key = jax.random.fold_in(key, number)
        z, _ = led.posterior_sample_and_log_prob(params, draw_key, encoding, (num_samples,))
        return z.mean(0), z.var(0, ddof=1)

    means, variances = jax.lax.map(moments, (jnp.arange(len(x)), jnp.asarray(x)), batch_size=1000)
    return means.var(0, ddof=1) - variances.mean(0) / num_samples


@checked
@partial(jax.jit, static_argnums=(0, 3))
def encode_all(led: LED, params: Params, x: Array, batch_size: int = 1000) -> Encoding:
    """The encoder's output for all rows of x `[N, *x_shape]`, in bounded memory.

    Raises:
      ValueError: if x is a scalar, or batch_size is not positive.
    """
    if not x.ndim or batch_size < 1:
        raise ValueError(
            f"encode_all: expected x [N, *x_shape] and a positive batch_size, got x of shape "
            f"{x.shape} and batch_size={batch_size}"
        )

    def encode(x: Array) -> Encoding:
        return led.encoding(params, x.astype(jnp.result_type(float)))

    return jax.lax.map(encode, x, batch_size=batch_size)


@checked
@partial(jax.jit, static_argnums=0)
def aggregated_posterior_log_prob(led: LED, params: Params, z: Array, encoding: Encoding) -> Array:
    """log q(z) = log 1/N sum_j q(z|x_j): the aggregated posterior, which the prior should match.

    Args:
      led: the model.
      params: its parameters.
      z: points `[n, *latent_shape]`.
      encoding: the encoder's output for all N rows, see `encode_all`.

    Returns:
      Log-densities `[n]` in nats.

    Raises:
      ValueError: if z does not have this shape.
    """
    latent_shape = encoding.mean.shape[1:]
    if z.shape[1:] != latent_shape or not z.ndim:
        expected = ", ".join(map(str, ("n", *latent_shape)))
        raise ValueError(
            f"aggregated_posterior_log_prob: expected z of shape [{expected}], got {z.shape}"
        )

    # Pair by pair: `posterior_mixture` expands squares, whose terms cancel if q(z|x) is narrow.
    def log_mixture(z: Array) -> Array:
        return log_mean_exp(led.posterior_log_prob(params, z, encoding), axis=-1)

    # With a context, the flow is inverted for each pair of a point and a row.
    return jax.lax.map(log_mixture, z, batch_size=8 if encoding.context is None else 1)


@partial(jax.jit, static_argnums=(0, 1))
def _match_draws(
    led: LED, num_samples: int, params: Params, key: Array, x: Array, encoding: Encoding
) -> MarginalMatching:
    row_key, z_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (num_samples,), 0, len(x))
    own = jax.tree.map(lambda leaf: leaf[rows], encoding)
    z, log_posterior = led.posterior_sample_and_log_prob(params, z_key, own)
    log_aggregate = aggregated_posterior_log_prob(led, params, z, encoding)
    x = x[rows].astype(z.dtype)
    return MarginalMatching(
        log_likelihood=led.log_likelihood(params, z, x),
        mutual_information=log_posterior - log_aggregate,
        marginal_kl=log_aggregate - led.prior_log_prob(params, z),
    )
