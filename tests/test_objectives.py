import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KEY
from support.linear_gaussian import LED_MODEL, Truth, data

from led_jax import objectives

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

OFF = {"shift": 0.3, "spread": 1.3}  # Wider than the exact posterior: weights of finite variance.


def test_negative_elbo_is_the_loss_and_its_terms(x64):
    truth, x = Truth(**OFF), data(8)
    draws = LED_MODEL.elbo(truth.params, KEY, x)
    loss, terms = objectives.negative_elbo(LED_MODEL, truth.params, KEY, x)
    np.testing.assert_allclose(loss, -draws.bound.mean())
    for actual, expected in zip(terms, draws, strict=True):
        np.testing.assert_allclose(actual, expected.mean())
    for weight in (0.0, 0.25):
        loss, terms = objectives.negative_elbo(LED_MODEL, truth.params, KEY, x, weight)
        kl = terms.log_posterior - terms.log_prior
        np.testing.assert_allclose(loss, weight * kl - terms.log_likelihood)
        np.testing.assert_allclose(terms.bound, draws.bound.mean())  # Whatever the weight.


def test_importance_weighted_bound_rises_from_the_elbo_to_the_marginal(x64):
    truth, x = Truth(**OFF), data(1)
    rows = np.broadcast_to(x, (20_000, 3))
    bound = jax.jit(objectives.importance_weighted_bound, static_argnums=(0, 4))
    means, errors = [], []
    for k in (1, 2, 8, 64):
        draws = bound(LED_MODEL, truth.params, KEY, rows, k)
        assert draws.shape == (20_000,)
        means.append(draws.mean())
        errors.append(draws.std() / math.sqrt(20_000))
    assert abs(means[0] - truth.elbo(x)[0]) < 4 * errors[0]
    assert np.all(np.diff(means) > 4 * np.maximum(errors[1:], errors[:-1]))
    assert means[-1] < truth.log_marginal(x) + 4 * errors[-1]
    assert truth.log_marginal(x) - means[-1] < 0.05


def test_importance_weighted_bound_is_exact_with_the_exact_posterior(x64):
    truth, x = Truth(), data(5)
    for k in (1, 7):
        actual = objectives.importance_weighted_bound(LED_MODEL, truth.params, KEY, x, k)
        np.testing.assert_allclose(actual, truth.log_marginal(x), rtol=1e-10)


def test_nll_is_the_exact_marginal_within_its_error(x64):
    truth, x = Truth(**OFF), data(11)
    exact = -truth.log_marginal(x)
    scores = []
    for seed in range(20):
        estimate = objectives.nll(
            LED_MODEL,
            truth.params,
            jax.random.key(seed),
            x,
            2000,
            batch_size=4,
            samples_per_chunk=500,
        )
        scores.append((estimate.nll - exact.mean()) / estimate.monte_carlo_error)
        assert estimate.nll < -estimate.elbo
    # Standard normal scores: each within 3 and a bit, and a spread of about one.
    assert np.abs(scores[0]) < 3 and np.max(np.abs(scores)) < 4
    assert 0.6 < np.sqrt(np.mean(np.square(scores))) < 1.5
    np.testing.assert_allclose(estimate.per_example, exact, atol=0.2)
    assert estimate.per_example.shape == (11,)
    np.testing.assert_allclose(estimate.nll, estimate.per_example.mean(), rtol=1e-12)
    spread = estimate.per_example.std() / math.sqrt(11)
    np.testing.assert_allclose(estimate.standard_error, spread, rtol=1e-12)
    assert estimate.elbo == pytest.approx(truth.elbo(x).mean(), abs=0.05)
    assert {type(v) for v in estimate[:4]} == {float}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 5),
    batch_size=st.integers(1, 6),
    num_samples=st.integers(1, 12),
    samples_per_chunk=st.integers(1, 13),
)
def test_nll_is_exact_with_the_exact_posterior_whatever_the_sizes(
    n, batch_size, num_samples, samples_per_chunk
):
    """All weights are equal, so a row or a sample too many or too few would show."""
    truth = Truth()
    x = data(n)
    rows = []
    estimate = objectives.nll(
        LED_MODEL,
        truth.params,
        KEY,
        x,
        num_samples,
        batch_size=batch_size,
        samples_per_chunk=samples_per_chunk,
        progress=rows.append,
    )
    np.testing.assert_allclose(estimate.per_example, -truth.log_marginal(x), rtol=2e-5)
    assert estimate.elbo == pytest.approx(truth.log_marginal(x).mean(), rel=2e-5)
    assert estimate.monte_carlo_error < 1e-3
    assert sum(rows) == n


def test_rows_that_fill_up_the_last_batch_do_not_count(x64):
    truth, x = Truth(**OFF), data(7)

    def nll(x):
        return objectives.nll(
            LED_MODEL, truth.params, KEY, x, 60, batch_size=3, samples_per_chunk=25
        )

    whole, part = nll(x), nll(x[:6])
    np.testing.assert_array_equal(whole.per_example[:6], part.per_example)
    assert whole.per_example.shape == (7,)
    np.testing.assert_allclose(whole.nll * 7 - part.nll * 6, whole.per_example[6], rtol=1e-9)
    assert whole.elbo * 7 - part.elbo * 6 == pytest.approx(Truth(**OFF).elbo(x[6]), abs=1.5)
    # A JAX array of rows will do as well.
    np.testing.assert_array_equal(nll(jnp.asarray(x)).per_example, whole.per_example)


def test_chunks_only_bound_memory():
    """The same weights in other chunks: draws differ, the estimate stays within its error."""
    truth, x = Truth(**OFF), data(5)
    estimates = [
        objectives.nll(LED_MODEL, truth.params, KEY, x, 3000, samples_per_chunk=chunk)
        for chunk in (3000, 700)
    ]
    error = math.hypot(*(e.monte_carlo_error for e in estimates))
    assert 0 < abs(estimates[0].nll - estimates[1].nll) < 3.5 * error


def test_monte_carlo_error_falls_with_the_root_of_the_samples():
    truth, x = Truth(**OFF), data(20)
    few, many = (
        objectives.nll(LED_MODEL, truth.params, KEY, x, k, batch_size=20).monte_carlo_error
        for k in (400, 40_000)
    )
    assert 7 < few / many < 14


def test_streaming_agrees_with_one_logsumexp(x64):
    """Weights that span hundreds of nats, which a sum without offsets would lose."""
    truth, x = Truth(shift=15.0, spread=0.5), data(3)
    estimate = objectives.nll(
        LED_MODEL, truth.params, KEY, x, 40, batch_size=3, samples_per_chunk=10
    )
    key = jax.random.fold_in(KEY, 0)
    log_weights = np.concatenate(
        [LED_MODEL.elbo(truth.params, jax.random.fold_in(key, i), x, (10,)).bound for i in range(4)]
    )
    expected = -jax.nn.logsumexp(log_weights, axis=0) + math.log(40)
    assert np.ptp(log_weights) > 100
    np.testing.assert_allclose(estimate.per_example, expected, rtol=1e-9)
    weights = np.exp(log_weights - log_weights.max(0))
    variance = weights.var(0) / weights.mean(0) ** 2 / 40
    np.testing.assert_allclose(estimate.monte_carlo_error, np.sqrt(variance.sum()) / 3, rtol=1e-9)
    np.testing.assert_allclose(estimate.elbo, log_weights.mean(), rtol=1e-9)


def test_the_same_key_gives_the_same_estimate_and_program():
    truth, x = Truth(**OFF), data(6)
    calls = []

    def apply(params, x):
        calls.append(x.shape)
        return LED_MODEL.encoder.apply(params, x)

    led = LED_MODEL._replace(encoder=LED_MODEL.encoder._replace(apply=apply))
    estimates = [
        objectives.nll(led, truth.params, jax.random.key(seed), x, 20, batch_size=3)
        for seed in (1, 1, 2)
    ]
    assert set(calls) == {(3, 3)} and len(calls) <= 2
    np.testing.assert_array_equal(estimates[0].per_example, estimates[1].per_example)
    assert np.all(estimates[0].per_example != estimates[2].per_example)


@pytest.mark.parametrize(
    "rows,sizes,given",
    [
        (0, {}, "0 rows"),
        (2, {"num_samples": 0}, "num_samples=0"),
        (2, {"batch_size": 0}, "batch_size=0"),
        (2, {"samples_per_chunk": -3}, "samples_per_chunk=-3"),
    ],
)
def test_nll_of_nothing(rows, sizes, given):
    with pytest.raises(ValueError, match=f"at least one row and positive sizes, got .*{given}"):
        objectives.nll(LED_MODEL, Truth().params, KEY, data(rows), **sizes)


def test_a_bound_of_no_samples():
    with pytest.raises(ValueError, match="num_samples of 1 or more, got 0"):
        objectives.importance_weighted_bound(LED_MODEL, Truth().params, KEY, data(2), 0)
