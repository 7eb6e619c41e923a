import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from experiments.figures import targets, universality
from experiments.figures.universality import Capacity, Cell
from led_jax import variational

TINY = Capacity(1, (4,), 3)
LINE = targets.gaussian_mixture("one", np.array([[1.0, -0.5]]), 0.8)
PAIR = targets.gaussian_mixture("two", np.array([[1.0, 1.0], [-1.0, -1.0]]), 0.6)

target_samples = jax.jit(universality.target_samples, static_argnums=(0, 2))

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(universality, "SUITES", {2: (LINE, PAIR)})
    monkeypatch.setattr(universality, "TRAINING_ROWS", 2000)
    monkeypatch.setattr(universality, "TEST_ROWS", 1000)
    monkeypatch.setattr(universality, "CAPACITIES", (TINY,))


@pytest.mark.slow
@pytest.mark.parametrize("direction", universality.DIRECTIONS)
def test_divergences_of_known_flows(monkeypatch, direction):
    """A fresh affine flow is N(0, I): both KL divergences to a normal target are known."""
    monkeypatch.setattr(universality, "SUITES", {2: (LINE,)})
    monkeypatch.setattr(universality, "TEST_ROWS", 20_000)
    cell = Cell(2, direction, "affine", TINY)
    init = jax.jit(jax.vmap(cell.density.init, (0, None)))
    params = init(jax.random.split(KEY, 1), np.zeros(2, np.float32))
    test = target_samples(cell.targets, jax.random.key(3), 20_000)
    kls, errors = universality.divergences(cell, params, jax.random.key(4), test)
    square, variance = 1.25, 0.64
    if direction == "forward":
        expected = variance - 1 - np.log(variance) + square / 2
    else:
        expected = (1 + square / 2) / variance - 1 + np.log(variance)
    assert errors[0] < 0.03
    assert abs(kls[0] - expected) < 4 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("direction", universality.DIRECTIONS)
def test_side_by_side_a_flow_is_fitted_as_if_alone(monkeypatch, direction):
    monkeypatch.setattr(universality, "RESTARTS", {"forward": 1, "reverse": 1})
    together = Cell(2, direction, "affine", TINY)
    samples = target_samples(together.targets, jax.random.key(3), 500)
    both = universality.fit_cell(together, KEY, samples, 60)
    monkeypatch.setattr(universality, "SUITES", {2: (LINE,)})
    alone = universality.fit_cell(Cell(2, direction, "affine", TINY), KEY, samples[:, :1], 60)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert a.size == 0 or np.abs(a[1] - b[0]).max() > 1e-3


@pytest.mark.slow
def test_of_the_restarts_the_best_is_kept(monkeypatch):
    # Flows 0 and 2 fit one target, 1 and 3 the other.
    shift = np.array([np.nan, 0.0, 0.0, 3.0])
    fitted = []

    def spoil_two(density, params, *args, **kwargs):
        def move(leaf):
            return leaf + shift.reshape(-1, *[1] * (leaf.ndim - 1))

        assert kwargs["annealing_steps"] == 3 and kwargs["learning_rate"] == 5e-3
        fitted.append(jax.tree.map(move, params))
        return variational.Fit(fitted[0], np.zeros(1), np.zeros(0))

    monkeypatch.setattr(universality.variational, "to_log_density", spoil_two)
    kept = universality.fit_cell(Cell(2, "reverse", "affine", TINY), KEY, jnp.zeros((1, 2, 2)), 10)
    expected = jax.tree.map(lambda leaf: leaf[np.array([2, 1])], fitted[0])
    jax.tree.map(np.testing.assert_array_equal, kept, expected)


@pytest.mark.slow
def test_a_run_writes_numbers_and_a_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(universality, "TRANSFORMERS", ("affine", "rational_quadratic"))
    monkeypatch.setattr(universality, "SUITES", {2: (LINE, PAIR), 8: (targets.funnel(8),)})
    result = universality.run(True, 0, tmp_path)
    assert (tmp_path / "universality.png").stat().st_size > 1000
    assert json.loads(json.dumps(result)) is not None
    assert len(result["fits"]) == 2 * 2 * 2  # A fast run leaves out 8 dimensions.
    for record in result["fits"]:
        assert record["kl_se"] > 0 and np.isfinite(record["kl"])
        kl = result["largest_kl"][record["target"]]
        assert kl[f"{record['transformer']}, {record['direction']}"] == record["kl"]
    # An untrained flow has a KL of 0.71, which a hundred steps lower.
    assert result["largest_kl"]["one, 2-D"]["affine, forward"] < 0.5
