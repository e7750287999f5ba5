"""Where arrays live: mesh axes, and the rule from dimension letters to mesh axes.

A parameter's sharding is read off its name: `w_up_EDF` of stacked expert layers is sharded
`P('stage', ('node', 'expert'), 'fsdp', None)`. Axes are of type Auto: outside `jax.shard_map` the compiler places the collectives.

  data     replicates parameters, splits the batch
  stage    splits the expert layers, one stretch a device, and the batch
  fsdp     splits parameters and the batch
  node     splits the experts and the batch: nodes that the experts of one copy lie on
  expert   splits the experts of a node and the batch
  context  splits the tokens of each sequence
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Num, Shaped

from deepseek_jax import names
from deepseek_jax.config import MoEConfig

EXPERT_AXES = ('node', 'expert')
STAGE_AXIS = 'stage'
ROW_AXES = ('data', STAGE_AXIS, 'fsdp', *EXPERT_AXES)
CONTEXT_AXIS = 'context'
AXES = (*ROW_AXES, CONTEXT_AXIS)
BATCH = PartitionSpec(ROW_AXES)
"""The batch, a leading B axis, is split over every mesh axis but the last; its rows are whole sequences."""

_PREFERENCE = 'DVFHQCNUR'
"""A matrix is cut along the first of these letters that it has: heads only where the axis divides them. Parts of ranks (Q, C) would
seldom be whole blocks of 128, which float8 copies of parts are made of."""
_SECOND_PREFERENCE = 'DQC'
"""And by the outer axes along the first of these that they divide."""


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """Experts that lie on many devices, which rows of tokens travel to: for functions inside `jax.shard_map`.

    Attributes:
      axes: mesh axes that the experts are cut over, the slowest first; rows take one hop along each.
      capacity_factor: what a device has room for, as a multiple of what comes to it when all experts are used evenly. What
        exceeds it is dropped, and counted. None makes room for everything.
    """

    axes: tuple[str, ...]
    capacity_factor: float | None = None

    @property
    def devices(self) -> int:
        """That the experts are cut over."""
        return jax.lax.axis_size(self.axes)

    def room(self, rows: int, config: MoEConfig) -> tuple[tuple[int, ...], int]:
        """Slots for each device along each axis, for so many rows a device, and rows that a device's experts compute."""
        slots, held, nodes = [], rows, 1
        for axis in self.axes:
            devices = jax.lax.axis_size(axis)
            nodes *= devices
            # A row's copies: no more than its experts, than devices so far, and than groups if none of these is cut.
            limit = config.top_groups if config.num_groups % nodes == 0 else config.top_k
            even = rows * min(config.top_k, nodes, limit) / devices
            slots.append(self._at_most(held, even))
            held = devices * slots[-1]
        return tuple(slots), self._at_most(
            held * min(config.top_k, config.num_experts // nodes), float(rows * config.top_k)
        )

    def _at_most(self, bound: int, even: float) -> int:
        return bound if self.capacity_factor is None else min(bound, math.ceil(self.capacity_factor * even))


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """Sequences whose tokens lie on many devices: for functions inside `jax.shard_map`, unless there is one device.

    A sequence is cut in two chunks for each of n devices, and device i has chunks i and 2n - 1 - i: attention to what came
    before is then the same work for all of them.

      n = 3:   chunk    0  1  2  3  4  5
               device   0  1  2  2  1  0

    Attributes:
      devices: n, along mesh axis `context`. One has all, and nothing is exchanged.
    """

    devices: int = 1

    def positions(self, length: int) -> Int[Array, ' t']:
        """Of this device's tokens in a sequence of so many, ascending, int32.

        Raises:
          ValueError: the sequence cannot be cut into 2n chunks.
        """
        if self.devices == 1:
            return jnp.arange(length)
        if length % (chunks := 2 * self.devices):
            raise ValueError(
                f'{length=} of a sequence must be a multiple of {chunks}, two chunks a device of the context'
            )
        early = jax.lax.axis_index(CONTEXT_AXIS)
        start_2 = jnp.stack([early, chunks - 1 - early]) * (length // chunks)
        return (start_2[:, None] + jnp.arange(length // chunks)).reshape(-1)

    def part(self, x: Shaped[Array, '...'], axis: int = 1) -> Shaped[Array, '...']:
        """What belongs to this device's tokens; the axis is that of the T tokens of whole sequences."""
        return x if self.devices == 1 else jnp.take(x, self.positions(x.shape[axis]), axis=axis)

    @jax.named_scope(CONTEXT_AXIS)
    def whole(self, x_BTD: Num[Array, 'B t D']) -> Num[Array, 'B T D']:
        """The tokens of whole sequences, in their order, from each device's: an all-gather.

        Gradients are added up over the devices and cut (a reduce-scatter), in the dtype of x. XLA's CPU back end widens both to
        float32.
        """
        if self.devices == 1:
            return x_BTD
        B, t, D = x_BTD.shape
        parts_iBkcD = jax.lax.all_gather(x_BTD.reshape(B, 2, t // 2, D), CONTEXT_AXIS)
        early_jBcD, late_jBcD = parts_iBkcD[:, :, 0], parts_iBkcD[::-1, :, 1]
        return jnp.concatenate([early_jBcD, late_jBcD]).swapaxes(0, 1).reshape(B, -1, D)

    @jax.named_scope(CONTEXT_AXIS)
    def sum(self, x: Num[Array, '...']) -> Num[Array, '...']:
        """The sum over the devices that a sequence lies on."""
        return x if self.devices == 1 else jax.lax.psum(x, CONTEXT_AXIS)


@dataclasses.dataclass(frozen=True)
class StageParallel:
    """Expert layers of which each device has a stretch (`deepseek_jax.stages`).

    Attributes:
      devices: along mesh axis `stage`. One has all layers.
      parts: microbatches that a device's rows pass through the stages in.
    """

    devices: int = 1
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Parallel:
    """What a function that `jax.shard_map` maps over devices has to fetch from the others.

    Attributes:
      experts: how rows get to experts on other devices; None if every device has all.
      gather: parameters are cut, and made whole where they are used (`deepseek_jax.gather`); else they are whole.
      context: which tokens of a sequence are here, and how all of them are seen.
      stages: how many devices the expert layers are cut over, and how rows pass through them.
    """

    experts: ExpertParallel | None = None
    gather: bool = False
    context: ContextParallel = ContextParallel()
    stages: StageParallel = StageParallel()


ALONE = Parallel()
"""Nothing is elsewhere."""


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    node: int = 1,
    context: int = 1,
    stage: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes `AXES`. Raises `ValueError` if their product is not the device count."""
    devices = jax.devices() if devices is None else devices
    sizes = (data, stage, fsdp, node, expert, context)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(
            f'make_mesh: {data=} x {stage=} x {fsdp=} x {node=} x {expert=} x {context=} must equal the {len(devices)} devices'
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


class Cut(NamedTuple):
    """A dimension of a parameter, the axis of layers not counted, which is cut and made whole where the parameter is used."""

    dimension: int
    axes: tuple[str, ...]


def cuts(name: str, sizes: Mapping[str, int], devices: Mapping[str, int], gather: bool = False) -> tuple[Cut, ...]:
    """Where a parameter is cut and made whole again, the inner cut first: an expert's E, and its layers, are not among them.

    A matrix is cut over `fsdp`. Where parameters are made whole where they are used (`Parallel.gather`), one that is no expert's is
    cut over the devices of experts, too. The inner cut is then that of neighbours, `expert` where there are any. Vectors and
    routers are whole: every token scores every expert.

    Args:
      name: of the parameter.
      sizes: of its letters, whole.
      devices: along each mesh axis.
      gather: whether parameters are made whole where they are used.
    """
    letters = names.letters(name)
    if len(letters) == 1 or 'router' in name:
        return ()
    inner, outer = 'fsdp', ()
    if gather and letters[0] != 'E':
        inner, *outer = sorted(('expert', 'fsdp', 'node'), key=lambda axis: devices[axis] == 1)
    by = devices[inner]
    first = next(x for x in _PREFERENCE if x in letters and (x != 'H' or sizes[x] % by == 0))
    found = [Cut(letters.index(first), (inner,))]
    count = math.prod(devices[axis] for axis in outer)
    second = [x for x in _SECOND_PREFERENCE if x in letters and sizes[x] // (by if x == first else 1) % count == 0]
    if count > 1 and second:
        found.append(Cut(letters.index(second[0]), tuple(outer)))
    return tuple(found)


def param_spec(
    path: Sequence[str], shape: Sequence[int], devices: Mapping[str, int], gather: bool = False
) -> PartitionSpec:
    """The partition of one parameter, read off its name: its `cuts`, the experts' leading E over `node` and `expert`, and the
    stacked L axis of expert layers over `stage`.

    Args:
      path: keys of the parameter in the tree, for example `('moe_layers', 'attention', 'w_o_HUD')`.
      shape: its whole shape, the stacked L axis included.
      devices: along each mesh axis.
      gather: whether parameters are made whole where they are used.

    Raises:
      ValueError: the rank is not that of the name.
    """
    letters, stacked = names.letters(path[-1]), names.is_stacked(path)
    if len(letters) + stacked != len(shape):
        raise ValueError(f'parameter {"/".join(path)} has rank {len(shape)}, its name says {len(letters) + stacked}')
    axes: list[tuple[str, ...]] = [() for _ in shape]
    for cut in cuts(path[-1], dict(zip(letters, shape[stacked:], strict=True)), devices, gather):
        axes[stacked + cut.dimension] += cut.axes
    if letters[0] == 'E' and len(letters) > 1:
        axes[stacked] = EXPERT_AXES
    if path[0] == names.PIPELINED:
        axes[0] = (STAGE_AXIS,)
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in axes))


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def param_shardings(params: Any, mesh: Mesh, gather: bool = False) -> Any:
    """The `NamedSharding` of every parameter of a tree (arrays or shapes).

    Raises `ValueError` if a dimension is not a multiple of the mesh axis it is split over.
    """

    def sharding(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        spec = param_spec(path, leaf.shape, mesh.shape, gather)
        for size, axis in zip(leaf.shape, spec, strict=True):
            axes = axes_of(axis)
            if size % (devices := math.prod(mesh.shape[name] for name in axes)):
                raise ValueError(
                    f'parameter {"/".join(path)} of shape {tuple(leaf.shape)}: {size} is not a multiple of the '
                    f'{devices} devices of mesh axis {" x ".join(axes)!r}'
                )
        return NamedSharding(mesh, spec)

    return names.map_with_names(sharding, params)
