"""Flax modules as pairs of pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax import errors
from jax import Array


def pure(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """The functions of a module whose only variables are parameters.

    Args:
      module: a module whose call returns one array.

    Returns:
      `init(key, *args) -> params` and `apply(params, *args) -> output`.

    Raises:
      ValueError: (from the functions) if the module has other variables than parameters, draws at
        random, or does not return an array, or the parameters are another module's.
    """
    name = type(module).__name__

    def init(key: Array, *args: Any) -> Any:
        variables = module.init(key, *args)
        if others := set(variables) - {"params"}:
            raise ValueError(
                f"{name}: expected a module that holds nothing but parameters, got one with "
                f"{', '.join(sorted(others))}, as BatchNorm has; use LayerNorm or GroupNorm"
            )
        return variables.get("params", {})

    def apply(params: Any, *args: Any) -> Array:
        try:
            output = module.apply({"params": params}, *args)
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{name}: expected a module that draws nothing at random, as Dropout does: {error}"
            ) from error
        except errors.FlaxError as error:
            shapes = ", ".join(str(arg.shape) for arg in args if arg is not None)
            raise ValueError(
                f"{name}: expected parameters of this module, and an input, x or z, of the width "
                f"that they were made for (an image as a flat row), got inputs of {shapes}: {error}"
            ) from error
        if not isinstance(output, Array):
            raise ValueError(f"{name}: expected a module that returns one array, got {output!r}")
        return output

    return init, apply


def pure_of_context(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """`pure` for a module that is called with x, or with x and a context.

    Args:
      module: a module that returns one array. It needs no argument for a context that is never
        given.

    Returns:
      `init(key, x, context=None) -> params` and `apply(params, x, context=None) -> output`.
    """
    init, apply = pure(module)

    def check(x: Array) -> None:
        if not x.ndim:
            raise ValueError(f"{type(module).__name__}: expected x or z [..., K], got a scalar")

    def init_of_context(key: Array, x: Array, context: Array | None = None) -> Any:
        check(x)
        return init(key, x) if context is None else init(key, x, context)

    def apply_of_context(params: Any, x: Array, context: Array | None = None) -> Array:
        check(x)
        return apply(params, x) if context is None else apply(params, x, context)

    return init_of_context, apply_of_context
