"""The model that a configuration describes."""

import functools
import math

from experiments.config import Config
from led_jax import decoders, densities, encoders, flows
from led_jax.data import Dataset
from led_jax.model import LED

TRANSFORMERS = {
    "additive": flows.additive,
    "affine": flows.affine,
    "gated": flows.gated,
    "rational_quadratic": flows.rational_quadratic,
    "deep_sigmoid": flows.deep_sigmoid,
}
"""The elementwise maps by the names that the flags give them."""


def build_led(config: Config, dataset: Dataset) -> LED:
    """The model of a configuration for a data set's images."""
    latent_shape = config.latent_shape or (config.latent_size,)
    # The context is a vector, of maps too.
    context_dim = config.posterior_context * math.prod(config.latent_shape[:2]) or None
    posterior = _stack(
        config.posterior,
        latent_shape,
        config.posterior_depth,
        config.posterior_hidden,
        config.posterior_mask,
        TRANSFORMERS.get(config.posterior_transformer),
        context_dim=context_dim,
        seed=1000,  # Other masks than the prior's.
    )
    transformer = TRANSFORMERS[config.prior_transformer]
    prior = _stack(
        config.prior,
        latent_shape,
        config.prior_depth,
        config.prior_hidden,
        config.prior_mask,
        transformer,
    )
    # Training scores z under the prior: that takes the direction without a loop or a root find.
    if config.prior != "nvp" or transformer is flows.deep_sigmoid:
        prior = flows.invert(prior)
    images, weight_norm = dataset.image_shape, config.weight_norm
    if config.network == "mlp":
        encoder = encoders.mlp_encoder(config.latent_size, context_dim=context_dim)
        decoder = decoders.mlp_decoder(math.prod(images))
    elif config.latent_shape:
        height, width, channels = config.latent_shape
        encoder = encoders.spatial_encoder(
            images,
            (height, width, channels),
            context_maps=config.posterior_context or None,
            weight_norm=weight_norm,
        )
        decoder = decoders.spatial_decoder(
            images, (height, width, channels), weight_norm=weight_norm
        )
    else:
        encoder = encoders.resconv_encoder(
            images, config.latent_size, context_dim=context_dim, weight_norm=weight_norm
        )
        decoder = decoders.resconv_decoder(images, weight_norm=weight_norm)
    return LED(
        encoder=encoder,
        posterior=posterior,
        prior=densities.transformed(densities.standard_normal(latent_shape), prior),
        decoder=decoder,
    )


def _stack(
    kind: str,
    event_shape: tuple[int, ...],
    depth: int,
    hidden: tuple[int, ...],
    mask: str,
    transformer: flows.Transformer | None,
    *,
    context_dim: int | None = None,
    seed: int = 0,
) -> flows.Flow:
    """The stack of layers that --prior or --posterior names; no transformer: its default."""
    if kind == "nvp":
        convnet = functools.partial(flows.convnet, event_shape)
        return flows.real_nvp(
            event_shape,
            depth,
            hidden,
            mask,
            transformer=transformer or flows.affine,
            context_dim=context_dim,
            seed=seed,
            conditioner=flows.mlp if mask == "random" else convnet,
        )
    pixelcnn = functools.partial(flows.pixelcnn, event_shape)
    return flows.iaf(
        event_shape,
        depth,
        hidden,
        context_dim,
        transformer=transformer,
        conditioner=flows.made if kind == "made" else pixelcnn,
    )
