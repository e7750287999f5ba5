"""Rows of tokens on their way to the devices of their experts and back [DeepSeek-V3, 3.2.2], inside `jax.shard_map`.

  send    rows (T, ...) of a device -> slots (n, C), C for each device along a mesh axis -> all-to-all -> rows (n C, ...)
  bring   rows (n C, ...) -> all-to-all -> each row of (T, ...) the sum of its copies, in float32, rounded once

A row goes to a device once, however many of its experts are there. Along two axes, the nodes and the GPUs of each, it goes to a
node once, over the slower network, and from there to that node's GPUs. The two are each other's transpose, so a backward pass
is the same exchange with the directions swapped. Rows move as they are: in float8, values and scales beside each other.

A device takes the first C rows that another has for it; those after them are not sent. What C is, the caller decides.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Num

from pallas_kernels.fp8 import Quantized
from pallas_kernels.routes import combine, permute


class Hop(NamedTuple):
    """An exchange along one mesh axis of n devices; S = n C slots.

    Attributes:
      source_S: the row that each slot takes away, T if none.
      slot_TK: the slots that take the copies of a row, S or more in the place of one that is not sent.
    """

    source_S: Int32[Array, ' S']
    slot_TK: Int32[Array, 'T K']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows (T, ...) become those that this device receives (R, ...), and come back.

    Attributes:
      hops: one after the other.
      axes: the mesh axis of each.
    """

    hops: tuple[Hop, ...]
    axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})

    @jax.named_scope('dispatch')
    def send_quantized(self, x: Quantized) -> Quantized:
        """Float8 rows and their scales, as they are; slots without a row are zeros."""
        for hop, axis in zip(self.hops, self.axes, strict=True):
            rows = permute(x, hop.source_S)
            x = Quantized(_swap(rows.values, axis), _swap(rows.scales, axis, dimension=1))
        return x

    def send(self, x: Float[Array, 'T D']) -> Float[Array, 'R D']:
        """The rows that come to this device, zeros in slots without one. Differentiable: gradients come by `bring`."""
        return _send(x, self)

    def bring(self, y: Float[Array, 'R D']) -> Float[Array, 'T D']:
        """The sum of what became of each row's copies, in their dtype after each hop. Differentiable, by `send`."""
        return _bring(y, self)


def _swap(x: Num[Array, '...'], axis: str, dimension: int = 0) -> Num[Array, '...']:
    """Slots, along one dimension, change places with those that the other devices have for this one."""
    if x.dtype.itemsize >= 4:
        return lax.all_to_all(x, axis, dimension, dimension, tiled=True)
    # As bits: narrow floats are widened for the way by XLA on CPUs, and float8 is unknown to some libraries.
    bits = lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    return lax.bitcast_convert_type(lax.all_to_all(bits, axis, dimension, dimension, tiled=True), x.dtype)


def _take(x: Num[Array, 'T ...'], hop: Hop, axis: str, fill: int = 0) -> Num[Array, 'S ...']:
    return _swap(jnp.take(x, hop.source_S, axis=0, mode='fill', fill_value=fill), axis)


@jax.custom_vjp
@jax.named_scope('dispatch')
def _send(x: Array, exchange: Exchange) -> Array:
    for hop, axis in zip(exchange.hops, exchange.axes, strict=True):
        x = _take(x, hop, axis)
    return x


@jax.custom_vjp
@jax.named_scope('collect')
def _bring(y: Array, exchange: Exchange) -> Array:
    for hop, axis in zip(reversed(exchange.hops), reversed(exchange.axes), strict=True):
        y = combine(_swap(y, axis), hop.slot_TK, y.dtype)
    return y


# Each is the other's transpose.
_send.defvjp(lambda x, exchange: (_send(x, exchange), exchange), lambda exchange, d: (_bring(d, exchange), None))
_bring.defvjp(lambda y, exchange: (_bring(y, exchange), exchange), lambda exchange, d: (_send(d, exchange), None))


@jax.named_scope('dispatch')
def exchange(
    experts_TK: Int[Array, 'T K'], num_experts: int, axes: Sequence[str], capacities: Sequence[int]
) -> tuple[Exchange, Int32[Array, 'R K']]:
    """The way of T rows to the devices of their K experts, which lie in order along the axes, the first the slowest.

    Args:
      experts_TK: of each row.
      num_experts: E, of all devices together; a multiple of their number.
      axes: mesh axes that the function is mapped over, a hop each.
      capacities: slots for each device along each axis. As many as there are rows hold all: R of the hop before.

    Returns:
      The exchange, and of each row that comes to this device its experts, counted from this device's first; E / devices
      stands for one that is elsewhere.
    """
    per, hops = num_experts, []
    for axis, capacity in zip(axes, capacities, strict=True):
        devices = lax.axis_size(axis)
        per //= devices
        to_TK = jnp.where(experts_TK < num_experts, experts_TK // per % devices, devices)
        hop = _hop(to_TK, axis, capacity)
        experts_TK = _take(experts_TK.astype(jnp.int32), hop, axis, fill=num_experts)
        here = experts_TK // per % devices == lax.axis_index(axis)
        experts_TK = jnp.where(here & (experts_TK < num_experts), experts_TK, num_experts)
        hops.append(hop)
    return Exchange(tuple(hops), tuple(axes)), jnp.where(experts_TK < num_experts, experts_TK % per, per)


def _hop(to_TK: Int[Array, 'T K'], axis: str, capacity: int) -> Hop:
    """A copy of each row to every device that `to_TK` names, the first `capacity` of them in order."""
    devices, (rows, top_k) = lax.axis_size(axis), to_TK.shape
    sent_TN = jnp.any(to_TK[:, :, None] == jnp.arange(devices), axis=1)
    place_TN = jnp.cumsum(sent_TN, axis=0, dtype=jnp.int32) - 1
    place_TK = jnp.take_along_axis(place_TN, jnp.minimum(to_TK, devices - 1), axis=1)
    once_TK = _first_of_equals(to_TK) & (to_TK < devices) & (place_TK < capacity)
    # Numbers past the end are all different, as scatters of unique indices want them.
    number_TK = jnp.arange(rows * top_k, dtype=jnp.int32).reshape(rows, top_k)
    slot_TK = jnp.where(once_TK, to_TK * capacity + place_TK, devices * capacity + number_TK)
    source_S = jnp.full(devices * capacity, rows, jnp.int32)
    source_S = source_S.at[slot_TK.reshape(-1)].set(number_TK.reshape(-1) // top_k, unique_indices=True, mode='drop')
    return Hop(source_S, slot_TK.astype(jnp.int32))


def _first_of_equals(x_TK: Int[Array, 'T K']) -> Bool[Array, 'T K']:
    equal_TKK = x_TK[:, :, None] == x_TK[:, None, :]
    return ~jnp.any(jnp.tril(equal_TKK, -1), axis=2)
