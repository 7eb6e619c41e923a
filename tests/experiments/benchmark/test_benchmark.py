import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import flow_suite, training_suite
from experiments.benchmark.peers import Stack
from experiments.config import Config
from led_jax.flows import base

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "_SGEMM_SHAPES", ((64, 32, 64), (32, 32, 32)))
    stack = Config(dataset="synthetic", prior_depth=2)
    monkeypatch.setattr(training_suite, "_STACKS", (stack,))
    monkeypatch.setattr(training_suite, "_COMPILE_DEPTHS", (1, 2))
    prior1 = Config(dataset="synthetic", prior_depth=1)
    monkeypatch.setitem(training_suite.CELLS, "prior1", prior1)
    monkeypatch.setattr(training_suite, "_NLL_SAMPLES", {"prior1": 20})
    monkeypatch.setattr(flow_suite, "_TURN_SECONDS", 0.001)
    monkeypatch.setattr(flow_suite, "BATCH", 10)
    for name, stack in {
        "coupling1": Stack("coupling", 1),
        "sequential1": Stack("made", 1, sequential=True),
    }.items():
        monkeypatch.setitem(flow_suite.CELLS, name, stack)


@pytest.fixture
def parsed_flags():
    with flagsaver.flagsaver():
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["benchmark"])
        yield
    jax.config.update("jax_enable_compilation_cache", True)  # The benchmark disables it.


@pytest.mark.slow
def test_training_suite_without_peers(tiny, parsed_flags, tmp_path, capsys):
    output, max_unroll = tmp_path / "new" / "benchmark.json", dict(base.MAX_UNROLL)
    arguments = {"cells": ["mlp"], "peers": [], "rows": 250, "rounds": 1, "nll_rows": 40}
    with flagsaver.flagsaver(output=str(output), **arguments):
        benchmark.main(["benchmark"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert "--cells=mlp --peers= --rows=250" in result["command"]
    assert str(tmp_path) not in output.read_text()
    (cell,) = result["cells"]
    assert cell["cell"] == "mlp" and cell["gflop_per_step"] == pytest.approx(0.2228)
    assert cell["examples_per_second"] == pytest.approx(1e5 / cell["step_ms"])
    assert 0 < cell["fraction_of_sgemm_peak"] and 0 < cell["loss"] < 2000
    assert result["scan"][0]["scanned_over_unrolled"] > 0
    (wrappers,) = result["wrappers"]
    expected = wrappers["pmap_ms"] / wrappers["jit_ms"]
    assert wrappers["pmap_over_jit"] == pytest.approx(expected)
    assert [list(row["seconds"]) for row in result["compile"]] == [["1", "2"]] * 2
    (nll,) = result["nll"]
    assert nll["model"] == "mlp, 1 nvp prior"
    assert nll["gflop"] == pytest.approx(2e-9 * 40 * (216_800 + 20 * 214_300))
    assert base.MAX_UNROLL == max_unroll
    table = output.with_suffix(".md").read_text()
    assert table == benchmark.to_markdown(result)
    assert table.count("| mlp |") == 2 and table.count("| - | - |") == 1


@pytest.mark.slow
def test_flow_suite(tiny, parsed_flags, tmp_path, capsys):
    output = tmp_path / "flows.json"
    arguments = {"suite": "flows", "cells": ["coupling1", "sequential1"], "peers": ["distrax"]}
    pytest.importorskip("distrax")
    with flagsaver.flagsaver(output=str(output), rounds=1, **arguments):
        benchmark.main(["benchmark"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert "--suite=flows --cells=coupling1,sequential1 --peers=distrax" in result["command"]
    coupling, sequential = result["cells"]
    assert list(coupling["sides"]) == ["ours", "distrax"]
    assert list(sequential["sides"]) == ["ours"]  # distrax has no MADE.
    ours, peer = coupling["sides"].values()
    assert ours["finite"] and peer["finite"]
    ratio = ours["steady_ms"] / peer["steady_ms"]
    assert coupling["steady_over_best_peer"] == pytest.approx(ratio)
    assert coupling["gflop"] == pytest.approx(2e-8 * 3 * (25 * 100 + 100 * 50))
    assert sequential["gflop"] == pytest.approx(2e-8 * (50 * 512 + 512 * 512 + 512 * 100))
    table = output.with_suffix(".md").read_text()
    assert table == benchmark.to_markdown(result)
    assert "| 1 x affine made, sequential |" in table


def test_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert not benchmark._installed("torch")
    assert 'torch is not installed, so it is left out: pip install "led_jax[bench]"' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flag",
    [{"cells": ["post5"]}, {"peers": ["keras"]}, {"output": "x.md"}, {"nll_rows": 20_000}]
    + [{"suite": "flows", "cells": ["mlp"]}],
)
def test_bad_flags(parsed_flags, flag):
    with pytest.raises(flags.IllegalFlagValueError), flagsaver.flagsaver(**flag):
        pass
