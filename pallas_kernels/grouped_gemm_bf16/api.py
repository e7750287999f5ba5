"""Grouped bfloat16 products: one right-hand matrix an expert, accumulated in float32.

The contiguous layout serves training and prefill, the masked one decoding; `pallas_kernels.groups` draws both.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.grouped_gemm_bf16 import reference, sm90
from pallas_kernels.groups import ALIGNMENT
from pallas_kernels.implementation import Implementation, choose

OUT_DTYPES = (jnp.bfloat16, jnp.float32)
MULTIPLE = 64  # of every dimension that a kernel cuts


def grouped_gemm_bf16(
    lhs_MK: Float[Array, 'M K'],
    rhs_EKN: Float[Array, 'E _ _'],
    group_sizes_E: Int[Array, ' _'],
    *,
    transpose_rhs: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """Returns `lhs[rows of e] @ rhs[e]` for every expert e, in the contiguous layout.

    Expert e owns `group_sizes_E[e]` rows from `group_starts(group_sizes_E)[e]` on. Other rows of `lhs` hold anything,
    and no row of a group sees them; in the output they mean nothing (the reference writes zeros).

    Args:
      lhs_MK: bfloat16 rows sorted by expert, each group padded to a multiple of 128 rows; so is M.
      rhs_EKN: bfloat16 (E, K, N), or (E, N, K) with `transpose_rhs`.
      group_sizes_E: int32 rows of each expert, zeros among them; padded, they fit M (not checked).
      transpose_rhs: contracts the last dimension of `rhs`: the same weight serves the gradient of its input.
      out_dtype: bfloat16 or float32; rounded once from the float32 sum.
      implementation: None takes the Hopper kernel on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: shapes or dtypes do not fit together, or M is not a multiple of 128.
      NotImplementedError: 'pallas' was asked for and K or N is not a multiple of 64, or there is no Hopper GPU.
    """
    name = 'grouped_gemm_bf16'
    k, n = _check_gemm(name, lhs_MK, rhs_EKN, group_sizes_E, transpose_rhs, out_dtype)
    _check_rows(name, lhs_MK.shape[0])
    serve = reference if choose(name, implementation, lambda: refusal(K=k, N=n)) == 'reference' else sm90
    return serve.grouped_gemm_bf16(lhs_MK, rhs_EKN, group_sizes_E, transpose_rhs, out_dtype)


def masked_gemm_bf16(
    lhs_MK: Float[Array, 'M K'],
    rhs_EKN: Float[Array, 'E _ _'],
    counts_E: Int[Array, ' _'],
    *,
    transpose_rhs: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """Returns `lhs[rows of e] @ rhs[e]` for every expert e, in the masked layout.

    Expert e owns R = M / E rows from `e * R` on, of which the first `counts_E[e]` are real. The others hold anything,
    and no real row sees them; in the output they mean nothing (the reference writes zeros). The kernel reads no weight
    of an expert without rows.

    Args:
      lhs_MK: bfloat16 rows.
      rhs_EKN: bfloat16 (E, K, N), or (E, N, K) with `transpose_rhs`.
      counts_E: int32 real rows of each expert, at most R each (not checked).
      transpose_rhs, out_dtype, implementation: as in `grouped_gemm_bf16`.

    Raises:
      ValueError: shapes or dtypes do not fit together, or E does not divide M.
      NotImplementedError: as in `grouped_gemm_bf16`; R must be a multiple of 64, too.
    """
    name = 'masked_gemm_bf16'
    k, n = _check_gemm(name, lhs_MK, rhs_EKN, counts_E, transpose_rhs, out_dtype)
    rows, experts = lhs_MK.shape[0], rhs_EKN.shape[0]
    if rows % experts:
        raise ValueError(f'{name}: M={rows} rows must be a multiple of E={experts} experts')
    chosen = choose(name, implementation, lambda: refusal(K=k, N=n, R=rows // experts))
    serve = reference if chosen == 'reference' else sm90
    return serve.masked_gemm_bf16(lhs_MK, rhs_EKN, counts_E, transpose_rhs, out_dtype)


def grouped_wgrad_bf16(
    lhs_MK: Float[Array, 'M K'],
    d_out_MN: Float[Array, '_ N'],
    group_sizes_E: Int[Array, ' E'],
    accumulator_EKN: Float32[Array, '_ _ _'] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float32[Array, 'E K N']:
    """Returns `lhs[rows of e].T @ d_out[rows of e]` for every expert e, plus the accumulator.

    Rows that pad a group must be zeros in both operands: they are contracted, too. Rows after the last group are not
    read. The gradient of an expert without rows is zero.

    Args:
      lhs_MK: bfloat16 inputs of the product, in the contiguous layout.
      d_out_MN: bfloat16 gradients of its outputs, in the same layout.
      group_sizes_E: int32 rows of each expert, as in `grouped_gemm_bf16`.
      accumulator_EKN: float32 gradients to add to; their buffer is reused when the caller donates it.
      implementation: as in `grouped_gemm_bf16`.

    Raises:
      ValueError: shapes or dtypes do not fit together, or M is not a multiple of 128.
      NotImplementedError: as in `grouped_gemm_bf16`.
    """
    name = 'grouped_wgrad_bf16'
    _check_bfloat16(name, lhs=lhs_MK, d_out=d_out_MN)
    (rows, k), n, experts = lhs_MK.shape, d_out_MN.shape[1], group_sizes_E.shape[0]
    if d_out_MN.shape[0] != rows:
        raise ValueError(f'{name}: lhs {lhs_MK.shape} and d_out {d_out_MN.shape} must have the same rows')
    _check_sizes(name, group_sizes_E, experts)
    _check_rows(name, rows)
    if accumulator_EKN is not None and accumulator_EKN.shape != (experts, k, n):
        raise ValueError(f'{name}: the accumulator has shape {accumulator_EKN.shape}, it must be {(experts, k, n)}')
    serve = reference if choose(name, implementation, lambda: refusal(K=k, N=n)) == 'reference' else sm90
    return serve.grouped_wgrad_bf16(lhs_MK, d_out_MN, group_sizes_E, accumulator_EKN)


def refusal(**sizes: int) -> str | None:
    """Why the Hopper kernels do not serve these dimensions; None if they do."""
    for letter, size in sizes.items():
        if size % MULTIPLE:
            return f'{letter}={size} must be a multiple of {MULTIPLE}'
    return None


def _check_gemm(
    operation: str, lhs_MK: Array, rhs_EKN: Array, sizes_E: Array, transpose_rhs: bool, out_dtype: DTypeLike
) -> Sequence[int]:
    """Raises unless the operands fit together; returns K and N."""
    _check_bfloat16(operation, lhs=lhs_MK, rhs=rhs_EKN)
    k, n = rhs_EKN.shape[:0:-1] if transpose_rhs else rhs_EKN.shape[1:]
    if lhs_MK.shape[1] != k:
        raise ValueError(
            f'{operation}: lhs {lhs_MK.shape} has K={lhs_MK.shape[1]}, rhs {rhs_EKN.shape} with {transpose_rhs=} K={k}'
        )
    _check_sizes(operation, sizes_E, rhs_EKN.shape[0])
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f'{operation}: {out_dtype=} must be bfloat16 or float32')
    return k, n


def _check_bfloat16(operation: str, **operands: Array) -> None:
    for side, x in operands.items():
        if x.dtype != jnp.bfloat16:
            raise ValueError(f'{operation}: {side} is {x.dtype}, it must be bfloat16')
        if 0 in x.shape:
            raise ValueError(f'{operation}: {side} has shape {x.shape}, it must not be empty')


def _check_sizes(operation: str, sizes_E: Array, experts: int) -> None:
    if sizes_E.shape != (experts,) or sizes_E.dtype != jnp.int32:
        raise ValueError(f'{operation}: the sizes are {sizes_E.dtype}{sizes_E.shape}, they must be int32{(experts,)}')


def _check_rows(operation: str, rows: int) -> None:
    if rows % ALIGNMENT:
        raise ValueError(f'{operation}: M={rows} rows must be a multiple of {ALIGNMENT}')
