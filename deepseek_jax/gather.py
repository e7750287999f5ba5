"""Parameters that are cut over devices and made whole where they are used (ZeRO-3), inside `jax.shard_map`.

A block gathers its own parameters when it begins, forward and, where it is rematerialised, backward: whole ones exist for one
block at a time. Embedding and head are gathered by those who use them. A gradient goes the other way: added up over the devices and
cut as its parameter is.

A parameter may have two cuts (`sharding.cuts`): the outer one is undone before the inner one, and made after it, so that what
travels far is a part of what travels among neighbours.

Of a weight with a float8 copy the copy is gathered, and its master, which no product reads, stays where it is: something of
its whole shape takes its place and takes its gradient. Copies have the inner cut alone (as secondary partitions of ZeRO++ do,
arXiv 2306.10209): the outer one is undone once a step, before they are quantised, and blocks gather from neighbours.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from deepseek_jax import names, sharding
from deepseek_jax.config import ModelConfig
from deepseek_jax.ops import ExpertWeights, QTensor, QuantizedWeight
from deepseek_jax.sharding import Cut, Parallel


def cuts(name: str, config: ModelConfig) -> tuple[Cut, ...]:
    """Where a parameter is cut, the inner cut first; none if it is whole everywhere."""
    devices = {axis: lax.axis_size(axis) for axis in sharding.AXES}
    return sharding.cuts(name, names.dims(config), devices, gather=True)


@jax.named_scope('gather')
def joined(part: Array, cuts: Sequence[Cut]) -> Array:
    """The whole of a part with these cuts; of outer cuts alone, what has the inner one."""
    for cut in reversed(cuts):
        part = lax.all_gather(part, cut.axes, axis=cut.dimension, tiled=True)
    return part


@jax.named_scope('reduce')
def summed(gradient: Array, cuts: Sequence[Cut]) -> Array:
    """The transpose of `joined`: added up over the devices, and cut."""
    for cut in cuts:
        gradient = lax.psum_scatter(gradient, cut.axes, scatter_dimension=cut.dimension, tiled=True)
    return gradient


def array(name: str, part: Array, config: ModelConfig, parallel: Parallel) -> Array:
    """The whole of a parameter without copy; it may be whole already."""
    return joined(part, cuts(name, config)) if parallel.gather else part


def whole(name: str, part: Array | QTensor, config: ModelConfig) -> Array | QTensor:
    """The whole of a parameter, of which each device has a part."""
    found = cuts(name, config)
    if not isinstance(part, QTensor):
        return joined(part, found)
    if not found:
        return part
    inner, *_ = found
    # Of its matrix, what is cut is the inputs or the outputs: the first letter is an input, the last one an output.
    matrix = 0 if inner.dimension == 0 else 1
    return QTensor(
        values=_bits_joined(part.values, inner),
        scales=_bits_joined(part.scales, inner._replace(dimension=matrix)),
        transposed_values=_bits_joined(part.transposed_values, inner._replace(dimension=1 - matrix)),
        transposed_scales=_bits_joined(part.transposed_scales, inner._replace(dimension=1 - matrix)),
        master=_stand_in(part.master, found),
    )


def whole_experts(part: ExpertWeights, config: ModelConfig) -> ExpertWeights:
    """The whole of a layer's float8 experts, whose letter D is cut."""

    def weight(part: QuantizedWeight, name: str) -> QuantizedWeight:
        (cut,) = cuts(name, config)
        transposed = cut._replace(dimension=3 - cut.dimension)
        return QuantizedWeight(
            jax.tree.map(functools.partial(_bits_joined, cut=cut), part.natural),
            jax.tree.map(functools.partial(_bits_joined, cut=transposed), part.transposed),
        )

    return ExpertWeights(weight(part.gate_up, 'w_up_EDF'), weight(part.down, 'w_down_EFD'))


def stand_in(name: str, part: Array, config: ModelConfig) -> Array:
    """Something of the whole shape of a master that nothing reads: its gradient is that of the master."""
    return _stand_in(part, cuts(name, config))


def _bits_joined(part: Array, cut: Cut) -> Array:
    """Float8 values travel as bits, which every library knows."""
    if part.dtype.itemsize > 1:
        return joined(part, [cut])
    return lax.bitcast_convert_type(joined(lax.bitcast_convert_type(part, jnp.uint8), [cut]), part.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stand_in(part: Any, cuts: Sequence[Cut]) -> Any:
    shape = list(part.shape)
    for cut in cuts:
        shape[cut.dimension] *= lax.axis_size(cut.axes)
    return jnp.zeros(shape, part.dtype)


_stand_in.defvjp(lambda part, cuts: (_stand_in(part, cuts), None), lambda cuts, _, gradient: (summed(gradient, cuts),))
