"""Which keys a query sees, and what that means for blocks of queries and keys.

A query sees the keys from a first one to a last one: those of its document up to its own, say, or those of a cached prefix.
Of a block of queries and a block of keys one of three holds: no query sees a key, and the block is skipped; every query
sees every key, and nothing is masked; or the scores are masked one by one. `key_ranges` and `query_ranges` tell where
these blocks lie:

    keys of one block of queries:   | skipped | masked | all seen | masked | skipped |
                                    0       begin  full_begin  full_end   end
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

from pallas_kernels.fp8 import round_up


class Sight(NamedTuple):
    """The first and the last key that each query sees; none if the last one comes before the first.

    Neither is negative but for a last one of -1, and the last one is below the number of keys.
    """

    first_BT: Int32[Array, 'B T']
    last_BT: Int32[Array, 'B T']


def causal(batch: int, length: int) -> Sight:
    """One document a row: query t sees the keys up to t."""
    last_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Sight(jnp.zeros_like(last_BT), last_BT)


def document_starts(segments_BT: Int[Array, 'B T']) -> Int32[Array, 'B T']:
    """The first token of each token's document, which is a run of equal numbers."""
    tokens_BT = causal(*segments_BT.shape).last_BT
    begins_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    return jax.lax.cummax(jnp.where(begins_BT, tokens_BT, 0), axis=1)


def of_documents(segments_BT: Int[Array, 'B T']) -> Sight:
    """Query t sees the keys up to t of its document."""
    return causal(*segments_BT.shape)._replace(first_BT=document_starts(segments_BT))


def of_positions(positions_BT: Int[Array, 'B T'], keys: int, first_BT: Int[Array, 'B T'] | None = None) -> Sight:
    """A query sees the keys up to a position, of so many, from a first one or from key 0."""
    last_BT = jnp.clip(positions_BT, -1, keys - 1).astype(jnp.int32)
    return Sight(jnp.zeros_like(last_BT) if first_BT is None else jnp.maximum(first_BT, 0).astype(jnp.int32), last_BT)


def key_ranges(sight: Sight, rows: int, keys: int, total: int) -> Int32[Array, 'B i 4']:
    """For each block of `rows` queries four numbers of blocks of `keys` keys: begin, full_begin, full_end, end."""
    return _ranges(*_pairs(sight, rows, keys, total))


def query_ranges(sight: Sight, rows: int, keys: int, total: int) -> Int32[Array, 'B j 4']:
    """For each block of `keys` of `total` keys four numbers of blocks of `rows` queries, in the same order."""
    seen_Bij, full_Bij = _pairs(sight, rows, keys, total)
    return _ranges(seen_Bij.swapaxes(1, 2), full_Bij.swapaxes(1, 2))


def padded(x_BT: Int32[Array, 'B T'], size: int) -> Int32[Array, 'B _']:
    """Filled up to a multiple of `size` with copies of the last one."""
    return jnp.pad(x_BT, ((0, 0), (0, round_up(x_BT.shape[1], size) - x_BT.shape[1])), mode='edge')


def _pairs(sight: Sight, rows: int, keys: int, total: int) -> tuple[Bool[Array, 'B i j'], Bool[Array, 'B i j']]:
    """For each pair of blocks whether some query may see some key, and whether every query sees every key."""
    first_Bir, last_Bir = (padded(x, rows).reshape(len(x), -1, rows) for x in sight)
    start_j = keys * jnp.arange(-(-total // keys), dtype=jnp.int32)
    end_j = start_j + keys - 1
    seen_Bij = (start_j <= last_Bir.max(-1)[..., None]) & (first_Bir.min(-1)[..., None] <= end_j)
    full_Bij = (first_Bir.max(-1)[..., None] <= start_j) & (end_j <= last_Bir.min(-1)[..., None])
    return seen_Bij, full_Bij


def _ranges(seen_BXY: Bool[Array, 'B X Y'], full_BXY: Bool[Array, 'B X Y']) -> Int32[Array, 'B X 4']:
    """The first run of `full` blocks among those from the first to the last one seen."""
    index_Y = jnp.arange(seen_BXY.shape[-1], dtype=jnp.int32)
    end = jnp.max(jnp.where(seen_BXY, index_Y + 1, 0), -1)
    begin = jnp.min(jnp.where(seen_BXY, index_Y, end[..., None]), -1)
    full_begin = jnp.min(jnp.where(full_BXY, index_Y, end[..., None]), -1)
    after = ~full_BXY & (index_Y >= full_begin[..., None])
    full_end = jnp.min(jnp.where(after, index_Y, end[..., None]), -1)
    return jnp.stack([begin, full_begin, full_end, end], -1)
