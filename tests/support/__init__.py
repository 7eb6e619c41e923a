"""Helpers that several test modules share."""

import contextlib
import math
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from led_jax import flows

KEY = jax.random.key(0)


@contextlib.contextmanager
def compilations():
    """Yields a list that gains an entry for every program compiled within the `with` block."""
    compiled = []

    def listen(event, *args, **kwargs):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def randomise(params, scale=0.3, seed=7):
    """Adds normal noise to every leaf: a fresh flow is the identity, which hides errors of sign."""
    rng = np.random.default_rng(seed)

    def add_noise(leaf):
        noise = scale * rng.normal(size=leaf.shape)
        return jax.device_put((np.asarray(leaf) + noise).astype(leaf.dtype))

    return jax.tree.map(add_noise, params)


def random_params(init, *args, scale=0.3, seed=7):
    """Noise in the shapes of fresh parameters, whose own values would need a compilation."""
    shapes = jax.eval_shape(init, KEY, *args)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return randomise(zeros, scale, seed)


def gated_iaf(event_shape, depth, *args, **kwargs):
    """The stack of the paper's posterior, which halves its input while it is fresh."""
    gate = flows.gate(-math.log(2 ** (1 / max(depth, 1)) - 1))
    return flows.iaf(event_shape, depth, *args, transformer=gate, **kwargs)


def normal(shape, seed=1, dtype=None):
    """Reproducible normal numbers, of the default float dtype."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jax.device_put(numbers.astype(dtype or jnp.result_type(float)))


def layers_of(params):
    """The conditioners' parameters of a stack, layer by layer."""
    is_network = lambda p: isinstance(p, dict)  # noqa: E731
    (stack,) = [p for p in jax.tree.leaves(params, is_leaf=is_network) if is_network(p)]
    depth = len(jax.tree.leaves(stack)[0])
    return [jax.tree.map(lambda p: p[i], stack) for i in range(depth)]  # noqa: B023


def assert_trees_equal(actual, expected):
    """Asserts equality bit for bit, including dtypes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def assert_finite_where_representable(function, *args, dtype):
    """No NaN and no infinity where the mathematics stays within the dtype, entry by entry.

    Args:
      function: maps `args` to a pytree of arrays. An entry whose exact result (in float64) is
        larger than the dtype's largest number may overflow, and no other one.
      *args: pytrees of arrays of the dtype.
      dtype: a float dtype.
    """

    def entries(args):
        leaves = jax.tree.leaves(jax.jit(function)(*args))
        return [np.asarray(leaf, np.float64) for leaf in leaves]

    found = entries(args)
    assert any(np.isfinite(leaf).any() for leaf in found)
    if all(np.isfinite(leaf).all() for leaf in found):
        return
    with jax.enable_x64(True):
        exact = entries(jax.tree.map(lambda x: x.astype(jnp.float64), args))
    for leaf, expected in zip(found, exact, strict=True):
        # False for the NaNs and infinities where float64 overflows, too.
        is_representable = np.abs(expected) <= float(jnp.finfo(dtype).max)
        assert np.isfinite(leaf[is_representable]).all()


def run_python(code, *args):
    """Runs code in a fresh interpreter; returns its stdout."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
