import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from support import KEY, normal, random_params, randomise
from support.linear_gaussian import LED_MODEL, Truth, data

from led_jax import LED, Prior, decoders, densities, encoders, flows, priors

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def vamp_prior(num_components):
    """p(z) = 1/K sum_k q(z|u_k) for learnt pseudo-inputs u_k: Tomczak and Welling (2018)."""

    def init(key, x, posterior, context=None):
        return {"inputs": x[jax.random.choice(key, len(x), (num_components,), False)]}

    def bind(params, posterior):
        encoding = posterior.encode(params["inputs"])
        event_ndims = encoding.mean.ndim - 1

        def log_prob(z, context=None):
            z = jnp.expand_dims(z, -1 - event_ndims)
            log_components = posterior.log_prob(z, encoding)
            return jax.nn.logsumexp(log_components, -1) - jnp.log(num_components)

        def sample_and_log_prob(key, sample_shape=(), context=None):
            component_key, z_key = jax.random.split(key)
            k = jax.random.randint(component_key, sample_shape, 0, num_components)
            z, _ = posterior.sample_and_log_prob(z_key, jax.tree.map(lambda a: a[k], encoding))
            return z, log_prob(z)

        return priors.Bound(log_prob, sample_and_log_prob)

    return Prior(init, bind)


def vamp_led():
    """A posterior flow that reads a context, so that every component has a flow of its own."""
    return LED(
        encoders.mlp_encoder(2, (5,), context_dim=3),
        flows.real_nvp((2,), 2, hidden=(5,), context_dim=3),
        vamp_prior(3),
        decoders.mlp_decoder(4, (5,)),
    )


def vamp_built():
    led, x = vamp_led(), normal((6, 4))
    return led, random_params(led.init, x), x


def test_a_vamp_prior_is_a_mixture_of_posteriors_in_closed_form(x64):
    led = LED_MODEL._replace(prior=vamp_prior(5))
    truth, inputs, z = Truth(0.3, 1.3), data(5), 2 * normal((7, 2))
    params = truth.params | {"prior": {"inputs": inputs}}
    parts = [scipy.stats.norm.logpdf(z, truth.mean(u), truth.std).sum(-1) for u in inputs]
    expected = scipy.special.logsumexp(parts, axis=0) - np.log(5)
    np.testing.assert_allclose(led.prior_log_prob(params, z), expected, rtol=1e-9)
    terms = led.elbo(params, KEY, inputs, (4,))
    z = led.posterior_sample_and_log_prob(params, KEY, led.encoding(params, inputs), (4,))[0]
    np.testing.assert_allclose(terms.log_prior, led.prior_log_prob(params, z), rtol=1e-9)


def test_a_vamp_prior_of_conditional_flows_is_the_direct_sum(x64):
    led, params, _ = vamp_built()
    z = normal((7, 2), seed=5)
    mean, log_std, context = led.encoding(params, params["prior"]["inputs"])
    parts = []
    for k in range(3):
        base, log_det = led.posterior.inverse(params["posterior"], z, context[k])
        parts.append(scipy.stats.norm.logpdf(base, mean[k], np.exp(log_std[k])).sum(-1) + log_det)
    expected = scipy.special.logsumexp(parts, axis=0) - np.log(3)
    np.testing.assert_allclose(led.prior_log_prob(params, z), expected, rtol=1e-9)
    assert np.std(parts, axis=0).min() > 1e-3  # No single one of them.
    ticks = jnp.linspace(-12, 12, 200)
    grid = jnp.stack(jnp.meshgrid(ticks, ticks), -1)
    total = jnp.exp(jax.jit(led.prior_log_prob)(params, grid)).sum() * (ticks[1] - ticks[0]) ** 2
    np.testing.assert_allclose(total, 1, atol=1e-3)


def test_draws_of_a_vamp_prior():
    led, params, _ = vamp_built()
    z, log_prob = jax.jit(led.prior_sample_and_log_prob, static_argnums=2)(params, KEY, (50, 2))
    assert z.shape == (50, 2, 2) and log_prob.shape == (50, 2)
    np.testing.assert_allclose(led.prior_log_prob(params, z), log_prob, rtol=1e-4, atol=1e-4)
    assert jax.eval_shape(lambda: led.sample(params, KEY, (3,))).shape == (3, 4)


@pytest.mark.parametrize("part", ["encoder", "posterior", "prior"])
def test_gradients_reach_all_that_a_vamp_prior_is_made_of(x64, part):
    led, params, x = vamp_built()
    z = normal((7, 2), seed=5)

    @jax.jit
    def objective(leaf):
        changed = params | {part: leaf}
        return led.elbo(changed, KEY, x).bound.mean() + led.prior_log_prob(changed, z).mean()

    def prior_alone(leaf):
        return led.prior_log_prob(params | {part: leaf}, z).mean()

    direction = randomise(jax.tree.map(jnp.zeros_like, params[part]))
    for function in (objective, jax.jit(prior_alone)):
        gradient = jax.jit(jax.grad(function))(params[part])
        slope = sum(
            (g * d).sum()
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        ahead, behind = (
            function(jax.tree.map(lambda p, d, e=e: p + e * d, params[part], direction))
            for e in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)
        assert abs(slope) > 1e-4


def test_a_vamp_prior_starts_at_rows_of_the_data():
    led, x = vamp_led(), normal((6, 4))
    inputs = led.init(KEY, x)["prior"]["inputs"]
    rows = (inputs[:, None] == x).all(-1)
    assert inputs.shape == (3, 4) and rows.sum() == 3 and rows.any(0).sum() == 3


def test_what_depends_on_parameters_alone_is_computed_once():
    led, params, x = vamp_built()
    shapes = []

    def apply(params, x, context=None):
        shapes.append(x.shape)
        return led.encoder.apply(params, x, context)

    counting = led._replace(encoder=led.encoder._replace(apply=apply))
    counting.elbo(params, KEY, x, (9,))
    assert sorted(shapes) == [(3, 4), (6, 4)]


def test_a_density_is_its_lifted_prior(x64):
    lifted = LED_MODEL._replace(prior=priors.lift(LED_MODEL.prior))
    truth, x = Truth(0.3), data(5)
    for a, b in zip(
        LED_MODEL.elbo(truth.params, KEY, x), lifted.elbo(truth.params, KEY, x), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    made, again = (jax.jit(led.init)(KEY, x) for led in (LED_MODEL, lifted))
    assert jax.tree.structure(made) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    for a, b in zip(
        lifted.prior_sample_and_log_prob(truth.params, KEY, (3,)),
        LED_MODEL.prior.sample_and_log_prob(truth.params["prior"], KEY, (3,)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_density_starts_from_draws_of_the_posterior(x64):
    truth, x = Truth(0.3), data(400)
    led = LED_MODEL._replace(prior=densities.mixture_of_normals((2,), 100))
    params = led.init(
        KEY, x, given={"encoder": truth.params["encoder"], "posterior": truth.params["posterior"]}
    )
    means = params["prior"]["mean"]
    expected = truth.mean(x)
    spread = np.sqrt(expected.var(0) + truth.std**2)
    assert np.max(np.abs(means.mean(0) - expected.mean(0)) / spread) < 4 / np.sqrt(100)
    np.testing.assert_allclose(means.std(0), spread, rtol=0.25)
