"""What is minimised: each objective is one value, with a loss and the terms to report."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor, describe
from led_jax.model import LED, Elbo
from led_jax.numerics import log_mean_exp

Params = Any
Schedule = Callable[[Array], Any]


class InitFn(Protocol):
    """Creates what an objective itself trains."""

    def __call__(self, key: Array, model: Any, params: Params, x: Array, /) -> Params:
        """`params`: the model's; `x`: rows of the data. `()` where there is nothing to train.

        With data that have contexts it is called with these `[n, C]` as a fifth argument.
        """
        ...


class LossFn(Protocol):
    """The loss of a batch."""

    def __call__(
        self, model: Any, params: Params, own: Params, key: Array, x: Array, step: Array, /
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the scalar loss, and means over the batch of what is worth reporting.

        With data that have contexts it is called with these `[n, C]` as a seventh argument.

        Args:
          model: a `LED`, or whatever the objective is for.
          params: the model's parameters.
          own: the objective's parameters, from its `init`.
          key: PRNG key of the step.
          x: the batch `[n, *x_shape]`.
          step: number of steps taken so far, an integer scalar.
        """
        ...


class Objective(NamedTuple):
    """What training minimises.

    The step differentiates the loss with respect to the model's parameters and the objective's own
    together; the optimizer's state is `optimizer.init((params, own))`.

    Attributes:
      init: `(key, model, params, x) -> own`.
      loss: `(model, params, own, key, x, step, context=None) -> (loss, metrics)`.
    """

    init: InitFn
    loss: LossFn

    __repr__ = describe


@constructor
def elbo(kl_weight: float | Schedule = 1.0, free_bits: float = 0.0) -> Objective:
    """Minus the evidence lower bound, with a weight w and a floor on its KL part.

    loss = -E[log p(x|z)] + w max(E[log q(z|x) - log p(z)], free_bits): Huang et al. (2017), eq. 5,
    for w = 1 and no floor.

    >>> elbo(kl_weight=0.5)
    elbo(0.5)

    Args:
      kl_weight: w, or an optax schedule of the step. One that rises to 1 is a warm-up (Sonderby et
        al., 2016, https://arxiv.org/abs/1602.02282).
      free_bits: nats of KL, on average over the batch, that cost nothing (Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934; of the whole KL, as a flow has none for each dimension).

    Returns:
      An objective whose metrics are "elbo", at weight 1, "log_likelihood", "log_prior" and
      "log_posterior", in nats.

    Raises:
      ValueError: if free_bits is negative.
    """
    if not free_bits >= 0:
        raise ValueError(f"elbo: free_bits must be 0 or more, got {free_bits}")

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        terms = jax.tree.map(jnp.mean, model.elbo(params, key, x, context=context))
        weight = kl_weight(step) if callable(kl_weight) else kl_weight
        kl = terms.log_posterior - terms.log_prior
        if free_bits:
            kl = jnp.maximum(kl, free_bits)
        return weight * kl - terms.log_likelihood, _metrics(terms)

    return Objective(_nothing, loss)


@constructor
def iwae(num_samples: int) -> Objective:
    """Minus the importance-weighted bound, log 1/K sum_k p(x, z_k) / q(z_k|x).

    Burda, Grosse and Salakhutdinov (2016), eq. 8, https://arxiv.org/abs/1509.00519.

    >>> iwae(50)
    iwae(50)

    Args:
      num_samples: K; 1 gives `elbo()`.

    Returns:
      An objective whose metrics are "iwae", the bound, and those of `elbo`, in nats.

    Raises:
      ValueError: if num_samples is not positive.
    """
    _check_samples("iwae", num_samples)

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        terms = model.elbo(params, key, x, (num_samples,), context=context)
        bound = log_mean_exp(terms.bound, axis=0).mean()
        return -bound, {"iwae": bound, **_metrics(jax.tree.map(jnp.mean, terms))}

    return Objective(_nothing, loss)


@constructor
def dreg(num_samples: int) -> Objective:
    """`iwae` with the doubly reparameterised gradient, which has less noise.

    With weights w_k = p(x, z_k) / q(z_k|x), normalised to v_k, the gradient of the bound is
    sum_k v_k d log w_k with respect to the model at fixed z_k, and
    sum_k v_k^2 (d log w_k / dz_k) dz_k with respect to the posterior. Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152. The mean of the gradient is that of `iwae`. The posterior's
    flow is inverted once a step.

    >>> dreg(50)
    dreg(50)

    Args:
      num_samples: K.

    Returns:
      An objective whose metrics are "iwae", the bound, and those of `elbo`, in nats. Its loss has
      the right gradient; as a number it is no bound.

    Raises:
      ValueError: if num_samples is not positive.
    """
    _check_samples("dreg", num_samples)

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        z, terms_at = _reparameterised(model, params, key, x, (num_samples,), context)
        # The values are the same: compiled, the two share all but their gradients.
        of_model = terms_at(params, jax.lax.stop_gradient(z))
        of_posterior = terms_at(jax.lax.stop_gradient(params), z)
        weights = jax.lax.stop_gradient(jax.nn.softmax(of_model.bound, axis=0))
        surrogate = weights * of_model.bound + weights**2 * of_posterior.bound
        bound = log_mean_exp(of_model.bound, axis=0).mean()
        metrics = {"iwae": bound, **_metrics(jax.tree.map(jnp.mean, of_model))}
        return -surrogate.sum(0).mean(), metrics

    return Objective(_nothing, loss)


@constructor
def stl() -> Objective:
    """Minus the ELBO, without the score of q in its gradient: "sticking the landing".

    The gradient of log q(z|x) is taken through z alone. What is left out has mean zero, and at
    q(z|x) = p(z|x) the gradient with respect to the posterior has no noise at all. Roeder, Wu and
    Duvenaud (2017), https://arxiv.org/abs/1703.09194. The posterior's flow is inverted once a step.

    >>> stl()
    stl()

    Returns:
      An objective with the metrics of `elbo`, in nats.
    """

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        z, terms_at = _reparameterised(model, params, key, x, (), context)
        terms = jax.tree.map(jnp.mean, terms_at(params, z))
        return -terms.bound, _metrics(terms)

    return Objective(_nothing, loss)


@constructor
def maximum_likelihood() -> Objective:
    """-E[log p(x)] of a `Density`, which is KL(data || p) up to the data's entropy.

    Its metric is "log_prob", in nats.

    >>> from led_jax import densities
    >>> density, x = densities.standard_normal((2,)), jnp.zeros((3, 2))
    >>> loss, _ = maximum_likelihood().loss(density, (), (), jax.random.key(0), x, 0)
    >>> round(float(loss), 4)
    1.8379
    """

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        log_prob = model.log_prob(params, x, context).mean()
        return -log_prob, {"log_prob": log_prob}

    return Objective(_nothing, loss)


def _nothing(key: Array, model: Any, params: Params, x: Array, context: Any = None) -> Params:
    return ()


def _reparameterised(
    model: LED,
    params: Params,
    key: Array,
    x: Array,
    sample_shape: tuple[int, ...],
    context: Array | None,
) -> tuple[Array, Callable[[Params, Array], Elbo]]:
    """Draws z ~ q(z|x), and the bound's terms as a function of parameters and z.

    The posterior that they score with is held fixed.
    """
    encoding = model.encoding(params, x, context)
    z, _ = model.posterior_sample_and_log_prob(params, key, encoding, sample_shape)
    fixed, fixed_encoding = jax.lax.stop_gradient((params, encoding))

    def terms(params: Params, z: Array) -> Elbo:
        return Elbo(
            log_likelihood=model.log_likelihood(params, z, x, context),
            log_prior=model.prior_log_prob(params, z, context),
            log_posterior=model.posterior_log_prob(fixed, z, fixed_encoding),
        )

    return z, terms


def _metrics(means: Elbo) -> dict[str, Array]:
    return {"elbo": means.bound, **means._asdict()}


def _check_samples(name: str, num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"{name}: num_samples must be 1 or more, got {num_samples}")
