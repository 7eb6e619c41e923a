"""led_jax: learnable explicit density for latent-variable models, in JAX.

Huang et al. (2017), "Learnable Explicit Density for Continuous Latent Space and Variational
Inference", https://arxiv.org/abs/1710.02248.
"""

from led_jax import data, densities, fit, flows, networks, objectives, parallel, training
from led_jax.densities import Density
from led_jax.flows import Flow
from led_jax.model import LED, Elbo

__version__ = "0.1.0"

__all__ = [
    "LED",
    "Density",
    "Elbo",
    "Flow",
    "data",
    "densities",
    "fit",
    "flows",
    "networks",
    "objectives",
    "parallel",
    "training",
]
