"""Where the groups of a grouped product lie in their buffer, and the row tiles that hold them.

Two layouts. Contiguous: the groups follow each other, each from a multiple of 128 rows:

    sizes 3, 0, 130     [0 0 0 . . . | 2 2 2 ...  | 2 2 . . . . | . . . . .]
    rows                 0            128          256           384

Masked: every group owns the same number of rows, of which the first few are real.

A kernel walks over the active tiles only. How many there are is known on the device alone, so the list has room for as
many as the buffer could hold, and comes with their number.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

ALIGNMENT = 128  # rows; groups of the contiguous layout start at multiples of it


class Tiles(NamedTuple):
    """The row tiles that hold rows of some group, in the order of the rows; the entries after them are unused.

    Attributes:
      row_T: the first row of each tile.
      expert_T: the group that owns its rows.
      count: how many are active, at most T; the entries from there on repeat row 0 and group 0.
    """

    row_T: Int32[Array, ' T']
    expert_T: Int32[Array, ' T']
    count: Int32[Array, ' 1']  # pyright: ignore[reportIncompatibleMethodOverride]


def group_starts(group_sizes_E: Int32[Array, ' E']) -> Int32[Array, ' E']:
    """The first row of each group in the contiguous layout; an empty group starts where the next one does."""
    padded_E = -(-group_sizes_E // ALIGNMENT) * ALIGNMENT
    return (jnp.cumsum(padded_E) - padded_E).astype(jnp.int32)


def contiguous_tiles(group_sizes_E: Int32[Array, ' E'], rows: int, buffer_rows: int) -> Tiles:
    """The tiles of the contiguous layout.

    Args:
      group_sizes_E: int32 rows of each group; padded to 128 each, they fit the buffer.
      rows: of a tile; a divisor of 128.
      buffer_rows: of the buffer, a multiple of 128; T is `buffer_rows // rows`.

    Raises:
      ValueError: the rows of a tile or of the buffer are not such numbers.
    """
    if rows <= 0 or ALIGNMENT % rows:
        raise ValueError(f'{rows=} of a tile must divide {ALIGNMENT}')
    if buffer_rows % ALIGNMENT:
        raise ValueError(f'{buffer_rows=} must be a multiple of {ALIGNMENT}')
    return _tiles(group_starts(group_sizes_E), group_sizes_E, rows, buffer_rows // rows)


def masked_tiles(counts_E: Int32[Array, ' E'], rows_each: int, rows: int) -> Tiles:
    """The tiles of the masked layout.

    Args:
      counts_E: int32 real rows of each group, at most `rows_each`.
      rows_each: rows that a group owns.
      rows: of a tile; a divisor of `rows_each`; T is `E * (rows_each // rows)`.

    Raises:
      ValueError: the rows of a tile are not such a number.
    """
    if rows <= 0 or rows_each % rows:
        raise ValueError(f'{rows=} of a tile must divide {rows_each=}')
    groups = counts_E.shape[0]
    starts_E = jnp.arange(groups, dtype=jnp.int32) * rows_each
    return _tiles(starts_E, counts_E, rows, groups * (rows_each // rows))


def _tiles(starts_E: Array, sizes_E: Array, rows: int, capacity: int) -> Tiles:
    tiles_E = -(-sizes_E.astype(jnp.int32) // rows)
    end_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    tile_T = lax.iota(jnp.int32, capacity)
    # Group of a tile: as many groups end at it or before it. T times E comparisons, and no search in steps.
    expert_T = jnp.sum(end_E[None, :] <= tile_T[:, None], axis=1, dtype=jnp.int32)
    active_T = tile_T < end_E[-1]
    expert_T = jnp.where(active_T, expert_T, 0)
    row_T = starts_E[expert_T] + (tile_T - (end_E - tiles_E)[expert_T]) * rows
    return Tiles(jnp.where(active_T, row_T, 0), expert_T, jnp.minimum(end_E[-1:], capacity))
