"""The suite `training` of `experiments.benchmark`: steps, compilation and the NLL of models."""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.flops import forward_flops, step_gflop
from experiments.benchmark.measuring import markdown_table, round_robin, say, sgemm_gflops, timed
from experiments.benchmark.peers import PIXELS
from experiments.config import Config
from experiments.models import build_led
from experiments.run import samples_per_chunk
from led_jax import densities, estimators, sharding, training
from led_jax import flows as led_flows
from led_jax.data import Dataset
from led_jax.flows import base
from led_jax.flows.base import Flow

_MLP = Config(dataset="synthetic", prior_depth=0)
_RESCONV = Config(dataset="synthetic", prior_depth=0, network="resconv")

CELLS = {
    "mlp": _MLP,
    "prior12": dataclasses.replace(_MLP, prior_depth=12),
    "post4": dataclasses.replace(_MLP, posterior_depth=4),
    "post12": dataclasses.replace(_MLP, posterior_depth=12),
    "resconv": _RESCONV,
    "spatial": Config(
        dataset="synthetic",
        network="resconv",
        latent_shape=(7, 7, 2),
        prior_mask="checkerboard",
        prior_depth=4,
        prior_hidden=(16,),
        posterior="pixelcnn",
        posterior_depth=2,
        posterior_hidden=(16, 16),
        posterior_context=2,
    ),
}
PEERS = ("torch", "distrax")
TEST_ROWS = 10_000  # of binarized MNIST

_STACKS = (
    *(dataclasses.replace(_MLP, prior_depth=depth) for depth in (4, 8, 12)),
    *(dataclasses.replace(_MLP, posterior_depth=depth) for depth in (4, 12)),
)
_COMPILE_DEPTHS = (4, 12, 64)  # Stacks of MADE are unrolled up to depth 12.
_NLL_SAMPLES = {"prior12": 5000, "resconv": 500}


def measure(
    cells: Sequence[str],
    peers: Sequence[str],
    *,
    rows: int,
    rounds: int,
    nll_rows: int,
    sgemm_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Times training steps, scanned and unrolled stacks, jit and pmap, compilation, and the NLL.

    Args:
      cells: names out of `CELLS`.
      peers: names out of `PEERS` that are installed.
      rows: images an epoch, at least 100.
      rounds: turns of each side.
      nll_rows: images for the NLL.
      sgemm_shape: (m, k, n) of the matrix product whose speed the times are compared with.
    """
    data = np.random.default_rng(0).binomial(1, 0.13, (rows, PIXELS)).astype(np.uint8)
    return {
        "rows": rows,
        "rounds": rounds,
        "cells": [training_cell(cell, peers, data, rounds, sgemm_shape) for cell in cells],
        "scan": [scan_against_unrolled(config, data, rounds) for config in _STACKS],
        "wrappers": [wrapper_overhead(CELLS[cell], data, rounds) for cell in cells],
        "compile": compile_times(rounds),
        "nll": [
            nll_time(CELLS[cell], samples, nll_rows, rounds, sgemm_shape)
            for cell, samples in _NLL_SAMPLES.items()
        ],
    }


def training_cell(
    cell: str,
    peers: Sequence[str],
    data: np.ndarray,
    rounds: int,
    sgemm_shape: tuple[int, int, int],
) -> dict[str, Any]:
    """Step times of one model, ours and the peers', and of the matrix product `sgemm_shape`."""
    config = CELLS[cell]
    epoch, compile_seconds = _led_epoch(config, data)
    losses: dict[str, float] = {}
    sides = {"ours": timed(epoch, losses, "ours")}
    for peer in peers:
        if peer == "distrax" and (config.posterior_depth or config.network != "mlp"):
            continue  # distrax has no MADE; convolutions would be flax's.
        module = importlib.import_module(f"experiments.benchmark.peers.{peer}_led")
        for way, peer_epoch in module.make_epochs(config, data).items():
            sides[f"{peer}, {way}"] = timed(peer_epoch, losses, f"{peer}, {way}")
    medians = round_robin(sides | {"sgemm": sgemm_gflops(sgemm_shape)}, rounds)
    if not all(map(np.isfinite, losses.values())):
        raise FloatingPointError(f"{cell}: the losses are {losses}")
    step_seconds = {side: medians[side] / (len(data) // config.batch_size) for side in sides}
    gflop = step_gflop(config)
    result = {
        "cell": cell,
        "model": _describe(config),
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


def scan_against_unrolled(config: Config, data: np.ndarray, rounds: int) -> dict[str, Any]:
    """Step times of one model with its stack scanned and unrolled."""
    sides = {}
    for name, limit in (("scanned", 0), ("unrolled", sys.maxsize)):
        with _max_unroll(limit):
            sides[name] = timed(_led_epoch(config, data)[0])
    medians = round_robin(sides, rounds)
    steps = len(data) // config.batch_size
    result = {
        "model": _describe(config),
        "scanned_ms": 1e3 * medians["scanned"] / steps,
        "unrolled_ms": 1e3 * medians["unrolled"] / steps,
        "scanned_over_unrolled": medians["scanned"] / medians["unrolled"],
    }
    say(f"scan: {result}")
    return result


def wrapper_overhead(config: Config, data: np.ndarray, rounds: int) -> dict[str, Any]:
    """Step times of one model on one device, in each of the ways to use several."""
    sides = {method: timed(_led_epoch(config, data, method)[0]) for method in sharding.METHODS}
    medians = round_robin(sides, rounds)
    steps = len(data) // config.batch_size
    result: dict[str, Any] = {"model": _describe(config)}
    result |= {f"{method}_ms": 1e3 * medians[method] / steps for method in sides}
    result["pmap_over_jit"] = medians["pmap"] / medians["jit"]
    say(f"wrappers: {result}")
    return result


def compile_times(rounds: int) -> list[dict[str, Any]]:
    """Seconds to trace and compile a stack's NLL and its gradient, by the stack's depth."""
    stacks: dict[str, Callable[[int], Flow]] = {
        "real_nvp": lambda depth: led_flows.real_nvp((50,), depth),
        # Inverted, so that scoring takes the direction that training takes.
        "iaf": lambda depth: led_flows.invert(
            led_flows.iaf((50,), depth, transformer=led_flows.gated)
        ),
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


def nll_time(
    config: Config, samples: int, rows: int, rounds: int, sgemm_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Time of one model's NLL, and its ratio to that of the matrix products at the peak speed."""
    led = build_led(config, _dataset())
    x = np.random.default_rng(1).binomial(1, 0.13, (rows, PIXELS)).astype(np.uint8)
    key = jax.random.key(0)
    params = jax.jit(led.init)(key, jnp.asarray(x[:1], jnp.float32))

    def estimate(x: np.ndarray) -> estimators.NLL:
        return estimators.nll(
            led, params, key, x, samples, samples_per_chunk=samples_per_chunk(config)
        )

    estimate(x[:40])  # compiles the program for batches of this size
    medians = round_robin(
        {"nll": timed(lambda: estimate(x)), "sgemm": sgemm_gflops(sgemm_shape)},
        rounds if rows < TEST_ROWS else 1,  # One pass over all rows is long enough.
        warm_up=False,
    )
    flops = forward_flops(config)
    per_sample = flops["posterior"] + flops["prior"] + flops["decoder"]
    gflop = 1e-9 * rows * (flops["encoder"] + samples * per_sample)
    result = {
        "model": _describe(config),
        "rows": rows,
        "samples": samples,
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

    def ratio(cell: dict[str, Any], peer: str) -> str:
        if f"{peer}_step_ms" not in cell:
            return "-"
        return f"{cell[f'{peer}_step_ms']:.2f} ms, {cell[f'{peer}_over_ours']:.2f}x"

    cells = [
        (
            cell["model"],
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
            row["model"],
            f"{row['scanned_ms']:.2f} ms",
            f"{row['unrolled_ms']:.2f} ms",
            f"{row['scanned_over_unrolled']:.2f}x",
        )
        for row in result["scan"]
    ]
    wrappers = [
        (
            row["model"],
            f"{row['jit_ms']:.2f} ms",
            f"{row['pmap_ms']:.2f} ms, {row['pmap_over_jit']:.2f}x",
        )
        for row in result["wrappers"]
    ]
    compiles = [
        (row["stack"], *(f"{s:.2f} s" for s in row["seconds"].values()))
        + (f"{row['deep_over_shallow']:.2f}x",)
        for row in result["compile"]
    ]
    depths = list(map(int, result["compile"][0]["seconds"]))
    nll = [
        (
            row["model"],
            f"{row['rows']:,} x {row['samples']:,}",
            f"{row['seconds']:.1f} s",
            f"{row['seconds_of_10000_rows']:.0f} s",
            f"{row['nll_over_matmul_time']:.2f}x",
        )
        for row in result["nll"]
    ]
    sections = [
        "## Training step",
        "Batches of 100, Adam; mlp is 2 x 200 units in encoder and decoder. GFLOP are those of the "
        "matrix products and convolutions, masked ones counted as if dense. Peers: time of a step "
        "in the fastest of their ways (one thread or the default number; channels first or last), "
        "and as a multiple of ours.",
        markdown_table(
            ("model", "step", "examples/s", "compile", "GFLOP", "of peak", *PEERS), cells
        ),
        "## Scanned and unrolled stacks",
        markdown_table(("model", "scanned", "unrolled", "scanned / unrolled"), scan),
        "## The ways to use several devices, on one",
        markdown_table(("model", *sharding.METHODS), wrappers),
        "## Compile time of a stack's NLL and gradient, by depth",
        markdown_table(("stack", *map(str, depths), f"{max(depths)} / {min(depths)}"), compiles),
        "## NLL",
        "The last column is over the time of the matrix products and convolutions at the peak.",
        markdown_table(("model", "images x samples", "time", "10,000 images", "of peak time"), nll),
    ]
    return "\n\n".join(sections)


def _led_epoch(
    config: Config, data: np.ndarray, method: str = "jit"
) -> tuple[Callable[[], float], float]:
    """Compiles our training on one device.

    Returns:
      A function that trains for one epoch and returns minus its mean bound; and the seconds that
      compilation took.
    """
    dataset = _dataset()._replace(train=data)
    epochs = training.epochs(
        build_led(config, dataset),
        optax.adam(config.learning_rate),
        dataset,
        jax.random.key(0),
        batch_size=config.batch_size,
        method=method,
    )
    seconds = next(epochs).compile_seconds
    return lambda: -next(epochs).train["elbo"], seconds


def _compile_seconds(flow: Flow) -> float:
    density = densities.transformed(densities.standard_normal((50,)), flow)
    x = jax.ShapeDtypeStruct((100, 50), jnp.float32)
    params = jax.eval_shape(density.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return -density.log_prob(params, x).mean()

    jax.clear_caches()
    return timed(lambda: jax.jit(jax.value_and_grad(loss)).lower(params, x).compile())()


def _describe(config: Config) -> str:
    parts = [config.network]
    if config.latent_shape:
        parts[0] += f" {'x'.join(map(str, config.latent_shape))}"
    for part in ("prior", "posterior"):
        if depth := getattr(config, f"{part}_depth"):
            parts.append(f"{depth} {getattr(config, part)} {part}")
    return ", ".join(parts)


def _dataset() -> Dataset:
    rows = np.zeros((0, PIXELS), np.uint8)
    return Dataset("synthetic", (28, 28), rows, rows, rows)


def _max_unroll(depth: int) -> contextlib.AbstractContextManager:
    """A context in which stacks up to this depth are unrolled, and deeper ones scanned."""
    return mock.patch.dict(base.MAX_UNROLL, dict.fromkeys(base.MAX_UNROLL, depth))
