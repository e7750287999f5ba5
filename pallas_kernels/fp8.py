"""Block-scaled float8: what the operations hand to each other.

Letters of this package: `M` rows (tokens), `K` contracted dimension, `N` columns; the small letter counts blocks of 128
of the same dimension, the last of which may be partial: `k = ceil(K / 128)`. `Q` is M rounded up to a multiple of 128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

BLOCK = 128
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


class Quantized(NamedTuple):
    """A matrix as float8 values and the float32 scales they are to be multiplied by.

    Attributes:
      values: e4m3. The contracted dimension is the last one (contiguous), as the tensor cores read it.
      scales: one a tile of `values`. Tiles of 1x128 (one row, 128 contracted values): (contracted blocks, rows), so that
        the scales of neighbouring rows are contiguous; rows are rounded up to a multiple of 128, since copies out
        of shared memory in one dimension are not clipped; what stands for the added rows means nothing. Blocks of 128x128: (row blocks, contracted blocks).
    """

    values: Float[Array, 'rows contracted']
    scales: Float32[Array, 'a b']


def dequantize_rows(x: Quantized) -> Float32[Array, 'M K']:
    """The float32 matrix that values with 1x128 tiles stand for."""
    rows, width = x.values.shape
    scales_MK = jnp.repeat(x.scales.T[:rows], BLOCK, axis=1)[:, :width]
    return x.values.astype(jnp.float32) * scales_MK


def dequantize_blocks(
    values: Float[Array, '*stack N K'], scales: Float32[Array, '*stack n k']
) -> Float32[Array, '*stack N K']:
    """The float32 matrices that values with 128x128 blocks stand for."""
    rows, width = values.shape[-2:]
    spread = jnp.repeat(jnp.repeat(scales, BLOCK, axis=-2), BLOCK, axis=-1)
    return values.astype(jnp.float32) * spread[..., :rows, :width]


def rounded(x: Float32[Array, '...'], dtype: DTypeLike) -> Float[Array, '...']:
    """x in another float type, rounded for sure: XLA may cancel a plain conversion against a later one back to float32."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant).astype(dtype)


def check_dtypes(operation: str, side: str, x: Quantized) -> None:
    """Raises `ValueError` unless values and scales of this operand have their types."""
    if x.values.dtype != E4M3 or x.scales.dtype != jnp.float32:
        raise ValueError(
            f'{operation}: {side} is {x.values.dtype} with {x.scales.dtype} scales, '
            'it must be float8_e4m3fn with float32 scales'
        )


def blocks(size: int) -> int:
    """Number of blocks of 128 that cover `size`."""
    return -(-size // BLOCK)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
