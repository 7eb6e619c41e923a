"""The suite `flows` of `experiments.benchmark`: stacks of flow layers, ours beside the peers'."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.benchmark.flops import network_flops
from experiments.benchmark.measuring import markdown_table, round_robin, say, sgemm_gflops, timed
from experiments.benchmark.peers import BINS, SIZE, LogProb, Stack
from led_jax import densities
from led_jax import flows as led_flows

CELLS = {
    **{f"coupling{depth}": Stack("coupling", depth) for depth in (4, 16, 64)},
    **{f"made{depth}": Stack("made", depth) for depth in (4, 16, 64)},
    "sequential8": Stack("made", 8, sequential=True),
    "spline8": Stack("coupling", 8, "spline"),
}
PEERS = ("flowjax", "numpyro", "distrax")
BATCH = 1000

_TURN_SECONDS = 0.1  # All sides repeat a call as often as ours needs to last about this long.


def measure(
    cells: Sequence[str],
    peers: Sequence[str],
    *,
    rounds: int,
    sgemm_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Times the first call, and later calls, of each stack's log-density and its gradient.

    Args:
      cells: names out of `CELLS`.
      peers: names out of `PEERS` that are installed.
      rounds: turns of each side; first calls have three turns at most.
      sgemm_shape: (m, k, n) of the matrix product whose speed the times are compared with.
    """
    return {
        "rounds": rounds,
        "batch": BATCH,
        "cells": [measure_stack(cell, peers, rounds, sgemm_shape) for cell in cells],
    }


def measure_stack(
    cell: str, peers: Sequence[str], rounds: int, sgemm_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """One row of the table: see `measure`."""
    stack = CELLS[cell]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, SIZE)), jnp.float32)
    makers = {"ours": make_log_prob} | {
        peer: importlib.import_module(f"experiments.benchmark.peers.{peer}_flows").make_log_prob
        for peer in peers
    }
    programs = {}
    for side, make in makers.items():
        if (made := make(stack, jax.random.key(0))) is not None:
            programs[side] = _program(stack, *made)

    def first_call(side: str) -> Callable[[], float]:
        fn, params = programs[side]

        def call():
            jax.clear_caches()
            return timed(lambda: jax.jit(lambda *args: fn(*args))(params, x))()

        return call

    firsts = round_robin({side: first_call(side) for side in programs}, min(rounds, 3))

    calls = {side: _bind(jax.jit(fn), params, x) for side, (fn, params) in programs.items()}
    results = {side: jax.block_until_ready(call()) for side, call in calls.items()}
    repeats = max(1, math.ceil(_TURN_SECONDS / timed(calls["ours"])()))
    turns = {side: timed(_repeat(call, repeats)) for side, call in calls.items()}
    medians = round_robin(turns | {"sgemm": sgemm_gflops(sgemm_shape)}, rounds)

    gflop = stack_gflop(stack)
    result = {
        "cell": cell,
        **stack._asdict(),
        "gflop": gflop,
        "sgemm_gflops": medians["sgemm"],
        "sides": {
            side: {
                "first_call_seconds": firsts[side],
                "steady_ms": 1e3 * medians[side] / repeats,
                "finite": all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(value)),
            }
            for side, value in results.items()
        },
        "fraction_of_sgemm_peak": gflop / (medians["ours"] / repeats) / medians["sgemm"],
    }
    if others := [side for side in programs if side != "ours"]:
        result["first_over_best_peer"] = firsts["ours"] / min(firsts[s] for s in others)
        result["steady_over_best_peer"] = medians["ours"] / min(medians[s] for s in others)
    say(f"{cell}: {result}")
    return result


def make_log_prob(stack: Stack, key: Array) -> LogProb:
    """Our side: see `experiments.benchmark.peers`."""
    transformer = {
        "affine": led_flows.affine,
        "spline": led_flows.spline(BINS, 3.0),
    }[stack.transformer]
    if stack.layer == "coupling":
        flow = led_flows.real_nvp((SIZE,), stack.depth, stack.hidden, transformer=transformer)
    else:
        flow = led_flows.iaf((SIZE,), stack.depth, stack.hidden, transformer=transformer)
        if not stack.sequential:
            flow = led_flows.invert(flow)
    density = densities.transformed(densities.standard_normal((SIZE,)), flow)
    return jax.jit(density.init)(key, jnp.zeros((2, SIZE))), density.log_prob


def stack_gflop(stack: Stack) -> float:
    """GFLOP of the matrix products: those forward and, with a gradient, twice as many backward.

    Masked weights count as dense ones, and the gradient with respect to x counts as if needed.
    """
    num_params = {"affine": 2, "spline": 3 * BINS - 1}[stack.transformer]
    passing = SIZE // 2 if stack.layer == "coupling" else 0
    widths = (passing or SIZE, *stack.hidden, num_params * (SIZE - passing))
    passes = 1 if stack.sequential else 3
    return 1e-9 * BATCH * stack.depth * passes * network_flops(*widths)


def to_markdown(result: dict[str, Any]) -> str:
    """The suite's table."""
    sides = ("ours", *PEERS)

    def side(cell: dict[str, Any], name: str) -> str:
        if name not in cell["sides"]:
            return "-"
        measured = cell["sides"][name]
        note = "" if measured["finite"] else " (not finite)"
        return f"{measured['first_call_seconds']:.2f} s / {measured['steady_ms']:.1f} ms{note}"

    def ratio(cell: dict[str, Any], name: str) -> str:
        return f"{cell[name]:.2f}" if name in cell else "-"

    rows = [
        (
            f"{cell['depth']} x {cell['transformer']} {cell['layer']}"
            + (", sequential" if cell["sequential"] else ""),
            *(side(cell, name) for name in sides),
            ratio(cell, "first_over_best_peer"),
            ratio(cell, "steady_over_best_peer"),
            f"{cell['fraction_of_sgemm_peak']:.0%}",
        )
        for cell in result["cells"]
    ]
    return "\n\n".join(
        [
            "## Stacks of flow layers",
            f"Log-density of {result['batch']:,} vectors of {SIZE} entries and the gradient of its "
            "mean in the parameters; no gradient for the sequential direction. First call (tracing "
            "and compiling included) / steady time; ours over the best peer's of either; share of "
            "the time that the matrix products, masked ones counted as if dense, would take at the "
            "peak.",
            markdown_table(("stack", *sides, "first", "steady", "of peak"), rows),
        ]
    )


def _program(stack: Stack, params: Any, log_prob: Callable) -> tuple[Callable, Any]:
    if stack.sequential:
        return log_prob, params
    return jax.value_and_grad(lambda params, x: log_prob(params, x).mean()), params


def _bind(fn: Callable, *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


def _repeat(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    return lambda: [jax.block_until_ready(call()) for _ in range(times)][-1]
