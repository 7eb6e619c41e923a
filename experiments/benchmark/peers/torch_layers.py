"""Networks and flow layers in PyTorch, out of which `torch_led` builds its models.

Flow layers return their output and the log-determinant, which is summed over the batch. Maps are
`[n, C, H, W]`.
"""

# pyright: reportMissingImports=false

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from led_jax.flows import masks


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for rows, columns in itertools.pairwise(widths):
        layers += [nn.Linear(rows, columns), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def zero_last(net: nn.Sequential) -> None:
    """Sets the last layer to zero, so that a fresh flow starts where ours does."""
    for parameter in net[-1].parameters():
        nn.init.zeros_(parameter)


class MaskedLinear(nn.Linear):
    """A linear layer whose output j sees the inputs i with in_degrees[i] <= out_degrees[j].

    The entries of in_degrees ascend. Inputs that no output sees have no weights.
    """

    mask: Tensor

    def __init__(self, in_degrees: np.ndarray, out_degrees: np.ndarray):
        """Makes a layer of these degrees."""
        in_degrees = in_degrees[in_degrees <= out_degrees.max()]
        super().__init__(len(in_degrees), len(out_degrees))
        mask = in_degrees <= out_degrees[:, None]
        self.register_buffer("mask", torch.from_numpy(mask.astype(np.float32)))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the masked weights."""
        return F.linear(input[..., : self.in_features], self.weight * self.mask, self.bias)


def coupling_order(size: int, layer: int) -> np.ndarray:
    """A layer's order of the entries: first those that pass, which alternate between layers."""
    order = np.argsort(~masks.random_half((size,), layer // 2), kind="stable")
    return order if layer % 2 == 0 else order[::-1].copy()


class CouplingLayer(nn.Module):
    """An affine coupling layer of vectors, from data to base."""

    order: Tensor

    def __init__(self, order: np.ndarray, hidden: Sequence[int]):
        """Makes a layer that takes its entries in `order`; the first half passes."""
        super().__init__()
        self.register_buffer("order", torch.from_numpy(order))
        self.num_passing = len(order) // 2
        self.net = mlp((self.num_passing, *hidden, 2 * (len(order) - self.num_passing)))
        zero_last(self.net)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's input for its output z."""
        passing, rest = z.index_select(1, self.order).tensor_split([self.num_passing], -1)
        shift, raw = self.net(passing).chunk(2, -1)
        log_scale = 3 * torch.tanh(raw / 3)
        rest = (rest - shift) * torch.exp(-log_scale)
        return torch.cat([passing, rest], -1), -log_scale.sum()


class ConvCouplingLayer(nn.Module):
    """An affine coupling layer of maps, from data to base."""

    mask: Tensor

    def __init__(self, mask: np.ndarray, hidden: Sequence[int]):
        """Makes a layer that passes the entries that the mask `[H, W, C]` marks."""
        super().__init__()
        mask = np.ascontiguousarray(np.moveaxis(mask, -1, 0), np.float32)
        self.register_buffer("mask", torch.from_numpy(mask))
        layers: list[nn.Module] = []
        for rows, columns in itertools.pairwise((len(mask), *hidden, 2 * len(mask))):
            layers += [nn.Conv2d(rows, columns, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        zero_last(self.net)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's input for its output z."""
        shift, raw = self.net(self.mask * z).chunk(2, 1)
        rest = 1 - self.mask
        log_scale = rest * (3 * torch.tanh(raw / 3))
        return (z - rest * shift) * torch.exp(-log_scale), -log_scale.sum()


class MADELayer(nn.Module):
    """A gated inverse autoregressive layer of vectors; it reads no context."""

    def __init__(self, size: int, hidden: Sequence[int], depth: int):
        """Makes one of `depth` layers on `size` entries."""
        super().__init__()
        degrees = [np.arange(1, size + 1), *(masks.hidden_degrees(n, size) for n in hidden)]
        layers: list[nn.Module] = []
        for rows, columns in itertools.pairwise(degrees):
            layers += [MaskedLinear(rows, columns), nn.ReLU()]
        self.net = nn.Sequential(*layers, MaskedLinear(degrees[-1], np.tile(np.arange(size), 2)))
        zero_last(self.net)
        self.bias = gate_bias(depth)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output for its input z."""
        mean, logit = self.net(z).chunk(2, -1)
        return gate(mean, logit + self.bias, z)


class PixelCNNLayer(nn.Module):
    """A gated inverse autoregressive layer of maps."""

    def __init__(self, channels: int, hidden: Sequence[int], context: int, depth: int):
        """Makes one of `depth` layers on maps of `channels`, with `context` channels of context."""
        super().__init__()
        widths = list(itertools.pairwise((channels, *hidden)))
        self.above = nn.ModuleList(nn.Conv2d(m, n, (2, 3)) for m, n in widths)
        self.left = nn.ModuleList(nn.Conv2d(m, n, (1, 2)) for m, n in widths)
        self.down = nn.ModuleList(nn.Conv2d(n, n, 1, bias=False) for n in hidden)
        self.context = nn.Conv2d(context, hidden[0], 1, bias=False)
        width = hidden[-1]
        degrees = masks.hidden_degrees(width, channels, lowest=0)
        self.pixel = MaskedLinear(np.arange(1, channels + 1), degrees)
        self.pixel_context = nn.Linear(width, width, bias=False)
        self.out = nn.Sequential(MaskedLinear(degrees, np.tile(np.arange(channels), 2)))
        zero_last(self.out)
        self.bias = gate_bias(depth)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output for its input z."""
        above, left = z[:, :, :-1], z[..., :-1]
        for i, (conv_above, conv_left, down) in enumerate(
            zip(self.above, self.left, self.down, strict=True)
        ):
            back = 2 if i == 0 else 1
            above = conv_above(F.pad(above, (1, 1, back, 0)))
            left = conv_left(F.pad(left, (back, 0))) + down(above)
            if i == 0:
                left = left + self.context(context)
            above, left = F.relu(above), F.relu(left)
        h = self.pixel(z.movedim(1, -1)) + self.pixel_context(left.movedim(1, -1))
        mean, logit = self.out(F.relu(h)).movedim(-1, 1).chunk(2, 1)
        return gate(mean, logit + self.bias, z)


def gate_bias(depth: int) -> float:
    """The bias of each gate: a new stack of `depth` halves its input, sigmoid(bias)^depth = 1/2."""
    return -math.log(2 ** (1 / depth) - 1)


def gate(mean: Tensor, logit: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The update of inverse autoregressive flow."""
    return torch.lerp(mean, z, torch.sigmoid(logit)), F.logsigmoid(logit).sum()


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, whose maps the first convolution computes, too."""

    def __init__(self, first: nn.Module, second: nn.Module):
        """Makes a block; the maps of `first` that `second` does not read are the shortcut."""
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        h, shortcut = self.first(x).tensor_split([self.second.in_channels], 1)
        return shortcut + self.second(F.elu(h))


def down_block(channels: int, features: int) -> ResBlock:
    """A block that halves maps."""
    first = nn.Conv2d(channels, 2 * features, 3, stride=2, padding=1)
    return ResBlock(first, nn.Conv2d(features, features, 3, padding=1))


def up_block(channels: int, features: int) -> ResBlock:
    """A block that doubles maps."""
    first = nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(channels, channels + features, 3, padding=1, padding_mode="replicate"),
    )
    return ResBlock(first, nn.Conv2d(channels, features, 3, padding=1))


class Crop(nn.Module):
    """The first rows and columns of a map."""

    def __init__(self, size: int):
        """Keeps `size` of each."""
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Crops x."""
        return x[..., : self.size, : self.size]
