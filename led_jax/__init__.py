"""led_jax: learnable explicit density for latent-variable models, in JAX.

Huang et al. (2017), "Learnable Explicit Density for Continuous Latent Space and Variational
Inference", https://arxiv.org/abs/1710.02248.
"""

from led_jax import (
    data,
    decoders,
    densities,
    descriptions,
    encoders,
    estimators,
    flows,
    likelihoods,
    networks,
    objectives,
    optimizers,
    posteriors,
    priors,
    sharding,
    training,
    variational,
)
from led_jax.densities import Density
from led_jax.descriptions import load, save
from led_jax.flows import Flow
from led_jax.likelihoods import Likelihood
from led_jax.model import LED, Elbo
from led_jax.objectives import Objective
from led_jax.priors import Prior

__version__ = "0.1.0"

__all__ = [
    "LED",
    "Density",
    "Elbo",
    "Flow",
    "Likelihood",
    "Objective",
    "Prior",
    "data",
    "decoders",
    "densities",
    "descriptions",
    "encoders",
    "estimators",
    "flows",
    "likelihoods",
    "load",
    "networks",
    "objectives",
    "optimizers",
    "posteriors",
    "priors",
    "save",
    "sharding",
    "training",
    "variational",
]
