"""Convolutions that are fast on every backend, inside compiled loops too.

On a CPU, XLA computes `lax.conv_general_dilated` inside a loop by a naive routine. There a
convolution is written as shifted copies of the input and one matrix product, which a loop does not
slow down. The copies cost as much as the product. So if a kernel of stride 1 has no more output
than input maps, only the columns of each patch are copied, and the products of its rows are shifted
and added up afterwards; with far fewer output maps nothing is copied, and the products of all
pixels of a patch are shifted and added up.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from led_jax.numerics import match_rank


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """The convolution of x with a kernel, without padding.

    Args:
      x: `[..., H, W, C]`.
      kernel: `[h, w, C, K]`.
      stride: step along both axes.

    Returns:
      `[..., (H - h) // stride + 1, (W - w) // stride + 1, K]`.
    """
    batch_shape = x.shape[:-3]
    x = _keep(x.reshape(-1, *x.shape[-3:]))
    if jax.default_backend() != "cpu":
        y = lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    elif stride == 1 and kernel.shape[-1] <= kernel.shape[-2]:
        y = _keep(_sum_of_products(x, kernel))
    else:
        y = _product_of_patches(x, kernel, stride)
    return y.reshape(*batch_shape, *y.shape[1:])


def _keep(x: Array) -> Array:
    """Keeps x out of fusions: recomputing it in each of its shifted copies compiles slowly."""
    return lax.optimization_barrier(x)


def _product_of_patches(x: Array, kernel: Array, stride: int) -> Array:
    """Gathers the patch of inputs of every output, and multiplies it by the kernel as a matrix."""
    height, width, _, features = kernel.shape
    patches = jnp.concatenate(_shifts(x, height, width, stride), -1)
    return _matmul(patches, kernel.reshape(-1, features))


def _sum_of_products(x: Array, kernel: Array) -> Array:
    """Multiplies patches of one row, or one pixel, by parts of the kernel, and adds these up."""
    height, width, channels, features = kernel.shape
    if 8 * features <= channels:
        products = _matmul(x, jnp.moveaxis(kernel, 2, 0).reshape(channels, -1))
        return _add_shifted(_keep(_add_shifted(products, height, axis=1)), width, axis=2)
    patches = jnp.concatenate(_shifts(x, 1, width, 1), -1)
    products = _matmul(patches, jnp.moveaxis(kernel, 0, 2).reshape(-1, height * features))
    return _add_shifted(products, height, axis=1)


def _add_shifted(products: Array, count: int, axis: int) -> Array:
    """Splits the last axis into `count` parts, and adds them up, part i shifted by i along `axis`.

    Axis `axis` shrinks by count - 1.
    """
    size = products.shape[axis] - count + 1
    parts = jnp.split(products, count, -1)
    return sum(
        (lax.slice_in_dim(part, i, i + size, axis=axis) for i, part in enumerate(parts)),
        start=jnp.zeros((), products.dtype),
    )


def _matmul(x: Array, matrix: Array) -> Array:
    """x @ matrix with all batch axes as one: with several, the gradient transposes its operands."""
    y = x.reshape(-1, x.shape[-1]) @ matrix
    return y.reshape(*x.shape[:-1], matrix.shape[-1])


def _shifts(x: Array, height: int, width: int, stride: int) -> list[Array]:
    """For each tap of a kernel, in row-major order, the inputs that it multiplies."""
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(height)
        for j in range(width)
    ]


# Entry [p, a, i] is the weight of tap i of a kernel on a line doubled by linear interpolation, in
# tap a of the equivalent kernel on the line itself, for the even (p = 0) and the odd (p = 1)
# entries of the doubled line.
_PHASES = np.array(
    [
        [[0.75, 0.25, 0.0], [0.25, 0.75, 0.75], [0.0, 0.0, 0.25]],
        [[0.25, 0.0, 0.0], [0.75, 0.75, 0.25], [0.0, 0.25, 0.75]],
    ]
)


def upsample_and_convolve(x: Array, kernel: Array) -> Array:
    """Doubles a map by bilinear interpolation, then convolves it; both replicate its edges.

    Interpolation and convolution are one convolution of the small map, with a kernel for each of
    the four phases of the large one.

    Args:
      x: `[..., H, W, C]`.
      kernel: `[3, 3, C, K]`.

    Returns:
      `[..., 2H, 2W, K]`.
    """
    *batch_shape, rows, columns, channels = x.shape
    features = kernel.shape[-1]
    phases = jnp.asarray(_PHASES, x.dtype)
    kernels = jnp.einsum("pai,qbj,ijck->abcpqk", phases, phases, kernel)
    padding = [(0, 0)] * len(batch_shape) + [(1, 1), (1, 1), (0, 0)]
    y = convolve(
        jnp.pad(lax.optimization_barrier(x), padding, mode="edge"),
        kernels.reshape(3, 3, channels, -1),
    )
    y = y.reshape(*batch_shape, rows, columns, 2, 2, features)
    y = jnp.swapaxes(y, -4, -3).reshape(*batch_shape, 2 * rows, 2 * columns, features)
    return _keep(y)


class Conv(nn.Module):
    """A convolution of `[..., H, W, C]` to `features` maps, with a bias.

    Attributes:
      features: number of maps it emits.
      stride: maps shrink to ceil(H / stride) rows and ceil(W / stride) columns.
      upsample: whether the input is doubled first, by bilinear interpolation; 3 x 3 kernels only.
      kernel_shape: rows and columns of the kernel.
      padding: zeros (above, below) and (left, right) of the map.
      kernel_init: initializer of the kernel.
    """

    features: int
    stride: int = 1
    upsample: bool = False
    kernel_shape: tuple[int, int] = (3, 3)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layer."""
        shape = (*self.kernel_shape, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, x.dtype).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), x.dtype).astype(x.dtype)
        if self.upsample:
            return upsample_and_convolve(x, kernel) + match_rank(bias, x.ndim)
        padding = [(0, 0)] * (x.ndim - 3) + [*self.padding, (0, 0)]
        return convolve(jnp.pad(x, padding), kernel, self.stride) + match_rank(bias, x.ndim)
