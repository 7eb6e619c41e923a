"""Flax modules as pairs of pure functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax import Array


def pure(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """The functions of a module that holds parameters only.

    Args:
      module: a module whose call returns one array.

    Returns:
      `init(key, *args) -> params` and `apply(params, *args) -> output`.
    """

    def init(key: Array, *args: Any) -> Any:
        return module.init(key, *args).get("params", {})

    def apply(params: Any, *args: Any) -> Array:
        output = module.apply({"params": params}, *args)
        assert not isinstance(output, tuple)
        return output

    return init, apply


def pure_of_context(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """`pure` for a module of x and perhaps a context, which need not name one that is never given.

    Args:
      module: a module that is called with x, or with x and a context, and returns one array.

    Returns:
      `init(key, x, context=None) -> params` and `apply(params, x, context=None) -> output`.
    """
    init, apply = pure(module)

    def init_of_context(key: Array, x: Array, context: Array | None = None) -> Any:
        return init(key, x) if context is None else init(key, x, context)

    def apply_of_context(params: Any, x: Array, context: Array | None = None) -> Array:
        return apply(params, x) if context is None else apply(params, x, context)

    return init_of_context, apply_of_context
