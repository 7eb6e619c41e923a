"""Stacks of flow layers in distrax and flax: the peer `distrax`, which only has coupling ones."""

from functools import partial

import distrax
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from experiments.benchmark.peers import BINS, SIZE, LogProb, Stack
from experiments.benchmark.peers.distrax_led import affine, coupling_density, mlp
from led_jax.modules import pure


def make_log_prob(stack: Stack, key: Array) -> LogProb | None:
    """See `experiments.benchmark.peers`."""
    if stack.layer != "coupling":
        return None
    model = _Density(stack)
    init, log_prob = pure(model)
    return init(key, jnp.zeros((1, SIZE))), log_prob


class _Density(nn.Module):
    stack: Stack

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_params, transformer = {"affine": (2, affine), "spline": (3 * BINS + 1, _spline)}[
            self.stack.transformer
        ]
        widths = (*self.stack.hidden, num_params * SIZE)
        conditioner = partial(mlp, widths, nn.initializers.zeros)
        density = coupling_density(SIZE, self.stack.depth, conditioner, transformer)
        return jnp.asarray(density.log_prob(x))


def _spline(raw: Array) -> distrax.Bijector:
    raw = raw.reshape(*raw.shape[:-1], SIZE, -1)
    return distrax.RationalQuadraticSpline(
        raw, range_min=-3.0, range_max=3.0, boundary_slopes="identity"
    )
