"""MADE: a masked autoencoder, in whole passes and one output after the other."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax.descriptions import constructor
from led_jax.flows import masks
from led_jax.flows.base import Params
from led_jax.flows.conditioners import (
    Conditioner,
    MakeConditioner,
    check_hidden,
    check_shapes,
    init_context,
    of_context,
    read_context,
)
from led_jax.numerics import match_rank, relu


@constructor
def made(
    hidden: Sequence[int] = (512, 512),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = relu,
) -> MakeConditioner:
    """A masked autoencoder, for autoregressive layers: output i depends on inputs before i only.

    Germain et al. (2015), https://arxiv.org/abs/1502.03509.

    >>> network = made((8, 8))(2, 5)
    >>> params = network.init(jax.random.key(0), jnp.zeros(5))
    >>> network.apply(params, jnp.zeros((4, 5))).shape
    (4, 2, 5)

    Args:
      hidden: widths of the hidden layers.
      context_dim: width of the context that it reads; None ignores any context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive; from its functions, if the input, the context or the
        parameters have the wrong shapes.
    """
    check_hidden("made", hidden)

    def make(num_params: int, size: int) -> Conditioner:
        if size < 1:
            raise ValueError(f"made: expected an event of one entry or more, got {size}")
        # Units of degree 0 see only the context: without them output 0 would not depend on it.
        lowest = 1 if context_dim is None else 0
        degrees = [np.arange(1, size + 1)]
        degrees += [masks.hidden_degrees(width, size, lowest=lowest) for width in hidden]
        hidden_layers = [_MaskedDense(*pair) for pair in itertools.pairwise(degrees)]
        output_layer = _MaskedDense(degrees[-1], np.arange(size), num_params)
        layers = {f"dense_{i}": layer for i, layer in enumerate([*hidden_layers, output_layer])}
        shapes: dict[str, Any] = {name: layer.shapes() for name, layer in layers.items()}
        if context_dim is not None:
            shapes["context"] = {"kernel": (context_dim, hidden[0])}

        def check(x: Array, context: Array | None) -> Array | None:
            if x.shape[-1:] != (size,):
                raise ValueError(f"made: expected x of shape [..., {size}], got {x.shape}")
            return read_context(context_dim, x, context)

        def init(key: Array, x: Array, context: Array | None = None) -> Params:
            check(x, context)
            keys = jax.random.split(key, len(hidden) + 2)
            params: dict[str, Any] = {
                name: layer.init(layer_key, x.dtype, gain=0.0 if layer is output_layer else 2.0)
                for layer_key, (name, layer) in zip(keys, layers.items(), strict=False)
            }
            if context_dim is not None:
                params["context"] = init_context(keys[-1], context_dim, hidden[0], x.dtype)
            return params

        def apply(params: Params, x: Array, context: Array | None = None) -> Array:
            context = check(x, context)
            check_shapes("made", params, shapes)
            h = x
            for i, layer in enumerate(hidden_layers):
                h = layer.apply(params[f"dense_{i}"], h)[..., 0, :]
                if i == 0 and context is not None:
                    h = h + of_context(params["context"], context)
                h = activation(h)
            return output_layer.apply(params[f"dense_{len(hidden)}"], h)

        def incremental(params: Params, x: Array, context: Array | None = None):
            # Step i computes only the units of degree i, which are neighbours because degrees
            # ascend; those of lower degrees are in the cache. So all steps cost about one pass.
            context = check(x, context)
            check_shapes("made", params, shapes)
            cache = tuple(jnp.zeros((*x.shape[:-1], width), x.dtype) for width in hidden)
            by_degree = [layer.by_degree(params[name], x.dtype) for name, layer in layers.items()]
            offset = None if context is None else of_context(params["context"], context)

            def step(cache: tuple[Array, ...], x: Array, i: Array):
                h, activations = x, []
                for layer, known in zip(by_degree, cache, strict=False):
                    units, start = layer(h, i)
                    units = units[..., 0, :]
                    if offset is not None and not activations:
                        units = units + jax.lax.dynamic_slice_in_dim(
                            offset, start, units.shape[-1], -1
                        )
                    h = jax.lax.dynamic_update_slice_in_dim(known, activation(units), start, -1)
                    activations.append(h)
                return by_degree[-1](h, i)[0], tuple(activations)

            return cache, step

        return Conditioner(init, apply, "autoregressive", incremental)

    return make


class _MaskedDense(NamedTuple):
    """y_pj = b_pj + sum of w_pij x_i over the i with in_degrees[i] <= out_degrees[j].

    Both arrays of degrees are in ascending order. The kernel is one array `[rows, num_params *
    columns]` of rows i and columns j. It includes the masked entries, which start at zero and have
    a gradient of zero.
    """

    in_degrees: np.ndarray
    out_degrees: np.ndarray
    num_params: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        features = self.num_params * len(self.out_degrees)
        return {"kernel": (len(self.in_degrees), features), "bias": (features,)}

    def mask(self) -> np.ndarray:
        """True where the input may reach the output, in the kernel's shape."""
        return np.tile(self.in_degrees[:, None] <= self.out_degrees, self.num_params)

    def init(self, key: Array, dtype: Any, gain: float) -> Params:
        """Normal weights of variance gain / fan-in; the fan-in counts only unmasked inputs."""
        mask = self.mask()
        std = np.sqrt(gain / np.maximum(mask.sum(0), 1))
        kernel = jax.random.normal(key, mask.shape, dtype) * (mask * std).astype(dtype)
        return {"kernel": kernel, "bias": jnp.zeros(self.shapes()["bias"], dtype)}

    def apply(self, params: Params, x: Array) -> Array:
        """Maps x `[..., rows]` to `[..., num_params, columns]`.

        As the mask is block-triangular, the product is computed in blocks of rows, each without
        the columns that are masked in all of its rows.
        """
        kernel, bias = (params[name].astype(x.dtype) for name in ("kernel", "bias"))
        num_blocks = _num_blocks(len(self.in_degrees), len(self.out_degrees))
        edges = [i * len(kernel) // num_blocks for i in range(num_blocks)]
        mask = self.mask()
        y = match_rank(bias, x.ndim)
        # Split rather than sliced, because the gradient of a split is a concatenation.
        for start, block in zip(edges, jnp.split(kernel, edges[1:]), strict=True):
            rows = slice(start, start + len(block))
            unreached = int(np.argmax(mask[start])) if start else 0
            block = jnp.where(mask[rows, unreached:], block[:, unreached:], 0)
            y += jnp.pad(x[..., rows] @ block, (*[(0, 0)] * (x.ndim - 1), (unreached, 0)))
        return y.reshape(*y.shape[:-1], self.num_params, len(self.out_degrees))

    def by_degree(
        self, params: Params, dtype: Any
    ) -> Callable[[Array, Array], tuple[Array, Array]]:
        """The layer as a function of an input and a degree, which computes outputs of that degree.

        It returns n neighbouring outputs `[..., num_params, n]`, which include all of that degree,
        and the index of the first. n is the largest number of outputs of one degree. If a degree
        has fewer, the others are of lower degree, which are correct, or of higher degree, which are
        not final, because they depend on inputs that are not known yet.
        """
        parts = self.num_params, len(self.out_degrees)
        kernel, bias = (params[name].astype(dtype) for name in ("kernel", "bias"))
        kernel = jnp.where(self.mask(), kernel, 0).reshape(len(kernel), *parts)
        bias = bias.reshape(parts)
        n = int(np.bincount(self.out_degrees).max())

        def outputs(x: Array, degree: Array) -> tuple[Array, Array]:
            start = jnp.minimum((self.out_degrees < degree).sum(), len(self.out_degrees) - n)
            columns = partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=n, axis=-1
            )
            y = jnp.tensordot(x, columns(kernel), 1)
            return y + match_rank(columns(bias), y.ndim), start

        return outputs


def _num_blocks(rows: int, columns: int) -> int:
    """Number of row blocks of a masked product: more blocks skip more zeros, but multiply slower.

    Two blocks for large products and one for small or narrow ones gave the fastest training steps
    on a CPU.
    """
    return 2 if min(rows, columns) >= 256 else 1
