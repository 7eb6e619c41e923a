"""The suite `training` of `experiments.benchmark`: steps, compilation and the NLL of models."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import Config, build_led
from experiments.measuring import (
    markdown_table,
    network_flops,
    round_robin,
    say,
    sgemm_gflops,
    timed,
)
from experiments.peers import HIDDEN, PIXELS
from led_jax import densities, objectives, parallel, training
from led_jax import flows as led_flows
from led_jax.data import Dataset
from led_jax.flows import base
from led_jax.flows.base import Flow

# Name -> (L_prior, L_post).
CELLS = {"mlp": (0, 0), "prior12": (12, 0), "post4": (0, 4), "post12": (0, 12)}
PEERS = ("torch", "distrax")
TEST_ROWS = 10_000  # of binarized MNIST

_STACK_DEPTHS = ((4, 0), (8, 0), (12, 0), (0, 4), (0, 12))
_COMPILE_DEPTHS = (4, 16, 64)  # 16 is the deepest stack that is unrolled
_NLL_SAMPLES = 5000


def measure(
    cells: Sequence[str],
    peers: Sequence[str],
    *,
    rows: int,
    rounds: int,
    nll_rows: int,
    sgemm_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Training steps, compilation, scanned against unrolled stacks, and the NLL.

    Args:
      cells: names out of `CELLS`.
      peers: names out of `PEERS` that are installed.
      rows: images an epoch, at least 100.
      rounds: turns of each side.
      nll_rows: images for the NLL.
      sgemm_shape: matrix product to set the times beside.
    """
    data = np.random.default_rng(0).binomial(1, 0.13, (rows, PIXELS)).astype(np.uint8)
    return {
        "rows": rows,
        "rounds": rounds,
        "cells": [training_cell(cell, peers, data, rounds, sgemm_shape) for cell in cells],
        "scan": [scan_against_unrolled(*depths, data, rounds) for depths in _STACK_DEPTHS],
        "wrappers": [wrapper_overhead(*CELLS[cell], data, rounds) for cell in cells],
        "compile": compile_times(rounds),
        "nll": nll_time(nll_rows, rounds, sgemm_shape),
    }


def training_cell(
    cell: str,
    peers: Sequence[str],
    data: np.ndarray,
    rounds: int,
    sgemm_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Step times of one model, ours and the peers', and of the matrix product `sgemm_shape`."""
    config = _config(*CELLS[cell])
    epoch, compile_seconds = _led_epoch(config, data)
    losses: dict[str, float] = {}
    sides = {"ours": timed(epoch, losses, "ours")}
    for peer in peers:
        if peer == "distrax" and config.posterior_depth:
            continue  # It has no MADE.
        module = importlib.import_module(f"experiments.peers.{peer}_led")
        for way, peer_epoch in module.make_epochs(config, data).items():
            sides[f"{peer}, {way}"] = timed(peer_epoch, losses, f"{peer}, {way}")
    medians = round_robin(sides | {"sgemm": sgemm_gflops(sgemm_shape)}, rounds)
    if not all(map(np.isfinite, losses.values())):
        raise FloatingPointError(f"{cell}: the losses are {losses}")
    step_seconds = {side: medians[side] / (len(data) // config.batch_size) for side in sides}
    gflop = step_gflop(config)
    result = {
        "cell": cell,
        "prior_depth": config.prior_depth,
        "posterior_depth": config.posterior_depth,
        "step_ms": 1e3 * step_seconds["ours"],
        "examples_per_second": config.batch_size / step_seconds["ours"],
        "compile_seconds": compile_seconds,
        "gflop_per_step": gflop,
        "sgemm_gflops": medians["sgemm"],
        "fraction_of_sgemm_peak": gflop / step_seconds["ours"] / medians["sgemm"],
        "loss": losses["ours"],
    }
    for peer in peers:
        ways = [side for side in sides if side.startswith(peer)]
        if ways:
            best = min(ways, key=lambda side: step_seconds[side])
            result[f"{peer}_step_ms"] = 1e3 * step_seconds[best]
            result[f"{peer}_ways_ms"] = {side: 1e3 * step_seconds[side] for side in ways}
            result[f"{peer}_loss"] = losses[best]
            result[f"{peer}_over_ours"] = step_seconds[best] / step_seconds["ours"]
    say(f"{cell}: {result}")
    return result


def forward_flops(config: Config) -> dict[str, int]:
    """Floating-point operations of each part's matrix products for one row, masks ignored."""
    latent = config.latent_dim
    passing = latent // 2
    coupling = network_flops(passing, *config.prior_hidden, 2 * (latent - passing))
    made = network_flops(latent, *config.posterior_hidden, 2 * latent)
    return {
        "encoder": network_flops(PIXELS, *HIDDEN, 2 * latent),
        "posterior": config.posterior_depth * made,
        "prior": config.prior_depth * coupling,
        "decoder": network_flops(latent, *HIDDEN, PIXELS),
    }


def step_gflop(config: Config) -> float:
    """GFLOP of a training step's matrix products: once forward, twice backward.

    Only the gradient with respect to the images is not needed.
    """
    flops = 3 * sum(forward_flops(config).values()) - 2 * PIXELS * HIDDEN[0]
    return 1e-9 * config.batch_size * flops


def scan_against_unrolled(
    prior_depth: int, posterior_depth: int, data: np.ndarray, rounds: int
) -> dict[str, Any]:
    """Step times of one model with its stack scanned and unrolled."""
    config = _config(prior_depth, posterior_depth)
    sides = {}
    for name, limit in (("scanned", 0), ("unrolled", sys.maxsize)):
        with _max_unroll(limit):
            sides[name] = timed(_led_epoch(config, data)[0])
    medians = round_robin(sides, rounds)
    steps = len(data) // config.batch_size
    result = {
        "prior_depth": prior_depth,
        "posterior_depth": posterior_depth,
        "scanned_ms": 1e3 * medians["scanned"] / steps,
        "unrolled_ms": 1e3 * medians["unrolled"] / steps,
        "scanned_over_unrolled": medians["scanned"] / medians["unrolled"],
    }
    say(f"scan: {result}")
    return result


def wrapper_overhead(
    prior_depth: int, posterior_depth: int, data: np.ndarray, rounds: int
) -> dict[str, Any]:
    """Step times of one model on one device: plain, and in each of the wrappers for several."""
    config = _config(prior_depth, posterior_depth)
    sides = {
        method: timed(_led_epoch(config, data, method)[0]) for method in ("jit", *parallel.METHODS)
    }
    medians = round_robin(sides, rounds)
    steps = len(data) // config.batch_size
    result: dict[str, Any] = {"prior_depth": prior_depth, "posterior_depth": posterior_depth}
    result |= {f"{method}_ms": 1e3 * medians[method] / steps for method in sides}
    for method in parallel.METHODS:
        result[f"{method}_over_jit"] = medians[method] / medians["jit"]
    say(f"wrappers: {result}")
    return result


def compile_times(rounds: int) -> list[dict[str, Any]]:
    """Seconds to trace and compile a stack's NLL and its gradient, by the stack's depth."""
    stacks: dict[str, Callable[[int], Flow]] = {
        "real_nvp": lambda depth: led_flows.real_nvp((50,), depth),
        # Inverted, so that scoring takes the direction that training takes.
        "iaf": lambda depth: led_flows.invert(led_flows.iaf((50,), depth)),
    }
    results = []
    for name, make in stacks.items():
        sides = {
            str(depth): functools.partial(_compile_seconds, make(depth))
            for depth in _COMPILE_DEPTHS
        }
        seconds = round_robin(sides, rounds)
        shallow, deep = str(min(_COMPILE_DEPTHS)), str(max(_COMPILE_DEPTHS))
        ratio = seconds[deep] / seconds[shallow]
        results.append({"stack": name, "seconds": seconds, "deep_over_shallow": ratio})
        say(f"compile: {results[-1]}")
    return results


def nll_time(rows: int, rounds: int, sgemm_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Time of the NLL of the 12-layer prior, beside that of its matrix products at the peak."""
    config = _config(12, 0)
    led = build_led(config, _dataset())
    x = np.random.default_rng(1).binomial(1, 0.13, (rows, PIXELS)).astype(np.uint8)
    key = jax.random.key(0)
    params = jax.jit(led.init)(key, jnp.asarray(x[:1], jnp.float32))

    def estimate(x: np.ndarray) -> objectives.NLL:
        return objectives.nll(led, params, key, x, _NLL_SAMPLES)

    estimate(x[:40])  # compiles the program for batches of this size
    medians = round_robin(
        {"nll": timed(lambda: estimate(x)), "sgemm": sgemm_gflops(sgemm_shape)},
        rounds if rows < TEST_ROWS else 1,  # A whole run is long enough to average by itself.
        warm_up=False,
    )
    flops = forward_flops(config)
    per_sample = flops["posterior"] + flops["prior"] + flops["decoder"]
    gflop = 1e-9 * rows * (flops["encoder"] + _NLL_SAMPLES * per_sample)
    result = {
        "rows": rows,
        "samples": _NLL_SAMPLES,
        "seconds": medians["nll"],
        "seconds_of_10000_rows": medians["nll"] * TEST_ROWS / rows,
        "gflop": gflop,
        "sgemm_gflops": medians["sgemm"],
        "nll_over_matmul_time": medians["nll"] / (gflop / medians["sgemm"]),
    }
    say(f"nll: {result}")
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """The suite's tables."""
    stack = "{prior_depth} prior, {posterior_depth} posterior".format_map

    def ratio(cell: dict[str, Any], peer: str) -> str:
        if f"{peer}_step_ms" not in cell:
            return "-"
        return f"{cell[f'{peer}_step_ms']:.2f} ms, {cell[f'{peer}_over_ours']:.2f}x"

    cells = [
        (
            stack(cell),
            f"{cell['step_ms']:.2f} ms",
            f"{cell['examples_per_second']:,.0f}",
            f"{cell['compile_seconds']:.1f} s",
            f"{cell['gflop_per_step']:.3f}",
            f"{cell['fraction_of_sgemm_peak']:.0%}",
            *(ratio(cell, peer) for peer in PEERS),
        )
        for cell in result["cells"]
    ]
    scan = [
        (
            stack(row),
            f"{row['scanned_ms']:.2f} ms",
            f"{row['unrolled_ms']:.2f} ms",
            f"{row['scanned_over_unrolled']:.2f}x",
        )
        for row in result["scan"]
    ]
    wrappers = [
        (
            stack(row),
            f"{row['jit_ms']:.2f} ms",
            *(f"{row[f'{m}_ms']:.2f} ms, {row[f'{m}_over_jit']:.2f}x" for m in parallel.METHODS),
        )
        for row in result["wrappers"]
    ]
    compiles = [
        (row["stack"], *(f"{s:.2f} s" for s in row["seconds"].values()))
        + (f"{row['deep_over_shallow']:.2f}x",)
        for row in result["compile"]
    ]
    depths = list(map(int, result["compile"][0]["seconds"]))
    nll = result["nll"]
    sections = [
        "## Training step",
        "Batches of 100, Adam; encoder and decoder 2 x 200. GFLOP are those of the matrix "
        "products, masked ones counted as if dense. Peers: time of a step with one thread or the "
        "default number, whichever is faster, and as a multiple of ours.",
        markdown_table(
            ("flow layers", "step", "examples/s", "compile", "GFLOP", "of peak", *PEERS), cells
        ),
        "## Scanned and unrolled stacks",
        markdown_table(("flow layers", "scanned", "unrolled", "scanned / unrolled"), scan),
        "## The wrappers for several devices, on one",
        markdown_table(("flow layers", "jit", *parallel.METHODS), wrappers),
        "## Compile time of a stack's NLL and gradient, by depth",
        markdown_table(("stack", *map(str, depths), f"{max(depths)} / {min(depths)}"), compiles),
        "## NLL of the MLP with 12 Real NVP prior layers",
        f"{nll['rows']:,} images x {nll['samples']:,} samples in {nll['seconds']:.1f} s "
        f"({nll['seconds_of_10000_rows']:.0f} s for 10,000 images): "
        f"{nll['nll_over_matmul_time']:.2f}x the time of its matrix products at the peak of "
        f"{nll['sgemm_gflops']:.0f} GFLOP/s.",
    ]
    return "\n\n".join(sections)


def _led_epoch(
    config: Config, data: np.ndarray, method: str = "jit"
) -> tuple[Callable[[], float], float]:
    """An epoch of ours on one device, compiled, and the seconds that compiling took."""
    led = build_led(config, _dataset())
    optimizer = optax.adam(config.learning_rate)
    rows = jnp.asarray(data)
    state = training.init_state(led, optimizer, jax.random.key(0), rows[: config.batch_size])
    start = time.perf_counter()
    if method == "jit":
        jitted = training.make_epoch(led, optimizer, config.batch_size)
        compiled = jitted.lower(state, rows).compile()  # pyright: ignore[reportFunctionMemberAccess]
    else:
        mesh = parallel.make_mesh(1)
        state, rows = parallel.replicate(mesh, (state, rows))
        mapped = training.make_epoch(led, optimizer, config.batch_size, axis_name=parallel.AXIS)
        compiled = parallel.compile(mapped, mesh, state, rows, donate_args=[0], method=method)
    seconds = time.perf_counter() - start

    def epoch() -> float:
        nonlocal state
        state, steps = compiled(state, rows)
        return -float(steps.mean().bound)

    return epoch, seconds


def _compile_seconds(flow: Flow) -> float:
    density = densities.transformed(densities.standard_normal((50,)), flow)
    x = jax.ShapeDtypeStruct((100, 50), jnp.float32)
    params = jax.eval_shape(density.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return -density.log_prob(params, x).mean()

    jax.clear_caches()
    return timed(lambda: jax.jit(jax.value_and_grad(loss)).lower(params, x).compile())()


def _config(prior_depth: int, posterior_depth: int) -> Config:
    return Config(dataset="synthetic", prior_depth=prior_depth, posterior_depth=posterior_depth)


def _dataset() -> Dataset:
    rows = np.zeros((0, PIXELS), np.uint8)
    return Dataset("synthetic", (28, 28), rows, rows, rows)


@contextlib.contextmanager
def _max_unroll(depth: int) -> Iterator[None]:
    """Sets the depth up to which stacks that are built meanwhile are unrolled."""
    saved, base.MAX_UNROLL = base.MAX_UNROLL, depth
    try:
        yield
    finally:
        base.MAX_UNROLL = saved
