"""Specification of the block-scaled float8 products, in plain jax.numpy.

Both sum, over blocks of 128 contracted values, the float32 product of the e4m3 values times the two scales. An e4m3
product has 8 significant bits and 128 of them fit float32 nearly without loss, so the order inside a block hardly
matters; across blocks the sum is float32. The result is rounded once, to the output's dtype.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import Quantized, dequantize_blocks, dequantize_rows, rounded


def gemm_fp8(lhs: Quantized, rhs: Quantized, out_dtype: DTypeLike) -> Float[Array, 'M N']:
    """`lhs @ rhs.T`; scales of 1x128 tiles (k, Q) on the left, of 128x128 blocks (n, k) on the right."""
    return rounded(_product(dequantize_rows(lhs), dequantize_blocks(*rhs)), out_dtype)


def wgrad_fp8(lhs: Quantized, rhs: Quantized, accumulator_MN: Array | None) -> Float32[Array, 'M N']:
    """`lhs @ rhs.T` plus the accumulator; scales of 1x128 tiles on both sides."""
    product_MN = _product(dequantize_rows(lhs), dequantize_rows(rhs))
    return product_MN if accumulator_MN is None else accumulator_MN + product_MN


def _product(lhs_MK: Array, rhs_NK: Array) -> Array:
    return jnp.einsum('MK,NK->MN', lhs_MK, rhs_NK, precision=jax.lax.Precision.HIGHEST)
