"""Which block of the grid reads which pages: ragged sequences in equal shares.

The pages of all sequences lie one after the other on a line, each sequence begun by OVERHEAD units that stand for what it
costs whatever its length. The line is cut into shares of one size, one a block, wherever the cuts fall:

    | . . 0 1 2 3 4 | . . 0 1 | . . 0 1 2 3 4 5 6 7 |      `.` overhead, numbers: pages of three sequences
    [ block 0 ][ block 1 ][ block 2 ][ block 3 ]

A sequence that lies in one share is done when its block is. One that is cut leaves a partial result in each of its blocks:
a block has at most two, one of a sequence that began before its share and one of a sequence that goes on after it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

PAGE = 64
# In pages: queries are read and outputs written for every sequence.
OVERHEAD = 2
# A shorter share costs more in partial results than the further blocks save.
MIN_SHARE = 2


class Schedule(NamedTuple):
    """Integers that the kernels read from global memory.

    Attributes:
      starts: where each sequence begins on the line, and last where the line ends: int32 (B + 1,).
      first_X, stop_X: the sequences that may lie in a block's share, from the first one to before `stop`.
      lengths_B: tokens of each sequence.
    """

    starts: Int32[Array, ' _']
    first_X: Int32[Array, ' X']
    stop_X: Int32[Array, ' X']
    lengths_B: Int32[Array, ' B']


def schedule(lengths_B: Int32[Array, ' B'], max_pages: int, blocks: int) -> Schedule:
    """Cuts the pages of sequences of these lengths into shares of so many blocks.

    Sums over comparisons, where a running sum or a sorted search would do: XLA makes two small kernels of them.
    """
    costs_B = OVERHEAD + jnp.clip((lengths_B + (PAGE - 1)) // PAGE, 0, max_pages)
    numbers_B, numbers = jnp.arange(lengths_B.shape[0]), jnp.arange(lengths_B.shape[0] + 1)
    starts = jnp.sum(jnp.where(numbers_B < numbers[:, None], costs_B, 0), axis=1)
    begins_X1 = jnp.arange(blocks)[:, None] * share(starts[-1], blocks)
    first_X = jnp.sum(starts[1:] <= begins_X1, axis=1)
    stop_X = jnp.sum(starts[:-1] < begins_X1 + share(starts[-1], blocks), axis=1)
    return Schedule(starts.astype(jnp.int32), first_X.astype(jnp.int32), stop_X.astype(jnp.int32), lengths_B)


def share(end: Any, blocks: int) -> Any:
    """Size of a block's share of a line that ends there."""
    return jnp.maximum(lax.div(end + (blocks - 1), jnp.int32(blocks)), MIN_SHARE)


def place(plan: Schedule, sequence: Any) -> tuple[Any, Any]:
    """Where a sequence's first page lies on the line, and its number of pages."""
    start = plan.starts[sequence] + OVERHEAD
    return start, plan.starts[sequence + 1] - start
