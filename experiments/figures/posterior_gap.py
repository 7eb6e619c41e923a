r"""Figure 1: what updating the prior alone does to the true posterior.

    python -m experiments.figures.posterior_gap --workdir=DIR [--fast]

A LED with a latent plane is trained with the prior N(0, I); then encoder and decoder are held
fixed and a Real NVP prior, the identity at first, is trained alone. True posteriors p(z|x) are
computed on a grid before and after, and with them KL(q(z|x) || p(z|x)) = log p(x) - ELBO(x) of
every test row: for the mixture of experiments.figures.mixture and for the digits. Writes
figure1.png and figure1.json. The last line on standard output is that JSON object.
"""

import math
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import plots
from experiments.figures import plane
from experiments.figures.launch import define_flags, launch
from experiments.plots import Panel
from led_jax import LED, data, decoders, densities, encoders, estimators
from led_jax.flows import chain, real_nvp
from led_jax.training import Progress, TrainState

NUM_SHOWN = 4


class Setting(NamedTuple):
    """Epochs of each stage, and cells along a side of the grid."""

    epochs: int
    cells: int


FULL, FAST = Setting(200, 240), Setting(40, 120)


class Problem(NamedTuple):
    """A LED with a latent plane, and what it is trained and tested on."""

    led: LED
    rows: Array
    test: Array


def build_problems(key: Array) -> dict[str, Problem]:
    """The mixture of Gaussians, drawn by `key`, and the digits."""
    prior = real_nvp((2,), plane.PRIOR_DEPTH, hidden=(64,))
    mixture, mixture_params = plane.mixture()
    points, _ = mixture.sample_and_log_prob(mixture_params, key, (5000,))
    digits = data.load("digits")
    digits_led = LED(
        encoder=encoders.mlp_encoder(2),
        posterior=chain(),
        prior=densities.transformed(densities.standard_normal((2,)), prior),
        decoder=decoders.mlp_decoder(64),
    )
    return {
        "mixture": Problem(plane.build_led(prior), points[:4000], points[4000:]),
        "digits": Problem(
            digits_led, jnp.asarray(digits.train), jnp.asarray(digits.test, jnp.float32)
        ),
    }


def train_parts(
    problem: Problem, parts: tuple[str, ...], params: Any, key: Array, epochs: int, name: str
) -> Any:
    """Parameters after training some parts of the model and holding the others fixed."""
    optimizer = optax.multi_transform(
        {
            "trained": plane.make_optimizer(len(problem.rows), epochs),
            "fixed": optax.set_to_zero(),
        },
        ({part: "trained" if part in parts else "fixed" for part in params}, ()),
    )
    opt_state = optimizer.init((params, ()))
    state = TrainState(params, (), opt_state, key, jnp.zeros((), jnp.int32))
    start = Progress(state, state)
    *_, progress = plane.train(problem.led, optimizer, problem.rows, key, epochs, name, start)
    return progress.params


def measure(
    problem: Problem, params: Any, key: Array, cells: int
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The bound, its gap and how far the prior is from the aggregated posterior.

    Returns:
      A dict of means over the test rows, the gap's standard error and the training rows'
      KL(q(z) || p(z)); the gap of every test row, `[n]`; and its log p(x), `[n]`.
    """
    led, rows, test = problem
    grid = plane.latent_grid(led, params, rows, cells)
    log_marginal, gap = map(
        np.asarray,
        (plane.log_marginal(led, params, test, grid), plane.posterior_gap(led, params, test, grid)),
    )
    log_p, log_q = _prior_and_aggregate(led, params, rows, grid.points)
    elbo = jax.jit(led.elbo, static_argnums=3)(params, key, test, (500,))
    numbers = {
        "posterior_gap": float(gap.mean()),
        "posterior_gap_se": float(gap.std() / math.sqrt(len(gap))),
        "nll": -float(log_marginal.mean()),
        "sampled_elbo": float(np.mean(elbo.bound)),
        "train_marginal_kl": grid.integrate(np.exp(log_q) * (log_q - log_p)),
    }
    return numbers, gap, log_marginal


def _prior_and_aggregate(
    led: LED, params: Any, rows: Array, z: Array
) -> tuple[np.ndarray, np.ndarray]:
    """log p(z), and log q(z) of the aggregated posterior of the rows."""
    encoding = estimators.encode_all(led, params, rows)
    log_q = estimators.aggregated_posterior_log_prob(led, params, z, encoding)
    return np.asarray(jax.jit(led.prior_log_prob)(params, z)), np.asarray(log_q)


@partial(jax.jit, static_argnums=0)
def _joint_and_posterior(led: LED, params: Any, x: Array, z: Array) -> tuple[Array, Array]:
    """log p(x, z) and log q(z|x) of one x and many z."""
    log_joint = led.log_likelihood(params, z, x) + led.prior_log_prob(params, z)
    return log_joint, led.posterior_log_prob(params, z, led.encoding(params, x))


def draw(
    problem: Problem,
    params: Any,
    shown: Array,
    gaps: np.ndarray,
    log_marginals: np.ndarray,
    title: str,
) -> list[Panel]:
    """The prior with the aggregated posterior, then p(z|x) with q(z|x) of each row shown."""
    led, rows, _ = problem
    grid = plane.latent_grid(led, params, rows, 150)
    p, q = map(np.exp, _prior_and_aggregate(led, params, rows, grid.points))
    panels = [Panel(f"{title}: p(z)", grid.image(p), grid.extent, grid.image(q))]
    encoding = estimators.encode_all(led, params, shown)
    mean, log_std = np.asarray(encoding.mean), np.asarray(encoding.log_std)
    for i, x in enumerate(shown):
        near = plane.square(5 * float(np.exp(log_std[i]).max()), 100, tuple(mean[i].tolist()))
        log_joint, log_q = map(np.asarray, _joint_and_posterior(led, params, x, near.points))
        posterior = near.image(np.exp(log_joint - log_marginals[i]))
        title = f"p(z|x), KL {gaps[i]:.2f}"
        panels.append(Panel(title, posterior, near.extent, near.image(np.exp(log_q))))
    return panels


def run(setting: Setting, seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains, updates the prior alone and draws the figure; returns the numbers."""
    data_key, init_key, elbo_key, *stage_keys = jax.random.split(jax.random.key(seed), 5)
    result, panels = {}, []
    for name, problem in build_problems(data_key).items():
        x = problem.rows[: plane.BATCH_SIZE].astype(jnp.float32)
        params = jax.jit(problem.led.init)(init_key, x)
        stages, gaps, draws = {}, [], []
        for stage, parts, key in (
            ("before", ("encoder", "decoder"), stage_keys[0]),
            ("after", ("prior",), stage_keys[1]),
        ):
            params = train_parts(
                problem, parts, params, key, setting.epochs, f"{name}, {'+'.join(parts)}"
            )
            stages[stage], gap, log_marginal = measure(problem, params, elbo_key, setting.cells)
            gaps.append(gap)
            draws.append((params, log_marginal))
        change = gaps[1] - gaps[0]
        result[name] = {
            **stages,
            "change": float(change.mean()),
            "change_se": float(change.std() / math.sqrt(len(change))),
            "share_that_fell": float((change < 0).mean()),
            "test_rows": len(change),
        }
        # The rows shown have evenly spaced ranks in the order of the gap before the update.
        ranks = (np.arange(NUM_SHOWN) + 0.5) / NUM_SHOWN * len(change)
        shown = np.argsort(gaps[0])[ranks.astype(int)]
        for stage, gap, (params, log_marginal) in zip(stages, gaps, draws, strict=True):
            panels.append(
                draw(
                    problem,
                    params,
                    problem.test[shown],
                    gap[shown],
                    log_marginal[shown],
                    f"{name}, {stage}",
                )
            )
    plots.density_maps(workdir / "figure1.png", panels)
    return result


if __name__ == "__main__":
    define_flags()
    launch(
        "figures.posterior_gap", "figure1", lambda fast, *args: run(FAST if fast else FULL, *args)
    )
