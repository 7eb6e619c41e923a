r"""Fits autoregressive flows of a uniform density to known densities, by both KL divergences.

    python -m experiments.figures.universality --workdir=DIR [--fast]

Proposition 1 of Huang et al. (2017) says that such flows come arbitrarily close to any density, and
that affine ones are limited. Writes universality.json and universality.png. The last line on
standard output is the JSON object.
"""

import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from experiments import plots
from experiments.figures import targets
from experiments.figures.launch import define_flags, launch
from experiments.figures.targets import Target
from led_jax import densities, flows, variational
from led_jax.densities import Density
from led_jax.flows import Transformer

SUITES = {
    2: (
        targets.ring(),
        targets.two_moons(),
        targets.separated_mixture(),
        targets.spiral(),
        targets.funnel(2),
        targets.checkerboard(),
    ),
    8: (targets.random_mixture(8), targets.funnel(8)),
}
"""The targets by their number of dimensions."""

DIRECTIONS = ("forward", "reverse")
TRANSFORMERS = ("affine", "rational_quadratic", "deep_sigmoid")


class Capacity(NamedTuple):
    """Layers, the hidden widths of each, and the bins or units of its transformer."""

    depth: int
    hidden: tuple[int, ...]
    num_bins: int


NUM_STEPS = 4000
LEARNING_RATES = {"forward": 1e-2, "reverse": 5e-3}
BATCH_SIZES = {"forward": 256, "reverse": 512}  # The reverse divergence has noisier gradients.
ANNEALED = 0.3  # Share of the steps that anneal, with the reverse divergence.
RESTARTS = {"forward": 1, "reverse": 2}  # With the reverse divergence some fits miss a mode.
TRAINING_ROWS, TEST_ROWS = 200_000, 20_000
CAPACITIES = (Capacity(1, (16,), 4), Capacity(1, (32, 32), 8), Capacity(2, (64, 64), 16))


class Cell(NamedTuple):
    """Flows of one kind, one fitted to each target of a suite."""

    event_size: int
    direction: str
    transformer: str
    capacity: Capacity

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of the suite."""
        return SUITES[self.event_size]

    @property
    def density(self) -> Density:
        """The flow-transformed uniform density of one target."""
        size, (depth, hidden, num_bins) = self.event_size, self.capacity
        transformers: dict[str, Transformer] = {
            "affine": flows.affine,
            "rational_quadratic": flows.spline(num_bins),
            "deep_sigmoid": flows.sigmoid_mixture(num_bins),
        }
        flow = flows.iaf((size,), depth, hidden, transformer=transformers[self.transformer])
        if self.direction == "forward":  # It needs scores; the reverse divergence needs samples.
            flow = flows.invert(flow)
        return densities.transformed(
            densities.uniform((size,)), flows.chain(flows.invert(flows.probit()), flow)
        )


# One loop fits all flows of a cell. In arrays `[..., flows, D]` the flows of the first restart, one
# for each target, come first, then those of the next restart. The loss is the sum of the flows'
# losses, and Adam treats every parameter by itself, so each flow is fitted as if it were alone.


def log_prob(density: Density, params: Any, x: Array) -> Array:
    """Each flow's log-density at its own points x `[..., flows, D]`."""
    return jax.vmap(density.log_prob, (0, -2), -1)(params, x)


def sample_and_log_prob(
    density: Density, params: Any, key: Array, sample_shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Samples `[..., flows, D]` of each flow and their log-densities `[..., flows]`."""
    keys = jax.random.split(key, len(jax.tree.leaves(params)[0]))
    return jax.vmap(
        lambda params, key: density.sample_and_log_prob(params, key, sample_shape),
        out_axes=(-2, -1),
    )(params, keys)


def target_log_prob(targets: Sequence[Target], x: Array) -> Array:
    """Each target's log-density at its own points x `[..., restarts * targets, D]`."""
    points = x.reshape(*x.shape[:-2], -1, len(targets), x.shape[-1])
    log_probs = jnp.stack([t.log_prob(points[..., i, :]) for i, t in enumerate(targets)], -1)
    return log_probs.reshape(x.shape[:-1])


def target_samples(targets: Sequence[Target], key: Array, n: int) -> Array:
    """Samples `[n, targets, D]`."""
    keys = jax.random.split(key, len(targets))
    return jnp.stack([t.sample(k, n) for t, k in zip(targets, keys, strict=True)], -2)


def fit_cell(cell: Cell, key: Array, samples: Array, num_steps: int) -> Any:
    """Fits the flows of a cell to samples of the targets, or to their log-densities.

    Returns:
      Parameters of the best flow for each target, stacked along a first axis.
    """
    restarts, density = RESTARTS[cell.direction], cell.density
    init_key, fit_key, choice_key = jax.random.split(key, 3)
    keys = jax.random.split(init_key, restarts * len(cell.targets))
    params = jax.jit(jax.vmap(density.init, (0, None)))(keys, jnp.zeros(cell.event_size))

    def joint_sample(params: Any, key: Array, sample_shape: tuple[int, ...] = (), context=None):
        x, log_probs = sample_and_log_prob(density, params, key, sample_shape)
        return x, log_probs.sum(-1)

    joint = Density(
        density.init,
        lambda params, x, context=None: log_prob(density, params, x).sum(-1),
        joint_sample,
    )
    options = {
        "num_steps": num_steps,
        "batch_size": BATCH_SIZES[cell.direction],
        "learning_rate": LEARNING_RATES[cell.direction],
    }
    if cell.direction == "forward":
        return variational.to_samples(
            joint, params, fit_key, samples, valid_fraction=0.0, **options
        ).params
    params = variational.to_log_density(
        joint,
        params,
        fit_key,
        lambda x: target_log_prob(cell.targets, x).sum(-1),
        annealing_steps=round(ANNEALED * num_steps),
        **options,
    ).params
    # For each target the flow with the smallest loss, which needs no sample of the target.
    log_ratios = jax.jit(partial(reverse_log_ratios, density, cell.targets))(params, choice_key)
    losses = log_ratios.mean(0)
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)  # argmin would choose NaN.
    best = losses.reshape(restarts, -1).argmin(0) * len(cell.targets) + np.arange(len(cell.targets))
    return jax.tree.map(lambda leaf: leaf[best], params)


def reverse_log_ratios(
    density: Density, targets: tuple[Target, ...], params: Any, key: Array
) -> Array:
    """log q(x) - log p(x), `[TEST_ROWS, flows]`, at samples x of the flows."""
    x, log_probs = sample_and_log_prob(density, params, key, (TEST_ROWS,))
    return log_probs - target_log_prob(targets, x)


def divergences(
    cell: Cell, params: Any, key: Array, samples: Array
) -> tuple[np.ndarray, np.ndarray]:
    """KL(p || q), or KL(q || p), of every target with its standard error, on fresh samples."""

    @jax.jit
    def log_ratios(params: Any, key: Array) -> Array:
        if cell.direction == "forward":
            return target_log_prob(cell.targets, samples) - log_prob(cell.density, params, samples)
        return reverse_log_ratios(cell.density, cell.targets, params, key)

    terms = np.asarray(log_ratios(params, key), np.float64)
    return terms.mean(0), terms.std(0, ddof=1) / len(terms) ** 0.5


def picture(cell: Cell, params: Any, grid: np.ndarray) -> np.ndarray:
    """The densities of a cell's flows on a grid `[H, W, 2]`, as `[targets, H, W]`."""
    points = jnp.broadcast_to(grid[..., None, :], (*grid.shape[:2], len(cell.targets), 2))
    log_probs = jax.jit(lambda params, x: log_prob(cell.density, params, x))(params, points)
    return np.moveaxis(np.exp(log_probs), -1, 0)


def run(fast: bool, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Fits every cell (`fast`: the smallest in 2-D), draws the figure and returns the numbers."""
    capacities, num_steps = (CAPACITIES[:1], 100) if fast else (CAPACITIES, NUM_STEPS)
    suites = {2: SUITES[2]} if fast else SUITES
    axis = np.linspace(-3.5, 3.5, 120, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    pictures = {"target": np.stack([np.exp(t.log_prob(jnp.asarray(grid))) for t in SUITES[2]])}
    cells = [
        Cell(event_size, direction, transformer, capacity)
        for event_size in suites
        for transformer in TRANSFORMERS
        for direction in DIRECTIONS
        for capacity in capacities
    ]
    key = jax.random.key(seed)
    samples = {
        size: jax.jit(target_samples, static_argnums=(0, 2))(
            suite, jax.random.fold_in(key, size), TRAINING_ROWS + TEST_ROWS
        )
        for size, suite in suites.items()
    }
    records = []
    for i, cell in enumerate(tqdm.tqdm(cells, unit="cell")):
        fit_key, test_key = jax.random.split(jax.random.fold_in(key, 100 + i))
        training, test = jnp.split(samples[cell.event_size], [TRAINING_ROWS])
        params = fit_cell(cell, fit_key, training, num_steps)
        kls, errors = divergences(cell, params, test_key, test)
        for target, kl, error in zip(cell.targets, kls, errors, strict=True):
            records.append(
                {
                    "target": f"{target.name}, {cell.event_size}-D",
                    "direction": cell.direction,
                    "transformer": cell.transformer,
                    **cell.capacity._asdict(),
                    "num_params": sum(leaf[0].size for leaf in jax.tree.leaves(params)),
                    "kl": float(kl),
                    "kl_se": float(error),
                }
            )
        is_largest = cell.event_size == 2 and cell.capacity == capacities[-1]
        if is_largest and cell.direction == "forward":
            pictures[cell.transformer] = picture(cell, params, grid)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        label = f"{record['transformer']}, {record['direction']}"
        curve = curves.setdefault(record["target"], {}).setdefault(label, [])
        curve.append((record["kl"], record["kl_se"]))
    plots.fits(workdir / "universality.png", pictures, curves)
    return {
        "largest_kl": {  # Of the flows of the largest capacity.
            target: {label: curve[-1][0] for label, curve in labels.items()}
            for target, labels in curves.items()
        },
        "fits": records,
        "num_steps": num_steps,
        "batch_sizes": BATCH_SIZES,
        "learning_rates": LEARNING_RATES,
        "annealed_share": ANNEALED,
        "restarts": RESTARTS,
    }


if __name__ == "__main__":
    define_flags()
    launch("figures.universality", "universality", run)
