import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

from experiments.figures import tabular
from led_jax import flows

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_tables_are_continuous_and_in_units_of_their_deviations():
    tables = tabular.tables(0)
    assert {name: rows.shape for name, rows in tables.items()} == {
        "wine": (178, 13),
        "breast cancer": (569, 30),
        "diabetes": (442, 9),  # Without a column of two values.
        "digits": (1797, 64),
    }
    for rows in tables.values():
        np.testing.assert_allclose(rows.std(0), 1, rtol=1e-12)


def test_a_whitened_gaussian_is_the_standard_normal():
    x = np.random.default_rng(0).normal(size=(200, 3)) @ np.array([[2, 0, 1], [0, 1, 3], [0, 0, 1]])
    gaussian = tabular.choose([GaussianMixture(1, reg_covar=1e-6)], x, 0)
    whitened, log_det = tabular.whiten(gaussian)
    expected = stats.norm.logpdf(whitened(x)).sum(1) + log_det
    np.testing.assert_allclose(gaussian.score_samples(x), expected, rtol=1e-9)


@pytest.mark.slow
def test_flows_find_what_a_gaussian_cannot(monkeypatch):
    monkeypatch.setattr(tabular, "MIXTURES", [GaussianMixture(2, random_state=0)])
    affine = tabular.TRANSFORMERS["affine flows"]
    monkeypatch.setattr(tabular, "TRANSFORMERS", {"affine flows": affine})
    monkeypatch.setattr(tabular, "DEPTH", 2)
    monkeypatch.setattr(tabular, "MEMBERS", 2)
    x = np.random.default_rng(1).normal(size=(1200, 1))
    x = np.concatenate([x, x**2 + np.random.default_rng(2).normal(size=x.shape)], 1)
    train, test = x[:600], x[600:]
    scores = tabular.fit_all(train, jax.random.key(0), 0, 300)
    gain = scores["affine flows"](test) - scores["Gaussian"](test)
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    truth = stats.norm.logpdf(test[:, 0]) + stats.norm.logpdf(test[:, 1] - test[:, 0] ** 2)
    assert 0 < (truth - scores["affine flows"](test)).mean() < 0.3


@pytest.mark.slow
def test_every_row_is_scored_once_by_what_has_not_seen_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tabular, "GAUSSIANS", [GaussianMixture(1, reg_covar=0)])
    monkeypatch.setattr(tabular, "MIXTURES", [GaussianMixture(2, random_state=0)])
    monkeypatch.setattr(tabular, "KERNELS", [KernelDensity()])
    monkeypatch.setattr(tabular, "TRANSFORMERS", {"spline flows": flows.spline(8)})
    monkeypatch.setattr(tabular, "DEPTH", 1)
    monkeypatch.setattr(tabular, "HIDDEN", (8,))
    monkeypatch.setattr(tabular, "MEMBERS", 1)
    found = tabular.run(True, 0, tmp_path)
    rows = np.random.default_rng(0).permutation(tabular.tables(0)["wine"])
    halves = rows[:89], rows[89:]
    expected = [
        stats.multivariate_normal(train.mean(0), np.cov(train.T, ddof=0)).logpdf(test)
        for train, test in (halves[::-1], halves)
    ]
    gaussian, *others = found["scores"]
    assert gaussian["rows"] == 178 and gaussian["gain"] == 0
    assert gaussian["log_prob"] == pytest.approx(np.mean(expected))
    assert gaussian["log_prob_se"] == pytest.approx(np.std(expected) / 178**0.5)
    for record in others:
        difference = record["log_prob"] - gaussian["log_prob"]
        assert record["gain"] == pytest.approx(difference) and record["gain_se"] > 0
    assert (tmp_path / "tabular.png").stat().st_size > 1000
