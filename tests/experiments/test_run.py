import json

import jax
import numpy as np
import pytest

from experiments import run as run_module
from experiments.config import Config
from experiments.run import load_run, run
from led_jax import checkpoints, data, training

TINY = Config(
    epochs=6,
    latent_dim=4,
    prior_depth=2,
    prior_hidden=(8,),
    posterior_depth=1,
    posterior_hidden=(8,),
    nll_samples=20,
)
FIELDS = (
    "dataset network latent_dim prior prior_depth posterior posterior_depth seed epochs best_epoch "
    "valid_elbo test_elbo nll nll_se nll_samples compile_seconds seconds_per_epoch seconds_train"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a"
    return workdir, run(TINY, workdir)


def best_params(config, workdir):
    return load_run(config, workdir)[2].params


def test_the_result_has_every_field_and_is_on_disk(finished):
    workdir, result = finished
    assert set(FIELDS) <= set(result)
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result["nll"] <= -result["test_elbo"]
    assert 0 < result["nll_se"] < 5
    for name in ("samples", "reconstructions", "curves"):
        assert (workdir / f"{name}.png").stat().st_size > 1000
    assert list(workdir.glob("events.out.tfevents*"))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, 7))
    for r in records:
        bound = r["log_likelihood"] + r["log_prior"] - r["log_posterior"]
        assert r["valid_elbo"] == pytest.approx(bound, abs=1e-3)


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(run_module, "fit", None)
    assert run(TINY, workdir) == result


def test_the_same_seed_gives_bit_identical_results(finished, tmp_path):
    workdir, result = finished
    again = run(TINY, tmp_path / "b")
    for name in ("valid_elbo", "test_elbo", "nll", "best_epoch"):
        assert again[name] == result[name]
    jax.tree.map(
        np.testing.assert_array_equal, best_params(TINY, workdir), best_params(TINY, tmp_path / "b")
    )


def test_a_stopped_run_goes_on_to_the_same_result(finished, tmp_path, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(run_module, "_SAVE_SECONDS", -1.0)

    class Killed(BaseException):
        pass

    save = checkpoints.save

    def save_twice_and_die(directory, last, best, log):
        if int(last.epoch) == 3:
            raise Killed
        save(directory, last, best, log)

    monkeypatch.setattr(checkpoints, "save", save_twice_and_die)
    with pytest.raises(Killed):
        run(TINY, tmp_path / "c")
    assert not (tmp_path / "c" / "result.json").exists()
    monkeypatch.setattr(checkpoints, "save", save)
    again = run(TINY, tmp_path / "c")
    assert again["nll"] == result["nll"]
    jax.tree.map(
        np.testing.assert_array_equal, best_params(TINY, workdir), best_params(TINY, tmp_path / "c")
    )
    assert len((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_on_other_data_is_refused(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "d"
    monkeypatch.setattr(run_module, "estimate_nll", None)
    with pytest.raises(TypeError):
        run(TINY, workdir)  # Stops after training.
    digits = data.load("digits")
    changed = digits._replace(train=1 - digits.train)
    monkeypatch.setattr(run_module, "load_data", lambda config: changed)
    with pytest.raises(ValueError, match="trained on other data"):
        run(TINY, workdir)


def test_a_bound_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def broken_epoch(*args, **kwargs):
        epoch = make_epoch(*args, **kwargs)

        def compiled(state, rows):
            state, terms = epoch(state, rows)
            return state, terms._replace(log_prior=terms.log_prior * np.nan)

        return jax.jit(compiled)

    make_epoch = training.make_epoch
    monkeypatch.setattr(training, "make_epoch", broken_epoch)
    with pytest.raises(FloatingPointError, match="training ELBO is nan in epoch 1"):
        run(TINY, tmp_path / "e")
    assert not (tmp_path / "e" / "result.json").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--batch_size=5000 is more than digits's 1297"):
        run(Config(batch_size=5000), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_digits_is_learned(tmp_path):
    config = Config(epochs=100, prior_depth=2, nll_samples=100)
    digits = data.load("digits")
    p = digits.train.mean(0).clip(1e-3, 1 - 1e-3)
    independent = -(digits.test * np.log(p) + (1 - digits.test) * np.log(1 - p)).sum(1).mean()
    assert run(config, tmp_path / "g")["nll"] < independent - 3
