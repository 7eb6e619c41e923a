import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from support import KEY, normal, random_params

from led_jax import densities, flows, variational

numpyro = pytest.importorskip("numpyro")
dist, interop = numpyro.distributions, pytest.importorskip("led_jax.interop")

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.slow
def test_a_density_is_a_prior_in_a_numpyro_model():
    """NUTS under a prior that is a flow-transformed normal with a known posterior."""
    density = densities.transformed(densities.standard_normal((2,)), flows.chain(flows.actnorm()))
    std, x = np.array([2.0, 0.5], np.float32), np.array([3.0, -1.0], np.float32)
    params = {
        "base": (),
        "flow": ({"log_scale": np.log(std), "shift": np.ones(2, np.float32)},),
    }

    def model(params, x):
        z = numpyro.sample("z", interop.to_numpyro(density, params))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False
    )
    mcmc.run(KEY, params, x)
    z = np.asarray(mcmc.get_samples()["z"])
    precision = 1 / std**2 + 1
    expected = (std / std**2 + x) / precision
    np.testing.assert_allclose(z.mean(0), expected, atol=6 * np.sqrt(1 / precision / 500).max())
    np.testing.assert_allclose(z.std(0), 1 / np.sqrt(precision), rtol=0.15)


def test_distributions_have_batch_shapes_gradients_and_supports():
    flow = flows.chain(flows.iaf((2,), 1, hidden=(4,), context_dim=3), flows.sigmoid(0.0, 2.0))
    density = densities.transformed(densities.standard_normal((2,)), flow)
    context = normal((5, 3))
    params = random_params(density.init, np.zeros(2), np.zeros(3))
    support = dist.constraints.independent(dist.constraints.interval(0.0, 2.0), 1)

    @jax.jit
    @jax.value_and_grad
    def score(params, x):
        given = interop.to_numpyro(density, params, context, support)
        assert given.batch_shape == (5,) and given.event_shape == (2,)
        return given.log_prob(x).sum()

    given = interop.to_numpyro(density, params, context, support)
    sample = jax.jit(lambda given: given.sample(KEY, (7,)))
    x = sample(given)
    assert x.shape == (7, 5, 2) and np.all(given.support(x))
    value, gradient = score(params, x)
    expected = np.sum(jax.jit(density.log_prob)(params, x, context))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    again = jax.jit(lambda given: given)(given)  # numpyro expects a pytree.
    np.testing.assert_array_equal(sample(again), x)


@pytest.mark.parametrize("name", ["iaf", "simplex"])
def test_a_flow_is_a_transform(name):
    flow = flows.iaf((2,), 1, hidden=(4,)) if name == "iaf" else flows.simplex()
    codomain = {"iaf": None, "simplex": dist.constraints.simplex}[name]
    params = random_params(flow.init, np.zeros(2))
    transform = interop.flow_to_numpyro(flow, params, codomain)
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    transformed = dist.TransformedDistribution(base, transform)
    ours = densities.transformed(densities.standard_normal((2,)), flow)
    y = jax.jit(transformed.sample, static_argnums=1)(KEY, (6,))

    @jax.jit
    def scores(y):
        expected = ours.log_prob({"base": (), "flow": params}, y)
        return transformed.support(y), transformed.log_prob(y), expected

    in_support, actual, expected = scores(y)
    assert y.shape == (6, *transformed.event_shape) and np.all(in_support)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_the_evidence_of_a_numpyro_model_with_a_constrained_latent():
    """Poisson counts of a gamma rate: the marginal likelihood has a closed form."""
    counts = np.array([3, 5, 2, 4])

    def model(counts):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 0.5))
        numpyro.deterministic("twice", 2 * rate)
        numpyro.sample("counts", dist.Poisson(rate), obs=counts)

    posterior = interop.from_numpyro(KEY, model, counts)
    assert posterior.size == 1
    density = densities.transformed(densities.standard_normal((1,)), flows.actnorm())
    params = {"base": (), "flow": {"log_scale": jnp.full(1, -0.9), "shift": jnp.full(1, 3.0)}}
    weights = jax.jit(variational.log_weights, static_argnums=(0, 3, 4))(
        density, params, KEY, posterior.log_density, 5000
    )
    estimate = variational.evidence_from(weights)
    expected = (
        2 * math.log(0.5)
        + math.lgamma(2 + counts.sum())
        - math.lgamma(2)
        - (2 + counts.sum()) * math.log(4.5)
        - sum(math.lgamma(count + 1) for count in counts)
    )
    assert abs(estimate.log_z - expected) < 4 * estimate.standard_error < 0.1
    x = variational.resample(density, params, KEY, jax.jit(posterior.log_density), 2000)
    sites = jax.device_get(posterior.constrain(x))
    assert sites["rate"].shape == (2000,)
    np.testing.assert_allclose(sites["twice"], 2 * sites["rate"], rtol=1e-6)
    exact = scipy.stats.gamma(2 + counts.sum(), scale=1 / 4.5)
    np.testing.assert_allclose(sites["rate"].mean(), exact.mean(), rtol=0.03)
    np.testing.assert_allclose(sites["rate"].std(), exact.std(), rtol=0.08)


@pytest.mark.parametrize("scale", [0.3, 0.6, 0.8, 0.95])
def test_pareto_k_is_that_of_numpyros_diagnostic(scale):
    """Of weights of a normal by samples of a narrower one, whose k is 1 - scale^2."""
    importance = pytest.importorskip("numpyro.infer.importance")
    if not hasattr(importance, "_psis_khat"):
        pytest.skip("this numpyro has its estimate under another name")
    z = scale * np.random.default_rng(0).standard_normal((20_000, 2))
    log_weights = (z**2).sum(1) / 2 * (1 / scale**2 - 1)
    k = variational.pareto_k(log_weights)
    assert k == pytest.approx(importance._psis_khat(log_weights), rel=1e-6)
    assert k == pytest.approx(1 - scale**2, abs=0.15)


def test_sites_go_to_entries_and_back():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("groups", 4):
            x = numpyro.sample("x", dist.Normal(0, scale))
        numpyro.deterministic("total", x.sum())
        numpyro.sample("y", dist.Normal(x.sum() * weights[0]), obs=y)

    posterior = interop.from_numpyro(KEY, model, 1.0)
    entries = normal((2, 5, posterior.size))
    sites = posterior.constrain(entries)
    assert sites["weights"].shape == (2, 5, 3) and sites["total"].shape == (2, 5)
    np.testing.assert_allclose(posterior.unconstrain(sites), entries, atol=2e-6)
    np.testing.assert_allclose(
        posterior.unconstrain({name: site[0, 0] for name, site in sites.items()}),
        entries[0, 0],
        atol=2e-6,
    )
    for wrong in ({}, sites | {"x": sites["x"][0]}, sites | {"weights": sites["weights"][..., :2]}):
        with pytest.raises(ValueError, match=r"unconstrain: expected sites of the shapes .*'x'"):
            posterior.unconstrain(wrong)


def test_a_model_is_traced_for_its_shapes_and_not_run():
    """If the model were run, each of its operations would be compiled."""
    seen = []

    def model(y):
        x = numpyro.sample("x", dist.Normal().expand([3]).to_event(1))
        seen.append(isinstance(x, jax.core.Tracer))
        offset = numpyro.param("offset", lambda key: jax.random.normal(key))
        noise = numpyro.sample("noise", dist.HalfNormal())
        numpyro.sample("y", dist.Normal(x.sum() + offset, noise), obs=y)

    posterior = interop.from_numpyro(KEY, model, 1.0)
    x = normal((5, posterior.size))
    first, again = jax.jit(lambda x: [posterior.log_density(x) for _ in range(2)])(x)
    np.testing.assert_array_equal(first, again)  # The parameter is drawn once.
    np.testing.assert_allclose(posterior.unconstrain(posterior.constrain(x)), x, atol=2e-6)
    assert seen and all(seen)


def discrete(y):
    k = numpyro.sample("k", dist.Categorical(jnp.ones(2) / 2))
    x = numpyro.sample("x", dist.Normal())
    numpyro.sample("y", dist.Normal(x + 3 * k), obs=y)


def counted(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Poisson(2.0))), obs=y)


def subsampled(y):
    x = numpyro.sample("x", dist.Normal())
    with numpyro.plate("rows", 10, subsample_size=3):
        numpyro.sample("y", dist.Normal(x), obs=y)


def empty(y):
    numpyro.sample("y", dist.Normal(), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "expected continuous latent variables, and 'k' is discrete"),
        (counted, "expected continuous latent variables, and 'k' is discrete"),
        (subsampled, "the plate 'rows' takes 3 of 10 rows at random"),
        (empty, "expected a model with latent variables, got none"),
    ],
)
def test_models_that_are_no_density(model, message):
    with pytest.raises(ValueError, match=message):
        interop.from_numpyro(KEY, model, 1.0)
