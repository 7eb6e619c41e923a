"""A run of p(x|c): trained, evaluated, loaded, and its classes told apart."""

import numpy as np
import pytest
from support import KEY

import led_jax
from experiments.config import Config
from experiments.run import bayes_accuracy, load_run, run
from experiments.trainer import make_placement
from led_jax import estimators

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_a_run_conditional_on_labels(tmp_path):
    """Three patterns with one pixel in twenty flipped."""
    rng = np.random.default_rng(0)
    labels, patterns = rng.integers(0, 3, 300), rng.integers(0, 2, (3, 4, 3)).astype(bool)
    train = patterns[labels] ^ (rng.random((300, 4, 3)) < 0.05)
    np.savez(tmp_path / "own.npz", train=train, train_labels=labels)
    config = Config(
        dataset="own.npz",
        data_dir=str(tmp_path),
        condition="labels",
        epochs=8,
        batch_size=20,
        learning_rate=1e-2,
        latent_dim=2,
        prior_depth=1,
        prior_hidden=(4,),
        posterior_depth=1,
        posterior_hidden=(4,),
        posterior_context=2,
        nll_samples=20,
    )
    result = run(config, tmp_path / "run")
    assert (result["num_classes"], result["num_covariates"]) == (3, 0)
    assert (tmp_path / "run" / "samples.png").exists()
    task, best = load_run(config, tmp_path / "run")
    assert bayes_accuracy(task, make_placement(config), best.eval_params, "test") > 0.9
    # What was saved reads the class: under another one the rows are less probable.
    led, params = led_jax.load(tmp_path / "run")
    x, context = task.dataset.rows("test")
    own, others = (
        estimators.nll(led, params, KEY, x, 20, context=c).nll
        for c in (context, np.roll(context, 1, 1))
    )
    assert own + 3 < others
    # So does its prior's flow.
    z = np.zeros((3, 2), np.float32)
    assert len(np.unique(led.prior_log_prob(params, z, np.eye(3)))) == 3
