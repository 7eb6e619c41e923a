r"""Measures the library's speed against this machine's matrix products and against its peers.

    python -m experiments.benchmark [--cells=mlp,prior12,post4,post12] [--peers=torch,distrax]
        [--rounds=5] [--nll_rows=200] [--output=FILE.json]

What is compared runs in one process by turns, and ratios are of medians over the rounds: what else
the machine does hits every side alike. The last line on standard output is one JSON object;
--output also writes it to FILE.json and as tables to FILE.md.
"""

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from experiments import provenance
from experiments.config import Config, build_led, write_json
from experiments.peers import HIDDEN, PIXELS
from led_jax import densities, objectives, training
from led_jax import flows as led_flows
from led_jax.data import Dataset
from led_jax.flows import base
from led_jax.flows.base import Flow

# Name -> (L_prior, L_post).
CELLS = {"mlp": (0, 0), "prior12": (12, 0), "post4": (0, 4), "post12": (0, 12)}
PEERS = ("torch", "distrax")
TEST_ROWS = 10_000  # of binarized MNIST

_SGEMM_SHAPES = (
    *((n, n, n) for n in (1024, 2048, 3072, 4096)),
    (1024, 4096, 1024),
    (4096, 1024, 4096),
)
_STACK_DEPTHS = ((4, 0), (8, 0), (12, 0), (0, 4), (0, 12))
_COMPILE_DEPTHS = (4, 16, 64)  # 16 is the deepest stack that is unrolled
_NLL_SAMPLES = 5000

_CELLS = flags.DEFINE_list("cells", list(CELLS), f"Models to train: {', '.join(CELLS)}.")
_PEERS = flags.DEFINE_list("peers", list(PEERS), f"Libraries beside: {', '.join(PEERS)}.")
_ROWS = flags.DEFINE_integer("rows", 10_000, "Images an epoch; a step takes 100.", 100)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side, after one to warm up.", 1)
_NLL_ROWS = flags.DEFINE_integer(
    "nll_rows", 200, "Images whose NLL is estimated, of 10,000.", 40, TEST_ROWS
)
_OUTPUT = flags.DEFINE_string("output", "", "FILE.json to write, beside FILE.md.")
for _name, _known in (("cells", CELLS), ("peers", PEERS)):
    flags.register_validator(
        _name, set(_known).issuperset, message=f"expected some of {','.join(_known)}"
    )
flags.register_validator(
    "output", lambda path: not path or path.endswith(".json"), message="must end in .json"
)


def training_suite(
    cells: Sequence[str], peers: Sequence[str], *, rows: int, rounds: int, nll_rows: int
) -> dict[str, Any]:
    """Training steps, compilation, scanned against unrolled stacks, and the NLL.

    Args:
      cells: names out of `CELLS`.
      peers: names out of `PEERS`; one that is not installed is left out.
      rows: images an epoch, at least 100.
      rounds: turns of each side.
      nll_rows: images for the NLL.
    """
    peers = [peer for peer in peers if _installed(peer)]
    by_shape = {shape: sgemm_gflops(shape)() for shape in _SGEMM_SHAPES}
    shape = max(by_shape, key=lambda shape: by_shape[shape])
    _say(f"sgemm: {by_shape[shape]:.0f} GFLOP/s at {shape}")
    data = np.random.default_rng(0).binomial(1, 0.13, (rows, PIXELS)).astype(np.uint8)
    return {
        "rows": rows,
        "rounds": rounds,
        "sgemm_gflops": by_shape[shape],
        "sgemm_shape": shape,
        "cells": [training_cell(cell, peers, data, rounds, shape) for cell in cells],
        "scan": [scan_against_unrolled(*depths, data, rounds) for depths in _STACK_DEPTHS],
        "compile": compile_times(rounds),
        "nll": nll_time(nll_rows, rounds, shape),
    }


def sgemm_gflops(shape: tuple[int, int, int], repeats: int = 5) -> Callable[[], float]:
    """A measurement of the speed of `[m, k] @ [k, n]` in float32 at JAX's default precision.

    Args:
      shape: (m, k, n).
      repeats: products a measurement, of which the median counts.
    """
    m, k, n = shape
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(m, k), (k, n)]))
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(a, b))
    product = _timed(lambda: matmul(a, b))
    return lambda: 2e-9 * m * k * n / statistics.median(product() for _ in range(repeats))


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
    sides = {"ours": _timed(epoch, losses, "ours")}
    for peer in peers:
        if peer == "distrax" and config.posterior_depth:
            continue  # It has no MADE.
        module = importlib.import_module(f"experiments.peers.{peer}_led")
        for way, peer_epoch in module.make_epochs(config, data).items():
            sides[f"{peer}, {way}"] = _timed(peer_epoch, losses, f"{peer}, {way}")
    medians = _round_robin(sides | {"sgemm": sgemm_gflops(sgemm_shape)}, rounds)
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
    _say(f"{cell}: {result}")
    return result


def forward_flops(config: Config) -> dict[str, int]:
    """Floating-point operations of each part's matrix products for one row, masks ignored."""

    def products(*widths: int) -> int:
        return 2 * sum(rows * columns for rows, columns in itertools.pairwise(widths))

    latent = config.latent_dim
    passing = latent // 2
    coupling = products(passing, *config.prior_hidden, 2 * (latent - passing))
    made = products(latent, *config.posterior_hidden, 2 * latent)
    return {
        "encoder": products(PIXELS, *HIDDEN, 2 * latent),
        "posterior": config.posterior_depth * made,
        "prior": config.prior_depth * coupling,
        "decoder": products(latent, *HIDDEN, PIXELS),
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
            sides[name] = _timed(_led_epoch(config, data)[0])
    medians = _round_robin(sides, rounds)
    steps = len(data) // config.batch_size
    result = {
        "prior_depth": prior_depth,
        "posterior_depth": posterior_depth,
        "scanned_ms": 1e3 * medians["scanned"] / steps,
        "unrolled_ms": 1e3 * medians["unrolled"] / steps,
        "scanned_over_unrolled": medians["scanned"] / medians["unrolled"],
    }
    _say(f"scan: {result}")
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
        seconds = _round_robin(sides, rounds)
        shallow, deep = str(min(_COMPILE_DEPTHS)), str(max(_COMPILE_DEPTHS))
        ratio = seconds[deep] / seconds[shallow]
        results.append({"stack": name, "seconds": seconds, "deep_over_shallow": ratio})
        _say(f"compile: {results[-1]}")
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
    medians = _round_robin(
        {"nll": _timed(lambda: estimate(x)), "sgemm": sgemm_gflops(sgemm_shape)},
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
    _say(f"nll: {result}")
    return result


def to_markdown(result: dict[str, Any]) -> str:
    """A benchmark's tables, with the command, versions and hardware behind them."""
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
    compiles = [
        (row["stack"], *(f"{s:.2f} s" for s in row["seconds"].values()))
        + (f"{row['deep_over_shallow']:.2f}x",)
        for row in result["compile"]
    ]
    depths = list(map(int, result["compile"][0]["seconds"]))
    nll = result["nll"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    sections = [
        "# Benchmark",
        f"`{result['command']}` on {result['date']}; {result['hardware']}; {versions}.",
        f"Medians over {result['rounds']} rounds; in each, every side has its turn. Load average "
        f"of the machine before: {result['load_average']:.1f}. Peak of the float32 matrix "
        f"product: {result['sgemm_gflops']:.0f} GFLOP/s, measured again beside every cell.",
        "## Training step",
        "Batches of 100, Adam; encoder and decoder 2 x 200. GFLOP are those of the matrix "
        "products, masked ones counted as if dense. Peers: time of a step with one thread or the "
        "default number, whichever is faster, and as a multiple of ours.",
        _table(("flow layers", "step", "examples/s", "compile", "GFLOP", "of peak", *PEERS), cells),
        "## Scanned and unrolled stacks",
        _table(("flow layers", "scanned", "unrolled", "scanned / unrolled"), scan),
        "## Compile time of a stack's NLL and gradient, by depth",
        _table(("stack", *map(str, depths), f"{max(depths)} / {min(depths)}"), compiles),
        "## NLL of the MLP with 12 Real NVP prior layers",
        f"{nll['rows']:,} images x {nll['samples']:,} samples in {nll['seconds']:.1f} s "
        f"({nll['seconds_of_10000_rows']:.0f} s for 10,000 images): "
        f"{nll['nll_over_matmul_time']:.2f}x the time of its matrix products at the peak of "
        f"{nll['sgemm_gflops']:.0f} GFLOP/s.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _round_robin(
    sides: dict[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Lets every side measure itself in turn; returns the median of each."""
    if warm_up:
        for measure in sides.values():
            measure()
    turns = [{side: measure() for side, measure in sides.items()} for _ in range(rounds)]
    return {side: statistics.median(turn[side] for turn in turns) for side in sides}


def _timed(
    fn: Callable[[], Any], results: dict[str, Any] | None = None, name: str = ""
) -> Callable[[], float]:
    """A measurement of the seconds of one call, the result of which goes to `results[name]`."""

    def measure() -> float:
        start = time.perf_counter()
        value = jax.block_until_ready(fn())
        seconds = time.perf_counter() - start
        if results is not None:
            results[name] = value
        return seconds

    return measure


def _led_epoch(config: Config, data: np.ndarray) -> tuple[Callable[[], float], float]:
    """An epoch of ours, compiled, and the seconds that compiling took."""
    led = build_led(config, _dataset())
    optimizer = optax.adam(config.learning_rate)
    rows = jnp.asarray(data)
    state = training.init_state(led, optimizer, jax.random.key(0), rows[: config.batch_size])
    start = time.perf_counter()
    compiled = training.make_epoch(led, optimizer, config.batch_size).lower(state, rows).compile()  # pyright: ignore[reportFunctionMemberAccess]
    seconds = time.perf_counter() - start

    def epoch() -> float:
        nonlocal state
        state, terms = compiled(state, rows)
        return -float(terms.bound)

    return epoch, seconds


def _compile_seconds(flow: Flow) -> float:
    density = densities.transformed(densities.standard_normal((50,)), flow)
    x = jax.ShapeDtypeStruct((100, 50), jnp.float32)
    params = jax.eval_shape(density.init, jax.random.key(0), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return -density.log_prob(params, x).mean()

    jax.clear_caches()
    return _timed(lambda: jax.jit(jax.value_and_grad(loss)).lower(params, x).compile())()


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


def _installed(peer: str) -> bool:
    if importlib.util.find_spec(peer) is None:
        _say(f'{peer} is not installed, so it is left out: pip install "led_jax[bench]"')
        return False
    if peer == "torch" and jax.default_backend() != "cpu":
        import torch  # pyright: ignore[reportMissingImports]

        if not torch.cuda.is_available():
            _say("torch is left out: JAX computes on an accelerator, this torch cannot")
            return False
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Runs the benchmark that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_enable_compilation_cache", False)  # Else compiling may be reading.
    output = pathlib.Path(_OUTPUT.value).expanduser()
    given = [
        f"--{flag.name}={','.join(flag.value) if isinstance(flag.value, list) else flag.value}"
        for flag in (_CELLS, _PEERS, _ROWS, _ROUNDS, _NLL_ROWS)
        if flag.value != flag.default
    ]
    result = {
        "command": " ".join(["python -m experiments.benchmark", *given]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": provenance.versions()
        | {p: importlib.metadata.version(p) for p in _PEERS.value if importlib.util.find_spec(p)},
        "hardware": provenance.hardware(),
        "load_average": os.getloadavg()[0],
    }
    if result["load_average"] > 0.5:
        _say(f"warning: a load of {result['load_average']:.1f} is on this machine already")
    if _OUTPUT.value:
        output.parent.mkdir(parents=True, exist_ok=True)
    result |= training_suite(
        _CELLS.value,
        _PEERS.value,
        rows=_ROWS.value,
        rounds=_ROUNDS.value,
        nll_rows=_NLL_ROWS.value,
    )
    _say(to_markdown(result))
    if _OUTPUT.value:
        write_json(output, result)
        output.with_suffix(".md").write_text(to_markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
