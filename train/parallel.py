"""Training on many devices: where the state and the batch lie, and what devices exchange for a gradient.

  state     parameters and both moments, cut over `fsdp`, experts also over `node` and `expert`, expert layers over `stage`;
            copies over `data` and `context`
  batch     rows, cut over all axes but `context`; copies over that one, of which each device takes its own tokens

  a step    gather parameters over `fsdp`     each device: gradient of its tokens   add up over `data` and `context`,
            (all-gather)                      (kernels see whole matrices)          add up and cut over `fsdp`
                                                                                    (all-reduce, reduce-scatter)

Parameters are gathered once a step, whatever the number of microbatches: what optimizers keep, and masters, take a share of each
device's memory (ZeRO-1 and 2), gathered parameters and a step's gradient all of theirs. Or they are gathered where they are used,
those of a block by the block (ZeRO-3, `deepseek_jax.gather`), and gradients are added up and cut there: whole ones of one block
exist at a time, and travel once for each microbatch and pass. What is no expert's is then cut over `node` and `expert`, too.
Experts stay where they are, and rows of tokens travel to them (`deepseek_jax.sharding.ExpertParallel`), so their gradients are
whole but for `data`, `fsdp` and `context`. Every device's loss is its share of the batch's, so all that is exchanged beside is added up.

Expert layers are cut over `stage`, and rows pass through them (`deepseek_jax.stages`): their parameters and gradients stay where
they are. All else counts each device's rows, as along `data`.

Long sequences are cut over `context` (`deepseek_jax.sharding.ContextParallel`). What follows and what precedes a token, its target
and its document, is read off the whole row. Else it meets others in attention only: there the normalised latents and rotated keys of the
sequence are gathered, C + R values a token, in every layer's forward pass and where that is computed again, and every device
projects them up; their gradients are added up and cut. Between the passes a block keeps its own tokens only: under 'paper' and
'full', while 'dots' keeps products, the keys and values of whole sequences among them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax import names, sharding
from deepseek_jax.config import check_types, require_positive
from deepseek_jax.sharding import ContextParallel, ExpertParallel, Parallel, StageParallel


class Layout(NamedTuple):
    """The devices that a step is cut over.

    Attributes:
      mesh: with the axes of `deepseek_jax.sharding`.
      parallel: what a device fetches from the others while it computes.
    """

    mesh: Mesh
    parallel: Parallel = sharding.ALONE

    @property
    def row_devices(self) -> int:
        """Devices that the rows of a batch are cut over."""
        return self.mesh.size // self.parallel.context.devices

    @property
    def row_multiple(self) -> int:
        """What the rows of every batch and microbatch are a multiple of."""
        return self.row_devices * self.parallel.stages.parts

    @property
    def batch(self) -> NamedSharding:
        """Where the rows of a batch lie."""
        return NamedSharding(self.mesh, sharding.BATCH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices there are along each axis.

    Attributes:
      data: copies of the state.
      fsdp: devices that one copy is cut over.
      expert: devices that its experts are cut over.
      expert_nodes: nodes that these are on. More than one: rows travel to a node first, and there to its devices.
      capacity_factor: what a device has room for, as a multiple of what comes to it when all experts are used evenly; what
        exceeds it is not computed, and counted in the metrics. None makes room for everything.
      zero: what of ZeRO there is: 1, parameters are gathered once a step; 3, where they are used, and what is no expert's is
        cut over the experts' devices, too.
      context: devices that each sequence is cut over, for sequences whose activations exceed one device.
      stage: devices that the expert layers are cut over, as the stages of a pipeline.
      stage_parts: microbatches that the rows of a device pass through them in: more of them leave less time unused.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    expert_nodes: int = 1
    capacity_factor: float | None = None
    zero: Literal[1, 3] = 1
    context: int = 1
    stage: int = 1
    stage_parts: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ('data', 'fsdp', 'expert', 'expert_nodes', 'context', 'stage', 'stage_parts')
        require_positive(self, *sizes, 'capacity_factor')
        if self.expert % self.expert_nodes:
            raise ValueError(f'MeshConfig.expert={self.expert} must be a multiple of expert_nodes={self.expert_nodes}')
        if self.capacity_factor is not None and self.expert == 1:
            raise ValueError(f'MeshConfig.capacity_factor={self.capacity_factor} needs expert above 1')
        if self.stage_parts > 1 and self.stage == 1:
            raise ValueError(f'MeshConfig.stage_parts={self.stage_parts} needs stage above 1')

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.row_devices * self.context

    @property
    def row_devices(self) -> int:
        """Devices that the rows of every batch and microbatch are cut over."""
        return self.data * self.stage * self.fsdp * self.expert

    @property
    def row_multiple(self) -> int:
        """What the rows of every batch and microbatch must be a multiple of."""
        return self.row_devices * self.stage_parts

    def __str__(self) -> str:
        return (
            f'data={self.data} x stage={self.stage} x fsdp={self.fsdp} x expert={self.expert} x context={self.context}'
        )

    def make(self, devices: Sequence[Any] | None = None) -> Layout | None:
        """The layout on the first devices; None of one device, which cuts nothing.

        Raises:
          ValueError: there are not as many, or, of several processes, more.
        """
        if devices is None:
            devices = jax.devices()
            if jax.process_count() > 1 and self.size != len(devices):
                raise ValueError(
                    f'parallel.MeshConfig is of {self.size} devices ({self}): {jax.process_count()} processes must train on all '
                    f'of their {len(devices)}'
                )
        if self.size > len(devices):
            raise ValueError(f'MeshConfig: {self} are {self.size} devices, there are {len(devices)}')
        if self.size == 1:
            return None
        mesh = sharding.make_mesh(
            data=self.data,
            fsdp=self.fsdp,
            node=self.expert_nodes,
            expert=self.expert // self.expert_nodes,
            context=self.context,
            stage=self.stage,
            devices=devices[: self.size],
        )
        hops = tuple(axis for axis in sharding.EXPERT_AXES if mesh.shape[axis] > 1)
        experts = ExpertParallel(hops, self.capacity_factor) if hops else None
        stages = StageParallel(self.stage, self.stage_parts)
        return Layout(mesh, Parallel(experts, self.zero == 3, ContextParallel(self.context), stages))


def row_share(layout: Layout | None) -> tuple[int, int]:
    """Which share of the rows of a batch this process reads, and how many there are.

    Processes whose devices hold the same rows have the same share.

    Raises:
      ValueError: some rows are in two processes that do not have all of theirs in common.
    """
    if layout is None:
        return 0, 1
    held = _held_rows(layout)
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != layout.row_devices or len(set(map(len, shares))) != 1:
        raise ValueError(
            f'parallel.MeshConfig: context={layout.parallel.context.devices} cuts processes so that they have some of their rows '
            'in common and not all: it must be a multiple or a divisor of the devices of a process'
        )
    return shares.index(held[jax.process_index()]), len(shares)


def is_first_of_share(layout: Layout | None) -> bool:
    """Whether no process before this one has the same rows."""
    if layout is None:
        return True
    held = _held_rows(layout)
    return all(rows != held[jax.process_index()] for process, rows in held.items() if process < jax.process_index())


@functools.cache
def _held_rows(layout: Layout) -> dict[int, tuple[int, ...]]:
    """Of each process, which of as many rows as there are devices for rows it holds."""
    held: dict[int, set[int]] = {}
    for device, (rows,) in layout.batch.devices_indices_map((layout.row_devices,)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return {process: tuple(sorted(rows)) for process, rows in held.items()}


def places(tree: Any, params: Any, layout: Layout | None, alone: Any = None) -> Any:
    """Where each leaf of a tree (of arrays or shapes) lies: what bears a parameter's path, at its end, as the parameter.

    Everything else, and everything without a layout, lies whole on each device.

    Args:
      tree: a state, or a part of one.
      params: the parameters.
      layout: the devices; None is one alone.
      alone: that one; None is the first of JAX.

    Raises:
      ValueError: a parameter's dimension is not a multiple of the mesh axis that it is cut over.
    """
    if layout is None:
        here = SingleDeviceSharding(jax.devices()[0] if alone is None else alone)
        return jax.tree.map(lambda _: here, tree)
    table: dict[tuple[str, ...], NamedSharding] = {}
    names.map_with_names(
        lambda path, place: table.setdefault(path, place),
        sharding.param_shardings(params, layout.mesh, layout.parallel.gather),
    )
    whole = NamedSharding(layout.mesh, PartitionSpec())

    def place(path: tuple[str, ...], _: Any) -> NamedSharding:
        ends = (path[start:] for start in range(len(path)))
        return next((table[end] for end in ends if end in table), whole)

    return names.map_with_names(place, tree)


def put(tree: Any, places: Any) -> Any:
    """Arrays that each process has whole, on the host or a device, put in places that may be of several processes."""

    def one(leaf: Any, place: jax.sharding.Sharding) -> jax.Array:
        if place.is_fully_addressable:
            return jax.device_put(leaf, place)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(one, tree, places)


def over_devices(function: Callable, layout: Layout, params: Any, gradients: bool = True) -> Callable:
    """A function of whole parameters, a device's rows and anything else, made one of cut parameters and whole batches.

    Args:
      function: returns gradients, a tree like the parameters, or None, and a tree of shares that add up to the batch's.
      layout: the devices.
      params: of arrays or shapes.
      gradients: whether it returns some.
    """
    gather = layout.parallel.gather
    specs = jax.tree.map(lambda place: place.spec, sharding.param_shardings(params, layout.mesh, gather))

    def local(params: Any, batch: Any, *others: Any) -> tuple[Any, Any]:
        whole = params if gather else jax.tree.map(_gathered, params, specs)
        found, shares = function(whole, batch, *others)
        if gradients:
            found = found if gather else jax.tree.map(_cut, found, specs)
            found = jax.tree.map(_summed_over_copies, found, specs)
        return found if gradients else None, jax.lax.psum(shares, sharding.AXES)

    def call(params: Any, batch: Any, *others: Any) -> tuple[Any, Any]:
        region = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(specs, sharding.BATCH, *(PartitionSpec() for _ in others)),
            out_specs=(specs if gradients else None, PartitionSpec()),
            check_vma=False,
        )
        return region(params, batch, *others)

    return call


@jax.named_scope('gather')
def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dimension in _fsdp(spec):
        leaf = jax.lax.all_gather(leaf, 'fsdp', axis=dimension, tiled=True)
    return leaf


@jax.named_scope('reduce')
def _cut(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    for dimension in _fsdp(spec):
        leaf = jax.lax.psum_scatter(leaf, 'fsdp', scatter_dimension=dimension, tiled=True)
    return leaf


def _fsdp(spec: PartitionSpec) -> list[int]:
    return [dimension for dimension, axis in enumerate(spec) if axis == 'fsdp']


@jax.named_scope('reduce')
def _summed_over_copies(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    cut = {axis for entry in spec for axis in sharding.axes_of(entry)}
    return jax.lax.psum(leaf, tuple(axis for axis in sharding.AXES if axis not in cut))
