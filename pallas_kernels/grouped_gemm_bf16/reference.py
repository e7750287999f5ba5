"""Specification of the grouped bfloat16 products: sums in float32, rounded once to the type of the output."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32

from pallas_kernels.fp8 import rounded
from pallas_kernels.groups import ALIGNMENT, contiguous_tiles, group_starts


def grouped_gemm_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    rhs_EKN: BFloat16[Array, 'E _ _'],
    group_sizes_E: Int32[Array, ' E'],
    transpose_rhs: bool,
    out_dtype: DTypeLike,
) -> Float[Array, 'M N']:
    """Returns `lhs[m] @ rhs[e(m)]`, zeros for rows of no group.

    A tile of 128 rows holds rows of one group, and no tile of the buffer before the last group's end is without any:
    tile t of the list is tile t of the buffer.
    """
    equation = 'rk,nk->rn' if transpose_rhs else 'rk,kn->rn'
    columns = rhs_EKN.shape[1 if transpose_rhs else 2]

    def multiply(tile):
        lhs_RK, expert, real_R = tile

        def product():
            return jnp.einsum(equation, lhs_RK, rhs_EKN[expert], preferred_element_type=jnp.float32)

        out_RN = lax.cond(real_R.any(), product, lambda: jnp.zeros((ALIGNMENT, columns), jnp.float32))
        return rounded(jnp.where(real_R[:, None], out_RN, 0), out_dtype)

    expert_T, real_TR = _owners(group_sizes_E, lhs_MK.shape[0])
    out_TRN = lax.map(multiply, (lhs_MK.reshape(-1, ALIGNMENT, lhs_MK.shape[1]), expert_T, real_TR))
    return out_TRN.reshape(-1, columns)


def masked_gemm_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    rhs_EKN: BFloat16[Array, 'E _ _'],
    counts_E: Int32[Array, ' E'],
    transpose_rhs: bool,
    out_dtype: DTypeLike,
) -> Float[Array, 'M N']:
    """Returns `lhs[e, r] @ rhs[e]` where `r < counts[e]`, zeros elsewhere."""
    experts = rhs_EKN.shape[0]
    lhs_ERK = lhs_MK.reshape(experts, -1, lhs_MK.shape[1])
    equation = 'erk,enk->ern' if transpose_rhs else 'erk,ekn->ern'
    out_ERN = jnp.einsum(equation, lhs_ERK, rhs_EKN, preferred_element_type=jnp.float32)
    real_ER = jnp.arange(lhs_ERK.shape[1]) < counts_E[:, None]
    out_MN = jnp.where(real_ER[..., None], out_ERN, 0).reshape(lhs_MK.shape[0], -1)
    return rounded(out_MN, out_dtype)


def grouped_wgrad_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    d_out_MN: BFloat16[Array, 'M N'],
    group_sizes_E: Int32[Array, ' E'],
    accumulator_EKN: Float32[Array, 'E K N'] | None,
) -> Float32[Array, 'E K N']:
    """Returns `lhs[rows of e].T @ d_out[rows of e]`, plus the accumulator."""
    expert_T, real_TR = _owners(group_sizes_E, lhs_MK.shape[0])

    def add(sums_EKN, tile):
        lhs_RK, d_out_RN, expert, real_R = tile

        def added():
            lhs, d_out = (jnp.where(real_R[:, None], x, 0) for x in (lhs_RK, d_out_RN))
            product = jnp.einsum('rk,rn->kn', lhs, d_out, preferred_element_type=jnp.float32)
            return sums_EKN.at[expert].add(product)

        return lax.cond(real_R.any(), added, lambda: sums_EKN), None

    lhs_TRK, d_out_TRN = (x.reshape(-1, ALIGNMENT, x.shape[1]) for x in (lhs_MK, d_out_MN))
    sums_EKN = jnp.zeros((group_sizes_E.shape[0], lhs_MK.shape[1], d_out_MN.shape[1]), jnp.float32)
    sums_EKN, _ = lax.scan(add, sums_EKN, (lhs_TRK, d_out_TRN, expert_T, real_TR))
    return sums_EKN if accumulator_EKN is None else accumulator_EKN + sums_EKN


def _owners(group_sizes_E: jax.Array, buffer_rows: int) -> tuple[Int32[Array, ' T'], Bool[Array, 'T R']]:
    """The group of each tile of the buffer, and which of its rows are real."""
    tiles = contiguous_tiles(group_sizes_E, ALIGNMENT, buffer_rows)
    end_T = (group_starts(group_sizes_E) + group_sizes_E)[tiles.expert_T]
    active_T = jnp.arange(tiles.row_T.shape[0]) < tiles.count
    real_TR = (tiles.row_T[:, None] + jnp.arange(ALIGNMENT) < end_T[:, None]) & active_T[:, None]
    return tiles.expert_T, real_TR
