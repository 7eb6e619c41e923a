"""Checkpoints on disk: named pytrees of arrays with a record of JSON, checked when read.

One checkpoint is one directory, `DIR/<step>`, written under another name and renamed when whole.
"""

import contextlib
import json
import logging
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from led_jax.numerics import is_key

_log = logging.getLogger(__name__)

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
    """A function that writes checkpoints while the caller computes on.

    `save(step, trees, meta)` copies the arrays of `trees`, a dict of pytrees, to the host and
    returns; a thread writes them beside `meta`, anything that JSON can hold. Leaving the context
    waits for the last one. Checkpoints of that step or later ones are replaced: a caller who
    comes past them again did not go on from them.

    Args:
      directory: directory of the run's checkpoints, made where it is missing.
      keep: number of checkpoints to keep, the newest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,
        cleanup_tmp_directories=True,
        multiprocessing_options=_alone(),
    )

    def save(step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        arrays = {name: _to_host(tree) for name, tree in trees.items()}
        record = {
            "meta": meta,
            "arrays": {name: _describe(leaves) for name, leaves in arrays.items()},
            "crc32": {
                name: {path: _crc32(leaf) for path, leaf in leaves.items()}
                for name, leaves in arrays.items()
            },
        }
        record["record_crc32"] = _record_crc32(record)
        manager.wait_until_finished()
        for other in manager.all_steps():
            if other >= step:
                manager.delete(other)
        manager.save(
            step,
            args=ocp.args.Composite(
                record=ocp.args.JsonSave(record),
                **{name: ocp.args.StandardSave(_filled(part)) for name, part in arrays.items()},
            ),
            force=True,
        )

    with ocp.CheckpointManager(directory.resolve(), options=options) as manager:
        yield save


def restore(directory: pathlib.Path, like: Mapping[str, Any]) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole, and logs a warning of each newer one.

    Args:
      directory: directory of the run's checkpoints; nothing in it is changed.
      like: pytrees of the same structure, shapes and dtypes as those saved under these names;
        `jax.eval_shape` gives them for free.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if a whole checkpoint does not fit `like`, naming what differs; or if there are
        checkpoints but none is whole.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory of checkpoints")
    paths = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    paths.sort(key=lambda path: int(path.name), reverse=True)
    for path in paths:
        try:
            record = _read_record(path, like)
        except _Damaged as error:
            _log.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
            continue
        _check_fit(path, record["arrays"], like)
        try:
            with _without_stray_tracebacks():
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


@contextlib.contextmanager
def _without_stray_tracebacks() -> Iterator[None]:
    """Keeps back what tensorstore's threads print when a read has failed beside theirs."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except _Damaged:
        time.sleep(0.5)  # The other reads end in the meantime.
        raise
    finally:
        sys.unraisablehook = hook


def _read_record(path: pathlib.Path, like: Mapping[str, Any]) -> dict[str, Any]:
    structs = [leaf for tree in like.values() for leaf in _structs(tree).values()]
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in structs)
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if size > 2 * expected + _MAX_OVERHEAD:
            raise _Damaged(f"{size} bytes, expected about {expected}")
        record = _read(ocp.JsonCheckpointHandler, path / "record", ocp.args.JsonRestore())
        if record["record_crc32"] != _record_crc32(record):
            raise _Damaged("its record has another checksum than it says")
    except (OSError, ValueError, KeyError, TypeError, UnicodeError) as error:
        raise _Damaged(f"its record cannot be read: {_one_line(error)}") from error
    return record


def _read_trees(
    path: pathlib.Path, record: dict[str, Any], like: Mapping[str, Any]
) -> dict[str, Any]:
    trees = {}
    for name, tree in like.items():
        target = _structs(tree)
        try:
            args = ocp.args.StandardRestore(_filled(target))
            filled = _read(ocp.StandardCheckpointHandler, path / name, args)
        except Exception as error:  # tensorstore's and orbax's errors have no common base
            raise _Damaged(f"{name} cannot be read: {_one_line(error)}") from error
        leaves = {
            leaf_path: filled[leaf_path] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            for leaf_path, leaf in target.items()
        }
        for leaf_path in target:
            if _crc32(leaves[leaf_path]) != record["crc32"][name][leaf_path]:
                raise _Damaged(f"{name}/{leaf_path} has another checksum than was recorded")
        trees[name] = jax.tree.unflatten(
            jax.tree.structure(tree),
            [
                jax.random.wrap_key_data(leaves[leaf_path]) if is_key(wanted) else leaves[leaf_path]
                for leaf_path, wanted in zip(target, jax.tree.leaves(tree), strict=True)
            ],
        )
    return trees


def _read(handler: Callable[..., ocp.CheckpointHandler], path: pathlib.Path, args: Any) -> Any:
    reader = handler(multiprocessing_options=_alone())
    with ocp.Checkpointer(reader, multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(path.resolve(), args)


def _alone() -> ocp.options.MultiprocessingOptions:
    """A process reads and writes by itself: the others may have no such directory."""
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="checkpoints",
    )


def _check_fit(path: pathlib.Path, arrays: dict[str, Any], like: Mapping[str, Any]) -> None:
    differing = []
    for name, tree in like.items():
        there, here = arrays.get(name, {}), _describe(_structs(tree))
        differing += [
            f"{name}/{leaf} is {there.get(leaf, 'missing')} there and {here.get(leaf, 'missing')} "
            "here"
            for leaf in dict.fromkeys([*here, *there])
            if here.get(leaf) != there.get(leaf)
        ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"checkpoint {path} is of another model or optimizer: {'; '.join(differing[:3])}{more}"
        )


def _flatten(tree: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): convert(leaf)
        for path, leaf in leaves
    }


def _to_host(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by path, copied: the caller may give the originals away."""
    return _flatten(tree, lambda x: np.array(jax.random.key_data(x) if is_key(x) else x))


def _structs(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """As `_to_host`, of abstract arrays."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype)

    return _flatten(tree, struct)


def _filled(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with entries: the library writes no others, as a stack of no layers has."""
    return {path: leaf for path, leaf in leaves.items() if leaf.size}


def _describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def _crc32(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _record_crc32(record: Mapping[str, Any]) -> int:
    content = {name: record[name] for name in ("meta", "arrays", "crc32")}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
