import functools
import json
import pickle
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_trees_equal
from support.linear_gaussian import data

from led_jax import LED, checkpoints, decoders, densities, encoders, flows, objectives, training
from led_jax.data import Dataset
from led_jax.numerics import is_key

pytestmark = [
    pytest.mark.usefixtures("fast_compile"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]

LED_MODEL = LED(
    encoders.mlp_encoder(2, (4,)),
    flows.chain(),
    densities.transformed(densities.standard_normal((2,)), flows.real_nvp((2,), 2, hidden=(4,))),
    decoders.mlp_decoder(6, (4,)),
)
ADAM = training.adam(1e-2, 100, clip_norm=1.0)
X = jax.ShapeDtypeStruct((2, 6), jnp.float32)


@functools.cache
def abstract(led=LED_MODEL, optimizer=ADAM):
    return training.state_shape(led, optimizer, X)


@functools.cache
def state(seed=0):
    """A state's structure filled with numbers, which needs no compilation."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if is_key(leaf):
            return jax.random.key(seed)
        return jnp.asarray(rng.integers(-99, 99, leaf.shape).astype(leaf.dtype))

    return jax.tree.map(fill, abstract())


def save(directory, *steps_and_states, keep=2, meta=None):
    with checkpoints.saver(directory, keep) as write:
        for step, state in steps_and_states:
            write(step, {"last": state}, meta or {"step": step})


def restore(directory, like=None):
    return checkpoints.restore(directory, {"last": like or abstract()})


def test_restores_what_was_saved_bit_for_bit(tmp_path):
    last, best = state(1), state(2)
    meta = {"history": [{"epoch": 1, "valid_elbo": -3.25}], "name": "run", "score": -np.inf}
    directory = tmp_path / "new" / "checkpoints"
    with checkpoints.saver(directory) as write:
        write(3, {"last": last, "best": best}, meta)
    like = abstract()
    restored = checkpoints.restore(directory, {"last": like, "best": like})
    assert_trees_equal(restored.trees["last"], last)
    assert_trees_equal(restored.trees["best"], best)
    assert restored.meta == meta and restored.path == directory / "3"
    only = checkpoints.restore(directory, {"best": like})
    assert_trees_equal(only.trees, {"best": best})


@pytest.mark.parametrize(
    "tree",
    [
        (),
        {"a": (), "b": [np.zeros((0, 3), np.float16)]},
        {"small": jnp.linspace(-1, 1, 7, dtype=jnp.bfloat16), "flag": np.array(True)},
        [jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), (2, 1))],
        {"scalar": np.float64(np.nan), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
    ],
)
def test_any_leaves_survive(tmp_path, tree):
    save(tmp_path, (0, tree))
    assert_trees_equal(checkpoints.restore(tmp_path, {"last": tree}).trees["last"], tree)


@pytest.mark.slow
def test_going_on_equals_never_having_stopped(tmp_path):
    """The progress is saved and restored between two epochs."""
    x = data(20).astype(np.float32)
    rows = Dataset("rows", (3,), x, x[:5], x[:0])
    density = densities.transformed(densities.standard_normal((3,)), flows.actnorm())
    options = {
        "objective": objectives.maximum_likelihood(),
        "score": lambda model, params, key, x: {"log_prob": model.log_prob(params, x)},
        "select": "log_prob",
        "batch_size": 6,
    }
    straight = list(training.epochs(density, ADAM, rows, KEY, num_epochs=4, **options))
    with checkpoints.saver(tmp_path) as write:
        write(2, *training.to_record(straight[1]))
    like = training.state_shape(density, ADAM, x, options["objective"])
    found = checkpoints.restore(tmp_path, {"last": like, "best": like})
    progress = training.from_record(found.trees, found.meta)
    assert progress._replace(state=None, best=None) == straight[1]._replace(state=None, best=None)
    resumed = training.epochs(density, ADAM, rows, KEY, num_epochs=4, resume=progress, **options)
    *_, end = resumed
    assert_trees_equal((end.state, end.best), (straight[-1].state, straight[-1].best))
    assert end.history == straight[-1].history


def test_a_state_may_be_given_away_while_it_is_written(tmp_path):
    tree = {"x": jnp.arange(1000.0)}
    with checkpoints.saver(tmp_path) as write:
        write(0, {"last": tree}, {})
        jax.jit(lambda tree: {"x": tree["x"] + 1}, donate_argnums=0)(tree)
    restored = checkpoints.restore(tmp_path, {"last": jax.eval_shape(lambda: tree)})
    np.testing.assert_array_equal(restored.trees["last"]["x"], np.arange(1000.0))


def test_the_newest_wins_and_as_many_as_told_are_kept(tmp_path):
    save(tmp_path, *((i, state()) for i in range(5)), keep=3)
    assert restore(tmp_path).meta == {"step": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory, noise = tmp_path / "c", np.random.default_rng(0).normal(size=10**6)
    message = f"cannot be written to {directory}, the last good one is {directory}/1: .* too large"
    try:
        with pytest.raises(OSError, match=message), checkpoints.saver(directory) as save:  # noqa: PT012
            save(1, {"a": noise[:9]}, {})
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
            save(2, {"a": noise}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = checkpoints.restore(directory, {"a": noise[:9]})
    assert found.path.name == "1"
    np.testing.assert_array_equal(found.trees["a"], noise[:9])


def test_a_checkpoint_that_is_replaced_while_it_is_read_gives_way_to_the_new_one(
    tmp_path, monkeypatch
):
    save(tmp_path, (1, state(1)))
    read_record = checkpoints._read_record

    def read(path):
        if path.name == "1":  # Another process writes, and keeps only the newest.
            save(tmp_path, (2, state(2)), keep=1)
        return read_record(path)

    monkeypatch.setattr(checkpoints, "_read_record", read)
    found = restore(tmp_path)
    assert found.path.name == "2"
    assert_trees_equal(found.trees["last"], state(2))


def test_no_checkpoint(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()


def other_width(led):
    return led._replace(decoder=decoders.mlp_decoder(6, (5,)))


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
        (other_depth, r"is float32\[2, 4\] there and float32\[3, 4\] here"),
        (no_prior_flow, r"is float32\[.*\] there and missing here.*; and \d+ more"),
    ],
)
def test_another_model_is_an_error_that_names_what_differs(tmp_path, change, message):
    save(tmp_path, (0, state()))
    other = abstract(change(LED_MODEL))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/0 is of another model.*{message}"):
        restore(tmp_path, other)


def test_another_optimizer_is_an_error(tmp_path):
    save(tmp_path, (0, state()))
    other = abstract(optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="of another model or optimizer: last/opt_state/"):
        restore(tmp_path, other)


def test_another_description_is_an_error_that_names_what_differs(tmp_path):
    model = {"prior": {"name": "real_nvp", "hidden": [100, 50], "depth": 4}, "context": None}
    save(tmp_path, (0, state()), meta={"model": model})
    like = {"last": abstract()}
    found = checkpoints.restore(tmp_path, like, json.loads(json.dumps(model)))
    assert found.meta["model"] == model
    other = model | {"prior": {"name": "real_nvp", "hidden": [100, 60], "mask": "half"}}
    message = (
        "0 is of another model: model/prior/hidden/1 is 50 there and 60 here; model/prior/mask is "
        'missing there and "half" here; model/prior/depth is 4 there and missing here'
    )
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(tmp_path, like, other)


def test_a_tree_that_was_not_saved_is_an_error(tmp_path):
    save(tmp_path, (0, state()))
    with pytest.raises(ValueError, match="best is missing there"):
        checkpoints.restore(tmp_path, {"last": abstract(), "best": ()})


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (None, "was written by an earlier version .*; train again, or use commit [0-9a-f]{7}"),
        (99, "has format 99, but this version .* reads format 2; train again"),
    ],
)
def test_another_format_is_an_error(tmp_path, saved, number, message):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "2" / "record" / "metadata"
    record = json.loads(path.read_text())
    record["format"] = number
    if number is None:
        del record["format"]
    record["record_crc32"] = checkpoints._record_crc32(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/2 {message}"):
        restore(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def files(checkpoint):
    """The checkpoint's array files, largest first."""
    found = [path for path in (checkpoint / "arrays").rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def truncate_arrays(checkpoint):
    for path in files(checkpoint):
        truncate(path)


def flip_bits(checkpoint):
    for path in files(checkpoint):
        if path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)


def truncate_record(checkpoint):
    truncate(checkpoint / "record" / "metadata")


def edit_record(checkpoint):
    path = checkpoint / "record" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"meta": {"step": 9}}))


def edit_format(checkpoint):
    path = checkpoint / "record" / "metadata"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))


def write_nonsense(checkpoint):
    (checkpoint / "record" / "metadata").write_text('[[["pickle"]]]')


def delete_arrays(checkpoint):
    shutil.rmtree(checkpoint / "arrays")


def delete_record(checkpoint):
    shutil.rmtree(checkpoint / "record")


def delete_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def swell(checkpoint):
    with (checkpoint / "bomb").open("wb") as file:
        file.truncate(2**40)


DAMAGES = [truncate_arrays, flip_bits, truncate_record, edit_record, edit_format]
DAMAGES += [write_nonsense, delete_arrays, delete_record, delete_everything, swell]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, (1, state(1)), (2, state(2)))
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, saved, caplog, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "2")
    found = restore(tmp_path)
    assert found.path == tmp_path / "1" and found.meta == {"step": 1}
    assert f"checkpoint {tmp_path}/2 is damaged" in caplog.text
    damage(tmp_path / "1")
    with pytest.raises(ValueError, match="all 2 checkpoints in .* are damaged"):
        restore(tmp_path)


@pytest.mark.parametrize("damage", [truncate_arrays, delete_record, delete_everything])
def test_a_run_that_goes_on_from_the_one_before_overwrites_a_damaged_one(tmp_path, saved, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "1")
    damage(tmp_path / "2")
    save(tmp_path, (1, state()))
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_loading_never_unpickles(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    save(tmp_path, (0, state()))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert restore(tmp_path) is not None


@pytest.mark.slow
def test_no_random_damage_goes_unnoticed(tmp_path, saved, capfd):
    """With bytes changed or files cut short, what was written is read, or the checkpoint before.

    Only the log tells of damage: no thread is left behind or prints an error.
    """
    rng = np.random.default_rng(0)
    like = {"last": abstract()}
    originals = {path: path.read_bytes() for path in (saved / "2").rglob("*") if path.is_file()}
    copy = tmp_path / "2"
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    given_way = 0
    for _ in range(220):
        path, content = list(originals.items())[rng.integers(len(originals))]
        damaged = bytearray(content)
        if len(content) and rng.random() < 0.7:
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        else:
            del damaged[rng.integers(len(content) + 1) :]
        target = copy / path.relative_to(saved / "2")
        target.write_bytes(damaged)
        found = checkpoints.restore(tmp_path, like)
        expected = 1 if found.path.name == "1" else 2
        given_way += expected == 1
        assert found.meta == {"step": expected}
        assert_trees_equal(found.trees["last"], state(expected))
        target.write_bytes(content)
    assert given_way > 50
    assert "Traceback" not in capfd.readouterr().err
    assert threading.active_count() < 20
