"""Shared by all tests."""

import sys
from pathlib import Path

import jax
import pytest

# Makes `import support` work whatever directory and import mode pytest runs with. The project comes
# first: `experiments` is not the folder of that name here.
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

# Tolerances are those of float32 products, also on accelerators that round them by default.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def fast_compile():
    """Compiles with few optimizations: for tests that compile more than they compute.

    Child processes do so, too.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)
