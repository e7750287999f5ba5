"""What the kernels of products and attention have in common: how they cut their work, how tiles lie in shared memory, how
results leave it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

# All synchronisation is the kernel's own.
COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a product kernel cuts its work.

    Attributes:
      wgs_m, wgs_n: math warpgroups of a block along rows and along columns.
      wg_columns: columns a warpgroup owns.
      stages: slots of the operand ring.
      cluster_m, cluster_n: blocks of a cluster along rows (they share the right operand) or along columns (the left one).
      minor, width: order of the tiles: the dimension that moves fastest (0 rows, 1 columns) within a band this wide.
      out_buffers: output chunks a warpgroup may have in flight.
    """

    wgs_m: int = 2
    wgs_n: int = 1
    wg_columns: int = 128
    stages: int = 4
    cluster_m: int = 1
    cluster_n: int = 1
    minor: int = 1
    width: int = 8
    out_buffers: int = 1

    @property
    def warpgroups(self) -> int:
        return self.wgs_m * self.wgs_n

    @property
    def rows(self) -> int:
        """Of a tile: 64 a warpgroup."""
        return self.wgs_m * 64

    @property
    def columns(self) -> int:
        return self.wgs_n * self.wg_columns

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n


def rows_of(vector: Array, width: int) -> Array:
    """A number a row as a matrix."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], width), [0])


def accumulate(sums: Array, a: Array, b_smem: Any, interpret: Any) -> Array:
    """`sums + a @ b`, with `a` in registers. Interpreted programs have no such product: they make it outside."""
    if interpret is None:
        multiply = pl.run_state(lambda sums_ref: plgpu.wgmma(sums_ref, a, b_smem))
        return multiply(plgpu.WGMMAAccumulatorRef.init(sums))  # pyright: ignore[reportReturnType]
    sums = sums + jnp.dot(a.astype(jnp.float32), b_smem[...].astype(jnp.float32))
    plgpu.commit_smem()
    return sums


def swizzled(columns: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Shared-memory layout of a tile whose rows are `columns` wide: free of bank conflicts, as wgmma and TMA take it."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)  # pyright: ignore


def output_chunk(columns: int, n: int, dtype: DTypeLike) -> int:
    """Columns of one copy of results, of a warpgroup that owns `columns` of the n: at most 128 bytes of a row.

    The copy engine leaves out chunks past the edge, unless n is one chunk: Mosaic takes away dimensions of size one, that
    of chunks among them, and every chunk of the tile is then written to the first one's place.
    """
    chunk = math.gcd(128 // jnp.dtype(dtype).itemsize, columns)
    return chunk // 2 if chunk == n else chunk
