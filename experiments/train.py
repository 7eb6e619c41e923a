r"""Trains a LED and reports its test NLL.

    python -m experiments.train                                    # digits, one to two minutes
    python -m experiments.train --dataset=binarized_mnist --data_dir=DIR --prior_depth=12
    python -m experiments.train --workdir=DIR                      # continue a run that was stopped

The last line on standard output is one JSON object, also in WORKDIR/result.json.
"""

import datetime
import json
import pathlib
import sys

import jax
from absl import app, flags

from experiments import distributed
from experiments.flags import config_from_flags, define_flags, start
from experiments.run import run
from experiments.signals import stop_on_signal

_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "Directory of the run; empty: a new one under runs/. The run in a directory that has one is "
    "continued from its newest checkpoint.",
)


def main(argv: list[str]) -> None:
    """Trains what the flags describe."""
    start(argv)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    workdir = pathlib.Path(_WORKDIR.value or f"runs/train-{stamp}").expanduser()
    advice = f"to go on: python -m experiments.train --workdir={workdir}"
    with distributed.processes(), stop_on_signal(advice) as stop:
        config = config_from_flags(workdir)
        if not _WORKDIR.value and jax.process_index() == 0:
            print(f"the run's directory: {workdir}", file=sys.stderr)
        result = run(config, workdir, stop)
        if jax.process_index() == 0:
            print(json.dumps(result | {"workdir": str(workdir)}))


if __name__ == "__main__":
    define_flags()
    app.run(main)
