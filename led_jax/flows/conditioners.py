"""Conditioners, the networks that emit a transformer's parameters: their type, and `mlp`.

A constructor such as `mlp(...)` returns a function `(num_params, size) -> Conditioner`, because
only the layer that uses the network knows the number of entries and of parameters for each entry.
The output layer of every network starts at zero, so that a fresh flow is the identity or close to
it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from led_jax.checks import checked
from led_jax.descriptions import constructor, describe
from led_jax.flows.base import InitFn, Params
from led_jax.numerics import match_rank, widened

Kind = Literal["passing", "whole", "autoregressive"]


class _Conditioner(NamedTuple):
    init: InitFn
    apply: Callable[..., Array]
    kind: Kind
    incremental: Callable[..., tuple[Any, Callable[..., tuple[Array, Any]]]] | None = None

    __repr__ = describe


class Conditioner(_Conditioner):
    """A network that emits the parameters of a transformer, as pure functions.

    As those of a flow, its functions convert integers, NumPy arrays and lists to floats.

    Attributes:
      init: `(key, x, context=None) -> params`.
      apply: `(params, x, context=None) -> raw`, from `[..., K]` to `[..., num_params, size]`. The
        context is `[..., context_dim]`, and its batch axes broadcast to those of x.
      kind: which entries it reads. "passing" (for coupling layers): reads the passing entries and
        emits the parameters of the others. "whole" (for coupling layers): reads the whole event,
        with zeros for the entries that it may not see, and emits parameters for all entries.
        "autoregressive": reads the whole event; the parameters of entry i depend only on the
        entries before i.
      incremental: for autoregressive networks, a function that computes the outputs one after the
        other, at less than a whole pass for each: `(params, x, context=None) -> (cache, step)`,
        where x gives shape and dtype. For i = 0, 1, ..., `step(cache, x, i)` returns output i,
        `[..., num_params, 1]`, and the next cache. Output i depends on x_0 to x_{i-1}; later
        entries may have any finite value. None if there is no such function.
    """

    def __new__(
        cls,
        init: InitFn,
        apply: Callable[..., Array],
        kind: Kind,
        incremental: Callable[..., tuple[Any, Callable[..., tuple[Array, Any]]]] | None = None,
    ) -> "Conditioner":
        """A conditioner whose functions check their arguments."""
        functions = {"init": init, "apply": apply, "incremental": incremental}
        init, apply, incremental = (
            function and checked(function, f"Conditioner.{name}")
            for name, function in functions.items()
        )
        return super().__new__(cls, init, apply, kind, incremental)


MakeConditioner = Callable[[int, int], Conditioner]


@constructor
def mlp(
    hidden: Sequence[int] = (100,),
    *,
    context_dim: int | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> MakeConditioner:
    """A fully connected conditioner, for coupling layers.

    >>> network = mlp((8,))(2, 3)
    >>> params = network.init(jax.random.key(0), jnp.zeros(5))
    >>> network.apply(params, jnp.zeros((4, 5))).shape
    (4, 2, 3)

    Args:
      hidden: widths of the hidden layers.
      context_dim: width of the context that it reads; None ignores any context.
      activation: the nonlinearity.

    Raises:
      ValueError: if a width is not positive; from its functions, if the context or the parameters
        have the wrong shapes.
    """
    check_hidden("mlp", hidden)

    def make(num_params: int, size: int) -> Conditioner:
        def shapes(input_size: int) -> dict[str, dict[str, tuple[int, ...]]]:
            widths = [input_size, *hidden, num_params * size]
            layers: dict[str, dict[str, tuple[int, ...]]] = {
                f"dense_{i}": {"kernel": (widths[i], widths[i + 1]), "bias": (widths[i + 1],)}
                for i in range(len(widths) - 1)
            }
            if context_dim is not None:
                layers["context"] = {"kernel": (context_dim, hidden[0])}
            return layers

        def read(x: Array, context: Array | None) -> Array | None:
            if not x.ndim:
                raise ValueError("mlp: expected x of shape [..., K], got a scalar")
            return read_context(context_dim, x, context)

        def init(key: Array, x: Array, context: Array | None = None) -> Params:
            read(x, context)
            layers = shapes(x.shape[-1])
            last = f"dense_{len(hidden)}"
            params = {}
            for layer_key, (name, layer) in zip(
                jax.random.split(key, len(layers)), layers.items(), strict=True
            ):
                if name == "context":
                    params[name] = init_context(layer_key, context_dim, hidden[0], x.dtype)
                    continue
                is_zero = name == last or not layer["kernel"][0]
                of_kernel = initializers.zeros if is_zero else initializers.he_normal()
                params[name] = {
                    "kernel": of_kernel(layer_key, layer["kernel"], x.dtype),
                    "bias": jnp.zeros(layer["bias"], x.dtype),
                }
            return params

        def apply(params: Params, x: Array, context: Array | None = None) -> Array:
            context = read(x, context)
            check_shapes("mlp", params, shapes(x.shape[-1]))
            # Entries are the first axis and the batch axes the last here, as in coupling layers.
            h = jnp.moveaxis(x, -1, 0)
            for i in range(len(hidden) + 1):
                layer = params[f"dense_{i}"]
                h = jnp.tensordot(layer["kernel"].astype(x.dtype), h, (0, 0))
                h = h + jnp.expand_dims(layer["bias"].astype(x.dtype), range(1, h.ndim))
                if i == len(hidden):
                    break
                if i == 0 and context is not None:
                    h = h + jnp.moveaxis(of_context(params["context"], context), -1, 0)
                h = activation(h)
            h = h.reshape(num_params, size, *h.shape[1:])
            return jnp.moveaxis(h, (0, 1), (-2, -1))

        return Conditioner(init, apply, "passing")

    return make


def make_conditioner(
    name: str,
    conditioner: Callable[..., MakeConditioner],
    hidden: Sequence[int],
    context_dim: int | None,
) -> MakeConditioner:
    """Calls a stack's argument `conditioner` with the stack's `hidden` and `context_dim`.

    Raises:
      TypeError: if it does not take these arguments; `name` is the stack's.
    """
    try:
        return conditioner(hidden, context_dim=context_dim)
    except TypeError as error:
        raise TypeError(
            f"{name}: conditioner must be a function of hidden and context_dim, as mlp: {error}"
        ) from error


def read_context(context_dim: int | None, x: Array, context: Array | None) -> Array | None:
    """Checks the context of a conditioner with input x, and gives it the dtype and rank of x.

    Args:
      context_dim: width that the conditioner was built with; None ignores the context and returns
        None.
      x: the input `[..., K]`.
      context: `[..., context_dim]`, whose batch axes must broadcast to those of x.

    Raises:
      ValueError: if the context is missing, has another width, or more batch entries than x.
    """
    if context_dim is None:
        return None
    batch_shape = x.shape[:-1]
    if (
        context is None
        or context.shape[-1:] != (context_dim,)
        or context.ndim > x.ndim
        or any(
            n not in (1, m) for n, m in zip(context.shape[-2::-1], batch_shape[::-1], strict=False)
        )
    ):
        given = None if context is None else context.shape
        raise ValueError(
            f"conditioner: built with context_dim={context_dim}, so it needs a context of shape "
            f"[..., {context_dim}] whose batch axes broadcast to those of the input; got {given} "
            f"for an input with batch axes {batch_shape}"
        )
    return match_rank(context.astype(x.dtype), x.ndim)


def init_context(key: Array, context_dim: int | None, width: int, dtype: Any) -> Params:
    """Parameters of `of_context`."""
    return {"kernel": initializers.lecun_normal()(key, (context_dim, width), dtype)}


def of_context(params: Params, context: Array) -> Array:
    """What the context `[..., context_dim]` adds to the first hidden layer, `[..., width]`."""
    return context @ params["kernel"].astype(context.dtype)


def check_shapes(name: str, params: Params, expected: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the parameters are a tree of arrays of the expected shapes."""
    found = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), params)
    if found != expected:
        raise ValueError(f"{name}: expected parameters of shapes {expected}, got {found}")


def check_hidden(name: str, hidden: Sequence[int]) -> None:
    """Raises a ValueError unless there are hidden layers, all of positive width."""
    if not hidden or min(hidden) < 1:
        raise ValueError(f"{name}: expected one or more positive widths, got hidden={hidden}")


def init_linear(
    start: Array, context_dim: int | None, x: Array, context: Array | None = None
) -> Params:
    """Parameters of `linear_in_context` at which its value is `start` for every context."""
    read_context(context_dim, x, context)
    params: dict[str, Any] = {"bias": start}
    if context_dim is not None:
        params["context"] = {"kernel": jnp.zeros((context_dim, start.size), start.dtype)}
    return params


def linear_in_context(
    name: str,
    params: Params,
    size: int,
    context_dim: int | None,
    x: Array,
    context: Array | None = None,
) -> Array:
    """A layer's parameters `[..., size]`: bias + context @ kernel, with the rank of its input x.

    Their dtype is that of x, or float32 if that of x is narrower.

    Raises:
      ValueError: if the context or the parameters have the wrong shapes; `name` is the layer's.
    """
    context = read_context(context_dim, widened(x), context)
    expected: dict[str, Any] = {"bias": (size,)}
    if context_dim is not None:
        expected["context"] = {"kernel": (context_dim, size)}
    check_shapes(name, params, expected)
    raw = match_rank(params["bias"].astype(widened(x).dtype), x.ndim)
    return raw if context is None else raw + of_context(params["context"], context)
