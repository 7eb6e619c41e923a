"""A LED in which all is linear and Gaussian, so that every expectation has a closed form.

z ~ N(m, diag(t^2)), x | z ~ N(W'z + b, s^2 I), and q(z|x) = N(A(x), diag(v^2)) with A affine. The
rows of W are orthogonal, so that the exact posterior is such a q. Both flows are affine maps with a
log-determinant, the encoder is one dense layer.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from led_jax import LED, decoders, densities, encoders, flows, likelihoods

W = np.array([[1.0, 0.5, -0.5], [0.3, -0.9, -0.3]])
B = np.array([0.2, -0.4, 1.0])
S = 0.7
M, T = np.array([0.5, -1.0]), np.array([1.2, 0.8])
# Of the posterior's flow, z = (z' + C) e^D.
C, D = np.array([0.3, -0.2]), np.array([0.4, -0.7])

LED_MODEL = LED(
    encoders.gaussian_encoder(nn.Dense(4), 2),
    flows.actnorm(),
    densities.transformed(densities.standard_normal((2,)), flows.actnorm()),
    decoders.decoder(likelihoods.gaussian(S), nn.Dense(3)),
)


class Truth:
    """Parameters and closed forms; `shift` and `spread` take q away from the exact posterior."""

    def __init__(self, shift=0.0, spread=1.0):
        precision = 1 / T**2 + (W**2).sum(1) / S**2
        kernel = W.T / S**2 / precision
        self.exact_std = precision**-0.5
        self.exact_mean = lambda x: (M / T**2) / precision + (x - B) @ kernel
        self.std = spread * self.exact_std
        self.mean = lambda x: self.exact_mean(x) + shift
        before_flow = {
            "kernel": np.concatenate([kernel * np.exp(-D), np.zeros((3, 2))], 1),
            "bias": np.concatenate([self.mean(np.zeros(3)) * np.exp(-D) - C, np.log(self.std) - D]),
        }
        prior_flow = {"shift": M / T, "log_scale": np.log(T)}
        params = {
            "encoder": before_flow,
            "posterior": {"shift": C, "log_scale": D},
            "prior": {"base": (), "flow": prior_flow},
            "decoder": {"kernel": W, "bias": B},
        }
        self.params = {name: _to_jax(part) for name, part in params.items()}

    def log_marginal(self, x):
        return scipy.stats.multivariate_normal(MARGINAL_MEAN, MARGINAL_COV).logpdf(x)

    def terms(self, x):
        """E_q of log p(x|z), log p(z) and log q(z|x)."""
        mean, variance = self.mean(x), self.std**2
        spread = (variance * (W**2).sum(1)).sum()
        squares = ((x - B - mean @ W) ** 2).sum(-1) + spread
        log_likelihood = -1.5 * math.log(2 * math.pi * S**2) - squares / (2 * S**2)
        squares = ((mean - M) ** 2 + variance) / T**2
        log_prior = (-0.5 * math.log(2 * math.pi) - np.log(T) - squares / 2).sum(-1)
        log_posterior = (-0.5 * (1 + math.log(2 * math.pi)) - np.log(self.std)).sum()
        return log_likelihood, log_prior, np.full(x.shape[:-1], log_posterior)

    def elbo(self, x):
        log_likelihood, log_prior, log_posterior = self.terms(x)
        return log_likelihood + log_prior - log_posterior


MARGINAL_MEAN = M @ W + B
MARGINAL_COV = W.T @ np.diag(T**2) @ W + S**2 * np.eye(3)


def data(n, seed=0):
    """Rows of p(x)."""
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(MARGINAL_MEAN, MARGINAL_COV, n)


def _to_jax(tree):
    if isinstance(tree, dict):
        return {name: _to_jax(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return tree
    return jax.device_put(np.asarray(tree, jnp.result_type(float)))
