"""Grouped matrix product: rows sorted by group, one right-hand matrix a group."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_gemm import reference

Implementation = Literal['reference']


def grouped_gemm(
    lhs_JK: Float[Array, 'J K'],
    rhs_EKN: Float[Array, 'E K N'],
    group_sizes_E: Int[Array, ' E'],
    implementation: Implementation = 'reference',
) -> Float[Array, 'J N']:
    """Returns `lhs_JK[j] @ rhs_EKN[e]`, where group `e` owns `group_sizes_E[e]` consecutive rows.

    Rows past the sum of the group sizes come out as zeros. Empty groups are ordinary. Differentiable in both
    matrices.

    Args:
      lhs_JK: rows sorted by group.
      rhs_EKN: one matrix a group, of the same dtype as `lhs_JK`.
      group_sizes_E: int32 rows of each group; their sum is at most J.
      implementation: which code computes it.

    Raises:
      ValueError: dtypes differ or the implementation's name is unknown.
    """
    if lhs_JK.dtype != rhs_EKN.dtype:
        raise ValueError(f'grouped_gemm: lhs is {lhs_JK.dtype} and rhs {rhs_EKN.dtype}: they must be the same')
    if implementation != 'reference':
        raise ValueError(f"grouped_gemm: {implementation=} is unknown, choose 'reference'")
    return reference.grouped_gemm(lhs_JK, rhs_EKN, group_sizes_E.astype(jnp.int32))
