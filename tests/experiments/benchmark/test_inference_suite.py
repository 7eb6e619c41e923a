import importlib

import jax
import numpy as np
import pytest

from experiments.benchmark import inference_suite
from experiments.benchmark.peers import Guide

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]


@pytest.mark.parametrize("guide", [Guide("mean_field"), Guide("full_rank"), Guide("iaf", 1, (32,))])
@pytest.mark.parametrize("side", ["ours", *inference_suite.PEERS])
def test_all_sides_lower_the_same_loss(side, guide):
    make_fit = inference_suite.make_fit
    if side != "ours":
        pytest.importorskip(side)
        module = importlib.import_module(f"experiments.benchmark.peers.{side}_inference")
        make_fit = module.make_fit
    losses = np.array(make_fit(guide, 200, 10, 1e-2)(jax.random.key(0)))
    # The loss is at least -log Z in expectation; experiments.posteriors measures this as 55.22.
    assert losses[0] > 1.2 * losses[-1] > 1.2 * 55


@pytest.mark.parametrize("peers", [(), ("numpyro",)])
def test_a_row_has_every_side(monkeypatch, peers):
    monkeypatch.setattr(inference_suite, "STEPS", 20)
    result = inference_suite.measure(["mean_field"], peers, rounds=1)
    (cell,) = result["cells"]
    assert list(cell["sides"]) == ["ours", *peers]
    assert all(side["seconds"] > 0 and side["elbo"] < -55 for side in cell["sides"].values())
    assert ("over_best_peer" in cell) == bool(peers)
    assert "| mean-field Gaussian |" in inference_suite.to_markdown(result)
