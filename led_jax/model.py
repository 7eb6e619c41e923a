"""LED: a latent-variable model with explicit, learnable densities on both sides of the bound."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax import Array

from led_jax.decoders import Decoder
from led_jax.densities import Density
from led_jax.descriptions import arguments, constructor, describe
from led_jax.encoders import Encoder, Encoding
from led_jax.flows.base import Flow
from led_jax.likelihoods import check_values
from led_jax.numerics import dtype_of
from led_jax.posteriors import Family, of_flow
from led_jax.priors import Bound, Posterior, Prior, lift

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


@constructor
class LED(NamedTuple):
    """Encoder q(z'|x), posterior flow g: z' -> z, prior p(z) and decoder p(x|z).

    Huang et al. (2017), section 4. The methods are pure functions of their arguments. With a
    `context` c the whole model is conditional, p(x|c): encoder, prior and decoder read it. The
    posterior flow reads another context, `Encoding.context`, which the encoder emits.

    Attributes:
      encoder: the base of the approximate posterior, and the flow's context.
      posterior: flow g from z' to z, whose `apply` should be its cheap direction; or a
        `posteriors.Family`.
      prior: density of z, or a `Prior` that reads the posterior; its `log_prob` should be its
        cheap direction.
      decoder: observation model.
    """

    encoder: Encoder
    posterior: Flow | Family
    prior: Density | Prior
    decoder: Decoder

    __repr__ = describe
    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        """Whether the other has equal parts and this class: a subclass may have other methods."""
        return type(self) is type(other) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        """Not `__eq__`."""
        return not self == other

    def init(
        self,
        key: Array,
        x: Array,
        context: Array | None = None,
        *,
        given: Mapping[str, Params] | None = None,
    ) -> Params:
        """Creates the parameters of all parts as one pytree.

        Args:
          key: PRNG key.
          x: rows of the data `[n, *x_shape]`. Every part uses their shape and dtype; parts that
            start from data, such as a VampPrior, also use their values and number.
          context: `[n, C]`, what the model is conditional on.
          given: parameters of some parts, which are used instead of fresh ones.

        Returns:
          `{"encoder": ..., "posterior": ..., "prior": ..., "decoder": ...}`.

        Raises:
          ValueError: if `given` names a part that a LED does not have, or x has values that the
            decoder does not take.
        """
        self.check_data(x)
        given = given or {}
        if unknown := sorted(set(given) - set(self._fields)):
            raise ValueError(f"LED.init: expected parts {', '.join(self._fields)}, got {unknown}")
        keys = dict(zip(self._fields, jax.random.split(key, 4), strict=True))
        params = dict(given)
        if "encoder" not in given:
            params["encoder"] = self.encoder.init(keys["encoder"], x, context)
        encoding = self.encoding(params, x, context)
        if "posterior" not in given:
            params["posterior"] = self._family.init(keys["posterior"], encoding)
        if "prior" not in given:
            posterior = self._posterior_at(params)
            params["prior"] = self._prior.init(keys["prior"], x, posterior, context)
        if "decoder" not in given:
            params["decoder"] = self.decoder.init(keys["decoder"], encoding.mean, context)
        return {name: params[name] for name in self._fields}

    def all_but_prior(self, params: Params) -> dict[str, Params]:
        """The parameters that q(z|x) and p(x|z) depend on, as `init` takes them in `given`."""
        return {name: params[name] for name in self._fields if name != "prior"}

    def elbo(
        self,
        params: Params,
        key: Array,
        x: Array,
        sample_shape: tuple[int, ...] = (),
        encoding: Encoding | None = None,
        context: Array | None = None,
    ) -> Elbo:
        """One-sample estimates of the bound's terms, eq. 5.

        Args:
          params: parameters.
          key: PRNG key for z'.
          x: data `[..., *x_shape]`.
          sample_shape: shape of independent draws of z for every x; x is encoded only once.
          encoding: the encoder's output for x, if it is known already.
          context: `[..., C]`, what the model is conditional on.

        Returns:
          `Elbo` of arrays `[*sample_shape, ...]`.
        """
        if encoding is None:
            encoding = self.encoding(params, x, context)
        z, log_posterior = self.posterior_sample_and_log_prob(params, key, encoding, sample_shape)
        terms = Elbo(
            log_likelihood=self.log_likelihood(params, z, x, context),
            log_prior=self.prior_log_prob(params, z, context),
            log_posterior=log_posterior,
        )
        chex.assert_equal_shape(terms)
        return terms

    def log_weight(
        self,
        params: Params,
        z: Array,
        x: Array,
        encoding: Encoding | None = None,
        context: Array | None = None,
    ) -> Array:
        """log p(x|z) + log p(z) - log q(z|x) at any z, by inverting the posterior's flow.

        Args:
          params: parameters.
          z: points `[..., *latent_shape]`, whose batch axes broadcast against those of x.
          x: data `[..., *x_shape]`.
          encoding: the encoder's output for x, if it is known already.
          context: `[..., C]`, what the model is conditional on.

        Returns:
          Log importance weights in nats, of the common batch shape.
        """
        if encoding is None:
            encoding = self.encoding(params, x, context)
        log_joint = self.log_likelihood(params, z, x, context)
        log_joint += self.prior_log_prob(params, z, context)
        return log_joint - self.posterior_log_prob(params, z, encoding)

    def check_data(self, x: np.ndarray | Array) -> None:
        """Checks that the decoder takes the values of x, unless x is traced.

        Raises:
          ValueError: if it does not.
        """
        check_values("LED", self.decoder.values, x)

    def encoding(self, params: Params, x: Array, context: Array | None = None) -> Encoding:
        """The encoder's output for x `[..., *x_shape]`: the base of q(z|x)."""
        return self.encoder.apply(_part(params, "encoder"), x, context)

    def encode(self, params: Params, key: Array, x: Array, context: Array | None = None) -> Array:
        """A draw z ~ q(z|x), `[..., *latent_shape]`, for x `[..., *x_shape]`."""
        encoding = self.encoding(params, x, context)
        return self.posterior_sample_and_log_prob(params, key, encoding)[0]

    def decode(self, params: Params, z: Array, context: Array | None = None) -> Array:
        """The mean of p(x|z), `[..., *x_shape]`, for z `[..., *latent_shape]`."""
        return self.decoder.mean(_part(params, "decoder"), z, context)

    def reconstruct(
        self, params: Params, key: Array, x: Array, context: Array | None = None
    ) -> Array:
        """The mean of p(x|z) at a draw z ~ q(z|x), in the shape of x `[..., *x_shape]`."""
        return self.decode(params, self.encode(params, key, x, context), context)

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ) -> Array:
        """Draws x ~ p(x), `[*sample_shape, *x_shape]`, or x ~ p(x|c) for each c of a context."""
        prior_key, decoder_key = jax.random.split(key)
        z, _ = self.prior_sample_and_log_prob(params, prior_key, sample_shape, context)
        # A prior without parameters draws floats of the default dtype.
        z = z.astype(dtype_of(_part(params, "decoder"), z.dtype))
        return self.decode_sample(params, decoder_key, z, context)

    def decode_sample(
        self, params: Params, key: Array, z: Array, context: Array | None = None
    ) -> Array:
        """A draw x ~ p(x|z), `[..., *x_shape]`, for z `[..., *latent_shape]`."""
        return self.decoder.sample(_part(params, "decoder"), key, z, context)

    def log_likelihood(
        self, params: Params, z: Array, x: Array, context: Array | None = None
    ) -> Array:
        """Log p(x|z) in nats, for z and x whose batch axes broadcast."""
        return self.decoder.log_prob(_part(params, "decoder"), z, x, context)

    def prior_log_prob(self, params: Params, z: Array, context: Array | None = None) -> Array:
        """Log p(z) in nats, `[...]` for z `[..., *latent_shape]`."""
        return self._prior_at(params).log_prob(z, context)

    def prior_sample_and_log_prob(
        self,
        params: Params,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        context: Array | None = None,
    ) -> tuple[Array, Array]:
        """Draws z ~ p(z) `[*sample_shape, *latent_shape]` and log p(z) `[*sample_shape]`."""
        return self._prior_at(params).sample_and_log_prob(key, sample_shape, context)

    def prior_apply(
        self, params: Params, z0: Array, context: Array | None = None
    ) -> tuple[Array, Array]:
        """z = h(z0) and log|det dh/dz0|: the flow of a prior made by `densities.transformed`.

        Raises:
          ValueError: if the prior was made in another way.
        """
        flow, flow_params = self._prior_flow(params)
        return flow.apply(flow_params, z0, context)

    def prior_inverse(
        self, params: Params, z: Array, context: Array | None = None
    ) -> tuple[Array, Array]:
        """z0 = h^-1(z) and log|det dh^-1/dz|, the inverse of `prior_apply`."""
        flow, flow_params = self._prior_flow(params)
        return flow.inverse(flow_params, z, context)

    def posterior_sample_and_log_prob(
        self,
        params: Params,
        key: Array,
        encoding: Encoding,
        sample_shape: tuple[int, ...] = (),
    ) -> tuple[Array, Array]:
        """Draws z ~ q(z|x) and log q(z|x), without inverting the flow.

        Args:
          params: parameters.
          key: PRNG key.
          encoding: the encoder's output for x `[..., *x_shape]`.
          sample_shape: shape of independent draws for every x.

        Returns:
          z `[*sample_shape, ..., *latent_shape]` and log q(z|x) `[*sample_shape, ...]` in nats.
        """
        return self._family.sample_and_log_prob(
            _part(params, "posterior"), key, encoding, sample_shape
        )

    def posterior_log_prob(self, params: Params, z: Array, encoding: Encoding) -> Array:
        """log q(z|x) at any z, by inverting the flow.

        Args:
          params: parameters.
          z: points `[..., *latent_shape]`, whose batch axes broadcast against those of x.
          encoding: the encoder's output for x.

        Returns:
          Log-densities in nats, of the common batch shape. The flow is inverted once for each z if
          the encoder gives no context, and once for each pair of z and x if it does.
        """
        return self._family.log_prob(_part(params, "posterior"), z, encoding)

    def posterior_mixture(self, params: Params, encoding: Encoding) -> Callable[[Array], Array]:
        """The mixture 1/K sum_k q(z|x_k) of the posteriors of K rows, as z -> log-density.

        With all rows of a data set this is the aggregated posterior.

        Args:
          params: parameters.
          encoding: the encoder's output for the rows `[K, *x_shape]`.

        Returns:
          A function of z `[..., *latent_shape]` to log-densities `[...]` in nats. If the encoder
          gives no context, the flow is inverted once for each z, and one matrix product scores all
          pairs of a z and a row; if it gives one, the flow is inverted for each pair. That product
          loses digits in float32 where deviations are below about 1e-3 of the spread of the means;
          `posterior_log_prob` of each pair does not.
        """
        return self._family.mixture(_part(params, "posterior"), encoding)

    def posterior_inverse(
        self, params: Params, z: Array, context: Array | None = None
    ) -> tuple[Array, Array]:
        """z' = g^-1(z) and log|det dg^-1/dz| of the posterior's flow; reads the encoder's context.

        Raises:
          ValueError: if the posterior is not a flow.
        """
        if not isinstance(self.posterior, Flow):
            raise ValueError(f"LED: the posterior {self.posterior!r} is no flow, to be inverted")
        return self.posterior.inverse(_part(params, "posterior"), z, context)

    def _prior_flow(self, params: Params) -> tuple[Flow, Params]:
        name, made_of = arguments(self.prior)
        if name != "transformed":
            raise ValueError(
                f"LED: the prior {self.prior!r} has no flow; expected densities.transformed(...)"
            )
        return made_of["flow"], _part(params, "prior")["flow"]

    @property
    def _family(self) -> Family:
        return self.posterior if isinstance(self.posterior, Family) else of_flow(self.posterior)

    @property
    def _prior(self) -> Prior:
        return lift(self.prior) if isinstance(self.prior, Density) else self.prior

    def _prior_at(self, params: Params) -> Bound:
        return self._prior.bind(_part(params, "prior"), self._posterior_at(params))

    def _posterior_at(self, params: Params) -> Posterior:
        def encode(x: Array, context: Array | None = None) -> Encoding:
            return self.encoding(params, x, context)

        def log_prob(z: Array, encoding: Encoding) -> Array:
            return self.posterior_log_prob(params, z, encoding)

        def sample_and_log_prob(key: Array, encoding: Encoding, sample_shape=()):
            return self.posterior_sample_and_log_prob(params, key, encoding, sample_shape)

        def mixture(encoding: Encoding) -> Callable[[Array], Array]:
            return self.posterior_mixture(params, encoding)

        return Posterior(encode, log_prob, sample_and_log_prob, mixture)


def _part(params: Params, name: str) -> Params:
    if not isinstance(params, Mapping) or name not in params:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"LED: expected params with an entry {name!r}, as of init, got {found}")
    return params[name]
