"""Specification of the block-scaled float8 products, in plain jax.numpy.

Both sum, over blocks of 128 contracted values, the float32 product of the e4m3 values times the two scales. An e4m3
product has 8 significant bits and 128 of them fit float32 nearly without loss, so the order inside a block hardly
matters; across blocks the sum is float32. The result is rounded once, to the output's dtype.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, Quantized


def gemm_fp8(lhs: Quantized, rhs: Quantized, out_dtype: DTypeLike) -> Float[Array, 'M N']:
    """`lhs @ rhs.T`; scales of 1x128 tiles (k, Q) on the left, of 128x128 blocks (n, k) on the right."""
    rhs_NK = rhs.values.astype(jnp.float32) * _spread(
        _spread(rhs.scales, 0, rhs.values.shape[0]), 1, rhs.values.shape[1]
    )
    return _product(dequantize_rows(lhs), rhs_NK).astype(out_dtype)


def wgrad_fp8(lhs: Quantized, rhs: Quantized, accumulator_MN: Array | None) -> Float32[Array, 'M N']:
    """`lhs @ rhs.T` plus the accumulator; scales of 1x128 tiles on both sides."""
    product_MN = _product(dequantize_rows(lhs), dequantize_rows(rhs))
    return product_MN if accumulator_MN is None else accumulator_MN + product_MN


def dequantize_rows(x: Quantized) -> Float32[Array, 'M K']:
    """The float32 matrix that values with 1x128 tiles stand for."""
    rows, width = x.values.shape
    return x.values.astype(jnp.float32) * _spread(x.scales[:, :rows], 0, width).T


def _spread(scales: Array, axis: int, size: int) -> Array:
    """Each scale repeated over its block of 128, the last block cut to `size`."""
    return jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=axis), 0, size, axis=axis)


def _product(lhs_MK: Array, rhs_NK: Array) -> Array:
    return jnp.einsum('MK,NK->MN', lhs_MK, rhs_NK, precision=jax.lax.Precision.HIGHEST)
