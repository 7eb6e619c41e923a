"""Convolutional conditioners, for events that are maps."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from led_jax.checks import check_names
from led_jax.convolutions import Conv
from led_jax.descriptions import constructor
from led_jax.flows.base import Params
from led_jax.flows.conditioners import Conditioner, MakeConditioner, check_hidden, read_context
from led_jax.flows.made import made
from led_jax.modules import pure


@constructor
def convnet(
    event_shape: tuple[int, ...],
    hidden: Sequence[int] = (32,),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> MakeConditioner:
    """A conditioner of 3 x 3 convolutions, for coupling layers on maps.

    >>> network = convnet((4, 4, 2), (8,))(2, 32)
    >>> params = network.init(jax.random.key(0), jnp.zeros(32))
    >>> network.apply(params, jnp.zeros((3, 32))).shape
    (3, 2, 32)

    Args:
      event_shape: (H, W, C) of the event; input and output are flattened to vectors in row-major
        order.
      hidden: numbers of maps of the hidden layers.
      context_dim: width H W C' of the context that it reads, a map `[..., H, W, C']` flattened to a
        vector; None ignores any context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive, or the context cannot be such a map; from its
        functions, if the input or the context have the wrong shapes.
    """
    _check_maps("convnet", event_shape, hidden, context_dim)

    def make(num_params: int, size: int) -> Conditioner:
        channels = event_shape[-1]
        init_network, apply_network = pure(
            _ConvNet(tuple(hidden), num_params * channels, context_dim is not None, activation)
        )

        def read(x: Array, context: Array | None) -> tuple[Array, Array | None]:
            return _to_maps("convnet", event_shape, context_dim, x, context)

        def init(key: Array, x: Array, context: Array | None = None) -> Params:
            return init_network(key, *read(x, context))

        def apply(params: Params, x: Array, context: Array | None = None) -> Array:
            h = apply_network(params, *read(x, context))
            return _to_params(h.reshape(*h.shape[:-1], num_params, channels))

        return Conditioner(init, apply, "whole")

    return make


@constructor
def pixelcnn(
    event_shape: tuple[int, ...],
    hidden: Sequence[int] = (32, 32),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> MakeConditioner:
    """A PixelCNN, for autoregressive layers on maps in raster order, channels within a pixel last.

    Van den Oord et al. (2016), https://arxiv.org/abs/1606.05328: one stack of convolutions reads
    the rows above a pixel, and a second one reads the pixels to its left and the first stack, so
    that there is no blind spot. Shifted inputs, rather than masked kernels, hide the pixels that
    come later, as in Salimans et al. (2017), https://arxiv.org/abs/1701.05517. With L hidden layers
    a pixel sees the L + 1 pixels to its left and, of the L + 1 rows above, up to L columns to
    either side. A MADE at every pixel then makes each channel depend on the channels before it.

    >>> network = pixelcnn((4, 4, 2), (8,))(2, 32)
    >>> params = network.init(jax.random.key(0), jnp.zeros(32))
    >>> network.apply(params, jnp.zeros((3, 32))).shape
    (3, 2, 32)

    Args:
      event_shape: (H, W, C) of the event; input and output are flattened to vectors in row-major
        order.
      hidden: numbers of maps of the hidden layers; the last one is also the hidden width of each
        pixel's MADE.
      context_dim: width H W C' of the context that it reads, a map `[..., H, W, C']` flattened to a
        vector. A pixel sees the context at itself and at pixels to its left. None ignores any
        context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive, or the context cannot be such a map; from its
        functions, if the input or the context have the wrong shapes.
    """
    _check_maps("pixelcnn", event_shape, hidden, context_dim)

    def make(num_params: int, size: int) -> Conditioner:
        channels, width = event_shape[-1], hidden[-1]
        init_stacks, apply_stacks = pure(
            _PixelStacks(tuple(hidden), context_dim is not None, activation)
        )
        pixel = made((width,), context_dim=width, activation=activation)(num_params, channels)

        def read(x: Array, context: Array | None) -> tuple[Array, Array | None]:
            return _to_maps("pixelcnn", event_shape, context_dim, x, context)

        def init(key: Array, x: Array, context: Array | None = None) -> Params:
            stacks_key, pixel_key = jax.random.split(key)
            x, context = read(x, context)
            seen = jnp.zeros((*x.shape[:-1], width), x.dtype)
            return {
                "stacks": init_stacks(stacks_key, x, context),
                "pixel": pixel.init(pixel_key, x, seen),
            }

        def apply(params: Params, x: Array, context: Array | None = None) -> Array:
            x, context = read(x, context)
            check_names("pixelcnn", params, ("stacks", "pixel"))
            seen = apply_stacks(params["stacks"], x, context)
            return _to_params(pixel.apply(params["pixel"], x, seen))

        return Conditioner(init, apply, "autoregressive")

    return make


class _ConvNet(nn.Module):
    """Convolutions of x `[..., H, W, C]` to `features` maps; the first one adds the context."""

    hidden: tuple[int, ...]
    features: int
    conditional: bool
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, context: Array | None) -> Array:
        h = x
        for i, width in enumerate(self.hidden):
            h = Conv(width, name=f"conv_{i}")(h)
            if i == 0 and self.conditional:
                h = h + _pointwise(width, h.dtype, name="context")(context)
            h = self.activation(h)
        zeros = nn.initializers.zeros
        return Conv(self.features, kernel_init=zeros, name=f"conv_{len(self.hidden)}")(h)


class _PixelStacks(nn.Module):
    """Maps `[..., H, W, hidden[-1]]` of which each pixel depends on the pixels of x before it."""

    hidden: tuple[int, ...]
    conditional: bool
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, context: Array | None) -> Array:
        above, left = x[..., :-1, :, :], x[..., :-1, :]
        for i, width in enumerate(self.hidden):
            # `above` and `left` lack the last row and column, and the first layers pad one more in
            # front: so they read the rows above, or the pixels to the left, only.
            back = 2 if i == 0 else 1
            above = Conv(
                width, kernel_shape=(2, 3), padding=((back, 0), (1, 1)), name=f"above_{i}"
            )(above)
            left = Conv(width, kernel_shape=(1, 2), padding=((0, 0), (back, 0)), name=f"left_{i}")(
                left
            )
            left = left + _pointwise(width, x.dtype, name=f"join_{i}")(above)
            if i == 0 and self.conditional:
                left = left + _pointwise(width, x.dtype, name="context")(context)
            above, left = self.activation(above), self.activation(left)
        return left


def _pointwise(width: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    return nn.Dense(width, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)


def _check_maps(
    name: str, event_shape: tuple[int, ...], hidden: Sequence[int], context_dim: int | None
) -> None:
    check_hidden(name, hidden)
    if len(event_shape) != 3 or min(event_shape) < 1:
        raise ValueError(f"{name}: event_shape must be (H, W, C), got {event_shape}")
    positions = event_shape[0] * event_shape[1]
    if context_dim is not None and (context_dim < 1 or context_dim % positions):
        raise ValueError(
            f"{name}: the context of an event {event_shape} is a map too, so context_dim must be a "
            f"multiple of {positions}, got {context_dim}"
        )


def _to_maps(
    name: str,
    event_shape: tuple[int, ...],
    context_dim: int | None,
    x: Array,
    context: Array | None,
) -> tuple[Array, Array | None]:
    """Reshapes an event and its context from vectors to maps `[..., H, W, C]`."""
    if x.shape[-1:] != (math.prod(event_shape),):
        raise ValueError(
            f"{name}: made for events {event_shape}, so it expected x of shape "
            f"[..., {math.prod(event_shape)}], got {x.shape}"
        )
    context = read_context(context_dim, x, context)
    if context is not None:
        height, width, _ = event_shape
        features = context.shape[-1] // (height * width)
        context = context.reshape(*context.shape[:-1], height, width, features)
    return x.reshape(*x.shape[:-1], *event_shape), context


def _to_params(h: Array) -> Array:
    """Reshapes `[..., H, W, num_params, C]` to `[..., num_params, H * W * C]`."""
    h = jnp.moveaxis(h, -2, -4)
    return h.reshape(*h.shape[:-3], math.prod(h.shape[-3:]))
