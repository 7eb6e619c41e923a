"""A thousand calls of public functions with random arguments, right ones and wrong ones.

Each ends in the result that right arguments give, or in an error of this library that names a wrong
argument. What succeeds is traced and not compiled.
"""

import functools
import inspect
import re
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import led_jax
from led_jax import (
    LED,
    decoders,
    densities,
    descriptions,
    encoders,
    estimators,
    flows,
    interop,
    likelihoods,
    networks,
    objectives,
    optimizers,
    posteriors,
    priors,
    sharding,
    training,
    variational,
)
from led_jax import data as data_sets

HOME = Path(led_jax.__file__).parent
KEY = jax.random.key(0)


class Pool(NamedTuple):
    """Values of an argument: each of the right ones gives the same shapes, each wrong one fails."""

    right: tuple[Any, ...]
    wrong: tuple[Any, ...]


class Target(NamedTuple):
    """A public function with a pool for each argument; `traced` if it may run under eval_shape."""

    function: Any
    pools: dict[str, Pool]
    traced: bool = True


def pool(*right, wrong=()):
    return Pool(right, tuple(wrong))


JUNK = ("4", None, object(), {"a": 1}, 1j)
STACK = flows.real_nvp((4,), 2, hidden=(8,))
NORMAL = densities.standard_normal((4,))
NORMAL_1 = densities.standard_normal((1,))
KEYS = pool(KEY, jax.random.PRNGKey(1), wrong=(0, None, "0", jnp.zeros(2), jax.random.split(KEY)))


def numbers(shape, *wrong_shapes, optional=False):
    """An array of this shape: floats, or what the library converts to floats."""
    ones = np.ones(shape)
    right = [
        jnp.ones(shape),
        ones,
        ones.astype(int),
        ones.astype(np.uint8),
        ones > 0,
        ones.tolist(),
    ]
    wrong = [value for value in JUNK if value is not None or not optional]
    wrong += [ones * 1j, jax.random.split(KEY, 4), np.full(shape, "a"), *map(np.ones, wrong_shapes)]
    return Pool(tuple(right), tuple(wrong))


X = numbers((3, 4), (3, 5), (4, 3), (), (3, 1))
ANY_WIDTH = numbers((3, 4))
Z = numbers((3, 2), (3, 3), (2, 3), ())
CONTEXT = numbers((3, 3), (3, 2), (4, 3), (2, 3, 3), ())
EVENT = pool((4,), [4], np.array([4]), wrong=(4, "4", (2.5,), (-1,), None, {4}, ("a",), 4.0, (1j,)))
DEPTH = pool(
    2, np.int64(2), np.int8(2), wrong=(2.5, 2.0, "2", None, -1, [2], True, jnp.ones(()), 1j)
)
COUNT = pool(2, np.int64(2), wrong=(2.5, "2", None, -1, 0, [2], False, 1j, (2,)))
HIDDEN = pool((8,), [8], np.array([8]), wrong=(8, "8", (0,), (-1,), (8.5,), None, {8}, ("a",)))
WIDTHS = Pool(HIDDEN.right, (*HIDDEN.wrong, ()))
SAMPLES = pool((3,), [3], np.array([3]), wrong=(3, "3", (2.5,), (-1,), None, {3}, ("a",), 3.0))
SEED = pool(0, np.int64(0), wrong=(-1, 1.5, "0", None, (0,)))
TRANSFORMER = pool(flows.affine, flows.scaled(0.5), wrong=("affine", STACK, 3, flows.gate, None))
CONDITIONER = pool(
    flows.mlp((8,)), wrong=("mlp", 3, None, STACK, flows.made((8,)), flows.mlp((8,))(2, 2))
)
FLOW = pool(STACK, wrong=(NORMAL, "nvp", None, 3, flows.real_nvp, flows.affine))
DENSITY = pool(NORMAL, wrong=(STACK, "normal", None, 3, densities.standard_normal))
POSITIVE = pool(1.0, 1, np.float32(1), wrong=("1", None, 1j, [1.0], np.nan, 0, -1.0, True, np.inf))
OPTIONAL_WIDTH = pool(3, np.int64(3), wrong=(0, -1, 2.5, "3", (3,), 1j))
NUMBER = pool(0.0, 1, np.float32(1), wrong=("1", None, 1j, [1.0], np.nan, True))
POSITIVE_OR_0 = POSITIVE._replace(wrong=tuple(w for w in POSITIVE.wrong if w != 0))
MAPS = pool((2, 2, 1), [2, 2, 1], wrong=((4,), 4, "abc", (2, 2, 0), None))
EVENT_NDIMS = (-1, "1", 1.5, None)
NUM_DEVICES = (-1, 99, "1", None, 1.5)
RESAMPLED = densities.resampled((4,), hidden=(8,), num_attempts=3, num_draws=8)
OPTIMIZER = pool(optax.adam(1e-3), wrong=("adam", None, 3, optax.adam))
OBJECTIVE = pool(None, objectives.elbo(), wrong=("elbo", 3, objectives.elbo, NORMAL))
DATASET = data_sets.from_arrays(np.eye(30, 4))
LOG_WEIGHTS = pool(np.linspace(0, 1, 30), wrong=("a", None, np.ones((3, 30)), 1j, np.ones(30) * 1j))
FLOW_PARAMS = (None, (), "a", 3, {"a": 1}, [1, 2], {"bias": jnp.ones((2, 3))}, (jnp.ones(3),))


SUPPORTS = flows.sigmoid(), flows.softplus(), flows.exp(), flows.probit(), flows.simplex()
DATASETS = pool(DATASET, wrong=("digits", None, 3, np.eye(30, 4)))
FLAG = pool(True, False, wrong=("yes", 1, 0.5, None))
LATENT = pool((4, 4, 1), [4, 4, 1], wrong=((4,), 4, "441", (4, 4, 0), (3, 3, 1), None))
IMAGE = pool((8, 8), [8, 8], wrong=((4,), 8, "88", (8, 0), None, (8.5, 8)))
LIKELIHOOD = pool(None, likelihoods.bernoulli(), wrong=("bernoulli", 3, NORMAL))
ROWS = pool(
    *(np.eye(4).astype(dtype) for dtype in (float, bool, int, np.uint8)),
    wrong=("a", None, np.eye(4) * 1j, np.eye(4) * np.nan, -np.eye(4), np.ones(()), np.eye(4, 5)),
)


def numpyro_model():
    numpyro.sample("x", dist.Normal(numpyro.sample("s", dist.Gamma(2.0))), obs=1.0)


def methods(name, value, pools, *fields):
    """Targets for the functions of a value, with parameters for `params`."""
    return {f"{name}.{field}": Target(getattr(value, field), pools[field]) for field in fields}


def zeros(init, *args):
    """Parameters of the right shapes, without a compilation."""
    shapes = jax.eval_shape(init, *args)
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)


def of_flow(flow, x=X, context=None):
    right_context = None if context is None else context.right[0]
    params = zeros(flow.init, KEY, x.right[0], right_context)
    own = pool(params, wrong=() if not jax.tree.leaves(params) else FLOW_PARAMS)
    more = {} if context is None else {"context": context}
    entry = "y" if "y" in inspect.signature(flow.inverse).parameters else "x"
    pools = {"apply": {"params": own, "x": x, **more}, "inverse": {"params": own, entry: x, **more}}
    pools["init"] = {"key": KEYS, "x": x if own.wrong else ANY_WIDTH, **more}
    return methods(repr(flow), flow, pools, "init", "apply", "inverse")


def of_conditioner(name, make):
    network = make(2, 4)
    params = zeros(network.init, KEY, X.right[0], X.right[0])
    own = pool(params, wrong=FLOW_PARAMS)
    more = {"x": ANY_WIDTH if name == "mlp" else X, "context": X}
    pools = {"init": {"key": KEYS, **more}, "apply": {"params": own, **more}}
    return {
        **methods(f"{name}(...)(2, 4)", network, pools, *pools),
        f"{name}(...)": Target(
            make,
            {"num_params": COUNT, "size": pool(4, np.int64(4), wrong=("4", None, 4.0, (4,), 1j))},
        ),
    }


def of_density(density):
    params = zeros(density.init, KEY, X.right[0])
    own = pool(params, wrong=() if not jax.tree.leaves(params) else FLOW_PARAMS)
    pools = {
        "init": {"key": KEYS, "x": ANY_WIDTH},
        "log_prob": {"params": own, "x": X},
        "sample_and_log_prob": {"params": own, "key": KEYS, "sample_shape": SAMPLES},
    }
    return methods(repr(density), density, pools, *pools)


MODEL = LED(
    encoders.mlp_encoder(2, (8,), context_dim=3),
    flows.iaf((2,), 1, (8,), context_dim=3),
    densities.transformed(densities.standard_normal((2,)), flows.real_nvp((2,), 2, (8,))),
    decoders.mlp_decoder(4, (8,)),
)
ENCODER = networks.MLP((8, 4))


CONDITIONAL = LED(
    encoders.mlp_encoder(2, (8,)),
    flows.iaf((2,), 1, (8,)),
    densities.standard_normal((2,)),
    decoders.mlp_decoder(4, (8,)),
)
MODELS = pool(MODEL, wrong=("led", None, 3, flows.iaf))
LEDS = pool(MODEL, wrong=("led", None, 3, STACK, NORMAL))


@functools.cache
def targets():
    params = zeros(MODEL.init, KEY, X.right[0])
    wrong_params = (None, (), "a", 3, {"encoder": 1}, {"a": 1}, params["decoder"], [1, 2])
    own = pool(params, wrong=wrong_params)
    # Concrete data may not have values that the decoder does not take.
    data = X._replace(wrong=(*X.wrong, -np.ones((3, 4)), np.full((3, 4), 16)))
    rows = X._replace(wrong=tuple(x for x in X.wrong if np.shape(x) != (4, 3)))
    decoder = MODEL.decoder
    of_decoder = pool(params["decoder"], wrong=FLOW_PARAMS)
    of_encoder = pool(params["encoder"], wrong=FLOW_PARAMS)
    log_density = pool(lambda x: -jnp.square(x).sum(-1), wrong=("p", None, 3, NORMAL))
    encoding = MODEL.encoder.apply(params["encoder"], X.right[0])
    adversarial, right_params = objectives.adversarial(hidden=(8,)), params
    critic = pool(
        zeros(lambda key: adversarial.init(key, MODEL, params, X.right[0]), KEY), wrong=FLOW_PARAMS
    )
    raw = numbers((3, 2, 4), (3, 3, 4), (4,), (3, 2, 6), ())
    one_raw = numbers((3, 1, 4), (3, 2, 4), (4,), (3, 1, 6), ())
    found = {
        **of_flow(STACK),
        **of_flow(flows.real_nvp((4,), 2, (8,), context_dim=3), context=CONTEXT),
        **of_flow(flows.iaf((4,), 2, (8,), context_dim=3), context=CONTEXT),
        **of_flow(flows.planar((4,), 2)),
        **of_flow(flows.radial((4,), 2)),
        **of_flow(flows.lu((4,), context_dim=3), context=CONTEXT),
        **of_flow(flows.householder((4,), 2)),
        **of_flow(flows.triangular_sylvester((4,), 2)),
        **of_flow(flows.flatten(flows.actnorm(), (4,))),
        **of_flow(flows.permute(np.array([1, 0, 3, 2]))),
        **of_flow(flows.coupling(np.array([True, False, True, False]), flows.mlp((8,)))),
        **of_flow(flows.orthogonal_sylvester((4,), 2, 2)),
        **of_flow(flows.householder_sylvester((4,), 2, 2)),
        **{
            name: target
            for support in SUPPORTS
            for name, target in of_flow(support, ANY_WIDTH).items()
        },
        **of_flow(
            flows.on((0, 3), flows.planar((2,), 2)),
            X._replace(wrong=tuple(x for x in X.wrong if np.shape(x) != (3, 5))),
        ),
        **of_conditioner("mlp", flows.mlp((8,), context_dim=4)),
        **of_conditioner("made", flows.made((8,), context_dim=4)),
        **of_conditioner("convnet", flows.convnet((2, 2, 1), (3,), context_dim=4)),
        **of_conditioner("pixelcnn", flows.pixelcnn((2, 2, 1), (3,), context_dim=4)),
        **of_density(NORMAL),
        **of_density(densities.student_t((4,), 3.0)),
        **of_density(densities.product([densities.laplace((3,)), NORMAL_1], (3, 1))),
        **of_density(densities.standardised(NORMAL)),
        **of_density(RESAMPLED),
        **of_density(densities.uniform((4,))),
        **of_density(densities.mixture_of_normals((4,), 2)),
        **of_density(densities.transformed(NORMAL, STACK)),
        "real_nvp": Target(
            flows.real_nvp,
            {"event_shape": EVENT, "depth": DEPTH, "hidden": WIDTHS, "seed": SEED}
            | {"transformer": TRANSFORMER, "context_dim": OPTIONAL_WIDTH}
            | {"mask": pool("random", wrong=("half", 3, None, np.ones(4, bool)))}
            | {"conditioner": pool(flows.mlp, wrong=("mlp", None, 3, STACK, flows.mlp((8,))))},
        ),
        "iaf": Target(
            flows.iaf,
            {"event_shape": EVENT, "depth": DEPTH, "hidden": WIDTHS, "context_dim": OPTIONAL_WIDTH}
            | {"transformer": TRANSFORMER._replace(wrong=TRANSFORMER.wrong[:-1])}
            | {"conditioner": pool(flows.made, wrong=("made", None, 3, STACK))},
        ),
        "coupling": Target(
            flows.coupling,
            {"conditioner": CONDITIONER, "transformer": TRANSFORMER}
            | {"mask": pool(np.array([True, False]), [True, False], wrong=("ab", 3, None, [1, 0]))},
        ),
        "autoregressive": Target(
            flows.autoregressive,
            {"conditioner": pool(flows.made((8,)), wrong=("made", 3, None, STACK))}
            | {"transformer": TRANSFORMER},
        ),
        "made": Target(flows.made, {"hidden": WIDTHS, "context_dim": OPTIONAL_WIDTH}),
        "mlp": Target(
            flows.mlp,
            {"hidden": WIDTHS, "context_dim": OPTIONAL_WIDTH}
            | {"activation": pool(jax.nn.relu, wrong=("relu", 3, None))},
        ),
        "convnet": Target(
            flows.convnet,
            {"event_shape": MAPS} | {"hidden": WIDTHS},
        ),
        "pixelcnn": Target(
            flows.pixelcnn,
            {"event_shape": MAPS} | {"hidden": WIDTHS},
        ),
        "sigmoid": Target(flows.sigmoid, {"low": NUMBER, "high": NUMBER._replace(right=(2.0, 3))}),
        "softplus": Target(flows.softplus, {"low": NUMBER}),
        "on": Target(
            flows.on,
            {"columns": pool((0, 1), [0, 1], wrong=("ab", 3, None, (0.5,), (0, 0), (-1,)))}
            | {"flow": FLOW},
        ),
        "householder_sylvester": Target(
            flows.householder_sylvester,
            {"event_shape": EVENT, "depth": DEPTH, "num_reflections": COUNT},
        ),
        "orthogonal_sylvester": Target(
            flows.orthogonal_sylvester,
            {"event_shape": EVENT, "depth": DEPTH, "num_columns": COUNT},
        ),
        "random_half": Target(flows.random_half, {"event_shape": EVENT, "seed": SEED}),
        "checkerboard": Target(
            flows.checkerboard,
            {"event_shape": EVENT._replace(right=((2, 3),), wrong=(*EVENT.wrong, (4,)))},
        ),
        "channel": Target(flows.channel, {"event_shape": EVENT}),
        "chain": Target(flows.chain, {"flows": FLOW}),
        "invert": Target(flows.invert, {"flow": FLOW}),
        "flatten": Target(flows.flatten, {"flow": FLOW, "event_shape": EVENT}),
        "repeat": Target(
            flows.repeat, {"layer": FLOW._replace(wrong=FLOW.wrong[:-2]), "depth": DEPTH}
        ),
        "permute": Target(
            flows.permute, {"order": pool([1, 0], np.array([1, 0]), wrong=([1, 1], "ab", None, 3))}
        ),
        "actnorm": Target(flows.actnorm, {"event_ndims": pool(1, wrong=(-1, "1", 1.5, None))}),
        "planar": Target(flows.planar, {"event_shape": EVENT, "depth": DEPTH}),
        "lu": Target(flows.lu, {"event_shape": EVENT, "context_dim": OPTIONAL_WIDTH}),
        "householder": Target(flows.householder, {"event_shape": EVENT, "num_reflections": COUNT}),
        "triangular_sylvester": Target(
            flows.triangular_sylvester, {"event_shape": EVENT, "depth": DEPTH}
        ),
        "scaled": Target(flows.scaled, {"max_log_scale": POSITIVE}),
        "gate": Target(flows.gate, {"bias": pool(1.0, -1, wrong=("1", None, 1j, [1.0], True))}),
        "spline": Target(
            flows.spline,
            {"num_bins": COUNT, "bound": POSITIVE._replace(wrong=("1", 1j, [1.0], np.nan, 0, -1))},
        ),
        "sigmoid_mixture": Target(flows.sigmoid_mixture, {"num_units": COUNT}),
        **{
            f"{name}.{field}": Target(getattr(transformer, field), {"raw": raw, "x": X_OF_RAW})
            for name, transformer in [("affine", flows.affine), ("gated", flows.gated)]
            for field in ("apply",)
        },
        "additive.apply": Target(flows.additive.apply, {"raw": one_raw, "x": X_OF_RAW}),
        "standard_normal": Target(densities.standard_normal, {"event_shape": EVENT}),
        "mixture_of_normals": Target(
            densities.mixture_of_normals, {"event_shape": EVENT, "num_components": COUNT}
        ),
        "student_t": Target(densities.student_t, {"event_shape": EVENT, "df": POSITIVE}),
        "laplace": Target(densities.laplace, {"event_shape": EVENT}),
        "logistic": Target(densities.logistic, {"event_shape": EVENT}),
        "product": Target(
            densities.product,
            {"parts": pool((NORMAL, NORMAL), wrong=(NORMAL, "ab", None, (STACK, NORMAL)))}
            | {"sizes": pool((4, 4), [4, 4], wrong=(4, "44", None, (4,), (4, -1), (4, 0.5)))},
        ),
        "standardised": Target(
            densities.standardised, {"density": DENSITY, "event_ndims": pool(1, wrong=EVENT_NDIMS)}
        ),
        "resampled": Target(
            densities.resampled,
            {"event_shape": EVENT, "hidden": WIDTHS, "num_attempts": COUNT, "num_draws": COUNT}
            | {"base": pool(NORMAL, None, wrong=(STACK, "normal", 3))},
        ),
        "acceptance_rate": Target(
            densities.acceptance_rate,
            {"density": pool(RESAMPLED, wrong=(STACK, "normal", None, 3, NORMAL))}
            | {"params": pool(zeros(RESAMPLED.init, KEY, X.right[0]), wrong=FLOW_PARAMS)}
            | {"key": KEYS, "num_draws": COUNT},
        ),
        "transformed": Target(densities.transformed, {"base": DENSITY, "flow": FLOW}),
        "gaussian": Target(likelihoods.gaussian, {"std": POSITIVE}),
        "discretized_logistic": Target(likelihoods.discretized_logistic, {"num_components": COUNT}),
        "categorical": Target(likelihoods.categorical, {"num_categories": COUNT}),
        "learned_gaussian": Target(
            likelihoods.learned_gaussian, {"scale": pool("one", wrong=("1", None, 3, ("one",)))}
        ),
        "learned_gaussian.log_prob": Target(
            likelihoods.learned_gaussian("entry").log_prob, {"raw": raw, "x": X_OF_RAW}
        ),
        "of_flow": Target(posteriors.of_flow, {"flow": FLOW}),
        "auxiliary": Target(
            posteriors.auxiliary,
            {"event_shape": EVENT, "num_auxiliary": COUNT, "flow": FLOW, "reverse": DENSITY},
        ),
        "mmd": Target(
            objectives.mmd,
            {"weight": POSITIVE_OR_0, "kl_weight": POSITIVE_OR_0} | {"bandwidth": POSITIVE},
        ),
        "adversarial": Target(
            objectives.adversarial,
            {"weight": POSITIVE_OR_0, "kl_weight": POSITIVE_OR_0, "hidden": WIDTHS},
        ),
        **{
            f"{objective}.loss": Target(
                functools.partial(objective.loss, MODEL, params, ()),
                {"key": KEYS, "x": X, "step": pool(0)},
            )
            for objective in (
                objectives.iwae(2),
                objectives.dreg(2),
                objectives.stl(),
                objectives.prior_only(),
                objectives.mmd(),
            )
        },
        "scheduled": Target(
            optimizers.scheduled,
            {"make": pool(optax.adam, wrong=("adam", None, 3)), "learning_rate": POSITIVE}
            | {"num_steps": COUNT, "warmup_steps": pool(1, 0, wrong=("1", None, -1, 1.5))},
        ),
        "averaged": Target(
            optimizers.averaged,
            {"optimizer": OPTIMIZER}
            | {"decay": pool(0.5, wrong=("1", None, 1j, [0.5], -0.5, 1.0, np.nan))},
        ),
        "bernoulli.log_prob": Target(
            likelihoods.bernoulli().log_prob, {"raw": one_raw, "x": X_OF_RAW}
        ),
        "gaussian.log_prob": Target(
            likelihoods.gaussian(1.0).log_prob, {"raw": one_raw, "x": X_OF_RAW}
        ),
        "mlp_decoder": Target(
            decoders.mlp_decoder,
            {"x_dim": COUNT, "hidden": HIDDEN}
            | {"likelihood": pool(likelihoods.bernoulli(), wrong=("bernoulli", 3, decoder))},
        ),
        "decoder": Target(
            decoders.decoder,
            {"likelihood": pool(likelihoods.bernoulli(), wrong=(None, "a", 3, decoder))}
            | {"network": pool(ENCODER, wrong=(None, "mlp", 3, decoder, networks.MLP))},
        ),
        "decoder.log_prob": Target(decoder.log_prob, {"params": of_decoder, "z": Z, "x": X}),
        "decoder.mean": Target(decoder.mean, {"params": of_decoder, "z": Z}),
        "decoder.sample": Target(decoder.sample, {"params": of_decoder, "key": KEYS, "z": Z}),
        "mlp_encoder": Target(encoders.mlp_encoder, {"latent_dim": COUNT, "hidden": HIDDEN}),
        "gaussian_encoder": Target(
            encoders.gaussian_encoder,
            {
                "module": pool(ENCODER, wrong=("mlp", None, 3, networks.MLP, STACK)),
                "latent_dim": COUNT,
            },
        ),
        "encoder.apply": Target(MODEL.encoder.apply, {"params": of_encoder, "x": rows}),
        "vamp": Target(priors.vamp, {"num_components": COUNT}),
        "data_subset": Target(priors.data_subset, {"num_components": COUNT}),
        "lift": Target(priors.lift, {"density": DENSITY}),
        "elbo": Target(
            objectives.elbo,
            {"kl_weight": pool(1.0, 1, wrong=("1", None, 1j, [1.0]))}
            | {"free_bits": pool(1.0, 0, wrong=("1", None, 1j, -1.0, np.nan))},
        ),
        "iwae": Target(objectives.iwae, {"num_samples": COUNT}),
        "dreg": Target(objectives.dreg, {"num_samples": COUNT}),
        "elbo.loss": Target(
            functools.partial(objectives.elbo().loss, MODEL, params, ()),
            {"key": KEYS, "x": X, "step": pool(0)},
        ),
        "LED": Target(
            LED,
            {"encoder": pool(MODEL.encoder, wrong=(ENCODER, "mlp", None, decoder, STACK))}
            | {"posterior": pool(MODEL.posterior, wrong=(NORMAL, "iaf", None, flows.iaf))}
            | {"prior": pool(MODEL.prior, priors.vamp(2), wrong=(STACK, "nvp", None, flows.iaf))}
            | {"decoder": pool(decoder, wrong=(ENCODER, "mlp", None, likelihoods.bernoulli()))},
        ),
        "LED.init": Target(MODEL.init, {"key": KEYS, "x": ANY_WIDTH}),
        "LED.elbo": Target(
            MODEL.elbo, {"params": own, "key": KEYS, "x": X, "sample_shape": SAMPLES}
        ),
        "LED.encode": Target(MODEL.encode, {"params": own, "key": KEYS, "x": rows}),
        "LED.decode": Target(MODEL.decode, {"params": own, "z": Z}),
        "LED.reconstruct": Target(MODEL.reconstruct, {"params": own, "key": KEYS, "x": rows}),
        "LED.sample": Target(MODEL.sample, {"params": own, "key": KEYS, "sample_shape": SAMPLES}),
        "LED.log_weight": Target(MODEL.log_weight, {"params": own, "z": Z, "x": X}),
        "importance_weighted_bound": Target(
            estimators.importance_weighted_bound,
            {"params": own, "key": KEYS, "x": X, "num_samples": COUNT} | {"led": LEDS},
        ),
        "nll": Target(
            estimators.nll,
            {"led": LEDS, "params": own}
            | {"key": KEYS, "x": data, "num_samples": COUNT, "batch_size": COUNT},
            traced=False,
        ),
        "marginal_matching": Target(
            estimators.marginal_matching,
            {"led": LEDS, "params": own} | {"key": KEYS, "x": data, "num_samples": COUNT},
            traced=False,
        ),
        "activity": Target(
            estimators.activity,
            {"led": LEDS, "params": own, "key": KEYS, "x": rows, "num_samples": COUNT},
        ),
        "encode_all": Target(
            estimators.encode_all, {"led": LEDS, "params": own, "x": rows, "batch_size": COUNT}
        ),
        "aggregated_posterior_log_prob": Target(
            estimators.aggregated_posterior_log_prob,
            {
                "led": LEDS,
                "params": own,
                "z": Z,
                "encoding": pool(encoding, wrong=("a", None, 3, STACK)),
            },
        ),
        "log_weights": Target(
            variational.log_weights,
            {"density": DENSITY, "params": pool(()), "key": KEYS, "log_density": log_density}
            | {"num_samples": COUNT},
        ),
        "evidence_from": Target(variational.evidence_from, {"log_weights": LOG_WEIGHTS}, False),
        "pareto_k": Target(variational.pareto_k, {"log_weights": LOG_WEIGHTS}, False),
        "resample": Target(
            variational.resample,
            {"density": DENSITY, "params": pool(()), "key": KEYS, "log_density": log_density}
            | {"num_samples": COUNT, "num_proposals": pool(30, wrong=(0, -1, "30", None, 30.5))},
        ),
        "from_arrays": Target(
            data_sets.from_arrays,
            {
                "train": pool(
                    np.eye(30, 4), wrong=("a", 3, np.ones((9, 4)) * 1j, np.ones(9) * np.nan)
                )
            }
            | {"split": pool(None, (0.8, 0.1, 0.1), wrong=("a", 3, (1,), (0.5, 0.5, -1.0)))}
            | {"seed": SEED, "values": pool("unit", wrong=("units", 3, None))},
        ),
        "load": Target(
            data_sets.load,
            {"name": pool("digits", wrong=(3, None)), "seed": SEED}
            | {"binarize": pool("static", "dynamic", wrong=("often", 3, None))}
            | {"data_dir": pool(None, wrong=(3, 1j))},
        ),
        "make_mesh": Target(sharding.make_mesh, {"num_devices": pool(0, 1, wrong=NUM_DEVICES)}),
        "init_state": Target(
            lambda **arguments: training.init_state(**arguments) and None,
            {"model": MODELS, "optimizer": OPTIMIZER, "key": KEYS, "x": ANY_WIDTH}
            | {"objective": OBJECTIVE},
            traced=False,
        ),
        "epochs": Target(
            lambda **arguments: next(training.epochs(**arguments)) and None,
            {"model": MODELS, "optimizer": OPTIMIZER, "key": KEYS, "objective": OBJECTIVE}
            | {"dataset": DATASETS}
            | {"batch_size": COUNT, "valid_every": COUNT, "num_epochs": OPTIONAL_WIDTH}
            | {"patience": OPTIONAL_WIDTH, "method": pool("jit", wrong=("jot", 3, None))}
            | {"max_skipped": pool(0, wrong=(-1, "1", None, 1.5))},
            traced=False,
        ),
        "to_numpyro": Target(
            interop.to_numpyro, {"density": DENSITY, "params": pool((), wrong=("a", 3j))}
        ),
        "flow_to_numpyro": Target(
            interop.flow_to_numpyro,
            {"flow": FLOW, "params": pool(zeros(STACK.init, KEY, X.right[0]), wrong=("a", 3j))},
        ),
        "to_samples": Target(
            variational.to_samples,
            {"density": DENSITY, "params": pool(()), "key": KEYS, "samples": X}
            | {"num_steps": COUNT, "batch_size": COUNT, "learning_rate": POSITIVE},
            traced=False,
        ),
        "to_log_density": Target(
            variational.to_log_density,
            {"density": DENSITY, "params": pool(()), "key": KEYS, "log_density": log_density}
            | {"num_steps": COUNT, "batch_size": COUNT, "learning_rate": POSITIVE},
            traced=False,
        ),
        "evidence": Target(
            variational.evidence,
            {"density": DENSITY, "params": pool(()), "key": KEYS, "log_density": log_density}
            | {"num_samples": pool(30, wrong=(24, -1, "30", None, 30.5, (30,)))},
            traced=False,
        ),
        "spatial_encoder": Target(
            encoders.spatial_encoder,
            {"image_shape": IMAGE, "latent_shape": LATENT, "features": WIDTHS}
            | {"context_maps": OPTIONAL_WIDTH, "weight_norm": FLAG},
        ),
        "spatial_decoder": Target(
            decoders.spatial_decoder,
            {"image_shape": IMAGE, "latent_shape": LATENT, "features": WIDTHS, "weight_norm": FLAG}
            | {"likelihood": LIKELIHOOD},
        ),
        "resconv_encoder": Target(
            encoders.resconv_encoder,
            {"image_shape": IMAGE, "latent_dim": COUNT, "features": HIDDEN, "hidden": COUNT}
            | {"context_dim": OPTIONAL_WIDTH, "weight_norm": FLAG},
        ),
        "resconv_decoder": Target(
            decoders.resconv_decoder,
            {"image_shape": IMAGE, "features": HIDDEN, "hidden": COUNT, "weight_norm": FLAG}
            | {"likelihood": LIKELIHOOD},
        ),
        "density_decoder": Target(
            decoders.density_decoder,
            {"density": DENSITY, "event_shape": EVENT, "mean_samples": COUNT}
            | {"network": pool(ENCODER, wrong=(None, "mlp", 3, decoder, networks.MLP))},
        ),
        "adversarial.loss": Target(
            lambda params, **batch: adversarial.loss(MODEL, right_params, params, **batch),
            {"params": critic, "key": KEYS, "x": X, "step": pool(0)},
        ),
        "maximum_likelihood.loss": Target(
            functools.partial(objectives.maximum_likelihood().loss, NORMAL, (), ()),
            {"key": KEYS, "x": X, "step": pool(0)},
        ),
        "train_step": Target(
            functools.partial(training.train_step, x=X.right[0], step=0),
            {"model": MODELS, "optimizer": OPTIMIZER, "key": KEYS}
            | {"objective": OBJECTIVE._replace(right=OBJECTIVE.right[1:])}
            | {"trained": pool((params, ()), wrong=(None, params, "a", (params,)))}
            | {"opt_state": pool(optax.adam(1e-3).init((params, ())))},
        ),
        "begin": Target(
            lambda **arguments: training.begin(**arguments) and None,
            {"model": MODELS, "optimizer": OPTIMIZER, "key": KEYS, "objective": OBJECTIVE}
            | {"dataset": DATASETS},
            traced=False,
        ),
        "fit": Target(
            lambda **arguments: training.fit(**arguments) and None,
            {"model": MODELS, "optimizer": OPTIMIZER, "key": KEYS, "objective": OBJECTIVE}
            | {"dataset": DATASETS, "num_epochs": pool(1, wrong=(0, -1, "1", None, 1.5))}
            | {"batch_size": pool(10, wrong=(0, -1, "10", None, 2.5, 10**9))}
            | {"callback": pool(lambda progress: None, wrong=("print", 3, None))},
            traced=False,
        ),
        "class_log_posterior": Target(
            estimators.class_log_posterior,
            {"led": pool(CONDITIONAL, wrong=("led", None, 3, STACK, NORMAL)), "key": KEYS}
            | {"params": pool(zeros(CONDITIONAL.init, KEY, X.right[0], CONTEXT.right[0]))}
            | {
                "x": data,
                "classes": pool(np.eye(3), wrong=("a", None, 3, np.eye(3) * 1j)),
            }
            | {"class_probs": pool(None, np.ones(3) / 3, wrong=("a", 3, np.zeros(3), np.ones(2)))}
            | {"num_samples": COUNT},
            traced=False,
        ),
        "check_rows": Target(
            data_sets.check_rows,
            {"what": pool("array"), "array": ROWS._replace(wrong=ROWS.wrong[:-1])}
            | {"values": pool("unit", "levels", "below 3", wrong=("units", 3, None, "below", 1j))},
            traced=False,
        ),
        "from_numpyro": Target(
            lambda **arguments: interop.from_numpyro(**arguments).size,
            {"key": KEYS, "model": pool(numpyro_model, wrong=("a", 3, None))},
            traced=False,
        ),
        "average_of": Target(
            optimizers.average_of,
            {"opt_state": pool((), None), "params": pool(params, wrong=("a", 3j))},
        ),
        "make": Target(
            lambda **arguments: descriptions.make("real_nvp", **arguments),
            {"event_shape": EVENT, "depth": DEPTH},
        ),
        "from_json": Target(
            lambda model: descriptions.from_json(model),
            {
                "model": pool(
                    descriptions.to_json(STACK),
                    wrong=({"make": "os.system"}, {"make": 3}, {"a": 1}),
                )
            },
        ),
        "to_json": Target(
            lambda model: descriptions.to_json(model),
            {"model": pool(STACK, wrong=(object(), {1: 2}, lambda x: x))},
        ),
    }
    return found


# x broadcasts against raw: a last axis of one is right.
X_OF_RAW = X._replace(wrong=tuple(x for x in X.wrong if np.shape(x) not in ((), (3, 1))))


def call(target, arguments):
    """Shapes and dtypes of the arrays in the result; a constructor's value has none."""
    arguments = dict(arguments)
    several = [arguments.pop("flows")] if "flows" in arguments else []
    results = []

    def run():
        results.append(target.function(*several, **arguments))
        leaves = jax.tree.leaves(results)
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    if not target.traced:
        return run()
    return [(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(run)]


@functools.cache
def expected_of(name):
    target = targets()[name]
    return call(target, {argument: p.right[0] for argument, p in target.pools.items()})


@pytest.fixture
def whole_tracebacks():
    """Shows JAX's own frames in tracebacks, one of which may be the one that raises."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def assert_refused_by_us(error, wrong, what):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert type(error) in (ValueError, TypeError), f"{what}: {error!r}"
    assert HOME in Path(frame.filename).parents, f"{what}: raised at {frame}: {error!r}"
    words = set(re.findall(r"\w+", str(error).replace("parameters", "params")))
    assert words & set(wrong), f"{what}: {error!r} names none of {set(wrong)}"


@given(data=st.data())
@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_right_results_or_an_error_that_names_the_argument(whole_tracebacks, data):
    table = targets()
    name = data.draw(st.sampled_from(sorted(table)))
    target = table[name]
    refusable = sorted(argument for argument, p in target.pools.items() if p.wrong)
    fewest = 0 if target.traced else 1
    wrong = data.draw(st.sets(st.sampled_from(refusable), min_size=fewest, max_size=2))
    arguments = {
        argument: data.draw(st.sampled_from(p.wrong if argument in wrong else p.right))
        for argument, p in target.pools.items()
    }
    what = f"{name}({', '.join(f'{k}={arguments[k]!r}' for k in wrong or arguments)})"
    try:
        found = call(target, arguments)
    except Exception as error:
        assert wrong, f"{what}: {error!r}"
        assert_refused_by_us(error, wrong, what)
    else:
        assert not wrong, f"{what} went through"
        assert found == expected_of(name), what
