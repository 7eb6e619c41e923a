"""Explicit densities: base distributions, mixtures, and densities transformed by flows.

Points and contexts may be JAX or NumPy arrays or lists. Floats keep their dtype; integers and lists
become the default float. Log-densities have the dtype of the points; in half precision, sums over
entries are computed in float32.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from led_jax.checks import check_names, checked
from led_jax.descriptions import arguments, constructor, describe
from led_jax.flows.base import Flow
from led_jax.flows.conditioners import check_shapes, mlp
from led_jax.numerics import dtype_of, log_mean_exp, log_sigmoid, match_rank, widened

Params = Any


class InitFn(Protocol):
    """Creates the parameters: a pytree of trainable floats."""

    def __call__(self, key: Array, x: Array, context: Array | None = None, /) -> Params:
        """`x`, `context`: examples that fix shapes and dtype, with any leading batch axes."""
        ...


class LogProbFn(Protocol):
    """Scores points."""

    def __call__(self, params: Params, x: Array, context: Array | None = None, /) -> Array:
        """Returns log p(x|context) in nats, `[...]` for x `[..., *event_shape]`."""
        ...


class SampleFn(Protocol):
    """Draws samples together with their log-densities."""

    def __call__(
        self,
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
        /,
    ) -> tuple[Array, Array]:
        """Returns x `[*sample_shape, ..., *event_shape]` and log p(x) `[*sample_shape, ...]`.

        `...` are the batch axes of the context `[..., context_dim]`, none without a context.
        """
        ...


class Density(NamedTuple):
    """A density with an exact log-probability and exact samples, as pure functions.

    Attributes:
      init: `(key, x, context=None) -> params`.
      log_prob: `(params, x, context=None) -> [...]`, in nats.
      sample_and_log_prob: `(params, key, sample_shape=(), context=None) -> (x, log_prob)`.
    """

    init: InitFn
    log_prob: LogProbFn
    sample_and_log_prob: SampleFn

    __repr__ = describe


def normal_log_prob(x: Array) -> Array:
    """Log N(x; 0, 1), elementwise, in nats."""
    return -0.5 * (x * x + math.log(2 * math.pi))


def mixture_log_prob_of_normals(mean: Array, log_std: Array) -> Callable[[Array], Array]:
    """Log 1/K sum_k N(x; mean_k, diag(e^(2 log_std_k))) as a function of x.

    The squares are expanded, (x - m)^2 = x^2 - 2 x m + m^2, so that all pairs of a point and a
    component are one matrix product. The means are centered first, because the expanded terms
    nearly cancel: small terms lose fewer digits.

    Args:
      mean: `[K, *event_shape]`.
      log_std: `[K, *event_shape]`.

    Returns:
      A function of x `[..., *event_shape]` to log-densities `[...]` in nats.
    """
    event_shape = mean.shape[1:]
    center = mean.mean(0)
    mean, log_std = (widened(a).reshape(len(a), -1) for a in (mean - center, log_std))
    precision = jnp.exp(-2 * log_std)
    weights = jnp.concatenate([-0.5 * precision, precision * mean], 1).T
    log_norm = log_std + 0.5 * math.log(2 * math.pi)
    bias = -(0.5 * precision * mean * mean + log_norm).sum(1) - math.log(len(mean))

    def log_prob(x: Array) -> Array:
        batch_shape = x.shape[: x.ndim - len(event_shape)]
        deviation = widened(x - match_rank(center, x.ndim)).reshape(*batch_shape, mean.shape[1])
        # Accelerators round the factors of a matrix product unless told otherwise.
        features = jnp.concatenate([deviation * deviation, deviation], -1)
        product = jnp.matmul(features, weights, precision="highest")
        log_mixture = jax.nn.logsumexp(product + match_rank(bias, product.ndim), axis=-1)
        return log_mixture.astype(x.dtype)

    return log_prob


@constructor
def standard_normal(event_shape: tuple[int, ...]) -> Density:
    """N(0, I) on events of the given shape; it has no parameters and ignores a context.

    >>> density = standard_normal((2,))
    >>> round(float(density.log_prob((), jnp.zeros(2))), 4)
    -1.8379
    """

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        log_normalizer = 0.5 * math.log(2 * math.pi) * math.prod(event_shape)
        squares = jnp.square(widened(x)).sum(_event_axes(x, event_shape))
        return (-0.5 * squares - log_normalizer).astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        x = jax.random.normal(key, _sample_shape(sample_shape, context, event_shape))
        return x, log_prob(params, x)

    return Density(lambda key, x, context=None: (), log_prob, sample_and_log_prob)


@constructor
def uniform(event_shape: tuple[int, ...]) -> Density:
    """The uniform density on [0, 1]^D: log-density 0 there, -inf outside.

    >>> uniform((1,)).log_prob((), jnp.array([[0.3], [7.0]])).tolist()
    [0.0, -inf]
    """

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        inside = ((x >= 0) & (x <= 1)).all(_event_axes(x, event_shape))
        return jnp.where(inside, 0, -jnp.inf).astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        x = jax.random.uniform(key, _sample_shape(sample_shape, context, event_shape))
        return x, jnp.zeros(x.shape[: x.ndim - len(event_shape)], x.dtype)

    return Density(lambda key, x, context=None: (), log_prob, sample_and_log_prob)


@constructor
def mixture_of_normals(event_shape: tuple[int, ...], num_components: int) -> Density:
    """p(x) = sum_k w_k N(x; mean_k, diag(e^(2 log_std_k))), with w = softmax(logits).

    The parameters are `{"logits": [K], "mean": [K, *event_shape], "log_std": [K, *event_shape]}`.
    `init` draws the means from the rows of its `x`, or around `x` where that is a single event, and
    starts at equal weights and unit variances.

    >>> density = mixture_of_normals((2,), num_components=3)
    >>> params = density.init(jax.random.key(0), jnp.zeros(2))
    >>> density.log_prob(params, jnp.zeros((4, 2))).shape
    (4,)

    Args:
      event_shape: shape of an event.
      num_components: number K of components.

    Raises:
      ValueError: if num_components is not positive.
    """
    if num_components < 1:
        raise ValueError(
            f"mixture_of_normals: num_components must be positive, got {num_components}"
        )
    event_shape = tuple(event_shape)
    shape = (num_components, *event_shape)
    shapes = {"logits": (num_components,), "mean": shape, "log_std": shape}

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        _event_axes(x, event_shape)
        row_key, noise_key = jax.random.split(key)
        rows = x.reshape(-1, *event_shape)
        noise = jax.random.normal(noise_key, shape, x.dtype)
        if len(rows) > 1:
            picked = jax.random.choice(row_key, rows, (num_components,), len(rows) < num_components)
            mean = picked + 0.01 * noise
        else:
            mean = rows.sum(0) + noise
        zeros = jnp.zeros(shape, x.dtype)
        return {"logits": jnp.zeros(num_components, x.dtype), "mean": mean, "log_std": zeros}

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        axes = _event_axes(x, event_shape)
        check_shapes("mixture_of_normals", params, shapes)
        logits, mean, log_std = (widened(params[name]) for name in ("logits", "mean", "log_std"))
        deviation = (jnp.expand_dims(widened(x), -1 - len(axes)) - mean) * jnp.exp(-log_std)
        log_components = (normal_log_prob(deviation) - log_std).sum(axes)
        log_prob = jax.nn.logsumexp(log_components + jax.nn.log_softmax(logits), -1)
        return log_prob.astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        check_shapes("mixture_of_normals", params, shapes)
        batch_shape = _sample_shape(sample_shape, context, ())
        component_key, noise_key = jax.random.split(key)
        k = jax.random.categorical(component_key, params["logits"], shape=batch_shape)
        mean, log_std = (params[name][k] for name in ("mean", "log_std"))
        x = mean + jnp.exp(log_std) * jax.random.normal(noise_key, mean.shape, mean.dtype)
        return x, log_prob(params, x)

    return Density(init, log_prob, sample_and_log_prob)


@constructor
def student_t(event_shape: tuple[int, ...], df: float) -> Density:
    """Student's t with `df` degrees of freedom in every entry, independently; no parameters.

    log p(x) = sum_i log t_df(x_i). The tails fall as |x|^-(df + 1), also after flows that are
    linear far out: a base for posteriors with heavy tails.

    >>> round(float(student_t((2,), 1.0).log_prob((), jnp.zeros(2))), 4)  # -2 log pi: Cauchy's.
    -2.2895

    Raises:
      ValueError: if df is not a positive number.
    """
    if not 0 < df < math.inf:
        raise ValueError(f"student_t: df must be a positive number, got {df}")
    log_norm = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(df * math.pi)
    return _independent(
        event_shape,
        lambda x: -(df + 1) / 2 * jnp.log1p(x * x / df) - log_norm,
        lambda key, shape: jax.random.t(key, df, shape),
    )


@constructor
def laplace(event_shape: tuple[int, ...]) -> Density:
    """Laplace's density in every entry, log p(x) = sum_i -|x_i| - log 2; no parameters.

    >>> round(float(laplace((2,)).log_prob((), jnp.zeros(2))), 4)
    -1.3863
    """
    return _independent(event_shape, lambda x: -jnp.abs(x) - math.log(2), jax.random.laplace)


@constructor
def logistic(event_shape: tuple[int, ...]) -> Density:
    """The logistic density in every entry, e^-x / (1 + e^-x)^2, independently; no parameters.

    `flows.sigmoid()` transforms it to the uniform density on (0, 1)^D.

    >>> round(float(logistic((2,)).log_prob((), jnp.zeros(2))), 4)
    -2.7726
    """
    return _independent(
        event_shape, lambda x: log_sigmoid(x) + log_sigmoid(-x), jax.random.logistic
    )


@constructor
def product(parts: Sequence[Density], sizes: Sequence[int]) -> Density:
    """Independent densities side by side on vectors: log p(x) = sum_i log p_i(x_i).

    >>> density = product((standard_normal((2,)), student_t((1,), 3.0)), (2, 1))
    >>> density.log_prob(((), ()), jnp.zeros((5, 3))).shape
    (5,)

    Args:
      parts: densities on vectors; each takes the entries that follow those of the part before it.
      sizes: number of entries of each part.

    Returns:
      A density on vectors `[..., sum(sizes)]` whose parameters are a tuple, one entry for each
      part. A context goes to every part.

    Raises:
      ValueError: if there are no parts, or not one positive size for each.
    """
    parts, sizes = tuple(parts), tuple(sizes)
    if not parts or len(parts) != len(sizes) or min(sizes) < 1:
        raise ValueError(
            f"product: expected a positive size for each of one part or more, got {len(parts)} "
            f"parts and sizes {sizes}"
        )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]

    def split(x: Array) -> list[Array]:
        _event_axes(x, (sum(sizes),))
        return jnp.split(x, ends, -1)

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        keys = jax.random.split(key, len(parts))
        return tuple(
            part.init(key, own, context)
            for part, key, own in zip(parts, keys, split(x), strict=True)
        )

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        terms = [
            widened(part.log_prob(own_params, own, context))
            for part, own_params, own in zip(parts, params, split(x), strict=True)
        ]
        return functools.reduce(operator.add, terms).astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        keys = jax.random.split(key, len(parts))
        x, log_probs = zip(
            *(
                part.sample_and_log_prob(own_params, key, sample_shape, context)
                for part, own_params, key in zip(parts, params, keys, strict=True)
            ),
            strict=True,
        )
        x = jnp.concatenate(x, -1)
        return x, functools.reduce(operator.add, map(widened, log_probs)).astype(x.dtype)

    return Density(init, log_prob, sample_and_log_prob)


@constructor
def transformed(base: Density, flow: Flow) -> Density:
    """The density of y = f(x) for x from `base` and f from `flow`: the change of variables.

    log p(y) = log p_base(f^-1(y)) + log|det df^-1/dy|. Huang et al. (2017), section 4. Samples get
    their log-density from `flow.apply`, without inverting the flow. A context goes to both base and
    flow.

    >>> from led_jax import flows
    >>> density = transformed(standard_normal((2,)), flows.real_nvp((2,), depth=4))
    >>> params = density.init(jax.random.key(0), jnp.zeros(2))
    >>> density.sample_and_log_prob(params, jax.random.key(1), (5,))[0].shape
    (5, 2)

    Args:
      base: density of x.
      flow: map from x to y.

    Returns:
      A density whose parameters are `{"base": ..., "flow": ...}`.
    """

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        base_key, flow_key = jax.random.split(key)
        base_params = base.init(base_key, x, context)
        jax.eval_shape(base.log_prob, base_params, x, context)  # Refuses an x of another size.
        return {"base": base_params, "flow": flow.init(flow_key, x, context)}

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        check_names("transformed", params, ("base", "flow"))
        x, log_det = flow.inverse(params["flow"], x, context)
        log_prob = widened(base.log_prob(params["base"], x, context)) + widened(log_det)
        return log_prob.astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        check_names("transformed", params, ("base", "flow"))
        x, log_prob = base.sample_and_log_prob(params["base"], key, sample_shape, context)
        # A base without parameters draws floats of the default dtype.
        x = x.astype(dtype_of(params["flow"], x.dtype))
        x, log_det = flow.apply(params["flow"], x, context)
        return x, (widened(log_prob) - widened(log_det)).astype(x.dtype)

    return Density(init, log_prob, sample_and_log_prob)


@constructor
def standardised(density: Density, event_ndims: int = 1) -> Density:
    """The density of x = mean + std u, entry by entry, for u from `density`.

    log p(x) = log p_u((x - mean) / std) - sum_i log std_i. `init` computes the mean and standard
    deviation of every entry over the rows of its x. It does the same for a context, so that
    `density` reads a standardised context. They get no gradient. Where an entry is the same in all
    rows, or there is a single row, its deviation is set to 1.

    >>> density = standardised(standard_normal((2,)))
    >>> params = density.init(jax.random.key(0), jnp.array([[0.0, 7.0], [2.0, 9.0]]))
    >>> params["x"]["mean"].tolist(), params["x"]["std"].tolist()
    ([1.0, 8.0], [1.0, 1.0])

    Args:
      density: density of u, with a context or without.
      event_ndims: number of event axes.

    Returns:
      A density whose parameters are `{"density": ..., "x": {"mean": ..., "std": ...}}`, with an
      entry "context" of the same form as "x" if `init` was given a context.
    """

    def moments(rows: Array, ndims: int) -> dict[str, Array]:
        axes = tuple(range(rows.ndim - ndims))
        std = rows.std(axes)
        largest = jnp.abs(rows).max(axes)
        return {"mean": rows.mean(axes), "std": jnp.where(std > 1e-6 * largest, std, 1)}

    def check(params: Params) -> None:
        names = ("density", "x", "context")
        given_no_context = isinstance(params, Mapping) and "context" not in params
        check_names("standardised", params, names[:2] if given_no_context else names)

    def read(params: Params, name: str, ndim: int) -> tuple[Array, Array]:
        own = jax.lax.stop_gradient(params[name])
        return match_rank(own["mean"], ndim), match_rank(own["std"], ndim)

    def standardise(params: Params, name: str, x: Array) -> Array:
        mean, std = read(params, name, x.ndim)
        own = params[name]["mean"].shape
        if x.shape[x.ndim - len(own) :] != own:
            raise ValueError(f"standardised: expected {name} to end in {own}, got {x.shape}")
        return ((x - mean) / std).astype(x.dtype)

    def of_context(params: Params, context: Array | None) -> Array | None:
        if context is None or "context" not in params:
            return context
        return standardise(params, "context", context)

    def log_volume(params: Params) -> Array:
        return jnp.log(widened(jax.lax.stop_gradient(params["x"]["std"]))).sum()

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        for name, rows in ("x", x), ("context", context):
            traced = rows is None or isinstance(rows, Tracer)
            if not traced and not np.isfinite(np.asarray(rows)).all():
                raise ValueError(f"standardised: expected finite {name}, got NaN or infinity in it")
        params: dict[str, Any] = {"x": moments(x, event_ndims)}
        if context is not None:
            params["context"] = moments(context, 1)
        u = standardise(params, "x", x)
        return params | {"density": density.init(key, u, of_context(params, context))}

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        check(params)
        u = standardise(params, "x", x)
        scores = density.log_prob(params["density"], u, of_context(params, context))
        return (widened(scores) - log_volume(params)).astype(scores.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        check(params)
        u, scores = density.sample_and_log_prob(
            params["density"], key, sample_shape, of_context(params, context)
        )
        mean, std = read(params, "x", u.ndim)
        scores = (widened(scores) - log_volume(params)).astype(scores.dtype)
        return (mean + std * u).astype(u.dtype), scores

    return Density(init, log_prob, sample_and_log_prob)


@constructor
def resampled(
    event_shape: tuple[int, ...],
    base: Density | None = None,
    hidden: Sequence[int] = (100, 100),
    *,
    num_attempts: int = 100,
    num_draws: int = 4096,
    context_dim: int | None = None,
) -> Density:
    """A base density pi from which draws are accepted with a learned probability a(x).

    Bauer and Mnih (2019), eq. 6, https://arxiv.org/abs/1810.11428 (LARS): a sample is the first
    accepted of T draws, or the last one if none is accepted, so that

        p(x) = pi(x) (a(x) sum_{k < T-1} (1 - Z)^k + (1 - Z)^(T-1)),  Z = E_pi[a(x)].

    Samples are exact. Log-densities use an estimate of Z, the mean of a over S = `num_draws` draws
    from the base, whose relative standard error is at most sqrt((1 - Z) / (Z S));
    `acceptance_rate` measures it. The draws are seeded by the bits of the network's parameters:
    they are the same for all x, and change with every update, so that training cannot overfit to
    them. Z has gradients with respect to the base through these draws, hence none for a mixture's
    weights. Fresh parameters give the base density.

    >>> density = resampled((2,), hidden=(8,))
    >>> params = density.init(jax.random.key(0), jnp.zeros(2))
    >>> round(float(density.log_prob(params, jnp.zeros(2))), 4)
    -1.8379

    Args:
      event_shape: shape of an event.
      base: pi; None takes the standard normal.
      hidden: widths of the hidden layers of the network whose sigmoid is a.
      num_attempts: T, two or more; p is at most T pi.
      num_draws: S. The parameters do not depend on it, so that evaluation may use more draws than
        training.
      context_dim: width of the context that the network reads, in which case Z is estimated for
        each context; None ignores any context.

    Returns:
      A density whose parameters are `{"base": ..., "acceptance": ...}`.

    Raises:
      ValueError: if num_attempts is less than two, num_draws or a width is not positive; from its
        functions, if an input or a context has the wrong shape.
    """
    if num_attempts < 2 or num_draws < 1:
        raise ValueError(
            "resampled: expected num_attempts of two or more and num_draws of one or more, got "
            f"{num_attempts} and {num_draws}"
        )
    event_shape = tuple(event_shape)
    base = base or standard_normal(event_shape)
    network, log_acceptance = _acceptance(event_shape, hidden, context_dim)

    def init(key: Array, x: Array, context: Array | None = None) -> Params:
        base_key, network_key = jax.random.split(key)
        vector = _vectors(x, event_shape)
        return {
            "base": base.init(base_key, x, context),
            "acceptance": network.init(network_key, vector, context),
        }

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        check_names("resampled", params, _OF_RESAMPLED)
        key = _key_of(params["acceptance"])
        draws, _ = base.sample_and_log_prob(params["base"], key, (num_draws,), context)
        log_rate = log_mean_exp(log_acceptance(params["acceptance"], draws, context), 0)
        log_rate = match_rank(log_rate, x.ndim - len(event_shape))
        # Z is kept below 1: at Z = 1 the logarithm and the powers of 1 - Z have no derivatives.
        refusal = 1 - jnp.minimum(jnp.exp(log_rate), 1 - jnp.finfo(log_rate.dtype).eps)
        attempts = jnp.power(refusal[..., None], jnp.arange(num_attempts - 1)).sum(-1)
        log_ratio = jnp.logaddexp(
            log_acceptance(params["acceptance"], x, context) + jnp.log(attempts),
            (num_attempts - 1) * jnp.log(refusal),
        )
        return (widened(base.log_prob(params["base"], x, context)) + log_ratio).astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        check_names("resampled", params, _OF_RESAMPLED)

        def attempt(key: Array) -> tuple[Array, Array]:
            draw_key, accept_key = jax.random.split(key)
            draw, _ = base.sample_and_log_prob(params["base"], draw_key, sample_shape, context)
            log_rate = log_acceptance(params["acceptance"], draw, context)
            noise = jax.random.uniform(accept_key, log_rate.shape, log_rate.dtype)
            return draw, jnp.log(noise) < log_rate

        def again(carry: tuple[Array, Array], key: Array):
            x, is_taken = carry
            draw, is_accepted = attempt(key)
            keep = is_taken.reshape(*is_taken.shape, *(1,) * len(event_shape))
            return (jnp.where(keep, x, draw), is_taken | is_accepted), None

        keys = jax.random.split(key, num_attempts)
        (x, _), _ = jax.lax.scan(again, attempt(keys[0]), keys[1:])
        return x, log_prob(params, x, context)

    return Density(init, log_prob, sample_and_log_prob)


@checked
def acceptance_rate(
    density: Density,
    params: Params,
    key: Array,
    num_draws: int,
    context: Array | None = None,
) -> tuple[Array, Array]:
    """Z = E_pi[a(x)] of a `resampled` density, and its standard error, each `[...]`.

    Args:
      density: a density made by `resampled`.
      params: its parameters.
      key: PRNG key.
      num_draws: number of draws from the base, two or more.
      context: `[..., context_dim]`, if the density reads one.

    Raises:
      ValueError: if `resampled` did not make the density, or num_draws is less than two.
    """
    name, of = arguments(density)
    if name != "resampled" or num_draws < 2:
        raise ValueError(
            "acceptance_rate: expected a resampled density and two draws or more, got "
            f"{density!r} and {num_draws}"
        )
    check_names("acceptance_rate", params, _OF_RESAMPLED)
    base = of["base"] or standard_normal(of["event_shape"])
    _, log_acceptance = _acceptance(of["event_shape"], of["hidden"], of["context_dim"])
    draws, _ = base.sample_and_log_prob(params["base"], key, (num_draws,), context)
    rates = jnp.exp(log_acceptance(params["acceptance"], draws, context))
    return rates.mean(0), rates.std(0, ddof=1) / math.sqrt(num_draws)


_OF_RESAMPLED = ("base", "acceptance")


def _acceptance(event_shape: tuple[int, ...], hidden: Sequence[int], context_dim: int | None):
    """The network of `resampled`, and log a(x) `[...]` for x `[..., *event_shape]`."""
    network = mlp(hidden, context_dim=context_dim)(1, 1)

    def log_acceptance(params: Params, x: Array, context: Array | None) -> Array:
        logit = network.apply(params, widened(_vectors(x, event_shape)), context)
        return log_sigmoid(logit.squeeze((-2, -1)))

    return network, log_acceptance


def _vectors(x: Array, event_shape: tuple[int, ...]) -> Array:
    _event_axes(x, event_shape)
    return x.reshape(*x.shape[: x.ndim - len(event_shape)], math.prod(event_shape))


def _key_of(params: Params) -> Array:
    """A PRNG key computed from the parameters' bits, so that every update changes it."""
    bits = [
        jax.lax.bitcast_convert_type(widened(leaf), jnp.uint32).sum(dtype=jnp.uint32)
        for leaf in jax.tree.leaves(jax.lax.stop_gradient(params))
    ]
    return jax.random.key(sum(bits[1:], bits[0]))


def _independent(
    event_shape: tuple[int, ...],
    entry_log_prob: Callable[[Array], Array],
    draw: Callable[[Array, tuple[int, ...]], Array],
) -> Density:
    """A density without parameters whose entries are independent draws of one density."""
    event_shape = tuple(event_shape)

    def log_prob(params: Params, x: Array, context: Array | None = None) -> Array:
        return entry_log_prob(widened(x)).sum(_event_axes(x, event_shape)).astype(x.dtype)

    def sample_and_log_prob(
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ):
        x = draw(key, _sample_shape(sample_shape, context, event_shape))
        return x, log_prob(params, x)

    return Density(lambda key, x, context=None: (), log_prob, sample_and_log_prob)


def _sample_shape(
    sample_shape: tuple[int, ...], context: Array | None, event_shape: tuple[int, ...]
) -> tuple[int, ...]:
    batch_shape = () if context is None else context.shape[:-1]
    return (*sample_shape, *batch_shape, *event_shape)


def _event_axes(x: Array, event_shape: tuple[int, ...]) -> tuple[int, ...]:
    if x.shape[x.ndim - len(event_shape) :] != tuple(event_shape) or x.ndim < len(event_shape):
        shape = ", ".join(map(str, event_shape))
        raise ValueError(f"density: expected x of shape [..., {shape}], got {x.shape}")
    return tuple(range(-len(event_shape), 0))
