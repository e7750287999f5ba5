"""Parameters that are cut over devices and made whole where they are used (ZeRO-3), inside `jax.shard_map`.

A block gathers its own parameters when it begins, forward and, where it is rematerialised, backward: whole ones exist for one
block at a time. A gradient goes the other way: added up over the devices and cut as its parameter is.

Of a weight with a float8 copy the copy is gathered, and its master, which no product reads, stays where it is: something of
its whole shape takes its place and takes its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from deepseek_jax import names, sharding
from deepseek_jax.config import ModelConfig
from deepseek_jax.ops import ExpertWeights, QTensor, QuantizedWeight

AXIS = 'fsdp'


def cut_dimension(name: str, config: ModelConfig) -> int | None:
    """The dimension of a block's parameter, without the axis of layers, that is cut; None if it is whole everywhere."""
    cut_heads = config.mla.num_heads % lax.axis_size(AXIS) == 0
    spec = sharding.param_spec((name,), len(names.letters(name)), cut_heads)
    return spec.index(AXIS) if AXIS in spec else None


def local_shape(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape of this device's part of a parameter."""
    cut = cut_dimension(name, config)
    return tuple(size // lax.axis_size(AXIS) if index == cut else size for index, size in enumerate(shape))


@jax.named_scope('gather')
def whole(name: str, part: Array | QTensor, config: ModelConfig) -> Array | QTensor:
    """The whole of a block's parameter, of which each device has a part."""
    cut = cut_dimension(name, config)
    if cut is None:
        return part
    if not isinstance(part, QTensor):
        return lax.all_gather(part, AXIS, axis=cut, tiled=True)
    # Of its matrix, what is cut is the inputs or the outputs: the first letter is an input, the last one an output.
    matrix = 0 if cut == 0 else 1
    return QTensor(
        values=_gather(part.values, cut),
        scales=_gather(part.scales, matrix),
        transposed_values=_gather(part.transposed_values, 1 - matrix),
        transposed_scales=_gather(part.transposed_scales, 1 - matrix),
        master=_stand_in(part.master, cut),
    )


@jax.named_scope('gather')
def whole_experts(part: ExpertWeights) -> ExpertWeights:
    """The whole of a layer's float8 experts, whose letter D is cut."""

    def weight(part: QuantizedWeight, cut: int) -> QuantizedWeight:
        return QuantizedWeight(
            jax.tree.map(functools.partial(_gather, dimension=cut), part.natural),
            jax.tree.map(functools.partial(_gather, dimension=3 - cut), part.transposed),
        )

    return ExpertWeights(weight(part.gate_up, 1), weight(part.down, 2))


def stand_in(name: str, part: Array, config: ModelConfig) -> Array:
    """Something of the whole shape of a master that nothing reads: its gradient is that of the master."""
    cut = cut_dimension(name, config)
    return part if cut is None else _stand_in(part, cut)


def _gather(part: Array, dimension: int) -> Array:
    if part.dtype.itemsize > 1:
        return lax.all_gather(part, AXIS, axis=dimension, tiled=True)
    bits = lax.all_gather(lax.bitcast_convert_type(part, jnp.uint8), AXIS, axis=dimension, tiled=True)
    return lax.bitcast_convert_type(bits, part.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stand_in(part: Any, dimension: int) -> Any:
    shape = list(part.shape)
    shape[dimension] *= lax.axis_size(AXIS)
    return jnp.zeros(shape, part.dtype)


def _stand_in_backward(dimension: int, _: None, gradient: Array) -> tuple[Array]:
    with jax.named_scope('reduce'):
        return (lax.psum_scatter(gradient, AXIS, scatter_dimension=dimension, tiled=True),)


_stand_in.defvjp(lambda part, dimension: (_stand_in(part, dimension), None), _stand_in_backward)
