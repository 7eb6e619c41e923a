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
      `init(key, *args) -> params` and `apply(params, *args) -> output`. Arguments that are None are
      left out, so that a module need not know of a context that is not there.
    """

    def init(key: Array, *args: Any) -> Any:
        return module.init(key, *_given(args)).get("params", {})

    def apply(params: Any, *args: Any) -> Array:
        output = module.apply({"params": params}, *_given(args))
        assert not isinstance(output, tuple)
        return output

    return init, apply


def _given(args: tuple[Any, ...]) -> list[Any]:
    return [arg for arg in args if arg is not None]
