"""One table of all public flow constructors, which every property test runs through."""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from led_jax import flows
from support import gated_iaf, normal, random_params

CONTEXT_DIM = 3
HIDDEN = (8,)


class Case(NamedTuple):
    """A flow, and the events it acts on."""

    name: str
    make: Callable[[], flows.Flow]
    event_shape: tuple[int, ...]
    conditional: bool = False
    noise: float = 0.3  # Scale of the parameters; less for deep stacks, which turn singular.
    in_unit_cube: bool = False  # Whether test points are in (0, 1)^D, within the image.


def smooth_mlp(**kwargs):
    return flows.mlp(HIDDEN, activation=jnp.tanh, **kwargs)


def smooth_made(hidden=(8, 7), **kwargs):
    return flows.made(hidden, activation=jnp.tanh, **kwargs)


CONTEXT = {"context_dim": CONTEXT_DIM}
PAIR_MASK = np.array([False, True])
ODD_MASK = np.array([True, False, False, True, False])
ORDERS = np.random.default_rng(0).permuted(np.tile(np.arange(3), (20, 1)), axis=1).astype(np.int32)

# The lambdas name every constructor they use: a test reads the names off their code.
CASES = [
    Case("identity-1", lambda: flows.chain(), (1,)),
    Case("identity-image", lambda: flows.chain(event_ndims=3), (2, 1, 3)),
    Case("actnorm-1", lambda: flows.actnorm(), (1,)),
    Case("actnorm-5", lambda: flows.actnorm(), (5,)),
    Case("actnorm-image", lambda: flows.actnorm(event_ndims=3), (2, 1, 3)),
    Case("permute-1", lambda: flows.permute(np.array([0])), (1,)),
    Case("permute-5", lambda: flows.permute(np.array([3, 0, 4, 2, 1])), (5,)),
    Case("reverse-1", lambda: flows.reverse(), (1,)),
    Case("reverse-2", lambda: flows.reverse(), (2,)),
    Case("probit", lambda: flows.probit(), (3,), in_unit_cube=True),
    Case("sigmoid", lambda: flows.sigmoid(-0.5, 1.5), (3,), in_unit_cube=True),
    Case("softplus", lambda: flows.softplus(-0.5), (3,), in_unit_cube=True),
    Case("exp", lambda: flows.exp(), (3,), in_unit_cube=True),
    # Followed by its inverse, as the other cases keep the number of entries.
    Case("simplex", lambda: flows.chain(flows.simplex(), flows.invert(flows.simplex())), (3,)),
    Case("on", lambda: flows.on((3, 1, 0), flows.real_nvp((3,), 2, hidden=HIDDEN)), (5,)),
    Case("flatten", lambda: flows.flatten(flows.permute(ODD_MASK.argsort()), (5, 1)), (5, 1)),
    Case(
        "coupling-additive-2",
        lambda: flows.coupling(PAIR_MASK, smooth_mlp(), flows.additive),
        (2,),
    ),
    Case("coupling-affine-2", lambda: flows.coupling(PAIR_MASK, smooth_mlp()), (2,)),
    Case(
        "coupling-affine-5",
        lambda: flows.coupling(ODD_MASK, smooth_mlp(**CONTEXT), flows.affine),
        (5,),
        True,
    ),
    Case(
        "coupling-gated-checkerboard",
        lambda: flows.coupling(flows.checkerboard((3, 2, 1)), smooth_mlp(), flows.gated),
        (3, 2, 1),
    ),
    Case(
        "coupling-random_half",
        lambda: flows.coupling(flows.random_half((5,), 3), smooth_mlp(), flows.affine),
        (5,),
    ),
    Case(
        "coupling-channel",
        lambda: flows.coupling(flows.channel((1, 2, 3)), smooth_mlp(), flows.gate(0.3)),
        (1, 2, 3),
    ),
    Case(
        "coupling-rational_quadratic",
        lambda: flows.coupling(ODD_MASK, smooth_mlp(**CONTEXT), flows.rational_quadratic),
        (5,),
        True,
    ),
    Case(
        "coupling-sigmoids",
        lambda: flows.coupling(PAIR_MASK, smooth_mlp(), flows.deep_sigmoid),
        (2,),
    ),
    Case("real_nvp-0", lambda: flows.real_nvp((3,), 0), (3,)),
    Case("real_nvp-2", lambda: flows.real_nvp((2,), 3, hidden=HIDDEN), (2,)),
    Case("real_nvp-5", lambda: flows.real_nvp((5,), 4, hidden=(6, 7), **CONTEXT), (5,), True),
    Case(
        "real_nvp-nice",
        lambda: flows.real_nvp((4,), 2, hidden=HIDDEN, transformer=flows.additive),
        (4,),
    ),
    Case(
        "real_nvp-mixing",
        lambda: flows.real_nvp(
            (5,), 2, hidden=HIDDEN, mixing=flows.householder((5,), 2, **CONTEXT), **CONTEXT
        ),
        (5,),
        True,
    ),
    Case(
        "real_nvp-mixing-map",
        lambda: flows.real_nvp(
            (2, 1, 3),
            2,
            hidden=(3,),
            mask="channel",
            conditioner=partial(flows.convnet, (2, 1, 3)),
            mixing=flows.lu((6,)),
        ),
        (2, 1, 3),
        noise=0.2,
    ),
    Case(
        "real_nvp-checkerboard",
        lambda: flows.real_nvp((2, 3, 1), 3, hidden=HIDDEN, mask="checkerboard", **CONTEXT),
        (2, 3, 1),
        True,
    ),
    Case(
        "real_nvp-channel",
        lambda: flows.real_nvp((1, 2, 2), 2, hidden=HIDDEN, mask="channel"),
        (1, 2, 2),
    ),
    Case(
        "real_nvp-deep",
        lambda: flows.real_nvp((3,), 18, hidden=HIDDEN, transformer=flows.scaled(0.5), **CONTEXT),
        (3,),
        True,
        noise=0.2,
    ),
    Case(
        "real_nvp-convnet-checkerboard",
        lambda: flows.real_nvp(
            (3, 1, 1),
            2,
            hidden=(4,),
            mask="checkerboard",
            conditioner=partial(flows.convnet, (3, 1, 1)),
            **CONTEXT,
        ),
        (3, 1, 1),
        True,
    ),
    Case(
        "real_nvp-convnet-channel-deep",
        lambda: flows.real_nvp(
            (2, 1, 3),
            18,
            hidden=(3,),
            mask="channel",
            conditioner=partial(flows.convnet, (2, 1, 3)),
        ),
        (2, 1, 3),
        noise=0.1,
    ),
    Case("autoregressive-1", lambda: flows.autoregressive(smooth_made(**CONTEXT)), (1,), True),
    Case("autoregressive-2", lambda: flows.autoregressive(smooth_made(), flows.gated), (2,)),
    Case(
        "autoregressive-additive",
        lambda: flows.autoregressive(smooth_made(**CONTEXT), flows.additive),
        (3,),
        True,
    ),
    Case(
        "autoregressive-affine-5",
        lambda: flows.autoregressive(flows.made((4, 9)), flows.affine),
        (5,),
    ),
    Case(
        "autoregressive-spline",
        lambda: flows.autoregressive(smooth_made(), flows.spline(2, bound=None)),
        (3,),
    ),
    Case("iaf-0", lambda: gated_iaf((2, 1), 0), (2, 1)),
    Case("iaf-1", lambda: gated_iaf((1,), 2, hidden=(5,)), (1,)),
    Case("iaf-1-context", lambda: gated_iaf((1,), 2, hidden=(5,), **CONTEXT), (1,), True),
    Case("iaf-2", lambda: gated_iaf((2,), 3, hidden=(5, 4)), (2,)),
    Case("iaf-image", lambda: gated_iaf((2, 1, 2), 2, hidden=(5,), **CONTEXT), (2, 1, 2), True),
    Case(
        "autoregressive-sigmoids",
        lambda: flows.autoregressive(smooth_made(**CONTEXT), flows.sigmoid_mixture(2)),
        (2,),
        True,
    ),
    Case("iaf-deep", lambda: gated_iaf((3,), 17, hidden=(5,)), (3,), noise=0.1),
    Case(
        "iaf-pixelcnn",
        lambda: flows.iaf(
            (1, 3, 2),
            2,
            hidden=(4,),
            transformer=flows.affine,
            conditioner=partial(flows.pixelcnn, (1, 3, 2)),
            **CONTEXT,
        ),
        (1, 3, 2),
        True,
    ),
    Case("maf-5", lambda: flows.invert(gated_iaf((5,), 2, hidden=(9,), **CONTEXT)), (5,), True),
    Case("lu-4", lambda: flows.lu((4,)), (4,)),
    Case("lu-image", lambda: flows.lu((2, 1, 2), **CONTEXT), (2, 1, 2), True),
    Case("householder", lambda: flows.householder((3,), 2, **CONTEXT), (3,), True),
    Case("planar-1", lambda: flows.planar((1,), 2), (1,)),
    Case("planar-5", lambda: flows.planar((5,), 3, **CONTEXT), (5,), True),
    Case("radial-1", lambda: flows.radial((1,), 2), (1,)),
    Case("radial-image", lambda: flows.radial((2, 1, 2), 3, **CONTEXT), (2, 1, 2), True),
    Case("sylvester-triangular", lambda: flows.triangular_sylvester((4,), 3), (4,)),
    Case(
        "sylvester-householder",
        lambda: flows.householder_sylvester((2, 2), 2, num_reflections=3, **CONTEXT),
        (2, 2),
        True,
    ),
    Case(
        "sylvester-orthogonal",
        lambda: flows.orthogonal_sylvester((5,), 2, num_columns=3, **CONTEXT),
        (5,),
        True,
    ),
    Case(
        "chain",
        lambda: flows.chain(
            flows.actnorm(),
            flows.autoregressive(smooth_made(**CONTEXT), flows.affine),
            flows.reverse(),
            flows.invert(flows.coupling(ODD_MASK, smooth_mlp(**CONTEXT))),
        ),
        (5,),
        True,
    ),
    Case(
        "repeat-3",
        lambda: flows.repeat(flows.autoregressive(smooth_made(**CONTEXT)), 3),
        (2,),
        True,
    ),
    Case(
        "repeat-constants",
        lambda: flows.repeat(
            lambda order: flows.chain(flows.permute(order), flows.actnorm()), 20, ORDERS
        ),
        (3,),
    ),
]


class Built(NamedTuple):
    """A case's flow, compiled, with random parameters and a batch to try them on."""

    flow: flows.Flow
    params: object
    x: np.ndarray
    context: np.ndarray | None
    jitted: flows.Flow


def build(case, batch_shape=(4,)):
    """Builds a case, once in a process for each dtype."""
    return _build(case, batch_shape, jnp.result_type(float))


@functools.cache
def _build(case, batch_shape, dtype):
    flow = case.make()
    x = np.asarray(normal((*batch_shape, *case.event_shape), seed=2))
    x = 1 / (1 + np.exp(-x)) if case.in_unit_cube else x
    context = np.asarray(normal((*batch_shape, CONTEXT_DIM), seed=3)) if case.conditional else None
    params = random_params(flow.init, x, context, scale=case.noise)
    return Built(flow, params, x, context, flows.Flow(*map(jax.jit, flow)))
