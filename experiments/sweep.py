r"""Trains the cells of a table of the paper, and writes the table beside the paper's numbers.

    python -m experiments.sweep --table=1 --columns=mlp_prior,mlp_posterior --data_dir=DIR \
        --workdir=DIR

Cells already finished in the work directory are not trained again, stopped ones go on. One that
fails leaves the others to go on; the failed are named at the end, with status 1. Writes
tableN.json (a list of experiments.train's objects), tableN.md and tableN.png into it; what the
table there already has of other cells stays. The last line on standard output is one JSON object
with the list as its "results".
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
import sys
import urllib.parse
from typing import Any, NamedTuple

import jax
import tqdm
from absl import app, flags

from experiments import distributed, plots
from experiments.config import Config
from experiments.flags import from_command, required_workdir, start
from experiments.run import run
from experiments.signals import Stop, stop_on_signal
from experiments.workdir import check_path, hold, read_json, write_json


class Cell(NamedTuple):
    """One cell of a table: the paper's test NLL in nats, and what to train for it."""

    depth: int
    paper_nll: float
    config: Config


_MNIST = Config(dataset="binarized_mnist", prior_depth=0)
# Weight normalization as in an author's later code: github.com/CW-Huang/torchkit.
_RESCONV = Config(dataset="binarized_mnist", network="resconv", weight_norm=True, epochs=100)


def _prior(depth: int, paper_nll: float) -> Cell:
    return Cell(depth, paper_nll, dataclasses.replace(_MNIST, prior_depth=depth))


def _posterior(depth: int, paper_nll: float) -> Cell:
    # 1,000 samples: a MADE posterior costs five times the decoder, and fewer only overestimate.
    config = dataclasses.replace(_MNIST, posterior_depth=depth, epochs=200, nll_samples=1000)
    return Cell(depth, paper_nll, config)


def _resconv(
    prior_depth: int,
    paper_nll: float,
    posterior: str = "made",
    posterior_depth: int = 0,
    **overrides: Any,
) -> Cell:
    config = dataclasses.replace(
        _RESCONV,
        prior_depth=prior_depth,
        posterior=posterior,
        posterior_depth=posterior_depth,
        posterior_hidden=(100,) if posterior == "nvp" else (512, 512),
        **overrides,
    )
    return Cell(prior_depth, paper_nll, config)


_BASELINE = _prior(0, 90.78)

TABLES = {
    1: {
        "mlp_prior": [_BASELINE, _prior(4, 88.07), _prior(8, 87.47), _prior(12, 86.59)],
        "mlp_posterior": [
            _BASELINE,
            _posterior(4, 88.89),
            _posterior(8, 88.71),
            _posterior(12, 88.70),
        ],
        "resconv_prior": [
            _resconv(0, 83.11),
            _resconv(4, 81.87),
            _resconv(8, 81.70),
            _resconv(12, 81.44),
        ],
    },
    # As many posterior layers as prior ones.
    2: {
        "resconv_nvp": [_resconv(4, 81.81, "nvp", 4), _resconv(8, 81.55, "nvp", 8)],
        "resconv_made": [
            _resconv(8, 80.81, "made", 8),
            # At the default rate it diverged within its first epoch.
            _resconv(16, 80.60, "made", 16, learning_rate=5e-4, clip_norm=100.0),
        ],
    },
}
"""Huang et al. (2017): table -> column -> cells."""

_MAX_NAME = 150  # Of the 255 bytes that file systems allow.

_TABLE = flags.DEFINE_integer("table", 1, "Number of the paper's table.")
_COLUMNS = flags.DEFINE_list("columns", [], "Columns to train; empty: all of the table's.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every cell.")
_EPOCHS = flags.DEFINE_integer("epochs", 0, "Epochs of every cell; 0: each cell's own.", 0)
_NLL_SAMPLES = flags.DEFINE_integer("nll_samples", 0, "Importance samples; 0: each cell's own.", 0)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where binarized MNIST is, as experiments.train.")
flags.DEFINE_string("workdir", "", "Directory of the sweep.")


def sweep(
    table: dict[str, list[Cell]],
    seeds: list[int],
    workdir: pathlib.Path,
    stop: Stop | None = None,
    **overrides: Any,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Trains every cell of a table with every seed.

    A run that fails leaves the others to go on, in one process: several would part company.

    Args:
      table: cells by column; a cell that stands in several columns is trained once.
      seeds: seeds of each cell.
      workdir: directory with one run's directory for each cell and seed.
      stop: as in `run`.
      **overrides: fields of `Config` to set in every cell.

    Returns:
      Each finished run's result, with its "paper_nll" and "columns"; in other processes than the
      first, these two alone. And the names of the runs that failed.
    """
    runs: dict[str, tuple[Cell, Config, list[str]]] = {}
    for column, cells in table.items():
        for cell in cells:
            for seed in seeds:
                config = dataclasses.replace(cell.config, seed=seed, **overrides)
                runs.setdefault(run_name(config), (cell, config, []))[2].append(column)
    results, failed = [], []
    for name, (cell, config, columns) in runs.items():
        tqdm.tqdm.write(f"== {name}", file=sys.stderr)
        try:
            result = run(config, workdir / name, stop)
        except (*distributed.ERRORS, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() > 1:
                raise
            tqdm.tqdm.write(f"error: {distributed.message_of(error)}", file=sys.stderr)
            failed.append(name)
        else:
            results.append(result | {"paper_nll": cell.paper_nll, "columns": columns})
    return results, failed


def run_name(config: Config) -> str:
    """A directory's name for a run: the fields that tell it from others, with their values.

    A name is no longer than `_MAX_NAME` characters: the end of a longer one is a hash of the whole.
    """
    parts = []
    for field, value in config.identity().items():
        value = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        parts.append(f"{field}={urllib.parse.quote(value, safe='')}")
    name = ",".join(parts) or "default"
    if len(name) <= _MAX_NAME:
        return name
    digest = "+" + hashlib.sha256(name.encode()).hexdigest()[:16]
    return name[: _MAX_NAME - len(digest)] + digest


def to_markdown(table: dict[str, list[Cell]], results: list[dict[str, Any]]) -> str:
    """The table: ours beside the paper's, mean over seeds; cells without a result say so."""
    lines = [
        "| column | L | paper | led_jax | standard error | beaten by | seeds | epochs | samples |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for column, cells in table.items():
        for cell in cells:
            runs = _runs_of(cell, column, results)
            if not runs:
                row = f"| {column} | {cell.depth} | {cell.paper_nll:.2f} | not run |"
                lines.append(row + " |" * 5)
                continue
            nll, error = _mean_and_error(runs)
            lines.append(
                f"| {column} | {cell.depth} | {cell.paper_nll:.2f} | {nll:.2f} | {error:.2f} "
                f"| {cell.paper_nll - nll:.2f} | {len(runs)} | {runs[0]['epochs']} "
                f"| {runs[0]['nll_samples']} |"
            )
    origins = {
        f"{r['hardware']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; {r['date']}."
        for r in results
    }
    lines += [
        "",
        "Test NLL in nats on statically binarized MNIST, lower is better, importance-sampled; the "
        "standard error is over the 10,000 test images (seeds share them).",
        *sorted(origins),
        "",
        "Commands:",
        "",
        *(f"    {result['command']} --data_dir=DIR" for result in results),
    ]
    return "\n".join(lines) + "\n"


def _runs_of(cell: Cell, column: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a cell, whatever their seeds; where epochs differ, those with the most."""

    def identity(config: Config) -> dict[str, Any]:
        return dataclasses.replace(config, seed=0, epochs=None).identity()

    wanted = identity(cell.config)
    runs = [
        result
        for result in results
        if column in result["columns"] and identity(from_command(result["command"])) == wanted
    ]
    most = max((run["epochs"] for run in runs), default=0)
    return [run for run in runs if run["epochs"] == most]


def _mean_and_error(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean over seeds, with the error over test images, which seeds share: NaN for one image."""
    errors = [math.nan if r["nll_se"] is None else r["nll_se"] for r in runs]
    return statistics.mean(r["nll"] for r in runs), statistics.mean(errors)


def main(argv: list[str]) -> None:
    """Trains what the flags name."""
    start(argv)
    workdir = required_workdir()
    with distributed.processes(), stop_on_signal("to go on, give the same command again") as stop:
        check_path(workdir)
        table = _select(_TABLE.value, _COLUMNS.value)
        seeds = _parse_seeds(_SEEDS.value)
        overrides: dict[str, Any] = {"data_dir": _DATA_DIR.value}
        if _EPOCHS.value:
            overrides["epochs"] = _EPOCHS.value
        if _NLL_SAMPLES.value:
            overrides["nll_samples"] = _NLL_SAMPLES.value
        results, failed = sweep(table, seeds, workdir, stop, **overrides)
        total = len(results) + len(failed)
        if jax.process_index() == 0 and results:
            with hold(workdir, wait=True):  # Another sweep may write its columns.
                results = _write(_TABLE.value, results, workdir)
            print(json.dumps({"table": _TABLE.value, "results": results}))
        if failed:
            raise ValueError(f"{len(failed)} of {total} runs failed: {', '.join(failed)}")


def _write(
    number: int, results: list[dict[str, Any]], workdir: pathlib.Path
) -> list[dict[str, Any]]:
    """Writes the table of these results, and of those that it had; returns both."""
    table, path = TABLES[number], workdir / f"table{number}.json"
    results = _merge(read_json(path, list) or [], results)
    write_json(path, results)
    path.with_suffix(".md").write_text(to_markdown(table, results))
    columns = {}
    for column, cells in table.items():
        finished = [cell for cell in cells if _runs_of(cell, column, results)]
        if finished:
            runs = [_runs_of(cell, column, results) for cell in finished]
            nlls, errors = zip(*map(_mean_and_error, runs), strict=True)
            epochs = [seeds[0]["epochs"] for seeds in runs]
            depths, paper = zip(*((cell.depth, cell.paper_nll) for cell in finished), strict=True)
            columns[column] = (depths, nlls, errors, paper, epochs)
    plots.depth_curves(path.with_suffix(".png"), columns)
    return results


def _merge(before: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier results of a table and new ones; of a run that is in both, the new one."""
    earlier, new = (
        {run_name(from_command(result["command"])): result for result in part}
        for part in (before, results)
    )
    for key in earlier.keys() & new.keys():
        columns = dict.fromkeys([*earlier[key]["columns"], *new[key]["columns"]])
        new[key] = new[key] | {"columns": list(columns)}
    return list((earlier | new).values())


def _select(table: int, columns: list[str]) -> dict[str, list[Cell]]:
    if table not in TABLES:
        raise ValueError(f"--table must be one of {sorted(TABLES)}, got {table}")
    unknown = sorted(set(columns) - set(TABLES[table]))
    if unknown:
        raise ValueError(
            f"--columns of table {table} are {', '.join(TABLES[table])}; got {', '.join(unknown)}"
        )
    return {name: cells for name, cells in TABLES[table].items() if not columns or name in columns}


def _parse_seeds(values: list[str]) -> list[int]:
    seeds = [int(value) for value in values if value.strip().isdecimal()]
    if not seeds or len(set(seeds)) < len(values):
        raise ValueError(f"--seeds must be different whole numbers, got {','.join(values)!r}")
    return seeds


if __name__ == "__main__":
    app.run(main)
