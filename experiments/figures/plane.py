"""LEDs whose latent space is a plane: data for them, their training, and quadrature.

Integrals over a plane are sums over the midpoints of small cells.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax import Array

from led_jax import (
    LED,
    Flow,
    decoders,
    densities,
    encoders,
    estimators,
    flows,
    likelihoods,
    training,
)
from led_jax.data import Dataset
from led_jax.densities import Density
from led_jax.networks import MLP
from led_jax.training import Progress

NUM_MODES, RADIUS, STD = 4, 2.0, 0.3
"""The number of Gaussians in the mixture, the radius of their circle and their deviation."""

PRIOR_DEPTH = 8
BATCH_SIZE = 100
LEARNING_RATE = 2e-3


class Grid(NamedTuple):
    """The midpoints of size x size cells of a square.

    Attributes:
      points: `[size * size, 2]`, row by row; the first coordinate runs along a row.
      area: of one cell.
      extent: (left, right, bottom, top).
    """

    points: Array
    area: Array | float
    extent: tuple[float, float, float, float]

    def integrate(self, values: Array | np.ndarray) -> float:
        """The integral of a function over the square, from its values `[size * size]`."""
        return float(values.sum() * self.area)

    def image(self, values: Array | np.ndarray) -> np.ndarray:
        """The values `[size * size]` as `[size, size]`, from the bottom row to the top one."""
        size = round(len(self.points) ** 0.5)
        return np.asarray(values).reshape(size, size)


def square(radius: float, size: int, center: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """The grid over center + [-radius, radius]^2, of size x size cells."""
    step = 2 * radius / size
    ticks = (np.arange(size) + 0.5) * step - radius
    points = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2) + center
    left, bottom = (c - radius for c in center)
    points = jax.device_put(points.astype(jnp.result_type(float)))
    return Grid(points, step**2, (left, left + 2 * radius, bottom, bottom + 2 * radius))


@partial(jax.jit, static_argnums=0)
def log_marginal(led: LED, params: Any, x: Array, grid: Grid) -> Array:
    """log p(x) = log of the integral of p(x|z) p(z) over the plane, `[n]` for x `[n, *x_shape]`."""
    log_prior = led.prior_log_prob(params, grid.points)

    def log_integral(x: Array) -> Array:
        log_likelihood = led.log_likelihood(params, grid.points, x)
        return jax.nn.logsumexp(log_likelihood + log_prior)

    # The decoder does not depend on x: it runs once for each batch.
    return jax.lax.map(log_integral, x, batch_size=32) + jnp.log(grid.area)


@partial(jax.jit, static_argnums=0)
def posterior_gap(led: LED, params: Any, x: Array, grid: Grid) -> Array:
    """KL(q(z|x) || p(z|x)) over the plane, `[n]` in nats for x `[n, *x_shape]`."""
    log_prior = led.prior_log_prob(params, grid.points)

    def gap(x: Array) -> Array:
        log_joint = led.log_likelihood(params, grid.points, x) + log_prior
        log_posterior = log_joint - jax.nn.logsumexp(log_joint) - jnp.log(grid.area)
        encoding = led.encoding(params, x)
        log_q = led.posterior_log_prob(params, grid.points, encoding)
        return (jnp.exp(log_q) * (log_q - log_posterior)).sum() * grid.area

    return jax.lax.map(gap, x, batch_size=32)


def latent_grid(led: LED, params: Any, rows: Array, cells: int) -> Grid:
    """A grid that is wide enough for N(0, I) and for the aggregated posterior."""
    mean, log_std, _ = estimators.encode_all(led, params, rows)
    radius = float((jnp.abs(mean) + 5 * jnp.exp(log_std)).max())
    return square(max(5.0, radius), cells)


def mixture() -> tuple[Density, Any]:
    """Equal Gaussians of standard deviation `STD` on a circle: a density and its parameters."""
    angle = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
    mean = jnp.asarray(RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)
    params = {
        "logits": jnp.zeros(NUM_MODES),
        "mean": mean,
        "log_std": jnp.full_like(mean, np.log(STD)),
    }
    return densities.mixture_of_normals((2,), NUM_MODES), params


def build_led(prior: Flow) -> LED:
    """A LED of points in the plane, with a latent plane and a Gaussian posterior."""
    return LED(
        encoder=encoders.mlp_encoder(2, (64, 64)),
        posterior=flows.chain(),
        prior=densities.transformed(densities.standard_normal((2,)), prior),
        # The noise has a mode's width: with means only at the centres, the model can be exact.
        decoder=decoders.decoder(likelihoods.gaussian(STD), MLP((64, 64, 2))),
    )


def make_optimizer(num_rows: int, epochs: int) -> optax.GradientTransformation:
    """Adam whose rate decays to zero over the epochs."""
    return training.adam(LEARNING_RATE, epochs * (num_rows // BATCH_SIZE))


def train(
    led: LED,
    optimizer: optax.GradientTransformation,
    rows: Array,
    key: Array,
    epochs: int,
    name: str,
    resume: Progress | None = None,
) -> Iterator[Progress]:
    """Trains on rows `[n, D]`, with a progress bar; yields `Progress` after each epoch."""
    train = np.asarray(rows)
    dataset = Dataset(name, (1, train.shape[1]), train, valid=train[:0], test=train[:0])
    with tqdm.tqdm(total=epochs, unit="epoch", desc=name) as bar:
        for progress in training.epochs(
            led,
            optimizer,
            dataset,
            key,
            batch_size=BATCH_SIZE,
            num_epochs=epochs,
            resume=resume,
        ):
            bar.set_postfix(elbo=f"{progress.train['elbo']:.3f}", refresh=False)
            bar.update()
            yield progress
