import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, randomise
from support.linear_gaussian import LED_MODEL, MARGINAL_COV, MARGINAL_MEAN, Truth, data

from led_jax import LED, Elbo, densities, flows, networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

elbo = jax.jit(LED_MODEL.elbo, static_argnums=3)


def small_led():
    return LED(
        networks.mlp_encoder(3, (8,), context_dim=2),
        flows.iaf((3,), 2, hidden=(6,), context_dim=2),
        densities.transformed(
            densities.standard_normal((3,)), flows.real_nvp((3,), 2, hidden=(6,))
        ),
        networks.mlp_decoder(5, (8,)),
    )


def small_built():
    led = small_led()
    x = jax.random.bernoulli(KEY, 0.5, (4, 5)).astype(float)
    return led, randomise(jax.jit(led.init)(KEY, x)), x


@pytest.mark.parametrize("shift,spread", [(0.0, 1.0), (0.4, 1.3), (-0.3, 0.8)])
def test_terms_have_their_closed_forms(x64, shift, spread):
    truth, x = Truth(shift, spread), data(5)
    draws = elbo(truth.params, KEY, x, (20_000,))
    for actual, expected in zip(draws, truth.terms(x), strict=True):
        assert actual.shape == (20_000, 5)
        error = np.abs(actual.mean(0) - expected) / (actual.std(0) / np.sqrt(20_000))
        assert error.max() < 4
    np.testing.assert_allclose(
        draws.bound, draws.log_likelihood + draws.log_prior - draws.log_posterior
    )
    error = np.abs(draws.bound.mean(0) - truth.elbo(x))
    assert np.all(error <= 4 * draws.bound.std(0) / np.sqrt(20_000) + 1e-9)


def test_closed_forms_are_consistent():
    """The oracle itself: the ELBO is log p(x) less a KL that vanishes at the exact posterior."""
    x = data(5)
    np.testing.assert_allclose(Truth().elbo(x), Truth().log_marginal(x))
    exact, off = Truth(), Truth(0.4, 1.3)
    ratio = (off.std / exact.std) ** 2
    kl = 0.5 * (ratio - 1 - np.log(ratio) + (0.4 / exact.std) ** 2).sum()
    np.testing.assert_allclose(off.elbo(x), off.log_marginal(x) - kl)


def test_the_exact_posterior_makes_every_bound_the_marginal(x64):
    truth, x = Truth(), data(6)
    draws = elbo(truth.params, KEY, x, (50,)).bound
    np.testing.assert_allclose(draws, np.tile(truth.log_marginal(x), (50, 1)), rtol=1e-10)
    assert elbo(truth.params, KEY, x, (50,)).log_prior.std(0).min() > 0.1


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("samples", [(), (7,), (2, 1)])
def test_any_batch_and_sample_shape(batch, samples):
    x = jnp.asarray(data(6)[: int(np.prod(batch))].reshape(*batch, 3), float)
    truth = Truth(0.2)
    terms = jax.eval_shape(lambda: LED_MODEL.elbo(truth.params, KEY, x, samples))
    assert isinstance(terms, Elbo)
    assert {term.shape for term in terms} == {(*samples, *batch)}
    z = jax.eval_shape(lambda: LED_MODEL.encode(truth.params, KEY, x))
    assert z.shape == (*batch, 2)
    mean = jax.eval_shape(lambda: LED_MODEL.reconstruct(truth.params, KEY, x))
    assert mean.shape == x.shape
    draws = jax.eval_shape(lambda: LED_MODEL.sample(truth.params, KEY, samples))
    assert draws.shape == (*samples, 3)


def test_each_term_is_that_of_the_encoded_z():
    """The posterior is scored on the way out; the inverse flow must find the same density."""
    led, params, x = small_built()
    key = jax.random.key(3)
    z = led.encode(params, key, x)
    terms = led.elbo(params, key, x)
    mean, log_std, context = led.encoder.apply(params["encoder"], x)
    before, log_det = led.posterior.inverse(params["posterior"], z, context)
    log_base = scipy.stats.norm.logpdf(before, mean, np.exp(log_std)).sum(-1)
    np.testing.assert_allclose(terms.log_posterior, log_base + log_det, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(terms.log_prior, led.prior.log_prob(params["prior"], z), rtol=1e-5)
    logits_mean = led.decoder.mean(params["decoder"], z)
    expected = scipy.stats.bernoulli.logpmf(x, np.asarray(logits_mean, np.float64)).sum(-1)
    np.testing.assert_allclose(terms.log_likelihood, expected, rtol=1e-4)
    np.testing.assert_allclose(led.reconstruct(params, key, x), logits_mean, rtol=1e-5)


def test_context_conditions_the_posterior():
    led, params, x = small_built()
    encoder = params["encoder"]
    # Outputs 6 and 7 of the encoder are the context: mean and log_std stay as they were.
    last = jax.tree.map(lambda p: p.at[..., 6:].set(0), encoder["Dense_1"])
    without = params | {"encoder": encoder | {"Dense_1": last}}
    with_context = led.encoder.apply(encoder, x)
    no_context = led.encoder.apply(without["encoder"], x)
    np.testing.assert_allclose(with_context.mean, no_context.mean)
    np.testing.assert_array_equal(no_context.context, np.zeros((4, 2)))
    difference = led.encode(params, KEY, x) - led.encode(without, KEY, x)
    assert np.all(np.abs(difference).max(-1) > 1e-4)


def test_x_is_encoded_once_however_many_samples():
    shapes = []

    def apply(params, x):
        shapes.append(x.shape)
        return LED_MODEL.encoder.apply(params, x)

    led = LED_MODEL._replace(encoder=LED_MODEL.encoder._replace(apply=apply))
    led.elbo(Truth().params, KEY, jnp.asarray(data(4)), (9,))
    assert shapes == [(4, 3)]


def test_samples_follow_the_marginal():
    x = jax.jit(LED_MODEL.sample, static_argnums=2)(Truth().params, KEY, (5000,))
    assert x.shape == (5000, 3)
    std = np.sqrt(np.diag(MARGINAL_COV))
    assert np.max(np.abs(x.mean(0) - MARGINAL_MEAN) / std) < 4 / np.sqrt(5000)
    np.testing.assert_allclose(
        np.cov(x.T) / np.outer(std, std), MARGINAL_COV / np.outer(std, std), atol=0.08
    )
    for i in range(3):
        test = scipy.stats.kstest((np.asarray(x)[:, i] - MARGINAL_MEAN[i]) / std[i], "norm")
        assert test.pvalue > 1e-3


def test_encoded_draws_follow_the_posterior():
    truth, x = Truth(0.4, 1.3), data(1)
    rows = jnp.broadcast_to(jnp.asarray(x, float), (5000, 3))
    z = np.asarray(jax.jit(LED_MODEL.encode)(truth.params, KEY, rows))
    for i in range(2):
        test = scipy.stats.kstest((z[:, i] - truth.mean(x)[0, i]) / truth.std[i], "norm")
        assert test.pvalue > 1e-3


def test_init_and_gradients_of_every_part():
    led, params, x = small_built()
    assert set(params) == {"encoder", "posterior", "prior", "decoder"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    gradient = jax.jit(jax.grad(lambda p: led.elbo(p, KEY, x).bound.sum()))(params)
    for name, part in gradient.items():
        leaves = jax.tree.leaves(part)
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        # A first MADE output has no input, so that some of its weights may be unused.
        assert all(np.any(leaf != 0) for leaf in leaves), name


def test_the_same_key_gives_the_same_draw():
    led, params, x = small_built()
    a, b, c = (led.elbo(params, jax.random.key(seed), x) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.bound, b.bound)
    assert np.all(a.bound != c.bound)


def test_one_argument_order_everywhere():
    for method in ("elbo", "encode", "reconstruct", "sample"):
        names = list(inspect.signature(getattr(LED, method)).parameters)
        assert names[:3] == ["self", "params", "key"]


def test_wrong_width_of_x():
    led, params, _ = small_built()
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 5\], got \(4, 6\)"):
        led.decoder.log_prob(params["decoder"], normal((4, 3)), normal((4, 6)))


@pytest.mark.parametrize("make", [lambda: (LED_MODEL, Truth().params, data(4)), small_built])
def test_posterior_log_prob_scores_its_own_samples(x64, make):
    led, params, x = make()
    encoding = led.encoder.apply(params["encoder"], x)
    z, log_prob = led.posterior_sample_and_log_prob(params, KEY, encoding, (3,))
    score = jax.jit(led.posterior_log_prob)
    np.testing.assert_allclose(score(params, z, encoding), log_prob, rtol=1e-6)
    pairs = score(params, z[0][:, None], encoding)  # Every z against every x.
    assert pairs.shape == (4, 4)
    np.testing.assert_allclose(jnp.diagonal(pairs), log_prob[0], rtol=1e-6)


def test_posterior_log_prob_is_the_normal_of_the_closed_form(x64):
    truth, x = Truth(shift=0.3, spread=1.3), data(5)
    encoding = LED_MODEL.encoder.apply(truth.params["encoder"], x)
    z = truth.mean(x) + 2 * normal((5, 2))
    expected = scipy.stats.norm.logpdf(z, truth.mean(x), truth.std).sum(-1)
    actual = LED_MODEL.posterior_log_prob(truth.params, z, encoding)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
