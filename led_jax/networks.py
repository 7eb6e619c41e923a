"""Networks of the encoders and decoders, as flax modules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from led_jax.convolutions import Conv
from led_jax.descriptions import constructor


@constructor
class MLP(nn.Module):
    """Fully connected layers, the last one linear: `[..., K]` to `[..., sizes[-1]]`."""

    sizes: tuple[int, ...]
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Applies the layers to x, concatenated with the context `[..., C]` if it is given."""
        x = with_context(x, context)
        for i, size in enumerate(self.sizes):
            x = nn.Dense(size, dtype=x.dtype, param_dtype=x.dtype)(x)
            if i < len(self.sizes) - 1:
                x = self.activation(x)
        return x


class ResBlock(nn.Module):
    """A residual block of `[..., H, W, C]`, whose shortcut is a convolution of the same stride.

    He et al. (2015), https://arxiv.org/abs/1512.03385.

    Attributes:
      hidden: number of maps between the two layers of the residual branch.
      features: number of maps it emits.
      stride: stride of the first layer and the shortcut.
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
        # The residual branch and the shortcut read the same patches: one convolution computes both.
        first = Conv(self.hidden + self.features, self.stride, self.upsample)
        h = _normalized(first, self.weight_norm)(x)
        h, shortcut = h[..., : self.hidden], h[..., self.hidden :]
        return shortcut + _normalized(Conv(self.features), self.weight_norm)(nn.elu(h))


@constructor
class ResConvEncoder(nn.Module):
    """See `resconv_encoder`: `[..., H * W * C]` to `[..., size]`, or maps if hidden is None."""

    image_shape: tuple[int, ...]
    size: int
    features: tuple[int, ...]
    hidden: int | None
    weight_norm: bool

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Applies the network; its fully connected layers also read the context."""
        if x.shape[-1] != math.prod(self.image_shape):
            raise ValueError(
                f"encoder: expected flattened images {self.image_shape}, so [..., "
                f"{math.prod(self.image_shape)}], got {x.shape}"
            )
        h = x.reshape(*x.shape[:-1], *self.image_shape[:2], -1)
        for width in self.features:
            h = nn.elu(ResBlock(width, width, stride=2, weight_norm=self.weight_norm)(h))
        if self.hidden is None:
            _refuse_context("encoder", context)
            return _normalized(_linear_conv(self.size), self.weight_norm)(h)
        h = with_context(h.reshape(*x.shape[:-1], -1), context)
        h = nn.elu(_dense(self.hidden, x.dtype, self.weight_norm)(h))
        return _dense(self.size, x.dtype, self.weight_norm)(h)


@constructor
class ResConvDecoder(nn.Module):
    """See `resconv_decoder`: `[..., D]`, or maps if hidden is None, to `[..., P * H * W * C]`."""

    image_shape: tuple[int, ...]
    features: tuple[int, ...]
    hidden: int | None
    weight_norm: bool
    num_params: int = 1

    @nn.compact
    def __call__(self, z: Array, context: Array | None = None) -> Array:
        """Applies the network; its fully connected layers also read the context."""
        # Height and width of the encoder's input and of the output of each of its blocks.
        shapes = halvings(self.image_shape, len(self.features))
        colours = math.prod(self.image_shape[2:])
        widths = (self.num_params * colours, *self.features)
        if self.hidden is None:
            _refuse_context("decoder", context)
            if z.shape[-3:-1] != shapes[-1]:
                expected = ", ".join(map(str, shapes[-1]))
                raise ValueError(
                    f"decoder: expected z of shape [..., {expected}, C], got {z.shape}"
                )
            h = _normalized(_linear_conv(widths[-1]), self.weight_norm)(z)
        else:
            smallest = (*shapes[-1], widths[-1])
            z = with_context(z, context)
            h = nn.elu(_dense(self.hidden, z.dtype, self.weight_norm)(z))
            h = _dense(math.prod(smallest), z.dtype, self.weight_norm)(h)
            h = h.reshape(*z.shape[:-1], *smallest)
        for i in reversed(range(len(self.features))):
            block = ResBlock(widths[i + 1], widths[i], upsample=True, weight_norm=self.weight_norm)
            height, width = shapes[i]
            h = block(nn.elu(h))[..., :height, :width, :]
        batch_shape = h.shape[:-3]
        if self.num_params > 1:
            h = jnp.moveaxis(h.reshape(*h.shape[:-1], self.num_params, colours), -2, -4)
        return h.reshape(*batch_shape, self.num_params * math.prod(self.image_shape))


def with_context(x: Array, context: Array | None) -> Array:
    """Concatenates x `[..., K]` and a context `[..., C]`, whose batch axes broadcast."""
    if context is None:
        return x
    batch_shape = jnp.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    parts = [jnp.broadcast_to(a, (*batch_shape, a.shape[-1])) for a in (x, context.astype(x.dtype))]
    return jnp.concatenate(parts, -1)


def _refuse_context(name: str, context: Array | None) -> None:
    if context is not None:
        raise ValueError(
            f"{name}: a network without fully connected layers reads no context, got one of shape "
            f"{context.shape}"
        )


def check_image_shape(image_shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless this is (H, W) or (H, W, C), all positive."""
    if len(image_shape) not in (2, 3) or min(image_shape) < 1:
        raise ValueError(
            f"networks: image_shape must be (H, W) or (H, W, C), all positive, got {image_shape}"
        )


def halvings(image_shape: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Height and width of an image, and those after each of `count` blocks of stride 2."""
    shapes = [(image_shape[0], image_shape[1])]
    for _ in range(count):
        height, width = shapes[-1]
        shapes.append((-(-height // 2), -(-width // 2)))
    return shapes


def features_down_to(
    latent_shape: tuple[int, int, int], image_shape: tuple[int, ...], features: Sequence[int]
) -> tuple[int, ...]:
    """The first `features`, one for each block needed to halve an image to the latent's size.

    Raises:
      ValueError: if the blocks do not reach the height and width of latent_shape.
    """
    check_image_shape(image_shape)
    shapes = halvings(image_shape, len(features))[1:]
    height, width, channels = latent_shape
    if (height, width) not in shapes or channels < 1:
        raise ValueError(
            f"networks: {len(features)} features are as many blocks of stride 2, which reduce "
            f"images {image_shape} to {', '.join(map(str, shapes)) or 'nothing smaller'}; expected "
            "one of these as height and width of latent_shape, and one channel or more, got "
            f"{latent_shape}"
        )
    return tuple(features[: shapes.index((height, width)) + 1])


def _linear_conv(features: int) -> Conv:
    """A convolution next to the latent variables, whose kernel starts like a dense layer's."""
    return Conv(features, kernel_init=nn.initializers.lecun_normal())


def _normalized(layer: nn.Module, weight_norm: bool) -> nn.Module:
    return nn.WeightNorm(layer) if weight_norm else layer


def _dense(size: int, dtype: Any, weight_norm: bool) -> nn.Module:
    return _normalized(nn.Dense(size, dtype=dtype, param_dtype=dtype), weight_norm)
