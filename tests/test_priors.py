import functools

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from support import KEY, assert_trees_equal, normal, random_params, randomise
from support.linear_gaussian import LED_MODEL, Truth, data

from led_jax import LED, decoders, densities, encoders, flows, likelihoods, load, priors, save

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def vamp_led():
    """A model whose posterior flow reads a context, so that each component has its own flow."""
    return LED(
        encoders.mlp_encoder(2, (5,), context_dim=3),
        flows.real_nvp((2,), 2, hidden=(5,), context_dim=3),
        priors.vamp(3),
        decoders.mlp_decoder(4, (5,), likelihood=likelihoods.gaussian(1.0)),
    )


def vamp_built():
    led, x = vamp_led(), normal((6, 4))
    return led, random_params(led.init, x), x


@pytest.mark.slow
def test_a_vamp_prior_is_a_mixture_of_posteriors_in_closed_form(x64):
    led = LED_MODEL._replace(prior=priors.vamp(5))
    truth, inputs, z = Truth(0.3, 1.3), data(5), 2 * normal((7, 2))
    params = truth.params | {"prior": inputs}
    parts = [scipy.stats.norm.logpdf(z, truth.mean(u), truth.std).sum(-1) for u in inputs]
    expected = scipy.special.logsumexp(parts, axis=0) - np.log(5)
    np.testing.assert_allclose(jax.jit(led.prior_log_prob)(params, z), expected, rtol=1e-9)

    @jax.jit
    def of_elbo_and_of_draws(params):
        encoding = led.encoding(params, inputs)
        z, _ = led.posterior_sample_and_log_prob(params, KEY, encoding, (4,))
        return led.elbo(params, KEY, inputs, (4,)).log_prior, led.prior_log_prob(params, z)

    np.testing.assert_allclose(*of_elbo_and_of_draws(params), rtol=1e-9)


@pytest.mark.slow
def test_a_vamp_prior_of_conditional_flows_is_the_direct_sum(x64):
    led, params, _ = vamp_built()
    z = normal((7, 2), seed=5)
    mean, log_std, context = jax.device_get(jax.jit(led.encoding)(params, params["prior"]))
    inverse = jax.jit(led.posterior.inverse)
    parts = []
    for k in range(3):
        base, log_det = inverse(params["posterior"], z, context[k])
        parts.append(scipy.stats.norm.logpdf(base, mean[k], np.exp(log_std[k])).sum(-1) + log_det)
    expected = scipy.special.logsumexp(parts, axis=0) - np.log(3)
    score = jax.jit(led.prior_log_prob)
    np.testing.assert_allclose(score(params, z), expected, rtol=1e-9)
    assert np.std(parts, axis=0).min() > 1e-3  # Components differ.
    ticks = np.linspace(-12, 12, 200)
    grid = np.stack(np.meshgrid(ticks, ticks), -1)
    total = np.exp(score(params, grid)).sum() * (ticks[1] - ticks[0]) ** 2
    np.testing.assert_allclose(total, 1, atol=1e-3)


@pytest.mark.slow
def test_draws_of_a_vamp_prior():
    led, params, _ = vamp_built()
    z, log_prob = jax.jit(led.prior_sample_and_log_prob, static_argnums=2)(params, KEY, (50, 2))
    assert z.shape == (50, 2, 2) and log_prob.shape == (50, 2)
    again = jax.jit(led.prior_log_prob)(params, z)
    np.testing.assert_allclose(again, log_prob, rtol=1e-4, atol=1e-4)
    assert jax.eval_shape(lambda: led.sample(params, KEY, (3,))).shape == (3, 4)


@pytest.mark.parametrize("part", ["encoder", "posterior", "prior"])
def test_gradients_reach_all_that_a_vamp_prior_is_made_of(x64, part):
    led, params, x = vamp_built()
    z = normal((7, 2), seed=5)

    def objective(leaf):
        changed = params | {part: leaf}
        return led.elbo(changed, KEY, x).bound.mean() + led.prior_log_prob(changed, z).mean()

    def prior_alone(leaf):
        return led.prior_log_prob(params | {part: leaf}, z).mean()

    start = jax.device_get(params[part])
    direction = jax.device_get(randomise(jax.tree.map(np.zeros_like, start)))
    for function in map(jax.jit, map(jax.value_and_grad, (objective, prior_alone))):
        _, gradient = function(start)
        slope = sum(
            (np.asarray(g) * d).sum()
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        ahead, behind = (
            float(function(jax.tree.map(lambda p, d, e=e: p + e * d, start, direction))[0])
            for e in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)
        assert abs(slope) > 1e-4


def test_a_vamp_prior_starts_at_rows_of_the_data():
    led, x = vamp_led(), np.asarray(normal((6, 4)))
    inputs = np.asarray(jax.jit(led.init)(KEY, x)["prior"])
    rows = (inputs[:, None] == x).all(-1)
    assert inputs.shape == (3, 4) and rows.sum() == 3 and rows.any(0).sum() == 3


def test_a_subset_of_the_data_is_a_vamp_prior_whose_rows_stay(x64):
    led, params, x = vamp_built()
    subset, z = led._replace(prior=priors.data_subset(3)), normal((7, 2), seed=5)
    rows, again = (jax.jit(model.init)(KEY, x)["prior"] for model in (subset, led))
    assert_trees_equal(rows, again)
    params |= {"prior": rows}

    @jax.jit
    def gradients(params):
        return [
            jax.grad(lambda p, m=m: m.prior_log_prob(p, z).sum())(params) for m in (subset, led)
        ]

    np.testing.assert_array_equal(
        *(jax.jit(model.prior_log_prob)(params, z) for model in (subset, led))
    )
    still, learned = gradients(params)
    np.testing.assert_array_equal(still["prior"], np.zeros_like(rows))
    assert np.abs(learned["prior"]).min() > 0
    for part in ("encoder", "posterior"):
        jax.tree.map(np.testing.assert_array_equal, still[part], learned[part])


@pytest.mark.slow
def test_latent_maps_and_one_latent_variable(x64):
    """Events of three axes, and a mixture whose integral is one."""
    x = normal((5, 16))
    image = LED(
        encoders.spatial_encoder((4, 4), (2, 2, 1)),
        flows.actnorm(event_ndims=3),
        priors.vamp(4),
        decoders.spatial_decoder((4, 4), (2, 2, 1)),
    )
    params, z = random_params(image.init, x), normal((6, 2, 2, 1), seed=5)
    mean, log_std, _ = jax.jit(image.encoding)(params, params["prior"])
    base, log_det = map(np.asarray, jax.jit(image.posterior_inverse)(params, z))
    parts = scipy.stats.norm.logpdf(base[:, None], mean, np.exp(log_std)).sum((-3, -2, -1))
    expected = scipy.special.logsumexp(parts + log_det[:, None], axis=-1) - np.log(4)
    np.testing.assert_allclose(jax.jit(image.prior_log_prob)(params, z), expected, rtol=1e-9)
    draws, _ = jax.eval_shape(lambda: image.prior_sample_and_log_prob(params, KEY, (3,)))
    assert draws.shape == (3, 2, 2, 1)
    line = LED(
        encoders.mlp_encoder(1, (5,)), flows.actnorm(), priors.vamp(5), decoders.mlp_decoder(16)
    )
    ticks = np.linspace(-20, 20, 20001)
    params = random_params(line.init, x)
    q = np.exp(jax.jit(line.prior_log_prob)(params, ticks[:, None]))
    np.testing.assert_allclose(q.sum() * (ticks[1] - ticks[0]), 1, rtol=1e-6)


@pytest.mark.parametrize("make", [priors.vamp, priors.data_subset])
def test_saved_and_loaded_to_the_bit(tmp_path, make):
    led, x = vamp_led()._replace(prior=make(3)), normal((6, 4))
    params, z = jax.jit(led.init)(KEY, x), normal((7, 2), seed=5)
    save(tmp_path / "model", led, params)
    again, loaded = load(tmp_path / "model")
    assert again == led
    assert_trees_equal(loaded, params)
    assert_trees_equal(
        jax.jit(again.prior_log_prob)(loaded, z), jax.jit(led.prior_log_prob)(params, z)
    )


@pytest.mark.parametrize("make", [priors.vamp, priors.data_subset])
def test_wrong_numbers_of_components_and_contexts_are_errors(make):
    led, x = vamp_led(), normal((6, 4))
    with pytest.raises(ValueError, match="num_components must be positive, got 0"):
        make(0)
    with pytest.raises(ValueError, match="7 components .* got 6 rows"):
        jax.eval_shape(led._replace(prior=make(7)).init, KEY, x)
    with pytest.raises(ValueError, match=r"expected a model without a context, got .* \(6, 2\)"):
        jax.eval_shape(led._replace(prior=make(3)).init, KEY, x, normal((6, 2)))


@pytest.mark.slow
def test_what_depends_on_parameters_alone_is_computed_once():
    led, params, x = vamp_built()
    shapes = []

    def apply(params, x, context=None):
        shapes.append(x.shape)
        return led.encoder.apply(params, x, context)

    counting = led._replace(encoder=led.encoder._replace(apply=apply))
    jax.eval_shape(lambda: counting.elbo(params, KEY, x, (9,)))
    assert sorted(shapes) == [(3, 4), (6, 4)]


@pytest.mark.slow
def test_a_density_is_its_lifted_prior(x64):
    lifted = LED_MODEL._replace(prior=priors.lift(LED_MODEL.prior))
    truth, x = Truth(0.3), data(5)
    terms, again = (jax.jit(led.elbo)(truth.params, KEY, x) for led in (LED_MODEL, lifted))
    jax.tree.map(np.testing.assert_array_equal, terms, again)
    made, again = (jax.jit(led.init)(KEY, x) for led in (LED_MODEL, lifted))
    assert jax.tree.structure(made) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    sample = jax.jit(lifted.prior_sample_and_log_prob, static_argnums=2)
    expected = jax.jit(LED_MODEL.prior.sample_and_log_prob, static_argnums=2)
    jax.tree.map(
        np.testing.assert_array_equal,
        sample(truth.params, KEY, (3,)),
        expected(truth.params["prior"], KEY, (3,)),
    )


@pytest.mark.slow
def test_a_density_starts_from_draws_of_the_posterior(x64):
    truth, x = Truth(0.3), data(400)
    led = LED_MODEL._replace(prior=densities.mixture_of_normals((2,), 100))
    given = {name: truth.params[name] for name in ("encoder", "posterior")}
    params = jax.jit(functools.partial(led.init, given=given))(KEY, x)
    means = np.asarray(params["prior"]["mean"])
    expected = truth.mean(x)
    spread = np.sqrt(expected.var(0) + truth.std**2)
    assert np.max(np.abs(means.mean(0) - expected.mean(0)) / spread) < 4 / np.sqrt(100)
    np.testing.assert_allclose(means.std(0), spread, rtol=0.25)
