"""Products of block-scaled float8 rows with one matrix a group: the experts of a layer [DeepSeek-V3, 3.3].

Rows lie in a buffer of fixed size, in one of two layouts of `pallas_kernels.groups`: contiguous (training, prefill), where
each group begins at a multiple of 128 rows, and masked (decode), where each group owns as many rows. How many rows of the
buffer are real is known on the device alone. Rows that belong to no group may hold anything, NaN too, and so may what comes
out for them; no other row sees them.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels.fp8 import BLOCK, Quantized, blocks, check_dtypes, round_up
from pallas_kernels.gemm_fp8.api import OUT_DTYPES
from pallas_kernels.grouped_gemm_fp8 import reference, sm90
from pallas_kernels.groups import ALIGNMENT
from pallas_kernels.implementation import Implementation, choose


def grouped_gemm_fp8(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes_E: Shaped[Array, ' E'],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """Returns `lhs[rows of e] @ rhs[e].T` for every group e, contiguous layout: fprop or dgrad of experts.

    Args:
      lhs: values (M, K) with scales (k, M) of 1x128 tiles; M a multiple of 128.
      rhs: values (E, N, K) with scales (E, n, k) of 128x128 blocks: weights, contracted dimension last.
      group_sizes_E: int32 rows of each group, which padded to 128 each fit M; zeros are ordinary.
      out_dtype: bfloat16 or float32; rounded once from the float32 sum.
      implementation: None takes the Hopper kernel on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and K is not a multiple of 128 or N not of 64, or there is no Hopper
        GPU.
    """
    _check_weights('grouped_gemm_fp8', lhs, rhs, group_sizes_E, out_dtype)
    if choose('grouped_gemm_fp8', implementation, lambda: _refusal(lhs, rhs)) == 'reference':
        return reference.grouped_gemm_fp8(lhs, rhs, group_sizes_E, out_dtype)
    return sm90.grouped_gemm_fp8(lhs, rhs, group_sizes_E, out_dtype)


def masked_gemm_fp8(
    lhs: Quantized,
    rhs: Quantized,
    counts_E: Shaped[Array, ' E'],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """As `grouped_gemm_fp8` for the masked layout: group e owns rows `[e * R, (e + 1) * R)`, R = M / E, the first
    `counts_E[e]` of which are real. The kernel does not read the weights of a group without rows.

    Raises:
      ValueError: shapes or dtypes do not fit together, or R is no integer.
      NotImplementedError: as in `grouped_gemm_fp8`, or R is not a multiple of 64.
    """
    _check_weights('masked_gemm_fp8', lhs, rhs, counts_E, out_dtype)
    rows, rest = divmod(lhs.values.shape[0], counts_E.shape[0])
    if rest:
        raise ValueError(f'masked_gemm_fp8: {lhs.values.shape[0]} rows are no multiple of {counts_E.shape[0]} groups')
    refusal = lambda: f'R={rows} rows a group must be a multiple of 64' if rows % 64 else _refusal(lhs, rhs)  # noqa: E731
    if choose('masked_gemm_fp8', implementation, refusal) == 'reference':
        return reference.masked_gemm_fp8(lhs, rhs, counts_E, out_dtype)
    return sm90.masked_gemm_fp8(lhs, rhs, counts_E, out_dtype)


def grouped_wgrad_fp8(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes_E: Shaped[Array, ' E'],
    accumulator_EMN: Float32[Array, 'E M N'] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float32[Array, 'E M N']:
    """Returns `lhs[:, tokens of e] @ rhs[:, tokens of e].T`, plus the accumulator: gradients of experts' weights.

    Args:
      lhs: values (M, K) with scales (k, Q) of 1x128 tiles, K tokens last, in the contiguous layout: inputs, transposed.
        Tokens that pad a group to a multiple of 128 must be zeros here or in `rhs`, and no NaN in either.
      rhs: values (N, K) with scales (k, Q): the outputs' gradients, transposed.
      group_sizes_E: int32 tokens of each group. A group without any has a gradient of zeros.
      accumulator_EMN: gradients to add to; the buffer is reused when the caller donates it.
      implementation: as in `grouped_gemm_fp8`.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and M or N is not a multiple of 64, or there is no Hopper GPU.
    """
    operation = 'grouped_wgrad_fp8'
    for side, x in (('lhs', lhs), ('rhs', rhs)):
        _check_rows(operation, side, x)
    if lhs.values.shape[1] != rhs.values.shape[1]:
        raise ValueError(f'{operation}: lhs {lhs.values.shape} and rhs {rhs.values.shape} must have the same width')
    if lhs.values.shape[1] % ALIGNMENT:
        raise ValueError(f'{operation}: {lhs.values.shape[1]} tokens must be a multiple of {ALIGNMENT}')
    _check_sizes(operation, group_sizes_E)
    shape = (group_sizes_E.shape[0], lhs.values.shape[0], rhs.values.shape[0])
    if accumulator_EMN is not None and (accumulator_EMN.shape, accumulator_EMN.dtype) != (shape, jnp.float32):
        raise ValueError(
            f'{operation}: the accumulator is {accumulator_EMN.dtype}{accumulator_EMN.shape}, it must be float32{shape}'
        )

    def refusal() -> str | None:
        wrong = [f'{letter}={size}' for letter, size in zip('MN', shape[1:], strict=True) if size % 64]
        return f'{" and ".join(wrong)} must be a multiple of 64' if wrong else None

    if choose(operation, implementation, refusal) == 'reference':
        return reference.grouped_wgrad_fp8(lhs, rhs, group_sizes_E, accumulator_EMN)
    return sm90.grouped_wgrad_fp8(lhs, rhs, group_sizes_E, accumulator_EMN)


def _refusal(lhs: Quantized, rhs: Quantized) -> str | None:
    width, columns = lhs.values.shape[1], rhs.values.shape[1]
    for letter, size, multiple in (('K', width, BLOCK), ('N', columns, 64)):
        if size % multiple:
            return f'{letter}={size} must be a multiple of {multiple}'
    return None


def _check_weights(operation: str, lhs: Quantized, rhs: Quantized, sizes_E: Array, out_dtype: DTypeLike) -> None:
    _check_rows(operation, 'lhs', lhs)
    _check_sizes(operation, sizes_E)
    check_dtypes(operation, 'rhs', rhs)
    shape, groups = rhs.values.shape, sizes_E.shape[0]
    if len(shape) != 3 or 0 in shape or shape[0] != groups or shape[2] != lhs.values.shape[1]:
        raise ValueError(
            f'{operation}: rhs values have shape {shape}, lhs {lhs.values.shape} and {groups} groups need '
            f'({groups}, N, {lhs.values.shape[1]})'
        )
    wanted = (groups, blocks(shape[1]), blocks(shape[2]))
    if rhs.scales.shape != wanted:
        raise ValueError(f'{operation}: rhs scales have shape {rhs.scales.shape}, values {shape} need {wanted}')
    if operation == 'grouped_gemm_fp8' and lhs.values.shape[0] % ALIGNMENT:
        raise ValueError(f'{operation}: {lhs.values.shape[0]} rows must be a multiple of {ALIGNMENT}')
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f'{operation}: {out_dtype=} must be bfloat16 or float32')


def _check_rows(operation: str, side: str, x: Quantized) -> None:
    check_dtypes(operation, side, x)
    if x.values.ndim != 2 or 0 in x.values.shape:
        raise ValueError(f'{operation}: {side} values have shape {x.values.shape}, they must be a matrix')
    rows, width = x.values.shape
    if x.scales.shape != (wanted := (blocks(width), round_up(rows, BLOCK))):
        raise ValueError(f'{operation}: {side} scales have shape {x.scales.shape}, values {rows, width} need {wanted}')


def _check_sizes(operation: str, sizes_E: Array) -> None:
    if sizes_E.ndim != 1 or not sizes_E.size or sizes_E.dtype != jnp.int32:
        raise ValueError(f'{operation}: sizes are {sizes_E.dtype}{sizes_E.shape}, they must be a vector of int32')
