"""Which parameters the models of the paper's tables have: their saved runs depend on it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from experiments.models import build_led
from experiments.sweep import TABLES
from led_jax.data import Dataset

GOLDEN = Path(__file__).parents[1] / "golden" / "tables.json"


def models():
    """Name, configuration of each cell of both tables."""
    for table, columns in TABLES.items():
        for column, cells in columns.items():
            for cell in cells:
                yield f"table {table}, {column}, depth {cell.depth}", cell.config


@pytest.fixture
def images():
    rows = np.zeros((8, 784), np.uint8)
    return Dataset("binarized_mnist", (28, 28), rows, rows, rows)


def test_parameters_are_those_of_the_golden_file(images):
    """A change here makes saved runs unreadable; if it is wanted, replace the file by the new."""
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
