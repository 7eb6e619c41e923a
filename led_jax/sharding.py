"""The same per-device function on several devices, of one process or of several.

A function written for one device names the mapped axis `AXIS`; `compile` runs it on all devices of
a mesh, under `jax.pmap` or `jax.shard_map`, without changing it. Arguments are the same on every
device (`replicate`) or one slice for each (`split`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from led_jax.numerics import is_key

AXIS = "devices"
"""Name of the mapped axis."""

METHODS = ("pmap", "shard_map")


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh with one axis, `AXIS`, in the order of the processes.

    Args:
      num_devices: devices of each process; 0 takes all it has.

    Raises:
      ValueError: if a process has fewer.
    """
    available = jax.local_device_count()
    if not 0 <= num_devices <= available:
        raise ValueError(
            f"expected 1 to {available} {jax.default_backend()} devices (0 takes all), got "
            f"{num_devices}; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU"
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)[: num_devices or None]
    ]
    return Mesh(np.array(chosen), (AXIS,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, the same in every process, on every device of a mesh."""
    return _put(mesh, PartitionSpec(), tree)


def split(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays with a slice of the first axis on each device of a mesh.

    Args:
      mesh: the mesh.
      tree: arrays `[number of this process's devices, ...]`.
    """
    return _put(mesh, PartitionSpec(AXIS), tree)


def local(tree: Any) -> Any:
    """The tree of `replicate`, as this process's first device holds it."""

    def first(x: jax.Array) -> jax.Array:
        if is_key(x):
            return jax.random.wrap_key_data(first(jax.random.key_data(x)))
        return x.addressable_data(0)

    return jax.tree.map(first, tree)


def fetch(tree: Any) -> Any:
    """The tree's arrays as NumPy ones, those that are split over several processes included."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def local_positions(mesh: Mesh) -> np.ndarray:
    """Where this process's devices stand in the mesh."""
    here = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    return np.flatnonzero(here)


def broadcast(tree: Any) -> Any:
    """The first process's tree, in every process; the others pass one of the same structure."""
    if jax.process_count() == 1:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    plain = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    sent = multihost_utils.broadcast_one_to_all(plain)
    return treedef.unflatten(
        jax.random.wrap_key_data(x) if is_key(old) else x
        for x, old in zip(sent, leaves, strict=True)
    )


def _put(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return multihost_utils.host_local_array_to_global_array(tree, mesh, spec)


def compile(
    fn: Callable[..., Any],
    mesh: Mesh,
    *args: Any,
    split_args: Sequence[int] = (),
    split_output: bool = False,
    donate_args: Sequence[int] = (),
    method: str = "pmap",
) -> Callable[..., Any]:
    """Compiles a function of one device for all devices of a mesh.

    Args:
      fn: the function, which may use collectives over `AXIS`.
      mesh: from `make_mesh`.
      *args: examples of its arguments, from `replicate` or `split`.
      split_args: which of the arguments are from `split`; `fn` gets its slice without the axis.
      split_output: whether the devices' outputs differ: they are stacked along a new first axis.
        Otherwise `fn` must return the same on every device.
      donate_args: arguments whose buffers the outputs may use.
      method: one of `METHODS`.

    Returns:
      A compiled function of such arguments, with global arrays for its result.

    Raises:
      ValueError: if the method is unknown.
    """
    if method == "pmap":
        # pmap wants an argument with a mapped axis, which not every function has.
        mapped = jax.pmap(
            lambda _, *args: fn(*args),
            AXIS,
            in_axes=(0, *(0 if i in split_args else None for i in range(len(args)))),
            out_axes=0 if split_output else None,
            devices=list(mesh.devices.flat),
            donate_argnums=[1 + i for i in donate_args],
        )
        index = split(mesh, np.arange(mesh.local_mesh.size))
        compiled = mapped.lower(index, *args).compile()
        return lambda *args: compiled(index, *args)
    if method != "shard_map":
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

    def sliced(*args: Any) -> Any:
        result = fn(
            *(
                jax.tree.map(lambda x: x[0], arg) if i in split_args else arg
                for i, arg in enumerate(args)
            )
        )
        return jax.tree.map(lambda x: x[None], result) if split_output else result

    specs = [PartitionSpec(AXIS) if i in split_args else PartitionSpec() for i in range(len(args))]
    mapped = jax.shard_map(
        sliced,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=PartitionSpec(AXIS) if split_output else PartitionSpec(),
        check_vma=False,  # Gradients are averaged by the function itself, as under pmap.
    )
    return jax.jit(mapped, donate_argnums=donate_args).lower(*args).compile()
