"""Encoders q(z'|x): networks that emit the base of the approximate posterior."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from jax import Array

from led_jax.descriptions import constructor, describe
from led_jax.modules import pure_of_context
from led_jax.networks import MLP, ResConvEncoder, check_image_shape, features_down_to

Params = Any


class Encoding(NamedTuple):
    """The output of an encoder for x: the posterior's base q(z'|x) = N(mean, exp(log_std)^2).

    Attributes:
      mean: `[..., *latent_shape]`.
      log_std: `[..., *latent_shape]`.
      context: `[..., context_dim]` for the posterior flow, or None.
    """

    mean: Array
    log_std: Array
    context: Array | None = None


class InitFn(Protocol):
    """Creates the parameters: a pytree of trainable floats."""

    def __call__(self, key: Array, x: Array, context: Array | None = None, /) -> Params:
        """`x`, `context`: examples that fix shapes and dtype, with any leading batch axes."""
        ...


class EncodeFn(Protocol):
    """Maps x to the base of the posterior."""

    def __call__(self, params: Params, x: Array, context: Array | None = None, /) -> Encoding:
        """`x`: `[..., *x_shape]`; `context`: `[..., C]`, what the model is conditional on."""
        ...


class Encoder(NamedTuple):
    """A network from x `[..., *x_shape]` to an `Encoding`.

    Attributes:
      init: `(key, x, context=None) -> params`.
      apply: `(params, x, context=None) -> Encoding`.
    """

    init: InitFn
    apply: EncodeFn

    __repr__ = describe


@constructor
def mlp_encoder(
    latent_dim: int, hidden: Sequence[int] = (200, 200), *, context_dim: int | None = None
) -> Encoder:
    """A fully connected encoder of x `[..., D]`.

    >>> encoder = mlp_encoder(latent_dim=5, hidden=(32,))
    >>> params = encoder.init(jax.random.key(0), jnp.zeros((1, 64)))
    >>> encoder.apply(params, jnp.zeros((4, 64))).mean.shape
    (4, 5)

    Args:
      latent_dim: number of latent variables.
      hidden: widths of the hidden layers.
      context_dim: width of the context for the posterior flow; None gives no context.
    """
    return gaussian_encoder(
        MLP((*hidden, 2 * latent_dim + (context_dim or 0))), latent_dim, context_dim
    )


@constructor
def gaussian_encoder(module: nn.Module, latent_dim: int, context_dim: int | None = None) -> Encoder:
    """An encoder from a network that emits mean, log standard deviation and context.

    Args:
      module: maps x to `[..., 2 * latent_dim + (context_dim or 0)]`.
      latent_dim: number of latent variables.
      context_dim: width of the context; None gives no context.
    """
    init, network = pure_of_context(module)

    def apply(params: Params, x: Array, context: Array | None = None) -> Encoding:
        out = network(params, x, context)
        expected = 2 * latent_dim + (context_dim or 0)
        if out.shape[-1] != expected:
            raise ValueError(f"encoder: expected {expected} outputs, the network has {out.shape}")
        mean, log_std = out[..., :latent_dim], out[..., latent_dim : 2 * latent_dim]
        return Encoding(mean, log_std, None if context_dim is None else out[..., 2 * latent_dim :])

    return Encoder(init, apply)


@constructor
def resconv_encoder(
    image_shape: tuple[int, ...],
    latent_dim: int,
    features: Sequence[int] = (16, 32, 32),
    hidden: int = 450,
    *,
    context_dim: int | None = None,
    weight_norm: bool = False,
) -> Encoder:
    """An encoder of flattened images by residual convolutions of stride 2 and ELUs.

    Huang et al. (2017), table 1.

    >>> encoder = resconv_encoder((8, 8), latent_dim=5)
    >>> params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 64)))
    >>> jax.eval_shape(encoder.apply, params, jnp.zeros((4, 64))).mean.shape
    (4, 5)

    Args:
      image_shape: (H, W) in pixels, or (H, W, C) of colour images.
      latent_dim: number of latent variables.
      features: number of maps of each block; each halves their height and width, rounding up.
      hidden: width of the fully connected layer after the last block.
      context_dim: width of the context for the posterior flow; None gives no context.
      weight_norm: whether to normalize the weights of every layer.

    Raises:
      ValueError: if image_shape is not as above.
    """
    check_image_shape(image_shape)
    size = 2 * latent_dim + (context_dim or 0)
    module = ResConvEncoder(image_shape, size, tuple(features), hidden, weight_norm)
    return gaussian_encoder(module, latent_dim, context_dim)


@constructor
def spatial_encoder(
    image_shape: tuple[int, ...],
    latent_shape: tuple[int, int, int],
    features: Sequence[int] = (16, 32, 32),
    *,
    context_maps: int | None = None,
    weight_norm: bool = False,
) -> Encoder:
    """`resconv_encoder` without its fully connected layers: the latent variables are maps.

    After the blocks a 3 x 3 convolution emits mean, log standard deviation and context.

    >>> encoder = spatial_encoder((8, 8), latent_shape=(2, 2, 3))
    >>> params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 64)))
    >>> jax.eval_shape(encoder.apply, params, jnp.zeros((4, 64))).mean.shape
    (4, 2, 2, 3)

    Args:
      image_shape: (H, W) in pixels, or (H, W, C) of colour images.
      latent_shape: (H, W, C) of the latent variables. H and W are the image's, halved once or more,
        rounding up.
      features: number of maps of each block; only the first blocks, up to the one that reaches
        H x W, are used.
      context_maps: number of maps of the context for the posterior flow, which is flattened to a
        vector of H * W * context_maps entries; None gives no context.
      weight_norm: whether to normalize the weights of every layer.

    Raises:
      ValueError: if no block reaches H x W.
    """
    channels = latent_shape[-1]
    features = features_down_to(latent_shape, image_shape, features)
    size = 2 * channels + (context_maps or 0)
    module = ResConvEncoder(image_shape, size, features, None, weight_norm)
    init, encode = gaussian_encoder(module, channels, context_maps)

    def apply(params: Params, x: Array, context: Array | None = None) -> Encoding:
        encoding = encode(params, x, context)
        if encoding.context is None:
            return encoding
        *batch_shape, height, width, maps = encoding.context.shape
        vector = encoding.context.reshape(*batch_shape, height * width * maps)
        return encoding._replace(context=vector)

    return Encoder(init, apply)
