"""The suite `inference` of `experiments.benchmark`: variational inference beside the peers'.

The posterior is that of Bayesian logistic regression on scikit-learn's breast cancer data, of 31
entries.
"""

import importlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmark.measuring import markdown_table, round_robin, say
from experiments.benchmark.peers import Fit, Guide
from led_jax import densities, flows, variational

CELLS = {
    "mean_field": Guide("mean_field"),
    "full_rank": Guide("full_rank"),
    "iaf3": Guide("iaf", depth=3),
}
PEERS = ("flowjax", "numpyro")
STEPS, BATCH, LEARNING_RATE = 5000, 100, 3e-3
TITLES = {"mean_field": "mean-field Gaussian", "full_rank": "full-rank Gaussian"}


def measure(cells: Sequence[str], peers: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Seconds of whole fits, tracing and compiling included.

    Args:
      cells: names out of `CELLS`.
      peers: names out of `PEERS` that are installed.
      rounds: turns of each side.
    """
    return {
        "rounds": rounds,
        "steps": STEPS,
        "batch": BATCH,
        "cells": [measure_guide(cell, peers, rounds) for cell in cells],
    }


def measure_guide(cell: str, peers: Sequence[str], rounds: int) -> dict[str, Any]:
    """One row of the table: see `measure`."""
    guide = CELLS[cell]
    makers = {"ours": make_fit} | {
        peer: importlib.import_module(f"experiments.benchmark.peers.{peer}_inference").make_fit
        for peer in peers
    }
    fits = {side: make(guide, STEPS, BATCH, LEARNING_RATE) for side, make in makers.items()}
    bounds: dict[str, float] = {}

    def turn(side: str) -> float:
        jax.clear_caches()
        began = time.perf_counter()
        losses = fits[side](jax.random.key(0))
        seconds = time.perf_counter() - began
        bounds[side] = -statistics.fmean(losses[-len(losses) // 10 :])
        return seconds

    turns = {side: lambda side=side: turn(side) for side in fits}
    seconds = round_robin(turns, rounds, warm_up=False)
    result = {
        "cell": cell,
        **guide._asdict(),
        "sides": {side: {"seconds": seconds[side], "elbo": bounds[side]} for side in fits},
    }
    if others := [side for side in fits if side != "ours"]:
        result["over_best_peer"] = seconds["ours"] / min(seconds[side] for side in others)
    say(f"{cell}: {result}")
    return result


def make_fit(guide: Guide, steps: int, batch: int, learning_rate: float) -> Fit:
    """Our side: see `experiments.benchmark.peers`."""
    # The other suites do without numpyro.
    from experiments.posteriors.models import problems
    from led_jax import interop

    problem = problems()["logistic regression"]

    def fit(key: jax.Array) -> Sequence[float]:
        posterior = interop.from_numpyro(key, problem.model, *problem.data)
        shape = (posterior.size,)
        flow = {
            "mean_field": flows.actnorm(),
            "full_rank": flows.chain(flows.lu(shape), flows.actnorm()),
            "iaf": flows.iaf(shape, guide.depth, guide.hidden),
        }[guide.kind]
        density = densities.transformed(densities.standard_normal(shape), flow)
        init_key, fit_key = jax.random.split(key)
        params = jax.jit(density.init)(init_key, jnp.zeros(shape))
        found = variational.to_log_density(
            density,
            params,
            fit_key,
            posterior.log_density,
            num_steps=steps,
            batch_size=batch,
            optimizer=optax.adam(learning_rate),
        )
        return found.losses.tolist()

    return fit


def to_markdown(result: dict[str, Any]) -> str:
    """The suite's table."""
    sides = ("ours", *PEERS)

    def side(cell: dict[str, Any], name: str) -> str:
        measured = cell["sides"].get(name)
        return f"{measured['seconds']:.1f} s ({measured['elbo']:.2f})" if measured else "-"

    rows = [
        (
            TITLES.get(cell["cell"], f"{cell['depth']} x IAF of {cell['hidden']}"),
            *(side(cell, name) for name in sides),
            f"{cell['over_best_peer']:.2f}" if "over_best_peer" in cell else "-",
        )
        for cell in result["cells"]
    ]
    return "\n\n".join(
        [
            "## Variational inference",
            f"{result['steps']:,} steps of Adam on the reverse KL divergence, {result['batch']} "
            "samples each, for a logistic regression of 31 entries: seconds of the whole fit, "
            "tracing and compiling included (and the mean bound of its last tenth); ours over the "
            "best peer's.",
            markdown_table(("density", *sides, "ratio"), rows),
        ]
    )
