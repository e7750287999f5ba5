"""What the attention kernels share: masks of a tile of scores, products, and the loop over blocks."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.tiles import rows_of, swizzled

WGMMA = plgpu.Layout.WGMMA
WG_ROWS = 64  # of one wgmma
LOG2_E = math.log2(math.e)
WARPGROUPS = 2  # that multiply; a third one copies
ROWS = WARPGROUPS * WG_ROWS  # queries of a block of the grid
PART, ROPE, VALUE = 128, 64, 128  # widths that the kernels serve
# Registers a thread of the copying and of the math warpgroups: what is given up must cover what is taken.
REGISTERS = (24, 240)


def product(*factors: tuple[Any, Any], between: Callable[[], None] | None = None) -> Array:
    """The sum of `a @ b` over pairs of refs; `between` runs once the products have been issued."""

    def scope(sums_ref: Any) -> Array:
        for a, b in factors:
            plgpu.wgmma(sums_ref, a, b)
        if between:
            between()
        return sums_ref[...]

    (a, b), *_ = factors
    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def zeros(*shape: int) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def columns_of(vector: Array, height: int) -> Array:
    """A number a column as a matrix."""
    return lax.broadcast_in_dim(vector, (height, vector.shape[0]), [1])


def index(shape: tuple[int, int], dimension: int, start: Any) -> Array:
    """The row's or the column's number of each element of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WGMMA) + start


def seen(shape: tuple[int, int], row: Any, column: Any, bounds: Sequence[Array], keys_are_rows: bool = False) -> Array:
    """Which scores of a tile count, by its first row and column: queries as rows, or the keys.

    `bounds` are the first and the last key that each query sees; without them, queries before a key do not see it.
    """
    starts, key_axis = (row, column), 0 if keys_are_rows else 1
    key = index(shape, key_axis, starts[key_axis])
    if not bounds:
        return key <= index(shape, 1 - key_axis, starts[1 - key_axis])
    first, last = (columns_of(x, shape[0]) if keys_are_rows else rows_of(x, shape[1]) for x in bounds)
    return (first <= key) & (key <= last)


class Walk(NamedTuple):
    """The order in which a block of the grid takes the blocks of a range: first those that are masked.

    Four numbers of blocks, as in `sight.py`.
    """

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any

    @property
    def steps(self) -> Any:
        return self.end - self.begin

    @property
    def masked_steps(self) -> Any:
        return self.steps - (self.full_end - self.full_begin)

    def block(self, step: Any, masked: bool) -> Any:
        """The block of a step of that kind."""
        if not masked:
            return self.full_begin + (step - self.masked_steps)
        before = self.full_begin - self.begin
        return jnp.where(step < before, self.begin + step, self.full_end + (step - before))

    def run(self, visit: Callable, carry: Any) -> Any:
        """Calls `visit(step, block, carry, masked)` for each step; it returns the carry."""
        for masked, steps in ((True, (0, self.masked_steps)), (False, (self.masked_steps, self.steps))):
            one = lambda step, carry, masked=masked: visit(step, self.block(step, masked), carry, masked)  # noqa: E731
            carry = lax.fori_loop(*steps, one, carry)
        return carry

    def block_of(self, step: Any) -> Any:
        """The block of any step."""
        return jnp.where(step < self.masked_steps, self.block(step, True), self.block(step, False))

    def last(self, count: int, visit: Callable) -> None:
        """Calls `visit(step)` for the last steps, so many at most."""
        pl.loop(lax.max(self.steps - count, jnp.int32(0)), self.steps)(visit)


def walk_over_keys(ranges: Any, place: tuple, rows: int, keys: int, total: int) -> Walk:
    """The blocks of `keys` of `total` keys for `rows` queries at `place`: batch and block.

    `ranges` are those of `sight.py` in global memory; without them, queries before a key do not see it.
    """
    if ranges is not None:
        return Walk(*(ranges[*place, number] for number in range(4)))
    start, zero = place[1] * rows, jnp.int32(0)
    end = lax.min(lax.div(start + rows + keys - 1, jnp.int32(keys)), jnp.int32(pl.cdiv(total, keys)))
    return Walk(zero, zero, lax.div(start, jnp.int32(keys)), end)


def part(ref: Any, batch: Any, rows: Any, head: Any, width: int) -> Any:
    """A head's columns of rows."""
    return ref.at[batch, rows, pl.ds(head * width, width)]


class KeyRing(NamedTuple):
    """Keys and values of a head on their way through slots of shared memory.

    Attributes:
      k, k_rope, v: in shared memory, (stages, keys, width).
      k_full, v_full, k_empty, v_empty: barriers of each slot.
    """

    k: Any
    k_rope: Any
    v: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any

    @classmethod
    def scratch(cls, stages: int, keys: int) -> 'KeyRing':
        """The types of the fields."""
        k, k_rope, v = (tile(stages, keys, width) for width in (PART, ROPE, VALUE))
        k_full, v_full = (plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages) for arrivals in (2, 1))
        empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        return cls(k, k_rope, v, k_full, v_full, empty, empty)

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.k.shape[0]))

    def copy(self, walk: Walk, gmem: Sequence, batch: Any, head: Any) -> None:
        """Fills slots from (k, k_rope, v) in the order of the walk, and waits until all have been given back."""
        (stages, keys, _), (k_gmem, k_rope_gmem, v_gmem) = self.k.shape, gmem

        @pl.loop(0, walk.steps)
        def _(step: Any) -> None:
            slot, rows, later = self.slot(step), pl.ds(walk.block_of(step) * keys, keys), step >= stages
            pl.when(later)(lambda: plgpu.barrier_wait(self.k_empty.at[slot]))
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=self.k_full.at[slot])
            copy(part(k_gmem, batch, rows, head, PART), self.k.at[slot])
            copy(k_rope_gmem.at[batch, rows], self.k_rope.at[slot])
            pl.when(later)(lambda: plgpu.barrier_wait(self.v_empty.at[slot]))
            plgpu.copy_gmem_to_smem(part(v_gmem, batch, rows, head, VALUE), self.v.at[slot], self.v_full.at[slot])

        def drain(step: Any) -> None:
            plgpu.barrier_wait(self.k_empty.at[self.slot(step)])
            plgpu.barrier_wait(self.v_empty.at[self.slot(step)])

        walk.last(stages, drain)


def store(x: Array, staging_smem: Any, target_gmem: Any) -> None:
    """Starts the copy of a matrix in registers."""
    staging_smem[...] = x.astype(staging_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging_smem, target_gmem)


def tile(*shape: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Shared memory of matrices that wgmma reads or copies write."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(128 // jnp.dtype(dtype).itemsize, dtype))


def ints(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.int32)


def floats(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.float32)


def flat(*arrays: Array) -> list[Array]:
    """Arrays of rank three, heads and their widths joined: copies reach no further than five dimensions, two of a tile."""
    return [x.reshape(*x.shape[:2], -1) for x in arrays]


def split(items: Sequence, *sizes: int) -> list[Sequence]:
    """Parts of these sizes, and the rest."""
    starts = [0, *itertools.accumulate(sizes)]
    return [items[start:end] for start, end in itertools.pairwise([*starts, len(items)])]
