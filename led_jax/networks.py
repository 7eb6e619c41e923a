"""Encoders q(z'|x) and decoders p(x|z): networks and the distributions they parameterize."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from led_jax.convolutions import Conv
from led_jax.densities import normal_log_prob
from led_jax.modules import pure
from led_jax.numerics import softplus

Params = Any


class Encoding(NamedTuple):
    """What an encoder says of x: the posterior's base q(z'|x) = N(mean, exp(log_std)^2).

    Attributes:
      mean: `[..., *latent_shape]`.
      log_std: `[..., *latent_shape]`.
      context: `[..., context_dim]` for the posterior flow, or None.
    """

    mean: Array
    log_std: Array
    context: Array | None = None


class Encoder(NamedTuple):
    """A network from x `[..., *x_shape]` to an `Encoding`.

    Attributes:
      init: `(key, x) -> params`.
      apply: `(params, x) -> Encoding`.
    """

    init: Callable[[Array, Array], Params]
    apply: Callable[[Params, Array], Encoding]


class Decoder(NamedTuple):
    """An observation model p(x|z).

    Attributes:
      init: `(key, z) -> params`.
      log_prob: `(params, z, x) -> [...]`, log p(x|z) in nats; batch axes of z and x broadcast.
      mean: `(params, z) -> [..., *x_shape]`, the mean of p(x|z).
      sample: `(params, key, z) -> [..., *x_shape]`, draws from p(x|z).
    """

    init: Callable[[Array, Array], Params]
    log_prob: Callable[[Params, Array, Array], Array]
    mean: Callable[[Params, Array], Array]
    sample: Callable[[Params, Array, Array], Array]


class MLP(nn.Module):
    """Fully connected layers, the last one linear: `[..., K]` to `[..., sizes[-1]]`."""

    sizes: tuple[int, ...]
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layers."""
        for i, size in enumerate(self.sizes):
            x = nn.Dense(size, dtype=x.dtype, param_dtype=x.dtype)(x)
            if i < len(self.sizes) - 1:
                x = self.activation(x)
        return x


class ResBlock(nn.Module):
    """Residual convolutions of `[..., H, W, C]` with a convolution of the same stride as shortcut.

    He et al. (2015), https://arxiv.org/abs/1512.03385.

    Attributes:
      hidden: number of maps between the two layers of the residual branch.
      features: number of maps it emits.
      stride: of the first layer and the shortcut.
      upsample: whether the first layer and the shortcut double the maps.
      weight_norm: whether to normalize the weights (Salimans and Kingma, 2016, eq. 2,
        https://arxiv.org/abs/1602.07868).
    """

    hidden: int
    features: int
    stride: int = 1
    upsample: bool = False
    weight_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        # The residual branch and the shortcut read the same patches, so they are one product.
        first = Conv(self.hidden + self.features, self.stride, self.upsample)
        h = _normalized(first, self.weight_norm)(x)
        h, shortcut = h[..., : self.hidden], h[..., self.hidden :]
        return shortcut + _normalized(Conv(self.features), self.weight_norm)(nn.elu(h))


class ResConvEncoder(nn.Module):
    """See `resconv_encoder`: `[..., H * W]` to `[..., size]`, or to size maps if hidden is None."""

    image_shape: tuple[int, int]
    size: int
    features: tuple[int, ...]
    hidden: int | None
    weight_norm: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        if x.shape[-1] != math.prod(self.image_shape):
            raise ValueError(
                f"encoder: expected flattened images {self.image_shape}, so [..., "
                f"{math.prod(self.image_shape)}], got {x.shape}"
            )
        h = x.reshape(*x.shape[:-1], *self.image_shape, 1)
        for width in self.features:
            h = nn.elu(ResBlock(width, width, stride=2, weight_norm=self.weight_norm)(h))
        if self.hidden is None:
            return _normalized(_linear_conv(self.size), self.weight_norm)(h)
        h = h.reshape(*x.shape[:-1], -1)
        h = nn.elu(_dense(self.hidden, x.dtype, self.weight_norm)(h))
        return _dense(self.size, x.dtype, self.weight_norm)(h)


class ResConvDecoder(nn.Module):
    """See `resconv_decoder`: `[..., D]`, or maps if hidden is None, to `[..., H * W]`."""

    image_shape: tuple[int, int]
    features: tuple[int, ...]
    hidden: int | None
    weight_norm: bool

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Applies the network."""
        # Of the encoder's input and of each of its blocks' outputs.
        shapes, widths = _halvings(self.image_shape, len(self.features)), (1, *self.features)
        if self.hidden is None:
            if z.shape[-3:-1] != shapes[-1]:
                expected = ", ".join(map(str, shapes[-1]))
                raise ValueError(
                    f"decoder: expected z of shape [..., {expected}, C], got {z.shape}"
                )
            h = _normalized(_linear_conv(widths[-1]), self.weight_norm)(z)
        else:
            smallest = (*shapes[-1], widths[-1])
            h = nn.elu(_dense(self.hidden, z.dtype, self.weight_norm)(z))
            h = _dense(math.prod(smallest), z.dtype, self.weight_norm)(h)
            h = h.reshape(*z.shape[:-1], *smallest)
        for i in reversed(range(len(self.features))):
            block = ResBlock(widths[i + 1], widths[i], upsample=True, weight_norm=self.weight_norm)
            height, width = shapes[i]
            h = block(nn.elu(h))[..., :height, :width, :]
        return h.reshape(*h.shape[:-3], math.prod(self.image_shape))


def _halvings(image_shape: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Height and width of an image, and of what each of `count` strided blocks makes of it."""
    shapes = [image_shape]
    for _ in range(count):
        height, width = shapes[-1]
        shapes.append((-(-height // 2), -(-width // 2)))
    return shapes


def _linear_conv(features: int) -> Conv:
    """A convolution with the initial scale of a dense layer, before or after latent variables."""
    return Conv(features, kernel_init=nn.initializers.lecun_normal())


def _normalized(layer: nn.Module, weight_norm: bool) -> nn.Module:
    return nn.WeightNorm(layer) if weight_norm else layer


def _dense(size: int, dtype: Any, weight_norm: bool) -> nn.Module:
    return _normalized(nn.Dense(size, dtype=dtype, param_dtype=dtype), weight_norm)


def mlp_encoder(
    latent_dim: int, hidden: Sequence[int] = (200, 200), *, context_dim: int | None = None
) -> Encoder:
    """A fully connected encoder of x `[..., D]`.

    Args:
      latent_dim: number of latent variables.
      hidden: widths of the hidden layers.
      context_dim: width of the context for the posterior flow; None gives no context.
    """
    return gaussian_encoder(
        MLP((*hidden, 2 * latent_dim + (context_dim or 0))), latent_dim, context_dim
    )


def gaussian_encoder(module: nn.Module, latent_dim: int, context_dim: int | None = None) -> Encoder:
    """The encoder of a network that emits mean, log standard deviation and context.

    Args:
      module: maps x to `[..., 2 * latent_dim + (context_dim or 0)]`.
      latent_dim: number of latent variables.
      context_dim: width of the context; None gives no context.
    """
    init, network = pure(module)

    def apply(params: Params, x: Array) -> Encoding:
        out = network(params, x)
        expected = 2 * latent_dim + (context_dim or 0)
        if out.shape[-1] != expected:
            raise ValueError(f"encoder: expected {expected} outputs, the network has {out.shape}")
        mean, log_std = out[..., :latent_dim], out[..., latent_dim : 2 * latent_dim]
        return Encoding(mean, log_std, None if context_dim is None else out[..., 2 * latent_dim :])

    return Encoder(init, apply)


def mlp_decoder(x_dim: int, hidden: Sequence[int] = (200, 200)) -> Decoder:
    """A fully connected decoder to `x_dim` independent Bernoulli variables."""
    return bernoulli_decoder(MLP((*hidden, x_dim)))


def resconv_encoder(
    image_shape: tuple[int, int],
    latent_dim: int,
    features: Sequence[int] = (16, 32, 32),
    hidden: int = 450,
    *,
    context_dim: int | None = None,
    weight_norm: bool = False,
) -> Encoder:
    """An encoder of flattened images by residual convolutions of stride 2 and ELUs.

    Huang et al. (2017), table 1.

    Args:
      image_shape: (H, W) in pixels.
      latent_dim: number of latent variables.
      features: number of maps of each block; each halves their height and width, rounding up.
      hidden: width of the fully connected layer after the last block.
      context_dim: width of the context for the posterior flow; None gives no context.
      weight_norm: whether to normalize the weights of every layer.
    """
    size = 2 * latent_dim + (context_dim or 0)
    module = ResConvEncoder(image_shape, size, tuple(features), hidden, weight_norm)
    return gaussian_encoder(module, latent_dim, context_dim)


def resconv_decoder(
    image_shape: tuple[int, int],
    features: Sequence[int] = (16, 32, 32),
    hidden: int = 450,
    *,
    weight_norm: bool = False,
) -> Decoder:
    """The mirror image of `resconv_encoder`, to independent Bernoulli variables.

    Where the encoder's blocks halve a map, the decoder's double it by bilinear interpolation, and
    cut it to the size that it has in the encoder.

    Args:
      image_shape: (H, W) in pixels.
      features: number of maps of each of the encoder's blocks.
      hidden: width of the first fully connected layer.
      weight_norm: whether to normalize the weights of every layer.
    """
    return bernoulli_decoder(ResConvDecoder(image_shape, tuple(features), hidden, weight_norm))


def spatial_encoder(
    image_shape: tuple[int, int],
    latent_shape: tuple[int, int, int],
    features: Sequence[int] = (16, 32, 32),
    *,
    context_maps: int | None = None,
    weight_norm: bool = False,
) -> Encoder:
    """`resconv_encoder` without its fully connected layers: the latent variables are maps.

    After the blocks a 3 x 3 convolution emits mean, log standard deviation and context.

    Args:
      image_shape: height and width in pixels.
      latent_shape: (H, W, C) of the latent variables. H and W are the image's, halved once or more,
        rounding up.
      features: number of maps of each block; as many blocks are used as it takes to come to H x W.
      context_maps: number of maps of the context for the posterior flow, which is given as a vector
        of H * W * context_maps entries; None gives no context.
      weight_norm: whether to normalize the weights of every layer.

    Raises:
      ValueError: if the blocks do not come to H x W.
    """
    channels = latent_shape[-1]
    features = _features_down_to(latent_shape, image_shape, features)
    size = 2 * channels + (context_maps or 0)
    module = ResConvEncoder(image_shape, size, features, None, weight_norm)
    init, encode = gaussian_encoder(module, channels, context_maps)

    def apply(params: Params, x: Array) -> Encoding:
        mean, log_std, context = encode(params, x)
        if context is not None:
            context = context.reshape(*context.shape[:-3], math.prod(context.shape[-3:]))
        return Encoding(mean, log_std, context)

    return Encoder(init, apply)


def spatial_decoder(
    image_shape: tuple[int, int],
    latent_shape: tuple[int, int, int],
    features: Sequence[int] = (16, 32, 32),
    *,
    weight_norm: bool = False,
) -> Decoder:
    """The mirror image of `spatial_encoder`, to independent Bernoulli variables.

    Args:
      image_shape: height and width in pixels.
      latent_shape: (H, W, C) of the latent variables, as the encoder's.
      features: number of maps of each of the encoder's blocks.
      weight_norm: whether to normalize the weights of every layer.

    Raises:
      ValueError: if the encoder's blocks do not come to H x W.
    """
    features = _features_down_to(latent_shape, image_shape, features)
    return bernoulli_decoder(ResConvDecoder(image_shape, features, None, weight_norm))


def _features_down_to(
    latent_shape: tuple[int, int, int], image_shape: tuple[int, int], features: Sequence[int]
) -> tuple[int, ...]:
    """Those of the blocks that it takes to halve an image down to the latent's height and width."""
    shapes = _halvings(image_shape, len(features))[1:]
    if latent_shape[:2] not in shapes:
        raise ValueError(
            f"networks: {len(features)} blocks of stride 2 reduce images {image_shape} to "
            f"{', '.join(map(str, shapes))}; expected one of these as height and width of the "
            f"latent shape, got {latent_shape}"
        )
    return tuple(features[: shapes.index(latent_shape[:2]) + 1])


def bernoulli_decoder(module: nn.Module) -> Decoder:
    """p(x|z) = product of Bernoulli(x_i; sigmoid(logit_i)), for x in {0, 1}.

    Args:
      module: maps z to the logits `[..., D]`.
    """
    init, logits = pure(module)

    def log_prob(params: Params, z: Array, x: Array) -> Array:
        out = logits(params, z)
        _check_last_axis(x, out)
        return (x * out - softplus(out)).sum(-1)

    def mean(params: Params, z: Array) -> Array:
        return jax.nn.sigmoid(logits(params, z))

    def sample(params: Params, key: Array, z: Array) -> Array:
        probability = mean(params, z)
        return jax.random.bernoulli(key, probability).astype(probability.dtype)

    return Decoder(init, log_prob, mean, sample)


def gaussian_decoder(module: nn.Module, std: float) -> Decoder:
    """p(x|z) = N(x; mean(z), std^2 I), for real x.

    Args:
      module: maps z to the mean `[..., D]`.
      std: standard deviation, the same for every entry.
    """
    init, mean = pure(module)

    def log_prob(params: Params, z: Array, x: Array) -> Array:
        out = mean(params, z)
        _check_last_axis(x, out)
        return (normal_log_prob((x - out) / std) - math.log(std)).sum(-1)

    def sample(params: Params, key: Array, z: Array) -> Array:
        out = mean(params, z)
        return out + std * jax.random.normal(key, out.shape, out.dtype)

    return Decoder(init, log_prob, mean, sample)


def _check_last_axis(x: Array, out: Array) -> None:
    if x.shape[-1:] != out.shape[-1:]:
        raise ValueError(f"decoder: expected x of shape [..., {out.shape[-1]}], got {x.shape}")
