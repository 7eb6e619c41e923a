import importlib
import json

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from support import KEY, normal

from experiments.posteriors.models import NON_CENTRED, Problem
from led_jax import interop

main = importlib.import_module("experiments.posteriors.__main__")

pytestmark = pytest.mark.usefixtures("fast_compile")

OBSERVED, PRIOR_STD = np.array([1.0, -2.0]), 2.0
STD = np.sqrt(1 / (1 / PRIOR_STD**2 + 1))
MEAN = OBSERVED * STD**2
LOG_Z = scipy.stats.norm.logpdf(OBSERVED, 0, np.sqrt(1 + PRIOR_STD**2)).sum()
SCALE = main.Scale(steps=400, samples=20_000, warmup=300, draws=2000)


def normal_means(observed):
    with numpyro.plate("entries", 2):
        z = numpyro.sample("z", dist.Normal(0, PRIOR_STD))
        numpyro.sample("observed", dist.Normal(z, 1), obs=observed)


CONJUGATE = Problem(normal_means, (jnp.asarray(OBSERVED),), {"z": NON_CENTRED})


def test_moments_with_weights_are_those_of_the_weighted_density():
    x = normal((50_000, 2))
    tilted = main.moments(
        x, np.asarray(x[:, 0], np.float64)
    )  # N(0, 1) e^x is N(1, 1) up to a factor.
    np.testing.assert_allclose(tilted.mean, [1, 0], atol=0.05)
    np.testing.assert_allclose(tilted.std, [1, 1], atol=0.05)
    plain = main.moments(x)
    np.testing.assert_allclose(plain.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(plain.std, x.std(0), rtol=1e-5)


def test_the_error_is_the_largest_one_in_reference_deviations():
    reference = main.Moments(np.array([0.0, 10.0]), np.array([1.0, 4.0]))
    assert main.Moments(np.array([0.1, 12.0]), np.array([1.0, 4.0])).error(reference) == 0.5
    assert main.Moments(np.array([0.1, 10.0]), np.array([0.4, 4.0])).error(reference) == 0.6


@pytest.mark.slow
def test_a_conjugate_posterior_is_found_by_nuts_and_by_flows(monkeypatch):
    kept = {name: main.FLOWS[name] for name in ("mean-field Gaussian", main.NEUTRA_FLOW)}
    monkeypatch.setattr(main, "FLOWS", kept)
    monkeypatch.setattr(main, "HIDDEN", (8,))
    monkeypatch.setattr(main, "LEARNING_RATE", 3e-2)
    record = main.measure(CONJUGATE, KEY, SCALE)
    assert record["size"] == 2 and record["reference"]["error"] == 0
    assert record["reference"]["size"] > 1000 and record["reference"]["r_hat"] < 1.01
    assert record["fits"].keys() == main.FLOWS.keys()
    for fit in record["fits"].values():
        assert fit["error"] < 0.1 and fit["weighted_error"] < 0.1
        assert abs(fit["log_z"] - LOG_Z) < 4 * fit["standard_error"] + 1e-3
        assert fit["elbo"] <= LOG_Z + 1e-3
    assert len(record["chains"]) == 2
    for chains in record["chains"].values():
        assert chains["error"] < 0.15 and chains["r_hat"] < 1.02
        assert chains["size_a_second"] == chains["size"] / chains["seconds"]


@pytest.mark.slow
def test_chains_have_the_moments_of_their_density():
    posterior = interop.from_numpyro(KEY, CONJUGATE.model, *CONJUGATE.data)
    chains = main.nuts(posterior.log_density, 2, KEY, SCALE)
    assert chains.x.shape == (main.CHAINS, SCALE.draws, 2) and chains.seconds > 0
    assert not np.array_equal(chains.x[0], chains.x[1])
    exact = main.Moments(MEAN, np.full(2, STD))
    record = chains.record(exact)
    assert record["error"] < 5 / record["size"] ** 0.5


@pytest.mark.slow
def test_results_are_written_with_a_row_for_each_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "problems", lambda: {"conjugate": CONJUGATE, "left out": None})
    monkeypatch.setattr(main, "FLOWS", {main.NEUTRA_FLOW: main.FLOWS[main.NEUTRA_FLOW]})
    monkeypatch.setattr(main, "HIDDEN", (8,))
    monkeypatch.setattr(main.provenance, "commit", lambda: "1a2b")
    result = main.run(True, 0, tmp_path)
    json.dumps(result, allow_nan=False)
    assert list(result["posteriors"]) == ["conjugate"] and result["steps"] == main.FAST.steps
    assert (tmp_path / "inference.png").stat().st_size > 1000
    with monkeypatch.context() as patch:
        patch.delattr(main, "measure")
        assert main.run(True, 0, tmp_path) == result  # Finished fits are kept,
        with pytest.raises(NameError):
            main.run(True, 1, tmp_path)  # unless the seed differs
        patch.setattr(main.provenance, "commit", lambda: "1a2b+dirty")
        with pytest.raises(NameError):
            main.run(True, 0, tmp_path)  # or the code is not committed.
    origin = {"command": "c", "hardware": "h", "versions": {"jax": "0"}, "date": "d"}
    fits, chains, _ = main.to_markdown(result | origin).split("\n\n", 2)
    assert [line.split(" | ")[2] for line in fits.splitlines()[2:]] == [main.NEUTRA_FLOW]
    assert [line.split(" | ")[1] for line in chains.splitlines()[2:]] == [
        "reference",
        "NUTS as written",
        "NUTS in the flow's base space",
    ]
    for table in (fits, chains):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_samples_come_with_their_weights():
    posterior = interop.Posterior(2, lambda x: -0.5 * (x**2).sum(-1), lambda x: {}, lambda s: s)
    density = main.densities.standard_normal((2,))
    x, log_weights = main.weighted_samples(density, (), KEY, posterior, 3000)
    assert x.shape == (3000, 2) and len(np.unique(x[:, 0])) == 3000
    np.testing.assert_allclose(log_weights, np.log(2 * np.pi), rtol=1e-5)
