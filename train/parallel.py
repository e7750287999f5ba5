"""Training on many devices: where the state and the batch lie, and what devices exchange for a gradient.

  state     parameters and both moments, cut over `fsdp`; copies over `data`
  batch     rows, cut over all axes

  a step    gather parameters over `fsdp`     each device: gradient of its rows     add up over `data`, add up and cut over `fsdp`
            (all-gather)                      (no exchange: kernels see whole        (all-reduce, reduce-scatter)
                                              matrices and their own rows)

Parameters are gathered once a step, whatever the number of microbatches: what optimizers keep, and masters, take a share of each
device's memory (ZeRO-1 and 2), gathered parameters and a step's gradient all of theirs. Every device's loss is its share of the
batch's, so all that is exchanged beside is added up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax import names, sharding
from deepseek_jax.config import check_types, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices there are along each axis.

    Attributes:
      data: copies of the state.
      fsdp: devices that one copy is cut over.
    """

    data: int = 1
    fsdp: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'data', 'fsdp')

    @property
    def size(self) -> int:
        """Devices in all; every batch and microbatch is cut into as many parts."""
        return self.data * self.fsdp

    def make(self) -> Mesh | None:
        """The mesh of the first devices; None of one device, which cuts nothing. Raises `ValueError` if there are not as many."""
        if self.size > (present := jax.device_count()):
            raise ValueError(
                f'MeshConfig: data={self.data} x fsdp={self.fsdp} are {self.size} devices, there are {present}'
            )
        if self.size == 1:
            return None
        return sharding.make_mesh(data=self.data, fsdp=self.fsdp, devices=jax.devices()[: self.size])


def places(tree: Any, params: Any, mesh: Mesh | None) -> Any:
    """Where each leaf of a tree (of arrays or shapes) lies: what bears a parameter's path, at its end, as the parameter.

    Everything else, and everything without a mesh, lies whole on each device.

    Args:
      tree: a state, or a part of one.
      params: the parameters.
      mesh: the devices; None is the first one alone.

    Raises:
      ValueError: a parameter's dimension is not a multiple of the mesh axis that it is cut over.
    """
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), tree)
    table: dict[tuple[str, ...], NamedSharding] = {}
    names.map_with_names(lambda path, place: table.setdefault(path, place), sharding.param_shardings(params, mesh))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[str, ...], _: Any) -> NamedSharding:
        ends = (path[start:] for start in range(len(path)))
        return next((table[end] for end in ends if end in table), whole)

    return names.map_with_names(place, tree)


def over_devices(function: Callable, mesh: Mesh, params: Any, gradients: bool = True) -> Callable:
    """A function of whole parameters, a device's rows and anything else, made one of cut parameters and whole batches.

    Args:
      function: returns gradients, a tree like the parameters, or None, and a tree of shares that add up to the batch's.
      mesh: the devices.
      params: of arrays or shapes.
      gradients: whether it returns some.
    """
    specs = jax.tree.map(lambda place: place.spec, sharding.param_shardings(params, mesh))

    def local(params: Any, batch: Any, *others: Any) -> tuple[Any, Any]:
        found, shares = function(jax.tree.map(_gathered, params, specs), batch, *others)
        found = jax.tree.map(_summed, found, specs) if gradients else None
        return found, jax.lax.psum(shares, sharding.AXES)

    def call(params: Any, batch: Any, *others: Any) -> tuple[Any, Any]:
        region = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, sharding.BATCH, *(PartitionSpec() for _ in others)),
            out_specs=(specs if gradients else None, PartitionSpec()),
            check_vma=False,
        )
        return region(params, batch, *others)

    return call


@jax.named_scope('gather')
def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dimension, axis in enumerate(spec):
        if axis is not None:
            leaf = jax.lax.all_gather(leaf, axis, axis=dimension, tiled=True)
    return leaf


@jax.named_scope('reduce')
def _summed(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    cut = [axis for axis in spec if axis is not None]
    for dimension, axis in enumerate(spec):
        if axis is not None:
            leaf = jax.lax.psum_scatter(leaf, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(leaf, tuple(axis for axis in sharding.AXES if axis not in cut))
