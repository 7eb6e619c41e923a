r"""Measures the library's speed against this machine's matrix products and against its peers.

    python -m experiments.benchmark [--cells=mlp,prior12,post4,resconv,...] [--peers=torch,distrax]
        [--rounds=5] [--nll_rows=200] [--output=FILE.json]
    python -m experiments.benchmark --suite=flows [--cells=coupling4,made4,sequential8,...]
        [--peers=flowjax,numpyro,distrax] [--rounds=5] [--output=FILE.json]
    python -m experiments.benchmark --suite=inference [--cells=mean_field,full_rank,iaf3]
        [--peers=flowjax,numpyro] [--rounds=5] [--output=FILE.json]

The suite `training` times training steps, compilation and the NLL; the suite `flows` times stacks
of flow layers; the suite `inference` times whole fits to a posterior. The sides of a comparison
take turns in one process, and ratios are of medians over the rounds, so that any other load on the
machine affects all sides alike.
The last line on standard output is one JSON object; --output also writes it to FILE.json and as
tables to FILE.md.
"""

import datetime
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pathlib
from typing import Any

import jax
from absl import app, flags

from experiments import provenance
from experiments.benchmark import flow_suite, inference_suite, training_suite
from experiments.benchmark.measuring import say, sgemm_gflops
from experiments.workdir import write_json

_SUITES = {"training": training_suite, "flows": flow_suite, "inference": inference_suite}
_SGEMM_SHAPES = (
    *((n, n, n) for n in (1024, 2048, 3072, 4096)),
    (1024, 4096, 1024),
    (4096, 1024, 4096),
)

_SUITE = flags.DEFINE_enum("suite", "training", list(_SUITES), "What to measure.")
_CELLS = flags.DEFINE_list("cells", None, "Models or stacks of the suite; all of them by default.")
_PEERS = flags.DEFINE_list(
    "peers", None, "Libraries to compare with; all of the suite's by default."
)
_ROWS = flags.DEFINE_integer("rows", 10_000, "Images an epoch; a step takes 100.", 100)
_ROUNDS = flags.DEFINE_integer(
    "rounds",
    5,
    "Timed turns of each side; except in the suite inference, a turn before them warms up.",
    1,
)
_NLL_ROWS = flags.DEFINE_integer(
    "nll_rows",
    200,
    "Number of test images, of 10,000, whose NLL is estimated.",
    40,
    training_suite.TEST_ROWS,
)
_OUTPUT = flags.DEFINE_string("output", "", "FILE.json to write, beside FILE.md.")
flags.register_validator(
    "output", lambda path: not path or path.endswith(".json"), message="must end in .json"
)


@flags.multi_flags_validator(["suite", "cells", "peers"])
def _known(values: dict[str, Any]) -> bool:
    suite = _SUITES[values["suite"]]
    for flag, names in (("cells", suite.CELLS), ("peers", suite.PEERS)):
        if unknown := set(values[flag] or ()) - set(names):
            raise flags.ValidationError(
                f"--{flag}: expected some of {','.join(names)} for the suite {values['suite']}, "
                f"got {','.join(sorted(unknown))}"
            )
    return True


def to_markdown(result: dict[str, Any]) -> str:
    """A suite's tables, with the command, versions and hardware behind them."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    sections = [
        "# Benchmark",
        f"`{result['command']}` on {result['date']}; {result['hardware']}; {versions}.",
        f"Medians over {result['rounds']} rounds; in each, every side has its turn. Load average "
        f"of the machine before: {result['load_average']:.1f}. Peak of the float32 matrix "
        f"product: {result['sgemm_gflops']:.0f} GFLOP/s; where a table has its share, it was "
        "measured again beside every cell.",
        _SUITES[result["suite"]].to_markdown(result),
    ]
    return "\n\n".join(sections) + "\n"


def _installed(peer: str) -> bool:
    if importlib.util.find_spec(peer) is None:
        say(f'{peer} is not installed, so it is left out: pip install "led_jax[bench]"')
        return False
    if peer == "torch" and jax.default_backend() != "cpu":
        import torch  # pyright: ignore[reportMissingImports]

        if not torch.cuda.is_available():
            say("torch is left out: JAX computes on an accelerator, this torch cannot")
            return False
    return True


def main(argv: list[str]) -> None:
    """Runs the suite that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_enable_compilation_cache", False)  # Else compiling may read a file.
    output = pathlib.Path(_OUTPUT.value).expanduser()
    suite = _SUITES[_SUITE.value]
    cells = suite.CELLS if _CELLS.value is None else _CELLS.value
    peers = suite.PEERS if _PEERS.value is None else _PEERS.value
    given = [
        f"--{flag.name}={','.join(flag.value) if isinstance(flag.value, list) else flag.value}"
        for flag in (_SUITE, _CELLS, _PEERS, _ROWS, _ROUNDS, _NLL_ROWS)
        if flag.value != flag.default
    ]
    peers = [peer for peer in peers if _installed(peer)]
    result = {
        "command": " ".join(["python -m experiments.benchmark", *given]),
        "suite": _SUITE.value,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": provenance.versions() | {p: importlib.metadata.version(p) for p in peers},
        "hardware": provenance.hardware(),
        "load_average": os.getloadavg()[0],
    }
    if result["load_average"] > 0.5:
        say(f"warning: a load of {result['load_average']:.1f} is on this machine already")
    if _OUTPUT.value:
        output.parent.mkdir(parents=True, exist_ok=True)
    by_shape = {shape: sgemm_gflops(shape)() for shape in _SGEMM_SHAPES}
    sgemm_shape = max(by_shape, key=lambda shape: by_shape[shape])
    say(f"sgemm: {by_shape[sgemm_shape]:.0f} GFLOP/s at {sgemm_shape}")
    result |= {"sgemm_gflops": by_shape[sgemm_shape], "sgemm_shape": sgemm_shape}
    options = {
        "rounds": _ROUNDS.value,
        "rows": _ROWS.value,
        "nll_rows": _NLL_ROWS.value,
        "sgemm_shape": sgemm_shape,
    }
    of_suite = inspect.signature(suite.measure).parameters
    result |= suite.measure(
        list(cells), peers, **{name: options[name] for name in options if name in of_suite}
    )
    say(to_markdown(result))
    if _OUTPUT.value:
        write_json(output, result)
        output.with_suffix(".md").write_text(to_markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
