"""The models and objectives that configurations describe."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY
from support.linear_gaussian import LED_MODEL, Truth, data

from experiments.config import Config
from experiments.models import build_led, make_objective, make_optimizer
from experiments.sweep import TABLES
from led_jax.data import Dataset

GOLDEN = Path(__file__).parents[1] / "golden" / "tables.json"


def models():
    """Name, configuration of each cell of the paper's tables."""
    for table in ("1", "2"):
        for column, cells in TABLES[table].items():
            for cell in cells:
                yield f"table {table}, {column}, depth {cell.depth}", cell.config


@pytest.fixture
def images():
    rows = np.zeros((8, 784), np.uint8)
    return Dataset("binarized_mnist", (28, 28), rows, rows, rows)


def test_parameters_are_those_of_the_golden_file(images):
    """A change makes saved runs unreadable; if intended, replace the file by the .json.new one."""
    found = {}
    for name, config in models():
        led = build_led(config, images)
        params = jax.eval_shape(led.init, KEY, jax.ShapeDtypeStruct((8, 784), jnp.float32))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        found[name] = {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
        }
    expected = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if found != expected:
        GOLDEN.with_suffix(".json.new").write_text(json.dumps(found, indent=1) + "\n")
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    assert not differing, f"if these are wanted, mv {GOLDEN}.new {GOLDEN}"


@pytest.mark.slow
@pytest.mark.parametrize("table", ["priors", "posteriors"])
def test_alternatives_can_be_trained_and_scored(table, images):
    """Each differs from the first in what its name says, and its step and its NLL can be traced."""
    x = jax.ShapeDtypeStruct((500, 784), jnp.float32)
    built = {}
    for name, (cell,) in TABLES[table].items():
        led, objective = build_led(cell.config, images), make_objective(cell.config, 100)
        built[name] = led, objective
        params = jax.eval_shape(led.init, KEY, x)
        own = jax.eval_shape(lambda *args: objective.init(KEY, led, *args), params, x)  # noqa: B023

        def step(params, own, x):
            return jax.grad(lambda *args: objective.loss(led, *args, KEY, x, 0)[0], (0, 1))(  # noqa: B023
                params, own
            )

        jax.eval_shape(step, params, own, x)
        bound = jax.eval_shape(lambda *args: led.elbo(args[0], KEY, args[1]).bound, params, x)  # noqa: B023
        assert bound.shape == (500,)
    assert len(set(built.values())) == len(built)
    part = table.removesuffix("s")
    (first, _), *others = built.values()
    for led, _ in others:
        assert led._replace(**{part: getattr(first, part)}) == first


def test_the_flag_names_an_objective():
    """By its constructor. Only the ELBO has the warm-up of the KL."""
    for text, expected in {
        "stl": "stl()",
        "iwae:num_samples=3": "iwae(3)",
        "dreg:num_samples=3": "dreg(3)",
    }.items():
        assert repr(make_objective(Config(objective=text), 100)) == expected
    without = Config(objective="elbo:free_bits=2", kl_warmup=0.0)
    assert repr(make_objective(without, 100)) == "elbo(free_bits=2.0)"
    params, x = Truth(0.3).params, jnp.asarray(data(4), jnp.float32)
    objective = make_objective(Config(kl_warmup=0.5), 100)
    for step, weight in ((0, 0.0), (25, 0.5), (50, 1.0), (99, 1.0)):
        loss, metrics = objective.loss(LED_MODEL, params, (), KEY, x, jnp.asarray(step))
        kl = metrics["log_posterior"] - metrics["log_prior"]
        np.testing.assert_allclose(loss, weight * kl - metrics["log_likelihood"], rtol=1e-5)


@pytest.mark.parametrize("make", [make_objective, make_optimizer])
def test_seeds_share_an_objective_and_an_optimizer_and_so_their_programs(make):
    config = Config(kl_warmup=0.5)
    assert make(config, 9) is make(dataclasses.replace(config, seed=3), 9)
    assert make(config, 9) is not make(config, 10)
    other = {"kl_warmup": 0.9, "learning_rate": 0.1}
    assert make(config, 9) is not make(dataclasses.replace(config, **other), 9)


def test_the_flag_names_an_optimizer():
    """The first step of each, at a constant gradient, against the papers' rules."""
    params, gradient = jnp.array([2.0, -1.0]), jnp.array([0.5, -3.0])
    for text, expected in {
        "adam": -np.sign(gradient),
        "adamw:weight_decay=0.1": -np.sign(gradient) - 0.1 * params,
        "adamax:b1=0.5": -np.sign(gradient),
    }.items():
        optimizer = make_optimizer(Config(optimizer=text, learning_rate=0.01), 100)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(updates, 0.01 * expected, rtol=1e-5)
