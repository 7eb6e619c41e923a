r"""Figure 2: a LED fitted to a mixture of Gaussians, once with a learned prior, once with N(0, I).

    python -m experiments.figures.mixture --workdir=DIR [--fast]

Data and latent space are planes, so every density is computed on a grid: the exact NLL under the
data's density, and KL(q(z) || p(z)) of the aggregated posterior over all training rows. Writes
figure2.png (six panels for each model, clockwise from its top left: those of Huang et al. (2017),
and last the data's density), figure2_training.png (the model's density over training) and
figure2.json. The last line on standard output is that JSON object.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import plots
from experiments.figures import plane
from experiments.figures.launch import define_flags, launch
from experiments.figures.plane import Grid
from experiments.plots import Panel
from led_jax import LED, Density, Flow, densities, estimators
from led_jax.flows import real_nvp

NUM_ROWS = 5000


class Setting(NamedTuple):
    """Epochs of training, epochs of the snapshots, and cells along a side of each grid."""

    epochs: int
    snapshots: tuple[int, ...]
    data_cells: int
    latent_cells: int


FULL = Setting(400, (1, 3, 10, 30, 100, 400), 80, 240)
FAST = Setting(60, (1, 3, 10, 60), 50, 120)


def run(setting: Setting, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Fits both models and draws the figures; returns the numbers."""
    data, data_params = plane.mixture()
    data_key, test_key, fit_key, nll_key = jax.random.split(jax.random.key(seed), 4)
    rows, _ = data.sample_and_log_prob(data_params, data_key, (NUM_ROWS,))
    test, _ = data.sample_and_log_prob(data_params, test_key, (2000,))
    grid = plane.square(plane.RADIUS + 6 * plane.STD, setting.data_cells)
    log_data = data.log_prob(data_params, grid.points)
    entropy = -grid.integrate(jnp.exp(log_data) * log_data)

    models, maps, strips = {}, [], []
    for name, depth in (("learned", plane.PRIOR_DEPTH), ("fixed", 0)):
        prior = real_nvp((2,), depth, hidden=(64,))
        led = plane.build_led(prior)
        optimizer = plane.make_optimizer(NUM_ROWS, setting.epochs)
        params, history, strip = None, [], []
        for progress in plane.train(led, optimizer, rows, fit_key, setting.epochs, f"{name} prior"):
            params, epoch = progress.params, progress.epoch
            if epoch in setting.snapshots:
                nll, density = score(led, params, rows, log_data, grid, setting)
                history.append({"epoch": epoch, "nll": nll})
                title = f"{name} prior, epoch {epoch}:\n{nll:.2f} nats"
                strip.append(Panel(title, density, grid.extent))
        numbers, panels = match(led, prior, params, rows, setting, name)
        estimate = estimators.nll(led, params, nll_key, test, 1000, batch_size=100)
        models[name] = {
            "nll": history[-1]["nll"],
            "kl_data_model": history[-1]["nll"] - entropy,
            **numbers,
            "sampled_nll": estimate.nll,
            "sampled_nll_se": estimate.standard_error,
            "sampled_elbo": estimate.elbo,
            "history": history,
        }
        truth = Panel("data: p_D(x)", grid.image(jnp.exp(log_data)), grid.extent)
        model = strip[-1]._replace(title=f"{name} prior: p(x)")
        maps.append((panels[:3], [truth, model, panels[3]]))
        strips.append(strip)

    plots.density_maps(
        workdir / "figure2.png", [left + right for left, right in zip(*maps, strict=True)]
    )
    plots.density_maps(workdir / "figure2_training.png", strips)
    return {"entropy": entropy, **models}


def score(
    led: LED, params: Any, rows: Array, log_data: Array, grid: Grid, setting: Setting
) -> tuple[float, np.ndarray]:
    """The NLL under the data's density, and p(x) as an image, both by quadrature."""
    latent = plane.latent_grid(led, params, rows, setting.latent_cells)
    log_model = plane.log_marginal(led, params, grid.points, latent)
    return -grid.integrate(jnp.exp(log_data) * log_model), grid.image(jnp.exp(log_model))


def match(
    led: LED, prior: Flow, params: Any, rows: Array, setting: Setting, name: str
) -> tuple[dict[str, Any], list[Panel]]:
    """Compares the aggregated posterior and the prior by quadrature, in z and in z0 = h^-1(z).

    Returns:
      KL(q(z) || p(z)), the KL in z0, which has the same value, and the integrals of q(z), p(z) and
      q(z0) over their grids; and the panels E[q(z|x)], E[q(z0|x)], p(z0), p(z).
    """
    encoding = estimators.encode_all(led, params, rows)
    grid = plane.latent_grid(led, params, rows, setting.latent_cells)
    log_q = estimators.aggregated_posterior_log_prob(led, params, grid.points, encoding)
    log_p = led.prior_log_prob(params, grid.points)
    base_grid = plane.square(5.0, setting.latent_cells)
    # z = h(z0) of the grid's points z0, with log p(z) = log p(z0) - log|det dh/dz0|.
    at_points = led._replace(prior=densities.transformed(_draws(base_grid.points), prior))
    z, log_pz = at_points.prior_sample_and_log_prob(params, jax.random.key(0))
    log_p0 = densities.normal_log_prob(base_grid.points).sum(-1)
    log_q0 = estimators.aggregated_posterior_log_prob(led, params, z, encoding) + log_p0 - log_pz
    q, p, q0, p0 = map(jnp.exp, (log_q, log_p, log_q0, log_p0))
    numbers = {
        "marginal_kl": grid.integrate(q * (log_q - log_p)),
        "marginal_kl_in_base_space": base_grid.integrate(q0 * (log_q0 - log_p0)),
        "mass_on_grid": {
            "q(z)": grid.integrate(q),
            "p(z)": grid.integrate(p),
            "q(z0)": base_grid.integrate(q0),
        },
    }
    panels = [
        Panel(f"{name} prior: {title}", where.image(density), where.extent)
        for title, where, density in (
            ("E[q(z|x)]", grid, q),
            ("E[q(z0|x)]", base_grid, q0),
            ("p(z0)", base_grid, p0),
            ("p(z)", grid, p),
        )
    ]
    return numbers, panels


def _draws(points: Array) -> Density:
    """N(0, I), whose `sample_and_log_prob` always returns these points `[n, 2]`."""
    normal = densities.standard_normal((2,))

    def sample_and_log_prob(params: Any, key: Array, sample_shape=(), context=None):
        return points, normal.log_prob(params, points)

    return normal._replace(sample_and_log_prob=sample_and_log_prob)


if __name__ == "__main__":
    define_flags()
    launch("figures.mixture", "figure2", lambda fast, *args: run(FAST if fast else FULL, *args))
