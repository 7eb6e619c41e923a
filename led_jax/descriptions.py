"""Descriptions of values made by public constructors: written as JSON, and built again from it.

A function decorated with `constructor` records its name and its arguments, defaults included, on
the value that it returns. The record is the value's `repr`; `to_json` and `save` write it; and
values with equal records are equal and have the same hash, so that `jax.jit` reuses a compiled
program for a model that is built again.

`from_json` and `load` call only registered constructors: nothing is imported by name and nothing is
unpickled.
"""

import base64
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pathlib
import re
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_origin, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from led_jax.checks import bind, check_arguments, checked
from led_jax.numerics import relu

_FORMAT = 1
# Largest depth to which values may be nested, in memory and in files.
_MAX_DEPTH = 100
_MAX_JSON_BYTES = 2**26
# Largest size of the header of a `.npy` file.
_MAX_HEADER_BYTES = 1024

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """A registered name with its value; only constructors have a signature."""

    name: str
    value: Any
    signature: Any = None

    def __repr__(self) -> str:
        return self.name


_entries: dict[str, _Entry] = {}
_by_id: dict[int, _Entry] = {}


@overload
def constructor(function: C, *, name: str | None = None) -> C: ...
@overload
def constructor(*, name: str) -> Callable[[C], C]: ...
def constructor(function: Any = None, *, name: str | None = None) -> Any:
    """Decorator that records on each value a function returns how the value was made.

    >>> @constructor
    ... def power(exponent, scale=1.0): return lambda x: scale * x**exponent
    >>> power(2, scale=1.0), power(2) == power(2), power(2) == power(3)
    (power(2), True, False)

    Args:
      function: a function that returns a NamedTuple of functions (and constants), or a function;
        with equal arguments it must return functions that compute the same. Or a class, either a
        NamedTuple of such values or a flax module, whose instances are described by their fields.
      name: the name in files; the function's own by default.

    Raises:
      ValueError: if the name is registered for something else.
      TypeError: from the decorated function, if an argument does not fit its annotation. The
        functions that it returns, or the methods of a NamedTuple, check their arguments, too: see
        `checks.checked`.
    """
    if function is None:
        return functools.partial(constructor, name=name)
    made = function
    if isinstance(function, type):
        if not (hasattr(function, "_fields") or dataclasses.is_dataclass(function)):
            raise TypeError(f"constructor: expected a NamedTuple or a dataclass, got {function}")
        _check_calls(function)
    else:

        @functools.wraps(function)
        def made(*args: Any, **kwargs: Any) -> Any:
            bound = bind(function.__name__, signature, args, kwargs)
            check_arguments(function.__name__, bound)
            value = function(*bound.args, **bound.kwargs)
            bound.apply_defaults()
            return _record(value, _call(entry, bound.arguments))

    signature = inspect.signature(function)
    entry = _Entry(name or function.__name__, made, signature)
    _add(entry)
    return made


def _check_calls(cls: type) -> None:
    """Makes a class check its constructor's arguments, and a NamedTuple those of its methods."""
    is_tuple = hasattr(cls, "_fields")
    maker = "__new__" if is_tuple else "__init__"
    make = getattr(cls, maker)
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        check_arguments(cls.__name__, bind(cls.__name__, signature, args, kwargs))
        return make(*args, **kwargs)

    setattr(cls, maker, made)
    for name, method in list(vars(cls).items()):
        if is_tuple and inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, checked(method, f"{cls.__name__}.{name}"))


def register(name: str, value: T) -> T:
    """Registers a constant or a function under the name by which descriptions refer to it.

    Returns:
      The value itself.

    Raises:
      ValueError: if the name is registered for something else.
    """
    _add(_Entry(name, value))
    return value


def _add(entry: _Entry) -> None:
    def origin(value: Any) -> tuple[Any, Any]:
        return getattr(value, "__module__", None), getattr(value, "__qualname__", id(value))

    old = _entries.get(entry.name)
    # A function that is defined again, as when a notebook's cell is run twice, replaces itself.
    if old is not None and origin(old.value) != origin(entry.value):
        raise ValueError(
            f"descriptions: {entry.name!r} is the name of {old.value!r} already; give "
            f"{entry.value!r} another one, as in @constructor(name=...)"
        )
    _entries[entry.name] = _by_id[id(entry.value)] = entry


# The form in which a value is recorded: None, bool, int, float, str, or a list, tuple or dict of
# nodes, or one of `_Entry`, `_Call`, `_Array` and `_Opaque`. Except for the last it is a copy,
# which does not change when the caller later changes the value, and its `repr` is Python.
_Node = Any


class _Call:
    """A call of a constructor with arguments by name; with `positional`, a `functools.partial`."""

    def __init__(self, entry: _Entry, arguments: dict, positional: tuple | None = None):
        self.entry, self.arguments, self.positional = entry, arguments, positional
        self.constants: dict[str, Any] = {}  # Fields of the result that are not functions.
        self.hash = hash(self.key())

    def key(self) -> tuple:
        return self.entry, _key(self.arguments), _key(self.positional)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Call):
            return NotImplemented
        return self is other or (self.hash == other.hash and self.key() == other.key())

    def __repr__(self) -> str:
        if self.positional is not None:
            words = [self.entry.name, *map(repr, self.positional)]
            words += [f"{name}={node!r}" for name, node in self.arguments.items()]
            return f"functools.partial({', '.join(words)})"
        words, parameters = [], self.entry.signature.parameters
        for i, (name, node) in enumerate(self.arguments.items()):
            kind, default = parameters[name].kind, parameters[name].default
            if kind is inspect.Parameter.VAR_POSITIONAL:
                words += map(repr, node)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                words += [f"{key}={value!r}" for key, value in node.items()]
            elif default is inspect.Parameter.empty or _key(_freeze(default)) != _key(node):
                is_class = isinstance(self.entry.value, type)
                is_first = i == 0 and kind is not inspect.Parameter.KEYWORD_ONLY and not is_class
                words.append(repr(node) if is_first else f"{name}={node!r}")
        return f"{self.entry.name}({', '.join(words)})"


@dataclasses.dataclass(frozen=True)
class _Array:
    """A copy of a NumPy array (kind "numpy") or of a JAX array (kind "jax")."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> np.ndarray:
        return np.frombuffer(self.data, np.dtype(self.dtype)).reshape(self.shape)

    def __repr__(self) -> str:
        with np.printoptions(threshold=10):
            return " ".join(repr(self.values).split())


class _Opaque:
    """A value that has no description, and is equal only to itself."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque) and self.value is other.value

    def __repr__(self) -> str:
        return repr(self.value)


class Recorded(functools.partial):
    """A function made by a constructor, alone or as a field of a NamedTuple.

    It equals the function of the same field in a value with an equal description.

    Attributes:
      call: the constructor's call that made the value.
      field: the name of the NamedTuple's field; None if the function is the whole value.
    """

    call: _Call
    field: str | None
    hash: int

    def __new__(cls, function: Callable[..., Any], call: _Call, field: str | None = None):
        """Wraps a function; one that is a `Recorded` already is unwrapped first."""
        self = super().__new__(cls, function.func if isinstance(function, cls) else function)
        self.call, self.field, self.hash = call, field, hash((field, call.hash))
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same field of a value with an equal description."""
        if not isinstance(other, Recorded):
            return NotImplemented
        return self is other or (self.field == other.field and self.call == other.call)

    def __hash__(self) -> int:
        """Agrees with equality."""
        return self.hash

    def __repr__(self) -> str:
        """The description."""
        return repr(self.call) if self.field is None else f"<{self.field} of {self.call}>"

    def __deepcopy__(self, memo: Any) -> "Recorded":
        """Returns itself: functions are not copied."""
        return self


def _record(value: Any, call: _Call) -> Any:
    if id(type(value)) in _by_id:
        return value  # Its fields describe it.
    if hasattr(value, "_fields"):
        fields = value._asdict()
        functions = [name for name, field in fields.items() if callable(field)]
        if functions:
            call.constants = {name: fields[name] for name in fields.keys() - set(functions)}
            return value._replace(**{name: _public(value, name, call) for name in functions})
    elif callable(value) and not dataclasses.is_dataclass(value):
        return Recorded(checked(value, call.entry.name), call)
    raise TypeError(
        f"{call.entry.name}: a constructor returns a NamedTuple of functions or a function, got "
        f"{type(value).__name__}; decorate that class itself with @constructor"
    )


def _public(value: Any, field: str, call: _Call) -> Recorded:
    function = getattr(value, field)
    if not isinstance(function, Recorded):  # A function of another value is checked already.
        function = checked(function, f"{type(value).__name__}.{field}")
    return Recorded(function, call, field)


def _freeze(value: Any) -> _Node:
    if id(value) in _by_id:
        return _by_id[id(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)(map(_freeze, value))
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _freeze(child) for key, child in value.items()}
    is_array = isinstance(value, (np.ndarray, np.generic, jax.Array))
    if is_array and _is_number(value.dtype) and not isinstance(value, Tracer):
        kind = "jax" if isinstance(value, jax.Array) else "numpy"
        return _Array(kind, value.dtype.name, value.shape, np.asarray(value).tobytes())
    return _call_of(value) or _Opaque(value)


def _call_of(value: Any) -> _Call | None:
    if isinstance(value, Recorded):
        return value.call if value.field is None else None
    if isinstance(value, functools.partial):
        entry = _by_id.get(id(value.func))
        return entry and _Call(entry, _freeze(value.keywords), _freeze(value.args))
    entry, is_tuple = _by_id.get(id(type(value))), hasattr(value, "_fields")
    if entry is not None and is_tuple:
        return _call(entry, value._asdict())
    if entry is not None:
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return _call(entry, {name: getattr(value, name) for name in names if name != "parent"})
    if not is_tuple:
        return None
    calls = [field.call for field in value if isinstance(field, Recorded)]

    def is_original(name: str, field: Any) -> bool:
        if isinstance(field, Recorded):
            return field.call is calls[0] and field.field == name
        return name in calls[0].constants and field is calls[0].constants[name]

    return calls[0] if calls and all(map(is_original, value._fields, value)) else None


def _call(entry: _Entry, arguments: Mapping[str, Any]) -> _Call:
    """The call of an entry; omits defaults without a description, which loading fills in again."""
    nodes = {name: _freeze(value) for name, value in arguments.items()}
    left_out = [
        name
        for name, node in nodes.items()
        if isinstance(node, _Opaque) and node.value is entry.signature.parameters[name].default
    ]
    return _Call(entry, {name: node for name, node in nodes.items() if name not in left_out})


def _key(node: _Node) -> Any:
    """A hashable key, equal for equal nodes. It tells 1, 1.0 and True apart, and 0.0 from -0.0."""
    if isinstance(node, (list, tuple)):
        return type(node), *map(_key, node)
    if isinstance(node, dict):
        return dict, *((key, _key(child)) for key, child in node.items())
    return type(node), node.hex() if isinstance(node, float) else node


def describe(self: Any) -> str:
    """The call that made the value, as Python, without arguments that equal their defaults.

    It is the `__repr__` of the NamedTuples that constructors return. A value that was made by hand
    or changed by `_replace` is written with its fields instead.
    """
    node = _freeze(self)
    if isinstance(node, _Opaque) and hasattr(self, "_fields"):
        fields = (f"{name}={field!r}" for name, field in self._asdict().items())
        return f"{type(self).__name__}({', '.join(fields)})"
    return repr(node)


def to_json(value: Any) -> Any:
    """The description of a value made by constructors, as JSON values.

    Raises:
      ValueError: if a part of the value has no description; the message names the part.
    """
    return _to_json(_freeze(value), "model")


def from_json(data: Any) -> Any:
    """Builds a value from its description, by calling the constructors again.

    Raises:
      ValueError: if the data are not a description, or contain a name that is not registered, or a
        constructor raises an error.
    """
    return _from_json(data, "model")


def _to_json(node: _Node, path: str, arrays: dict[str, np.ndarray] | None = None) -> Any:
    """A node as JSON values. Its arrays are put into `arrays`, by path, if that is given."""
    if path.count("/") > _MAX_DEPTH:
        raise ValueError(f"{path} is nested more than {_MAX_DEPTH} levels deep")

    def of(child: _Node, name: Any) -> Any:
        return _to_json(child, _join(path, name), arrays)

    if isinstance(node, _Opaque):
        what = node.value
        kind = "made by hand or changed by _replace" if hasattr(what, "_fields") else repr(what)
        raise ValueError(
            f"{path} has no description: {type(what).__name__}, {kind[:100]}. Decorate the "
            "function that makes it, or its class, with @led_jax.descriptions.constructor, or name "
            "it by led_jax.descriptions.register"
        )
    if isinstance(node, _Entry):
        return {"name": node.name}
    if isinstance(node, _Call):
        arguments = {name: of(child, name) for name, child in node.arguments.items()}
        if node.positional is None:
            return {"make": node.entry.name, "arguments": arguments}
        positional = [of(child, i) for i, child in enumerate(node.positional)]
        return {"partial": node.entry.name, "positional": positional, "arguments": arguments}
    if isinstance(node, _Array):
        header = {"dtype": node.dtype, "shape": list(node.shape)}
        if arrays is not None:
            arrays[path] = node.values
            return {"leaf": header}
        return {node.kind: {**header, "data": base64.b64encode(node.data).decode()}}
    if isinstance(node, (list, tuple)):
        items = [of(child, i) for i, child in enumerate(node)]
        return items if isinstance(node, list) else {"tuple": items}
    if isinstance(node, dict):
        return {"dict": {name: of(child, name) for name, child in node.items()}}
    if isinstance(node, float) and not math.isfinite(node):
        return {"float": repr(node)}
    return node


def _from_json(data: Any, path: str, read: Callable[..., Any] | None = None) -> Any:
    """The inverse of `_to_json`; `read(path, dtype, shape)` returns what was put into `arrays`."""
    if path.count("/") > _MAX_DEPTH:
        raise ValueError(f"{path} is nested more than {_MAX_DEPTH} levels deep")

    def of(child: Any, name: Any) -> Any:
        return _from_json(child, _join(path, name), read)

    if data is None or type(data) in (bool, int, float, str):
        return data
    if isinstance(data, list):
        return [of(child, i) for i, child in enumerate(data)]
    is_dict = isinstance(data, dict) and all(isinstance(key, str) for key in data)
    match sorted(data.items()) if is_dict else ():
        case [("arguments", dict(arguments)), ("make", str(name))]:
            arguments = {key: of(child, key) for key, child in arguments.items()}
            try:
                return make(name, **arguments)
            except Exception as error:  # Damaged arguments make a constructor raise anything.
                raise ValueError(f"{path}: {error}") from error
        case [("arguments", dict(words)), ("partial", str(name)), ("positional", list(items))]:
            words = {key: of(child, key) for key, child in words.items()}
            items = [of(child, i) for i, child in enumerate(items)]
            function = _find(name, path).value
            if callable(function):
                return functools.partial(function, *items, **words)
        case [("name", str(name))]:
            return _find(name, path).value
        case [("tuple", list(items))]:
            return tuple(of(child, i) for i, child in enumerate(items))
        case [("dict", dict(items))]:
            return {key: of(child, key) for key, child in items.items()}
        case [("float", "inf" | "-inf" | "nan" as number)]:
            return float(number)
        case [("leaf", header)] if read is not None:
            return read(path, *_check_header(header, path))
        case [("numpy" | "jax" as kind, {"data": str(text), **header})]:
            dtype, shape = _check_header(header, path)
            try:
                array = np.frombuffer(base64.b64decode(text, validate=True), dtype).reshape(shape)
            except ValueError as error:
                raise ValueError(f"{path}: the array's bytes do not fit: {error}") from error
            # A copy, because an array that views a buffer of bytes is read-only.
            return _on_device(array, path) if kind == "jax" else array.copy()[()]
    raise ValueError(f"{path}: no description: {str(data)[:100]}")


def _join(path: str, name: Any) -> str:
    return f"{path}/{urllib.parse.quote(str(name), safe='')}"


def _is_number(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def _check_header(header: Any, path: str) -> tuple[np.dtype, tuple[int, ...]]:
    match header:
        case {"dtype": str(name), "shape": list(shape)} if len(header) == 2 and len(shape) <= 32:
            try:
                dtype = np.dtype(name)
            except Exception:  # NumPy raises several kinds.
                dtype = np.dtype(object)
            if _is_number(dtype) and dtype.name == name:
                if all(type(n) is int and n >= 0 for n in shape):
                    return dtype, tuple(shape)
    raise ValueError(f"{path}: no dtype and shape of an array: {str(header)[:100]}")


def _on_device(array: np.ndarray, path: str) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"{path} was saved as {array.dtype}: set jax_enable_x64 to load it")
    return jnp.asarray(array)


def _find(name: str, path: str = "descriptions", *, to_make: bool = False) -> _Entry:
    known = {key: entry for key, entry in _entries.items() if entry.signature or not to_make}
    if name not in known:
        kind = "no constructor" if name in _entries else "not registered"
        close = difflib.get_close_matches(name, known)
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"{path}: {name!r} is {kind}; import the module that registers it first. {hint}"
            f"There are {', '.join(sorted(known))}"
        )
    return known[name]


def make(name: str, /, **arguments: Any) -> Any:
    """Calls a constructor by its name.

    >>> import led_jax
    >>> led_jax.descriptions.make("real_nvp", event_shape=(2,), depth=4)
    real_nvp((2,), depth=4)

    Args:
      name: the name of a constructor.
      **arguments: its arguments by name; those of a parameter `*args` as one tuple.

    Raises:
      ValueError: if there is no such constructor, or an argument is unknown or missing.
    """
    entry = _find(name, to_make=True)
    parameters = entry.signature.parameters
    if unknown := arguments.keys() - parameters:
        raise ValueError(
            f"{name} has no argument {', '.join(sorted(unknown))}; it has {', '.join(parameters)}"
        )
    args, kwargs = (), arguments
    if not isinstance(entry.value, type):  # A class takes all of its fields by name.
        bound = inspect.BoundArguments(entry.signature, arguments)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    try:
        entry.signature.bind(*args, **kwargs)
    except TypeError as error:
        needed = [p.name for p in parameters.values() if p.default is p.empty]
        example = f"; write {name}:{','.join(f'{n}=...' for n in needed)}" if needed else ""
        raise ValueError(f"{name}: {error}; it has {', '.join(parameters)}{example}") from error
    return entry.value(*args, **kwargs)


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of a constructor, by its name.

    Raises:
      ValueError: if there is no such constructor.
    """
    return _find(name, to_make=True).signature.parameters


def arguments(value: Any) -> tuple[str, dict[str, Any]]:
    """The constructor and the arguments of a value: `make(name, **arguments)` equals the value.

    >>> import led_jax
    >>> led_jax.descriptions.arguments(led_jax.likelihoods.gaussian(0.5))
    ('gaussian', {'std': 0.5})

    Returns:
      The constructor's name, and copies of its arguments, defaults included.

    Raises:
      ValueError: if no constructor made the value, or an argument has no description.
    """
    node = _freeze(value)
    if not isinstance(node, _Call) or node.positional is not None:
        raise ValueError(f"descriptions: expected what a constructor made, got {value!r}")
    items = node.arguments.items()
    return node.entry.name, {name: _from_json(_to_json(child, name), name) for name, child in items}


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Parses the form of command-line flags, `real_nvp:depth=4,hidden=64x64,transformer=affine`.

    Values are ints, floats, true, false, none, tuples such as `64x64` or `(64, 64)`, registered
    names, calls of constructors such as `gate(bias=1)`, or strings if the constructor takes one.

    >>> import led_jax
    >>> led_jax.descriptions.parse("real_nvp:depth=4,hidden=64x64,mask=channel")
    ('real_nvp', {'depth': 4, 'hidden': (64, 64), 'mask': 'channel'})

    Returns:
      The constructor's name and the arguments given, for `make`.

    Raises:
      ValueError: if there is no such constructor, argument or value.
    """
    name, _, rest = text.partition(":")
    parameters, arguments = _find(name, to_make=True).signature.parameters, {}
    for item in _items(rest):
        key, equals, value = map(str.strip, item.partition("="))
        if not equals or key in arguments:
            raise ValueError(f"{text!r}: expected NAME:KEY=VALUE,KEY=VALUE,..., got {item!r}")
        if key not in parameters:
            raise ValueError(f"{name} has no argument {key}; it has {', '.join(parameters)}")
        arguments[key] = _parse_argument(value, parameters[key], f"{name}:{key}")
    return name, arguments


def _items(text: str) -> list[str]:
    """Splits at the commas that are outside of parentheses."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    return items if text else []


def _parse_argument(text: str, parameter: inspect.Parameter, path: str) -> Any:
    annotation = parameter.annotation
    if annotation is str or isinstance(parameter.default, str):
        return text
    value = _parse_value(text, path)
    takes_tuple = get_origin(annotation) in (tuple, Sequence) or type(parameter.default) is tuple
    if takes_tuple and isinstance(value, (int, float)):
        return (value,)
    return float(value) if annotation is float and type(value) is int else value


def _parse_value(text: str, path: str) -> Any:
    if text.startswith("(") and text.endswith(")"):
        return tuple(_parse_value(part.strip(), path) for part in _items(text[1:-1]) if part)
    if call := re.fullmatch(r"(\w+)\((.*)\)", text):
        name, arguments = parse(":".join(call.groups()))
        return make(name, **arguments)
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return _find(text, path).value


def save(path: str | os.PathLike, model: Any, params: Any) -> None:
    """Writes a model and its parameters as `model.json` and `params.npz`.

    Args:
      path: directory, created if it is missing. A model that is in it is replaced.
      model: a value made by constructors.
      params: pytree of arrays: dicts, tuples and lists, and NamedTuples decorated by `constructor`.

    Raises:
      ValueError: if a part of the model or of params has no description.
    """
    directory, arrays = pathlib.Path(path), {}
    record = {
        "format": _FORMAT,
        "model": to_json(model),
        "params": _to_json(_freeze(params), "params", arrays),
    }
    buffer = io.BytesIO()
    # Other dtypes than NumPy's own (bfloat16) are written as unsigned integers of their size.
    np.savez(buffer, **{name: array.view(_stored(array.dtype)) for name, array in arrays.items()})
    record["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    files = {
        "params.npz": buffer.getvalue(),
        "model.json": json.dumps(record, indent=1, allow_nan=False).encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f"{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:  # model.json last: until then its sum does not fit params.npz.
            os.replace(temporary[name], directory / name)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> tuple[Any, Any]:
    """Reads what `save` wrote.

    Args:
      path: the directory.

    Returns:
      The model, built by its constructors, and its parameters, a pytree of `jax.Array`.

    Raises:
      ValueError: if the files are damaged or have another format, or contain a name that is not
        registered.
      FileNotFoundError: if one of the two files is missing.
    """
    directory = pathlib.Path(path)
    file = directory / "model.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{directory} holds no model.json: expected a directory that led_jax.save wrote, or a "
            "finished run"
        )
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{file}: more than {_MAX_JSON_BYTES} bytes")
    try:
        record = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{file}: no model in format {_FORMAT}; another version wrote it")
    if record.keys() != {"format", "model", "params", "sha256"}:
        raise ValueError(f"{file}: expected format, model, params and sha256")
    data = (directory / "params.npz").read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{directory}: params.npz is not the one that model.json was saved with")
    model = from_json(record["model"])
    return model, _read_params(record["params"], data)


def _read_params(record: Any, data: bytes) -> Any:
    """The pytree of a record, whose leaves are in `data`, the bytes of an `.npz` file."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # Damaged files make `zipfile` raise anything.
        raise ValueError(f"params.npz: no archive: {error}") from error
    infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if sum(info.file_size for info in archive.infolist()) > len(data):
        raise ValueError("params.npz: its arrays are larger than the file")

    def read(path: str, dtype: np.dtype, shape: tuple[int, ...]) -> jax.Array:
        info, size = infos.pop(path, None), math.prod(shape) * dtype.itemsize
        # Compressed arrays are refused, so that no file unpacks to more than its own size.
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: missing from params.npz, or compressed")
        if not size < info.file_size <= size + _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: {info.file_size} bytes, expected a {dtype} array {shape}")
        try:
            with archive.open(info) as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file)
                content = file.read()
        except Exception as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        if version != (1, 0) or header != (shape, False, _stored(dtype)) or len(content) != size:
            raise ValueError(f"{path}: {header}, expected {dtype} and {shape}")
        return _on_device(np.frombuffer(content, _stored(dtype)).view(dtype).reshape(shape), path)

    params = _from_json(record, "params", read)
    if infos:
        raise ValueError(f"params.npz: {', '.join(infos)} is not in model.json")
    return params


def _stored(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")


for _name in ("bfloat16", "float16", "float32", "float64"):
    register(f"jax.numpy.{_name}", getattr(jnp, _name))
register("led_jax.numerics.relu", relu)
for _name in (
    "celu elu gelu hard_tanh identity leaky_relu log_sigmoid mish relu relu6 selu sigmoid silu "
    "soft_sign softplus squareplus tanh"
).split():
    register(f"jax.nn.{_name}", getattr(jax.nn, _name))
