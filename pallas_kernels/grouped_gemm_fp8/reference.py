"""Specification of the grouped float8 products, in plain jax.numpy; each sums as the dense one of `gemm_fp8` does.

Rows are taken 128 (or one group's) at a time, so that the work is that of the rows alone. What belongs to no group comes
out as zeros.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import Quantized, dequantize_blocks, dequantize_rows, rounded
from pallas_kernels.groups import ALIGNMENT, Tiles, contiguous_tiles, group_starts, masked_tiles

PRECISION = jax.lax.Precision.HIGHEST


def grouped_gemm_fp8(lhs: Quantized, rhs: Quantized, group_sizes_E: Array, out_dtype: DTypeLike) -> Float[Array, 'M N']:
    tiles = contiguous_tiles(group_sizes_E, ALIGNMENT, lhs.values.shape[0])
    out_MN = _rows_of_tiles(lhs, rhs, tiles, ALIGNMENT, group_starts(group_sizes_E), group_sizes_E)
    return rounded(out_MN, out_dtype)


def masked_gemm_fp8(lhs: Quantized, rhs: Quantized, counts_E: Array, out_dtype: DTypeLike) -> Float[Array, 'M N']:
    rows = lhs.values.shape[0] // counts_E.shape[0]
    starts_E = rows * jnp.arange(counts_E.shape[0])
    out_MN = _rows_of_tiles(lhs, rhs, masked_tiles(counts_E, rows, rows), rows, starts_E, counts_E)
    return rounded(out_MN, out_dtype)


def grouped_wgrad_fp8(
    lhs: Quantized, rhs: Quantized, group_sizes_E: Array, accumulator_EMN: Array | None
) -> Float32[Array, 'E M N']:
    lhs_MK, rhs_NK = dequantize_rows(lhs), dequantize_rows(rhs)
    tiles = contiguous_tiles(group_sizes_E, ALIGNMENT, lhs_MK.shape[1])
    if accumulator_EMN is None:
        accumulator_EMN = jnp.zeros((group_sizes_E.shape[0], lhs_MK.shape[0], rhs_NK.shape[0]), jnp.float32)

    def add_block(i: Array, sums_EMN: Array) -> Array:
        part = [jax.lax.dynamic_slice_in_dim(x, tiles.row_T[i], ALIGNMENT, axis=1) for x in (lhs_MK, rhs_NK)]
        product_MN = jnp.einsum('MK,NK->MN', *part, precision=PRECISION)
        return sums_EMN.at[tiles.expert_T[i]].add(product_MN)

    return jax.lax.fori_loop(0, tiles.count[0], add_block, accumulator_EMN)


def _rows_of_tiles(
    lhs: Quantized, rhs: Quantized, tiles: Tiles, rows: int, starts_E: Array, sizes_E: Array
) -> Float32[Array, 'M N']:
    lhs_MK = dequantize_rows(lhs)

    def add_tile(i: Array, out_MN: Array) -> Array:
        rhs_NK = dequantize_blocks(rhs.values[tiles.expert_T[i]], rhs.scales[tiles.expert_T[i]])
        part = jax.lax.dynamic_slice_in_dim(lhs_MK, tiles.row_T[i], rows, axis=0)
        product = jnp.einsum('MK,NK->MN', part, rhs_NK, precision=PRECISION)
        return jax.lax.dynamic_update_slice_in_dim(out_MN, product, tiles.row_T[i], axis=0)

    out_MN = jnp.zeros((lhs_MK.shape[0], rhs.values.shape[1]), jnp.float32)
    out_MN = jax.lax.fori_loop(0, tiles.count[0], add_tile, out_MN)
    row_M1 = jnp.arange(len(out_MN))[:, None]
    real_M = jnp.any((row_M1 >= starts_E) & (row_M1 < starts_E + sizes_E), axis=1)
    return jnp.where(real_M[:, None], out_MN, 0)
