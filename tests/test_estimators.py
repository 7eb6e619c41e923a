import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KEY, normal, random_params
from support.linear_gaussian import LED_MODEL, MARGINAL_COV, MARGINAL_MEAN, M, S, T, Truth, data

from led_jax import (
    LED,
    decoders,
    densities,
    encoders,
    estimators,
    flows,
    likelihoods,
    networks,
    objectives,
    priors,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

OFF = {"shift": 0.3, "spread": 1.3}  # Wider than the exact posterior: weights of finite variance.

importance_weighted_bound = jax.jit(estimators.importance_weighted_bound, static_argnums=(0, 4))


@pytest.mark.slow
def test_importance_weighted_bound_rises_from_the_elbo_to_the_marginal(x64):
    truth, x = Truth(**OFF), data(1)
    rows = np.broadcast_to(x, (20_000, 3))
    means, errors = [], []
    for k in (1, 2, 8, 64):
        draws = np.asarray(importance_weighted_bound(LED_MODEL, truth.params, KEY, rows, k))
        assert draws.shape == (20_000,)
        means.append(draws.mean())
        errors.append(draws.std() / math.sqrt(20_000))
    assert abs(means[0] - truth.elbo(x)[0]) < 4 * errors[0]
    assert np.all(np.diff(means) > 4 * np.maximum(errors[1:], errors[:-1]))
    assert means[-1] < truth.log_marginal(x) + 4 * errors[-1]
    assert truth.log_marginal(x) - means[-1] < 0.05


@pytest.mark.slow
def test_importance_weighted_bound_is_exact_with_the_exact_posterior(x64):
    truth, x = Truth(), data(5)
    for k in (1, 7):
        actual = importance_weighted_bound(LED_MODEL, truth.params, KEY, x, k)
        np.testing.assert_allclose(actual, truth.log_marginal(x), rtol=1e-10)


def conditional_model():
    """The linear-Gaussian model whose x is shifted by V'c: p(x|c) and p(c|x) are closed forms."""
    truth, v = Truth(), np.array([[0.0, 0.0, 0.0], [1.5, -0.5, 0.3], [-0.4, 1.0, 1.0]])
    encoder = truth.params["encoder"]
    decoder = truth.params["decoder"]
    stacked = lambda kernel, of_context: np.concatenate([kernel, of_context])  # noqa: E731
    params = truth.params | {
        "encoder": {
            "Dense_0": encoder
            | {"kernel": stacked(encoder["kernel"], -v @ np.asarray(encoder["kernel"]))}
        },
        "decoder": {"Dense_0": decoder | {"kernel": stacked(decoder["kernel"], v)}},
    }
    led = LED_MODEL._replace(
        encoder=encoders.gaussian_encoder(networks.MLP((4,)), 2),
        decoder=decoders.decoder(likelihoods.gaussian(S), networks.MLP((3,))),
    )
    return led, params, v, truth


@pytest.mark.slow
def test_a_conditional_model_is_exact_with_the_exact_posterior(x64):
    led, params, v, truth = conditional_model()
    x = data(9)
    labels = np.arange(9) % 3
    context, shifted = np.eye(3)[labels], x + v[labels]
    exact = truth.log_marginal(x)  # p(x + V'c | c) is p(x).
    found = estimators.nll(led, params, KEY, shifted, 5, batch_size=4, context=context)
    np.testing.assert_allclose(found.per_example, -exact, rtol=1e-10)
    bound = importance_weighted_bound(led, params, KEY, shifted, 3, context)
    np.testing.assert_allclose(bound, exact, rtol=1e-10)
    for objective in (objectives.iwae(2), objectives.dreg(2), objectives.stl()):
        loss = jax.jit(objective.loss, static_argnums=0)
        _, metrics = loss(led, params, (), KEY, shifted, 0, context)
        assert float(metrics["elbo"]) == pytest.approx(exact.mean(), rel=1e-10)
    with pytest.raises(ValueError, match=r"a context for each of 9 rows, got shape \[8, 3\]"):
        estimators.nll(led, params, KEY, shifted, 5, context=context[:8])


def test_classes_by_bayes_rule(x64):
    led, params, v, truth = conditional_model()
    x, probs = data(6), np.array([0.2, 0.5, 0.3])
    find = lambda **options: estimators.class_log_posterior(  # noqa: E731
        led, params, KEY, x, np.eye(3), 4, **options
    )
    log_joint = np.stack([truth.log_marginal(x - shift) for shift in v], 1) + np.log(probs)
    expected = np.exp(log_joint) / np.exp(log_joint).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(find(class_probs=probs)), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="expected 3 positive class_probs, got"):
        find(class_probs=np.array([0.5, 0.5]))


@pytest.mark.slow
def test_nll_is_the_exact_marginal_within_its_error(x64):
    truth, x = Truth(**OFF), data(11)
    exact = -truth.log_marginal(x)
    scores, row_scores = [], []
    for seed in range(20):
        estimate = estimators.nll(
            LED_MODEL,
            truth.params,
            jax.random.key(seed),
            x,
            2000,
            batch_size=4,
            samples_per_chunk=500,
        )
        scores.append((estimate.nll - exact.mean()) / estimate.monte_carlo_error)
        row_scores.append((estimate.per_example - exact) / estimate.per_example_error)
        assert estimate.nll < -estimate.elbo
    # The scores are standard normal: all within 4, with a spread of about one.
    assert np.abs(scores[0]) < 3 and np.max(np.abs(scores)) < 4
    assert 0.6 < np.sqrt(np.mean(np.square(scores))) < 1.5
    assert 0.7 < np.sqrt(np.mean(np.square(row_scores))) < 1.3
    np.testing.assert_allclose(estimate.per_example, exact, atol=0.2)
    assert estimate.per_example.shape == (11,)
    np.testing.assert_allclose(estimate.nll, estimate.per_example.mean(), rtol=1e-12)
    spread = estimate.per_example.std() / math.sqrt(11)
    np.testing.assert_allclose(estimate.standard_error, spread, rtol=1e-12)
    assert estimate.elbo == pytest.approx(truth.elbo(x).mean(), abs=0.05)
    assert {type(v) for v in estimate[:4]} == {float}


@pytest.mark.slow
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
    estimate = estimators.nll(
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
    error = estimate.monte_carlo_error
    assert math.isnan(error) if num_samples == 1 else error < 1e-3
    assert sum(rows) == n


@pytest.mark.slow
def test_rows_that_fill_up_the_last_batch_do_not_count(x64):
    truth, x = Truth(**OFF), data(7)

    def nll(x):
        return estimators.nll(
            LED_MODEL, truth.params, KEY, x, 60, batch_size=3, samples_per_chunk=25
        )

    whole, part = nll(x), nll(x[:6])
    np.testing.assert_array_equal(whole.per_example[:6], part.per_example)
    assert whole.per_example.shape == (7,)
    np.testing.assert_allclose(whole.nll * 7 - part.nll * 6, whole.per_example[6], rtol=1e-9)
    assert whole.elbo * 7 - part.elbo * 6 == pytest.approx(Truth(**OFF).elbo(x[6]), abs=1.5)
    # Rows may also be a JAX array.
    np.testing.assert_array_equal(nll(jnp.asarray(x)).per_example, whole.per_example)


@pytest.mark.slow
def test_chunks_only_bound_memory():
    """As many samples in other chunks: draws differ, the estimate stays within its error."""
    truth, x = Truth(**OFF), data(5)
    estimates = [
        estimators.nll(LED_MODEL, truth.params, KEY, x, 3000, samples_per_chunk=chunk)
        for chunk in (3000, 50)
    ]
    error = math.hypot(*(e.monte_carlo_error for e in estimates))
    assert 0 < abs(estimates[0].nll - estimates[1].nll) < 3.5 * error


@pytest.mark.slow
def test_monte_carlo_error_falls_with_the_root_of_the_samples():
    truth, x = Truth(**OFF), data(20)
    few, many = (
        estimators.nll(LED_MODEL, truth.params, KEY, x, k, batch_size=20).monte_carlo_error
        for k in (400, 40_000)
    )
    assert 7 < few / many < 14


@pytest.mark.slow
def test_streaming_agrees_with_one_logsumexp(x64):
    """Weights that span hundreds of nats, which a sum without offsets would lose."""
    truth, x = Truth(shift=15.0, spread=0.5), data(3)
    estimate = estimators.nll(
        LED_MODEL, truth.params, KEY, x, 40, batch_size=3, samples_per_chunk=10
    )

    @jax.jit
    def chunk(i):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 0), i)
        return LED_MODEL.elbo(truth.params, key, x, (10,)).bound

    log_weights = np.concatenate([chunk(i) for i in range(4)])
    expected = -scipy.special.logsumexp(log_weights, axis=0) + math.log(40)
    assert np.ptp(log_weights) > 100
    np.testing.assert_allclose(estimate.per_example, expected, rtol=1e-9)
    weights = np.exp(log_weights - log_weights.max(0))
    variance = weights.var(0) / weights.mean(0) ** 2 / 40
    np.testing.assert_allclose(estimate.monte_carlo_error, np.sqrt(variance.sum()) / 3, rtol=1e-9)
    np.testing.assert_allclose(estimate.elbo, log_weights.mean(), rtol=1e-9)


def test_the_same_key_gives_the_same_estimate_and_program():
    truth, x = Truth(**OFF), data(6)
    calls = []

    def apply(params, x, context=None):
        calls.append(x.shape)
        return LED_MODEL.encoder.apply(params, x)

    led = LED_MODEL._replace(encoder=LED_MODEL.encoder._replace(apply=apply))
    estimates = [
        estimators.nll(led, truth.params, jax.random.key(seed), x, 20, batch_size=3)
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
        estimators.nll(LED_MODEL, Truth().params, KEY, data(rows), **sizes)


def test_a_bound_of_no_samples():
    with pytest.raises(ValueError, match="num_samples of 1 or more, got 0"):
        estimators.importance_weighted_bound(LED_MODEL, Truth().params, KEY, data(2), 0)


def mixture_log_prob(truth, z, x):
    """The aggregated posterior of rows x, component by component."""
    parts = [scipy.stats.multivariate_normal(m, np.diag(truth.std**2)) for m in truth.mean(x)]
    return scipy.special.logsumexp([part.logpdf(z) for part in parts], axis=0) - np.log(len(x))


@pytest.mark.slow
def test_aggregated_posterior_is_the_whole_mixture(x64):
    truth, x = Truth(**OFF), data(70)
    z = np.concatenate([truth.mean(x[:9]), 3 * normal((70, 2))])
    encoding = estimators.encode_all(LED_MODEL, truth.params, x, batch_size=30)
    actual = estimators.aggregated_posterior_log_prob(LED_MODEL, truth.params, z, encoding)
    np.testing.assert_allclose(actual, mixture_log_prob(truth, z, x), rtol=1e-9)
    # With a context, even one that the flow ignores, each pair of z and x inverts the flow.
    pairs = encoding._replace(context=np.zeros((70, 1)))
    again = estimators.aggregated_posterior_log_prob(LED_MODEL, truth.params, z, pairs)
    np.testing.assert_allclose(again, actual, rtol=1e-9)


@pytest.mark.parametrize(("center", "log_std"), [(100, -3), (0, -9)])
def test_aggregated_posterior_of_narrow_components_far_from_the_origin(center, log_std):
    """In float32, where expanded squares would cancel to nothing."""
    rng = np.random.default_rng(0)
    mean = (center + rng.normal(size=(500, 8))).astype(np.float32)
    std = np.exp(rng.normal(log_std, 0.3, (500, 8)))
    z = (mean[:50] + std[:50] * rng.normal(size=(50, 8))).astype(np.float32)
    mean, z = mean.astype(float), z.astype(float)
    log_parts = scipy.stats.norm.logpdf(z[:, None], mean, std).sum(-1)
    expected = scipy.special.logsumexp(log_parts, axis=1) - np.log(500)
    encoding = encoders.Encoding(*(a.astype(np.float32) for a in (mean, np.log(std))))
    led, params = LED_MODEL._replace(posterior=flows.chain()), {"posterior": ()}
    actual = estimators.aggregated_posterior_log_prob(led, params, z.astype(np.float32), encoding)
    np.testing.assert_allclose(actual, expected, atol=0.01)


@pytest.mark.slow
def test_aggregated_posterior_of_a_flow_with_context_integrates_to_one(x64):
    led = LED(
        encoders.mlp_encoder(2, (5,), context_dim=3),
        flows.real_nvp((2,), 2, hidden=(5,), context_dim=3),
        densities.standard_normal((2,)),
        decoders.mlp_decoder(4, (5,)),
    )
    x = normal((6, 4))
    params = random_params(led.init, x)
    encoding = estimators.encode_all(led, params, x)
    ticks = np.linspace(-10, 10, 150)
    z = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    q = np.exp(estimators.aggregated_posterior_log_prob(led, params, z, encoding))
    np.testing.assert_allclose(q.sum() * (ticks[1] - ticks[0]) ** 2, 1, atol=1e-3)
    # Components differ: the mixture does not equal its first one.
    single = estimators.aggregated_posterior_log_prob(
        led, params, z, jax.tree.map(lambda leaf: np.asarray(leaf)[:1], encoding)
    )
    assert np.abs(q - np.exp(single)).max() > 0.01


def standard_scores(values, expected):
    return (values.mean() - expected) / (values.std() / math.sqrt(len(values)))


@pytest.mark.slow
def test_marginal_matching_has_the_closed_forms_of_a_linear_gaussian_model():
    truth, x = Truth(shift=0.6, spread=1.3), data(4000)
    terms = estimators.marginal_matching(LED_MODEL, truth.params, KEY, x, 3000)
    origin = truth.mean(np.zeros(3))
    slope = truth.mean(np.eye(3)) - origin
    mean = origin + MARGINAL_MEAN @ slope
    cov = slope.T @ MARGINAL_COV @ slope + np.diag(truth.std**2)
    log_det = np.linalg.slogdet(cov)[1]
    information = log_det / 2 - np.log(truth.std).sum()
    deviation = ((np.diag(cov) + (mean - M) ** 2) / T**2).sum()
    marginal_kl = (deviation - 2 - log_det) / 2 + np.log(T).sum()
    for values, expected in (
        (terms.mutual_information, information),
        (terms.marginal_kl, marginal_kl),
    ):
        # 4,000 rows are not the population: 0.02 nats on top of the sampling error.
        error = values.std() / math.sqrt(3000)
        assert abs(values.mean() - expected) < 4 * error + 0.02 < expected / 3
    log_likelihood, log_prior, log_posterior = (term.mean() for term in truth.terms(x))
    assert abs(standard_scores(terms.kl, log_posterior - log_prior)) < 4
    assert abs(standard_scores(terms.log_likelihood, log_likelihood)) < 4
    exact = estimators.marginal_matching(LED_MODEL, Truth().params, KEY, x, 3000)
    assert exact.marginal_kl.mean() == pytest.approx(0, abs=0.02)  # q(z|x) = p(z|x), eq. 2.


@pytest.mark.slow
def test_marginal_matching_is_the_quadrature_of_a_small_mixture():
    truth, x = Truth(**OFF), data(30)
    terms = estimators.marginal_matching(LED_MODEL, truth.params, KEY, x, 4000)
    ticks = np.linspace(-8, 8, 250)
    z = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    log_q, area = mixture_log_prob(truth, z, x), (ticks[1] - ticks[0]) ** 2
    log_p = scipy.stats.norm.logpdf(z, M, T).sum(-1)
    marginal_kl = (np.exp(log_q) * (log_q - log_p)).sum() * area
    conditional_entropy = scipy.stats.norm.entropy(scale=truth.std).sum()
    information = -(np.exp(log_q) * log_q).sum() * area - conditional_entropy
    assert abs(standard_scores(terms.marginal_kl, marginal_kl)) < 4
    assert abs(standard_scores(terms.mutual_information, information)) < 4
    assert terms.mutual_information.max() < math.log(30) + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num_samples,samples_per_chunk", [(1, 100), (7, 3), (6, 3)])
def test_marginal_matching_of_one_row_has_no_information(num_samples, samples_per_chunk):
    done = []
    terms = estimators.marginal_matching(
        LED_MODEL,
        Truth().params,
        KEY,
        data(1),
        num_samples,
        samples_per_chunk=samples_per_chunk,
        progress=done.append,
    )
    assert all(isinstance(leaf, np.ndarray) and leaf.shape == (num_samples,) for leaf in terms)
    np.testing.assert_allclose(terms.mutual_information, 0, atol=1e-4)
    assert len(np.unique(terms.marginal_kl)) == num_samples == sum(done)


@pytest.mark.parametrize(
    "rows,sizes,given",
    [
        (0, {}, "0 rows"),
        (2, {"num_samples": 0}, "num_samples=0"),
        (2, {"samples_per_chunk": -1}, "samples_per_chunk=-1"),
    ],
)
def test_marginal_matching_of_nothing(rows, sizes, given):
    with pytest.raises(ValueError, match=f"at least one row and positive sizes, got .*{given}"):
        estimators.marginal_matching(LED_MODEL, Truth().params, KEY, data(rows), **sizes)


def test_the_errors_of_one_row_and_of_one_sample_are_not_a_number():
    params = Truth(**OFF).params
    one_row = estimators.nll(LED_MODEL, params, KEY, data(1), 8)
    one_sample = estimators.nll(LED_MODEL, params, KEY, data(3), 1)
    assert math.isnan(one_row.standard_error) and one_row.monte_carlo_error > 0
    assert math.isnan(one_sample.monte_carlo_error) and one_sample.standard_error > 0
    assert np.isnan(one_sample.per_example_error).all()


def test_nll_says_that_it_is_neither_for_jit_nor_for_grad():
    def mean(params):
        return estimators.nll(LED_MODEL, params, KEY, data(3), 2).nll

    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match="params.*concrete.*use importance_weighted_bound"):
            transform(mean)(Truth(**OFF).params)


@pytest.mark.slow
def test_activity_is_the_variance_of_the_posteriors_mean(x64):
    """Against the closed form, within the error of few draws; 0 if the mean ignores x."""
    truth, x = Truth(**OFF), data(20_000)
    expected = truth.mean(x).var(0, ddof=1)
    found = estimators.activity(LED_MODEL, truth.params, KEY, x, 20)
    noise = truth.std**2 / 20  # What `activity` subtracts: not small compared with the result.
    np.testing.assert_allclose(found, expected, atol=0.25 * np.max(noise))
    still = truth.params | {"encoder": jax.tree.map(np.zeros_like, truth.params["encoder"])}
    found = estimators.activity(LED_MODEL, still, KEY, x, 20)
    scale = np.exp(2 * np.asarray(truth.params["posterior"]["log_scale"]))
    assert np.abs(found).max() < 0.1 * scale.max() / 20
    with pytest.raises(ValueError, match=r"got x of shape \(1, 3\) and num_samples=20"):
        estimators.activity(LED_MODEL, truth.params, KEY, x[:1], 20)


@pytest.mark.slow
def test_a_prior_that_is_the_aggregated_posterior_is_at_no_distance_from_it(x64):
    """Priors without a flow are measured, too: the mixture of all rows' posteriors is q(z)."""
    truth, x = Truth(**OFF), data(6)
    led = LED_MODEL._replace(prior=priors.data_subset(6))
    params = truth.params | {"prior": x}
    whole = estimators.marginal_matching(led, params, KEY, x, 50)
    np.testing.assert_allclose(whole.marginal_kl, 0, atol=1e-9)
    assert whole.mutual_information.mean() > 0.5
    half = estimators.marginal_matching(
        LED_MODEL._replace(prior=priors.data_subset(3)), params | {"prior": x[:3]}, KEY, x, 500
    )
    assert half.marginal_kl.mean() > 0.05
    assert half.marginal_kl.min() > -np.log(2) - 1e-9  # Half of the components: p(z) <= 2 q(z).
