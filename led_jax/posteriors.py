"""Posteriors of a LED: a `Flow`, or a `Family`, which may draw auxiliary variables besides z.

The base of q(z|x) is the encoder's output, a normal density of z'; a flow g gives z = g(z').
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.densities import Density, mixture_log_prob_of_normals, normal_log_prob
from led_jax.descriptions import constructor, describe
from led_jax.encoders import Encoding
from led_jax.flows.base import Flow
from led_jax.numerics import log_mean_exp, widened

Params = Any


class Family(NamedTuple):
    """A family of densities q(z|x), whose member for x is determined by the encoder's output.

    Attributes:
      init: `(key, encoding) -> params`.
      sample_and_log_prob: `(params, key, encoding, sample_shape=()) -> (z, log q)`, of shapes
        `[*sample_shape, ..., *latent_shape]` and `[*sample_shape, ...]`. The second is log q(z|x),
        or a random l with E[e^-l | z] = 1 / q(z|x), which suffices for bounds and importance
        weights.
      log_prob: `(params, z, encoding) -> [...]`, log q(z|x) in nats; batch axes of both broadcast.
      mixture: `(params, encoding) -> (z -> [...])`, log 1/K sum_k q(z|x_k) for an encoding of K
        rows.
    """

    init: Callable[..., Params]
    sample_and_log_prob: Callable[..., tuple[Array, Array]]
    log_prob: Callable[[Params, Array, Encoding], Array]
    mixture: Callable[[Params, Encoding], Callable[[Array], Array]]

    __repr__ = describe


@constructor
def of_flow(flow: Flow) -> Family:
    """The family of a flow: z = g(z') for z' from the encoder's normal density.

    log q(z|x) = log q(z'|x) - log|dg/dz'|, Huang et al. (2017), section 4. Sampling does not invert
    the flow. `log_prob` and `mixture` do, once for each z if the encoder gives no context, and once
    for each pair of z and x if it does.

    >>> from led_jax import flows
    >>> of_flow(flows.lu((3,)))
    of_flow(lu((3,)))
    """

    def init(key: Array, encoding: Encoding) -> Params:
        return flow.init(key, encoding.mean, encoding.context)

    def sample_and_log_prob(
        params: Params, key: Array, encoding: Encoding, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, Array]:
        mean, log_std, context = encoding
        noise = jax.random.normal(key, (*sample_shape, *mean.shape), mean.dtype)
        z, log_det = flow.apply(params, mean + jnp.exp(log_std) * noise, context)
        log_base = normal_log_prob(widened(noise)) - widened(log_std)
        event_axes = tuple(range(log_det.ndim - log_base.ndim, 0))
        return z, (log_base.sum(event_axes) - widened(log_det)).astype(z.dtype)

    def log_prob(params: Params, z: Array, encoding: Encoding) -> Array:
        mean, log_std, context = encoding
        if context is not None:
            z = jnp.broadcast_to(z, jnp.broadcast_shapes(z.shape, mean.shape))
        base, log_det = flow.inverse(params, z, context)
        base, mean, log_std = map(widened, (base, mean, log_std))
        log_base = normal_log_prob((base - mean) * jnp.exp(-log_std)) - log_std
        # Without a context, log_det has only the batch axes of z.
        event_axes = tuple(range(log_det.ndim - base.ndim, 0))
        return (log_base.sum(event_axes) + widened(log_det)).astype(z.dtype)

    def mixture(params: Params, encoding: Encoding) -> Callable[[Array], Array]:
        event_ndims = encoding.mean.ndim - 1
        if encoding.context is None:
            log_mixture = mixture_log_prob_of_normals(encoding.mean, encoding.log_std)

            def log_prob_of_mixture(z: Array) -> Array:
                base, log_det = flow.inverse(params, z)
                return (widened(log_mixture(base)) + widened(log_det)).astype(z.dtype)

        else:

            def log_prob_of_mixture(z: Array) -> Array:
                z = jnp.expand_dims(z, z.ndim - event_ndims)
                return log_mean_exp(log_prob(params, z, encoding), axis=-1)

        return log_prob_of_mixture

    return Family(init, sample_and_log_prob, log_prob, mixture)


@constructor
def auxiliary(
    event_shape: tuple[int, ...], num_auxiliary: int, flow: Flow, reverse: Density
) -> Family:
    """A hierarchical posterior: q(z|x) is the marginal of q(z, a|x), with auxiliary variables a.

    One flow maps z' and noise a' ~ N(0, I) to (z, a), with the encoder's context. With a learned
    density r(a|x, z), log q(z, a|x) - log r(a|x, z) takes the place of log q(z|x). Given z, the
    mean of r / q(z, a|x) is 1 / q(z|x): so the ELBO remains a lower bound, looser by
    E KL(q(a|x, z) || r), and importance weights remain unbiased. Ranganath, Tran and Blei (2016),
    eq. 5, https://arxiv.org/abs/1511.02386; Maaloe et al. (2016), https://arxiv.org/abs/1602.05473.

    >>> from led_jax import densities, flows
    >>> reverse = flows.invert(flows.iaf((2,), 1, hidden=(8,), context_dim=3 + 5))
    >>> reverse = densities.transformed(densities.standard_normal((2,)), reverse)
    >>> family = auxiliary((3,), 2, flows.real_nvp((5,), 4, context_dim=5), reverse)
    >>> from led_jax.encoders import Encoding
    >>> encoding = Encoding(jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.zeros((4, 5)))
    >>> params = family.init(jax.random.key(0), encoding)
    >>> family.sample_and_log_prob(params, jax.random.key(1), encoding)[0].shape
    (4, 3)

    Args:
      event_shape: the shape of z, of D entries.
      num_auxiliary: number A of entries of a.
      flow: a flow on vectors of D + A entries, z' first, which may read the encoder's context.
      reverse: r, a density of vectors of A entries, whose context is the D entries of z followed by
        the encoder's context. Its `log_prob` should be its cheap direction.

    Returns:
      A family whose parameters are `{"flow": ..., "reverse": ...}`. Its density at a given z has no
      closed form: `log_prob` and `mixture`, which `stl`, `dreg`, a VampPrior and
      `marginal_matching` need, raise a ValueError.

    Raises:
      ValueError: if num_auxiliary is not positive; from its functions, if the encoder has no
        context, through which r depends on x.
    """
    if num_auxiliary < 1:
        raise ValueError(f"auxiliary: num_auxiliary must be positive, got {num_auxiliary}")
    event_shape = tuple(event_shape)

    def of_reverse(z: Array, encoding: Encoding) -> Array:
        if encoding.context is None:
            raise ValueError(
                "auxiliary: expected an encoder with a context, which r(a|x, z) knows x by; give "
                "it a context_dim"
            )
        context = jnp.broadcast_to(encoding.context, (*z.shape[:-1], encoding.context.shape[-1]))
        return jnp.concatenate([z, context], -1)

    def vectors(x: Array) -> Array:
        return x.reshape(*x.shape[: x.ndim - len(event_shape)], math.prod(event_shape))

    def init(key: Array, encoding: Encoding) -> Params:
        flow_key, reverse_key = jax.random.split(key)
        z = vectors(encoding.mean)
        reverse_context = of_reverse(z, encoding)
        a = jnp.zeros((*z.shape[:-1], num_auxiliary), z.dtype)
        both = jnp.concatenate([z, a], -1)
        return {
            "flow": flow.init(flow_key, both, encoding.context),
            "reverse": reverse.init(reverse_key, a, reverse_context),
        }

    def sample_and_log_prob(
        params: Params, key: Array, encoding: Encoding, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, Array]:
        mean, log_std = vectors(encoding.mean), vectors(encoding.log_std)
        size = mean.shape[-1]
        shape = (*sample_shape, *mean.shape[:-1], size + num_auxiliary)
        noise = jax.random.normal(key, shape, mean.dtype)
        base = jnp.concatenate([mean + jnp.exp(log_std) * noise[..., :size], noise[..., size:]], -1)
        both, log_det = flow.apply(params["flow"], base, encoding.context)
        z, a = both[..., :size], both[..., size:]
        log_base = normal_log_prob(widened(noise)).sum(-1) - widened(log_std).sum(-1)
        log_reverse = reverse.log_prob(params["reverse"], a, of_reverse(z, encoding))
        log_ratio = log_base - widened(log_det) - widened(log_reverse)
        return z.reshape(*z.shape[:-1], *event_shape), log_ratio.astype(z.dtype)

    def no_density(*args: Any) -> Any:
        raise ValueError(
            "auxiliary: q(z|x) at a given z is an integral over the auxiliary variables; it has no "
            "closed form"
        )

    return Family(init, sample_and_log_prob, no_density, no_density)
