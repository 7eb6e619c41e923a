import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_trees_equal
from support.linear_gaussian import LED_MODEL, Truth
from support.linear_gaussian import data as gaussian_data

from led_jax import LED, Elbo, densities, flows, networks, training

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

DATA = jnp.asarray(np.random.default_rng(0).permutation(np.eye(8, dtype=np.uint8).repeat(5, 0)))


@pytest.fixture(scope="module")
def led():
    return LED(
        networks.mlp_encoder(2, (16,), context_dim=3),
        flows.iaf((2,), 1, hidden=(4,), context_dim=3),
        densities.transformed(
            densities.standard_normal((2,)), flows.real_nvp((2,), 2, hidden=(4,))
        ),
        networks.mlp_decoder(8, (16,)),
    )


@pytest.fixture(scope="module")
def optimizer():
    return training.adam(1e-2, 1000, warmup_steps=5, clip_norm=10.0)


@pytest.fixture(scope="module")
def epoch(led, optimizer):
    return training.make_epoch(led, optimizer, 9)


def run(led, optimizer, epoch, seed, epochs):
    state = training.init_state(led, optimizer, jax.random.key(seed), DATA[:9])
    history = []
    for _ in range(epochs):
        state, steps = epoch(state, DATA)
        history.append(float(steps.mean().bound))
    return state, history


class Counter:
    """Stands in for a LED: its only parameter w has the terms (f(x), 0, w)."""

    def __init__(self, f=lambda x: x[:, 0]):
        self.f, self.traces = f, 0

    def elbo(self, params, key, x, axis_name=None):
        self.traces += 1
        zeros = jnp.zeros(len(x))
        return Elbo(self.f(x), zeros, zeros + params)


def counter_state(optimizer, seed=0):
    params = jnp.zeros(())
    return training.TrainState(
        params, optimizer.init(params), jax.random.key(seed), jnp.zeros((), jnp.int32)
    )


def test_the_bound_rises(led, optimizer, epoch):
    _, history = run(led, optimizer, epoch, 0, 60)
    assert np.all(np.isfinite(history))
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 1.5
    # Eight patterns, equally frequent: no model can beat minus their entropy.
    assert np.mean(history[-5:]) < -np.log(8)


def test_the_seed_sets_the_run(led, optimizer, epoch):
    first, again, other = (run(led, optimizer, epoch, seed, 2)[0] for seed in (3, 3, 4))
    assert_trees_equal(first, again)
    assert first.epoch == 2
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True):
        assert np.any(a != b)


def test_epoch_equals_its_steps(led, optimizer, epoch):
    """The scan over steps against a Python loop with the same keys and rows."""
    state = training.init_state(led, optimizer, KEY, DATA[:9])
    shuffle_key, step_key = jax.random.split(jax.random.fold_in(state.key, 0))
    rows = jax.random.permutation(shuffle_key, 40)[:36].reshape(4, 9)
    params, opt_state, means = state.params, state.opt_state, []
    step = jax.jit(training.train_step, static_argnums=(0, 1))
    for i in range(4):
        key = jax.random.split(jax.random.fold_in(step_key, i))[0]
        x = DATA[rows[i]].astype(jnp.float32)
        params, opt_state, terms = step(led, optimizer, params, opt_state, key, x)
        means.append(terms)
    state, steps = epoch(state, DATA)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        np.stack(steps.terms), np.stack(jax.tree.map(lambda *t: np.stack(t), *means)), rtol=1e-4
    )
    assert np.all(steps.updated)


def test_the_old_state_is_consumed(led, optimizer, epoch):
    state = training.init_state(led, optimizer, KEY, DATA[:9])
    old = jax.tree.leaves(state.params)
    epoch(state, DATA)
    assert all(leaf.is_deleted() for leaf in old)


def test_step_is_gradient_descent_on_the_negative_elbo(x64):
    truth, x = Truth(shift=0.5), gaussian_data(6)
    optimizer = optax.sgd(0.01)
    params, _, terms = training.train_step(
        LED_MODEL, optimizer, truth.params, optimizer.init(truth.params), KEY, x
    )

    def loss(bias):
        decoder = truth.params["decoder"] | {"bias": bias}
        return -LED_MODEL.elbo(truth.params | {"decoder": decoder}, KEY, x).bound.mean()

    bias = truth.params["decoder"]["bias"]
    for i in range(3):  # By finite differences.
        step = np.eye(3)[i] * 1e-5
        slope = (loss(bias + step) - loss(bias - step)) / 2e-5
        np.testing.assert_allclose(params["decoder"]["bias"][i], bias[i] - 0.01 * slope, rtol=1e-7)
    np.testing.assert_allclose(terms.bound, -loss(bias))


def test_left_over_rows_sit_out_by_turns():
    optimizer = optax.sgd(1.0)
    counter = Counter()
    epoch = training.make_epoch(counter, optimizer, 3)
    state = counter_state(optimizer)
    values = np.array([1, 2, 4, 8, 16, 32, 64], np.uint8)
    left_out = []
    for _ in range(25):
        state, steps = epoch(state, jnp.asarray(values)[:, None])
        # Six distinct rows were used: their sum tells which one was not.
        left_out.append(values.sum() - round(float(steps.mean().log_likelihood) * 6))
    assert set(left_out) <= set(values.tolist()) and len(set(left_out)) >= 4
    assert counter.traces <= 2  # One program for all epochs.


def test_static_rows_are_used_as_they_are():
    optimizer = optax.sgd(1.0)
    epoch = training.make_epoch(Counter(), optimizer, 4)
    rows = jnp.asarray(np.array([0, 1, 1, 1], np.uint8))[:, None]
    _, steps = epoch(counter_state(optimizer), rows)
    assert steps.mean().log_likelihood == 0.75


def test_dynamic_binarization_draws_afresh_from_the_grey_levels():
    optimizer = optax.sgd(1.0)
    levels = jnp.asarray(np.array([0, 51, 204, 255], np.uint8))
    rows = jnp.broadcast_to(levels, (200, 4))
    shares = []
    for column in range(4):
        counter = Counter(lambda x, c=column: x[:, c] + 10 * (x[:, c] * (1 - x[:, c])))
        epoch = training.make_epoch(counter, optimizer, 50, dynamic=True)
        state = counter_state(optimizer)
        share = []
        for _ in range(10):
            state, steps = epoch(state, rows)
            share.append(
                float(steps.mean().log_likelihood)
            )  # 0 or 1 only: the second term adds nothing.
        shares.append(share)
    shares = np.array(shares)
    assert np.all(shares[0] == 0) and np.all(shares[3] == 1)
    for row, p in ((1, 0.2), (2, 0.8)):
        assert len(set(shares[row])) > 3
        assert abs(shares[row].mean() - p) < 4 * np.sqrt(p * (1 - p) / 2000)


def test_dynamic_binarization_differs_between_steps_and_pixels():
    """Steps of one epoch draw with keys of their own, and pixels are independent."""
    optimizer = optax.sgd(1.0)
    seen = []

    class Spy(Counter):
        def elbo(self, params, key, x, axis_name=None):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
            return super().elbo(params, key, x, axis_name)

    epoch = training.make_epoch(Spy(), optimizer, 5, dynamic=True)
    state, _ = epoch(counter_state(optimizer), jnp.full((10, 64), 128, jnp.uint8))
    jax.effects_barrier()
    rows = np.concatenate(seen)
    assert len(seen) == 2 and rows.dtype == np.float32
    assert set(np.unique(rows)) == {0, 1}
    assert len({row.tobytes() for row in rows}) == 10


@pytest.mark.parametrize("kl_warmup", [0, 1, 2])
def test_kl_warmup_weights(kl_warmup):
    """The loss is weight * w - f(x): with unit steps, w goes down by the sum of the weights."""
    optimizer = optax.sgd(1.0)
    epoch = training.make_epoch(Counter(), optimizer, 2, kl_warmup=kl_warmup)
    state = counter_state(optimizer)
    data = jnp.zeros((8, 1), jnp.uint8)
    expected = 0.0
    for number in range(4):
        state, _ = epoch(state, data)
        for i in range(4):
            expected -= min(1, (number + i / 4) / kl_warmup) if kl_warmup else 1
        np.testing.assert_allclose(state.params, expected, rtol=1e-6)


def test_epoch_needs_a_whole_batch():
    optimizer = optax.sgd(1.0)
    epoch = training.make_epoch(Counter(), optimizer, 5)
    with pytest.raises(ValueError, match="expected at least batch_size=5 rows, got 4"):
        epoch(counter_state(optimizer), jnp.zeros((4, 1), jnp.uint8))


@pytest.mark.parametrize("n", [1, 10, 20, 25])
def test_evaluate_averages_over_all_rows(n):
    """With the exact posterior every row's bound is log p(x), whatever the draw."""
    truth, x = Truth(), gaussian_data(25)[:n]
    evaluate = training.make_evaluate(LED_MODEL, 10)
    terms = evaluate(truth.params, KEY, jnp.asarray(x, jnp.float32))
    assert terms.bound.shape == ()
    np.testing.assert_allclose(terms.bound, truth.log_marginal(x).mean(), rtol=1e-5)


def test_evaluate_draws_for_each_row():
    """The same row many times: its mean is the ELBO, not one draw."""
    truth = Truth(shift=0.5)
    x = np.repeat(gaussian_data(1), 5005, 0)
    terms = training.make_evaluate(LED_MODEL, 1000)(truth.params, KEY, jnp.asarray(x, jnp.float32))
    assert abs(terms.bound - truth.elbo(x[0])) < 0.1
    for actual, expected in zip(terms, truth.terms(x[0]), strict=True):
        assert abs(actual - expected) < 0.1


def rates(optimizer, steps):
    """Adam's step for a constant gradient is the learning rate."""
    params, grads = jnp.zeros(()), jnp.ones(())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    sizes = []
    for _ in range(steps):
        step, state = update(grads, state, params)
        sizes.append(-float(step))
    return np.array(sizes)


def test_schedule_without_warmup():
    actual = rates(training.adam(0.1, 20), 22)
    expected = 0.05 * (1 + np.cos(np.pi * np.minimum(np.arange(22), 20) / 20))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    assert actual[20] == actual[21] == 0 and actual[19] > 0


def test_schedule_with_warmup():
    actual = rates(training.adam(0.1, 20, warmup_steps=5), 22)
    np.testing.assert_allclose(actual[:6], 0.1 * np.arange(6) / 5, rtol=1e-4, atol=1e-7)
    assert np.argmax(actual) == 5 and np.all(np.diff(actual[5:21]) < 0)
    np.testing.assert_allclose(actual[20:], 0, atol=1e-7)


def test_clipping_bounds_the_gradient():
    moments = []
    for clip_norm in (None, 2.0):
        optimizer = training.adam(0.1, 20, clip_norm=clip_norm)
        params = {"a": jnp.zeros(2)}
        _, state = optimizer.update({"a": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
        moments.append(optax.tree.get(state, "mu")["a"])
    np.testing.assert_allclose(moments[0], [3, 4], rtol=1e-5)
    np.testing.assert_allclose(moments[1], [0.12, 0.16], rtol=1e-5)


def test_init_state(led, optimizer):
    state = training.init_state(led, optimizer, KEY, DATA[:9])
    assert state.epoch == 0 and state.epoch.dtype == jnp.int32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # The run's key is not the one that made the parameters.
    assert np.any(jax.random.key_data(state.key) != jax.random.key_data(KEY))


def test_a_batch_without_rows_is_refused(led, optimizer):
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        training.make_epoch(led, optimizer, 0)


def test_a_step_on_parts_of_a_batch_is_the_step_on_the_batch(led, optimizer):
    """Each part draws the noise of its own rows, so that only the order of sums differs."""
    x = DATA[:4].astype(float)
    params = jax.jit(led.init)(KEY, x)
    step = functools.partial(training.train_step, led, optax.sgd(0.1))
    step = jax.jit(step, static_argnames="axis_name")
    state = optax.sgd(0.1).init(params)
    mapped, _, terms = jax.vmap(
        lambda x: step(params, state, KEY, x, axis_name="devices"), axis_name="devices"
    )(x.reshape(2, 2, -1))
    whole, _, expected = step(params, state, KEY, x)
    for device in range(2):
        part = jax.tree.map(lambda leaf, i=device: leaf[i], (mapped, terms))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), part, (whole, expected)
        )


def test_steps_on_picked_batches_are_the_epoch(led, optimizer, epoch):
    state = training.init_state(led, optimizer, KEY, DATA[:9])
    rows = np.asarray(DATA)[training.epoch_rows(state, 40, 9)]
    steps = training.make_steps(led, optimizer, 4)
    parts = []
    picked = jax.tree.map(jnp.copy, state)
    for first, x in ((0, rows[:3]), (3, rows[3:])):
        assert picked.epoch == 0
        picked, part = steps(picked, jnp.array(first), x)
        parts.append(part)
    state, expected = epoch(state, DATA)
    np.testing.assert_array_equal(picked.epoch, state.epoch)
    for a, b in zip(jax.tree.leaves(picked.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    bounds = np.concatenate([part.terms.bound for part in parts])
    np.testing.assert_allclose(bounds, expected.terms.bound, rtol=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_told():
    """The third row has an infinite term: its step changes nothing, the others do."""
    optimizer = optax.adam(1.0)
    led = Counter(lambda x: jnp.where(x[:, 0] == 2, jnp.inf, 0))
    data = jnp.arange(5, dtype=jnp.uint8)[:, None]
    order = np.asarray(training.epoch_rows(counter_state(optimizer), 5, 1))[:, 0]
    state, steps = training.make_epoch(led, optimizer, 1)(counter_state(optimizer), data)
    assert not training.is_finite((state, steps))
    state, steps = training.make_epoch(led, optimizer, 1, skip_nonfinite=True)(
        counter_state(optimizer), data
    )
    np.testing.assert_array_equal(steps.updated, order != 2)
    assert training.is_finite((state, steps.mean()))
    four = training.make_epoch(Counter(lambda x: 0 * x[:, 0]), optimizer, 1)
    np.testing.assert_allclose(state.params, four(counter_state(optimizer), data[:4])[0].params)
