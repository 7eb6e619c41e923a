"""Densities to fit: normalised log-densities in closed form, with exact samplers."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from led_jax import densities
from led_jax.densities import normal_log_prob
from led_jax.numerics import log_sigmoid


class Target(NamedTuple):
    """A density with a known integral of 1.

    Attributes:
      name: what a figure calls it.
      event_size: number D of dimensions.
      log_prob: `[..., D] -> [...]`, in nats.
      sample: `(key, n) -> [n, D]`.
    """

    name: str
    event_size: int
    log_prob: Callable[[Array], Array]
    sample: Callable[[Array, int], Array]


def gaussian_mixture(name: str, centres: np.ndarray, scale: float) -> Target:
    """Equal shares of N(centre, scale^2 I), for centres `[K, D]`."""
    count, event_size = centres.shape
    density = densities.mixture_of_normals((event_size,), count)
    params = {
        "logits": np.zeros(count, np.float32),
        "mean": centres.astype(np.float32),
        "log_std": np.full((count, event_size), math.log(scale), np.float32),
    }

    def log_prob(x: Array) -> Array:
        return density.log_prob(params, x)

    def sample(key: Array, n: int) -> Array:
        return density.sample_and_log_prob(jax.tree.map(jnp.asarray, params), key, (n,))[0]

    return Target(name, event_size, log_prob, sample)


def ring() -> Target:
    """A ring of radius 2."""
    angle = 2 * np.pi * np.arange(64) / 64
    return gaussian_mixture("ring", 2 * np.stack([np.cos(angle), np.sin(angle)], -1), 0.3)


def two_moons() -> Target:
    """Two half circles that reach into each other."""
    angle = np.pi * (np.arange(32) + 0.5) / 32
    moon = 1.5 * np.stack([np.cos(angle), np.sin(angle)], -1)
    centre = np.array([0.75, 0.3])
    return gaussian_mixture("two moons", np.concatenate([moon - centre, centre - moon]), 0.3)


def spiral() -> Target:
    """Two arms, three quarters of a turn each."""
    angle = 1.5 * np.pi * np.sqrt((np.arange(48) + 0.5) / 48)
    arm = (angle / 1.7)[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return gaussian_mixture("spiral", np.concatenate([arm, -arm]), 0.3)


def separated_mixture() -> Target:
    """Six Gaussians on a circle, their centres five standard deviations apart."""
    angle = 2 * np.pi * np.arange(6) / 6
    return gaussian_mixture("mixture", 2 * np.stack([np.cos(angle), np.sin(angle)], -1), 0.4)


def checkerboard(edge: float = 0.02) -> Target:
    """Uniform on eight of the sixteen squares of [-2, 2]^2, edges blurred by logistic noise."""
    corners = np.array([(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0])
    lows = corners.astype(np.float32)

    def log_prob(x: Array) -> Array:
        # sigmoid(u) - sigmoid(u - 1 / edge), the density of uniform plus logistic noise.
        u = (x[..., None, :] - lows) / edge
        sides = log_sigmoid(u) + log_sigmoid(1 / edge - u) + math.log1p(-math.exp(-1 / edge))
        return jax.nn.logsumexp(sides.sum(-1), -1) - math.log(len(corners))

    def sample(key: Array, n: int) -> Array:
        keys = jax.random.split(key, 3)
        corner = jnp.asarray(lows)[jax.random.randint(keys[0], (n,), 0, len(corners))]
        inside = jax.random.uniform(keys[1], (n, 2))
        return corner + inside + edge * jax.random.logistic(keys[2], (n, 2))

    return Target("checkerboard", 2, log_prob, sample)


def funnel(event_size: int) -> Target:
    """A narrower form of Neal's funnel: x_1 ~ N(0, 1), and x_i ~ N(0, e^x_1 / 4) for the others.

    Neal (2003), section 8, https://doi.org/10.1214/aos/1056562461.
    """

    def log_prob(x: Array) -> Array:
        first, rest = x[..., :1], x[..., 1:]
        log_scale = first / 2 - math.log(2)
        log_probs = normal_log_prob(rest * jnp.exp(-log_scale)) - log_scale
        return normal_log_prob(first[..., 0]) + log_probs.sum(-1)

    def sample(key: Array, n: int) -> Array:
        x = jax.random.normal(key, (n, event_size))
        return x.at[:, 1:].multiply(jnp.exp(x[:, :1] / 2) / 2)

    return Target("funnel", event_size, log_prob, sample)


def random_mixture(event_size: int) -> Target:
    """Eight Gaussians with centres drawn from a normal distribution."""
    centres = 1.5 * np.random.default_rng(0).normal(size=(8, event_size))
    return gaussian_mixture("mixture", centres, 0.6)
