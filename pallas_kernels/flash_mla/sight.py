"""Which keys a query sees, and what that means for blocks of queries and keys.

A query sees the keys of its segment up to its position. Of a block of queries and a block of keys one of three holds:
no query sees a key, and the block is skipped; every query sees every key, and nothing is masked; or the scores are
masked one by one. `key_ranges` and `query_ranges` tell where these blocks lie:

    keys of one block of queries:   | skipped | masked | all seen | masked | skipped |
                                    0       begin  full_begin  full_end   end

Blocks are compared by the smallest and the largest number of their segments. That is exact where each document's tokens
are neighbours and numbers rise, as in packed batches; otherwise some blocks are masked that could have been skipped.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

from pallas_kernels.fp8 import round_up


class Sight(NamedTuple):
    """Which keys a query sees: those of its segment, up to its position."""

    positions_BT: Int[Array, 'B T']
    q_segments_BT: Int[Array, 'B T']
    k_segments_BS: Int[Array, 'B S']


def causal(batch: int, length: int) -> Sight:
    """One document a row: query t sees the keys up to t."""
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Sight(positions_BT, *[jnp.zeros((batch, length), jnp.int32)] * 2)


def key_ranges(sight: Sight, rows: int, keys: int) -> Int32[Array, 'B i 4']:
    """For each block of `rows` queries four numbers of blocks of `keys` keys: begin, full_begin, full_end, end."""
    return _ranges(*_pairs(sight, rows, keys))


def query_ranges(sight: Sight, rows: int, keys: int) -> Int32[Array, 'B j 4']:
    """For each block of `keys` keys four numbers of blocks of `rows` queries: begin, full_begin, full_end, end."""
    seen_Bij, full_Bij = _pairs(sight, rows, keys)
    return _ranges(seen_Bij.swapaxes(1, 2), full_Bij.swapaxes(1, 2))


def padded(x_BT: Int[Array, 'B T'], size: int) -> Int32[Array, 'B _']:
    """Filled up to a multiple of `size` with copies of the last one."""
    return jnp.pad(x_BT.astype(jnp.int32), ((0, 0), (0, round_up(x_BT.shape[1], size) - x_BT.shape[1])), mode='edge')


def _pairs(sight: Sight, rows: int, keys: int) -> tuple[Bool[Array, 'B i j'], Bool[Array, 'B i j']]:
    """For each pair of blocks whether some query may see some key, and whether every query sees every key."""
    B, S = sight.k_segments_BS.shape
    cut = lambda x, size: padded(x, size).reshape(B, -1, size)  # noqa: E731
    positions_Bir, q_Bir = (cut(x, rows) for x in sight[:2])
    k_Bjk = cut(sight.k_segments_BS, keys)
    least, most = (lambda x: x.min(-1)), (lambda x: x.max(-1))
    q_low, q_high = least(q_Bir)[:, :, None], most(q_Bir)[:, :, None]
    k_low, k_high = least(k_Bjk)[:, None], most(k_Bjk)[:, None]
    first_j = keys * jnp.arange(k_Bjk.shape[1])
    seen = (first_j <= most(positions_Bir)[:, :, None]) & (k_low <= q_high) & (q_low <= k_high)
    last_j = first_j + keys - 1
    full = (last_j <= least(positions_Bir)[:, :, None]) & (last_j < S)
    return seen, full & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)


def _ranges(seen_BXY: Bool[Array, 'B X Y'], full_BXY: Bool[Array, 'B X Y']) -> Int32[Array, 'B X 4']:
    """The first run of `full` blocks among those from the first to the last one seen."""
    index_Y = jnp.arange(seen_BXY.shape[-1], dtype=jnp.int32)
    end = jnp.max(jnp.where(seen_BXY, index_Y + 1, 0), -1)
    begin = jnp.min(jnp.where(seen_BXY, index_Y, end[..., None]), -1)
    full_begin = jnp.min(jnp.where(full_BXY, index_Y, end[..., None]), -1)
    after = ~full_BXY & (index_Y >= full_begin[..., None])
    full_end = jnp.min(jnp.where(after, index_Y, end[..., None]), -1)
    return jnp.stack([begin, full_begin, full_end, end], -1)
