import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY
from support.linear_gaussian import LED_MODEL, Truth, data

from experiments.figures import plane
from led_jax import flows

pytestmark = pytest.mark.usefixtures("fast_compile")

OFF = {"shift": 0.3, "spread": 1.3}


def test_a_square_is_cut_into_cells():
    grid = plane.square(2.0, 4, center=(1.0, -1.0))
    assert grid.extent == (-1.0, 3.0, -3.0, 1.0)
    assert grid.integrate(jnp.ones(16)) == pytest.approx(16.0)
    x, y = grid.image(grid.points[:, 0]), grid.image(grid.points[:, 1])
    np.testing.assert_allclose(x, np.tile([-0.5, 0.5, 1.5, 2.5], (4, 1)))
    np.testing.assert_allclose(y, np.tile([-2.5, -1.5, -0.5, 0.5], (4, 1)).T)


def test_quadrature_of_the_marginal_and_of_the_gap(x64):
    truth, x = Truth(**OFF), data(40)
    grid = plane.square(9.0, 150)
    log_marginal = plane.log_marginal(LED_MODEL, truth.params, x, grid)
    np.testing.assert_allclose(log_marginal, truth.log_marginal(x), rtol=1e-6)
    gap = plane.posterior_gap(LED_MODEL, truth.params, x, grid)
    np.testing.assert_allclose(gap, truth.log_marginal(x) - truth.elbo(x), rtol=1e-6)
    gap = plane.posterior_gap(LED_MODEL, Truth().params, x, grid)
    np.testing.assert_allclose(gap, 0, atol=1e-6)


def test_the_latent_grid_holds_the_posteriors(x64):
    truth, x = Truth(**OFF), 20 * data(30)
    led = LED_MODEL._replace(posterior=flows.chain())
    encoder = truth.params["encoder"]
    grid = plane.latent_grid(led, truth.params, x, 10)
    out = x @ encoder["kernel"] + encoder["bias"]
    reach = np.abs(out[:, :2]) + 5 * np.exp(out[:, 2:])
    np.testing.assert_allclose(grid.extent[1], reach.max())
    narrow = {"encoder": {name: 0 * leaf - 0.1 for name, leaf in encoder.items()}}
    assert plane.latent_grid(led, narrow, 0 * x, 10).extent[1] == 5.0


def test_the_mixture_is_a_density_and_its_samples_fit_it():
    mixture, params = plane.mixture()
    grid = plane.square(5.0, 200)
    density = jnp.exp(mixture.log_prob(params, grid.points))
    assert grid.integrate(density) == pytest.approx(1, abs=1e-5)
    x, log_prob = mixture.sample_and_log_prob(params, KEY, (4000,))
    np.testing.assert_allclose(log_prob, mixture.log_prob(params, x), rtol=1e-6)
    # The mean square along an axis: half the squared radius, plus a mode's variance.
    second = plane.RADIUS**2 / 2 + plane.STD**2
    np.testing.assert_allclose(jnp.mean(x**2, 0), second, rtol=0.1)
    distance = jnp.abs(jnp.linalg.norm(x, axis=1) - plane.RADIUS) / plane.STD
    assert float((distance < 3).mean()) > 0.98
    quadrant = np.histogram(np.arctan2(*np.asarray(x).T[::-1]) % (2 * np.pi) // (np.pi / 2))[0]
    assert scipy.stats.chisquare(quadrant[quadrant > 0]).pvalue > 1e-4


def test_training_yields_every_epoch():
    led = plane.build_led(flows.chain())
    mixture, params = plane.mixture()
    rows, _ = mixture.sample_and_log_prob(params, KEY, (200,))
    optimizer = plane.make_optimizer(len(rows), 3)
    found = list(plane.train(led, optimizer, rows, KEY, 3, "test"))
    assert [progress.epoch for progress in found] == [1, 2, 3]
