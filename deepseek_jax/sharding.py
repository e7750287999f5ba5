"""Where arrays live: mesh axes, and the rule from dimension letters to mesh axes.

A parameter's sharding is read off its name: `w_up_EDF` of stacked layers is sharded `P(None, 'expert', 'fsdp')`.
Axes are of type Auto: the compiler places the collectives.

  data    replicates parameters, splits the batch
  fsdp    splits parameters and the batch
  node    splits the experts and the batch: nodes that the experts of one copy lie on
  expert  splits the experts of a node and the batch
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import names
from deepseek_jax.config import MoEConfig

EXPERT_AXES = ('node', 'expert')
AXES = ('data', 'fsdp', *EXPERT_AXES)
BATCH = PartitionSpec(AXES)
"""The batch, a leading B axis, is split over every mesh axis."""

_PREFERENCE = 'DVFQCHNUR'
"""The letter that takes the fsdp axis is the first of these among a matrix's letters."""


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
class Parallel:
    """What a function that `jax.shard_map` maps over devices has to fetch from the others.

    Attributes:
      experts: how rows get to experts on other devices; None if every device has all.
      gather: blocks find their parameters cut over `fsdp`, and make them whole where they use them; else they are whole.
    """

    experts: ExpertParallel | None = None
    gather: bool = False


ALONE = Parallel()
"""Nothing is elsewhere."""


def make_mesh(
    data: int = 1, fsdp: int = 1, expert: int = 1, node: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes `AXES`. Raises `ValueError` if their product is not the device count."""
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, node, expert)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(f'make_mesh: {data=} x {fsdp=} x {node=} x {expert=} must equal the {len(devices)} devices')
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_spec(path: Sequence[str], ndim: int) -> PartitionSpec:
    """The partition of one parameter, read off its name.

    Vectors and the router are replicated: every token scores every expert. The experts' leading E goes over
    `node` and `expert`; of a matrix's letters one goes over `fsdp`.

    Args:
      path: keys of the parameter in the tree, for example `('moe_layers', 'attention', 'w_o_HUD')`.
      ndim: its rank, the stacked L axis included.

    Raises:
      ValueError: the rank is not that of the name.
    """
    letters = names.letters(path[-1])
    stacked = names.is_stacked(path)
    if len(letters) + stacked != ndim:
        raise ValueError(f'parameter {"/".join(path)} has rank {ndim}, its name says {len(letters) + stacked}')
    axes: list[Any] = [None] * len(letters)
    if len(letters) > 1 and 'router' not in path[-1]:
        if letters[0] == 'E':
            axes[0] = EXPERT_AXES
        axes[letters.index(next(letter for letter in _PREFERENCE if letter in letters))] = 'fsdp'
    return PartitionSpec(*([None] * stacked), *axes)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every parameter of a tree (arrays or shapes).

    Raises `ValueError` if a dimension is not a multiple of the mesh axis it is split over.
    """

    def sharding(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        spec = param_spec(path, len(leaf.shape))
        for size, axis in zip(leaf.shape, spec, strict=True):
            axes = axes_of(axis)
            if size % (devices := math.prod(mesh.shape[name] for name in axes)):
                raise ValueError(
                    f'parameter {"/".join(path)} of shape {tuple(leaf.shape)}: {size} is not a multiple of the '
                    f'{devices} devices of mesh axis {" x ".join(axes)!r}'
                )
        return NamedSharding(mesh, spec)

    return names.map_with_names(sharding, params)
