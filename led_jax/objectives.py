"""Objectives of training: each is a pair of functions, for a loss with terms to report."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from led_jax.descriptions import constructor, describe
from led_jax.flows.conditioners import check_hidden
from led_jax.model import LED, Elbo
from led_jax.modules import pure_of_context
from led_jax.networks import MLP
from led_jax.numerics import log_mean_exp, reverse_gradient, softplus, widened

Params = Any
Schedule = Callable[[Array], Any]


class InitFn(Protocol):
    """Creates the parameters that belong to the objective itself, such as those of a critic."""

    def __call__(self, key: Array, model: Any, params: Params, x: Array, /) -> Params:
        """`params`: the model's; `x`: rows of the data. Returns `()` if there are no parameters.

        If the data have contexts, these, `[n, C]`, are passed as a fifth argument.
        """
        ...


class LossFn(Protocol):
    """The loss of a batch."""

    def __call__(
        self, model: Any, params: Params, own: Params, key: Array, x: Array, step: Array, /
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the scalar loss and the metrics to report, each a mean over the batch.

        If the data have contexts, these, `[n, C]`, are passed as a seventh argument.

        Args:
          model: a `LED`, or another model that the objective takes.
          params: the model's parameters.
          own: the objective's parameters, from its `init`.
          key: PRNG key of the step.
          x: the batch `[n, *x_shape]`.
          step: number of steps taken so far, an integer scalar.
        """
        ...


class Objective(NamedTuple):
    """What training minimises.

    A training step differentiates the loss with respect to both the model's parameters `params` and
    the objective's own parameters `own`; the optimizer's state is `optimizer.init((params, own))`.

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
      free_bits: nats of KL, averaged over the batch, that are not penalised (Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934). The floor is on the whole KL, because the KL of a flow is
        not a sum over dimensions.

    Returns:
      An objective whose metrics are "elbo" (for w = 1 and no floor), "log_likelihood", "log_prior"
      and "log_posterior", in nats.

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
    sum_k v_k d log w_k with respect to prior and decoder, at fixed z_k, and
    sum_k v_k^2 (d log w_k / dz_k) dz_k with respect to the posterior. Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152. The gradient's expectation is the same as that of `iwae`. Each
    step inverts the posterior's flow once.

    >>> dreg(50)
    dreg(50)

    Args:
      num_samples: K.

    Returns:
      An objective whose metrics are "iwae", the bound, and those of `elbo`, in nats. Its loss is a
      surrogate with the right gradient; the value of the loss is not a bound.

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
        # Both have the same values: XLA computes these once, and only the gradients twice.
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

    The gradient of log q(z|x) is taken only through z. The omitted term has mean zero, and at
    q(z|x) = p(z|x) the gradient with respect to the posterior has no noise at all. Roeder, Wu and
    Duvenaud (2017), https://arxiv.org/abs/1703.09194. Each step inverts the posterior's flow once.

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
def prior_only() -> Objective:
    """Fits the prior to a model whose other parts are held fixed: -E[log p(z)] for z ~ q(z).

    Up to the entropy of q(z) this is KL(q(z) || p(z)), Huang et al. (2017), eq. 4. Only the prior
    has a gradient; if it reads the posterior, as a VampPrior does, that is fixed. An optimizer with
    weight decay would change the other parts nevertheless.

    >>> prior_only()
    prior_only()

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
        params = params | jax.lax.stop_gradient(model.all_but_prior(params))
        terms = jax.tree.map(jnp.mean, model.elbo(params, key, x, context=context))
        return -terms.log_prior, _metrics(terms)

    return Objective(_nothing, loss)


@constructor
def mmd(weight: float = 1000.0, kl_weight: float = 1.0, bandwidth: float = 1.0) -> Objective:
    """Minus the ELBO and the maximum mean discrepancy between q(z) and p(z).

    loss = -E[log p(x|z)] + kl_weight E[log q(z|x) - log p(z)] + weight MMD^2(q(z), p(z)), for the
    kernel k(a, b) = e^(-|a - b|^2 / (2 bandwidth^2 D)). With kl_weight = 1 this is the InfoVAE of
    Zhao, Song and Ermon (2017), https://arxiv.org/abs/1706.02262, for alpha = 0 and lambda = 1 +
    weight; with kl_weight = 0 it is the Wasserstein autoencoder of Tolstikhin et al. (2018),
    algorithm 2, https://arxiv.org/abs/1711.01558, which lets q(z|x) shrink to a point. MMD^2 is
    estimated without bias from n draws of q(z) and n of p(z), for a batch of n rows; the estimate
    may be negative.

    >>> mmd(kl_weight=0.0)
    mmd(kl_weight=0.0)

    Args:
      weight: weight of MMD^2, which lies between 0 and 2.
      kl_weight: weight of the KL.
      bandwidth: bandwidth of the kernel, in units of sqrt(D) for D latent variables.

    Returns:
      An objective whose metrics are "mmd" and those of `elbo`. The loss samples the prior, which
      should be cheap, and gives no gradient to the weights of a mixture. It is not a mean over
      rows: on several devices only `method="jit"` of `training.epochs` computes it on whole
      batches.

    Raises:
      ValueError: if bandwidth is not positive, or a weight negative; from the loss, if a batch has
        fewer than two rows.
    """
    _check_weights("mmd", weight=weight, kl_weight=kl_weight)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"mmd: bandwidth must be positive, got {bandwidth}")

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        if not x.ndim or len(x) < 2:
            raise ValueError(f"mmd: expected x of two rows or more, got shape {x.shape}")
        n = len(x)
        terms, *draws = _terms_and_draws(model, params, key, x, context)
        of_q, of_p = map(_rows, draws)
        # Only pairs of different draws count; the n pairs of a draw with itself have k = 1.
        within = sum(_kernel(a, a, bandwidth).sum() - n for a in (of_q, of_p)) / (n * (n - 1))
        distance = within - 2 * _kernel(of_q, of_p, bandwidth).mean()
        total = _weighted(terms, kl_weight) + weight * distance
        return total, {"mmd": distance, **_metrics(terms)}

    return Objective(_nothing, loss)


@constructor
def adversarial(
    weight: float = 1.0, kl_weight: float = 0.0, hidden: Sequence[int] = (200, 200)
) -> Objective:
    """An adversarial autoencoder: a critic of z tells q(z) from p(z), and the model misleads it.

    Makhzani et al. (2015), https://arxiv.org/abs/1511.05644. The critic c(z), a ReLU network, is
    the logit of "z is from q(z)" and minimises L = E_q[softplus(-c)] + E_p[softplus(c)].
    The model minimises -E[log p(x|z)] + kl_weight E[log q(z|x) - log p(z)] - weight L. The gradient
    of L with respect to z is reversed (Ganin and Lempitsky, 2015, https://arxiv.org/abs/1409.7495),
    so that one step updates both. The optimal critic is c = log q(z) - log p(z).
    `optax.partition({"model": a, "own": b}, ("model", "own"))` gives the critic its own optimizer.

    >>> adversarial(weight=10.0)
    adversarial(10.0)

    Args:
      weight: weight of the critic's loss in the model's loss.
      kl_weight: weight of the KL in the model's loss.
      hidden: widths of the critic's hidden layers.

    Returns:
      An objective that also trains the critic. Its metrics are "critic_loss", L, which is
      2 log 2 = 1.386 if the optimal critic cannot tell q(z) from p(z); "log_ratio", the mean of c
      over q(z), which estimates KL(q(z) || p(z)) if the critic is optimal; and those of `elbo`. As
      in `mmd`, the loss samples the prior.

    Raises:
      ValueError: if a weight is negative, or a width not positive.
    """
    _check_weights("adversarial", weight=weight, kl_weight=kl_weight)
    check_hidden("adversarial", hidden)
    init_critic, critic = pure_of_context(MLP((*hidden, 1)))

    def init(
        key: Array, model: Any, params: Params, x: Array, context: Array | None = None
    ) -> Params:
        return init_critic(key, _rows(model.encoding(params, x, context).mean))

    def loss(
        model: Any,
        params: Params,
        own: Params,
        key: Array,
        x: Array,
        step: Array,
        context: Array | None = None,
    ):
        terms, *draws = _terms_and_draws(model, params, key, x, context)
        of_q, of_p = (critic(own, reverse_gradient(_rows(z), weight)) for z in draws)
        critic_loss = softplus(-of_q).mean() + softplus(of_p).mean()
        metrics = {"critic_loss": critic_loss, "log_ratio": of_q.mean(), **_metrics(terms)}
        return _weighted(terms, kl_weight) + critic_loss, metrics

    return Objective(init, loss)


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
    """Draws z ~ q(z|x), and the ELBO's terms as a function of parameters and z.

    In log q(z|x) the posterior's parameters are constants: its gradient goes through z only.
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


def _terms_and_draws(
    model: LED, params: Params, key: Array, x: Array, context: Array | None
) -> tuple[Elbo, Array, Array]:
    """Batch means of the ELBO's terms, the z ~ q(z|x) of each row, and a draw of p(z) for each."""
    posterior_key, prior_key = jax.random.split(key)
    encoding = model.encoding(params, x, context)
    z, log_posterior = model.posterior_sample_and_log_prob(params, posterior_key, encoding)
    terms = Elbo(
        log_likelihood=model.log_likelihood(params, z, x, context),
        log_prior=model.prior_log_prob(params, z, context),
        log_posterior=log_posterior,
    )
    shape = (len(x),) if context is None else ()
    from_prior, _ = model.prior_sample_and_log_prob(params, prior_key, shape, context)
    return jax.tree.map(jnp.mean, terms), z, from_prior


def _rows(z: Array) -> Array:
    """Latent variables `[n, *latent_shape]` as vectors."""
    return z.reshape(len(z), -1)


def _kernel(a: Array, b: Array, bandwidth: float) -> Array:
    """The kernel of `mmd` for all pairs of rows of a and b `[n, D]`: `[n, n]`."""
    a, b = widened(a), widened(b)
    # With products in fewer bits, the distance of a row to itself would not be 0.
    products = jnp.matmul(a, b.T, precision="highest")
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * products
    return jnp.exp(-squares / (2 * bandwidth**2 * a.shape[1]))


def _weighted(means: Elbo, kl_weight: float) -> Array:
    return kl_weight * (means.log_posterior - means.log_prior) - means.log_likelihood


def _metrics(means: Elbo) -> dict[str, Array]:
    return {"elbo": means.bound, **means._asdict()}


def _check_weights(name: str, **weights: float) -> None:
    for argument, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: {argument} must be 0 or more, got {weight}")


def _check_samples(name: str, num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"{name}: num_samples must be 1 or more, got {num_samples}")
