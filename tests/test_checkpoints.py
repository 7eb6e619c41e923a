import functools
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_trees_equal

from led_jax import LED, checkpoints, densities, flows, networks, training

pytestmark = pytest.mark.usefixtures("fast_compile")

DATA = jnp.asarray(np.random.default_rng(0).integers(0, 2, (20, 6), np.uint8))


@pytest.fixture(scope="module")
def led():
    return LED(
        networks.mlp_encoder(2, (4,)),
        flows.chain(),
        densities.transformed(
            densities.standard_normal((2,)), flows.real_nvp((2,), 2, hidden=(4,))
        ),
        networks.mlp_decoder(6, (4,)),
    )


@pytest.fixture(scope="module")
def optimizer():
    return training.adam(1e-2, 100, clip_norm=1.0)


@pytest.fixture(scope="module")
def epoch(led, optimizer):
    return training.make_epoch(led, optimizer, 6)


@pytest.fixture(scope="module")
def fresh(led, optimizer):
    return lambda: training.init_state(led, optimizer, KEY, DATA)


def advance(epoch, state, epochs):
    for _ in range(epochs):
        state, _ = epoch(state, DATA)
    return state


def copy(state):
    return jax.tree.map(jnp.copy, state)


def save(directory, *steps_and_states, keep=2, meta=None):
    with checkpoints.saver(directory, keep) as write:
        for step, state in steps_and_states:
            write(step, {"last": state}, meta or {"step": step})


def restore(directory, fresh):
    return checkpoints.restore(directory, {"last": jax.eval_shape(fresh)})


def test_restores_what_was_saved_bit_for_bit(tmp_path, epoch, fresh):
    best = advance(epoch, fresh(), 1)
    last = advance(epoch, copy(best), 2)
    meta = {"history": [{"epoch": 1, "valid_elbo": -3.25}], "name": "run"}
    directory = tmp_path / "new" / "checkpoints"
    with checkpoints.saver(directory) as write:
        write(3, {"last": last, "best": best}, meta)
    like = jax.eval_shape(fresh)
    restored = checkpoints.restore(directory, {"last": like, "best": like})
    assert_trees_equal(restored.trees["last"], last)
    assert_trees_equal(restored.trees["best"], best)
    assert restored.meta == meta and restored.path == directory / "3"
    assert last.epoch == 3 and best.epoch == 1


def test_going_on_equals_never_having_stopped(tmp_path, epoch, fresh):
    uninterrupted = advance(epoch, fresh(), 4)
    save(tmp_path, (2, advance(epoch, fresh(), 2)))
    restored = restore(tmp_path, fresh).trees["last"]
    assert_trees_equal(advance(epoch, jax.device_put(restored), 2), uninterrupted)


def test_a_state_may_be_given_away_while_it_is_written(tmp_path, epoch, fresh):
    state = fresh()
    expected = copy(state)
    with checkpoints.saver(tmp_path) as write:
        write(0, {"last": state}, {})
        epoch(state, DATA)  # Consumes it.
    assert_trees_equal(restore(tmp_path, fresh).trees["last"], expected)


def test_the_newest_wins_and_as_many_as_told_are_kept(tmp_path, fresh):
    save(tmp_path, *((i, fresh()) for i in range(5)), keep=3)
    assert restore(tmp_path, fresh).meta == {"step": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_no_checkpoint(tmp_path, fresh):
    assert restore(tmp_path, fresh) is None
    assert restore(tmp_path / "missing", fresh) is None
    assert not (tmp_path / "missing").exists()


def other_width(led):
    return led._replace(decoder=networks.mlp_decoder(6, (5,)))


def other_depth(led):
    prior = densities.transformed(
        densities.standard_normal((2,)), flows.real_nvp((2,), 3, hidden=(4,))
    )
    return led._replace(prior=prior)


def no_prior_flow(led):
    return led._replace(prior=densities.standard_normal((2,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_width, r"decoder/Dense_0/bias is float32\[4\] there and float32\[5\] here"),
        (other_depth, r"is missing there and float32\[.*\] here"),
        (no_prior_flow, r"is float32\[.*\] there and missing here.*; and \d+ more"),
    ],
)
def test_another_model_is_an_error_that_names_what_differs(
    tmp_path, led, optimizer, fresh, change, message
):
    save(tmp_path, (0, fresh()))
    other = functools.partial(training.init_state, change(led), optimizer, KEY, DATA)
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/0 is of another model.*{message}"):
        restore(tmp_path, other)


def test_another_optimizer_is_an_error(tmp_path, led, fresh):
    save(tmp_path, (0, fresh()))
    other = functools.partial(training.init_state, led, optax.sgd(0.1), KEY, DATA)
    with pytest.raises(ValueError, match="of another model or optimizer: last/opt_state/"):
        restore(tmp_path, other)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_arrays(checkpoint):
    for path in (checkpoint / "last").rglob("*"):
        if path.is_file():
            truncate(path)


def flip_bits(checkpoint):
    for path in (checkpoint / "last").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def truncate_record(checkpoint):
    truncate(checkpoint / "record" / "metadata")


def edit_record(checkpoint):
    path = checkpoint / "record" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"meta": {"step": 9}}))


def write_nonsense(checkpoint):
    (checkpoint / "record" / "metadata").write_text('[[["pickle"]]]')


def delete_arrays(checkpoint):
    shutil.rmtree(checkpoint / "last")


def delete_record(checkpoint):
    shutil.rmtree(checkpoint / "record")


def delete_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def swell(checkpoint):
    with (checkpoint / "bomb").open("wb") as file:
        file.truncate(2**40)


DAMAGES = [truncate_arrays, flip_bits, truncate_record, edit_record, write_nonsense]
DAMAGES += [delete_arrays, delete_record, delete_everything, swell]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, fresh):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, (1, fresh()), (2, fresh()))
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, saved, fresh, caplog, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "2")
    found = restore(tmp_path, fresh)
    assert found.path == tmp_path / "1" and found.meta == {"step": 1}
    assert f"checkpoint {tmp_path}/2 is damaged" in caplog.text
    damage(tmp_path / "1")
    with pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        restore(tmp_path, fresh)


@pytest.mark.parametrize("damage", [truncate_arrays, delete_record, delete_everything])
def test_a_run_that_goes_on_from_the_one_before_overwrites_a_damaged_one(
    tmp_path, saved, fresh, damage
):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "1")
    damage(tmp_path / "2")
    save(tmp_path, (1, fresh()))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_loading_never_unpickles(tmp_path, fresh, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    save(tmp_path, (0, fresh()))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert restore(tmp_path, fresh) is not None
