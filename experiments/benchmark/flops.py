"""Floating-point operations of a configuration's matrix products and convolutions.

Masked weights count as if they were not masked.
"""

import itertools
import math

from experiments.benchmark.peers import FEATURES, HIDDEN, PIXELS, RESCONV_HIDDEN, SIDE
from experiments.config import Config
from led_jax import flows


def network_flops(*widths: int) -> int:
    """FLOPs of dense layers of these widths, for one row."""
    return 2 * sum(rows * columns for rows, columns in itertools.pairwise(widths))


def convolution_flops(positions: int, taps: int, *widths: int) -> int:
    """FLOPs of convolutions at `positions`, by kernels of `taps` places, with channels `widths`."""
    return positions * taps * network_flops(*widths)


def step_gflop(config: Config) -> float:
    """GFLOP of a training step: those of one forward pass, and twice as many backward.

    In the first layer the gradient with respect to the images is not needed, and does not count.
    """
    if config.network == "mlp":
        first_layer = network_flops(PIXELS, HIDDEN[0])
    else:
        first_layer = convolution_flops((SIDE // 2) ** 2, 9, 1, 2 * FEATURES[0])
    flops = 3 * sum(forward_flops(config).values()) - first_layer
    return 1e-9 * config.batch_size * flops


def forward_flops(config: Config) -> dict[str, int]:
    """FLOPs of each part of a configuration's model, for one row of 784 pixels."""
    encoder, decoder = _mlp_flops(config) if config.network == "mlp" else _resconv_flops(config)
    return {
        "encoder": encoder,
        "posterior": config.posterior_depth * _posterior_layer_flops(config),
        "prior": config.prior_depth * _prior_layer_flops(config),
        "decoder": decoder,
    }


def _mlp_flops(config: Config) -> tuple[int, int]:
    """FLOPs of the encoder and of the decoder, for one row."""
    encoder = network_flops(PIXELS, *HIDDEN, 2 * config.latent_size)
    return encoder, network_flops(config.latent_size, *HIDDEN, PIXELS)


def _resconv_flops(config: Config) -> tuple[int, int]:
    """FLOPs of the encoder and of the decoder, for one row."""
    encoder = decoder = 0
    side, channels = SIDE, 1
    for features in FEATURES:
        if config.latent_shape[:2] == (side, side):
            break
        side = -(-side // 2)
        encoder += _block_flops(side**2, channels, features, features)
        decoder += _block_flops((2 * side) ** 2, features, features, channels)
        channels = features
    if config.latent_shape:
        maps = config.latent_shape[-1]
        encoder += convolution_flops(side**2, 9, channels, 2 * maps + config.posterior_context)
        decoder += convolution_flops(side**2, 9, maps, channels)
    else:
        flat = side**2 * channels
        encoder += network_flops(flat, RESCONV_HIDDEN, 2 * config.latent_size)
        decoder += network_flops(config.latent_size, RESCONV_HIDDEN, flat)
    return encoder, decoder


def _block_flops(positions: int, channels: int, hidden: int, features: int) -> int:
    first = convolution_flops(positions, 9, channels, hidden + features)
    return first + convolution_flops(positions, 9, hidden, features)


def _prior_layer_flops(config: Config) -> int:
    """FLOPs of a coupling layer, which is convolutional if the latent variables are a map."""
    num_params = getattr(flows, config.prior_transformer).num_params
    if config.latent_shape:
        maps, positions = config.latent_shape[-1], math.prod(config.latent_shape[:2])
        widths = (maps, *config.prior_hidden, num_params * maps)
        return convolution_flops(positions, 9, *widths)
    passing = config.latent_size // 2
    widths = (passing, *config.prior_hidden, num_params * (config.latent_size - passing))
    return network_flops(*widths)


def _posterior_layer_flops(config: Config) -> int:
    """FLOPs of a MADE layer, or of a PixelCNN layer if the latent variables are a map."""
    name = config.posterior_transformer
    # "default" is a gate with a bias of its own, which has as many parameters as `gated`.
    num_params = getattr(flows, "gated" if name == "default" else name).num_params
    hidden = config.posterior_hidden
    if not config.latent_shape:
        return network_flops(config.latent_size, *hidden, num_params * config.latent_size)
    maps, positions = config.latent_shape[-1], math.prod(config.latent_shape[:2])
    taps = 6 + 2  # 2 x 3 over the rows above, 1 x 2 over the pixels to the left
    pixel = network_flops(maps, hidden[-1], num_params * maps)
    pixel += network_flops(hidden[-1], hidden[-1])
    pixel += taps * network_flops(maps, *hidden) + sum(network_flops(n, n) for n in hidden)
    pixel += network_flops(config.posterior_context, hidden[0])
    return positions * pixel
