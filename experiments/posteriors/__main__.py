r"""Flows beside simpler densities, and beside NUTS, on a dozen posteriors of numpyro models.

    python -m experiments.posteriors --workdir=DIR [--fast]

Every density is fitted to the model's log-density by its reverse KL divergence; means and standard
deviations of the unconstrained entries are compared with those of long NUTS runs. Where NUTS moves
badly in the model as it is written, those are of the same model in other coordinates, and NUTS has
rows of its own: in the model as it is, and in the base space of the affine flows fitted to it
(NeuTra). Writes inference.json, inference.md and inference.png. The last line on standard output is
the JSON object.
"""

import json
import math
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import tqdm
from jax import Array
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from experiments import plots, provenance
from experiments.figures.launch import define_flags, launch
from experiments.posteriors.models import Problem, problems
from experiments.workdir import write_json
from led_jax import densities, flows, interop, variational
from led_jax.densities import Density
from led_jax.flows import Flow

HIDDEN = (64, 64)
BATCH_SIZE, LEARNING_RATE = 256, 3e-3
CHAINS, ACCEPT = 4, 0.9
BLOCK = 1000
NEUTRA_FLOW = "affine flows"


def _stack(transformer: flows.Transformer) -> Callable[[int], Flow]:
    """A layer of the transformer, and five affine ones, which no bound keeps from any place."""

    def make(size: int) -> Flow:
        first = flows.iaf((size,), 1, HIDDEN, transformer=transformer)
        others = flows.iaf((size,), 5, HIDDEN)
        return flows.chain(first, flows.reverse(), others, flows.reverse(), flows.actnorm())

    return make


FLOWS: dict[str, Callable[[int], Flow]] = {
    "mean-field Gaussian": lambda size: flows.actnorm(),
    "full-rank Gaussian": lambda size: flows.chain(flows.lu((size,)), flows.actnorm()),
    NEUTRA_FLOW: _stack(flows.affine),
    "spline flows": _stack(flows.spline(8)),
    "mixture flows": _stack(flows.sigmoid_mixture(8)),
}
"""From the number of entries to the flow between a standard normal and them."""


class Scale(NamedTuple):
    """How much is done.

    Attributes:
      steps: of each fit.
      samples: of each fitted density.
      warmup: of each chain of NUTS.
      draws: of each chain of NUTS.
    """

    steps: int
    samples: int
    warmup: int
    draws: int


FULL, FAST = Scale(20_000, 50_000, 1000, 10_000), Scale(20, 1000, 50, 50)


class Moments(NamedTuple):
    """Means and standard deviations of all entries, `[D]`."""

    mean: np.ndarray
    std: np.ndarray

    def error(self, reference: "Moments") -> float:
        """The largest difference of a mean or deviation, in units of the reference's deviation."""
        differences = np.abs(np.subtract(self, reference)) / reference.std
        return float(differences.max())


def moments(x: np.ndarray, log_weights: np.ndarray | float = 0.0) -> Moments:
    """Those of samples `[n, D]`, weighted or not."""
    x = np.asarray(x, np.float64)
    weights = np.exp(np.broadcast_to(log_weights - np.max(log_weights), len(x)))
    mean = np.average(x, 0, weights)
    return Moments(mean, np.sqrt(np.average((x - mean) ** 2, 0, weights)))


class Chains(NamedTuple):
    """What NUTS gives.

    Attributes:
      x: `[chains, draws, D]`.
      seconds: of warm-up and draws, without compiling.
    """

    x: np.ndarray
    seconds: float

    def record(self, reference: Moments) -> dict[str, float]:
        """Its error, and the smallest effective sample size and largest R-hat of all entries."""
        size = float(np.min(effective_sample_size(self.x)))
        return {
            "error": moments(self.x.reshape(-1, self.x.shape[-1])).error(reference),
            "size": size,
            "r_hat": float(np.max(split_gelman_rubin(self.x))),
            "seconds": self.seconds,
            "size_a_second": size / self.seconds,
        }


def nuts(
    log_density: Callable[[Array], Array], event_size: int, key: Array, scale: Scale
) -> Chains:
    """Chains of NUTS under a log-density on R^event_size, from near zero."""
    seconds = []

    def one_after_another(chain: Any) -> Any:
        # numpyro's own sequential chains compile anew for each of them.
        def run(starts: Any) -> Any:
            compiled = jax.jit(lambda starts: jax.lax.map(chain, starts)).lower(starts).compile()
            began = time.perf_counter()
            result = jax.block_until_ready(compiled(starts))
            seconds.append(time.perf_counter() - began)
            return result

        return run

    mcmc = MCMC(
        NUTS(potential_fn=lambda x: -log_density(x), target_accept_prob=ACCEPT),
        num_warmup=scale.warmup,
        num_samples=scale.draws,
        num_chains=CHAINS,
        chain_method=one_after_another,  # pyright: ignore[reportArgumentType]
        progress_bar=False,
    )
    start_key, key = jax.random.split(key)
    mcmc.run(key, init_params=0.1 * jax.random.normal(start_key, (CHAINS, event_size)))
    return Chains(np.asarray(mcmc.get_samples(group_by_chain=True)), *seconds)


def weighted_samples(
    density: Density, params: Any, key: Array, posterior: interop.Posterior, num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples `[n, D]` of a density, and the logarithms of their importance weights `[n]`."""

    def block(key: Array) -> tuple[Array, Array]:
        x, log_q = density.sample_and_log_prob(params, key, (BLOCK,))
        return x, posterior.log_density(x) - log_q

    keys = jax.random.split(key, num_samples // BLOCK)
    x, log_weights = jax.jit(lambda keys: jax.lax.map(block, keys))(keys)
    return np.asarray(x.reshape(-1, posterior.size)), np.asarray(log_weights.ravel())


def fit(
    flow: Flow, posterior: interop.Posterior, reference: Moments, key: Array, scale: Scale
) -> tuple[Any, dict[str, float]]:
    """Parameters of a flow fitted to a posterior, and what the fit is worth."""
    init_key, fit_key, sample_key = jax.random.split(key, 3)
    density = densities.transformed(densities.standard_normal((posterior.size,)), flow)
    params = jax.jit(density.init)(init_key, jnp.zeros(posterior.size))
    began = time.perf_counter()
    fitted = variational.to_log_density(
        density,
        params,
        fit_key,
        posterior.log_density,
        num_steps=scale.steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    seconds = time.perf_counter() - began
    x, log_weights = weighted_samples(density, fitted.params, sample_key, posterior, scale.samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a Pareto k above 0.7: it is on record.
        evidence = variational.evidence_from(log_weights)
    record = {
        "error": moments(x).error(reference),
        "weighted_error": moments(x, log_weights).error(reference),
        **evidence._asdict(),
        "pareto_k": None if math.isinf(evidence.pareto_k) else evidence.pareto_k,
        "seconds": seconds,
    }
    return fitted.params["flow"], record


def measure(problem: Problem, key: Array, scale: Scale) -> dict[str, Any]:
    """Every density, fitted to a posterior, and NUTS in other coordinates where those are given."""
    posterior = interop.from_numpyro(key, problem.model, *problem.data)
    easier = interop.from_numpyro(key, problem.easier_model, *problem.data)
    key, nuts_key, plain_key, neutra_key = jax.random.split(key, 4)
    chains = nuts(easier.log_density, easier.size, nuts_key, scale)
    if problem.easier:
        to_entries = jax.jit(lambda x: posterior.unconstrain(easier.constrain(x)))
        chains = chains._replace(x=np.asarray(to_entries(chains.x)))
    reference = moments(chains.x.reshape(-1, posterior.size))
    fits, params = {}, {}
    for i, (name, make) in enumerate(FLOWS.items()):
        flow_key = jax.random.fold_in(key, i)
        params[name], fits[name] = fit(make(posterior.size), posterior, reference, flow_key, scale)
    record: dict[str, Any] = {
        "size": posterior.size,
        "reference": chains.record(reference),
        "fits": fits,
    }
    if problem.easier:
        flow = FLOWS[NEUTRA_FLOW](posterior.size)

        def pulled_back(u: Array) -> Array:
            x, log_det = flow.apply(params[NEUTRA_FLOW], u)
            return posterior.log_density(x) + log_det

        plain = nuts(posterior.log_density, posterior.size, plain_key, scale)
        neutra = nuts(pulled_back, posterior.size, neutra_key, scale)
        to_entries = jax.jit(lambda u: flow.apply(params[NEUTRA_FLOW], u)[0])
        neutra = neutra._replace(x=np.asarray(to_entries(neutra.x)))
        record["chains"] = {
            "NUTS as written": plain.record(reference),
            "NUTS in the flow's base space": neutra.record(reference),
        }
    return record


def _k(record: dict[str, Any]) -> float:
    """The Pareto k of a fit; JSON has no infinity."""
    return math.inf if record["pareto_k"] is None else record["pareto_k"]


def to_markdown(result: dict[str, Any]) -> str:
    """The numbers as two tables, of the fits and of NUTS."""
    lines = [
        "| posterior | entries | density | error | weighted | ELBO | log Z | Pareto k | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in result["posteriors"].items():
        for density, r in record["fits"].items():
            lines.append(
                f"| {name} | {record['size']} | {density} | {r['error']:.3f} "
                f"| {r['weighted_error']:.3f} | {r['elbo']:.3f} "
                f"| {r['log_z']:.3f} +- {r['standard_error']:.3f} "
                f"| {_k(r):.2f} | {r['seconds']:.0f} |"
            )
    lines += [
        "",
        "| posterior | NUTS | error | effective samples | R-hat | seconds | effective a second |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in result["posteriors"].items():
        for chains, r in {"reference": record["reference"], **record.get("chains", {})}.items():
            lines.append(
                f"| {name} | {chains} | {r['error']:.3f} | {r['size']:,.0f} | {r['r_hat']:.4f} "
                f"| {r['seconds']:.1f} | {r['size_a_second']:,.0f} |"
            )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        "Error: the largest one of the means and standard deviations of all unconstrained entries, "
        "in units of the reference's standard deviation, of the fitted density itself and with its "
        "importance weights. Effective samples are those of the worst entry. Seconds: a fit's with "
        "compiling, those of NUTS without.",
        "",
        f"`{result['command']}`; {result['hardware']}; {versions}, numpyro {result['numpyro']}; "
        f"{result['date']}.",
    ]
    return "\n".join(lines) + "\n"


def run(fast: bool, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures every posterior (`fast`: the centred schools alone) and draws the errors.

    Each is written down once it is done; an equal run of a clean commit does not repeat it.
    """
    found = problems()
    if fast:
        found = dict(list(found.items())[:1])
    key, records = jax.random.key(seed), {}
    scale = FAST if fast else FULL
    commit = provenance.commit()
    is_known = commit is not None and not commit.endswith("+dirty")  # Else the code may differ.
    identity = {"seed": seed, "commit": commit, **scale._asdict()}
    progress = tqdm.tqdm(found.items(), unit="posterior")
    for i, (name, problem) in enumerate(progress):
        progress.set_postfix_str(name)
        path = workdir / f"{name.replace(' ', '_')}.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        if not is_known or done.get("identity") != identity:
            record = measure(problem, jax.random.fold_in(key, i), scale)
            done = {"identity": identity, "record": record}
            write_json(path, done)
        records[name] = done["record"]
        errors = {model: f"{r['error']:.3f}" for model, r in records[name]["fits"].items()}
        progress.write(f"{name}: errors {errors}", sys.stderr)
    draw(records, workdir / "inference.png")
    return {"posteriors": records, **scale._asdict(), "numpyro": numpyro.__version__}


def draw(records: dict[str, Any], path: pathlib.Path) -> None:
    """Weighted errors of all densities, and errors of NUTS where it has a row.

    Points are hollow where the Pareto k is 0.7 or more, or the R-hat 1.01 or more.
    """
    points = {
        name: {
            **{m: (r["weighted_error"], _k(r) < 0.7) for m, r in record["fits"].items()},
            **{m: (r["error"], r["r_hat"] < 1.01) for m, r in record.get("chains", {}).items()},
        }
        for name, record in records.items()
    }
    label = (
        "largest error of a mean or deviation, in standard deviations; hollow: k or R-hat is high"
    )
    plots.errors(path, points, label, 0.1)


if __name__ == "__main__":
    define_flags()
    launch("posteriors", "inference", run, to_markdown)
