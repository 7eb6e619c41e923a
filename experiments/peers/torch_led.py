"""LED in PyTorch, eager: the peer `torch` of `experiments.benchmark`."""

# pyright: reportMissingImports=false

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import Config
from experiments.peers import HIDDEN, PIXELS
from led_jax.flows import masks

_DEFAULT_THREADS = torch.get_num_threads()


def make_epochs(config: Config, data: np.ndarray) -> dict[str, Callable[[], float]]:
    """See `experiments.peers`.

    Raises:
      RuntimeError: if JAX computes on a GPU that this PyTorch cannot use.
    """
    # Small products may gain nothing from a second thread, and lose much if a core is taken.
    threads = sorted({1, _DEFAULT_THREADS})
    return {f"{n} threads": _make_epoch(config, data, n) for n in threads}


def _make_epoch(config: Config, data: np.ndarray, num_threads: int) -> Callable[[], float]:
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default on a GPU
    torch.manual_seed(0)
    model = TorchLED(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    rows = torch.from_numpy(data).to(device)
    num_steps = len(data) // config.batch_size

    def epoch() -> float:
        torch.set_num_threads(num_threads)
        total = torch.zeros((), device=device)
        order = torch.randperm(len(rows), device=device)[: num_steps * config.batch_size]
        for batch in order.split(config.batch_size):
            x = rows.index_select(0, batch).float()
            noise = torch.randn(len(x), config.latent_dim, device=device)
            loss = model(x, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / num_steps

    return epoch


class TorchLED(nn.Module):
    """The model of a configuration; `forward` gives minus the ELBO, averaged over the batch."""

    def __init__(self, config: Config):
        """Makes the networks of `config`."""
        super().__init__()
        latent_dim = config.latent_dim
        self.encoder = mlp((PIXELS, *HIDDEN, 2 * latent_dim))
        self.posterior = nn.ModuleList(
            MADELayer(latent_dim, config.posterior_hidden, config.posterior_depth)
            for _ in range(config.posterior_depth)
        )
        orders = [coupling_order(latent_dim, i) for i in range(config.prior_depth)]
        # A layer leaves z in its own order; the next one down goes from there.
        above = [*orders, np.arange(latent_dim)][1:]
        self.prior = nn.ModuleList(
            CouplingLayer(np.argsort(a)[b], config.prior_hidden)
            for a, b in zip(above, orders, strict=True)
        )
        self.decoder = mlp((latent_dim, *HIDDEN, PIXELS))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns the loss, a scalar, for x `[n, 784]` and noise `[n, latent_dim]`."""
        mean, log_std = self.encoder(x).chunk(2, -1)
        z = mean + log_std.exp() * noise
        # log p(z) - log q(z|x): the normalizing constants of the two Gaussians cancel.
        log_ratio = log_std.sum() + 0.5 * noise.square().sum()
        for layer in self.posterior:
            z, log_det = layer(z)
            log_ratio = log_ratio + log_det
        logits = self.decoder(z)
        for layer in reversed(self.prior):
            z, log_det = layer(z)
            log_ratio = log_ratio + log_det
        log_ratio = log_ratio - 0.5 * z.square().sum()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (cross_entropy - log_ratio) / len(x)


class CouplingLayer(nn.Module):
    """An affine coupling layer, from data to base; log-determinants are summed over the batch."""

    order: Tensor

    def __init__(self, order: np.ndarray, hidden: Sequence[int]):
        """Makes a layer that takes its entries in `order`; the first half passes."""
        super().__init__()
        self.register_buffer("order", torch.from_numpy(order))
        self.num_passing = len(order) // 2
        self.net = mlp((self.num_passing, *hidden, 2 * (len(order) - self.num_passing)))
        zero_last(self.net)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's input and the log-determinant, for its output z."""
        passing, rest = z.index_select(1, self.order).tensor_split([self.num_passing], -1)
        shift, raw = self.net(passing).chunk(2, -1)
        log_scale = 3 * torch.tanh(raw / 3)
        rest = (rest - shift) * torch.exp(-log_scale)
        return torch.cat([passing, rest], -1), -log_scale.sum()


class MADELayer(nn.Module):
    """A gated inverse autoregressive layer and a reversal of the entries."""

    def __init__(self, size: int, hidden: Sequence[int], depth: int):
        """Makes one of `depth` layers on `size` entries."""
        super().__init__()
        degrees = [np.arange(1, size + 1), *(masks.hidden_degrees(n, size) for n in hidden)]
        layers: list[nn.Module] = []
        for rows, columns in itertools.pairwise(degrees):
            layers += [MaskedLinear(rows, columns), nn.ReLU()]
        self.net = nn.Sequential(*layers, MaskedLinear(degrees[-1], np.tile(np.arange(size), 2)))
        zero_last(self.net)
        self.bias = -math.log(2 ** (1 / depth) - 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output and the log-determinant, for its input z."""
        mean, logit = self.net(z).chunk(2, -1)
        logit = logit + self.bias
        return torch.lerp(mean, z, torch.sigmoid(logit)).flip(-1), F.logsigmoid(logit).sum()


class MaskedLinear(nn.Linear):
    """A linear layer whose output j sees the inputs i with in_degrees[i] <= out_degrees[j]."""

    mask: Tensor

    def __init__(self, in_degrees: np.ndarray, out_degrees: np.ndarray):
        """Makes a layer of these degrees."""
        super().__init__(len(in_degrees), len(out_degrees))
        mask = in_degrees <= out_degrees[:, None]
        self.register_buffer("mask", torch.from_numpy(mask.astype(np.float32)))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the masked weights."""
        return F.linear(input, self.weight * self.mask, self.bias)


def coupling_order(size: int, layer: int) -> np.ndarray:
    """The order of a layer's entries: the passing ones first, exchanged in every second layer."""
    order = np.argsort(~masks.random_half((size,), layer // 2), kind="stable")
    return order if layer % 2 == 0 else order[::-1].copy()


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
