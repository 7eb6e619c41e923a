"""Variational inference with flowjax's flows and loss: the peer `flowjax`."""

# pyright: reportMissingImports=false

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from flowjax import bijections, distributions, flows
from flowjax.train import fit_to_key_based_loss
from flowjax.train.losses import ElboLoss
from jax import Array

from experiments.benchmark.peers import Fit, Guide
from experiments.posteriors.models import problems
from led_jax import interop


def make_fit(guide: Guide, steps: int, batch: int, learning_rate: float) -> Fit:
    """See `experiments.benchmark.peers`."""
    problem = problems()["logistic regression"]

    def fit(key: Array) -> Sequence[float]:
        posterior = interop.from_numpyro(key, problem.model, *problem.data)
        base = distributions.Normal(jnp.zeros(posterior.size))
        if guide.kind == "mean_field":
            density = base
        elif guide.kind == "full_rank":
            map_ = bijections.TriangularAffine(jnp.zeros(posterior.size), jnp.eye(posterior.size))
            density = distributions.Transformed(
                distributions.StandardNormal((posterior.size,)), map_
            )
        else:
            density = flows.masked_autoregressive_flow(
                key,
                base_dist=base,
                flow_layers=guide.depth,
                nn_width=guide.hidden[0],
                nn_depth=len(guide.hidden),
                invert=False,
            )
        _, losses = fit_to_key_based_loss(
            key,
            density,
            loss_fn=ElboLoss(lambda x: posterior.log_density(jnp.asarray(x)), batch),
            steps=steps,
            optimizer=optax.adam(learning_rate),
            show_progress=False,
        )
        return losses

    return fit
