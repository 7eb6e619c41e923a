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

from led_jax import LED, Density, Flow, densities, flows, networks, objectives, training
from led_jax.training import TrainState

NUM_MODES, RADIUS, STD = 4, 2.0, 0.3
"""Of the mixture of Gaussians."""

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

    def integrate(self, values: Array) -> float:
        """The integral of a function over the square, from its values `[size * size]`."""
        return float(values.sum() * self.area)

    def image(self, values: Array) -> np.ndarray:
        """The values `[size * size]` as `[size, size]`, from the bottom row to the top one."""
        size = round(len(self.points) ** 0.5)
        return np.asarray(values).reshape(size, size)


def square(radius: float, size: int, center: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """The grid over center + [-radius, radius]^2, of size x size cells."""
    step = 2 * radius / size
    ticks = (jnp.arange(size) + 0.5) * step - radius
    points = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2) + jnp.asarray(center)
    left, bottom = (c - radius for c in center)
    return Grid(points, step**2, (left, left + 2 * radius, bottom, bottom + 2 * radius))


@partial(jax.jit, static_argnums=0)
def log_marginal(led: LED, params: Any, x: Array, grid: Grid) -> Array:
    """log p(x) = log of the integral of p(x|z) p(z) over the plane, `[n]` for x `[n, *x_shape]`."""
    log_prior = led.prior.log_prob(params["prior"], grid.points)

    def log_integral(x: Array) -> Array:
        log_likelihood = led.decoder.log_prob(params["decoder"], grid.points, x)
        return jax.nn.logsumexp(log_likelihood + log_prior)

    # The decoder does not depend on x: it runs once for each batch.
    return jax.lax.map(log_integral, x, batch_size=32) + jnp.log(grid.area)


@partial(jax.jit, static_argnums=0)
def posterior_gap(led: LED, params: Any, x: Array, grid: Grid) -> Array:
    """KL(q(z|x) || p(z|x)) over the plane, `[n]` in nats for x `[n, *x_shape]`."""
    log_prior = led.prior.log_prob(params["prior"], grid.points)

    def gap(x: Array) -> Array:
        log_joint = led.decoder.log_prob(params["decoder"], grid.points, x) + log_prior
        log_posterior = log_joint - jax.nn.logsumexp(log_joint) - jnp.log(grid.area)
        encoding = led.encoder.apply(params["encoder"], x)
        log_q = led.posterior_log_prob(params, grid.points, encoding)
        return (jnp.exp(log_q) * (log_q - log_posterior)).sum() * grid.area

    return jax.lax.map(gap, x, batch_size=32)


def latent_grid(led: LED, params: Any, rows: Array, cells: int) -> Grid:
    """A grid that holds N(0, I) and the aggregated posterior."""
    mean, log_std, _ = objectives.encode_all(led, params, rows)
    radius = float((jnp.abs(mean) + 5 * jnp.exp(log_std)).max())
    return square(max(5.0, radius), cells)


def mixture() -> Density:
    """Equal Gaussians of standard deviation `STD` on a circle."""
    angle = 2 * np.pi * np.arange(NUM_MODES) / NUM_MODES
    means = jnp.asarray(RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)

    def log_prob(params: Any, x: Array) -> Array:
        deviations = (x[..., None, :] - means) / STD
        log_modes = (densities.normal_log_prob(deviations) - np.log(STD)).sum(-1)
        return jax.nn.logsumexp(log_modes, -1) - np.log(NUM_MODES)

    def sample_and_log_prob(params: Any, key: Array, sample_shape: tuple[int, ...] = ()):
        mode_key, noise_key = jax.random.split(key)
        mode = jax.random.randint(mode_key, sample_shape, 0, NUM_MODES)
        x = means[mode] + STD * jax.random.normal(noise_key, (*sample_shape, 2))
        return x, log_prob(params, x)

    return Density(lambda key, x: (), log_prob, sample_and_log_prob)


def build_led(prior: Flow) -> LED:
    """A LED of points in the plane, with a latent plane and a Gaussian posterior."""
    return LED(
        encoder=networks.mlp_encoder(2, (64, 64)),
        posterior=flows.chain(),
        prior=densities.transformed(densities.standard_normal((2,)), prior),
        # Noise of a mode's width: a model that puts a point on each mode would be exact.
        decoder=networks.gaussian_decoder(networks.MLP((64, 64, 2)), STD),
    )


def make_optimizer(num_rows: int, epochs: int) -> optax.GradientTransformation:
    """Adam whose rate decays to zero over the epochs."""
    return training.adam(LEARNING_RATE, epochs * (num_rows // BATCH_SIZE))


def train(
    led: LED,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rows: Array,
    epochs: int,
    name: str,
) -> Iterator[TrainState]:
    """Yields the state after each epoch; the next epoch consumes it."""
    train_epoch = training.make_epoch(led, optimizer, BATCH_SIZE)
    with tqdm.tqdm(total=epochs, unit="epoch", desc=name) as bar:
        for _ in range(epochs):
            state, steps = train_epoch(state, rows)
            bar.set_postfix(elbo=f"{float(steps.mean().bound):.3f}", refresh=False)
            bar.update()
            yield state
