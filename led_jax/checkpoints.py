"""Checkpoints on disk: named pytrees of arrays with a JSON record, verified when they are read.

One checkpoint is one directory, `DIR/<step>`, written under a temporary name and renamed when
complete. It holds all arrays as one string of bytes, and a record of their paths, dtypes and shapes
in the same order. This keeps any dtype, and pytrees without leaves; and because everything is read
at once, a read that fails leaves no other read pending.
"""

import contextlib
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from led_jax.numerics import is_key

_log = logging.getLogger(__name__)

FORMAT = 2
"""Number of the checkpoint format: it is the only one written and the only one read."""

# A checkpoint's files may take this many bytes more than twice its arrays.
_MAX_OVERHEAD = 64 * 2**20

Save = Callable[[int, Mapping[str, Any], Mapping[str, Any]], None]


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
      path: its directory.
      trees: the pytrees by name, of NumPy arrays and typed keys.
      meta: the record.
    """

    path: pathlib.Path
    trees: dict[str, Any]
    meta: dict[str, Any]


@contextlib.contextmanager
def saver(directory: pathlib.Path, keep: int = 2) -> Iterator[Save]:
    """A context manager whose value is a function that writes checkpoints in the background.

    `save(step, trees, meta)` copies the arrays of `trees`, a dict of pytrees, to the host and
    returns; a thread then writes them together with `meta`, a dict of JSON values. `restore` can
    compare `meta["model"]`, a description of the model. Leaving the context waits for the last
    write. `save` deletes existing checkpoints of the same step or later ones: a run that reaches
    their step once more did not continue from them.

    Args:
      directory: directory of the run's checkpoints, created if it is missing.
      keep: number of checkpoints to keep; the newest ones are kept.

    Raises:
      OSError: from a save, or on leaving, if a checkpoint cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,
        cleanup_tmp_directories=True,
        multiprocessing_options=_alone(),
    )

    def save(step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        leaves = {name: _to_host(tree) for name, tree in trees.items()}
        record = {
            "format": FORMAT,
            "meta": meta,
            "arrays": {name: _describe(arrays) for name, arrays in leaves.items()},
        }
        flat = [array for arrays in leaves.values() for array in arrays.values()]
        # One byte in front, for trees without leaves: an array of length zero is not written.
        content = b"".join([b"\0", *(array.tobytes() for array in flat)])
        record["crc32"] = zlib.crc32(content)
        record["record_crc32"] = _record_crc32(record)
        with _written(directory):
            manager.wait_until_finished()
            for other in manager.all_steps():
                if other >= step:
                    manager.delete(other)
            manager.save(
                step,
                args=ocp.args.Composite(
                    record=ocp.args.JsonSave(record),
                    arrays=ocp.args.StandardSave({"bytes": np.frombuffer(content, np.uint8)}),
                ),
                force=True,
            )

    manager = ocp.CheckpointManager(directory.resolve(), options=options)
    try:
        yield save
    finally:
        with _written(directory):
            manager.close()


@contextlib.contextmanager
def _written(directory: pathlib.Path) -> Iterator[None]:
    """Turns errors of writing into an OSError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:  # tensorstore's and orbax's errors have no common base
        paths = _paths(directory)
        last = f"the last good one is {paths[0]}" if paths else "there is no earlier one"
        reason = str(error).partition("\n")[0]
        raise OSError(f"a checkpoint cannot be written to {directory}, {last}: {reason}") from error


def _paths(directory: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints in a directory, newest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    paths = [path for path in found if path.name.isdecimal() and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name), reverse=True)


def restore(
    directory: pathlib.Path, like: Mapping[str, Any], model: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """Reads the newest undamaged checkpoint, and logs a warning for each newer, damaged one.

    Args:
      directory: directory of the run's checkpoints; nothing in it is changed.
      like: pytrees by name, with the structure, shapes and dtypes of those that were saved;
        `jax.eval_shape` makes them without computing anything.
      model: a description of the model in JSON values, which must equal the one saved as
        `meta["model"]`; None does not compare.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if an undamaged checkpoint has another format, or does not fit `like` or `model`,
        naming what differs; or if there are checkpoints but all are damaged.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory of checkpoints")
    paths: list[pathlib.Path] = []
    while (found := _paths(directory)) != paths:  # A running job may replace them.
        paths = found
        for path in paths:
            try:
                record = _read_record(path)
                _check_format(path, record)
                _check_model(path, record["meta"], model)
                _check_fit(path, record["arrays"], like)
                return Checkpoint(path, _read_trees(path, record, like), record["meta"])
            except _Damaged as error:
                _log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
    if paths:
        raise ValueError(
            f"all {len(paths)} checkpoints in {directory} are damaged; start again in a new "
            "directory"
        )
    return None


class _Damaged(Exception):
    """A checkpoint that does not hold what was written."""


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = _read(ocp.JsonCheckpointHandler, path / "record", ocp.args.JsonRestore())
        if record["record_crc32"] != _record_crc32(record):
            raise _Damaged("its record has another checksum than it says")
    except (OSError, ValueError, KeyError, TypeError, UnicodeError) as error:
        raise _Damaged(f"its record cannot be read: {_one_line(error)}") from error
    return record


def _read_trees(
    path: pathlib.Path, record: dict[str, Any], like: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = {
        name: [math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in arrays.values()]
        for name, arrays in record["arrays"].items()
    }
    total = 1 + sum(map(sum, sizes.values()))
    target = {"bytes": jax.ShapeDtypeStruct((total,), np.uint8)}
    try:
        on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if on_disk > 2 * total + _MAX_OVERHEAD:
            raise _Damaged(f"{on_disk} bytes, expected about {total}")
        args = ocp.args.StandardRestore(target)
        content = _read(ocp.StandardCheckpointHandler, path / "arrays", args)["bytes"]
    except _Damaged:
        raise
    except Exception as error:  # tensorstore's and orbax's errors have no common base
        raise _Damaged(f"its arrays cannot be read: {_one_line(error)}") from error
    content = np.asarray(content)
    if zlib.crc32(content.tobytes()) != record["crc32"]:
        raise _Damaged("its arrays have another checksum than was recorded")
    leaves, start = {}, 1
    for name, arrays in record["arrays"].items():
        leaves[name] = []
        for (dtype, shape), size in zip(arrays.values(), sizes[name], strict=True):
            array = np.frombuffer(content[start : start + size].tobytes(), jnp.dtype(dtype))
            leaves[name].append(array.reshape(shape))
            start += size
    return {name: _unflatten(tree, leaves[name]) for name, tree in like.items()}


def _unflatten(like: Any, leaves: list[np.ndarray]) -> Any:
    wanted, treedef = jax.tree.flatten(like)

    def wrap(leaf: np.ndarray, dtype: Any) -> Any:
        impl = jax.random.key_impl(jnp.empty((), dtype))  # Needs a concrete key.
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=impl)

    return treedef.unflatten(
        wrap(leaf, old.dtype) if is_key(old) else leaf
        for old, leaf in zip(wanted, leaves, strict=True)
    )


def _read(handler: Callable[..., ocp.CheckpointHandler], path: pathlib.Path, args: Any) -> Any:
    reader = handler(multiprocessing_options=_alone())
    with ocp.Checkpointer(reader, multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path.resolve(), args)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Each process reads and writes by itself: the others may not see this directory."""
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="checkpoints",
    )


def _check_format(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    number = record.get("format")
    if number is None:
        raise ValueError(
            f"checkpoint {path} was written by an earlier version of led_jax, whose parameters lie "
            "otherwise; train again, or use commit 290305c, the last that reads it"
        )
    if number != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {number}, but this version of led_jax reads format "
            f"{FORMAT}; train again, or use the version that wrote it"
        )


def _check_model(
    path: pathlib.Path, meta: Mapping[str, Any], model: Mapping[str, Any] | None
) -> None:
    if model is None:
        return
    there, here = _entries(meta.get("model")), _entries(json.loads(json.dumps(model)))
    _raise_differing(f"checkpoint {path} is of another model", there, here)


def _check_fit(path: pathlib.Path, arrays: dict[str, Any], like: Mapping[str, Any]) -> None:
    def described(arrays: Mapping[str, Any]) -> dict[str, str]:
        return {
            f"{name}/{leaf}": f"{dtype}{list(shape)}"
            for name in like
            for leaf, (dtype, shape) in arrays.get(name, {}).items()
        }

    here = {name: _describe(_structs(tree)) for name, tree in like.items()}
    what = f"checkpoint {path} is of another model or optimizer"
    _raise_differing(what, described(arrays), described(here))
    for name in like:
        if name not in arrays:  # A tree without leaves.
            raise ValueError(f"{what}: {name} is missing there")


def _raise_differing(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    differing = [
        f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(f"{what}: {'; '.join(differing[:3])}{more}")


def _entries(value: Any, path: str = "model") -> dict[str, str]:
    """The leaves of nested JSON as JSON text, by their path."""
    if isinstance(value, dict) and value:
        nested = [_entries(entry, f"{path}/{name}") for name, entry in value.items()]
    elif isinstance(value, list) and value:
        nested = [_entries(entry, f"{path}/{i}") for i, entry in enumerate(value)]
    else:
        return {path: json.dumps(value)}
    return {name: text for entries in nested for name, text in entries.items()}


def _flatten(tree: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): convert(leaf)
        for path, leaf in leaves
    }


def _to_host(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by path, as NumPy arrays; those of PRNG keys are their raw data."""
    return _flatten(tree, lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x))


def _structs(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `_to_host` returns, also for abstract arrays."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype)

    return _flatten(tree, struct)


def _describe(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves.items()}


def _record_crc32(record: Mapping[str, Any]) -> int:
    content = {name: value for name, value in record.items() if name != "record_crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
