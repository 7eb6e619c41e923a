"""The model that a configuration describes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import optax

from experiments.config import FLOWS, Config
from led_jax import (
    decoders,
    densities,
    descriptions,
    encoders,
    flows,
    likelihoods,
    networks,
    objectives,
    optimizers,
)
from led_jax.data import Dataset
from led_jax.decoders import Decoder
from led_jax.densities import Density
from led_jax.flows import Flow
from led_jax.likelihoods import Likelihood
from led_jax.model import LED
from led_jax.objectives import Objective
from led_jax.posteriors import Family
from led_jax.priors import Prior

_T = TypeVar("_T")

_SYLVESTER = ("triangular_sylvester", "householder_sylvester", "orthogonal_sylvester")

_FAST_ONE_WAY = ("iaf", "planar", *_SYLVESTER)
"""Flows whose `inverse` is a loop or a root find, whatever their transformer."""


_CODE, _CODE_MAPS = 64, 4
"""Size of the code that a network computes from z for a decoder's density: entries, or maps."""

_FOR_ROWS = {"network": "mlp", "decoder": "flow"}
"""Flag -> its value that takes rows which are not images."""


def decoder_values(config: Config) -> str:
    """The kind of values of x that --decoder takes, as in `Likelihood.values`.

    Raises:
      ValueError: if it is neither a likelihood nor a constructor of flows or densities.
    """
    name = descriptions.parse(config.decoder_constructor)[0]
    if "event_shape" in descriptions.parameters(name):
        return "real"
    return _make_named("decoder", config.decoder_constructor, Likelihood).values


def _make_decoder(config: Config, dataset: Dataset) -> Likelihood | Decoder:
    """What --decoder names: a likelihood of each entry of x, or a decoder with a density of x.

    That density is conditional on a code, which a network computes from z. If its flow has masks of
    an image ("checkerboard" or "channel"), the flow is one on maps, whose convolutions read the
    code as maps, too.

    Raises:
      ValueError: if --decoder names neither.
    """
    name, arguments = descriptions.parse(config.decoder_constructor)
    taken = descriptions.parameters(name)
    if "event_shape" not in taken:
        return _make_named("decoder", config.decoder_constructor, Likelihood)
    if config.network != "mlp":
        raise ValueError(f"--decoder={config.decoder} needs --network=mlp")
    event_shape, code_size = (math.prod(dataset.image_shape),), _CODE
    known: dict[str, Any] = {"depth": 4}
    if _masks_places(arguments):
        height, width, *channels = _images(dataset, "decoder", config.decoder)
        event_shape, code_size = (height, width, *(channels or (1,))), height * width * _CODE_MAPS
        known |= {"hidden": (32,), "conditioner": functools.partial(flows.convnet, event_shape)}
    known |= {"event_shape": event_shape, "context_dim": code_size}
    try:
        value = descriptions.make(
            name, **{key: v for key, v in known.items() if key in taken} | arguments
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"--decoder={config.decoder} makes no decoder: {error}") from error
    if isinstance(value, Flow):
        flow = value if _scores(name, arguments) else flows.invert(value)
        value = densities.transformed(densities.standard_normal(event_shape), flow)
    if not isinstance(value, Density):
        raise ValueError(f"--decoder={config.decoder} is no decoder, but {value!r}")
    return decoders.density_decoder(value, event_shape, networks.MLP((200, 200, code_size)))


def _once_for_all_seeds(make: Callable[[Config, int], _T]) -> Callable[[Config, int], _T]:
    """Makes one value for all seeds of a configuration, which then share compiled programs."""
    of_config = functools.lru_cache(maxsize=16)(make)

    @functools.wraps(make)
    def of_any_seed(config: Config, num_steps: int) -> _T:
        return of_config(dataclasses.replace(config, seed=0), num_steps)

    return of_any_seed


@_once_for_all_seeds
def make_objective(config: Config, num_steps: int) -> Objective:
    """The objective that --objective names; the KL of `elbo` warms up as --kl_warmup says.

    With --prior_from it is `objectives.prior_only`.

    Raises:
      ValueError: if --objective does not name one.
    """
    if config.prior_from:
        return objectives.prior_only()
    kl_steps = round(config.kl_warmup * num_steps)
    warm_up = {}
    if descriptions.parse(config.objective)[0] == "elbo" and kl_steps:
        warm_up["kl_weight"] = optax.linear_schedule(0.0, 1.0, kl_steps)
    return _make_named("objective", config.objective, Objective, **warm_up)


@_once_for_all_seeds
def make_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer that --optimizer names, with its schedule and, with --ema, averaging.

    Raises:
      ValueError: if --optimizer does not name one.
    """

    def make(learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return _make_named(
            "optimizer",
            config.optimizer,
            optax.GradientTransformation,
            learning_rate=learning_rate,
        )

    optimizer = optimizers.scheduled(
        make,
        config.learning_rate,
        num_steps,
        warmup_steps=round(config.warmup * num_steps),
        clip_norm=config.clip_norm or None,
    )
    return optimizers.averaged(optimizer, config.ema) if config.ema else optimizer


def _make_named(flag: str, text: str, kind: type[_T], **defaults: Any) -> _T:
    """Calls the constructor that a flag's text describes; its value has to be of a kind."""
    name, arguments = descriptions.parse(text)
    try:
        value = descriptions.make(name, **defaults | arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--{flag}={text} makes no {flag}: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"--{flag}={text} is no {flag}, but {value!r}")
    return value


def make_flows(config: Config, width: int | None = None) -> tuple[Flow | Family, Density | Prior]:
    """The posterior and the prior that a configuration names.

    Args:
      config: the configuration.
      width: entries of the context that the whole model is conditional on; None if it is not.

    Raises:
      ValueError: if --posterior makes no flow or family, or the constructor that --prior or
        --posterior names does not take its arguments.
    """
    latent_shape = config.latent_shape or (config.latent_size,)
    # The seed gives the posterior other masks than the prior's.
    posterior, _ = _make(
        config, "posterior", latent_shape, context_dim=_context_dim(config), seed=1000
    )
    if not isinstance(posterior, Flow | Family):
        raise ValueError(f"--posterior={config.posterior} is no flow, but {posterior!r}")
    prior, scores = _make(config, "prior", latent_shape, context_dim=width)
    if isinstance(prior, Flow):
        # Training scores z under the prior, for which `inverse` must have no loop or root find.
        flow = prior if scores else flows.invert(prior)
        prior = densities.transformed(densities.standard_normal(latent_shape), flow)
    return posterior, prior


def build_led(config: Config, dataset: Dataset) -> LED:
    """The model of a configuration for a data set's images.

    Raises:
      ValueError: as `make_flows`, or if the network does not take the images.
    """
    width = None if dataset.context is None else dataset.context["train"].shape[1]
    posterior, prior = make_flows(config, width)
    context_dim = _context_dim(config)
    weight_norm = config.weight_norm
    made = _make_decoder(config, dataset)
    if isinstance(made, Decoder):
        return LED(
            encoder=encoders.mlp_encoder(config.latent_size, context_dim=context_dim),
            posterior=posterior,
            prior=prior,
            decoder=made,
        )
    # Bernoulli is the decoders' default, which their descriptions leave out.
    likelihood = None if made == likelihoods.bernoulli() else made
    if config.network == "mlp":
        encoder = encoders.mlp_encoder(config.latent_size, context_dim=context_dim)
        x_dim = math.prod(dataset.image_shape)
        decoder = decoders.mlp_decoder(x_dim, likelihood=likelihood)
    elif config.latent_shape:
        images = _images(dataset, "network", config.network)
        height, width, channels = config.latent_shape
        encoder = encoders.spatial_encoder(
            images,
            (height, width, channels),
            context_maps=config.posterior_context or None,
            weight_norm=weight_norm,
        )
        decoder = decoders.spatial_decoder(
            images, (height, width, channels), weight_norm=weight_norm, likelihood=likelihood
        )
    else:
        images = _images(dataset, "network", config.network)
        encoder = encoders.resconv_encoder(
            images, config.latent_size, context_dim=context_dim, weight_norm=weight_norm
        )
        decoder = decoders.resconv_decoder(images, weight_norm=weight_norm, likelihood=likelihood)
    return LED(
        encoder=encoder,
        posterior=posterior,
        prior=prior,
        decoder=decoder,
    )


def _context_dim(config: Config) -> int | None:
    """Entries of the posterior's context, a vector even if z is a map; None for no context."""
    return config.posterior_context * math.prod(config.latent_shape[:2]) or None


def _images(dataset: Dataset, flag: str, value: str) -> tuple[int, ...]:
    """(H, W) of grey images, or (H, W, C)."""
    match dataset.image_shape:
        case (height, width) | (height, width, 1):
            return height, width
        case (height, width, colours):
            return height, width, colours
    raise ValueError(
        f"--{flag}={value} takes images [n, H, W] or [n, H, W, C]; {dataset.name} has rows of "
        f"shape {dataset.image_shape}: use --{flag}={_FOR_ROWS[flag]}"
    )


def _make(
    config: Config, part: str, event_shape: tuple[int, ...], **context: Any
) -> tuple[Any, bool]:
    """What --prior or --posterior names and, if that is a flow, whether its `inverse` is cheap."""
    kind, arguments = _arguments(config, part)
    name = FLOWS.get(kind, kind)
    context |= {"event_shape": event_shape}
    if kind == "pixelcnn":
        context["conditioner"] = functools.partial(flows.pixelcnn, event_shape)
    elif name == "real_nvp" and _masks_places(arguments):
        context["conditioner"] = functools.partial(flows.convnet, event_shape)
    taken = descriptions.parameters(name)
    known = {key: value for key, value in context.items() if key in taken}
    try:
        value = descriptions.make(name, **known | arguments)
    except TypeError as error:
        raise ValueError(f"--{part}={getattr(config, part)} makes none: {error}") from error
    return value, _scores(name, arguments)


def _masks_places(arguments: dict[str, Any]) -> bool:
    """Whether a Real NVP's masks are those of a map, so that its conditioners are convolutions."""
    return arguments.get("mask") in ("checkerboard", "channel")


def _scores(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a constructor makes a flow with a cheap `inverse`; of no meaning for other kinds."""
    transformer = arguments.get("transformer") or flows.affine
    return name not in _FAST_ONE_WAY and transformer.cheap != "apply"


def _arguments(config: Config, part: str) -> tuple[str, dict[str, Any]]:
    """The constructor's name and arguments, from one flag or from several."""
    text = getattr(config, part)
    kind, colon, rest = text.partition(":")
    if text in FLOWS:
        arguments = {name: getattr(config, f"{part}_{name}") for name in ("depth", "hidden")}
        if text == "nvp":
            arguments["mask"] = getattr(config, f"{part}_mask")
        transformer = getattr(config, f"{part}_transformer")
        if transformer != "default":
            arguments["transformer"] = getattr(flows, transformer)
    else:
        arguments = descriptions.parse(FLOWS.get(kind, kind) + colon + rest)[1]
    depth = arguments.get("depth")
    is_gated = part == "posterior" and FLOWS.get(kind) == "iaf" and "transformer" not in arguments
    if is_gated and isinstance(depth, int):
        # A fresh stack halves its input: sigmoid(bias)^depth = 1/2.
        arguments["transformer"] = flows.gate(-math.log(2 ** (1 / max(depth, 1)) - 1))
    return kind, arguments
