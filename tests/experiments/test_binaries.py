"""The absl binaries as a user runs them: in processes of their own."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from support.processes import Forked, finish, fresh

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

TINY = "--epochs=2 --latent_dim=3 --prior_depth=1 --prior_hidden=4 --nll_samples=5".split()


def launch(module, *args, cwd, start=Forked):
    return finish(start("-m", f"experiments.{module}", *args, cwd=cwd))


def test_train_prints_json_last_and_evaluate_reads_the_run(tmp_path):
    trained = launch("train", *TINY, "--workdir=run", cwd=tmp_path, start=fresh)
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout.splitlines()[-1])
    assert result.pop("workdir") == "run"
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    evaluated = launch("evaluate", "--workdir=run", "--split=test", "--nll_samples=5", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])["nll"] == result["nll"]
    sampled = launch("sample", "--workdir=run", "--output=samples.png", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert json.loads(sampled.stdout.splitlines()[-1])["arrays"]["x"] == [64, 8, 8]
    np.savez(tmp_path / "rows.npz", np.eye(8, 64))
    args = "--workdir=run --input=rows.npz --output=scores.npz --nll_samples=5".split()
    scored = launch("score", *args, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout.splitlines()[-1])["rows"] == 8
    wrong = launch("score", *args, "--array=x", cwd=tmp_path)
    assert wrong.returncode == 1 and wrong.stderr.splitlines()[-1].startswith("error: rows.npz: no")


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is not None, reason="a GPU may be there")
@pytest.mark.parametrize(
    "module,args",
    [
        ("train", [*TINY, "--workdir=w"]),
        ("score", ["--workdir=w", "--input=rows.npz", "--output=scores.npz"]),
        ("figures.mixture", ["--workdir=w", "--fast"]),
    ],
)
def test_devices_that_are_not_there_are_one_clear_line(tmp_path, monkeypatch, module, args):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    process = launch(module, *args, cwd=tmp_path, start=fresh)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: JAX has no devices for JAX_PLATFORMS='cuda': unset it")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("figure", "args", "message"),
    [
        ("mixture", [], "--workdir is required"),
        ("marginal_matching", ["--workdir=w", "--runs=absent"], "absent holds no finished run"),
    ],
)
def test_a_figures_wrong_flag_is_one_clear_line(tmp_path, figure, args, message):
    process = launch(f"figures.{figure}", *args, cwd=tmp_path)
    assert process.returncode != 0
    assert message in process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert not any(tmp_path.rglob("*.json"))
