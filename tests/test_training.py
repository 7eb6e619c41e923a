import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_trees_equal
from support.linear_gaussian import LED_MODEL, S, Truth
from support.linear_gaussian import data as gaussian_data

from led_jax import (
    LED,
    Elbo,
    Objective,
    decoders,
    densities,
    encoders,
    flows,
    objectives,
    optimizers,
    training,
)
from led_jax.data.dataset import Dataset, binarize, cast

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

PATTERNS = np.random.default_rng(0).permutation(np.eye(8, dtype=np.uint8).repeat(5, 0))


def dataset(train, valid=None, prepare=cast):
    train = np.asarray(train)
    valid = train[:0] if valid is None else np.asarray(valid)
    return Dataset("rows", train.shape[1:], train, valid, train[:0], prepare)


# Small, since nearly all the time goes into compiling, but with parameters in every part.
SMALL = LED(
    encoders.mlp_encoder(2, (4,), context_dim=3),
    flows.iaf((2,), 1, hidden=(4,), context_dim=3),
    densities.transformed(densities.standard_normal((2,)), flows.actnorm()),
    decoders.mlp_decoder(8, ()),
)
# Equal models and optimizers share their programs.
ADAM = training.adam(1e-2, 1000, warmup_steps=5, clip_norm=10.0)
SGD = optax.sgd(1.0)
STILL = optax.sgd(0.0)
BATCH = {"batch_size": 9}


def run(
    model, num_epochs, rows=PATTERNS, key=KEY, optimizer=ADAM, valid=None, given=None, **options
):
    """A list of what `training.epochs` yields, from given parameters or fresh ones."""
    data = rows if isinstance(rows, Dataset) else dataset(rows, valid)
    options = BATCH | options
    if given is not None:
        options["resume"] = training.begin(model, optimizer, data, key, given=given)
    return list(training.epochs(model, optimizer, data, key, num_epochs=num_epochs, **options))


@dataclasses.dataclass(frozen=True)
class Toy:
    """Stands in for a LED: its only parameter w has the terms (f(x), 0, w)."""

    f: object = lambda x: x[:, 0]
    traces: list | None = None

    def init(self, key, x):
        return jnp.zeros(())

    def elbo(self, params, key, x, context=None):
        if self.traces is not None:
            self.traces.append(x.shape)
        zeros = jnp.zeros(len(x))
        return Elbo(self.f(x), zeros, zeros + params)


def run_toy(toy, num_epochs, rows, batch_size, optimizer=SGD, **options):
    return run(toy, num_epochs, rows, optimizer=optimizer, batch_size=batch_size, **options)


@pytest.mark.slow
def test_a_subclass_with_equal_parts_has_programs_of_its_own():
    class Doubled(LED):
        def elbo(self, *args, **kwargs):
            terms = super().elbo(*args, **kwargs)
            return terms._replace(log_likelihood=2 * terms.log_likelihood)

    doubled = Doubled(*SMALL)
    assert doubled != SMALL and not doubled == SMALL and doubled == Doubled(*SMALL)
    single, double = (
        run(model, 1, optimizer=STILL, valid=PATTERNS)[0].history[0] for model in (SMALL, doubled)
    )
    for name in ("train_log_likelihood", "valid_log_likelihood"):
        assert double[name] == pytest.approx(2 * single[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"on_host": True}, {"method": "pmap"}])
def test_every_row_comes_with_its_own_context(options):
    """Each row is its own context; the log-likelihood is minus the distance of the two."""

    class Conditional(Toy):
        def init(self, key, x, context):
            return jnp.zeros(())

        def elbo(self, params, key, x, context):
            zeros = jnp.zeros(len(x))
            return Elbo(-jnp.abs(x - context).sum(1), zeros, zeros + params)

    rng = np.random.default_rng(0)
    train, valid = (rng.integers(0, 256, (n, 2)).astype(np.uint8) for n in (23, 7))
    context = {"train": train, "valid": valid.astype(np.float32)}
    data = dataset(train, valid)._replace(context=context)
    (progress,) = run_toy(Conditional(), 1, data, 4, **options)
    assert progress.history[0]["train_log_likelihood"] == 0
    assert progress.history[0]["valid_log_likelihood"] == 0
    assert progress.history[0]["train_log_posterior"] != 0
    others = data._replace(context=context | {"train": train[::-1].copy()})
    (progress,) = run_toy(Conditional(), 1, others, 4, **options)
    assert progress.history[0]["train_log_likelihood"] < -50


@pytest.mark.slow
def test_a_linear_gaussian_model_comes_to_the_maximum_of_its_likelihood():
    """The maximum is that of principal components: Tipping and Bishop (1999), for a known noise.

    Two eigenvalues of the data's covariance are the model's own, the third one is S^2.
    """
    x = gaussian_data(400).astype(np.float32)
    spread = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    best = -0.5 * (
        3 * math.log(2 * math.pi) + np.log([S**2, *spread[1:]]).sum() + 2 + spread[0] / S**2
    )
    model = LED_MODEL._replace(posterior=flows.chain(), prior=densities.standard_normal((2,)))
    start = jax.tree.map(lambda leaf: 0.1 * np.asarray(leaf), jax.jit(model.init)(KEY, x[0]))
    optimizer = training.adam(0.05, 2000)
    *_, end = run(model, 200, x, optimizer=optimizer, given=start, batch_size=40)
    elbo = float(jax.jit(lambda p: model.elbo(p, KEY, x, (200,)).bound.mean())(end.params))
    assert elbo == pytest.approx(best, abs=0.005)
    assert end.train["elbo"] == pytest.approx(best, abs=0.1)


@pytest.fixture(scope="module")
def straight():
    """What four epochs of the small model yield, with validation."""
    return run(SMALL, 4, valid=PATTERNS[:6])


@pytest.mark.slow
def test_the_seed_sets_the_run(straight):
    first = straight[1].state
    again, other = (run(SMALL, 2, key=jax.random.key(seed))[-1].state for seed in (0, 4))
    assert_trees_equal(first, again)
    assert first.epoch == 2
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True):
        assert np.any(np.asarray(a) != np.asarray(b))


@pytest.mark.slow
def test_an_epoch_is_its_steps(straight):
    """The scan over steps against a Python loop with the same keys and rows."""
    state, end = straight[0].state, straight[1]

    @jax.jit
    def draws(state):
        shuffle_key, step_key = jax.random.split(jax.random.fold_in(state.key, 1))
        rows = jax.random.permutation(shuffle_key, 40)[:36].reshape(4, 9)
        keys = [jax.random.split(jax.random.fold_in(step_key, i))[0] for i in range(4)]
        return training.epoch_rows(state, 40, 9), rows, keys

    found_rows, rows, keys = draws(state)
    np.testing.assert_array_equal(found_rows, rows)
    trained, opt_state, found = (state.params, state.own), state.opt_state, []
    step = jax.jit(training.train_step, static_argnums=(0, 1, 2))
    objective = objectives.elbo()
    for i, (key, batch) in enumerate(zip(keys, np.asarray(rows), strict=True)):
        x = PATTERNS[batch].astype(np.float32)
        trained, opt_state, metrics = step(
            SMALL, ADAM, objective, trained, opt_state, key, x, 4 + i
        )
        found.append(metrics)
    for a, b in zip(jax.tree.leaves(end.state.params), jax.tree.leaves(trained[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert set(end.train) == {"elbo", "log_likelihood", "log_prior", "log_posterior"}
    for name, mean in end.train.items():
        assert mean == pytest.approx(np.mean([metrics[name] for metrics in found]), rel=1e-4)
    assert end.skipped == 0 and end.seconds > 0


@pytest.mark.slow
def test_a_step_is_gradient_descent_on_the_negative_elbo(x64):
    truth, x = Truth(shift=0.5), gaussian_data(6)
    optimizer = optax.sgd(0.01)
    trained = truth.params, ()
    train_step = jax.jit(training.train_step, static_argnums=(0, 1, 2))
    (params, own), _, metrics = train_step(
        LED_MODEL, optimizer, objectives.elbo(), trained, optimizer.init(trained), KEY, x, 0
    )
    assert own == ()

    @jax.jit
    def loss(bias):
        decoder = truth.params["decoder"] | {"bias": bias}
        return -LED_MODEL.elbo(truth.params | {"decoder": decoder}, KEY, x).bound.mean()

    bias, moved = (np.asarray(p["decoder"]["bias"]) for p in (truth.params, params))
    for i in range(3):  # By finite differences.
        step = np.eye(3)[i] * 1e-5
        slope = (float(loss(bias + step)) - float(loss(bias - step))) / 2e-5
        np.testing.assert_allclose(moved[i], bias[i] - 0.01 * slope, rtol=1e-7)
    np.testing.assert_allclose(metrics["elbo"], -float(loss(bias)))


@pytest.mark.slow
def test_float64_stays_float64(x64):
    x = gaussian_data(20)
    optimizer = optax.adam(1e-3)
    *_, end = run(LED_MODEL, 2, x, valid=x[:5], optimizer=optimizer, given=Truth().params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((end.state.params, end.state.opt_state))}
    assert dtypes == {jnp.dtype("float64"), jnp.dtype("int32")}
    assert end.best_score > -np.inf


@pytest.mark.slow
def test_each_epoch_takes_the_rows_in_a_new_order_and_leaves_out_other_ones():
    values = 2 ** np.arange(7)
    toy = Toy(traces=[])
    left_out = []
    for progress in run_toy(toy, 25, values[:, None].astype(np.uint8), 3):
        # Six distinct rows were used: their sum tells which one was not.
        left_out.append(values.sum() - round(progress.train["log_likelihood"] * 6))
    assert set(left_out) <= set(values.tolist()) and len(set(left_out)) >= 4
    epoch_rows = jax.jit(training.epoch_rows, static_argnums=(1, 2))
    states = [progress.state._replace(epoch=np.int32(i)) for i in range(5)]
    orders = [np.asarray(epoch_rows(state, 7, 7)).ravel().tolist() for state in states]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(map(tuple, orders))) == 5


def test_each_program_is_made_once():
    """All epochs need one or two traces of the step, and one of the validation's score."""
    toy, scored = Toy(traces=[]), []

    def score(model, params, key, x):
        scored.append(x.shape)
        return {"elbo": x[:, 0]}

    rows = np.zeros((12, 1), np.uint8)
    made = [p.compile_seconds for p in run_toy(toy, 5, rows, 4, valid=rows[:7], score=score)]
    assert set(toy.traces) == {(4, 1)} and len(toy.traces) <= 2
    assert scored == [(7, 1)]
    assert made[0] > 0 and set(made[1:]) == {0.0}


def test_rows_are_cast_and_used_as_they_are():
    rows = np.array([0, 1, 1, 1], np.uint8)[:, None]
    assert run_toy(Toy(), 1, rows, 4)[0].train["log_likelihood"] == 0.75


@pytest.mark.slow
def test_prepare_is_applied_afresh_in_every_step():
    """Binarization: the grey level is the probability of a one, drawn anew in every epoch."""
    # The second term is 0 if x is 0 or 1 only.
    toy, means = Toy(lambda x: x[:, 0] + 10 * (x[:, 0] * (1 - x[:, 0]))), []
    for level in (0, 51, 204, 255):
        rows = np.full((200, 1), level, np.uint8)
        found = run_toy(toy, 10, dataset(rows, prepare=binarize), 50)
        means.append([progress.train["log_likelihood"] for progress in found])
    means = np.array(means)
    assert np.all(means[0] == 0) and np.all(means[3] == 1)
    for row, p in ((1, 0.2), (2, 0.8)):
        assert len(set(means[row])) > 3
        assert abs(means[row].mean() - p) < 4 * np.sqrt(p * (1 - p) / 2000)


@pytest.mark.slow
def test_prepare_differs_between_steps_and_rows():
    seen = []

    def f(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return x[:, 0]

    rows = np.full((10, 64), 128, np.uint8)
    run_toy(Toy(f), 1, dataset(rows, prepare=binarize), 5)
    jax.effects_barrier()
    rows = np.concatenate(seen)
    assert len(seen) == 2 and rows.dtype == np.float32
    assert set(np.unique(rows)) == {0, 1}
    assert len({row.tobytes() for row in rows}) == 10


@pytest.mark.slow
def test_init_sees_prepared_rows():
    seen = []

    class Spy(Toy):
        def init(self, key, x):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
            return jnp.zeros(())

    run_toy(Spy(), 1, dataset(np.full((1500, 8), 128, np.uint8), prepare=binarize), 500)
    jax.effects_barrier()
    assert seen[0].shape == (training.INIT_ROWS, 8)
    assert set(np.unique(seen[0])) == {0, 1} and 0.4 < seen[0].mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 4, 8])
def test_schedules_are_of_the_number_of_the_step(warmup):
    """The loss is weight * w - f(x): with unit steps, w goes down by the sum of the weights."""
    schedule = optax.linear_schedule(0.0, 1.0, warmup) if warmup else 1.0
    rows = np.zeros((8, 1), np.uint8)
    options = {"objective": objectives.elbo(schedule)}
    progress, expected = None, 0.0
    for epoch in range(4):
        progress = run_toy(Toy(), epoch + 1, rows, 2, resume=progress, **options)[-1]
        expected -= sum(
            min(1, step / warmup) if warmup else 1 for step in range(4 * epoch, 4 * epoch + 4)
        )
        np.testing.assert_allclose(progress.params, expected, rtol=1e-6)


def test_going_on_equals_never_having_stopped(straight):
    resumed = run(SMALL, 4, valid=PATTERNS[:6], resume=straight[1], key=jax.random.key(9))
    for a, b in zip(resumed, straight[2:], strict=True):
        assert_trees_equal((a.state, a.best), (b.state, b.best))
        assert (a.history, a.best_score, a.train) == (b.history, b.best_score, b.train)


@pytest.mark.slow
def test_what_was_yielded_can_be_kept():
    rows = dataset(np.ones((2, 1), np.uint8))
    found = training.epochs(Toy(), optax.adam(1.0), rows, KEY, batch_size=1)
    first = next(found)
    copy = jax.tree.map(jnp.copy, first.state)
    next(found)
    assert_trees_equal(first.state, copy)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [40, 250])
def test_data_on_the_host_train_as_on_the_device(num_rows, monkeypatch):
    """Bit for bit, in one block of steps and in three, the last of them shorter."""
    pytest.importorskip("grain")
    monkeypatch.setattr(training, "_BLOCK_STEPS", 100 if num_rows == 40 else 10)
    rows = np.resize(PATTERNS, (num_rows, 8)) * np.uint8(100)
    data = dataset(rows, prepare=binarize)
    x = PATTERNS.astype(np.float32)
    start = training.init_state(SMALL, ADAM, KEY, x)
    options = {"resume": training.Progress(start, start)}
    device, host = (run(SMALL, 2, data, on_host=on_host, **options) for on_host in (False, True))
    for a, b in zip(device, host, strict=True):
        assert_trees_equal(a.state, b.state)
        assert a.train == b.train


@functools.cache
def infinite_at(value):
    return lambda x: jnp.where(x[:, 0] == value, jnp.inf, 0)


@pytest.mark.slow
@pytest.mark.parametrize("on_host", [False, True])
def test_steps_that_are_not_finite_are_skipped_and_told(on_host):
    """One row has an infinite term: its step changes nothing, the others do."""
    rows = np.arange(5, dtype=np.uint8)[:, None]
    adam = optax.adam(1.0)
    found = run_toy(Toy(infinite_at(2)), 3, rows, 1, adam, on_host=on_host)
    assert [progress.skipped for progress in found] == [1, 2, 3]
    assert all(progress.train["log_likelihood"] == 0 for progress in found)
    assert found[1].compile_seconds == 0  # The program that checks every step is made once.
    four = run_toy(Toy(infinite_at(9)), 3, rows[:4], 1, adam, on_host=on_host)
    assert [progress.skipped for progress in four] == [0, 0, 0]
    for a, b in zip(found, four, strict=True):
        np.testing.assert_allclose(a.params, b.params)


@pytest.mark.slow
def test_a_bad_gradient_of_a_finite_loss_is_skipped():
    class Root(Toy):
        def elbo(self, params, key, x, context=None):
            terms = super().elbo(params, key, x)
            return terms._replace(log_prior=jnp.sqrt(x[:, 0] * params))  # Infinite slope at 0.

    (progress,) = run_toy(Root(), 1, np.array([[1], [1], [0]], np.uint8), 1, max_skipped=3)
    assert progress.skipped > 0 and training.is_finite(progress.state)


@pytest.mark.slow
@pytest.mark.parametrize(("max_skipped", "epoch"), [(0, 1), (1, 2), (2, 3)])
def test_too_many_skipped_updates_are_an_error_that_says_what_to_do(max_skipped, epoch):
    rows = np.arange(5, dtype=np.uint8)[:, None]
    found = training.epochs(
        Toy(infinite_at(2)), ADAM, dataset(rows), KEY, batch_size=1, max_skipped=max_skipped
    )
    for number in range(1, epoch):
        assert next(found).skipped == number
    message = (
        rf"not finite in step [1-5] of epoch {epoch}: {epoch} updates .* "
        rf"max_skipped={max_skipped}\. .*lower.*learning rate.*clip"
    )
    with pytest.raises(FloatingPointError, match=message):
        next(found)


def test_a_validation_that_is_not_finite_is_an_error_that_says_what_to_do():
    rows = np.zeros((2, 1), np.uint8)
    message = r"the validation's elbo is nan after epoch 1\. .*lower.*learning rate.*clip"
    with pytest.raises(FloatingPointError, match=message):
        run_toy(Toy(), 1, rows, 2, valid=rows, score=lambda m, p, k, x: {"elbo": x[:, 0] * jnp.nan})


def scores_of(values):
    """A score that takes the given values after epochs 1, 2, ..., where w is minus the epoch."""

    def score(model, params, key, x):
        return {"mine": jnp.zeros(len(x)) + jnp.asarray(values)[-params.astype(int) - 1]}

    return {"score": score, "select": "mine"}


def test_the_best_state_is_selected():
    rows = np.ones((2, 1), np.uint8)
    found = run_toy(Toy(), 5, rows, 2, valid=rows, **scores_of([1.0, 3.0, 2.0, 3.0, 4.0]))
    assert [int(progress.best.epoch) for progress in found] == [1, 2, 2, 2, 5]
    assert [progress.best_score for progress in found] == [1, 3, 3, 3, 4]
    assert [float(progress.params) for progress in found] == [-1, -2, -2, -2, -5]
    end = found[-1]
    assert [record["valid_mine"] for record in end.history] == [1, 3, 2, 3, 4]
    assert [record["epoch"] for record in end.history] == [1, 2, 3, 4, 5]
    assert all(record["train_log_likelihood"] == 1 for record in end.history)


def test_validation_every_so_many_epochs_and_after_the_last():
    rows = np.ones((2, 1), np.uint8)
    scores = scores_of([9.0, 1.0, 9.0, 2.0, 0.0])
    *_, end = run_toy(Toy(), 5, rows, 2, valid=rows, valid_every=2, **scores)
    assert [record["epoch"] for record in end.history] == [2, 4, 5]
    assert int(end.best.epoch) == 4


def test_without_validation_the_last_state_counts():
    *_, end = run_toy(Toy(), 3, np.ones((2, 1), np.uint8), 2)
    assert end.history == () and float(end.params) == -3 and int(end.best.epoch) == 3


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 1000, 2300])
def test_validation_averages_over_all_rows(n):
    """With the exact posterior every row's bound is log p(x), whatever the draw."""
    truth, x = Truth(), gaussian_data(2300)[:n].astype(np.float32)
    assert validate(truth, x)["elbo"] == pytest.approx(truth.log_marginal(x).mean(), rel=1e-5)


@pytest.mark.slow
def test_validation_draws_for_each_row():
    """The same row many times: its mean is the ELBO, not one draw."""
    truth = Truth(shift=0.5)
    x = np.repeat(gaussian_data(1), 5005, 0).astype(np.float32)
    found = validate(truth, x)
    assert abs(found["elbo"] - truth.elbo(x[0])) < 0.1
    for name, expected in zip(Elbo._fields, truth.terms(x[0]), strict=True):
        assert abs(found[name] - expected) < 0.1


def validate(truth, x):
    """The validation's means for parameters that training leaves unchanged."""
    options = {"optimizer": STILL, "given": truth.params, "batch_size": 1, "valid": x}
    *_, end = run(LED_MODEL, 1, x[:1], **options)
    return {name[6:]: value for name, value in end.history[0].items() if "valid_" in name}


class Line(NamedTuple):
    """A model of one parameter w, that starts at 0."""

    def init(self, key, x):
        return {"w": jnp.zeros(())}


def critic():
    """w climbs against a critic c that follows it: w' = w + (c - w + 1), c' = c + (w - c)."""

    def init(key, model, params, x):
        assert set(params) == {"w"} and x.ndim == 2
        return {"c": jnp.full((), 5.0)}

    def loss(model, params, own, key, x, step):
        gap = own["c"] - jax.lax.stop_gradient(params["w"])
        chase = jax.lax.stop_gradient(own["c"]) - params["w"] + 1
        return 0.5 * (gap**2 + chase**2), {"gap": gap}

    return Objective(init, loss)


def test_an_objectives_own_parameters_train_and_stay_out_of_the_model():
    options = {"objective": critic(), "optimizer": optax.sgd(0.5)}
    rows = np.zeros((2, 1), np.uint8)
    first, second = run(Line(), 2, rows, batch_size=2, **options)
    assert first.state.own["c"] == 2.5 and first.state.params["w"] == 3  # From 5 and 0.
    assert second.state.own["c"] == 2.75 and second.state.params["w"] == 3.25
    assert first.train == {"gap": 5}
    assert set(second.params) == {"w"}


def test_optax_can_treat_the_model_and_the_objective_differently():
    optimizer = optax.partition(
        {"model": optax.sgd(0.5), "critic": optax.set_to_zero()}, ("model", "critic")
    )
    rows = np.zeros((2, 1), np.uint8)
    *_, end = run(Line(), 2, rows, batch_size=2, objective=critic(), optimizer=optimizer)
    assert end.state.own["c"] == 5 and end.state.params["w"] == 4.5


@pytest.mark.slow
def test_a_prior_is_fitted_afterwards_by_an_objective_that_stops_the_other_gradients(straight):
    """The best affine prior has the mean and variance of the posterior's draws."""

    def loss(model, params, own, key, x, step):
        fixed = jax.lax.stop_gradient(params)
        z = model.encode(fixed, key, x)
        log_prior = model.prior_log_prob(fixed | {"prior": params["prior"]}, z).mean()
        return -log_prior, {"log_prior": log_prior}

    params = straight[-1].params
    objective = Objective(objectives.elbo().init, loss)
    optimizer = training.adam(0.1, 400)
    *_, end = run(SMALL, 100, optimizer=optimizer, objective=objective, given=params)
    for part in ("encoder", "posterior", "decoder"):
        assert_trees_equal(end.params[part], params[part])
    x = np.tile(PATTERNS, (500, 1)).astype(np.float32)
    z = np.asarray(jax.jit(SMALL.encode)(params, KEY, x))
    expected = -(0.5 + np.log(np.sqrt(2 * np.pi) * z.std(0))).sum()
    log_prior = np.asarray(jax.jit(SMALL.prior_log_prob)(end.params, z)).mean()
    assert float(log_prior) == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_a_density_is_trained_by_maximum_likelihood():
    density = densities.transformed(densities.standard_normal((2,)), flows.invert(flows.actnorm()))
    # Without batch axes the flow starts as the identity, rather than at the answer.
    density = density._replace(init=lambda key, x, init=density.init: init(key, x[0]))
    x = np.random.default_rng(0).normal(3, 0.5, (300, 2)).astype(np.float32)
    options = {"objective": objectives.maximum_likelihood(), "batch_size": 300}
    *_, end = run(density, 400, x, optimizer=training.adam(0.1, 400), **options)
    # At the maximum: the normal of the data's own mean and variance.
    expected = -(0.5 + np.log(np.sqrt(2 * np.pi) * x.std(0))).sum()
    assert end.train["log_prob"] == pytest.approx(expected, abs=1e-3)


def test_fit_goes_through_the_epochs_and_tells_of_each():
    rows, seen = np.ones((4, 1), np.uint8), []
    fit = functools.partial(training.fit, Toy(), SGD, dataset(rows), KEY, batch_size=2)
    end = fit(3, callback=lambda progress: seen.append(progress.epoch))
    assert seen == [1, 2, 3] and end.epoch == 3 and float(end.params) == -6
    assert float(fit(5, resume=end).params) == -10
    with pytest.raises(ValueError, match="num_epochs must be 1 or more, got 0"):
        fit(0)
    assert fit(3, resume=end) is end  # Nothing is left to do.


def test_fit_stops_when_the_score_no_longer_rises():
    rows = np.ones((2, 1), np.uint8)
    end = training.fit(
        Toy(),
        SGD,
        dataset(rows, rows),
        KEY,
        9,
        patience=2,
        batch_size=2,
        **scores_of([1.0, 3.0, 2.0, 4.0, 0.0, 0.0, 9.0, 9.0, 9.0]),
    )
    assert end.epoch == 6 and int(end.best.epoch) == 4
    options = {"patience": 2, "batch_size": 2, "valid": rows}
    assert run_toy(Toy(), 9, rows, resume=end, **options) == []


@pytest.mark.slow
def test_parameters_averaged_over_time_are_validated_and_kept():
    """Toy's parameter is -t after t unit steps; its own average follows from the weights."""
    rows = np.zeros((4, 1), np.uint8)
    optimizer = optimizers.averaged(optax.sgd(1.0), decay=0.9)
    options = {"valid": rows, "batch_size": 2, "optimizer": optimizer}
    first, second = run_toy(Toy(), 2, rows, **options)
    steps = np.arange(1, 5)
    for progress, t in ((first, 2), (second, 4)):
        expected = -np.average(steps[:t], weights=0.9 ** (t - steps[:t]))
        assert float(progress.state.params) == -t
        assert float(progress.state.eval_params) == pytest.approx(expected, rel=1e-5)
        assert progress.history[-1]["valid_log_posterior"] == pytest.approx(expected, rel=1e-5)
    assert second.params == second.best.eval_params != second.best.params
    (again,) = run_toy(Toy(), 2, rows, resume=first, **options)
    assert_trees_equal(again.state, second.state)
    with pytest.raises(ValueError, match=r"averaged: decay must be in \[0, 1\), got 1"):
        optimizers.averaged(optax.sgd(1.0), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, "batch_size must be from 1 to the 4 training rows, got 5"),
        ({"batch_size": 0}, "batch_size must be from 1 to the 4 training rows, got 0"),
        ({"patience": 0}, "patience must be 1 or more, or None, got 0"),
        ({"valid_every": 0}, "valid_every must be 1 or more, got 0"),
        ({"valid_every": 3, "patience": 2}, "patience=2 ends training before valid_every=3"),
        ({"method": "pjit"}, "method must be one of jit, pmap, got 'pjit'"),
        ({"method": "pmap", "on_host": True}, "method='pmap' needs the data on the devices"),
        ({"select": "bound"}, "select='bound' is none of the scores elbo, "),
    ],
)
def test_wrong_arguments(options, message):
    rows = np.zeros((4, 1), np.uint8)
    with pytest.raises(ValueError, match=message):
        run_toy(Toy(), 1, dataset(rows, rows), **({"batch_size": 2} | options))


def test_without_jit_training_says_what_to_do():
    rows = np.zeros((4, 1), np.uint8)
    with jax.disable_jit(), pytest.raises(ValueError, match="unset JAX_DISABLE_JIT"):
        run_toy(Toy(), 1, dataset(rows), batch_size=2)


def rates(optimizer, steps):
    """The learning rate of each step, which is Adam's update for a constant gradient."""
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


@pytest.mark.slow
def test_clipping_bounds_the_gradient():
    moments = []
    for clip_norm in (None, 2.0):
        optimizer = training.adam(0.1, 20, clip_norm=clip_norm)
        params, grads = {"a": np.zeros(2)}, {"a": np.array([30.0, 40.0])}
        _, state = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
        moments.append(optax.tree.get(state, "mu")["a"])
    np.testing.assert_allclose(moments[0], [3, 4], rtol=1e-5)
    np.testing.assert_allclose(moments[1], [0.12, 0.16], rtol=1e-5)


@pytest.mark.slow
def test_init_state():
    state = training.init_state(SMALL, ADAM, KEY, PATTERNS.astype(np.float32))
    assert state.epoch == 0 and state.epoch.dtype == jnp.int32 and state.own == ()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # The run's key is not the one that made the parameters.
    run_key, key = (np.asarray(jax.random.key_data(k)) for k in (state.key, KEY))
    assert np.any(run_key != key)
