"""Networks that emit the parameters of a transformer.

A conditioner is a function `(num_params, size) -> flax.linen.Module`; the module maps an input
`[..., K]` and a context `[..., context_dim]` (or None) to `[..., num_params, size]`. The last
layer starts at zero, so that a fresh layer is the identity or close to it. An autoregressive
module says `is_autoregressive = True`, and may have a method `incremental` as `MADE` does. A module
that says `sees_whole_event = True` makes a coupling layer's parameters from the event with zeros
for the entries that it may not see; the others see the passing entries alone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax.convolutions import Conv
from led_jax.descriptions import constructor
from led_jax.flows import masks
from led_jax.flows.base import Params
from led_jax.modules import pure
from led_jax.numerics import relu

Conditioner = Callable[[int, int], nn.Module]


@constructor
def mlp(
    hidden: Sequence[int] = (100,),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = nn.relu,
) -> Conditioner:
    """A fully connected conditioner, for coupling layers.

    Args:
      hidden: widths of the hidden layers.
      context_dim: width of the context it is conditional on; None ignores any context.
      activation: the nonlinearity.
    """
    _check_hidden("mlp", hidden)
    return partial(MLP, hidden=tuple(hidden), context_dim=context_dim, activation=activation)


@constructor
def made(
    hidden: Sequence[int] = (512, 512),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = relu,
) -> Conditioner:
    """A masked autoencoder, for autoregressive layers: output i depends on inputs before i only.

    Germain et al. (2015), https://arxiv.org/abs/1502.03509.

    Args:
      hidden: widths of the hidden layers.
      context_dim: width of the context it is conditional on; None ignores any context.
      activation: the nonlinearity.
    """
    _check_hidden("made", hidden)
    return partial(MADE, hidden=tuple(hidden), context_dim=context_dim, activation=activation)


@constructor
def convnet(
    event_shape: tuple[int, ...],
    hidden: Sequence[int] = (32,),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = nn.relu,
) -> Conditioner:
    """A conditioner of 3 x 3 convolutions, for coupling layers on maps.

    Args:
      event_shape: (H, W, C) of the event, which comes and goes as a vector in row-major order.
      hidden: numbers of maps of the hidden layers.
      context_dim: width of the context it is conditional on, a map `[..., H, W, C']` as a vector;
        None ignores any context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive, or the context cannot be such a map.
    """
    return _on_maps("convnet", ConvNet, event_shape, hidden, context_dim, activation)


@constructor
def pixelcnn(
    event_shape: tuple[int, ...],
    hidden: Sequence[int] = (32, 32),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = nn.relu,
) -> Conditioner:
    """A PixelCNN, for autoregressive layers on maps in raster order, channels within a pixel last.

    Van den Oord et al. (2016), https://arxiv.org/abs/1606.05328: one stack of convolutions over the
    rows above and one over the pixels to the left, which reads the first, so that there is no blind
    spot. They see what comes before by shifts of their input, as in Salimans et al. (2017),
    https://arxiv.org/abs/1701.05517. With L hidden layers a pixel sees the L + 1 pixels to its left
    and, of the L + 1 rows above, up to L columns to either side. A MADE at every pixel then makes
    each channel depend on the channels before it.

    Args:
      event_shape: (H, W, C) of the event, which comes and goes as a vector in row-major order.
      hidden: numbers of maps of the hidden layers, the last one also that of each pixel's MADE.
      context_dim: width of the context it is conditional on, a map `[..., H, W, C']` as a vector,
        which is read at each pixel and those to its left; None ignores any context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive, or the context cannot be such a map.
    """
    return _on_maps("pixelcnn", PixelCNN, event_shape, hidden, context_dim, activation)


class MLP(nn.Module):
    """See `mlp`.

    Inside, entries are the first axis and the batch the last, as in the coupling layers around it.
    """

    num_params: int
    size: int
    hidden: tuple[int, ...] = (100,)
    context_dim: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Maps x `[..., K]` to `[..., num_params, size]`."""
        h = jnp.moveaxis(x, -1, 0)
        for i, width in enumerate(self.hidden):
            h = _EntriesFirstDense(width, nn.initializers.he_normal(), name=f"Dense_{i}")(h)
            if i == 0 and self.context_dim is not None:
                h = _ContextDense(self.context_dim)(jnp.moveaxis(h, 0, -1), context)
                h = jnp.moveaxis(h, -1, 0)
            h = self.activation(h)
        features, name = self.num_params * self.size, f"Dense_{len(self.hidden)}"
        h = _EntriesFirstDense(features, nn.initializers.zeros, name=name)(h)
        h = h.reshape(self.num_params, self.size, *h.shape[1:])
        return jnp.moveaxis(h, (0, 1), (-2, -1))


class MADE(nn.Module):
    """See `made`."""

    is_autoregressive: ClassVar[bool] = True

    num_params: int
    size: int
    hidden: tuple[int, ...] = (512, 512)
    context_dim: int | None = None
    activation: Callable[[Array], Array] = relu

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Maps x `[..., size]` to `[..., num_params, size]`."""
        if x.shape[-1] != self.size:
            raise ValueError(f"made: expected an input [..., {self.size}], got {x.shape}")
        *hidden, last = self._layers()
        h = x
        for i, layer in enumerate(hidden):
            h = layer(h)[..., 0, :]
            if i == 0 and self.context_dim is not None:
                h = _ContextDense(self.context_dim)(h, context)
            h = self.activation(h)
        return last(h)

    @nn.nowrap
    def incremental(
        self, params: Params, x: Array, context: Array | None = None
    ) -> tuple[Any, Callable[[Any, Array, Array], tuple[Array, Any]]]:
        """The outputs one after the other, each from the hidden units that only it still lacks.

        All D steps together cost about one call. Degrees ascend, so the units of one degree are
        neighbours, and those of lower degrees are known from the steps before.

        Args:
          params: parameters of the module.
          x: an input `[..., size]`, of which shape and dtype count.
          context: `[..., context_dim]`, or None.

        Returns:
          `(cache, step)`; for i = 0, 1, ..., `step(cache, x, i)` returns output i,
          `[..., num_params, 1]`, and the next cache. It reads x_0 to x_{i-1}; later entries may
          hold anything finite.
        """
        cache = tuple(jnp.zeros((*x.shape[:-1], width), x.dtype) for width in self.hidden)
        offsets = [jnp.zeros((), x.dtype)] * (len(self.hidden) + 1)
        if self.context_dim is not None:
            _, add_context = pure(_ContextDense(self.context_dim))
            of_context = add_context(params["_ContextDense_0"], cache[0], context)
            offsets[0] = of_context[..., None, :]
        *hidden, last = [
            layer.by_degree(params[f"_MaskedDense_{i}"], offset)
            for i, (layer, offset) in enumerate(zip(self._layers(), offsets, strict=True))
        ]

        def step(cache, x: Array, i: Array):
            h, activations = x, []
            for layer, known in zip(hidden, cache, strict=True):
                units, start = layer(h, i)
                units = self.activation(units[..., 0, :])
                h = jax.lax.dynamic_update_slice_in_dim(known, units, start, -1)
                activations.append(h)
            return last(h, i)[0], tuple(activations)

        return cache, step

    @nn.nowrap
    def _layers(self) -> "list[_MaskedDense]":
        # Units of degree 0 see the context alone: without them the first output could not.
        lowest = 1 if self.context_dim is None else 0
        degrees = [np.arange(1, self.size + 1)]
        degrees += [masks.hidden_degrees(width, self.size, lowest=lowest) for width in self.hidden]
        hidden = [_MaskedDense(*pair, gain=2.0) for pair in itertools.pairwise(degrees)]
        return [*hidden, _MaskedDense(degrees[-1], np.arange(self.size), self.num_params)]


class ConvNet(nn.Module):
    """See `convnet`."""

    sees_whole_event: ClassVar[bool] = True

    num_params: int
    size: int
    event_shape: tuple[int, ...]
    hidden: tuple[int, ...] = (32,)
    context_dim: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Maps x `[..., size]` to `[..., num_params, size]`."""
        h = _to_map("convnet", x, self.event_shape)
        for i, width in enumerate(self.hidden):
            h = Conv(width)(h)
            if i == 0 and self.context_dim is not None:
                h = _ContextDense(self.context_dim, self.event_shape[:2])(h, context)
            h = self.activation(h)
        channels = self.event_shape[-1]
        h = Conv(self.num_params * channels, kernel_init=nn.initializers.zeros)(h)
        return _to_params(h.reshape(*h.shape[:-1], self.num_params, channels))


class PixelCNN(nn.Module):
    """See `pixelcnn`."""

    is_autoregressive: ClassVar[bool] = True

    num_params: int
    size: int
    event_shape: tuple[int, ...]
    hidden: tuple[int, ...] = (32, 32)
    context_dim: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """Maps x `[..., size]` to `[..., num_params, size]`."""
        x = _to_map("pixelcnn", x, self.event_shape)
        above, left = x[..., :-1, :, :], x[..., :-1, :]
        for i, width in enumerate(self.hidden):
            # The first layers look one row, or one pixel, back: on a map that lacks its last one.
            back = 2 if i == 0 else 1
            above = Conv(width, kernel_shape=(2, 3), padding=((back, 0), (1, 1)))(above)
            left = Conv(width, kernel_shape=(1, 2), padding=((0, 0), (back, 0)))(left)
            left += nn.Dense(width, use_bias=False, dtype=x.dtype, param_dtype=x.dtype)(above)
            if i == 0 and self.context_dim is not None:
                left = _ContextDense(self.context_dim, self.event_shape[:2])(left, context)
            above, left = self.activation(above), self.activation(left)
        channels, width = self.event_shape[-1], self.hidden[-1]
        pixel = MADE(self.num_params, channels, (width,), width, self.activation)
        return _to_params(pixel(x, left))


def _to_map(name: str, x: Array, event_shape: tuple[int, ...]) -> Array:
    if x.shape[-1] != math.prod(event_shape):
        raise ValueError(
            f"{name}: made for events {event_shape}, so it expected an input "
            f"[..., {math.prod(event_shape)}], got {x.shape}"
        )
    return x.reshape(*x.shape[:-1], *event_shape)


def _to_params(h: Array) -> Array:
    """From `[..., H, W, num_params, C]` to `[..., num_params, H * W * C]`."""
    h = jnp.moveaxis(h, -2, -4)
    return h.reshape(*h.shape[:-3], math.prod(h.shape[-3:]))


class _MaskedDense(nn.Module):
    """y_j = b_j + sum of w_ij x_i over the i with in_degrees[i] <= out_degrees[j].

    Degrees ascend, so the mask is block-triangular: the product is computed in blocks of columns,
    each reading the rows that its last column needs. Weights outside the blocks do not exist.
    Kernels are stored with their longer side last, `[rows, columns]` or `[columns, rows]`: on a CPU
    the products that are their gradients are faster so.
    """

    in_degrees: np.ndarray
    out_degrees: np.ndarray
    num_params: int = 1
    gain: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outputs = []
        for i, mask in enumerate(self._block_masks()):
            if len(mask):
                kernel = self.param(f"kernel_{i}", _masked_normal, mask, self.gain, x.dtype)
                y = x[..., : len(mask)] @ _masked(kernel, mask).astype(x.dtype)
            else:
                y = jnp.zeros((*x.shape[:-1], mask.shape[1]), x.dtype)
            columns = mask.shape[1] // self.num_params
            outputs.append(y.reshape(*y.shape[:-1], self.num_params, columns))
        size = len(self.out_degrees)
        bias = self.param("bias", nn.initializers.zeros, (self.num_params, size), x.dtype)
        return jnp.concatenate(outputs, -1) + bias.astype(x.dtype)

    def by_degree(
        self, params: Params, offset: Array
    ) -> Callable[[Array, Array], tuple[Array, Array]]:
        """The layer plus `offset` `[..., 1, size]`, as a function from an input and a degree.

        It returns the outputs of that degree, `[..., num_params, n]`, and the index of the first.
        n is the largest number of outputs of one degree. Where a degree has fewer, neighbours fill
        up: those of lower degree are right, those of higher degree wait for inputs still unknown.
        """
        blocks = []
        for i, mask in enumerate(self._block_masks()):
            # A block that sees no input has no kernel.
            kernel = _masked(params[f"kernel_{i}"], mask) if len(mask) else jnp.zeros(mask.shape)
            kernel = kernel.astype(offset.dtype)
            kernel = kernel.reshape(len(mask), self.num_params, mask.shape[1] // self.num_params)
            unseen = len(self.in_degrees) - len(mask)
            blocks.append(jnp.pad(kernel, ((0, unseen), (0, 0), (0, 0))))
        kernel = jnp.concatenate(blocks, -1)
        bias = params["bias"].astype(offset.dtype) + offset
        n = int(np.bincount(self.out_degrees).max())

        def outputs(x: Array, degree: Array) -> tuple[Array, Array]:
            start = jnp.minimum((self.out_degrees < degree).sum(), len(self.out_degrees) - n)
            columns = partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=n, axis=-1
            )
            return jnp.tensordot(x, columns(kernel), 1) + columns(bias), start

        return outputs

    def _block_masks(self) -> list[np.ndarray]:
        """For each block of columns: rows that it reads x columns, repeated for each parameter."""
        num_blocks = _num_blocks(len(self.in_degrees), len(self.out_degrees))
        block_masks = []
        for out_degrees in np.array_split(self.out_degrees, num_blocks):
            rows = int(np.searchsorted(self.in_degrees, out_degrees[-1], "right"))
            mask = self.in_degrees[:rows, None] <= out_degrees
            block_masks.append(np.tile(mask, self.num_params))
        return block_masks


def _num_blocks(rows: int, columns: int) -> int:
    """Column blocks of a masked product: more of them skip more zeros, but multiply slower.

    Two for the square products, one for the narrow ones, is what stepped fastest on a CPU.
    """
    return 2 if min(rows, columns) >= 256 else 1


def _masked_normal(key: Array, mask: np.ndarray, gain: float, dtype: jnp.dtype) -> Array:
    """Normal weights of variance gain / fan-in, counting the inputs that the mask lets through."""
    fan_in = np.maximum(mask.sum(0), 1)
    kernel = jax.random.normal(key, mask.shape, dtype) * np.sqrt(gain / fan_in).astype(dtype)
    return kernel.T if _is_tall(mask) else kernel


def _masked(kernel: Array, mask: np.ndarray) -> Array:
    """`[rows, columns]` from a kernel as it is stored."""
    return jnp.where(mask.T, kernel, 0).T if _is_tall(mask) else jnp.where(mask, kernel, 0)


def _is_tall(mask: np.ndarray) -> bool:
    return mask.shape[0] > mask.shape[1]


class _EntriesFirstDense(nn.Module):
    """A dense layer from `[K, ...]` to `[features, ...]`, with the parameters of `nn.Dense`."""

    features: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (len(x), self.features), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), x.dtype)
        y = jnp.tensordot(kernel.astype(x.dtype), x, (0, 0))
        return y + jnp.expand_dims(bias.astype(x.dtype), range(1, y.ndim))


class _ContextDense(nn.Module):
    """Adds the context's linear contribution to a hidden layer, on a grid at each position."""

    context_dim: int
    grid: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, h: Array, context: Array | None) -> Array:
        batch_ndim = h.ndim - len(self.grid) - 1
        if (
            context is None
            or context.shape[-1] != self.context_dim
            or context.ndim - 1 > batch_ndim
        ):
            given = None if context is None else context.shape
            raise ValueError(
                f"conditioner: built with context_dim={self.context_dim}, so it needs a context "
                f"of shape [..., {self.context_dim}] with no more batch axes than the input has; "
                f"got {given} for an input with {batch_ndim} batch axes"
            )
        features = self.context_dim // math.prod(self.grid)
        context = context.reshape(*context.shape[:-1], *self.grid, features)
        dense = nn.Dense(h.shape[-1], use_bias=False, dtype=h.dtype, param_dtype=h.dtype)
        return h + dense(context)


def _check_hidden(name: str, hidden: Sequence[int]) -> None:
    if not hidden or min(hidden) < 1:
        raise ValueError(f"{name}: expected one or more positive widths, got hidden={hidden}")


def _on_maps(
    name: str,
    module: type[nn.Module],
    event_shape: tuple[int, ...],
    hidden: Sequence[int],
    context_dim: int | None,
    activation: Callable[[Array], Array],
) -> Conditioner:
    _check_hidden(name, hidden)
    if len(event_shape) != 3 or min(event_shape) < 1:
        raise ValueError(f"{name}: expected an event shape (H, W, C), got {event_shape}")
    positions = event_shape[0] * event_shape[1]
    if context_dim is not None and (context_dim < 1 or context_dim % positions):
        raise ValueError(
            f"{name}: the context of an event {event_shape} is a map too, so context_dim must be a "
            f"multiple of {positions}, got {context_dim}"
        )
    return partial(
        module,
        event_shape=tuple(event_shape),
        hidden=tuple(hidden),
        context_dim=context_dim,
        activation=activation,
    )
