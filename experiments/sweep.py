r"""Trains the cells of a grid of flags, or of a table, and writes their table.

    python -m experiments.sweep --grid="prior_depth=0,4,8;prior_transformer=affine,additive" \
        --seeds=0,1,2 --workdir=DIR
    python -m experiments.sweep --table=1 --columns=mlp_prior,mlp_posterior --data_dir=DIR \
        --workdir=DIR
    python -m experiments.sweep --table=priors --seeds=0,1 --data_dir=DIR --workdir=DIR

Cells that are finished in the work directory are not trained again; stopped ones are continued. If
a cell fails, the others are still trained; the failed ones are named at the end, with status 1.

For a grid, grid.json, grid.md and grid.png cover all of its cells that are finished in the
directory, so that shards (--shard=1/2, --shard=2/2) with the same directory make one table. For
table N, the files are tableN.json (a list of experiments.train's objects), tableN.md, tableN.png
and, if the results have the parts of the bound, tableN_nats.png with these; for --table=priors,
they are priors.json, priors.md and priors.png, which has the parts of the bound. Earlier results of
other cells are kept. The last line on standard output is one JSON object with the results.

--executor=local trains --parallel_cells cells at a time, each in a process of its own, and
--executor=slurm trains them in an array of jobs; --submitit=timeout_min=600,slurm_partition=gpu
passes parameters to submitit.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import shlex
import statistics
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import app, flags

from experiments import distributed, executors, grid, plots
from experiments.config import Config
from experiments.flags import from_command, required_workdir, start, to_command
from experiments.signals import Stop, stop_on_signal
from experiments.workdir import check_path, hold, read_json, whole, write_json


class Cell(NamedTuple):
    """One cell of a table: the paper's test NLL in nats, if it has one, and what to train for it.

    `depth` is the place on the column's curve, or None in a table of alternatives.
    """

    depth: int | None
    paper_nll: float | None
    config: Config


_MNIST = Config(dataset="binarized_mnist", prior_depth=0)
# Weight normalization as in an author's later code: github.com/CW-Huang/torchkit.
_RESCONV = Config(dataset="binarized_mnist", network="resconv", weight_norm=True, epochs=100)


def _prior(depth: int, paper_nll: float) -> Cell:
    return Cell(depth, paper_nll, dataclasses.replace(_MNIST, prior_depth=depth))


def _posterior(depth: int, paper_nll: float) -> Cell:
    # 1,000 samples, because a MADE posterior costs five times the decoder. On average, an NLL of
    # fewer samples is only higher.
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

# A prior and a posterior of each kind; flows are of equal depth.
_PRIORS = {
    "normal": {},
    "mixture": {"prior": "mixture_of_normals:num_components=500"},
    "data_subset": {"prior": "data_subset:num_components=500"},
    "vamp": {"prior": "vamp:num_components=500"},
    "resampled": {"prior": "resampled"},
    "nice": {"prior": "nvp:depth=4,transformer=additive"},
    "nvp": {"prior": "nvp:depth=4"},
    "nvp_lu": {"prior": "nvp:depth=4,mixing=lu(event_shape=50)"},
    "nvp_householder": {"prior": "nvp:depth=4,mixing=householder(event_shape=50)"},
    "nvp_of_mixture": {
        "prior": "transformed:base=mixture_of_normals(event_shape=50,num_components=10),"
        "flow=real_nvp(event_shape=50,depth=4)"
    },
    "nvp_spline": {"prior": "nvp:depth=4,transformer=rational_quadratic"},
    "made": {"prior": "made:depth=4,hidden=100,transformer=affine"},
    "made_sigmoids": {"prior": "made:depth=4,hidden=100,transformer=deep_sigmoid"},
    "normal_mmd": {"objective": "mmd"},
    "normal_adversarial": {"objective": "adversarial"},
}
_POSTERIORS = {
    "gaussian": {},
    "full_covariance": {"posterior": "lu"},
    "planar": {"posterior": "planar:depth=4"},
    "radial": {"posterior": "radial:depth=4"},
    "sylvester_orthogonal": {"posterior": "orthogonal_sylvester:depth=4,num_columns=16"},
    "sylvester_householder": {"posterior": "householder_sylvester:depth=4"},
    "sylvester_triangular": {"posterior": "triangular_sylvester:depth=4"},
    "nice": {"posterior": "nvp:depth=4,transformer=additive"},
    "nvp": {"posterior": "nvp:depth=4"},
    "nvp_lu": {"posterior": "nvp:depth=4,mixing=lu(event_shape=50)"},
    "made": {"posterior": "made:depth=4,hidden=512x512"},
    "auxiliary": {
        "posterior": "auxiliary:num_auxiliary=10,"
        "flow=real_nvp(event_shape=60,depth=4,context_dim=50),"
        "reverse=transformed(base=standard_normal(event_shape=10),"
        "flow=invert(flow=iaf(event_shape=10,depth=1,hidden=100,transformer=affine,context_dim=100)))"
    },
}


def _alternatives(rows: dict[str, dict[str, Any]], **common: Any) -> dict[str, list[Cell]]:
    """A table of models that differ in one part, with a column for each."""
    like = Config(dataset="binarized_mnist", prior="standard_normal", epochs=200, **common)
    return {
        name: [Cell(None, None, dataclasses.replace(like, **row))] for name, row in rows.items()
    }


TABLES = {
    "1": {
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
    "2": {
        "resconv_nvp": [_resconv(4, 81.81, "nvp", 4), _resconv(8, 81.55, "nvp", 8)],
        "resconv_made": [
            _resconv(8, 80.81, "made", 8),
            # At the default rate it diverged within its first epoch.
            _resconv(16, 80.60, "made", 16, learning_rate=5e-4, clip_norm=100.0),
        ],
    },
    "priors": _alternatives(_PRIORS),
    "posteriors": _alternatives(_POSTERIORS, posterior_context=50, matching_samples=500),
}
"""Table -> column -> cells: tables of Huang et al. (2017), and other priors and posteriors."""

_MAX_NAME = 150  # Of the 255 bytes that file systems allow.

_TABLE = flags.DEFINE_string("table", "1", "1 or 2, of the paper; priors or posteriors.")
_COLUMNS = flags.DEFINE_list("columns", [], "Columns to train; empty: all of the table's.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every cell.")
_EPOCHS = flags.DEFINE_integer("epochs", 0, "Epochs of every cell; 0: each cell's own.", 0)
_NLL_SAMPLES = flags.DEFINE_integer(
    "nll_samples",
    0,
    "Importance samples; 0: each cell's own. It does not change --matching_samples.",
    0,
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Directory of the data, as for experiments.train.")
flags.DEFINE_string("workdir", "", "Directory of the sweep.")
_GRID = flags.DEFINE_string(
    "grid",
    "",
    "FLAG=VALUE,VALUE;FLAG=VALUE: every combination of these flags of experiments.train, in place "
    "of --table. Where a value has commas of its own, | separates the values.",
)
_SHARD = flags.DEFINE_string("shard", "1/1", "K/N: only every N-th cell, from the K-th on.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print each cell's command, and train nothing.")
_EXECUTOR = flags.DEFINE_enum(
    "executor",
    "here",
    ["here", "local", "slurm"],
    "Where cells are trained: in this process, or in jobs that submitit starts.",
)
_PARALLEL_CELLS = flags.DEFINE_integer("parallel_cells", 1, "Jobs at a time.", 1)
_SUBMITIT = flags.DEFINE_list("submitit", [], "NAME=VALUE of parameters of submitit's executor.")


def sweep(
    table: dict[str, list[Cell]],
    seeds: list[int],
    workdir: pathlib.Path,
    stop: Stop | None = None,
    execute: executors.Executor = executors.here,
    **overrides: Any,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Trains every cell of a table with every seed.

    Args:
      table: cells by column; a cell that stands in several columns is trained once.
      seeds: seeds of each cell.
      workdir: directory with one run's directory for each cell and seed.
      stop: as in `run`.
      execute: the executor that trains them.
      **overrides: fields of `Config` to set in every cell.

    Returns:
      The result of each finished run, to which "paper_nll" and "columns" are added (in processes
      other than the first, it has only these two); and the names of the runs that failed.
    """
    runs: dict[str, tuple[Cell, Config, list[str]]] = {}
    for column, cells in table.items():
        for cell in cells:
            for seed in seeds:
                config = dataclasses.replace(cell.config, seed=seed, **overrides)
                runs.setdefault(run_name(config), (cell, config, []))[2].append(column)
    results, failed = execute(
        {name: config for name, (_, config, _) in runs.items()}, workdir, stop
    )
    return [
        result | {"paper_nll": runs[name][0].paper_nll, "columns": runs[name][2]}
        for name, result in results.items()
    ], failed


def run_name(config: Config) -> str:
    """The name of a run's directory: the fields of `Config.identity` with their values.

    It has at most `_MAX_NAME` characters: in a longer one, a hash of the whole replaces the end.
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
    """The table, means over seeds: ours beside the paper's, or alternatives with their parts.

    Cells without a result say so.
    """
    is_of_paper = any(cell.depth is not None for cells in table.values() for cell in cells)
    lines = _beside_the_paper(table, results) if is_of_paper else _with_parts(table, results)
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


def _beside_the_paper(table: dict[str, list[Cell]], results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| column | L | paper | led_jax | standard error | beaten by | seeds | epochs | samples |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for column, cells in table.items():
        for cell in cells:
            runs, paper = _runs_of(cell, column, results), cell.paper_nll
            row = f"| {column} | {cell.depth} | {_known(paper)} "
            if not runs:
                lines.append(row + "| not run |" + " |" * 5)
                continue
            nll, error = _mean_and_error(runs)
            lines.append(
                f"{row}| {nll:.2f} | {error:.2f} | {_known(paper and paper - nll)} | {len(runs)} "
                f"| {runs[0]['epochs']} | {runs[0]['nll_samples']} |"
            )
    return lines


def _with_parts(table: dict[str, list[Cell]], results: list[dict[str, Any]]) -> list[str]:
    """Models that differ in one part, with the parts of their bounds.

    The standard error is the one over test images; beside it is that of the mean over seeds.
    """
    names = ("reconstruction", "I(x; z)", "KL(q(z) || p(z))")
    titles = [name.replace("||", "to") for name in names]
    columns = ["model", "NLL", "standard error", "over seeds", "-ELBO", *titles, "active units"]
    columns += ["seeds", "epochs", "samples"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for column, (cell,) in table.items():
        runs = _runs_of(cell, column, results)
        if not runs:
            lines.append(f"| {column} | not run |" + " |" * (len(columns) - 2))
            continue
        nll, error = _mean_and_error(runs)
        nlls, parts = zip(*_nats(runs), strict=True)
        of_seeds = statistics.stdev(nlls) / math.sqrt(len(nlls)) if len(nlls) > 1 else None
        means = [
            statistics.mean(part[name] for part in parts)
            if all(name in part for part in parts)
            else None
            for name in names
        ]
        bound = -statistics.mean(run["test_elbo"] for run in runs)
        units = statistics.mean(run["active_units"] for run in runs)
        numbers = [nll, error, of_seeds, bound, *means]
        lines.append(
            f"| {column} | {' | '.join(map(_known, numbers))} | {units:g} | {len(runs)} "
            f"| {runs[0]['epochs']} | {runs[0]['nll_samples']} |"
        )
    return lines


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _runs_of(cell: Cell, column: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a cell with any seeds; if they differ in epochs, those with the most."""

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
    """The mean NLL over seeds, and its standard error over test images: NaN for one image.

    All seeds share the test images, so that more seeds do not reduce the error.
    """
    errors = [math.nan if r["nll_se"] is None else r["nll_se"] for r in runs]
    return statistics.mean(r["nll"] for r in runs), statistics.mean(errors)


def main(argv: list[str]) -> None:
    """Trains what the flags name."""
    start(argv)
    workdir = required_workdir()
    with distributed.processes(), stop_on_signal("to go on, give the same command again") as stop:
        check_path(workdir)
        seeds = _parse_seeds(_SEEDS.value)
        overrides: dict[str, Any] = {"data_dir": _DATA_DIR.value}
        if _EPOCHS.value:
            overrides["epochs"] = _EPOCHS.value
        if _NLL_SAMPLES.value:
            overrides["nll_samples"] = _NLL_SAMPLES.value
        execute = _executor()
        if _GRID.value:
            if _COLUMNS.value:
                raise ValueError("--columns are those of a --table: it does not go with --grid")
            total, failed = _sweep_grid(_GRID.value, seeds, workdir, stop, execute, overrides)
        else:
            table = _select(_TABLE.value, _COLUMNS.value)
            results, failed = sweep(table, seeds, workdir, stop, execute, **overrides)
            total = len(results) + len(failed)
            if jax.process_index() == 0 and results:
                with hold(workdir, wait=True):  # Another sweep may write its columns.
                    results = _write(_TABLE.value, results, workdir)
                print(json.dumps({"table": _TABLE.value, "results": results}))
        if failed:
            raise ValueError(f"{len(failed)} of {total} runs failed: {', '.join(failed)}")


def _executor() -> executors.Executor:
    """The executor that --executor, --shard and --dry_run describe."""
    first, _, count = _SHARD.value.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--shard must be K/N with K from 1 to N, got {_SHARD.value!r}")
    options: dict[str, Any] = {}
    for text in _SUBMITIT.value:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--submitit must be NAME=VALUE,NAME=VALUE, got {text!r}")
        options[name] = int(value) if value.isdecimal() else value
    execute: executors.Executor = executors.here
    if _DRY_RUN.value:
        execute = _print_commands
    elif _EXECUTOR.value != "here":
        if jax.distributed.is_initialized():
            raise ValueError(f"--executor={_EXECUTOR.value} takes one process, not --num_processes")
        execute = executors.submitted(_EXECUTOR.value, _PARALLEL_CELLS.value, options)

    def execute_shard(
        runs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop | None
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        own = list(runs.items())[int(first) - 1 :: int(count)]
        return execute(dict(own), workdir, stop)

    return execute_shard


def _print_commands(
    runs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    for name, config in runs.items():
        where = {"data_dir": config.data_dir, "workdir": workdir / name}
        flags_ = (f"--{flag}={shlex.quote(str(path))}" for flag, path in where.items() if str(path))
        print(to_command(config), *flags_)
    return {}, []


def _sweep_grid(
    text: str,
    seeds: list[int],
    workdir: pathlib.Path,
    stop: Stop | None,
    execute: executors.Executor,
    overrides: Mapping[str, Any],
) -> tuple[int, list[str]]:
    """Trains a grid and writes its table; returns the number of runs, and names of failed ones."""
    axes = grid.parse_grid(text)
    cells = [
        [dataclasses.replace(config, seed=seed) for seed in seeds]
        for config in grid.configs(axes, **overrides)
    ]
    runs = {run_name(config): config for cell in cells for config in cell}
    results, failed = execute(runs, workdir, stop)
    if jax.process_index() == 0 and (results or failed):
        with hold(workdir, wait=True):  # Another shard may write it.
            found = [
                [executors.finished_there(config, workdir / run_name(config)) for config in cell]
                for cell in cells
            ]
            rows = grid.summary(axes, found)
            written = [result for cell in found for result in cell if result is not None]
            write_json(workdir / "grid.json", {"rows": rows, "results": written})
            with whole(workdir / "grid.md") as path:
                path.write_text(grid.to_markdown(axes, rows))
            grid.draw(workdir / "grid.png", axes, rows)
        print(json.dumps({"grid": text, "rows": rows, "results": written}))
    return len(results) + len(failed), failed


def _write(name: str, results: list[dict[str, Any]], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Writes the table of these results and of those already in its file; returns both."""
    table, stem = TABLES[name], f"table{name}" if name.isdecimal() else name
    path = workdir / f"{stem}.json"
    results = _merge(read_json(path, list) or [], results)
    write_json(path, results)
    path.with_suffix(".md").write_text(to_markdown(table, results))
    columns, bars = {}, {}
    for column, cells in table.items():
        finished = [cell for cell in cells if _runs_of(cell, column, results)]
        runs = [_runs_of(cell, column, results) for cell in finished]
        for cell, seeds in zip(finished, runs, strict=True):
            if all("test_kl" in result for result in seeds):  # Those of older versions have none.
                bars[column if cell.depth is None else f"{column}, {cell.depth}"] = _nats(seeds)
        if finished and finished[0].depth is not None:
            nlls, errors = zip(*map(_mean_and_error, runs), strict=True)
            epochs = [seeds[0]["epochs"] for seeds in runs]
            depths, paper = zip(*((cell.depth, cell.paper_nll) for cell in finished), strict=True)
            columns[column] = (depths, nlls, errors, paper, epochs)
    if columns:
        plots.depth_curves(path.with_suffix(".png"), columns)
    if bars:
        plots.nats(workdir / (f"{stem}_nats.png" if columns else f"{stem}.png"), bars)
    return results


def _nats(results: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """Each seed's test NLL, and the parts of its negative bound."""
    nats = []
    for result in results:
        kl, information = result["test_kl"], result["mutual_information"]
        parts = {"reconstruction": -result["test_elbo"] - kl}
        if information is None:
            parts["KL(q(z|x) || p(z))"] = kl
        else:
            parts |= {"I(x; z)": information, "KL(q(z) || p(z))": kl - information}
        nats.append((result["nll"], parts))
    return nats


def _merge(before: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins earlier and new results of a table; of a run that is in both, it takes the new one."""
    earlier, new = (
        {run_name(from_command(result["command"])): result for result in part}
        for part in (before, results)
    )
    for key in earlier.keys() & new.keys():
        columns = dict.fromkeys([*earlier[key]["columns"], *new[key]["columns"]])
        new[key] = new[key] | {"columns": list(columns)}
    return list((earlier | new).values())


def _select(table: str, columns: list[str]) -> dict[str, list[Cell]]:
    if table not in TABLES:
        raise ValueError(f"--table must be one of {', '.join(TABLES)}, got {table}")
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
