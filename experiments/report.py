r"""Describes all finished runs in a directory: a table, and each run's curves and samples.

    python -m experiments.report --runs=DIR

Writes report.md, and report.html, one page with its pictures in it, into the directory. The last
line on standard output is one JSON object that says where they are.
"""

import base64
import html
import json
import pathlib
from typing import Any

from absl import app, flags

from experiments.config import FREE, Config
from experiments.flags import errors_in_a_line, start
from experiments.workdir import read_json, whole

_RUNS = flags.DEFINE_string("runs", "", "Directory that holds the runs, at any depth.")

_PICTURES = ("curves", "samples", "reconstructions")
_NUMBERS = {"nll": ".2f", "nll_se": ".2f", "test_elbo": ".2f", "valid_elbo": ".2f"}
_UNITS = "In nats; valid_elbo is of the validation split, the others are of the test split."
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
:root { color-scheme: light dark; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85em; }
th, td { border: 1px solid #8888; padding: .2em .6em; text-align: right; }
img { max-width: 100%; background: white; margin: .3em 0; }
code { overflow-wrap: anywhere; }
"""


def find(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of the finished runs in a directory, by their paths from there.

    Raises:
      ValueError: if there is none, or one cannot be read.
    """
    runs = {
        str(path.parent.relative_to(directory)): read_json(path)
        for path in sorted(directory.rglob("result.json"))
    }
    if not runs:
        raise ValueError(f"--runs={directory} holds no finished run: no result.json in it")
    return runs


def table(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A header and a row for each run: the flags in which runs differ, then what was measured."""
    names = [name for name in Config().report() if name not in FREE]
    varying = [
        name for name in names if len({str(result.get(name)) for result in runs.values()}) > 1
    ]
    rows = [["run", *varying, *_NUMBERS, "best_epoch", "seconds_train"]]
    for run, result in runs.items():
        flags_ = (str(result.get(name, "")) for name in varying)
        measured = ((result.get(name), style) for name, style in _NUMBERS.items())
        numbers = ("-" if value is None else format(value, style) for value, style in measured)
        seconds = f"{result['seconds_train']:.0f}"
        rows.append([run, *flags_, *numbers, str(result["best_epoch"]), seconds])
    return rows


def to_markdown(runs: dict[str, dict[str, Any]], directory: pathlib.Path) -> str:
    """The report, with links to the pictures."""
    header, *rows = table(runs)
    lines = ["# Runs", "", _UNITS, ""]
    for row in (header, ["---"] * len(header), *rows):
        lines.append(f"| {' | '.join(entry.replace('|', '/') for entry in row)} |")
    for run, result in runs.items():
        lines += ["", f"## {run}", "", f"    {result['command']}", ""]
        lines += [f"![{name}](<{run}/{name}.png>)" for name in _pictures(directory / run)]
    return "\n".join(lines) + "\n"


def to_html(runs: dict[str, dict[str, Any]], directory: pathlib.Path) -> str:
    """The report as one page with its pictures in it."""
    header, *rows = (
        "".join(f"<{tag}>{html.escape(entry)}</{tag}>" for entry in row)
        for tag, row in zip(["th", *["td"] * len(runs)], table(runs), strict=True)
    )
    body = "".join(f"<tr>{row}</tr>\n" for row in (header, *rows))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Runs</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>Runs</h1>",
        f"<p>{_UNITS}</p>",
        f"<div><table>{body}</table></div>",
    ]
    for run, result in runs.items():
        command = html.escape(result["command"])
        parts.append(f"<h2>{html.escape(run)}</h2><p><code>{command}</code></p>")
        for name in _pictures(directory / run):
            data = base64.b64encode((directory / run / f"{name}.png").read_bytes()).decode()
            parts.append(f"<img alt={name} src='data:image/png;base64,{data}'>")
    return "\n".join(parts) + "\n"


def _pictures(run: pathlib.Path) -> list[str]:
    return [name for name in _PICTURES if (run / f"{name}.png").exists()]


def main(argv: list[str]) -> None:
    """Writes the report on the runs that the flag names."""
    start(argv)
    if not _RUNS.value:
        raise app.UsageError("--runs is required")
    directory = pathlib.Path(_RUNS.value).expanduser()
    with errors_in_a_line():
        runs = find(directory)
        written = []
        for name, text in (
            ("report.md", to_markdown(runs, directory)),
            ("report.html", to_html(runs, directory)),
        ):
            with whole(directory / name) as temporary:
                temporary.write_text(text)
            written.append(str(directory / name))
        print(json.dumps({"runs": len(runs), "written": written}))


if __name__ == "__main__":
    app.run(main)
