"""Specification of the grouped matrix product, on `jax.lax.ragged_dot`."""

import jax
from jaxtyping import Array, Float, Int


def grouped_gemm(
    lhs_JK: Float[Array, 'J K'], rhs_EKN: Float[Array, 'E K N'], group_sizes_E: Int[Array, ' E']
) -> Float[Array, 'J N']:
    """Returns `lhs[j] @ rhs[e(j)]`: products accumulated in float32, rounded once to the type of `lhs`."""
    precision = jax.lax.Precision.HIGHEST if lhs_JK.dtype == jax.numpy.float32 else None
    return jax.lax.ragged_dot(lhs_JK, rhs_EKN, group_sizes_E, precision=precision)
