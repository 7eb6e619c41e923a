import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal

from experiments.posteriors.models import problems
from led_jax import interop

pytestmark = pytest.mark.usefixtures("fast_compile")

PROBLEMS = problems()
IN_OTHER_COORDINATES = [name for name, problem in PROBLEMS.items() if problem.easier]


def posterior_of(name, model="model"):
    problem = PROBLEMS[name]
    return interop.from_numpyro(KEY, getattr(problem, model), *problem.data)


def test_there_are_a_dozen_and_some_in_other_coordinates():
    assert len(PROBLEMS) >= 12 and len(IN_OTHER_COORDINATES) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gaussian process", "stochastic volatility", "GARCH", "mixture"])
def test_log_densities_and_gradients_are_finite(name):
    posterior = posterior_of(name)

    @jax.jit
    @jax.value_and_grad
    def total(x):
        return posterior.log_density(x).sum()

    value, gradient = total(normal((2000, posterior.size)))  # As many as in a fit's first steps.
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.all(np.any(gradient, 0))  # No entry that the density ignores.


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_OTHER_COORDINATES)
def test_other_coordinates_are_those_of_the_same_posterior(name):
    posterior, easier = posterior_of(name), posterior_of(name, "easier_model")

    def to_entries(u):
        return posterior.unconstrain(easier.constrain(u))

    @jax.jit
    @jax.vmap
    def both(u):
        _, log_det = jnp.linalg.slogdet(jax.jacfwd(to_entries)(u))
        return easier.log_density(u), posterior.log_density(to_entries(u)) + log_det

    np.testing.assert_allclose(*both(0.5 * normal((6, easier.size))), rtol=1e-4)


def test_the_funnel_and_the_banana_are_those_of_their_formulas():
    x = normal((7, 10))
    v, rest = x[:, 0], x[:, 1:]  # Sites in the order of their names: "log_variance", "x".
    expected = scipy.stats.norm.logpdf(v, 0, 1.5)
    expected = expected + scipy.stats.norm.logpdf(rest, 0, np.exp(v / 2)[:, None]).sum(1)
    np.testing.assert_allclose(posterior_of("funnel").log_density(x), expected, rtol=1e-5)
    x = normal((7, 2)) * np.float32([10, 1])
    expected = scipy.stats.norm.logpdf(x[:, 0], 0, 10)
    expected = expected + scipy.stats.norm.logpdf(x[:, 1], 0.03 * (x[:, 0] ** 2 - 100))
    np.testing.assert_allclose(posterior_of("banana").log_density(x), expected, rtol=1e-4)
