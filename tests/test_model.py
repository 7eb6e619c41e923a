import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, random_params
from support.linear_gaussian import (
    LED_MODEL,
    MARGINAL_COV,
    MARGINAL_MEAN,
    B,
    M,
    S,
    T,
    Truth,
    W,
    data,
)

from led_jax import LED, Density, Elbo, decoders, densities, encoders, flows, likelihoods, networks

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

elbo = jax.jit(LED.elbo, static_argnums=(0, 4))


def small_led():
    return LED(
        encoders.mlp_encoder(3, (8,), context_dim=2),
        flows.iaf((3,), 2, hidden=(6,), context_dim=2),
        densities.transformed(
            densities.standard_normal((3,)), flows.real_nvp((3,), 2, hidden=(6,))
        ),
        decoders.mlp_decoder(5, (8,)),
    )


def small_built():
    led = small_led()
    x = np.random.default_rng(0).integers(0, 2, (4, 5)).astype(float)
    return led, random_params(led.init, x), x


@pytest.mark.slow
@pytest.mark.parametrize("shift,spread", [(0.0, 1.0), (0.4, 1.3), (-0.3, 0.8)])
def test_terms_have_their_closed_forms(x64, shift, spread):
    truth, x = Truth(shift, spread), data(5)
    draws = jax.device_get(elbo(LED_MODEL, truth.params, KEY, x, (20_000,)))
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
    draws = jax.device_get(elbo(LED_MODEL, truth.params, KEY, x, (50,)))
    np.testing.assert_allclose(draws.bound, np.tile(truth.log_marginal(x), (50, 1)), rtol=1e-10)
    assert draws.log_prior.std(0).min() > 0.1


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("samples", [(), (7,), (2, 1)])
def test_any_batch_and_sample_shape(batch, samples):
    x = data(6)[: int(np.prod(batch))].reshape(*batch, 3)
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


@pytest.mark.slow
def test_each_term_is_that_of_the_encoded_z():
    """The ELBO scores q while it samples; the inverse flow must find the same density."""
    led, params, x = small_built()

    @jax.jit
    def results(params, key, x):
        z, encoding = led.encode(params, key, x), led.encoding(params, x)
        terms = led.elbo(params, key, x)
        scores = {
            "log_likelihood": led.log_likelihood(params, z, x),
            "log_prior": led.prior_log_prob(params, z),
            "weight": led.log_weight(params, z, x),
            "bound": terms.bound,
        }
        before = led.posterior_inverse(params, z, encoding.context)
        means = led.decode(params, z), led.reconstruct(params, key, x)
        return terms, scores, encoding, before, means

    found = jax.device_get(results(params, jax.random.key(3), x))
    terms, scores, (mean, log_std, _), (before, log_det), (logits_mean, reconstructed) = found
    log_base = scipy.stats.norm.logpdf(before, mean, np.exp(log_std)).sum(-1)
    np.testing.assert_allclose(terms.log_posterior, log_base + log_det, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(terms.log_prior, scores["log_prior"], rtol=1e-5)
    expected = scipy.stats.bernoulli.logpmf(x, np.asarray(logits_mean, np.float64)).sum(-1)
    np.testing.assert_allclose(terms.log_likelihood, expected, rtol=1e-4)
    np.testing.assert_allclose(scores["log_likelihood"], terms.log_likelihood, rtol=1e-5)
    np.testing.assert_allclose(scores["weight"], scores["bound"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(reconstructed, logits_mean, rtol=1e-5)


def test_context_conditions_the_posterior():
    led, params, x = small_built()
    encoder = params["encoder"]
    # Outputs 6 and 7 of the encoder are the context: mean and log_std stay as they were.
    last = jax.tree.map(lambda p: np.where(np.arange(8) < 6, p, 0), encoder["Dense_1"])
    without = params | {"encoder": encoder | {"Dense_1": last}}
    encode = jax.jit(lambda params: (led.encoding(params, x), led.encode(params, KEY, x)))
    (with_context, z), (no_context, other) = jax.device_get((encode(params), encode(without)))
    np.testing.assert_allclose(with_context.mean, no_context.mean)
    np.testing.assert_array_equal(no_context.context, np.zeros((4, 2)))
    assert np.all(np.abs(z - other).max(-1) > 1e-4)


@pytest.mark.slow
def test_x_is_encoded_once_however_many_samples():
    shapes = []

    def apply(params, x, context=None):
        shapes.append(x.shape)
        return LED_MODEL.encoder.apply(params, x)

    led = LED_MODEL._replace(encoder=LED_MODEL.encoder._replace(apply=apply))
    jax.eval_shape(lambda x: led.elbo(Truth().params, KEY, x, (9,)), data(4))
    assert shapes == [(4, 3)]


def test_samples_follow_the_marginal():
    x = np.asarray(jax.jit(LED_MODEL.sample, static_argnums=2)(Truth().params, KEY, (5000,)))
    assert x.shape == (5000, 3)
    std = np.sqrt(np.diag(MARGINAL_COV))
    assert np.max(np.abs(x.mean(0) - MARGINAL_MEAN) / std) < 4 / np.sqrt(5000)
    np.testing.assert_allclose(
        np.cov(x.T) / np.outer(std, std), MARGINAL_COV / np.outer(std, std), atol=0.08
    )
    for i in range(3):
        test = scipy.stats.kstest((x[:, i] - MARGINAL_MEAN[i]) / std[i], "norm")
        assert test.pvalue > 1e-3


def test_encoded_draws_follow_the_posterior():
    truth, x = Truth(0.4, 1.3), data(1)
    rows = np.broadcast_to(x, (5000, 3))
    z = np.asarray(jax.jit(LED_MODEL.encode)(truth.params, KEY, rows))
    for i in range(2):
        test = scipy.stats.kstest((z[:, i] - truth.mean(x)[0, i]) / truth.std[i], "norm")
        assert test.pvalue > 1e-3


@pytest.mark.slow
def test_init_and_gradients_of_every_part():
    led, params, x = small_built()
    assert set(params) == {"encoder", "posterior", "prior", "decoder"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    gradient = jax.jit(jax.grad(lambda p: led.elbo(p, KEY, x).bound.sum()))(params)
    for name, part in jax.device_get(gradient).items():
        leaves = jax.tree.leaves(part)
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        # Some entries may be unused: the first output of a MADE has no input.
        assert all(np.any(leaf != 0) for leaf in leaves), name


def test_the_same_key_gives_the_same_draw():
    led, params, x = small_built()
    a, b, c = (np.asarray(elbo(led, params, jax.random.key(seed), x).bound) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.all(a != c)


def test_one_argument_order_everywhere():
    for name, method in inspect.getmembers(LED, inspect.isfunction):
        if name in LED.__dict__ and not name.startswith("_") and name != "init":
            names = [n for n in inspect.signature(method).parameters if n != "self"]
            # z0 is the prior flow's base, where z is its image.
            order = ["params", "key", "z0", "z", "x", "sample_shape", "encoding", "context"]
            if name == "posterior_sample_and_log_prob":  # The encoding is what is drawn from.
                order = ["params", "key", "encoding", "sample_shape"]
            assert names == [n for n in order if n in names], name


def test_wrong_width_of_x():
    led, params, _ = small_built()
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 5\], got \(4, 6\)"):
        jax.eval_shape(led.log_likelihood, params, normal((4, 3)), normal((4, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: (LED_MODEL, Truth().params, data(4)), small_built])
def test_posterior_log_prob_scores_its_own_samples(x64, make):
    led, params, x = make()

    @jax.jit
    def results(params, x):
        encoding = led.encoding(params, x)
        z, log_prob = led.posterior_sample_and_log_prob(params, KEY, encoding, (3,))
        scores = led.posterior_log_prob(params, z, encoding)
        # Every z against every x.
        return log_prob, scores, led.posterior_log_prob(params, z[0][:, None], encoding)

    log_prob, scores, pairs = jax.device_get(results(params, x))
    np.testing.assert_allclose(scores, log_prob, rtol=1e-6)
    assert pairs.shape == (4, 4)
    np.testing.assert_allclose(np.diagonal(pairs), log_prob[0], rtol=1e-6)


def test_posterior_log_prob_is_the_normal_of_the_closed_form(x64):
    truth, x = Truth(shift=0.3, spread=1.3), data(5)
    z = truth.mean(x) + 2 * np.asarray(normal((5, 2)))
    expected = scipy.stats.norm.logpdf(z, truth.mean(x), truth.std).sum(-1)
    score = jax.jit(lambda p: LED_MODEL.posterior_log_prob(p, z, LED_MODEL.encoding(p, x)))
    actual = score(truth.params)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.slow
def test_log_weight_is_the_bound_at_the_same_z(x64):
    led, params, x = small_built()

    @jax.jit
    def results(params, x):
        encoding = led.encoding(params, x)
        z, _ = led.posterior_sample_and_log_prob(params, KEY, encoding, (3,))
        weights = led.log_weight(params, z, x), led.log_weight(params, z, x, encoding)
        return weights, led.elbo(params, KEY, x, (3,), encoding).bound

    weights, bound = results(params, x)
    expected = elbo(led, params, KEY, x, (3,)).bound
    for weight in weights:
        np.testing.assert_allclose(weight, expected, rtol=1e-6)
    np.testing.assert_allclose(bound, expected, rtol=1e-9)


@pytest.mark.slow
def test_log_weight_at_any_z_in_closed_form(x64):
    truth, x, z = Truth(0.3, 1.3), data(5), 2 * np.asarray(normal((4, 5, 2)))
    log_joint = scipy.stats.norm.logpdf(x, z @ W + B, S).sum(-1)
    log_joint += scipy.stats.norm.logpdf(z, M, T).sum(-1)
    log_posterior = scipy.stats.norm.logpdf(z, truth.mean(x), truth.std).sum(-1)
    weight = jax.jit(LED_MODEL.log_weight)
    actual = np.asarray(weight(truth.params, z, x))
    np.testing.assert_allclose(actual, log_joint - log_posterior, rtol=1e-9)
    pair = np.asarray(weight(truth.params, z[0, 0], x))  # One z against every x.
    assert pair.shape == (5,)
    np.testing.assert_allclose(pair[0], actual[0, 0], rtol=1e-9)


@pytest.mark.slow
def test_given_parts_are_kept_and_the_others_made():
    led, x = LED_MODEL, data(4)
    params = random_params(led.init, x)

    @functools.partial(jax.jit, static_argnums=2)
    def init(params, x, given):
        return led.init(KEY, x, given={name: params[name] for name in given})

    for given in (("encoder",), ("prior", "decoder"), tuple(params)):
        made = init(params, x, given)
        assert jax.tree.structure(made) == jax.tree.structure(params)
        for name in given:
            jax.tree.map(np.testing.assert_array_equal, made[name], params[name])
    # A part does not depend on which others are given.
    fresh, made = init(params, x, ()), init(params, x, ("posterior",))
    for name in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, made[name], fresh[name])
    with pytest.raises(ValueError, match=r"expected parts encoder, .*, decoder, got \['flow'\]"):
        led.init(KEY, x, given={"flow": (), "encoder": params["encoder"]})


# A conditional model: all is linear in a context c too, so that p(x|c) is a normal.
U = np.array([[0.4, -0.3], [1.0, 0.2], [-0.6, 0.9], [0.1, 0.5]])
V = np.array([[0.5, -1.0, 0.3], [0.2, 0.7, -0.4], [-0.9, 0.1, 0.6], [0.8, 0.4, -0.2]])


def conditional_normal():
    """N(M + c U, T^2) as a density."""

    def log_prob(params, z, context=None):
        standard = (z - M - context @ params) / T
        return (densities.normal_log_prob(standard) - np.log(T)).sum(-1)

    def sample_and_log_prob(params, key, sample_shape=(), context=None):
        shape = (*sample_shape, *context.shape[:-1], 2)
        z = M + context @ params + T * jax.random.normal(key, shape)
        return z, log_prob(params, z, context)

    return Density(lambda key, z, context=None: jnp.asarray(U), log_prob, sample_and_log_prob)


CONDITIONAL = LED(
    encoders.gaussian_encoder(networks.MLP((4,)), 2),
    flows.actnorm(),
    conditional_normal(),
    decoders.decoder(likelihoods.gaussian(S), networks.MLP((3,))),
)


def conditional_params():
    """Parameters whose q is the exact posterior of z given x and c, for jitted functions."""
    precision = 1 / T**2 + (W**2).sum(1) / S**2
    kernel = W.T / S**2 / precision
    # The mean is (M + c U) / T^2 / precision + (x - B - c V) kernel.
    of_context = U / T**2 / precision - V @ kernel
    bias = M / T**2 / precision - B @ kernel
    zeros = np.zeros((7, 2))
    encoder = {
        "kernel": np.concatenate([np.concatenate([kernel, of_context]), zeros], 1),
        "bias": np.concatenate([bias, -0.5 * np.log(precision)]),
    }
    return {
        "encoder": {"Dense_0": encoder},
        "posterior": {"shift": np.zeros(2), "log_scale": np.zeros(2)},
        "prior": U,
        "decoder": {"Dense_0": {"kernel": np.concatenate([W, V]), "bias": B}},
    }


def conditional_log_marginal(x, context):
    means = MARGINAL_MEAN + context @ (U @ W + V)
    return scipy.stats.multivariate_normal(np.zeros(3), MARGINAL_COV).logpdf(x - means)


@pytest.mark.slow
def test_a_linear_gaussian_model_conditional_on_a_context(x64):
    params, x, context = conditional_params(), data(5), np.asarray(normal((5, 4), seed=8))
    exact = conditional_log_marginal(x, context)
    # At the exact posterior every draw's bound is log p(x|c).
    draws = elbo(CONDITIONAL, params, KEY, x, (50,), context=context).bound
    np.testing.assert_allclose(draws, np.tile(exact, (50, 1)), rtol=1e-9)
    weight = jax.jit(CONDITIONAL.log_weight)
    weights = weight(params, normal((6, 5, 2)), x, context=context)
    np.testing.assert_allclose(weights, np.tile(exact, (6, 1)), rtol=1e-9)
    other = elbo(CONDITIONAL, params, KEY, x, context=context[::-1]).bound
    assert np.abs(np.asarray(other) - exact)[[0, 1, 3, 4]].min() > 0.01


@pytest.mark.slow
def test_samples_of_a_conditional_model(x64):
    params, context = conditional_params(), np.asarray(normal((4, 4), seed=8))
    sample = jax.jit(CONDITIONAL.sample, static_argnums=2)
    for shape in ((), (2, 5)):
        draws = jax.eval_shape(lambda p, shape=shape: sample(p, KEY, shape, context), params)
        assert draws.shape == (*shape, 4, 3)
    x = np.asarray(sample(params, KEY, (4000,), context))
    mean = MARGINAL_MEAN + context @ (U @ W + V)
    std = np.sqrt(np.diag(MARGINAL_COV))
    assert np.max(np.abs(x.mean(0) - mean) / std) < 4.5 / np.sqrt(4000)
    np.testing.assert_allclose(x.std(0), np.tile(std, (4, 1)), rtol=0.06)


@pytest.mark.slow
def test_a_nonlinear_conditional_model_by_quadrature(x64):
    """p(x|c) of all eight x, with a conditional flow as the prior; they sum to one."""
    led = LED(
        encoders.mlp_encoder(2, (6,), context_dim=2),
        flows.real_nvp((2,), 2, hidden=(5,), context_dim=2),
        densities.transformed(
            densities.standard_normal((2,)), flows.real_nvp((2,), 2, hidden=(5,), context_dim=4)
        ),
        decoders.mlp_decoder(3, (6,)),
    )
    x = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    context = np.tile(normal((4,), seed=8), (8, 1))
    params = random_params(led.init, x, context, scale=0.2)
    ticks = np.linspace(-15, 15, 300)
    z = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 1, 2)

    @jax.jit
    def joint(params, z, x, context):
        log_likelihood = led.log_likelihood(params, z, x, context)
        return jnp.exp(log_likelihood + led.prior_log_prob(params, z, context[:1])).sum(0)

    exact = np.asarray(joint(params, z, x, context)) * (ticks[1] - ticks[0]) ** 2
    np.testing.assert_allclose(exact.sum(), 1, atol=1e-4)
    weights = np.exp(elbo(led, params, KEY, x, (4000,), context=context).bound)
    error = weights.std(0) / np.sqrt(4000)
    assert np.max(np.abs(weights.mean(0) - exact) / error) < 4.5
    assert np.max(error / exact) < 0.1
    for name in ("encode", "reconstruct"):
        out = jax.eval_shape(getattr(led, name), params, KEY, x, context)
        assert out.shape == (8, 2 if name == "encode" else 3)


def test_samples_have_the_parameters_dtype_and_integers_are_floats():
    flow = flows.real_nvp((2,), 2, (4,))
    prior = densities.transformed(densities.standard_normal((2,)), flow)
    led = LED(encoders.mlp_encoder(2, (4,)), flows.chain(), prior, decoders.mlp_decoder(3, (4,)))
    plain = led._replace(prior=densities.standard_normal((2,)))
    x = jax.ShapeDtypeStruct((5, 3), jnp.bfloat16)
    for model in (led, plain):
        params = jax.eval_shape(model.init, KEY, x)
        draws = jax.eval_shape(lambda p, model=model: model.sample(p, KEY, (4,)), params)
        assert draws.dtype == jnp.bfloat16 and draws.shape == (4, 3)
    params = jax.eval_shape(prior.init, KEY, jax.ShapeDtypeStruct((2,), jnp.bfloat16))
    z, log_prob = jax.eval_shape(lambda p: prior.sample_and_log_prob(p, KEY, (4,)), params)
    assert z.dtype == log_prob.dtype == jnp.bfloat16

    rows = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    params = jax.eval_shape(led.init, KEY, rows)
    for same in (rows, rows.tolist(), rows > 0):
        terms = jax.eval_shape(lambda p, same=same: led.elbo(p, KEY, same), params)
        assert {(term.shape, term.dtype) for term in terms} == {((2,), jnp.dtype(jnp.float32))}


def test_data_outside_the_likelihoods_values_are_refused():
    led = LED(
        encoders.mlp_encoder(2, (4,)),
        flows.chain(),
        densities.standard_normal((2,)),
        decoders.mlp_decoder(3, (4,)),
    )
    for wrong in (-np.ones((2, 3)), np.full((2, 3), 16), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match=r"x must be in \[0, 1\].*got x from"):
            led.init(KEY, wrong)
        with pytest.raises(ValueError, match=r"bernoulli: x must be in \[0, 1\]"):
            likelihoods.bernoulli().log_prob(jnp.zeros((2, 1, 3)), wrong)
    with pytest.raises(TypeError, match="LED: encoder must be an Encoder, got MLP"):
        LED(networks.MLP((4, 4)), *led[1:])
