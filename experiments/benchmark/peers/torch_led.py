"""LED in PyTorch, eager: the peer `torch` of `experiments.benchmark`."""

# pyright: reportMissingImports=false

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmark.peers import FEATURES, HIDDEN, PIXELS, RESCONV_HIDDEN, SIDE
from experiments.benchmark.peers.torch_layers import (
    ConvCouplingLayer,
    CouplingLayer,
    Crop,
    MADELayer,
    PixelCNNLayer,
    coupling_order,
    down_block,
    mlp,
    up_block,
)
from experiments.config import Config
from led_jax.flows import masks

_DEFAULT_THREADS = torch.get_num_threads()


def make_epochs(config: Config, data: np.ndarray) -> dict[str, Callable[[], float]]:
    """See `experiments.benchmark.peers`.

    Raises:
      RuntimeError: if JAX computes on a GPU that this PyTorch cannot use.
    """
    # Small products may gain nothing from a second thread, and lose much if a core is occupied.
    threads = sorted({1, _DEFAULT_THREADS})
    formats = {"": torch.contiguous_format}
    if config.network == "resconv":
        formats[", channels last"] = torch.channels_last
    return {
        f"{n} threads{suffix}": _make_epoch(config, data, n, memory_format)
        for n in threads
        for suffix, memory_format in formats.items()
    }


def _make_epoch(
    config: Config, data: np.ndarray, num_threads: int, memory_format: torch.memory_format
) -> Callable[[], float]:
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default on a GPU
    torch.manual_seed(0)
    model = TorchLED(config).to(device)
    model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    rows = torch.from_numpy(data).to(device)
    num_steps = len(data) // config.batch_size

    def epoch() -> float:
        torch.set_num_threads(num_threads)
        steps = []
        order = torch.randperm(len(rows), device=device)[: num_steps * config.batch_size]
        for batch in order.split(config.batch_size):
            x = rows.index_select(0, batch).float()
            noise = torch.randn(len(x), *model.latent_shape, device=device)
            terms = model(x, noise)
            loss = minus_bound(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(terms.detach())
        return minus_bound(torch.stack(steps).mean(0)).item()

    return epoch


def minus_bound(terms: Tensor) -> Tensor:
    """The loss for the terms that `TorchLED` returns."""
    log_likelihood, log_prior, log_posterior = terms
    return log_posterior - log_prior - log_likelihood


class TorchLED(nn.Module):
    """The model of a configuration; `forward` gives the batch means of the bound's three terms."""

    def __init__(self, config: Config):
        """Makes the networks of `config`."""
        super().__init__()
        latent_dim = config.latent_size
        if config.latent_shape:
            self.latent_shape = config.latent_shape[2:] + config.latent_shape[:2]
            channels, context = self.latent_shape[0], config.posterior_context
            self.encoder = resconv_encoder(2 * channels + context, self.latent_shape)
            self.decoder = resconv_decoder(self.latent_shape)
            depth, hidden = config.posterior_depth, config.posterior_hidden
            posterior = [PixelCNNLayer(channels, hidden, context, depth) for _ in range(depth)]
            mask = masks.checkerboard(config.latent_shape)
            prior = [
                ConvCouplingLayer(mask ^ bool(i % 2), config.prior_hidden)
                for i in range(config.prior_depth)
            ]
        else:
            self.latent_shape = (latent_dim,)
            if config.network == "mlp":
                self.encoder = mlp((PIXELS, *HIDDEN, 2 * latent_dim))
                self.decoder = mlp((latent_dim, *HIDDEN, PIXELS))
            else:
                self.encoder = resconv_encoder(2 * latent_dim, self.latent_shape)
                self.decoder = resconv_decoder(self.latent_shape)
            depth, hidden = config.posterior_depth, config.posterior_hidden
            posterior = [MADELayer(latent_dim, hidden, depth) for _ in range(depth)]
            orders = [coupling_order(latent_dim, i) for i in range(config.prior_depth)]
            # Each layer returns z in its own order, from which the layer below reorders it.
            above = [*orders, np.arange(latent_dim)][1:]
            prior = [
                CouplingLayer(np.argsort(a)[b], config.prior_hidden)
                for a, b in zip(above, orders, strict=True)
            ]
        self.posterior, self.prior = nn.ModuleList(posterior), nn.ModuleList(prior)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Returns log p(x|z), log p(z), log q(z|x) for x `[n, 784]`, noise `[n, *latent_shape]`."""
        size = self.latent_shape[0]
        mean, log_std, context = self.encoder(x).tensor_split([size, 2 * size], 1)
        z = mean + log_std.exp() * noise
        log_posterior = log_normal(noise) - log_std.sum()
        for layer in self.posterior:
            z, log_det = layer(z, context)
            z, context = reverse(z), reverse(context)
            log_posterior = log_posterior - log_det
        logits = self.decoder(z)
        log_prior = torch.zeros_like(log_posterior)
        for layer in reversed(self.prior):
            z, log_det = layer(z)
            log_prior = log_prior + log_det
        log_prior = log_prior + log_normal(z)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return torch.stack([-cross_entropy, log_prior, log_posterior]) / len(x)


def log_normal(z: Tensor) -> Tensor:
    """The log-density of N(0, I), summed over the batch."""
    return -0.5 * (z.square().sum() + z.numel() * math.log(2 * math.pi))


def reverse(z: Tensor) -> Tensor:
    """Reverses the entries of every event."""
    return z.flip(tuple(range(1, z.ndim)))


def resconv_encoder(size: int, latent_shape: tuple[int, ...]) -> nn.Sequential:
    """Our ResConv encoder of `[n, 784]` to size numbers, or to size maps for a latent map."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, SIDE, SIDE))]
    side, channels = SIDE, 1
    for features in FEATURES:
        layers += [down_block(channels, features), nn.ELU()]
        side, channels = -(-side // 2), features
        if latent_shape[1:] == (side, side):
            return nn.Sequential(*layers, nn.Conv2d(channels, size, 3, padding=1))
    flat = nn.Flatten(), nn.Linear(channels * side**2, RESCONV_HIDDEN), nn.ELU()
    return nn.Sequential(*layers, *flat, nn.Linear(RESCONV_HIDDEN, size))


def resconv_decoder(latent_shape: tuple[int, ...]) -> nn.Sequential:
    """Our ResConv decoder of `[n, *latent_shape]` to logits `[n, 784]`."""
    sides = list(itertools.accumulate(FEATURES, lambda side, _: -(-side // 2), initial=SIDE))
    widths = [1, *FEATURES]
    blocks = len(FEATURES) if len(latent_shape) == 1 else sides.index(latent_shape[1])
    side, channels = sides[blocks], widths[blocks]
    if len(latent_shape) == 1:
        layers: list[nn.Module] = [
            nn.Linear(latent_shape[0], RESCONV_HIDDEN),
            nn.ELU(),
            nn.Linear(RESCONV_HIDDEN, channels * side**2),
            nn.Unflatten(1, (channels, side, side)),
        ]
    else:
        layers = [nn.Conv2d(latent_shape[0], channels, 3, padding=1)]
    for i in reversed(range(blocks)):
        layers += [nn.ELU(), up_block(widths[i + 1], widths[i])]
        if sides[i] < 2 * sides[i + 1]:
            layers.append(Crop(sides[i]))
    return nn.Sequential(*layers, nn.Flatten())
