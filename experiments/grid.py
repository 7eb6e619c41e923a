"""Grids of runs: every combination of some flags' values, and their table and figure."""

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import plots
from experiments.config import Config
from experiments.flags import config_beside, from_flags


def parse_grid(text: str) -> dict[str, list[str]]:
    """The values of each flag in "flag=value,value;flag=value", in order.

    If values contain commas, "|" separates them: "prior=nvp:depth=4,hidden=9|vamp".

    Raises:
      ValueError: if the text is anything else, or a flag or a value stands in it twice.
    """
    axes: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, rest = part.partition("=")
        if not equals or name in axes or name not in Config.__dataclass_fields__ or name == "seed":
            raise ValueError(
                f"--grid must be FLAG=VALUE,VALUE;FLAG=VALUE with different flags of "
                f"experiments.train other than --seed, which --seeds gives; got {part!r}"
            )
        values = [value.strip() for value in rest.split("|" if "|" in rest else ",")]
        values = [value for value in values if value]
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--grid must give {name} one or more different values, got {part!r}")
        axes[name] = values
    return axes


def configs(axes: Mapping[str, Sequence[str]], **overrides: Any) -> list[Config]:
    """A configuration for each combination; the last flag varies fastest.

    Args:
      axes: flag -> values.
      **overrides: fields of `Config` to set in every configuration, unless the axes name them.

    Raises:
      ValueError: if a combination is not a valid configuration, or two make the same run.
    """
    cells = []
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        config = from_flags([f"--{name}={value}" for name, value in given.items()])
        if config.prior_from:
            own = {name: getattr(config, name) for name in given}
            config = dataclasses.replace(config_beside(own), **own)
        others = {name: value for name, value in overrides.items() if name not in axes}
        cells.append(dataclasses.replace(config, **others))
    for one, other in itertools.combinations(cells, 2):
        if one.identity() == other.identity():
            raise ValueError(f"--grid has two combinations that are one run, {one.identity()}")
    return cells


def summary(
    axes: Mapping[str, Sequence[str]], cells: Sequence[Sequence[Mapping[str, Any] | None]]
) -> list[dict[str, Any]]:
    """A row for each combination: its values and the mean test NLL over seeds.

    Args:
      axes: flag -> values.
      cells: for each combination, the result of each seed, or None if it is missing.

    Returns:
      Rows of {"values": {flag: value}, "seeds", "nll", "nll_se"}: the number of seeds with a
      result, their mean NLL (None without any), and its standard error (None for fewer than two).
    """
    rows = []
    for values, results in zip(itertools.product(*axes.values()), cells, strict=True):
        nlls = [result["nll"] for result in results if result is not None]
        error = statistics.stdev(nlls) / math.sqrt(len(nlls)) if len(nlls) > 1 else None
        rows.append(
            {
                "values": dict(zip(axes, values, strict=True)),
                "seeds": len(nlls),
                "nll": statistics.mean(nlls) if nlls else None,
                "nll_se": error,
            }
        )
    return rows


def to_markdown(axes: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a summary in Markdown; flags with only one value are named above it."""
    varying = [name for name, values in axes.items() if len(values) > 1]
    fixed = [f"--{name}={values[0]}" for name, values in axes.items() if len(values) == 1]
    lines = [
        "Test NLL in nats, lower is better: mean and standard error over seeds."
        + (f" All with {' '.join(fixed)}." if fixed else ""),
        "",
        f"| {' | '.join([*varying, 'NLL', 'standard error', 'seeds'])} |",
        "|---" * (len(varying) + 3) + "|",
    ]
    for row in rows:
        nll = "not run" if row["nll"] is None else f"{row['nll']:.2f}"
        error = "" if row["nll_se"] is None else f"{row['nll_se']:.2f}"
        entries = [*(row["values"][name] for name in varying), nll, error, str(row["seeds"])]
        lines.append(f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |")
    return "\n".join(lines) + "\n"


def draw(
    path: pathlib.Path, axes: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Plots the NLL against the flag with most values, a line for each combination of others."""
    along = max(axes, key=lambda name: len(axes[name]))
    others = [name for name, values in axes.items() if len(values) > 1 and name != along]
    lines: dict[str, list[tuple[str, float, float]]] = {}
    for row in rows:
        if row["nll"] is not None:
            label = ", ".join(f"{name}={row['values'][name]}" for name in others)
            point = row["values"][along], row["nll"], row["nll_se"] or 0.0
            lines.setdefault(label, []).append(point)
    plots.grid_lines(path, along, axes[along], lines)
