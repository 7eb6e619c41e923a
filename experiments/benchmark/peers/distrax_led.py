"""LED in distrax, flax and optax, with one jitted step a batch: the peer `distrax`.

Real NVP layers are `distrax.MaskedCoupling`, so that a conditioner reads the whole masked vector
and emits parameters for every entry. distrax has no MADE: the posterior is Gaussian.
"""

from collections.abc import Callable
from functools import partial

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.benchmark.peers import HIDDEN, PIXELS
from experiments.config import Config
from led_jax.flows import masks

_HE_NORMAL = nn.initializers.he_normal()


def make_epochs(config: Config, data: np.ndarray) -> dict[str, Callable[[], float]]:
    """See `experiments.benchmark.peers`."""
    model = DistraxLED(config.latent_size, config.prior_depth, config.prior_hidden)
    optimizer = optax.adam(config.learning_rate)
    key = jax.random.key(0)
    params = jax.jit(model.init)(key, jnp.zeros((config.batch_size, PIXELS)), key)
    state = (params, optimizer.init(params), key)
    rng = np.random.default_rng(0)
    num_steps = len(data) // config.batch_size

    @partial(jax.jit, donate_argnums=0)
    def step(state, x: Array):
        params, opt_state, key = state
        key, sample_key = jax.random.split(key)

        def loss_fn(params):
            terms = model.apply(params, x.astype(jnp.float32), sample_key)
            return minus_bound(terms), terms

        gradient, terms = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), terms

    def epoch() -> float:
        nonlocal state
        steps = []
        order = rng.permutation(len(data))[: num_steps * config.batch_size]
        for batch in order.reshape(num_steps, config.batch_size):
            state, terms = step(state, data[batch])
            steps.append(terms)
        return float(minus_bound(np.mean(jax.device_get(steps), 0)))

    return {"jit": epoch}


def minus_bound(terms):
    """The loss for the terms that `DistraxLED` returns."""
    log_likelihood, log_prior, log_posterior = terms
    return log_posterior - log_prior - log_likelihood


class DistraxLED(nn.Module):
    """Gaussian posterior, Real NVP prior; a call gives the batch means of the bound's terms."""

    latent_dim: int
    prior_depth: int
    prior_hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array, key: Array) -> tuple[Array, Array, Array]:
        """Returns log p(x|z), log p(z) and log q(z|x), scalars, for x `[n, 784]`."""
        encoding = mlp((*HIDDEN, 2 * self.latent_dim))(x)
        mean, log_std = jnp.split(encoding, 2, -1)
        posterior = distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
        z, log_posterior = posterior.sample_and_log_prob(seed=key)
        logits = mlp((*HIDDEN, PIXELS))(z)
        likelihood = distrax.Independent(distrax.Bernoulli(logits=logits), 1)
        terms = likelihood.log_prob(x), self._prior().log_prob(z), log_posterior
        return jax.tree.map(jnp.mean, terms)

    def _prior(self) -> distrax.Distribution:
        conditioner = partial(mlp, (*self.prior_hidden, 2 * self.latent_dim), nn.initializers.zeros)
        return coupling_density(self.latent_dim, self.prior_depth, conditioner, affine)


def coupling_density(
    size: int,
    depth: int,
    conditioner: Callable[[], Callable],
    transformer: Callable[[Array], distrax.Bijector],
) -> distrax.Distribution:
    """A standard normal transformed by coupling layers with the masks of our Real NVP."""
    base = distrax.MultivariateNormalDiag(jnp.zeros(size), jnp.ones(size))
    layers = []
    for i in range(depth):
        mask = masks.random_half((size,), i // 2)
        layers.append(distrax.MaskedCoupling(mask ^ bool(i % 2), conditioner(), transformer))
    # A chain applies its last bijector first.
    return distrax.Transformed(base, distrax.Chain(layers[::-1])) if layers else base


def affine(raw: Array) -> distrax.Bijector:
    """y = x e^s + t, with s = 3 tanh(r / 3) as ours, for raw `[..., 2 D]` that holds t and r."""
    shift, log_scale = jnp.split(raw, 2, -1)
    return distrax.ScalarAffine(shift, log_scale=3 * jnp.tanh(log_scale / 3))


def mlp(widths: tuple[int, ...], last_init: Callable = _HE_NORMAL) -> nn.Sequential:
    """Dense layers with ReLU between them."""
    layers: list[Callable] = []
    for width in widths[:-1]:
        layers += [nn.Dense(width, kernel_init=_HE_NORMAL), nn.relu]
    return nn.Sequential([*layers, nn.Dense(widths[-1], kernel_init=last_init)])
