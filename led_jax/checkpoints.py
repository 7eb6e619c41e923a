"""Checkpoints on disk: the last and the best state of a run, and what is known of it.

One checkpoint is one directory, `DIR/<epoch>`, written under another name and renamed when whole.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from led_jax.training import TrainState

_KEEP = 2


def save(directory: pathlib.Path, last: TrainState, best: TrainState, meta: dict[str, Any]) -> None:
    """Writes a checkpoint, and removes all but the newest two.

    Args:
      directory: directory of the run's checkpoints.
      last: the state to go on from.
      best: the state to evaluate.
      meta: anything that JSON can hold.
    """
    items = ocp.args.Composite(
        last=ocp.args.StandardSave(_to_host(last)),
        best=ocp.args.StandardSave(_to_host(best)),
        meta=ocp.args.JsonSave(meta),
    )
    with _manager(directory) as manager:
        manager.save(int(last.epoch), args=items, force=True)


def restore(
    directory: pathlib.Path, like: TrainState
) -> tuple[TrainState, TrainState, dict[str, Any]] | None:
    """Reads the newest checkpoint.

    Args:
      directory: directory of the run's checkpoints.
      like: a state of the same structure, shapes and dtypes; `jax.eval_shape` gives one for free.

    Returns:
      `(last, best, meta)` as they were saved, or None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint does not fit `like`.
    """
    if not directory.is_dir():
        return None
    target = like._replace(key=jax.eval_shape(jax.random.key_data, like.key))
    items = ocp.args.Composite(
        last=ocp.args.StandardRestore(target),
        best=ocp.args.StandardRestore(target),
        meta=ocp.args.JsonRestore(),
    )
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        try:
            restored = manager.restore(step, args=items)
            for name in ("last", "best"):
                jax.tree.map(_check_shape, target, restored[name])
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"checkpoint {directory / str(step)} cannot be read as a run of this "
                f"configuration: {error}"
            ) from error
    last, best = (
        state._replace(key=jax.random.wrap_key_data(state.key))
        for state in (restored["last"], restored["best"])
    )
    return last, best, restored["meta"]


def _manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(directory.resolve(), options=options)


def _check_shape(expected: Any, actual: Any) -> None:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise ValueError(
            f"expected an array {expected.dtype}{list(expected.shape)}, "
            f"it holds {actual.dtype}{list(actual.shape)}"
        )


def _to_host(state: TrainState) -> TrainState:
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.array, state)
