"""What the product kernels have in common: how tiles lie in shared memory, and how results leave it."""

import math

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike


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
