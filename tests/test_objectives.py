import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import KEY, assert_trees_equal, normal, randomise
from support.linear_gaussian import LED_MODEL, M, T, Truth, data

from led_jax import LED, decoders, densities, encoders, flows, objectives, priors, training

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

TRUTH = {"shift": 0.3, "spread": 1.3}


def loss_of(objective, model, x):
    """The objective's loss, gradient and metrics, compiled, for parameters and a step."""

    def loss(params, step=0, key=KEY):
        return objective.loss(model, params, (), key, x, jnp.asarray(step))

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda *args: jax.device_get(run(*args))


@pytest.mark.slow
def test_the_elbo_is_that_of_a_linear_gaussian_model(x64):
    """Mean and gradient over many draws against closed forms and their finite differences."""
    truth, x = Truth(**TRUTH), data(4)
    rows = np.repeat(x, 20_000, 0)
    (loss, metrics), gradient = loss_of(objectives.elbo(), LED_MODEL, rows)(truth.params)
    log_likelihood, log_prior, log_posterior = (term.mean() for term in truth.terms(x))
    expected = {
        "elbo": truth.elbo(x).mean(),
        "log_likelihood": log_likelihood,
        "log_prior": log_prior,
        "log_posterior": log_posterior,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].shape == ()
        np.testing.assert_allclose(metrics[name], value, atol=0.03)
    np.testing.assert_allclose(loss, -metrics["elbo"], rtol=1e-12)
    # Shifting every z by e moves the exact ELBO as the encoder's bias does.
    step = 1e-4
    slope = (Truth(0.3 + step, 1.3).elbo(x) - Truth(0.3 - step, 1.3).elbo(x)).mean() / (2 * step)
    log_scale = np.asarray(truth.params["posterior"]["log_scale"])
    actual = -(gradient["encoder"]["bias"][:2] * np.exp(-log_scale)).sum()
    np.testing.assert_allclose(actual, slope, atol=0.05)
    assert abs(slope) > 0.5


@pytest.mark.slow
def test_a_gradient_is_the_slope_of_the_loss(x64):
    params, x = jax.device_get(Truth(**TRUTH).params), data(8)
    cases = objectives.elbo(), objectives.elbo(0.3), objectives.elbo(1.0, 0.1), objectives.iwae(5)
    for objective in (*cases, objectives.mmd(20.0, 0.3)):
        run = loss_of(objective, LED_MODEL, x)
        _, gradient = run(params)
        direction = jax.device_get(randomise(jax.tree.map(np.zeros_like, params)))
        ahead, behind = (
            run(jax.tree.map(lambda p, d, s=sign: p + s * 1e-5 * d, params, direction))[0][0]
            for sign in (1, -1)
        )
        slope = sum(
            (g * d).sum()
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)


@pytest.mark.slow
def test_a_weight_may_be_a_schedule_of_the_step(x64):
    params, x = Truth(**TRUTH).params, data(8)
    terms = jax.tree.map(np.mean, jax.device_get(jax.jit(LED_MODEL.elbo)(params, KEY, x)))
    kl = terms.log_posterior - terms.log_prior
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    warm_up = loss_of(objectives.elbo(schedule), LED_MODEL, x)
    constants = {w: loss_of(objectives.elbo(w), LED_MODEL, x)(params) for w in (0.0, 0.5, 1.0)}
    for step, weight in ((0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0)):
        (loss, metrics), gradient = warm_up(params, step)
        np.testing.assert_allclose(loss, weight * kl - terms.log_likelihood, rtol=1e-9)
        np.testing.assert_allclose(metrics["elbo"], terms.bound, rtol=1e-9)  # At weight 1 always.
        (constant, _), expected = constants[weight]
        np.testing.assert_allclose(constant, loss, rtol=1e-9)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


def test_objectives_without_parameters_of_their_own():
    for objective in (objectives.elbo(), objectives.stl(), objectives.maximum_likelihood()):
        assert objective.init(KEY, None, {}, np.zeros((2, 3))) == ()


def test_maximum_likelihood_is_the_mean_negative_log_density(x64):
    """For N(m, s^2) the gradient is zero only at the moments of the rows."""
    density = densities.mixture_of_normals((2,), 1)
    x = data(50)[:, :2]
    moments = {"mean": x.mean(0)[None], "log_std": np.log(x.std(0))[None]}
    params = {"logits": np.zeros(1), **moments}
    run = loss_of(objectives.maximum_likelihood(), density, x)
    (loss, metrics), gradient = run(params)
    expected = np.log(x.std(0)).sum() + np.log(2 * np.pi) + 1  # The entropy of that normal.
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert set(metrics) == {"log_prob"}
    np.testing.assert_allclose(metrics["log_prob"], -loss)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-9)
    off = params | {"mean": params["mean"] + 0.5}
    np.testing.assert_allclose(run(off)[1]["mean"][0], 0.5 / x.var(0), rtol=1e-9)


@pytest.mark.slow
def test_free_bits_are_a_floor_of_the_batchs_kl(x64):
    params, x = Truth(**TRUTH).params, data(8)
    (free, metrics), _ = loss_of(objectives.elbo(), LED_MODEL, x)(params)
    kl = metrics["log_posterior"] - metrics["log_prior"]
    (below, _), _ = loss_of(objectives.elbo(1.0, float(kl) - 0.1), LED_MODEL, x)(params)
    (above, _), gradient = loss_of(objectives.elbo(1.0, float(kl) + 0.7), LED_MODEL, x)(params)
    np.testing.assert_allclose([below - free, above - free], [0, 0.7], atol=1e-9)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["prior"]))
    with pytest.raises(ValueError, match="free_bits must be 0 or more, got -1"):
        objectives.elbo(free_bits=-1)


# An objective with less gradient noise, and one whose gradient has the same mean.
REDUCED = {
    "stl": (objectives.stl(), objectives.elbo()),
    "dreg-1": (objectives.dreg(1), objectives.elbo()),
    "dreg-8": (objectives.dreg(8), objectives.iwae(8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_gradients_of_less_noise_have_the_same_mean(x64, name):
    reduced, plain = REDUCED[name]
    params, x = Truth(shift=0.3, spread=1.1).params, data(4)
    keys = jax.random.split(KEY, 4000)

    def moments(objective):
        gradient = jax.grad(lambda p, k: objective.loss(LED_MODEL, p, (), k, x, 0)[0])
        samples = jax.device_get(jax.jit(jax.vmap(gradient, (None, 0)))(params, keys))
        flat = {
            part: np.concatenate([a.reshape(len(keys), -1) for a in jax.tree.leaves(leaves)], 1)
            for part, leaves in samples.items()
        }
        return {part: (a.mean(0), a.var(0)) for part, a in flat.items()}

    found, expected = moments(reduced), moments(plain)
    for part, (mean, variance) in found.items():
        other_mean, other_variance = expected[part]
        error = np.sqrt((variance + other_variance) / len(keys))
        np.testing.assert_array_less(np.abs(mean - other_mean), 5 * error + 1e-12)
    assert found["encoder"][1].sum() < 0.7 * expected["encoder"][1].sum()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [objectives.stl(), objectives.dreg(1), objectives.dreg(5)])
def test_at_the_exact_posterior_there_is_no_noise_at_all(x64, objective):
    truth, x = Truth(), data(4)
    (_, metrics), gradient = loss_of(objective, LED_MODEL, x)(truth.params)
    for leaf in jax.tree.leaves((gradient["encoder"], gradient["posterior"])):
        np.testing.assert_allclose(leaf, 0, atol=1e-10)
    np.testing.assert_allclose(metrics["elbo"], truth.log_marginal(x).mean(), rtol=1e-10)
    assert np.abs(gradient["decoder"]["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_the_importance_weighted_bound_by_quadrature(x64):
    """K = 1 is the ELBO; K = 2 is the integral over both draws, and K = 500 nearly log p(x)."""
    truth, x = Truth(shift=0.5), data(1)
    exact = float(truth.log_marginal(x))
    rows = np.repeat(x, 40_000, 0)

    def bound(k, rows):
        run = jax.jit(lambda p, x: objectives.iwae(k).loss(LED_MODEL, p, (), KEY, x, 0))
        loss, metrics = jax.device_get(run(truth.params, rows))
        np.testing.assert_allclose(loss, -metrics["iwae"])
        return metrics["iwae"]

    bounds = {k: bound(k, rows) for k in (1, 2)}
    np.testing.assert_allclose(bounds[1], truth.elbo(x)[0], atol=0.03)
    # log w is linear in the noise for a shifted posterior: log p(x) - |a|^2 / 2 + a'e, of std |a|.
    variance = 2 * (exact - truth.elbo(x)[0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    scaled = np.sqrt(variance) * nodes
    pairs = np.logaddexp(scaled[:, None], scaled) - np.log(2)
    expected = (weights[:, None] * weights * pairs).sum() / (2 * np.pi)
    expected += exact - variance / 2
    np.testing.assert_allclose(bounds[2], expected, atol=0.02)
    np.testing.assert_allclose(bound(500, rows[:1000]), exact, atol=0.01)


@pytest.mark.parametrize("make", [objectives.iwae, objectives.dreg])
def test_samples_must_be_positive(make):
    with pytest.raises(ValueError, match="num_samples must be 1 or more, got 0"):
        make(0)


@pytest.mark.slow
def test_the_mean_discrepancy_is_that_of_two_normals(x64):
    """The normals are q(z|x) for one x and the prior: the estimates' mean has a closed form."""
    truth, x = Truth(shift=0.8, spread=1.3), data(1)
    bandwidth, keys = 0.7, jax.random.split(KEY, 2000)
    objective = objectives.mmd(30.0, 0.5, bandwidth)
    rows = np.repeat(x, 12, 0)
    run = jax.jit(jax.vmap(lambda key: objective.loss(LED_MODEL, truth.params, (), key, rows, 0)))
    losses, metrics = jax.device_get(run(keys))
    width = 2 * bandwidth**2  # Of each of the two dimensions.

    def mean_kernel(a, b):
        (mean_a, std_a), (mean_b, std_b) = a, b
        variance = width + std_a**2 + std_b**2
        return np.prod(np.sqrt(width / variance) * np.exp(-((mean_a - mean_b) ** 2) / 2 / variance))

    q, p = (truth.mean(x[0]), truth.std), (M, T)
    exact = mean_kernel(q, q) + mean_kernel(p, p) - 2 * mean_kernel(q, p)
    error = metrics["mmd"].std() / np.sqrt(len(keys))
    assert abs(metrics["mmd"].mean() - exact) < 4 * error < 0.1 * exact
    kl = metrics["log_posterior"] - metrics["log_prior"]
    expected = 0.5 * kl - metrics["log_likelihood"] + 30 * metrics["mmd"]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        objectives.mmd(bandwidth=0.0)
    with pytest.raises(ValueError, match=r"two rows or more, got shape \(1, 3\)"):
        objective.loss(LED_MODEL, truth.params, (), KEY, x, 0)


@pytest.mark.slow
def test_the_model_climbs_what_the_critic_descends(x64):
    """Each one's gradient is the slope of its own loss: finite differences of the metrics."""
    params, x, weight = jax.device_get(Truth(shift=0.8).params), data(8), 3.0
    objective = objectives.adversarial(weight, kl_weight=0.5, hidden=(6,))
    init = jax.jit(objective.init, static_argnums=1)
    own = jax.device_get(randomise(init(KEY, LED_MODEL, params, x)))

    @jax.jit
    def gradient_and_metrics(*trained):
        loss = lambda p, o: objective.loss(LED_MODEL, p, o, KEY, x, 0)  # noqa: E731
        return jax.grad(loss, (0, 1), has_aux=True)(*trained)

    def own_losses(*trained):
        _, m = jax.device_get(gradient_and_metrics(*trained))
        of_model = 0.5 * (m["log_posterior"] - m["log_prior"]) - m["log_likelihood"]
        return of_model - weight * m["critic_loss"], m["critic_loss"]

    gradient, _ = jax.device_get(gradient_and_metrics(params, own))
    for i in range(2):
        there = [jax.tree.map(np.zeros_like, part) for part in (params, own)]
        there[i] = jax.device_get(randomise(there[i]))
        ahead, behind = (
            own_losses(
                *(
                    jax.tree.map(lambda p, d, s=sign: p + s * 1e-5 * d, part, direction)
                    for part, direction in zip((params, own), there, strict=True)
                )
            )[i]
            for sign in (1, -1)
        )
        slope = sum(
            (g * d).sum()
            for g, d in zip(jax.tree.leaves(gradient[i]), jax.tree.leaves(there[i]), strict=True)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-5, slope, rtol=1e-6)
        assert abs(slope) > 1e-3
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[0]["prior"]))


@pytest.mark.slow
def test_the_critic_may_have_an_optimizer_of_its_own():
    params, x = Truth().params, data(8)
    objective = objectives.adversarial(hidden=(6,))
    own = jax.jit(objective.init, static_argnums=1)(KEY, LED_MODEL, params, x)
    parts = {"model": optax.set_to_zero(), "own": optax.sgd(0.1)}
    optimizer = optax.partition(parts, ("model", "own"))
    trained = params, own

    @jax.jit
    def step(trained):
        opt_state = optimizer.init(trained)
        return training.train_step(
            LED_MODEL, optimizer, objective, trained, opt_state, KEY, jnp.asarray(x), 0
        )

    (new_params, new_own), *_ = step(trained)
    assert_trees_equal(new_params, params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *jax.device_get((new_own, own)))
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_the_prior_alone_is_fitted(x64):
    """The prior's gradient is the ELBO's; other parts, which a VampPrior reads, have none."""
    truth, x = Truth(shift=0.3), data(8)
    for led, prior in (
        (LED_MODEL, truth.params["prior"]),
        (LED_MODEL._replace(prior=priors.vamp(3)), data(3, seed=1)),
    ):
        params = truth.params | {"prior": prior}
        (loss, metrics), gradient = loss_of(objectives.prior_only(), led, x)(params)
        _, whole = loss_of(objectives.elbo(), led, x)(params)
        jax.tree.map(np.testing.assert_array_equal, gradient["prior"], whole["prior"])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["prior"]))
        for leaf in jax.tree.leaves(led.all_but_prior(gradient)):
            np.testing.assert_array_equal(leaf, 0)
        np.testing.assert_allclose(loss, -metrics["log_prior"])


OBJECTIVES = [
    objectives.elbo(),
    objectives.iwae(2),
    objectives.dreg(2),
    objectives.stl(),
    objectives.prior_only(),
    objectives.mmd(),
    objectives.adversarial(hidden=(3,)),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_every_objective_takes_a_context(objective):
    density = densities.transformed(
        densities.standard_normal((2,)), flows.real_nvp((2,), 1, hidden=(3,), context_dim=4)
    )
    led = LED(encoders.mlp_encoder(2, (3,)), flows.lu((2,)), density, decoders.mlp_decoder(5, (3,)))
    x, context = (np.asarray(normal((6, 5))) > 0).astype(float), normal((6, 4))

    def loss(key):
        params = led.init(key, x, context)
        own = objective.init(key, led, params, x, context)
        return objective.loss(led, params, own, key, x, jnp.asarray(0), context)

    value, metrics = jax.eval_shape(loss, KEY)
    assert value.shape == () and {m.shape for m in metrics.values()} == {()}
