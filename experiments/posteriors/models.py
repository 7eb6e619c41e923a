"""The posteriors of `experiments.posteriors`: numpyro models with their data, and a reference.

All are written down by their unconstrained entries, as numpyro maps each latent variable's support
to the real line.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam, Reparam
from sklearn import datasets


class Problem(NamedTuple):
    """A posterior.

    Attributes:
      model: a numpyro model.
      data: its arguments.
      easier: sites -> reparametrisations, under which NUTS moves well; empty where it does so in
        the model as it is.
    """

    model: Callable[..., Any]
    data: tuple[Any, ...]
    easier: Mapping[str, Reparam] = {}

    @property
    def easier_model(self) -> Callable[..., Any]:
        """The model, reparametrised: the same joint density of its sites."""
        return reparam(self.model, config=dict(self.easier))


NON_CENTRED = LocScaleReparam(0)

sample: Callable[..., Any] = numpyro.sample  # Annotated, there, as what may be no array.


def eight_schools(effects: Array, errors: Array) -> None:
    """Rubin (1981): effects of coaching, centred on their mean; it has the shape of a funnel."""
    mean = sample("mean", dist.Normal(0, 5))
    scale = sample("scale", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        effect = sample("effect", dist.Normal(mean, scale))
        sample("observed", dist.Normal(effect, errors), obs=effects)


def eight_schools_non_centred(effects: Array, errors: Array) -> None:
    """The same schools by standardised effects."""
    mean = sample("mean", dist.Normal(0, 5))
    scale = sample("scale", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        effect = sample("effect", dist.Normal())
        sample("observed", dist.Normal(mean + scale * effect, errors), obs=effects)


def logistic_regression(x: Array, y: Array) -> None:
    """Bayesian logistic regression on columns of unit variance."""
    intercept = sample("intercept", dist.Normal())
    weights = sample("weights", dist.Normal().expand([x.shape[1]]).to_event(1))
    logits = intercept + x @ weights
    sample("observed", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def radon(county: Array, floor: Array, level: Array) -> None:
    """Gelman and Hill (2006), chapter 12: a level for each county, and one slope."""
    mean = sample("mean", dist.Normal(0, 5))
    spread = sample("spread", dist.HalfNormal(1))
    slope = sample("slope", dist.Normal(0, 5))
    noise = sample("noise", dist.HalfNormal(1))
    with numpyro.plate("counties", 20):
        county_level = sample("level", dist.Normal(mean, spread))
    expected = county_level[county] + slope * floor
    sample("observed", dist.Normal(expected, noise).to_event(1), obs=level)


def funnel() -> None:
    """Neal (2003), section 8, at half its width: the scales of nine entries vary together.

    At its full width, a deviation of 3, rare draws alone make the standard deviations of x: no
    sample measures them.
    """
    log_variance = sample("log_variance", dist.Normal(0, 1.5))
    with numpyro.plate("entries", 9):
        sample("x", dist.Normal(0, jnp.exp(log_variance / 2)))


def banana() -> None:
    """Haario et al. (1999): a Gaussian bent along a parabola."""
    x = sample("x", dist.Normal(0, 10))
    sample("y", dist.Normal(0.03 * (x**2 - 100), 1))


def horseshoe(x: Array, y: Array) -> None:
    """Linear regression under a horseshoe (Carvalho et al., 2010) with half-Student-t scales."""
    overall = sample("overall", dist.HalfNormal(0.5))
    noise = sample("noise", dist.HalfNormal(1))
    with numpyro.plate("columns", x.shape[1]):
        local = jnp.exp(sample("log_local", dist.Normal(0, 1.5)))
        weights = sample("weights", dist.Normal(0, overall * local))
    sample("observed", dist.Normal(x @ weights, noise).to_event(1), obs=y)


def gaussian_process(x: Array, y: Array) -> None:
    """Classification by the sign of a Gaussian process with a learned length and amplitude.

    By 6 x 6 basis functions on the square of side 6, for lengths near 1: Riutort-Mayol et al.
    (2022), eq. 8, https://arxiv.org/abs/2004.11408.
    """
    length = sample("length", dist.LogNormal(0, 0.5))
    amplitude = sample("amplitude", dist.LogNormal(0.5, 0.5))
    weights = sample("weights", dist.Normal().expand([6, 6]).to_event(2))
    frequencies = jnp.arange(1, 7) * jnp.pi / 6
    basis = jnp.sin(frequencies * (x[..., None] + 3)) / jnp.sqrt(3)
    # Of each axis the square root of the spectral density of exp(-distance^2 / (2 length^2)).
    roots = (2 * jnp.pi) ** 0.25 * jnp.sqrt(length) * jnp.exp(-((length * frequencies) ** 2) / 4)
    values = jnp.einsum("ni,nj,ij->n", basis[:, 0] * roots, basis[:, 1] * roots, weights)
    sample("observed", dist.Bernoulli(logits=amplitude * values).to_event(1), obs=y)


def stochastic_volatility(returns: Array) -> None:
    """Kim, Shephard and Chib (1998): log-variances that follow an autoregression."""
    mean = sample("mean", dist.Normal(-1, 1))
    persistence = sample("persistence", dist.Beta(20, 1.5))
    # By an entry of unit scale: exp of a wider one overflows at the start of a fit, N(0, I).
    noise = jnp.exp(0.5 * sample("noise", dist.Normal()) - 1.5)
    shocks = sample("shocks", dist.Normal().expand([len(returns)]).to_event(1))

    def step(state: Array, shock: Array) -> tuple[Array, Array]:
        state = persistence * state + noise * shock
        return state, state

    start = noise * shocks[0] / jnp.sqrt(1 - persistence**2)
    _, rest = jax.lax.scan(step, start, shocks[1:])
    log_variance = mean + jnp.concatenate([start[None], rest])
    scales = jnp.exp(log_variance / 2)
    sample("observed", dist.Normal(0, scales).to_event(1), obs=returns)


def autoregression(series: Array) -> None:
    """A series by its three last values."""
    level = sample("level", dist.Normal(0, 5))
    weights = sample("weights", dist.Normal().expand([3]).to_event(1))
    noise = sample("noise", dist.HalfNormal(1))
    past = jnp.stack([series[3 - i : len(series) - i] for i in (1, 2, 3)], -1)
    expected = level + past @ weights
    sample("observed", dist.Normal(expected, noise).to_event(1), obs=series[3:])


def garch(returns: Array) -> None:
    """Bollerslev (1986): a variance by the last return and the last variance."""
    mean = sample("mean", dist.Normal(0, 1))
    constant = sample("constant", dist.HalfNormal(1))
    by_return = sample("by_return", dist.Beta(1, 1))
    by_variance = sample("by_variance", dist.Beta(1, 1))

    def step(variance: Array, last: Array) -> tuple[Array, Array]:
        # What both shares leave, so that they add up to less than 1.
        share = (1 - by_return) * by_variance
        return constant + by_return * (last - mean) ** 2 + share * variance, variance

    _, variances = jax.lax.scan(step, jnp.ones(()), returns)
    sample("observed", dist.Normal(mean, jnp.sqrt(variances)).to_event(1), obs=returns)


def mixture(x: Array) -> None:
    """Two Gaussians in order, their shares, places and scales unknown."""
    share = sample("share", dist.Beta(5, 5))
    place = sample("place", dist.Normal(0, 2))
    distance = sample("distance", dist.LogNormal(0.5, 0.5))
    scales = sample("scales", dist.HalfNormal(2).expand([2]).to_event(1))
    places = jnp.stack([place, place + distance])
    log_shares = jnp.log(jnp.stack([share, 1 - share]))
    parts = log_shares + dist.Normal(places, scales).log_prob(x[:, None])
    numpyro.factor("observed", jax.nn.logsumexp(parts, -1).sum())


def robust_regression(x: Array, y: Array) -> None:
    """Linear regression with Student-t noise of unknown degrees of freedom."""
    weights = sample("weights", dist.Normal().expand([x.shape[1]]).to_event(1))
    noise = sample("noise", dist.HalfNormal(1))
    freedom = sample("freedom", dist.Gamma(2, 0.1))
    sample("observed", dist.StudentT(freedom, x @ weights, noise).to_event(1), obs=y)


def problems() -> dict[str, Problem]:
    """All of them by name; data are scikit-learn's, Rubin's, or drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    effects = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    errors = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    cancer, malignant = datasets.load_breast_cancer(return_X_y=True)
    diabetes, progress = datasets.load_diabetes(return_X_y=True)
    moons, moon = datasets.make_moons(40, noise=0.2, random_state=0)

    county = rng.integers(20, size=200)
    floor = rng.integers(2, size=200).astype(np.float32)
    level = rng.normal(1.5, 0.3, 20)[county] - 0.7 * floor + rng.normal(0, 0.7, 200)

    log_variance, returns = -1.0, []
    for _ in range(60):
        log_variance = -1 + 0.95 * (log_variance + 1) + 0.3 * rng.normal()
        returns.append(np.exp(log_variance / 2) * rng.normal())

    series = [0.0, 0.0, 0.0]
    for _ in range(100):
        series.append(0.5 + 0.5 * series[-1] + 0.2 * series[-3] + 0.5 * rng.normal())

    variance, shocks = 1.0, [0.0]
    for _ in range(200):
        variance = 0.2 + 0.3 * shocks[-1] ** 2 + 0.5 * variance
        shocks.append(np.sqrt(variance) * rng.normal())

    two = np.where(rng.random(100) < 0.4, rng.normal(-1.5, 0.8, 100), rng.normal(1.0, 1.0, 100))
    diabetes, progress = _standardised(diabetes), _standardised(progress)
    non_centred = {"effect": NON_CENTRED}
    return {
        "eight schools, centred": Problem(eight_schools, (effects, errors), non_centred),
        "eight schools, non-centred": Problem(eight_schools_non_centred, (effects, errors)),
        "logistic regression": Problem(
            logistic_regression, (_standardised(cancer), jnp.asarray(malignant))
        ),
        "radon": Problem(radon, tuple(map(jnp.asarray, (county, floor, level)))),
        "funnel": Problem(funnel, (), {"x": NON_CENTRED}),
        "banana": Problem(banana, (), {"y": NON_CENTRED}),
        "horseshoe": Problem(horseshoe, (diabetes[:60], progress[:60]), {"weights": NON_CENTRED}),
        "Gaussian process": Problem(gaussian_process, (_standardised(moons), jnp.asarray(moon))),
        "stochastic volatility": Problem(stochastic_volatility, (jnp.asarray(returns),)),
        "autoregression": Problem(autoregression, (jnp.asarray(series),)),
        "GARCH": Problem(garch, (jnp.asarray(shocks[1:]),)),
        "mixture": Problem(mixture, (jnp.asarray(two),)),
        "robust regression": Problem(robust_regression, (diabetes, progress)),
    }


def _standardised(columns: Any) -> Array:
    return jnp.asarray((columns - columns.mean(0)) / columns.std(0), jnp.float32)
