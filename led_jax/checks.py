"""Argument checks of public functions, derived from their annotations and argument names."""

import functools
import inspect
import numbers
import operator
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from led_jax.numerics import as_float, as_real, is_key

C = TypeVar("C", bound=Callable[..., Any])


# Arguments of these names are converted to arrays of numbers in every public function.
_NUMBERS = ("x", "y", "z", "z0", "raw", "context")

# The smallest integer allowed in an argument, by the last word of its name: "shape" is that of
# event_shape.
_LEAST = {"shape": 0, "ndims": 0, "seed": 0, "skipped": 0} | dict.fromkeys(
    ("dim", "hidden", "features", "maps", "params", "every", "epochs"), 1
)


def checked(function: C, name: str | None = None) -> C:
    """Wraps `function` so that its arguments are checked, and numbers become arrays of floats.

    Args:
      function: any function. An argument is checked against its annotation where that is a number,
        a string, a sequence, a callable, a class or a union of these. One called x, y, z, z0, raw
        or context is converted by `numerics.as_float`, or by `numerics.as_real` where its
        annotation includes `np.ndarray`. One called key must be a PRNG key, and one called params a
        tree of floats. Arguments that are their default are not checked.
      name: the function's name in error messages; None takes its own.

    Returns:
      The function, which raises a TypeError or a ValueError naming the argument.
    """
    name = name or function.__name__
    signature = inspect.signature(function)

    @functools.wraps(function)
    def at_the_door(*args: Any, **kwargs: Any) -> Any:
        bound = bind(name, signature, args, kwargs)
        check_arguments(name, bound)
        return function(*bound.args, **bound.kwargs)

    return at_the_door  # pyright: ignore[reportReturnType]


def bind(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """Binds a call's arguments to the names of the signature.

    Raises:
      TypeError: naming the function, if the arguments do not fit the signature.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def check_arguments(name: str, bound: inspect.BoundArguments) -> None:
    """Checks a call's arguments as `checked` does, and replaces numbers by arrays, in `bound`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if it is of the right type, but its value is not allowed.
    """
    for argument, value in bound.arguments.items():
        parameter = bound.signature.parameters[argument]
        annotation = parameter.annotation
        if value is parameter.default:
            continue
        if argument in _NUMBERS and parameter.kind is not parameter.VAR_POSITIONAL:
            convert = as_real if np.ndarray in get_args(annotation) else as_float
            bound.arguments[argument] = convert(f"{name}: {argument}", value)
        elif argument == "key":
            _check_key(name, value)
        elif argument == "params":
            _check_numbers(name, value)
        else:
            if parameter.kind is parameter.VAR_POSITIONAL:
                values = value
            else:
                values = value.values() if parameter.kind is parameter.VAR_KEYWORD else (value,)
            for one in values:
                refusal = _refusal(annotation, one) or _refusal_of_size(argument, one)
                if refusal:
                    what = type(one).__name__ if hasattr(one, "_fields") else reprlib.repr(one)
                    raise type(refusal)(f"{name}: {argument} must be {refusal}, got {what}")


def check_names(name: str, params: Any, expected: Sequence[str]) -> None:
    """Raises a ValueError unless the parameters are a dict with these keys."""
    if not isinstance(params, Mapping) or set(params) != set(expected):
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"{name}: expected parameters {sorted(expected)}, got {found}")


def check_raw(name: str, num_params: int, raw: jax.Array, x: jax.Array) -> None:
    """Raises a ValueError unless raw `[..., P, D]` has P parameters and broadcasts with x."""
    fits = raw.ndim > 1 and raw.shape[-2] == num_params
    if fits:
        sizes = zip((*raw.shape[:-2], raw.shape[-1])[::-1], x.shape[::-1], strict=False)
        fits = all(m == n or 1 in (m, n) for m, n in sizes)
    if not fits:
        raise ValueError(
            f"{name}: expected raw of shape [..., {num_params}, D] for x of shape [..., D], got "
            f"raw of {raw.shape} for x of {x.shape}"
        )


def _check_key(name: str, key: Any) -> None:
    is_raw = getattr(key, "dtype", None) == jnp.uint32 and np.ndim(key) == 1
    if not is_raw and not (is_key(key) and not key.shape):
        raise TypeError(
            f"{name}: key must be a PRNG key, as jax.random.key(0) makes one, got "
            f"{reprlib.repr(key)}"
        )


def _check_numbers(name: str, params: Any) -> None:
    for leaf in jax.tree.leaves(params):
        is_number = type(leaf) in (int, float)
        if not is_number and not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
            raise TypeError(
                f"{name}: params must be a tree of arrays of floats, got {reprlib.repr(leaf)} in it"
            )


def _refusal(annotation: Any, value: Any) -> Exception | None:
    """The error that says what `value` should be; None if it fits, or cannot be checked."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, Union):
        refusals = [_refusal(option, value) for option in options]
        if None in refusals:
            return None
        # A ValueError means that the type fits one of the options, and only the value does not.
        kind = ValueError if any(isinstance(r, ValueError) for r in refusals) else TypeError
        return kind(" or ".join(map(str, refusals)))
    if origin is Literal:
        found = isinstance(value, str) and value in options
        return None if found else ValueError(f"one of {', '.join(map(repr, options))}")
    if origin in (tuple, Sequence):
        return _refusal_of_sequence(origin, options, value)
    if origin is Callable:
        return None if callable(value) else TypeError("a function")
    if annotation in _SCALARS:
        is_right, expected = _SCALARS[annotation]
        return None if is_right(value) else TypeError(expected)
    if getattr(annotation, "_is_protocol", False):
        lacking = [name for name in vars(annotation) if name[0] != "_" and not hasattr(value, name)]
        return TypeError(f"a {annotation.__name__}, with {lacking[0]}") if lacking else None
    if not isinstance(annotation, type) or annotation in _UNCHECKED:
        return None
    is_none = annotation is types.NoneType
    article = "an" if annotation.__name__[0] in "AEIOU" else "a"
    expected = "None" if is_none else f"{article} {annotation.__name__}"
    return None if isinstance(value, annotation) else TypeError(expected)


def _refusal_of_sequence(origin: Any, options: tuple, value: Any) -> Exception | None:
    size = len(options) if origin is tuple and options[-1] is not Ellipsis else None
    entry = options[0]
    of_what = " of integers" if entry is int else ""
    expected = f"a sequence{of_what}, such as (4,)" if size is None else f"{size} values{of_what}"
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_sequence and not (isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 1):
        return TypeError(expected)
    if size is not None and len(value) != size:
        return ValueError(expected)
    refusals = (_refusal(entry, one) for one in value)
    return next((TypeError(f"{expected}, each {refusal}") for refusal in refusals if refusal), None)


def _refusal_of_size(argument: str, value: Any) -> Exception | None:
    least = _LEAST.get(argument.rpartition("_")[2])
    if least is None:
        return None
    if _is_integer(value):
        return ValueError(f"{least} or more") if value < least else None
    entries = value if isinstance(value, Sequence | np.ndarray) else ()
    if any(_is_integer(entry) and entry < least for entry in entries):
        return ValueError(f"integers of {least} or more")
    return None


def _is_integer(value: Any) -> bool:
    try:
        return not isinstance(value, bool | np.bool_) and operator.index(value) == value
    except TypeError:
        return False


def _is_number(value: Any) -> bool:
    if hasattr(value, "dtype"):
        is_real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
        return is_real and np.ndim(value) == 0
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_UNCHECKED = (Any, object, np.ndarray, jax.Array, inspect.Parameter.empty)

_SCALARS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_integer, "an integer"),
    float: (_is_number, "a number"),
    bool: (lambda value: isinstance(value, bool | np.bool_), "True or False"),
    str: (lambda value: isinstance(value, str), "a string"),
}
