import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from experiments.config import Config
from experiments.figures.marginal_matching import moments, run
from experiments.run import run as train
from led_jax.encoders import Encoding

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

TINY = Config(epochs=1, latent_dim=3, prior_depth=1, prior_hidden=(4,), nll_samples=3)


def test_the_terms_add_up_and_tie_to_the_bound(tmp_path):
    trained = train(TINY, tmp_path / "trained")
    numbers = run([tmp_path / "trained"] * 2, "", 400, 0, tmp_path)
    (first, second) = numbers["runs"]
    assert first == second and numbers["num_samples"] == 400
    assert first["mutual_information"] + first["marginal_kl"] == pytest.approx(first["kl"])
    assert first["kl_all_rows"] == pytest.approx(first["kl"], abs=4 * first["kl_se"] + 0.05)
    elbo = first["log_likelihood"] - first["kl"]
    assert first["train_elbo"] == pytest.approx(elbo, abs=4 * first["log_likelihood_se"] + 0.2)
    assert 0 <= first["mutual_information"] <= first["log_num_rows"] == math.log(1297)
    # After an epoch the prior is nearly N(0, I), which is no closer to q(z) than the best normal.
    normal = first["marginal_kl_of_best_normal"]
    assert 0 < normal < first["marginal_kl"] + 4 * first["marginal_kl_se"] + 0.05
    assert first["test_nll"] == trained["nll"]
    assert first["test_inference_gap"] == -trained["test_elbo"] - trained["nll"]
    assert (tmp_path / "marginal_matching.png").stat().st_size > 1000


def test_moments_of_a_mixture_are_those_of_its_draws():
    rng = np.random.default_rng(0)
    mean, log_std = rng.normal(size=(5, 2)), rng.normal(size=(5, 2)) - 1
    covariance, log_posterior = moments(Encoding(mean, log_std, None))
    draws = mean + np.exp(log_std) * rng.normal(size=(200_000, 5, 2))
    np.testing.assert_allclose(covariance, np.cov(draws.reshape(-1, 2).T), rtol=0.02)
    expected = stats.norm.logpdf(draws, mean, np.exp(log_std)).sum(-1).mean()
    assert log_posterior == pytest.approx(expected, abs=0.01)


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent holds no finished run"):
        run([tmp_path / "absent"], "", 10, 0, tmp_path)
    with pytest.raises(ValueError, match="--runs must name the directory"):
        run([], "", 10, 0, tmp_path)


def test_rows_binarized_afresh_are_refused(tmp_path):
    train(dataclasses.replace(TINY, binarize="dynamic"), tmp_path / "dynamic")
    with pytest.raises(ValueError, match="no aggregated posterior; train with --binarize=static"):
        run([tmp_path / "dynamic"], "", 10, 0, tmp_path)
