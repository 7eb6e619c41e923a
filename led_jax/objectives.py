"""What is minimised: each objective is one value, with a loss and the terms to report."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor, describe

Params = Any
Schedule = Callable[[Array], Any]


class InitFn(Protocol):
    """Creates what an objective itself trains."""

    def __call__(self, key: Array, model: Any, params: Params, x: Array, /) -> Params:
        """`params`: the model's; `x`: rows of the data. `()` where there is nothing to train."""
        ...


class LossFn(Protocol):
    """The loss of a batch."""

    def __call__(
        self, model: Any, params: Params, own: Params, key: Array, x: Array, step: Array, /
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the scalar loss, and means over the batch of what is worth reporting.

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
      loss: `(model, params, own, key, x, step) -> (loss, metrics)`.
    """

    init: InitFn
    loss: LossFn

    __repr__ = describe


@constructor
def elbo(kl_weight: float | Schedule = 1.0) -> Objective:
    """Minus the evidence lower bound, with a weight w on its KL part.

    loss = -E[log p(x|z)] + w E[log q(z|x) - log p(z)]: Huang et al. (2017), eq. 5, for w = 1.

    >>> elbo(kl_weight=0.5)
    elbo(0.5)

    Args:
      kl_weight: w, or an optax schedule of the step. One that rises to 1 is a warm-up (Sonderby et
        al., 2016, https://arxiv.org/abs/1602.02282).

    Returns:
      An objective whose metrics are "elbo", at weight 1, "log_likelihood", "log_prior" and
      "log_posterior", in nats.
    """

    def loss(model: Any, params: Params, own: Params, key: Array, x: Array, step: Array):
        terms = jax.tree.map(jnp.mean, model.elbo(params, key, x))
        weight = kl_weight(step) if callable(kl_weight) else kl_weight
        kl = terms.log_posterior - terms.log_prior
        return weight * kl - terms.log_likelihood, {"elbo": terms.bound, **terms._asdict()}

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

    def loss(model: Any, params: Params, own: Params, key: Array, x: Array, step: Array):
        log_prob = model.log_prob(params, x).mean()
        return -log_prob, {"log_prob": log_prob}

    return Objective(_nothing, loss)


def _nothing(key: Array, model: Any, params: Params, x: Array) -> Params:
    return ()
