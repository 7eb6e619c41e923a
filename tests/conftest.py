"""Shared by all tests."""

import os
import sys
from pathlib import Path

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Makes `import support` work from any directory and in any import mode of pytest. The project comes
# first, so that `experiments` is not tests/experiments.
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
# Child processes import this checkout, too, whatever directory they run in.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# XLA's newer fusion emitters compile three times as long and ignore the level of optimization. An
# unknown flag would end the process, so only versions that were tried get these flags.
if (0, 8) <= jaxlib.version.__version_info__ < (0, 11):
    flags = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

# Tolerances assume matrix products in float32, which some accelerators round by default.
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


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory):
    """All workers and their child processes share a cache of compiled programs in this session."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    settings = {
        "jax_compilation_cache_dir": str(directory / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
