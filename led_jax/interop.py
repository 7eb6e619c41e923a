"""Densities and flows in numpyro models, and numpyro models as log-densities.

Needs numpyro, which the extra `interop` installs; nothing else in led_jax imports it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints, transforms
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy, unconstrain_fn

from led_jax.checks import checked
from led_jax.densities import Density
from led_jax.flows.base import Flow

Params = Any


@checked
def to_numpyro(
    density: Density,
    params: Params,
    context: Array | None = None,
    support: constraints.Constraint | None = None,
) -> dist.Distribution:
    """A density as a numpyro distribution, for `numpyro.sample` in any model.

    For example, a density that was trained on data can be a prior in MCMC. The parameters are
    leaves of the distribution's pytree, so that gradients reach them.

    >>> from led_jax import densities
    >>> prior = to_numpyro(densities.standard_normal((3,)), ())
    >>> prior.batch_shape, prior.event_shape
    ((), (3,))

    Args:
      density: any density.
      params: its parameters.
      context: `[..., context_dim]` of a conditional density; `...` is the distribution's batch
        shape, which is `()` without a context.
      support: where the density is positive; numpyro constrains MCMC to it. None takes all
        real events.
    """
    return _Distribution(density, params, context, support)


@checked
def flow_to_numpyro(
    flow: Flow, params: Params, codomain: constraints.Constraint | None = None
) -> transforms.Transform:
    """A flow on vectors as a numpyro transform, for `dist.TransformedDistribution`.

    >>> from led_jax import flows
    >>> scale = flow_to_numpyro(flows.exp(), (), constraints.independent(constraints.positive, 1))
    >>> base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    >>> dist.TransformedDistribution(base, scale).log_prob(jnp.ones(2)).shape
    ()

    Args:
      flow: maps the transform's domain, real vectors, to its codomain.
      params: its parameters.
      codomain: the values of the transform; None takes real vectors.
    """
    return _Transform(flow, params, codomain or constraints.real_vector)


class Posterior(NamedTuple):
    """A numpyro model given its data, as an unnormalised density on R^D.

    Attributes:
      size: D, the number of unconstrained entries of all latent variables.
      log_density: maps `[..., D]` to `[...]`, the log joint density of data and latent variables
        plus the log-determinants of the maps to their supports: its exponential integrates to the
        evidence.
      constrain: maps `[..., D]` to the sites by name, `[..., *site_shape]`, including deterministic
        sites.
      unconstrain: maps latent sites by name, as `MCMC.get_samples()` returns them, to `[..., D]`;
        other names are ignored.
    """

    size: int
    log_density: Callable[[Array], Array]
    constrain: Callable[[Array], dict[str, Array]]
    unconstrain: Callable[[Mapping[str, Array]], Array]


@checked
def from_numpyro(key: Array, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Posterior:
    """The posterior of a numpyro model, for `variational.to_log_density` and `evidence`.

    >>> import numpyro
    >>> def model(x): numpyro.sample("x", dist.Normal(numpyro.sample("s", dist.Gamma(2.0))), obs=x)
    >>> posterior = from_numpyro(jax.random.key(0), model, 1.5)
    >>> posterior.size, posterior.log_density(jnp.zeros((5, 1))).shape
    (1, (5,))

    Args:
      key: PRNG key of what the model draws besides its latent variables, by `numpyro.prng_key` or
        as initial values of `numpyro.param`, which stay what they are.
      model: a numpyro model whose latent variables are all continuous. It is traced here, not run:
        data for which its density is not finite are not noticed before the fit.
      *args: the model's arguments, including the data.
      **kwargs: the model's keyword arguments.

    Raises:
      ValueError: if the model has no latent variables or a discrete one, or a plate subsamples.
    """
    seeded = seed(model, key)

    def first_values(key: Array) -> dict[str, Array]:
        _check_sites(trace(substitute(seeded, substitute_fn=init_to_uniform())), args, kwargs)
        info = initialize_model(
            key, model, model_args=args, model_kwargs=kwargs, validate_grad=False
        )
        return info.param_info.z

    # Only shapes are computed: running the model would compile a program for each operation.
    latent_sites = jax.eval_shape(first_values, key)
    start, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, latent_sites))

    def over_batch(function: Callable[[Any], Any], x: Any, num_axes: int) -> Any:
        for _ in range(num_axes):
            function = jax.vmap(function)
        return function(x)

    # Compiled, because then only what the sites need of the model is computed.
    @jax.jit
    def constrain(x: Array) -> dict[str, Array]:
        def sites(x: Array) -> dict[str, Array]:
            return constrain_fn(seeded, args, kwargs, unravel(x), return_deterministic=True)

        return over_batch(sites, x, x.ndim - 1)

    def log_density(x: Array) -> Array:
        return over_batch(
            lambda x: -potential_energy(seeded, args, kwargs, unravel(x)), x, x.ndim - 1
        )

    site_shapes = {name: site.shape for name, site in jax.eval_shape(constrain, start).items()}

    @partial(jax.jit, static_argnums=1)
    def to_entries(latent: dict[str, Array], num_axes: int) -> Array:
        def entries(latent: dict[str, Array]) -> Array:
            return ravel_pytree(unconstrain_fn(seeded, args, kwargs, latent))[0]

        return over_batch(entries, latent, num_axes)

    def unconstrain(sites: Mapping[str, Array]) -> Array:
        latent = {name: jnp.asarray(sites[name]) for name in latent_sites if name in sites}
        batch_shapes = {
            site.shape[: site.ndim - len(site_shapes[name])] for name, site in latent.items()
        }
        expected = {name: (*batch, *site_shapes[name]) for batch in batch_shapes for name in latent}
        shapes = {name: site.shape for name, site in latent.items()}
        if len(batch_shapes) != 1 or shapes != expected or latent.keys() != latent_sites.keys():
            latent_shapes = {name: site_shapes[name] for name in latent_sites}
            raise ValueError(
                f"unconstrain: expected sites of the shapes {latent_shapes} after one batch shape, "
                f"got {shapes}"
            )

        return to_entries(latent, len(batch_shapes.pop()))

    return Posterior(
        size=start.size,
        log_density=log_density,
        constrain=constrain,
        unconstrain=unconstrain,
    )


def _check_sites(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises a ValueError unless a traced model has latent variables, all of them continuous."""
    sites = model.get_trace(*args, **kwargs)
    latent = {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    if not latent:
        raise ValueError("from_numpyro: expected a model with latent variables, got none")
    for name, site in latent.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"from_numpyro: expected continuous latent variables, and {name!r} is discrete: "
                "sum it out, for example by dist.MixtureSameFamily"
            )
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
            size, part = site["args"][:2]
            raise ValueError(
                f"from_numpyro: the plate {name!r} takes {part} of {size} rows at random, so that "
                "the density would be another at every call; expected one without subsample_size"
            )


class _Distribution(dist.Distribution):
    pytree_data_fields = ("params", "context")
    pytree_aux_fields = ("density", "_support")

    def __init__(
        self,
        density: Density,
        params: Params,
        context: Array | None,
        support: constraints.Constraint | None,
    ):
        self.density, self.params, self.context = density, params, context
        x, log_prob = jax.eval_shape(self._draw, jax.eval_shape(jax.random.key, 0))
        event_shape = x.shape[log_prob.ndim :]
        self._support = support or constraints.independent(constraints.real, len(event_shape))
        super().__init__(log_prob.shape, event_shape)

    def _draw(self, key: Array, sample_shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
        return self.density.sample_and_log_prob(self.params, key, sample_shape, self.context)

    @property
    def support(self) -> constraints.Constraint | None:
        return self._support

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return self._draw(key, sample_shape)[0]

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        return self.density.log_prob(self.params, value, self.context)


class _Transform(transforms.Transform):
    def __init__(self, flow: Flow, params: Params, codomain: constraints.Constraint):
        self.flow, self.params, self._codomain = flow, params, codomain

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint:
        return self._codomain

    def __call__(self, x: Array) -> Array:
        return self.flow.apply(self.params, x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.flow.inverse(self.params, y)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        return self.flow.apply(self.params, x)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        return self.flow.apply(self.params, x)[1] if intermediates is None else intermediates

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return jax.eval_shape(self, jax.ShapeDtypeStruct(shape, float)).shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return jax.eval_shape(self._inverse, jax.ShapeDtypeStruct(shape, float)).shape

    def tree_flatten(self) -> Any:
        names = "flow", "_codomain"
        return (self.params,), (("params",), {name: getattr(self, name) for name in names})
