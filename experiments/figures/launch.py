"""What the binaries that draw a figure share: their flags, and how a result is written."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from absl import app, flags

from experiments import provenance
from experiments.flags import check_devices, required_workdir, show_in_help, start
from experiments.workdir import whole, write_json


def define_flags() -> None:
    """Defines --workdir, --seed and --fast."""
    flags.DEFINE_string("workdir", "", "Directory to write to.")
    flags.DEFINE_integer("seed", 0, "Seed of everything random but the splits of data sets.", 0)
    flags.DEFINE_bool(
        "fast", False, "A short and coarse version, as a check that everything works."
    )
    for name in ("workdir", "seed", "fast"):
        show_in_help(name)


def launch(
    module: str,
    figure: str,
    run: Callable[[bool, int, pathlib.Path], dict[str, Any]],
    to_markdown: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Runs a binary: calls `run`, writes its result to WORKDIR/FIGURE.json and prints it.

    Args:
      module: name of the binary's module in `experiments`.
      figure: name of the figure, FIGURE.
      run: `(fast, seed, workdir) -> numbers`, which draws into `workdir`.
      to_markdown: makes the text of WORKDIR/FIGURE.md from the result; None writes no such file.
    """

    def main(argv: list[str]) -> None:
        start(argv)
        fast, seed = flags.FLAGS.fast, flags.FLAGS.seed
        workdir = required_workdir()
        command = f"python -m experiments.{module} --seed={seed}" + " --fast" * fast
        try:
            check_devices()
            workdir.mkdir(parents=True, exist_ok=True)
            numbers = run(fast, seed, workdir)
        except (ValueError, OSError, FloatingPointError) as error:
            raise SystemExit(f"error: {error}") from error
        result: dict[str, Any] = numbers | {"seed": seed} | provenance.origin(command)
        write_json(workdir / f"{figure}.json", result)
        if to_markdown is not None:
            with whole(workdir / f"{figure}.md") as path:
                path.write_text(to_markdown(result))
        print(json.dumps(result))

    app.run(main)
