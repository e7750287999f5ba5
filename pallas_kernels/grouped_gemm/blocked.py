"""Grouped matrix product for CPUs, in plain jax.numpy.

XLA turns `ragged_dot` on a CPU into one dense product per group over all rows, `E` times the work. Here rows are
gathered into blocks of one group each, and every block is multiplied by its group's matrix:

  groups of 3, 0, 5 rows, blocks of 4:   [a a a .] [c c c c] [c . . .]

At most `J // R + min(E, J)` blocks of R rows hold any row, so the work is that of J rows and one partial block a group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_BLOCK_ROWS = 128
MIN_BLOCK_ROWS = 8


class _Blocks(NamedTuple):
    """Which group each block belongs to, which rows it holds, and in which place each row stands."""

    group_b: Int[Array, ' b']
    row_br: Int[Array, 'b r']
    used_br: Bool[Array, 'b r']
    place_J: Int[Array, ' J']
    used_J: Bool[Array, ' J']


@jax.custom_vjp
def grouped_gemm(
    lhs_JK: Float[Array, 'J K'], rhs_EKN: Float[Array, 'E K N'], group_sizes_E: Int[Array, ' E']
) -> Float[Array, 'J N']:
    """As the reference; rows past the sum of the group sizes come out as zeros."""
    blocks = _blocks(lhs_JK.shape[0], group_sizes_E)
    y_brN = _multiply('brk,bkn->brn', _gather(lhs_JK, blocks), rhs_EKN[blocks.group_b])
    return _scatter(y_brN, blocks)


def _forward(lhs_JK: Array, rhs_EKN: Array, group_sizes_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_gemm(lhs_JK, rhs_EKN, group_sizes_E), (lhs_JK, rhs_EKN, group_sizes_E)


def _backward(residuals: tuple[Array, Array, Array], d_JN: Array) -> tuple[Array, Array, None]:
    lhs_JK, rhs_EKN, group_sizes_E = residuals
    blocks = _blocks(lhs_JK.shape[0], group_sizes_E)
    d_brN = _gather(d_JN, blocks)
    d_lhs = _scatter(_multiply('brn,bkn->brk', d_brN, rhs_EKN[blocks.group_b]), blocks)
    d_rhs_bKN = _multiply('brk,brn->bkn', _gather(lhs_JK, blocks), d_brN)
    d_rhs = jax.ops.segment_sum(d_rhs_bKN, blocks.group_b, num_segments=rhs_EKN.shape[0])
    return d_lhs, d_rhs.astype(rhs_EKN.dtype), None


grouped_gemm.defvjp(_forward, _backward)


def _blocks(num_rows: int, group_sizes_E: Array) -> _Blocks:
    num_groups = group_sizes_E.shape[0]
    height = MIN_BLOCK_ROWS
    while height < MAX_BLOCK_ROWS and height * num_groups < num_rows:
        height *= 2
    num_blocks = num_rows // height + min(num_groups, num_rows)
    row_end_E = jnp.cumsum(group_sizes_E)
    block_end_E = jnp.cumsum(-(-group_sizes_E // height))
    row_start_E = row_end_E - group_sizes_E
    block_start_E = jnp.concatenate([jnp.zeros(1, block_end_E.dtype), block_end_E[:-1]])

    blocks = jnp.arange(num_blocks)
    group_b = jnp.minimum(jnp.searchsorted(block_end_E, blocks, side='right'), num_groups - 1)
    row_br = (row_start_E[group_b] + (blocks - block_start_E[group_b]) * height)[:, None] + jnp.arange(height)
    used_br = row_br < row_end_E[group_b][:, None]

    rows = jnp.arange(num_rows)
    group_J = jnp.minimum(jnp.searchsorted(row_end_E, rows, side='right'), num_groups - 1)
    place_J = block_start_E[group_J] * height + rows - row_start_E[group_J]
    return _Blocks(group_b, jnp.minimum(row_br, num_rows - 1), used_br, place_J, rows < row_end_E[-1])


def _gather(x_JK: Array, blocks: _Blocks) -> Array:
    return jnp.where(blocks.used_br[..., None], x_JK[blocks.row_br], 0)


def _scatter(y_brN: Array, blocks: _Blocks) -> Array:
    y_JN = y_brN.reshape(-1, y_brN.shape[-1])[jnp.minimum(blocks.place_J, y_brN.shape[0] * y_brN.shape[1] - 1)]
    return jnp.where(blocks.used_J[:, None], y_JN, 0)


def _multiply(equation: str, x: Array, y: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision)
