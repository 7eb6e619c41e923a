r"""Held-out log-likelihoods of flows and of simpler densities on scikit-learn's tables of numbers.

    python -m experiments.figures.tabular --workdir=DIR [--fast]

Compares a Gaussian, a Gaussian mixture and a kernel density with two kinds of flows. In each fold,
all are scored on rows that they were not fitted to. Writes tabular.json and tabular.png. The last
line on standard output is the JSON object.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from sklearn import datasets
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold, train_test_split
from sklearn.neighbors import KernelDensity

from experiments import plots
from experiments.figures.launch import define_flags, launch
from led_jax import densities, flows, variational

LOADERS: dict[str, Callable[..., Any]] = {
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "diabetes": datasets.load_diabetes,
    "digits": datasets.load_digits,
}

FEWEST_VALUES = 10
"""Columns with fewer values than these are left out: they have no density."""

Score = Callable[[np.ndarray], np.ndarray]
"""Log-densities `[n]` of rows `[n, D]`, in nats."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
GAUSSIANS = [GaussianMixture(1, reg_covar=ridge) for ridge in RIDGES]
MIXTURES = [
    GaussianMixture(size, covariance_type=kind, reg_covar=ridge, random_state=0)
    for size in (2, 3, 5, 10, 20)
    for kind in ("full", "diag")
    for ridge in (1e-3, 1e-2, 1e-1)
]
KERNELS = [KernelDensity(bandwidth=width) for width in np.geomspace(0.1, 2.0, 14)]
# A wider bound of scales fails on rows far from others: with e^3 one scored 100 nats too low.
TRANSFORMERS = {"affine flows": flows.scaled(0.5), "spline flows": flows.spline(8)}
DEPTH, HIDDEN = 4, (64, 64)
MEMBERS = 3  # Of an equal mixture; each holds out rows of its own for early stopping.
OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-2)
BATCH_SIZE, PATIENCE = 64, 20


def tables(seed: int) -> dict[str, np.ndarray]:
    """The tables by name, `[n, D]`, every column in units of its standard deviation.

    Grey levels 0..16 of the digits become continuous by uniform noise of one level.
    """
    found = {name: load(return_X_y=True)[0] for name, load in LOADERS.items()}
    found["digits"] = found["digits"] + np.random.default_rng(seed).uniform(size=(1797, 64))
    kept = {
        name: rows[:, [len(np.unique(column)) >= FEWEST_VALUES for column in rows.T]]
        for name, rows in found.items()
    }
    return {name: rows / rows.std(0) for name, rows in kept.items()}


def choose(candidates: Sequence[Any], train: np.ndarray, seed: int) -> Any:
    """The scikit-learn estimator with the best score on a held-out tenth, refitted to all rows."""
    most, held_out = train_test_split(train, test_size=0.1, random_state=seed)
    scores = [candidate.fit(most).score(held_out) for candidate in candidates]
    return candidates[int(np.argmax(scores))].fit(train)


def whiten(gaussian: Any) -> tuple[Score, float]:
    """The map under which a fitted Gaussian is the standard normal, and its log-determinant."""
    mean, root = gaussian.means_[0], gaussian.precisions_cholesky_[0]
    return lambda x: (x - mean) @ root, float(np.log(np.diag(root)).sum())


def fit_flow(
    transformer: flows.Transformer, train: np.ndarray, key: jax.Array, steps: int
) -> Score:
    """Fits an equal mixture of flows to whitened rows, and returns its log-density.

    The flows are the identity at first, so that the density starts as the whitening Gaussian.
    """
    size = train.shape[1]
    flow = flows.iaf((size,), DEPTH, HIDDEN, transformer=transformer)
    density = densities.transformed(densities.standard_normal((size,)), flows.invert(flow))
    log_prob, members = jax.jit(density.log_prob), []
    for init_key, fit_key in jax.random.split(key, (MEMBERS, 2)):
        start = density.init(init_key, jnp.zeros((1, size)))
        fit = variational.to_samples(
            density,
            start,
            fit_key,
            train.astype(np.float32),
            num_steps=steps,
            batch_size=BATCH_SIZE,
            patience=PATIENCE,
            optimizer=OPTIMIZER,
        )
        members.append(fit.params)

    def score(x: np.ndarray) -> np.ndarray:
        of_members = [np.asarray(log_prob(params, x.astype(np.float32))) for params in members]
        return np.logaddexp.reduce(of_members, dtype=np.float64) - math.log(MEMBERS)

    return score


def fit_all(train: np.ndarray, key: jax.Array, seed: int, steps: int) -> dict[str, Score]:
    """Every density, fitted to the rows of a fold."""
    gaussian = choose(GAUSSIANS, train, seed)
    whitened, log_det = whiten(gaussian)

    def of_rows(score: Score) -> Score:
        return lambda x: score(whitened(x)) + log_det

    kernels = choose(KERNELS, whitened(train), seed)
    scores = {
        "Gaussian": gaussian.score_samples,
        "Gaussian mixture": choose(MIXTURES, train, seed).score_samples,
        "kernel density": of_rows(kernels.score_samples),
    }
    for i, (name, transformer) in enumerate(TRANSFORMERS.items()):
        fitted = fit_flow(transformer, whitened(train), jax.random.fold_in(key, i), steps)
        scores[name] = of_rows(fitted)
    return scores


def run(fast: bool, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores every row of every table when it is held out (`fast`: only wine, in two folds)."""
    num_folds, steps = (2, 20) if fast else (5, 5000)
    found = {name: rows for name, rows in tables(seed).items() if not fast or name == "wine"}
    progress = tqdm.tqdm(total=num_folds * len(found), unit="fold")
    records, curves = [], {}
    for name, rows in found.items():
        rows = np.random.default_rng(seed).permutation(rows)
        rows = rows[: len(rows) // num_folds * num_folds]  # Folds of one size share programs.
        held_out: dict[str, list[np.ndarray]] = {}
        for fold, (train, test) in enumerate(KFold(num_folds).split(rows)):
            key = jax.random.fold_in(jax.random.key(seed), fold)
            for model, score in fit_all(rows[train], key, seed, steps).items():
                held_out.setdefault(model, []).append(score(rows[test]))
            progress.update()
        scores = {model: np.concatenate(parts) for model, parts in held_out.items()}
        for model, score in scores.items():
            gain = score - scores["Gaussian"]
            record = {
                "table": name,
                "model": model,
                "rows": len(rows),
                "columns": rows.shape[1],
                "log_prob": float(score.mean()),
                "log_prob_se": float(score.std() / len(score) ** 0.5),
                "gain": float(gain.mean()),
                "gain_se": float(gain.std() / len(gain) ** 0.5),
            }
            records.append(record)
            progress.write(f"{name}, {model}: {record['log_prob']:.2f} nats a row", sys.stderr)
            if model != "Gaussian":
                points = curves.setdefault(model, {})
                points[f"{name}\n{len(rows)} x {rows.shape[1]}"] = record["gain"], record["gain_se"]
    progress.close()
    plots.gains(workdir / "tabular.png", curves, "held-out nats a row above the Gaussian")
    settings = {"depth": DEPTH, "hidden": HIDDEN, "members": MEMBERS, "patience": PATIENCE}
    return {"scores": records, "folds": num_folds, "steps": steps, **settings}


if __name__ == "__main__":
    define_flags()
    launch("figures.tabular", "tabular", run)
