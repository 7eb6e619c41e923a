"""Meshes, and the placement of arrays on their devices, in one process or in several.

Programs are written for whole batches. `jit` distributes them by the placement of their arrays: the
rows of a batch are split over the mesh, everything else is replicated. Only `broadcast` treats a
single process differently from several.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from led_jax.checks import checked
from led_jax.numerics import is_key

AXIS = "rows"
"""Name of the mesh's axis, over which the rows of a batch are split."""

METHODS = ("jit", "pmap")
"""Ways in which `training.epochs` uses several devices."""


@checked
def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh with one axis, `AXIS`, in the order of the processes.

    Args:
      num_devices: number of devices of each process; 0 takes all of them.

    Raises:
      ValueError: if this process has fewer devices.
    """
    available = jax.local_device_count()
    if not 0 <= num_devices <= available:
        raise ValueError(
            f"expected 1 to {available} {jax.default_backend()} devices (0 takes all), got "
            f"num_devices={num_devices}; XLA_FLAGS=--xla_force_host_platform_device_count=N makes "
            "N of a CPU"
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)[: num_devices or None]
    ]
    return Mesh(np.array(chosen), (AXIS,))


class Placement(NamedTuple):
    """The placement of arrays on the devices of a mesh.

    Attributes:
      mesh: from `make_mesh`.
    """

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array of which every device holds a full copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    def rows(self, axis: int = 0) -> NamedSharding:
        """The sharding of an array whose given axis is split evenly over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def replicate(self, tree: Any) -> Any:
        """Puts the arrays of a tree, which must be the same in every process, on every device."""

        def put(x: Any) -> Array:
            if is_key(x):
                return jax.random.wrap_key_data(
                    put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
                )
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, self.replicated, lambda i: host[i])

        return jax.tree.map(put, tree)

    def split(self, shape: tuple[int, ...], read: Callable[[Any], Any], axis: int = 0) -> Array:
        """An array whose given axis is split over the devices; each process reads only its parts.

        Args:
          shape: shape of the whole array.
          read: maps the slices of a part, one for each axis, to the part.
          axis: the axis that is split.
        """
        return jax.make_array_from_callback(shape, self.rows(axis), read)


def one_device() -> Placement:
    """The placement of a process that computes on its first device alone."""
    return Placement(Mesh(np.array(jax.local_devices()[:1]), (AXIS,)))


def broadcast(tree: Any) -> Any:
    """The tree of the first process, in every process; the others pass a tree like it."""
    if jax.process_count() == 1:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    plain = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    sent = multihost_utils.broadcast_one_to_all(plain)
    return treedef.unflatten(
        jax.random.wrap_key_data(x) if is_key(old) else x
        for x, old in zip(sent, leaves, strict=True)
    )
