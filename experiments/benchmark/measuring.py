"""Tools for measuring, which the suites of `experiments.benchmark` share."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def timed(
    fn: Callable[[], Any], results: dict[str, Any] | None = None, name: str = ""
) -> Callable[[], float]:
    """Returns a function that calls `fn` once and returns the seconds that the call took.

    If `results` is given, it stores the value of `fn` in `results[name]`.
    """

    def measure() -> float:
        start = time.perf_counter()
        value = jax.block_until_ready(fn())
        seconds = time.perf_counter() - start
        if results is not None:
            results[name] = value
        return seconds

    return measure


def round_robin(
    sides: dict[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Lets all sides measure themselves in turn, round by round; returns each side's median."""
    if warm_up:
        for measure in sides.values():
            measure()
    turns = [{side: measure() for side, measure in sides.items()} for _ in range(rounds)]
    return {side: statistics.median(turn[side] for turn in turns) for side in sides}


def sgemm_gflops(shape: tuple[int, int, int], repeats: int = 5) -> Callable[[], float]:
    """Returns a function that measures the GFLOP/s of `[m, k] @ [k, n]` in float32.

    The precision is JAX's default.

    Args:
      shape: (m, k, n).
      repeats: products in each measurement, which takes the median of their times.
    """
    m, k, n = shape
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(m, k), (k, n)]))
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(a, b))
    product = timed(lambda: matmul(a, b))
    return lambda: 2e-9 * m * k * n / statistics.median(product() for _ in range(repeats))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(line: str) -> None:
    """Prints to standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)
