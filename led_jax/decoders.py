"""Decoders p(x|z): a likelihood on top of a network."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from led_jax.densities import Density
from led_jax.descriptions import constructor, describe
from led_jax.likelihoods import Likelihood, bernoulli
from led_jax.modules import pure_of_context
from led_jax.networks import MLP, ResConvDecoder, check_image_shape, features_down_to
from led_jax.numerics import match_rank, widened

Params = Any


class InitFn(Protocol):
    """Creates the parameters: a pytree of trainable floats."""

    def __call__(self, key: Array, z: Array, context: Array | None = None, /) -> Params:
        """`z`, `context`: examples that fix shapes and dtype, with any leading batch axes."""
        ...


class LogProbFn(Protocol):
    """Scores data."""

    def __call__(
        self, params: Params, z: Array, x: Array, context: Array | None = None, /
    ) -> Array:
        """Returns log p(x|z) in nats, of the common batch shape of z and x."""
        ...


class MeanFn(Protocol):
    """The mean of the data."""

    def __call__(self, params: Params, z: Array, context: Array | None = None, /) -> Array:
        """Returns E[x|z], `[..., *x_shape]` for z `[..., *latent_shape]`."""
        ...


class SampleFn(Protocol):
    """Draws data."""

    def __call__(
        self, params: Params, key: Array, z: Array, context: Array | None = None, /
    ) -> Array:
        """Returns one draw x ~ p(x|z), `[..., *x_shape]`, for each z `[..., *latent_shape]`."""
        ...


class Decoder(NamedTuple):
    """An observation model p(x|z).

    Attributes:
      init: `(key, z, context=None) -> params`.
      log_prob: `(params, z, x, context=None) -> [...]`, log p(x|z) in nats; batch axes broadcast.
      mean: `(params, z, context=None) -> [..., *x_shape]`, the mean of p(x|z).
      sample: `(params, key, z, context=None) -> [..., *x_shape]`, draws from p(x|z).
      values: kind of values of x that it takes, see `Likelihood.values`.
    """

    init: InitFn
    log_prob: LogProbFn
    mean: MeanFn
    sample: SampleFn
    values: str = "real"

    __repr__ = describe


@constructor
def decoder(likelihood: Likelihood, network: nn.Module) -> Decoder:
    """p(x|z) = product over the entries of x of likelihood(x_i; network(z)_i).

    >>> from led_jax import likelihoods, networks
    >>> network = decoder(likelihoods.gaussian(std=0.5), networks.MLP((32, 64)))
    >>> params = network.init(jax.random.key(0), jnp.zeros((1, 5)))
    >>> network.log_prob(params, jnp.zeros((4, 5)), jnp.zeros((4, 64))).shape
    (4,)

    Args:
      likelihood: the distribution of one entry, given P outputs of the network.
      network: maps z to `[..., P * D]`: the first output of all D entries, then the second, ...

    Returns:
      A decoder whose parameters are the network's. If the likelihood has a row that is `free` of z,
      they are `{"network": ..., "free": ...}`, where the row, `[D]` or `[1]`, starts at 0.
    """
    init_network, outputs = pure_of_context(network)
    is_free = likelihood.free != "none"

    def of_network(params: Params, z: Array, context: Array | None) -> Array:
        out = outputs(params, z, context)
        size, rest = divmod(out.shape[-1], likelihood.num_params)
        if rest:
            raise ValueError(
                f"decoder: the likelihood takes {likelihood.num_params} outputs an entry, but the "
                f"network has {out.shape[-1]}, which is no multiple"
            )
        return out.reshape(*out.shape[:-1], likelihood.num_params, size)

    def init(key: Array, z: Array, context: Array | None = None) -> Params:
        params = init_network(key, z, context)
        if not is_free:
            return params
        out = jax.eval_shape(of_network, params, z, context)
        size = out.shape[-1] if likelihood.free == "entry" else 1
        return {"network": params, "free": jnp.zeros(size, out.dtype)}

    def raw(params: Params, z: Array, context: Array | None) -> Array:
        if not is_free:
            return of_network(params, z, context)
        out = of_network(params["network"], z, context)
        last = jnp.broadcast_to(
            match_rank(params["free"], out.ndim), (*out.shape[:-2], 1, out.shape[-1])
        )
        return jnp.concatenate([out, last], -2)

    def log_prob(params: Params, z: Array, x: Array, context: Array | None = None) -> Array:
        out = raw(params, z, context)
        if x.shape[-1:] != out.shape[-1:]:
            raise ValueError(f"decoder: expected x of shape [..., {out.shape[-1]}], got {x.shape}")
        log_prob = likelihood.log_prob(widened(out), widened(x))
        return log_prob.sum(-1).astype(out.dtype)

    def mean(params: Params, z: Array, context: Array | None = None) -> Array:
        return likelihood.mean(raw(params, z, context))

    def sample(params: Params, key: Array, z: Array, context: Array | None = None) -> Array:
        return likelihood.sample(key, raw(params, z, context))

    return Decoder(init, log_prob, mean, sample, likelihood.values)


@constructor
def density_decoder(
    density: Density, event_shape: tuple[int, ...], network: nn.Module, mean_samples: int = 32
) -> Decoder:
    """p(x|z) = p(x | context = network(z)), for any density that reads a context.

    The entries of x are dependent given z. If the density is a Real NVP flow, this is the decoder
    of Agrawal and Dukkipati (2016), who use checkerboard masks for images.

    >>> from led_jax import densities, flows, networks
    >>> flow = flows.real_nvp((6,), depth=2, hidden=(8,), context_dim=4)
    >>> density = densities.transformed(densities.standard_normal((6,)), flow)
    >>> network = density_decoder(density, (6,), networks.MLP((32, 4)))
    >>> params = network.init(jax.random.key(0), jnp.zeros((1, 5)))
    >>> network.log_prob(params, jnp.zeros((4, 5)), jnp.zeros((4, 6))).shape
    (4,)

    Args:
      density: a density of events of the given shape, which reads a context `[..., C]`.
      event_shape: the density's event shape, of D entries. The decoder itself takes and returns x
        as vectors `[..., D]`, as all decoders do.
      network: maps z to the context `[..., C]`.
      mean_samples: number of draws that `mean` averages, always with the same key, because a
        density has no mean in closed form.

    Returns:
      A decoder whose parameters are `{"network": ..., "density": ...}`.

    Raises:
      ValueError: if mean_samples is not positive; from `log_prob`, if x is not `[..., D]`.
    """
    if mean_samples < 1:
        raise ValueError(f"density_decoder: mean_samples must be positive, got {mean_samples}")
    event_shape, size = tuple(event_shape), math.prod(event_shape)
    init_network, outputs = pure_of_context(network)

    def init(key: Array, z: Array, context: Array | None = None) -> Params:
        network_key, density_key = jax.random.split(key)
        params = init_network(network_key, z, context)
        code = outputs(params, z, context)
        x = jnp.zeros((*code.shape[:-1], *event_shape), code.dtype)
        return {"network": params, "density": density.init(density_key, x, code)}

    def log_prob(params: Params, z: Array, x: Array, context: Array | None = None) -> Array:
        if x.shape[-1:] != (size,):
            raise ValueError(f"density_decoder: expected x of shape [..., {size}], got {x.shape}")
        code = outputs(params["network"], z, context)
        batch_shape = jnp.broadcast_shapes(code.shape[:-1], x.shape[:-1])
        x = jnp.broadcast_to(x, (*batch_shape, size)).reshape(*batch_shape, *event_shape)
        return density.log_prob(params["density"], x.astype(code.dtype), code)

    def draws(params: Params, key: Array, z: Array, context: Array | None, shape: tuple) -> Array:
        code = outputs(params["network"], z, context)
        x, log_prob = density.sample_and_log_prob(params["density"], key, shape, code)
        return x.reshape(*log_prob.shape, size)

    def mean(params: Params, z: Array, context: Array | None = None) -> Array:
        return draws(params, jax.random.key(0), z, context, (mean_samples,)).mean(0)

    def sample(params: Params, key: Array, z: Array, context: Array | None = None) -> Array:
        return draws(params, key, z, context, ())

    return Decoder(init, log_prob, mean, sample)


@constructor
def mlp_decoder(
    x_dim: int, hidden: Sequence[int] = (200, 200), *, likelihood: Likelihood | None = None
) -> Decoder:
    """A fully connected decoder to x `[..., D]`.

    >>> network = mlp_decoder(64, hidden=(32,))
    >>> params = network.init(jax.random.key(0), jnp.zeros((1, 5)))
    >>> network.mean(params, jnp.zeros((4, 5))).shape
    (4, 64)

    Args:
      x_dim: number D of entries of x.
      hidden: widths of the hidden layers.
      likelihood: of an entry; None takes `bernoulli()`.
    """
    likelihood = likelihood or bernoulli()
    return decoder(likelihood, MLP((*hidden, likelihood.num_params * x_dim)))


@constructor
def resconv_decoder(
    image_shape: tuple[int, ...],
    features: Sequence[int] = (16, 32, 32),
    hidden: int = 450,
    *,
    weight_norm: bool = False,
    likelihood: Likelihood | None = None,
) -> Decoder:
    """The mirror image of `resconv_encoder`.

    The encoder's blocks halve the maps, rounding up; the decoder's blocks double them by bilinear
    interpolation, and crop them to their size in the encoder.

    >>> network = resconv_decoder((8, 8))
    >>> params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 5)))
    >>> jax.eval_shape(network.mean, params, jnp.zeros((4, 5))).shape
    (4, 64)

    Args:
      image_shape: (H, W) in pixels, or (H, W, C) of colour images.
      features: number of maps of each of the encoder's blocks.
      hidden: width of the first fully connected layer.
      weight_norm: whether to normalize the weights of every layer.
      likelihood: of a pixel; None takes `bernoulli()`.

    Raises:
      ValueError: if image_shape is not as above.
    """
    check_image_shape(image_shape)
    likelihood = likelihood or bernoulli()
    module = ResConvDecoder(
        image_shape, tuple(features), hidden, weight_norm, likelihood.num_params
    )
    return decoder(likelihood, module)


@constructor
def spatial_decoder(
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, int, int],
    features: Sequence[int] = (16, 32, 32),
    *,
    weight_norm: bool = False,
    likelihood: Likelihood | None = None,
) -> Decoder:
    """The mirror image of `spatial_encoder`.

    >>> network = spatial_decoder((8, 8), latent_shape=(2, 2, 3))
    >>> params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    >>> jax.eval_shape(network.mean, params, jnp.zeros((4, 2, 2, 3))).shape
    (4, 64)

    Args:
      image_shape: (H, W) in pixels, or (H, W, C) of colour images.
      latent_shape: (H, W, C) of the latent variables, as for the encoder.
      features: number of maps of each of the encoder's blocks.
      weight_norm: whether to normalize the weights of every layer.
      likelihood: of a pixel; None takes `bernoulli()`.

    Raises:
      ValueError: if the encoder's blocks do not reduce the image to H x W.
    """
    features = features_down_to(latent_shape, image_shape, features)
    likelihood = likelihood or bernoulli()
    module = ResConvDecoder(image_shape, features, None, weight_norm, likelihood.num_params)
    return decoder(likelihood, module)
