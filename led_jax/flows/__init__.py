"""Flows: invertible maps with log-determinants, as pairs of pure functions."""

from led_jax.flows.actnorm import actnorm
from led_jax.flows.autoregressive import autoregressive, iaf
from led_jax.flows.base import Flow, chain, flatten, invert, repeat
from led_jax.flows.conditioners import Conditioner, mlp
from led_jax.flows.convolutional import convnet, pixelcnn
from led_jax.flows.coupling import coupling, real_nvp
from led_jax.flows.linear import householder, lu
from led_jax.flows.made import made
from led_jax.flows.masks import channel, checkerboard, random_half
from led_jax.flows.permutations import permute, reverse
from led_jax.flows.planar import planar, radial
from led_jax.flows.supports import exp, on, probit, sigmoid, simplex, softplus
from led_jax.flows.sylvester import (
    householder_sylvester,
    orthogonal_sylvester,
    triangular_sylvester,
)
from led_jax.flows.transformers import (
    Transformer,
    additive,
    affine,
    deep_sigmoid,
    gate,
    gated,
    rational_quadratic,
    scaled,
    sigmoid_mixture,
    spline,
)

__all__ = [
    "Conditioner",
    "Flow",
    "Transformer",
    "actnorm",
    "additive",
    "affine",
    "autoregressive",
    "chain",
    "channel",
    "checkerboard",
    "convnet",
    "coupling",
    "deep_sigmoid",
    "exp",
    "flatten",
    "gate",
    "gated",
    "householder",
    "householder_sylvester",
    "iaf",
    "invert",
    "lu",
    "made",
    "mlp",
    "on",
    "orthogonal_sylvester",
    "permute",
    "pixelcnn",
    "planar",
    "probit",
    "radial",
    "random_half",
    "rational_quadratic",
    "real_nvp",
    "repeat",
    "reverse",
    "scaled",
    "sigmoid",
    "sigmoid_mixture",
    "simplex",
    "softplus",
    "spline",
    "triangular_sylvester",
]
