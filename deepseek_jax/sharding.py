"""Where arrays live: mesh axes, and the rule from dimension letters to mesh axes.

A parameter's sharding is read off its name: `w_up_EDF` of stacked layers is sharded `P(None, 'expert', 'fsdp')`.
Axes are of type Auto: the compiler places the collectives.

  data    replicates parameters, splits the batch
  fsdp    splits parameters and the batch
  expert  splits the experts and the batch
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import names

AXES = ('data', 'fsdp', 'expert')
BATCH = PartitionSpec(AXES)
"""The batch, a leading B axis, is split over every mesh axis."""

_PREFERENCE = 'DHVFQCNUR'
"""The letter that takes the fsdp axis is the first of these among a matrix's letters."""


def make_mesh(data: int = 1, fsdp: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `expert`. Raises `ValueError` if their product is not the device count."""
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, expert)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ValueError(f'make_mesh: {data=} x {fsdp=} x {expert=} must equal the {len(devices)} devices')
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_spec(path: Sequence[str], ndim: int) -> PartitionSpec:
    """The partition of one parameter, read off its name.

    Vectors and the router are replicated: every token scores every expert. The experts' leading E goes over
    `expert`; of a matrix's letters one goes over `fsdp`.

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
    axes: list[str | None] = [None] * len(letters)
    if len(letters) > 1 and 'router' not in path[-1]:
        if letters[0] == 'E':
            axes[0] = 'expert'
        axes[letters.index(next(letter for letter in _PREFERENCE if letter in letters))] = 'fsdp'
    return PartitionSpec(*([None] * stacked), *axes)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every parameter of a tree (arrays or shapes).

    Raises `ValueError` if a dimension is not a multiple of the mesh axis it is split over.
    """

    def sharding(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        spec = param_spec(path, len(leaf.shape))
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f'parameter {"/".join(path)} of shape {tuple(leaf.shape)}: {size} is not a multiple of the '
                    f'{mesh.shape[axis]} devices of mesh axis {axis!r}'
                )
        return NamedSharding(mesh, spec)

    return names.map_with_names(sharding, params)
