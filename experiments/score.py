r"""Scores every row of a file under a trained run's model, say to find outliers.

    python -m experiments.score --workdir=RUN --input=rows.npz --output=scores.npz

The directory may be any that `led_jax.save` wrote; no data set is read. The output holds `nll`, an
importance-sampled estimate of -log p(x) in nats, and `error`, its Monte Carlo standard error, both
`[n]`. The last line on standard output is one JSON object.

A model that is conditional on labels or covariates also needs those of the rows: --context=ARRAY
names an array of the input file with class numbers `[n]` or covariates `[n, C]`.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags

import led_jax
from experiments.flags import (
    check_devices,
    errors_in_a_line,
    output_path,
    required_workdir,
    start,
)
from experiments.workdir import defined, read_json, whole
from led_jax import data, estimators
from led_jax.model import LED

flags.DEFINE_string("workdir", "", "Directory of the run.")
_INPUT = flags.DEFINE_string("input", "", "An .npz file with rows of data, [n, ...].")
_ARRAY = flags.DEFINE_string("array", "", "The array's name, where the file has several.")
_CONTEXT = flags.DEFINE_string("context", "", "The array of the rows' labels or covariates.")
_OUTPUT = flags.DEFINE_string("output", "", "The .npz file to write.")
_NLL_SAMPLES = flags.DEFINE_integer("nll_samples", 5000, "Importance samples a row.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the importance samples.", 0)


def main(argv: list[str]) -> None:
    """Scores the rows that the flags name."""
    start(argv)
    workdir = required_workdir()
    with errors_in_a_line():
        check_devices()
        output = output_path(_OUTPUT.value, (".npz",))
        led, params = led_jax.load(workdir)
        record = read_json(workdir / "result.json") or {}
        widths = [record.get(f"num_{what}", 0) for what in ("classes", "covariates")]
        path = pathlib.Path(_INPUT.value).expanduser()
        rows = read_rows(path, _ARRAY.value, led, params, max(widths))
        context = read_context(path, _CONTEXT.value, len(rows), *widths)
        with tqdm.tqdm(total=len(rows), unit="row", desc="nll") as bar:
            estimate = estimators.nll(
                led,
                params,
                jax.random.key(_SEED.value),
                rows,
                _NLL_SAMPLES.value,
                progress=bar.update,
                context=context,
            )
        with whole(output) as temporary, temporary.open("wb") as file:
            np.savez(file, nll=estimate.per_example, error=estimate.per_example_error)
    result = {
        "output": str(output),
        "rows": len(rows),
        "elbo": estimate.elbo,
        "nll": estimate.nll,
        "nll_se": defined(estimate.standard_error),
        "nll_monte_carlo_se": defined(estimate.monte_carlo_error),
        "nll_samples": _NLL_SAMPLES.value,
        "seed": _SEED.value,
    }
    print(json.dumps(result))


def read_context(
    path: pathlib.Path, name: str, num_rows: int, num_classes: int, num_covariates: int
) -> np.ndarray | None:
    """What a model is conditional on for every row, `[n, C]`; None for one without a context.

    Raises:
      ValueError: if the array's name is missing, or given for a model without a context, or the
        array does not hold such classes or covariates as the run's.
    """
    if not (num_classes or num_covariates):
        if name:
            raise ValueError("--context goes with a run of --condition=labels")
        return None
    if not name:
        raise ValueError("the model is conditional: name the array of its labels by --context")
    (array,) = data.read_npz(path, [name]).values()
    shape = (num_rows,) if num_classes else (num_rows, num_covariates)
    if array.shape != shape or (num_classes and array.dtype.kind not in "bui"):
        kind = "numbers of classes" if num_classes else "covariates"
        raise ValueError(f"{path}: {name} is {array.dtype} {array.shape}, expected {shape} {kind}")
    if not num_classes:
        return array.astype(np.float32)
    if not 0 <= array.min() <= array.max() < num_classes:
        raise ValueError(
            f"{path}: {name} has classes {array.min()} to {array.max()}, expected 0 to "
            f"{num_classes - 1}"
        )
    return np.eye(num_classes, dtype=np.float32)[array.astype(int)]


def read_rows(path: pathlib.Path, name: str, led: LED, params: Any, context_dim: int) -> np.ndarray:
    """The rows to score, `[n, D]`, in values that the model's likelihood takes.

    Raises:
      ValueError: if the file cannot be read or does not have the array, or its rows do not fit the
        model.
      FileNotFoundError: if there is no file.
    """
    names = data.names_of(path)
    if not name and len(names) != 1:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}: name one by --array")
    name = name or names[0]
    (array,) = data.read_npz(path, [name]).values()
    rows = data.check_rows(f"{path}: {name}", array, led.decoder.values)
    context = jnp.zeros(context_dim) if context_dim else None
    one = jax.eval_shape(lambda: led.sample(params, jax.random.key(0), (), context))
    size = one.shape[-1]
    if rows.shape[1] != size:
        raise ValueError(
            f"{path}: {name} has rows of {rows.shape[1]} entries, shape {list(array.shape)}; the "
            f"model takes {size}"
        )
    return rows


if __name__ == "__main__":
    app.run(main)
