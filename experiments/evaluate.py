r"""Estimates the NLL of a trained run's best state.

    python -m experiments.evaluate --workdir=DIR [--split=test] [--nll_samples=5000] [--classify]

With --classify, for a run with --condition=labels, also reports the accuracy of the classifier that
Bayes's rule gives for p(x|c) and the label frequencies of the training split.

The last line on standard output is one JSON object.
"""

import dataclasses
import json

import jax
import numpy as np
from absl import app, flags

from experiments import distributed
from experiments.flags import required_workdir, start
from experiments.run import bayes_accuracy, estimate_nll, load_run
from experiments.workdir import defined, read_config
from led_jax import data, sharding

flags.DEFINE_string("workdir", "", "Directory of the run, which every process reads.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Rows to evaluate.")
_NLL_SAMPLES = flags.DEFINE_integer("nll_samples", 5000, "Importance samples a row.", 1)
_CLASSIFY = flags.DEFINE_bool("classify", False, "Also score each row under every class.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where the data are, if no longer where they were.")


def main(argv: list[str]) -> None:
    """Evaluates the run that the flags name."""
    start(argv)
    workdir = required_workdir()
    with distributed.processes():
        config = read_config(workdir)
        if config is None:
            raise ValueError(f"{workdir} is not a run's directory; train one with --workdir first")
        config = dataclasses.replace(
            config,
            nll_samples=_NLL_SAMPLES.value,
            data_dir=_DATA_DIR.value or config.data_dir,
        )
        task, best = load_run(config, workdir)
        if task.dataset.prepare is not data.cast and _SPLIT.value == "train":
            raise ValueError("--split=train has no NLL where it is binarized afresh for every step")
        placement = sharding.Placement(sharding.make_mesh())
        context = task.dataset.context
        if _CLASSIFY.value and (context is None or context["train"].dtype != np.uint8):
            raise ValueError("--classify needs a run with --condition=labels, and labels [n]")
        estimate = estimate_nll(task, placement, best.eval_params, _SPLIT.value)
        result = {
            "dataset": config.dataset,
            "split": _SPLIT.value,
            "epoch": int(best.epoch),
            "elbo": estimate.elbo,
            "nll": estimate.nll,
            "nll_se": defined(estimate.standard_error),
            "nll_monte_carlo_se": defined(estimate.monte_carlo_error),
            "nll_samples": config.nll_samples,
            "seed": config.seed,
        }
        if _CLASSIFY.value:
            result["accuracy"] = bayes_accuracy(task, placement, best.eval_params, _SPLIT.value)
        if jax.process_index() == 0:
            print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
