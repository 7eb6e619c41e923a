import dataclasses
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_trees_equal, compilations

import led_jax
from experiments import run as run_module
from experiments import trainer
from experiments.config import Config
from experiments.flags import from_command
from experiments.run import load_run, run
from experiments.signals import Stop
from experiments.trainer import make_task
from experiments.workdir import hold, write_config
from led_jax import checkpoints, data, training

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY = Config(epochs=6, latent_dim=4, prior_depth=1, prior_hidden=(8,), nll_samples=20)
FIELDS = (
    "best_epoch valid_elbo test_elbo nll nll_se nll_samples num_params skipped devices processes "
    "compile_seconds seconds_per_epoch seconds_train command commit versions hardware date "
    "test_kl mutual_information mutual_information_se marginal_kl marginal_kl_se active_units"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a"
    return workdir, run(TINY, workdir)


def best_params(config, workdir):
    return load_run(config, workdir)[1].params


@pytest.mark.slow
def test_the_result_has_every_field_and_is_on_disk(finished):
    workdir, result = finished
    assert set(FIELDS) <= set(result)
    assert result["learning_rate"] == 2e-3 and result["prior_hidden"] == [8]
    assert from_command(result["command"]).record() == TINY.record()
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result["nll"] <= -result["test_elbo"]
    assert 0 < result["nll_se"] < 5
    assert 0 < result["mutual_information"] < np.log(len(data.load("digits").test)) + 1e-3
    parts = result["mutual_information"] + result["marginal_kl"]
    error = np.hypot(result["mutual_information_se"], result["marginal_kl_se"])
    assert abs(result["test_kl"] - parts) < 5 * error < 5
    assert 0 <= result["active_units"] <= 4
    for name in ("samples", "reconstructions", "curves"):
        assert (workdir / f"{name}.png").stat().st_size > 1000
    events = [path.read_bytes() for path in workdir.glob("events.out.tfevents*")]
    for name in (b"valid_elbo", b"samples", b"reconstructions"):
        assert any(name in content for content in events)
    assert any(b"PNG" in content for content in events)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, 7))
    for r in records:
        for split in ("train", "valid"):
            terms = [r[f"{split}_log_{name}"] for name in ("likelihood", "prior", "posterior")]
            bound = terms[0] + terms[1] - terms[2]
            assert r[f"{split}_elbo"] == pytest.approx(bound, abs=1e-3)


@pytest.mark.slow
def test_the_kl_of_a_posterior_with_a_context_is_split_by_as_many_draws_as_asked_for(tmp_path):
    context = {"posterior": "nvp:depth=1,hidden=8", "posterior_context": 2}
    config = dataclasses.replace(TINY, epochs=1, **context)
    result = run(config, tmp_path)
    assert result["matching_samples"] == 0 and result["mutual_information"] is None
    again = run(dataclasses.replace(config, matching_samples=300), tmp_path)
    assert again["matching_samples"] == 300 and again["valid_elbo"] == result["valid_elbo"]
    parts = again["mutual_information"] + again["marginal_kl"]
    error = np.hypot(again["mutual_information_se"], again["marginal_kl_se"])
    assert abs(again["test_kl"] - parts) < 5 * error < 5


def test_the_best_state_is_saved_as_a_model(finished):
    workdir, result = finished
    led, params = led_jax.load(workdir)
    assert repr(led) == result["model"]
    assert_trees_equal(params, jax.device_put(best_params(TINY, workdir)))


@pytest.mark.slow
def test_averaged_parameters_are_scored_and_saved_and_patience_ends_a_run(tmp_path):
    """At this low learning rate only noise moves the bound, so that it soon stops rising."""
    config = dataclasses.replace(
        TINY, epochs=50, learning_rate=1e-6, optimizer="adamw:weight_decay=0.1", ema=0.9, patience=2
    )
    result = run(config, tmp_path)
    assert from_command(result["command"]).record() == config.record()
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == result["best_epoch"] + 2 < 50
    task, best = load_run(config, tmp_path)
    _, params = led_jax.load(tmp_path)
    assert_trees_equal(params, jax.device_put(best.eval_params))
    scored = run_module.estimate_nll(task, trainer.make_placement(config), params, "test")
    assert scored.nll == result["nll"]
    # The end is on record: a run that goes on trains no further.
    (tmp_path / "result.json").unlink()
    again = run(config, tmp_path)
    assert {**again, "date": ""} == {**result, "date": ""}


@pytest.mark.slow
def test_a_prior_is_fitted_to_a_finished_run_that_stays_as_it_is(finished, tmp_path):
    there, result = finished
    config = Config(
        prior_from=str(there), prior="vamp:num_components=5", latent_dim=4, epochs=2, nll_samples=20
    )
    found = run(config, tmp_path / "b")
    (led, params), (before, params_before) = map(led_jax.load, (tmp_path / "b", there))
    assert led == before._replace(prior=led_jax.priors.vamp(5))
    assert_trees_equal(led.all_but_prior(params), before.all_but_prior(params_before))
    rows = data.load("digits").train
    assert not (params["prior"][:, None] == rows).all(-1).any()  # No component is still a row.
    for name in ("active_units", "num_params"):
        assert type(found[name]) is int
    assert found["active_units"] == result["active_units"]
    assert run(config, tmp_path / "b") == found
    with pytest.raises(ValueError, match="is another model but for its prior"):
        run(dataclasses.replace(config, latent_dim=5), tmp_path / "c")


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(run_module, "fit", None)
    assert run(TINY, workdir) == result


def test_a_second_run_in_a_directory_is_refused_and_writes_nothing(tmp_path):
    with hold(tmp_path / "w"):
        lock = (tmp_path / "w" / "lock").read_text()
        for seed in (0, 1):
            with pytest.raises(ValueError, match=f"written to by process {os.getpid()} on"):
                run(dataclasses.replace(TINY, seed=seed), tmp_path / "w")
        assert [path.name for path in (tmp_path / "w").iterdir()] == ["lock"]
        assert (tmp_path / "w" / "lock").read_text() == lock


def copy_of(finished, directory):
    shutil.copytree(finished[0], directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"epochs": 4}, {"learning_rate": 0.5}, {"seed": 1}, {"kl_warmup": 0.0}, {"batch_size": 10}],
)
def test_a_run_is_of_the_configuration_that_made_it(finished, tmp_path, changes):
    workdir = copy_of(finished, tmp_path / "w")
    edited = dataclasses.replace(TINY, **changes)
    ((name, value),) = changes.items()
    differing = f"is of another configuration: --{name} is {getattr(TINY, name)} there and {value}"
    write_config(edited, workdir)
    with pytest.raises(ValueError, match=rf"result\.json {differing} here"):
        run(edited, workdir)
    (workdir / "result.json").unlink()
    with pytest.raises(ValueError, match=f"checkpoints/6 {differing} here"):
        run(edited, workdir)
    with pytest.raises(ValueError, match=f"checkpoints/6 {differing} here"):
        load_run(edited, workdir)


@pytest.mark.slow
def test_a_run_goes_on_with_other_values_of_free_fields(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "w")
    again = run(dataclasses.replace(TINY, nll_samples=2, checkpoint_epochs=1), workdir)
    assert again["nll_samples"] == 2 and again["valid_elbo"] == finished[1]["valid_elbo"]


@pytest.mark.slow
def test_a_result_that_is_not_whole_is_refused_and_may_be_deleted(finished, tmp_path):
    workdir = copy_of(finished, tmp_path / "w")
    path = workdir / "result.json"
    for content in ("", '{"nll_samples": 20}', "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"result\.json .* makes it again .* is deleted"):
            run(TINY, workdir)
    path.unlink()
    assert run(TINY, workdir)["nll"] == finished[1]["nll"]


@pytest.mark.slow
@pytest.mark.parametrize("during", ["train", "nll"])
def test_a_run_whose_directory_goes_away_stops(tmp_path, monkeypatch, during):
    workdir = tmp_path / "w"
    module, name = {"train": (training, "epochs"), "nll": (run_module, "estimate_nll")}[during]
    original = getattr(module, name)

    def epochs(*args, **kwargs):
        for progress in original(*args, **kwargs):
            if progress.epoch == 3:
                while not (workdir / "checkpoints" / "2").exists():  # A thread writes it.
                    time.sleep(0.01)
                workdir.rename(tmp_path / "v")
            yield progress

    def estimate_nll(*args, **kwargs):
        shutil.rmtree(workdir)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, locals()[name])
    config = dataclasses.replace(TINY, checkpoint_epochs=1)
    with pytest.raises(FileNotFoundError, match="w was removed, renamed or replaced while the run"):
        run(config, workdir)
    assert not workdir.exists()
    monkeypatch.undo()
    if during == "train":  # Its checkpoints are intact in "v".
        found = checkpoints.restore(
            tmp_path / "v" / "checkpoints",
            dict.fromkeys(("last", "best"), make_task(config).state_shape()),
        )
        assert found.path.name == "2"


@pytest.mark.slow
def test_a_signal_within_an_epoch_saves_the_last_one_from_which_the_run_goes_on_exactly(
    finished, tmp_path, monkeypatch
):
    workdir, stop, original = tmp_path / "w", Stop(), training.epochs

    def epochs(*args, **kwargs):
        for progress in original(*args, **kwargs):
            yield progress
            if progress.epoch == 3:  # As a signal's thread would.
                with ThreadPoolExecutor(1) as pool, stop.files:
                    assert pool.submit(stop.save).result() == "stopped after epoch 3 of 6"
                raise KeyboardInterrupt  # The signal ends the process.

    monkeypatch.setattr(training, "epochs", epochs)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, workdir, stop)
    monkeypatch.undo()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    result = run(TINY, workdir)
    assert_trees_equal(best_params(TINY, workdir), best_params(TINY, finished[0]))
    for name in ("nll", "test_elbo", "valid_elbo"):
        assert result[name] == finished[1][name]


@pytest.mark.slow
def test_a_full_disk_is_said_with_the_files_name(tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/config.json'"):
        run(TINY, tmp_path)
    write_config(TINY, tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}'"):
        run(TINY, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"objective": "iwae"}, "missing a required argument: 'num_samples'"),
        ({"objective": "bernoulli"}, "--objective=bernoulli is no objective"),
        ({"optimizer": "bernoulli"}, "--optimizer=bernoulli makes no optimizer: "),
        ({"decoder": "gaussian"}, "missing a required argument: 'std'"),
        ({"posterior": "standard_normal"}, "--posterior=standard_normal is no flow"),
        ({"latent_dim": 1}, "does not split an event of shape"),
        ({"devices": 99}, "--devices: expected 1 to"),
    ],
)
def test_what_needs_no_data_is_refused_before_they_are_loaded(
    tmp_path, monkeypatch, flags, message
):
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(TINY, **flags), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_same_seed_gives_bit_identical_results(finished, tmp_path):
    workdir, result = finished
    again = run(TINY, tmp_path / "b")
    for name in ("valid_elbo", "test_elbo", "nll", "best_epoch"):
        assert again[name] == result[name]
    jax.tree.map(
        np.testing.assert_array_equal, best_params(TINY, workdir), best_params(TINY, tmp_path / "b")
    )


@pytest.mark.slow
def test_another_seed_compiles_nothing(finished, tmp_path):
    with compilations() as compiled:
        other = run(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    assert not compiled
    assert other["nll"] != finished[1]["nll"]


def test_a_run_on_other_data_is_refused(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "d")
    (tmp_path / "d" / "result.json").unlink()
    digits = data.load("digits")
    changed = digits._replace(train=1 - digits.train)
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: changed)
    with pytest.raises(ValueError, match="trained on other data .SHA-256 .* than --dataset and"):
        run(TINY, tmp_path / "d")


def nan_in_step(monkeypatch, number):
    """Makes the loss of one step of every epoch NaN."""
    train_step = training.train_step

    def broken(model, optimizer, objective, trained, opt_state, key, x, step, average):
        spoilt = jnp.where(step % 12 == number, jnp.nan, 1.0)
        args = (model, optimizer, objective, trained, opt_state, key, x * spoilt, step, average)
        return train_step(*args)

    monkeypatch.setattr(training, "train_step", broken)
    # Not the program of an equal run before, which has no NaN.
    monkeypatch.setattr(training, "_program", training._program.__wrapped__)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    nan_in_step(monkeypatch, 3)
    result = run(TINY, tmp_path / "e")
    assert result["skipped"] == 6 and np.isfinite(result["nll"])
    found = checkpoints.restore(
        tmp_path / "e" / "checkpoints",
        dict.fromkeys(("last", "best"), make_task(TINY).state_shape()),
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.trees["last"].params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.trees["best"].params))


@pytest.mark.slow
def test_too_many_of_them_stop_the_run(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, max_skipped=2, checkpoint_epochs=1)
    with monkeypatch.context() as patch:
        nan_in_step(patch, 3)
        with pytest.raises(
            FloatingPointError,
            match="not finite in step 4 of epoch 3: 3 updates were skipped for that so far, more "
            rf"than max_skipped=2. .* The last good checkpoint is {tmp_path}/f/checkpoints/2; "
            "start again",
        ):
            run(config, tmp_path / "f")
    assert not (tmp_path / "f" / "result.json").exists()
    kept = sorted(path.name for path in (tmp_path / "f" / "checkpoints").iterdir())
    assert kept == ["1", "2"]
    # Without the NaN, the run goes on from the last checkpoint.
    run(config, tmp_path / "f")
    lines = (tmp_path / "f" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, config.epochs + 1))


@pytest.mark.slow
def test_data_on_the_host_train_as_on_the_device(finished, tmp_path):
    pytest.importorskip("grain")
    workdir, result = finished
    config = dataclasses.replace(TINY, data_placement="host")
    with mock.patch.object(
        training, "_BLOCK_STEPS", 5
    ):  # Twelve steps: two whole blocks and a rest.
        again = run(config, tmp_path / "h")
    assert again["nll"] == pytest.approx(result["nll"], rel=1e-5)
    histories = [
        [json.loads(line)["train_elbo"] for line in (path / "metrics.jsonl").open()]
        for path in (workdir, tmp_path / "h")
    ]
    np.testing.assert_allclose(*histories, rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    mesh = mock.Mock(size=3)
    monkeypatch.setattr(trainer.sharding, "make_mesh", lambda devices: mesh)
    with pytest.raises(ValueError, match="--batch_size=100 does not divide over 3 devices"):
        run(TINY, tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.slow
def test_digits_is_learned(tmp_path):
    config = Config(epochs=100, prior_depth=2, nll_samples=100)
    digits = data.load("digits")
    p = digits.train.mean(0).clip(1e-3, 1 - 1e-3)
    independent = -(digits.test * np.log(p) + (1 - digits.test) * np.log(1 - p)).sum(1).mean()
    assert run(config, tmp_path / "g")["nll"] < independent - 3
