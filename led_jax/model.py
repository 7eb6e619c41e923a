"""LED: a latent-variable model with explicit, learnable densities on both sides of the bound."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from led_jax.densities import Density, normal_log_prob
from led_jax.flows.base import Flow
from led_jax.networks import Decoder, Encoder, Encoding
from led_jax.numerics import device_rows

Params = Any


class Elbo(NamedTuple):
    """The three expectations of Huang et al. (2017), eq. 5, each `[...]` in nats.

    Attributes:
      log_likelihood: log p(x|z).
      log_prior: log p(z) = log p(h^-1(z)) + log|dh^-1/dz|.
      log_posterior: log q(z|x) = log q(z'|x) - log|dg/dz'|.
    """

    log_likelihood: Array
    log_prior: Array
    log_posterior: Array

    @property
    def bound(self) -> Array:
        """log_likelihood + log_prior - log_posterior, an unbiased estimate of the ELBO."""
        return self.log_likelihood + self.log_prior - self.log_posterior


class LED(NamedTuple):
    """Encoder q(z'|x), posterior flow g: z' -> z, prior density p(z) and decoder p(x|z).

    Huang et al. (2017), section 4. The methods are pure functions of their arguments.

    Attributes:
      encoder: the base of the approximate posterior, and the flow's context.
      posterior: flow g from z' to z; `apply` should be its cheap direction.
      prior: density of z; `log_prob` should be its cheap direction.
      decoder: observation model.
    """

    encoder: Encoder
    posterior: Flow
    prior: Density
    decoder: Decoder

    def init(self, key: Array, x: Array) -> Params:
        """Parameters as one pytree.

        Args:
          key: PRNG key.
          x: examples `[..., *x_shape]`, of which only shape and dtype matter to most parts.

        Returns:
          `{"encoder": ..., "posterior": ..., "prior": ..., "decoder": ...}`.
        """
        keys = jax.random.split(key, 4)
        encoder = self.encoder.init(keys[0], x)
        z, _, context = self.encoder.apply(encoder, x)
        posterior = self.posterior.init(keys[1], z, context)
        z, _ = self.posterior.apply(posterior, z, context)
        prior = self.prior.init(keys[2], z)
        decoder = self.decoder.init(keys[3], z)
        return {"encoder": encoder, "posterior": posterior, "prior": prior, "decoder": decoder}

    def elbo(
        self,
        params: Params,
        key: Array,
        x: Array,
        sample_shape: tuple[int, ...] = (),
        encoding: Encoding | None = None,
        axis_name: str | None = None,
    ) -> Elbo:
        """One-sample estimates of the bound's terms, eq. 5.

        Args:
          params: parameters.
          key: PRNG key for z'.
          x: data `[..., *x_shape]`.
          sample_shape: shape of independent draws of z for every x; x is encoded only once.
          encoding: the encoder's output for x, where it is at hand.
          axis_name: mapped axis over whose devices x's first axis is split, so that each draws
            the noise of its own rows out of the whole batch's; None for one device alone.

        Returns:
          `Elbo` of arrays `[*sample_shape, ...]`.
        """
        if encoding is None:
            encoding = self.encoder.apply(params["encoder"], x)
        z, log_posterior = self.posterior_sample_and_log_prob(
            params, key, encoding, sample_shape, axis_name
        )
        terms = Elbo(
            log_likelihood=self.decoder.log_prob(params["decoder"], z, x),
            log_prior=self.prior.log_prob(params["prior"], z),
            log_posterior=log_posterior,
        )
        chex.assert_equal_shape(terms)
        return terms

    def encode(self, params: Params, key: Array, x: Array) -> Array:
        """A draw z ~ q(z|x), `[..., *latent_shape]`, for x `[..., *x_shape]`."""
        return self.posterior_sample_and_log_prob(
            params, key, self.encoder.apply(params["encoder"], x)
        )[0]

    def reconstruct(self, params: Params, key: Array, x: Array) -> Array:
        """The decoder's mean at a draw z ~ q(z|x), in the shape of x `[..., *x_shape]`."""
        return self.decoder.mean(params["decoder"], self.encode(params, key, x))

    def sample(self, params: Params, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws x ~ p(x), `[*sample_shape, *x_shape]`."""
        prior_key, decoder_key = jax.random.split(key)
        z, _ = self.prior.sample_and_log_prob(params["prior"], prior_key, sample_shape)
        return self.decoder.sample(params["decoder"], decoder_key, z)

    def posterior_sample_and_log_prob(
        self,
        params: Params,
        key: Array,
        encoding: Encoding,
        sample_shape: tuple[int, ...] = (),
        axis_name: str | None = None,
    ) -> tuple[Array, Array]:
        """Draws z ~ q(z|x) and log q(z|x), without inverting the flow.

        Args:
          params: parameters.
          key: PRNG key.
          encoding: the encoder's output for x `[..., *x_shape]`.
          sample_shape: shape of independent draws for every x.
          axis_name: as in `elbo`.

        Returns:
          z `[*sample_shape, ..., *latent_shape]` and log q(z|x) `[*sample_shape, ...]` in nats.
        """
        mean, log_std, context = encoding
        shape, rows = (*sample_shape, *mean.shape), len(sample_shape)
        noise = device_rows(jax.random.normal, key, shape, axis_name, rows, dtype=mean.dtype)
        z, log_det = self.posterior.apply(
            params["posterior"], mean + jnp.exp(log_std) * noise, context
        )
        log_base = normal_log_prob(noise) - log_std
        event_axes = tuple(range(log_det.ndim - log_base.ndim, 0))
        return z, log_base.sum(event_axes) - log_det

    def posterior_log_prob(self, params: Params, z: Array, encoding: Encoding) -> Array:
        """log q(z|x) at any z, which inverts the flow.

        Args:
          params: parameters.
          z: points `[..., *latent_shape]`, whose batch axes broadcast against those of x.
          encoding: the encoder's output for x.

        Returns:
          Log-densities in nats, of the common batch shape. A flow that reads no context is inverted
          once for each z, one that does for each pair of z and x.
        """
        mean, log_std, context = encoding
        if context is not None:
            z = jnp.broadcast_to(z, jnp.broadcast_shapes(z.shape, mean.shape))
        base, log_det = self.posterior.inverse(params["posterior"], z, context)
        log_base = normal_log_prob((base - mean) * jnp.exp(-log_std)) - log_std
        event_axes = tuple(range(log_det.ndim - base.ndim, 0))
        return log_base.sum(event_axes) + log_det
