"""Dense products of block-scaled float8 matrices, accumulated in float32 [DeepSeek-V3, 3.3.2].

Hopper's tensor cores keep about 14 bits of a sum of e4m3 products, so partial sums move to float32 registers after every
128 contracted values, which is also where the scales come in.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, Quantized, blocks, check_dtypes, round_up
from pallas_kernels.gemm_fp8 import reference, sm90
from pallas_kernels.implementation import Implementation, choose

OUT_DTYPES = (jnp.bfloat16, jnp.float32)


def gemm_fp8(
    lhs: Quantized,
    rhs: Quantized,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """Returns `lhs @ rhs.T`: a linear layer's output (fprop) or its input's gradient (dgrad).

    Args:
      lhs: values (M, K) with scales (k, Q) of 1x128 tiles: activations or their gradients.
      rhs: values (N, K) with scales (n, k) of 128x128 blocks: a weight, contracted dimension last.
      out_dtype: bfloat16 or float32; rounded once from the float32 sum.
      implementation: None takes the Hopper kernel on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and K is not a multiple of 128 or N not of 64, or there is no Hopper
        GPU.
    """
    _check('gemm_fp8', lhs, rhs, rhs_scales=(blocks(rhs.values.shape[0]), blocks(rhs.values.shape[1])))
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f'gemm_fp8: {out_dtype=} must be bfloat16 or float32')
    if choose('gemm_fp8', implementation, lambda: refusal(1, lhs, rhs)) == 'reference':
        return reference.gemm_fp8(lhs, rhs, out_dtype)
    return sm90.gemm_fp8(lhs, rhs, out_dtype)


def wgrad_fp8(
    lhs: Quantized,
    rhs: Quantized,
    accumulator_MN: Float32[Array, 'M N'] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float32[Array, 'M N']:
    """Returns `lhs @ rhs.T`, plus the accumulator: a weight's gradient, contracted over tokens.

    Args:
      lhs: values (M, K) with scales (k, Q) of 1x128 tiles, K tokens last: a linear layer's input, transposed.
      rhs: values (N, K) with scales (k, Q) of 1x128 tiles: the output's gradient, transposed.
      accumulator_MN: a gradient to add to; its buffer is reused when the caller donates it.
      implementation: as in `gemm_fp8`.

    Raises:
      ValueError, NotImplementedError: as in `gemm_fp8`; M must be a multiple of 64, too.
    """
    _check('wgrad_fp8', lhs, rhs, rhs_scales=(blocks(rhs.values.shape[1]), round_up(rhs.values.shape[0], BLOCK)))
    shape = (lhs.values.shape[0], rhs.values.shape[0])
    if accumulator_MN is not None and (accumulator_MN.shape, accumulator_MN.dtype) != (shape, jnp.float32):
        raise ValueError(
            f'wgrad_fp8: the accumulator is {accumulator_MN.dtype}{accumulator_MN.shape}, it must be float32{shape}'
        )
    if choose('wgrad_fp8', implementation, lambda: refusal(64, lhs, rhs)) == 'reference':
        return reference.wgrad_fp8(lhs, rhs, accumulator_MN)
    return sm90.wgrad_fp8(lhs, rhs, accumulator_MN)


def refusal(rows_multiple: int, lhs: Quantized, rhs: Quantized) -> str | None:
    """Why the Hopper kernels do not serve these shapes; None if they do."""
    (rows, width), columns = lhs.values.shape, rhs.values.shape[0]
    for letter, size, multiple in (('K', width, BLOCK), ('N', columns, 64), ('M', rows, rows_multiple)):
        if size % multiple:
            return f'{letter}={size} must be a multiple of {multiple}'
    return None


def _check(operation: str, lhs: Quantized, rhs: Quantized, rhs_scales: tuple[int, int]) -> None:
    for side, x in (('lhs', lhs), ('rhs', rhs)):
        if x.values.ndim != 2 or 0 in x.values.shape:
            raise ValueError(f'{operation}: {side} values have shape {x.values.shape}, they must be a matrix')
        check_dtypes(operation, side, x)
    if lhs.values.shape[1] != rhs.values.shape[1]:
        raise ValueError(f'{operation}: lhs {lhs.values.shape} and rhs {rhs.values.shape} must have the same width')
    rows, width = lhs.values.shape
    for side, x, shape in (('lhs', lhs, (blocks(width), round_up(rows, BLOCK))), ('rhs', rhs, rhs_scales)):
        if x.scales.shape != shape:
            raise ValueError(
                f'{operation}: {side} scales have shape {x.scales.shape}, values of shape {x.values.shape} '
                f'in blocks of {BLOCK} need {shape}'
            )
