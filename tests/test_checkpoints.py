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


@pytest.fixture
def fresh(led, optimizer):
    return lambda: training.init_state(led, optimizer, KEY, DATA)


def advance(epoch, state, epochs):
    for _ in range(epochs):
        state, _ = epoch(state, DATA)
    return state


def copy(state):
    return jax.tree.map(jnp.copy, state)


def test_restores_what_was_saved_bit_for_bit(tmp_path, epoch, fresh):
    best = advance(epoch, fresh(), 1)
    last = advance(epoch, copy(best), 2)
    meta = {"history": [{"epoch": 1, "valid_elbo": -3.25}], "name": "run"}
    checkpoints.save(tmp_path / "new" / "checkpoints", last, best, meta)
    restored = checkpoints.restore(tmp_path / "new" / "checkpoints", jax.eval_shape(fresh))
    assert_trees_equal(restored[0], last)
    assert_trees_equal(restored[1], best)
    assert restored[2] == meta
    assert last.epoch == 3 and best.epoch == 1


def test_going_on_equals_never_having_stopped(tmp_path, epoch, fresh):
    uninterrupted = advance(epoch, fresh(), 4)
    state = advance(epoch, fresh(), 2)
    checkpoints.save(tmp_path, state, state, {})
    restored, _, _ = checkpoints.restore(tmp_path, jax.eval_shape(fresh))
    assert_trees_equal(advance(epoch, jax.device_put(restored), 2), uninterrupted)


def test_the_newest_wins_and_two_are_kept(tmp_path, epoch, fresh):
    state = fresh()
    for i in range(4):
        state = advance(epoch, state, 1)
        checkpoints.save(tmp_path, state, state, {"i": i})
    restored, _, meta = checkpoints.restore(tmp_path, jax.eval_shape(fresh))
    assert restored.epoch == 4 and meta == {"i": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_no_checkpoint(tmp_path, fresh):
    like = jax.eval_shape(fresh)
    assert checkpoints.restore(tmp_path, like) is None
    assert checkpoints.restore(tmp_path / "missing", like) is None
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


@pytest.mark.parametrize("change", [other_width, other_depth, no_prior_flow])
def test_another_model_is_an_error_that_names_the_checkpoint(
    tmp_path, led, optimizer, fresh, change
):
    state = fresh()
    checkpoints.save(tmp_path, state, state, {})
    like = jax.eval_shape(lambda: training.init_state(change(led), optimizer, KEY, DATA))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/0 cannot be read as a run of"):
        checkpoints.restore(tmp_path, like)


def test_another_optimizer_is_an_error(tmp_path, led, fresh):
    state = fresh()
    checkpoints.save(tmp_path, state, state, {})
    like = jax.eval_shape(lambda: training.init_state(led, optax.sgd(0.1), KEY, DATA))
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/0 cannot be read"):
        checkpoints.restore(tmp_path, like)


def test_a_damaged_checkpoint_is_an_error(tmp_path, fresh):
    state = fresh()
    checkpoints.save(tmp_path, state, state, {})
    damaged = [path for path in (tmp_path / "0" / "last").rglob("*") if path.is_file()]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/0 cannot be read"):
        checkpoints.restore(tmp_path, jax.eval_shape(fresh))
