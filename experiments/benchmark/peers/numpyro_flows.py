"""Stacks of flow layers in numpyro: the peer `numpyro`, which only has affine MADE."""

# pyright: reportMissingImports=false

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import distributions
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.transforms import PermuteTransform
from numpyro.nn import AutoregressiveNN

from experiments.benchmark.peers import SIZE, LogProb, Stack


def make_log_prob(stack: Stack, key: Array) -> LogProb | None:
    """See `experiments.benchmark.peers`."""
    if stack.layer != "made" or stack.transformer != "affine":
        return None
    init, network = AutoregressiveNN(SIZE, list(stack.hidden))
    params = [init(key, (SIZE,))[1] for key in jax.random.split(key, stack.depth)]

    def log_prob(params, x: Array) -> Array:
        transforms = []
        for layer_params in params:
            layer = InverseAutoregressiveTransform(partial(network, layer_params))
            transforms += [layer, PermuteTransform(jnp.arange(SIZE)[::-1])]
        if not stack.sequential:
            transforms = [transform.inv for transform in reversed(transforms)]
        base = distributions.Normal(jnp.zeros(SIZE)).to_event(1)
        return distributions.TransformedDistribution(base, transforms).log_prob(x)

    return params, log_prob
