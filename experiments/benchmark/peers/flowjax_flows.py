"""Stacks of flow layers in flowjax: the peer `flowjax`."""

# pyright: reportMissingImports=false

import equinox as eqx
import jax.numpy as jnp
import paramax
from flowjax import bijections, distributions, flows
from jax import Array

from experiments.benchmark.peers import BINS, SIZE, LogProb, Stack


def make_log_prob(stack: Stack, key: Array) -> LogProb:
    """See `experiments.benchmark.peers`."""
    make = {"coupling": flows.coupling_flow, "made": flows.masked_autoregressive_flow}[stack.layer]
    splines = bijections.RationalQuadraticSpline(knots=BINS - 1, interval=3)
    flow = make(
        key,
        base_dist=distributions.Normal(jnp.zeros(SIZE)),
        transformer={"affine": None, "spline": splines}[stack.transformer],
        flow_layers=stack.depth,
        nn_width=stack.hidden[0],
        nn_depth=len(stack.hidden),
        invert=not stack.sequential,
    )
    params, constants = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )

    def log_prob(params, x: Array) -> Array:
        return paramax.unwrap(eqx.combine(params, constants)).log_prob(x)

    return params, log_prob
