"""Stochastic variational inference with numpyro's automatic guides: the peer `numpyro`."""

# pyright: reportMissingImports=false

from collections.abc import Sequence

import numpyro
from jax import Array
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal

from experiments.benchmark.peers import Fit, Guide
from experiments.posteriors.models import problems


def make_fit(guide: Guide, steps: int, batch: int, learning_rate: float) -> Fit:
    """See `experiments.benchmark.peers`."""
    problem = problems()["logistic regression"]

    def fit(key: Array) -> Sequence[float]:
        if guide.kind == "iaf":
            auto = AutoIAFNormal(
                problem.model, num_flows=guide.depth, hidden_dims=list(guide.hidden)
            )
        else:
            make = {"mean_field": AutoDiagonalNormal, "full_rank": AutoMultivariateNormal}
            auto = make[guide.kind](problem.model)
        optimizer = numpyro.optim.Adam(learning_rate)
        svi = SVI(problem.model, auto, optimizer, Trace_ELBO(num_particles=batch))
        return svi.run(key, steps, *problem.data, progress_bar=False).losses.tolist()

    return fit
