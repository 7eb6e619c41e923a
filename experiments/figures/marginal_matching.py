r"""Splits the KL of trained runs into mutual information and the prior's distance from q(z).

    python -m experiments.figures.marginal_matching --runs=DIR,DIR --workdir=DIR [--fast]

E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z)), of which Huang et al. (2017), eq. 4, minimise
the second term by learning the prior; q(z) is the aggregated posterior over the whole training
split. Also computes KL(q(z) || N(m, S)) for the mean m and the covariance S of q(z), the least KL
of any normal prior with the same encoder. Writes marginal_matching.json, and marginal_matching.png:
these terms against L_prior, and images decoded from z ~ p(z) beside images decoded from z ~ q(z).
The last line on standard output is the JSON object.
"""

import dataclasses
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from jax import Array

from experiments import plots
from experiments.config import FLOWS
from experiments.figures.launch import define_flags, launch
from experiments.flags import to_command
from experiments.run import load_run, read_result
from experiments.workdir import read_config
from led_jax import LED, Elbo, data, estimators
from led_jax.encoders import Encoding

NUM_COVARIANCE_DRAWS = 50
NUM_IMAGES = 8


def run(
    runs: list[pathlib.Path], data_dir: str, num_samples: int, seed: int, workdir: pathlib.Path
) -> dict[str, Any]:
    """Measures finished runs and draws the figure.

    Args:
      runs: their directories.
      data_dir: where the data are; empty: where each run found them.
      num_samples: draws of a training row and its z.
      seed: of the draws.
      workdir: directory to write to.

    Returns:
      "runs": each run's numbers in nats, in the order given; and "num_samples".

    Raises:
      ValueError: if there are no runs, a directory holds no finished one, or its data are binarized
        afresh.
    """
    if not runs:
        raise ValueError("--runs must name the directory of at least one finished run")
    results, images = [], []
    for directory in runs:
        result, decoded = measure(directory, data_dir, num_samples, jax.random.key(seed))
        results.append(result)
        images.append(decoded)
    depths = [result["prior_depth"] for result in results]
    terms = {
        label: ([r[name] for r in results], [r.get(f"{name}_se", 0.0) for r in results])
        for label, name in (
            ("I(x; z)", "mutual_information"),
            ("KL(q(z) || p(z))", "marginal_kl"),
            ("KL(q(z) || N(m, S))", "marginal_kl_of_best_normal"),
        )
    }
    from_prior, from_posterior = (np.stack(half) for half in zip(*images, strict=True))
    samples = {"decoded from p(z)": from_prior, "decoded from q(z)": from_posterior}
    plots.marginal_matching(workdir / "marginal_matching.png", depths, terms, samples)
    return {"num_samples": num_samples, "runs": results}


def measure(
    directory: pathlib.Path, data_dir: str, num_samples: int, key: Array
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """One run's numbers, and images `[NUM_IMAGES, H, W]` decoded from p(z) and from q(z)."""
    config = read_config(directory)
    trained = config and read_result(config, directory)
    if config is None or trained is None:
        raise ValueError(f"{directory} holds no finished run; train one with --workdir first")
    task, best = load_run(
        dataclasses.replace(config, data_dir=data_dir or config.data_dir), directory
    )
    led, dataset = task.led, task.dataset
    if dataset.prepare is not data.cast:
        raise ValueError(
            f"{directory}: rows binarized afresh for every step have no aggregated posterior; "
            "train with --binarize=static"
        )
    if dataset.context is not None:
        raise ValueError(f"{directory}: the aggregated posterior of p(x|c) depends on c")
    draw_key, image_key, bound_key, covariance_key = jax.random.split(key, 4)
    with tqdm.tqdm(total=num_samples, unit="draw", desc=f"L_prior {config.prior_depth}") as bar:
        terms = estimators.marginal_matching(
            led, best.eval_params, draw_key, dataset.train, num_samples, progress=bar.update
        )
    rows = jnp.asarray(dataset.train)
    bound = bound_of_all(led, best.eval_params, bound_key, rows)
    log_posterior = float(bound.log_posterior)
    if config.posterior in FLOWS and not config.posterior_depth:
        covariance, log_posterior = moments(
            estimators.encode_all(led, best.eval_params, rows.astype(jnp.float32))
        )
    else:  # With one draw a row, the entropy would be too low by about D (D + 1) / 4N nats.
        draws = map(
            partial(jax.jit(led.encode), best.eval_params, x=rows.astype(jnp.float32)),
            jax.random.split(covariance_key, NUM_COVARIANCE_DRAWS),
        )
        covariance = np.mean([np.cov(np.asarray(z).reshape(len(rows), -1).T) for z in draws], 0)
    normal_entropy = np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 2
    averages = {}
    for name in ("kl", "mutual_information", "marginal_kl", "log_likelihood"):
        values = np.asarray(getattr(terms, name), np.float64)
        averages[name] = values.mean()
        averages[f"{name}_se"] = values.std() / math.sqrt(num_samples)
    result = {
        "dataset": config.dataset,
        "prior_depth": config.prior_depth,
        "posterior_depth": config.posterior_depth,
        **averages,
        # E[log q(z)] - E[log N(z; m, S)]; the latter is minus the entropy of the normal, which has
        # the moments of q(z).
        "marginal_kl_of_best_normal": log_posterior
        - averages["mutual_information"]
        + normal_entropy,
        "log_num_rows": math.log(len(dataset.train)),
        # An estimate from another draw of z for every row, to check "kl".
        "kl_all_rows": float(bound.log_posterior - bound.log_prior),
        "train_elbo": float(bound.bound),
        "test_elbo": trained["test_elbo"],
        "test_nll": trained["nll"],
        "test_nll_se": trained["nll_se"],
        "test_inference_gap": -trained["test_elbo"] - trained["nll"],
        "run": to_command(config),
    }
    shown = rows[:: len(rows) // NUM_IMAGES][:NUM_IMAGES].astype(jnp.float32)
    decoded = decode(led, best.eval_params, image_key, shown)
    first, second = (np.asarray(half).reshape(-1, *dataset.image_shape) for half in decoded)
    return result, (first, second)


def moments(encoding: Encoding) -> tuple[np.ndarray, float]:
    """The covariance of a mixture of normals q(z|x), and E[log q(z|x)] in nats: both exactly."""
    mean, log_std = (
        np.asarray(leaf, np.float64).reshape(len(leaf), -1)
        for leaf in (encoding.mean, encoding.log_std)
    )
    covariance = np.diag(np.exp(2 * log_std).mean(0)) + np.cov(mean.T, ddof=0)
    entropy = log_std.sum(1) + mean.shape[1] * np.log(2 * np.pi * np.e) / 2
    return covariance, -float(entropy.mean())


@partial(jax.jit, static_argnums=0)
def bound_of_all(led: LED, params: Any, key: Array, rows: Array) -> Elbo:
    """The means over all rows of the bound's terms, with one draw of z for each row."""

    def terms(number: Array, row: Array) -> Elbo:
        return led.elbo(params, jax.random.fold_in(key, number), row.astype(jnp.float32))

    numbers = jnp.arange(len(rows))
    of_rows = jax.lax.map(lambda args: terms(*args), (numbers, rows), batch_size=1000)
    return jax.tree.map(jnp.mean, of_rows)


def decode(led: LED, params: Any, key: Array, rows: Array) -> tuple[Array, Array]:
    """The decoder's means at z ~ p(z), and at z ~ q(z|x) for the rows x: as many of each."""
    prior_key, posterior_key = jax.random.split(key)
    z, _ = led.prior_sample_and_log_prob(params, prior_key, (len(rows),))
    return led.decode(params, z), led.reconstruct(params, posterior_key, rows)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_list("runs", [], "Directories of finished runs of experiments.train.")
    flags.DEFINE_string("data_dir", "", "Where the data are, if no longer where they were.")
    launch(
        "figures.marginal_matching",
        "marginal_matching",
        lambda fast, seed, workdir: run(
            [pathlib.Path(path).expanduser() for path in flags.FLAGS.runs],
            flags.FLAGS.data_dir,
            1000 if fast else 10_000,
            seed,
            workdir,
        ),
    )
