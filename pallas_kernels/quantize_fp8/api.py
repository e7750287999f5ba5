"""Quantisation to block-scaled float8, and to 12 bits for what is kept between the passes.

The recipe multiplies in e4m3 with one scale a tile: activations and gradients in tiles of 128 values of the dimension
that the product contracts, weights in blocks of 128x128. What each product reads:

  y  = x  @ w      rows of x,       the transposed copy of the blocks of w
  dx = dy @ w.T    rows of dy,      the natural copy of the blocks of w
  dw = x.T @ dy    columns of x,    columns of dy: along tokens, so they are quantised anew, and stored transposed

Every function here reads its input once. `reference.py` says what is computed, and where it rounds.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.implementation import Implementation, choose
from pallas_kernels.quantize_fp8 import reference, sm90
from pallas_kernels.quantize_fp8.reference import E5M6


def quantize_rows(
    x_MK: Float[Array, 'M K'], *, power_of_two: bool = False, implementation: Implementation | None = None
) -> Quantized:
    """Returns x in tiles of one row and 128 values of K: values (M, K), scales (k, Q).

    Q is M rounded up to a multiple of 128; the scales of the rows past M are those of zeros.

    Args:
      x_MK: bfloat16 or float32.
      power_of_two: scales are powers of two, for values that are quantised again along the other dimension.
      implementation: 'reference', 'pallas' (a Hopper GPU, bfloat16, K a multiple of 64), or None for the best that serves.

    Raises:
      ValueError: wrong dtype or rank, an empty dimension, or an unknown implementation.
      NotImplementedError: 'pallas' was asked for and cannot serve this call.
    """
    _check('quantize_rows', x_MK)
    if choose('quantize_rows', implementation, lambda: sm90.refusal(x_MK)) == 'pallas':
        return sm90.quantize_rows(x_MK, power_of_two)
    return reference.quantize_rows(x_MK, power_of_two)


def quantize_columns(
    x_MK: Float[Array, 'M K'], *, power_of_two: bool = False, implementation: Implementation | None = None
) -> Quantized:
    """Returns the transpose of x in tiles of one channel and 128 rows: values (K, Q), scales (m, K).

    Q is M rounded up to a multiple of 128; the values past M are zeros. Rows of this matrix are the channels, and its
    contracted dimension is that of tokens. The scales have K rounded up to a multiple of 128 columns. Arguments and
    errors are those of `quantize_rows`.
    """
    _check('quantize_columns', x_MK)
    if choose('quantize_columns', implementation, lambda: sm90.refusal(x_MK)) == 'pallas':
        return sm90.quantize_columns(x_MK, power_of_two)
    return reference.quantize_columns(x_MK, power_of_two)


def requantize_columns(
    x: Quantized, *, power_of_two: bool = False, implementation: Implementation | None = None
) -> Quantized:
    """Returns rows in float8 as `quantize_columns` would return the matrix that they stand for, rounded to bfloat16.

    For the gradients of weights, where the rows were kept or moved as float8. With scales that are powers of two values
    are rounded a second time only.

    Args:
      x: values (M, K) with scales (k, Q) of 1x128 tiles.
      power_of_two, implementation: as in `quantize_columns`; 'pallas' serves K that are multiples of 128.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve this call.
    """
    M, K = x.values.shape
    wanted = (blocks(K), round_up(M, BLOCK))
    if x.values.dtype != E4M3 or x.scales.dtype != jnp.float32 or x.scales.shape != wanted or 0 in (M, K):
        raise ValueError(
            f'requantize_columns: the input is {x.values.dtype}{x.values.shape} with scales '
            f'{x.scales.dtype}{x.scales.shape}, it must be float8_e4m3fn, not empty, with float32 scales {wanted}'
        )
    refusal = lambda: f'{K=}, the kernel serves multiples of {BLOCK}' if K % BLOCK else None  # noqa: E731
    serve = sm90 if choose('requantize_columns', implementation, refusal) == 'pallas' else reference
    return serve.requantize_columns(x, power_of_two)


def quantize_rows_and_columns(
    x_MK: Float[Array, 'M K'], *, power_of_two: bool = False, implementation: Implementation | None = None
) -> tuple[Quantized, Quantized]:
    """Returns `quantize_rows` and `quantize_columns` of x, from one read of it. Arguments and errors are theirs."""
    _check('quantize_rows_and_columns', x_MK)
    if choose('quantize_rows_and_columns', implementation, lambda: sm90.refusal(x_MK)) == 'pallas':
        return sm90.quantize_rows_and_columns(x_MK, power_of_two)
    return reference.quantize_rows_and_columns(x_MK, power_of_two)


def quantize_blocks(
    w_KN: Float[Array, '*E K N'],
    *right: Float[Array, '*E K _'],
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Quantized]:
    """Returns w in blocks of 128x128, twice: values (K, N) with scales (k, n), and both transposed.

    Blocks at the edges are partial. The first is what the product with w transposed reads, the second what the
    product with w reads. A stack (E, K, N) is quantised matrix by matrix. 'pallas' serves both dtypes, K and N that are
    multiples of 64, of stacks K that are multiples of 128. Arguments and errors are otherwise those of `quantize_rows`.

    Args:
      right: weights of the same dtype and K that stand to the right of w, and are quantised as one matrix with it: N is
        then that of all. All but the last have a multiple of 128 columns.
    """
    weights = w_KN, *right
    for one in weights:
        _check('quantize_blocks', one, stacks=True)
        if one.dtype != w_KN.dtype or one.shape[:-1] != w_KN.shape[:-1]:
            raise ValueError(
                f'quantize_blocks: weights side by side are {w_KN.dtype}{w_KN.shape} and {one.dtype}{one.shape}: '
                f'they must differ in their last dimension alone'
            )
    for one in weights[:-1]:
        if one.shape[-1] % BLOCK:
            raise ValueError(
                f'quantize_blocks: a weight of {one.shape[-1]} columns, all but the last must have multiples of {BLOCK}'
            )
    if choose('quantize_blocks', implementation, lambda: sm90.blocks_refusal(*weights)) == 'pallas':
        return sm90.quantize_blocks(*weights, power_of_two=power_of_two)
    joined_KN = jnp.concatenate(weights, axis=-1) if right else w_KN
    quantize = functools.partial(reference.quantize_blocks, power_of_two=power_of_two)
    return quantize(joined_KN) if w_KN.ndim == 2 else jax.vmap(quantize)(joined_KN)


def quantize_e5m6(x_MK: Float[Array, 'M K'], *, implementation: Implementation | None = None) -> E5M6:
    """Returns x in 12 bits a value, one scale in tiles of one row and 128 values of K.

    The scale is the smallest power of two that brings the tile to at most 65024; a value times its inverse is rounded
    once, to nearest, ties to even, to 1+5+6 bits. For activations that the backward pass quantises once more.

    Args:
      x_MK: bfloat16 or float32, K a multiple of 128.
      implementation: 'reference', 'pallas' (a Hopper GPU, bfloat16), or None for the best that serves.

    Raises:
      ValueError: wrong dtype or rank, an empty dimension, K no multiple of 128, or an unknown implementation.
      NotImplementedError: 'pallas' was asked for and cannot serve this call.
    """
    _check('quantize_e5m6', x_MK)
    if (K := x_MK.shape[1]) % BLOCK:
        raise ValueError(f'quantize_e5m6: {K=} must be a multiple of {BLOCK}')
    if choose('quantize_e5m6', implementation, lambda: sm90.refusal(x_MK)) == 'pallas':
        return sm90.quantize_e5m6(x_MK)
    return reference.quantize_e5m6(x_MK)


def dequantize_e5m6(packed: E5M6, *, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Float[Array, 'M K']:
    """Returns the values of `packed` times their scales, in `dtype`: bfloat16 and float32 hold them exactly.

    One pass over the bytes, which XLA fuses into what reads the result: there is no kernel.
    """
    return reference.dequantize_e5m6(packed, dtype)


def _check(operation: str, x: Array, stacks: bool = False) -> None:
    if x.ndim not in ((2, 3) if stacks else (2,)) or 0 in x.shape:
        raise ValueError(f'{operation}: the input has shape {x.shape}, it must be a matrix that is not empty')
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f'{operation}: the input is {x.dtype}, it must be bfloat16 or float32')
