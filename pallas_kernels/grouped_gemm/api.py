"""Grouped matrix product: rows sorted by group, one right-hand matrix a group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_gemm import blocked, reference

_IMPLEMENTATIONS = {'reference': reference.grouped_gemm, 'blocked': blocked.grouped_gemm}


def grouped_gemm(
    lhs_JK: Float[Array, 'J K'],
    rhs_EKN: Float[Array, 'E K N'],
    group_sizes_E: Int[Array, ' E'],
    implementation: str | None = None,
) -> Float[Array, 'J N']:
    """Returns `lhs_JK[j] @ rhs_EKN[e]`, where group `e` owns `group_sizes_E[e]` consecutive rows.

    Rows past the sum of the group sizes come out as zeros. Empty groups are ordinary. Differentiable in both
    matrices.

    Args:
      lhs_JK: rows sorted by group.
      rhs_EKN: one matrix a group, of the same dtype as `lhs_JK`.
      group_sizes_E: int32 rows of each group; their sum is at most J.
      implementation: which code computes it; None takes 'blocked' on a CPU and 'reference' elsewhere.

    Raises:
      ValueError: dtypes differ or the implementation's name is unknown.
    """
    if lhs_JK.dtype != rhs_EKN.dtype:
        raise ValueError(f'grouped_gemm: lhs is {lhs_JK.dtype} and rhs {rhs_EKN.dtype}: they must be the same')
    if implementation is None:
        implementation = 'blocked' if jax.default_backend() == 'cpu' else 'reference'
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f'grouped_gemm: {implementation=} is unknown, choose one of {sorted(_IMPLEMENTATIONS)}')
    return _IMPLEMENTATIONS[implementation](lhs_JK, rhs_EKN, group_sizes_E.astype(jnp.int32))
