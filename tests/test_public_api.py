import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support import KEY, run_python

import led_jax
from led_jax import data, densities, flows

PACKAGES = [led_jax, flows, data]
MODULES = ["checkpoints", "checks", "decoders", "densities", "encoders", "estimators"]
MODULES += ["likelihoods", "model", "networks", "numerics", "objectives", "optimizers"]
MODULES += ["posteriors", "priors", "sharding", "training", "variational"]
MODULES += [f"flows.{name}" for name in ("actnorm", "autoregressive", "base", "conditioners")]
MODULES += [f"flows.{name}" for name in ("coupling", "masks", "permutations", "planar")]
MODULES += [f"flows.{name}" for name in ("linear", "sylvester", "transformers")]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_sorted_and_documented(package):
    assert package.__doc__
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if not isinstance(value, flows.Transformer):  # A value, documented where it is defined.
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_documented(module):
    module = importlib.import_module(f"led_jax.{module}")
    assert module.__doc__
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (
            own
            and not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
        ):
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def imported_by(statement):
    """The top-level packages that a fresh interpreter holds after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    return {name.split(".")[0] for name in json.loads(run_python(code))}


HEAVY = {"tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "sklearn", "torch", "distrax"}


def test_flows_import_nothing_above_them():
    below = {"flows", "checks", "convolutions", "descriptions", "modules", "numerics"}
    pattern = re.compile(r"^(?:from|import) led_jax\.?(\w*)(?: import (\w+))?", re.MULTILINE)
    imported = {
        match[1] or match[2]
        for path in (Path(led_jax.__file__).parent / "flows").glob("*.py")
        for match in pattern.finditer(path.read_text())
    }
    assert "descriptions" in imported and imported <= below


def test_a_leds_parameters_are_taken_apart_in_one_place():
    pattern = re.compile(r"""params\[["'](encoder|posterior|prior|decoder)["']\]""")
    root = Path(led_jax.__file__).parents[1]
    places = {
        str(path.relative_to(root))
        for package in ("led_jax", "experiments")
        for path in (root / package).rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert places == {"led_jax/model.py"}


@pytest.mark.slow
def test_led_jax_imports_no_heavy_package():
    assert imported_by("import led_jax") & HEAVY == set()


STACK = flows.real_nvp((4,), 2)
NORMAL = densities.standard_normal((4,))
WRONG: dict[str, tuple[Any, ...]] = {
    "real_nvp: event_shape .*sequence of integers.*got 4": (flows.real_nvp, 4, 2),
    "iaf: event_shape .*got 4": (flows.iaf, 4, 2),
    "real_nvp: hidden .*sequence of integers.*got 64": (flows.real_nvp, (4,), 2, 64),
    "made: hidden .*got 64": (flows.made, 64),
    "made: hidden .*got '64'": (flows.made, "64"),
    "standard_normal: event_shape .*got 4": (densities.standard_normal, 4),
    "real_nvp: transformer .*Transformer, got 'affine'": (
        lambda transformer: flows.real_nvp((4,), 2, transformer=transformer),
        "affine",
    ),
    "transformed: base .*Density, got Flow": (densities.transformed, STACK, STACK),
    "transformed: flow .*Flow, got Density": (densities.transformed, NORMAL, NORMAL),
    "chain: flows .*Flow, got Density": (flows.chain, STACK, NORMAL),
    "invert: flow .*Flow, got Density": (flows.invert, NORMAL),
    "sample_and_log_prob: sample_shape .*sequence of integers.*got 5": (
        NORMAL.sample_and_log_prob,
        (),
        jax.random.key(0),
        5,
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_argument_of_the_wrong_kind_is_named(message):
    function, *args = WRONG[message]
    with pytest.raises(TypeError, match=message):
        function(*args)


def test_an_event_without_entries_is_refused():
    with pytest.raises(ValueError, match="made: expected an event of one entry or more, got 0"):
        flows.iaf((0,), 2).init(KEY, jnp.zeros(0))
