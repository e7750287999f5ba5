"""Quantisation to float8 in tiles of 128: the specification, in plain jax.numpy.

Of a tile of values x, with a = max(max |x|, 2**-116):

  scale   = a * (1 / 448)              in float32
  value_i = e4m3(x_i * (448 / a))      float32 division and product, then one rounding to nearest, ties to even

The scale of a power of two is the smallest one that is at least a / 448; then x_i / scale is exact, and e4m3 is the
only rounding. The floor 2**-116 keeps scale and multiplier ordinary float32 numbers: a tile of zeros gives zeros, and
one of 1e-30 keeps its precision. No finite x rounds past 448, since the division and the product err by 2**-23.

A tile that holds a NaN or an infinity becomes NaN, all its values and its scale, and no other tile does. Subnormal
float32 inputs count as zeros where the device flushes them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.fp8 import BLOCK, E4M3, E4M3_MAX, Quantized, blocks, dequantize_rows, round_up, rounded

AMAX_FLOOR = 2.0**-116
E5M6_AMAX_FLOOR = 2.0**-110

_EXPONENT_BITS = 0x7F800000


class E5M6(NamedTuple):
    """A matrix in 12 bits a value: a sign, 5 exponent bits, 6 mantissa bits, and a scale for each tile of 1x128.

    A value is the upper 12 bits of a float16, times its scale. The upper 8 of them are one byte of `high_MK`. The
    lower 4 of values j and j + 64 of a tile, j < 64, are the lower and the upper half of byte j of that tile's 64
    bytes of `low_Mh`, h = K / 2.

    Attributes:
      high_MK: sign, exponent and the upper 2 mantissa bits.
      low_Mh: the lower 4 mantissa bits of two values.
      scales_kQ: float32 powers of two; Q is M rounded up to a multiple of 128.
    """

    high_MK: UInt8[Array, 'M K']
    low_Mh: UInt8[Array, 'M h']
    scales_kQ: Float32[Array, 'k Q']


def scale_and_multiplier(amax: Array, power_of_two: bool) -> tuple[Array, Array]:
    """The scale of tiles whose largest magnitudes are `amax`, float32, and what their values are multiplied by.

    Both are NaN where amax is not finite. Written in operations that kernels have too: they call this function.
    """
    if power_of_two:
        return _power_of_two(amax, AMAX_FLOOR, 8, 0x600000)
    floored = jnp.maximum(amax, AMAX_FLOOR)
    return _where_finite(amax, floored * (1 / E4M3_MAX), nearest_quotient(E4M3_MAX / floored, floored))


def nearest_quotient(quotient: Array, divisor: Array) -> Array:
    """448 / divisor, rounded to nearest, from a float32 quotient that is at most two last bits away from it.

    GPUs divide to within two last bits, unless told otherwise, which kernels cannot. With 24-bit integer mantissas,
    448 is 7 * 2**t, t > 32, in units of the product quotient * divisor: modulo 2**32 nothing is left of it, and the
    low bits of the product of the mantissas are the remainder, exactly, with the sign turned.
    """
    bits, divisor_bits = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (quotient, divisor))
    divisor_mantissa = (divisor_bits & 0x7FFFFF) | 0x800000
    # The second time around is for the second last bit.
    for _ in range(2):
        excess = ((bits & 0x7FFFFF) | 0x800000) * divisor_mantissa
        bits = jnp.where(2 * excess > divisor_mantissa, bits - 1, bits)
        bits = jnp.where(2 * excess < -divisor_mantissa, bits + 1, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def e5m6_scale_and_multiplier(amax: Array) -> tuple[Array, Array]:
    """As `scale_and_multiplier`: the smallest power of two that brings max(amax, 2**-110) to at most 65024."""
    return _power_of_two(amax, E5M6_AMAX_FLOOR, 15, 0x7E0000)


def e5m6_round(scaled: Array) -> Array:
    """Rounds float32 values of at most 65024 to 1+5+6 bits, ties to even: float16 whose last four bits are zeros."""
    exponent = jax.lax.bitcast_convert_type(scaled, jnp.int32) & _EXPONENT_BITS
    # Steps of x in [2**e, 2**(e+1)) are 2**(e-6), and those of subnormals 2**-20. Added to 1.5 * 2**(e+17), whose last
    # bit is the same 2**(e-6), x is rounded by the float32 addition itself.
    anchor = jnp.maximum(exponent, (127 - 14) << 23) + ((17 << 23) | 0x400000)
    anchor = jax.lax.bitcast_convert_type(anchor, jnp.float32)
    return ((scaled + anchor) - anchor).astype(jnp.float16)


def e5m6_bytes(first: Array, second: Array) -> tuple[Array, Array, Array]:
    """The upper bytes of two float16 arrays, and the bytes that hold the next four bits of both."""
    first = jax.lax.bitcast_convert_type(first, jnp.uint16)
    second = jax.lax.bitcast_convert_type(second, jnp.uint16)
    low = ((first & 0xF0) >> 4) | (second & 0xF0)
    return (first >> 8).astype(jnp.uint8), (second >> 8).astype(jnp.uint8), low.astype(jnp.uint8)


def quantize_rows(x_MK: Array, power_of_two: bool) -> Quantized:
    """Tiles of one row and 128 of K; the rows that pad the scales are those of a matrix of zeros."""
    M, K = x_MK.shape
    tiles_Mk128 = _tiles(x_MK, round_up(M, BLOCK))
    scales_Mk, multiplier_Mk = scale_and_multiplier(_amax(tiles_Mk128, axis=2), power_of_two)
    values = _e4m3(tiles_Mk128 * multiplier_Mk[:, :, None])
    return Quantized(values.reshape(values.shape[0], -1)[:M, :K], scales_Mk.T)


def quantize_columns(x_MK: Array, power_of_two: bool) -> Quantized:
    """Tiles of one column and 128 of M, transposed; M is filled up with zeros to a multiple of 128."""
    M = x_MK.shape[0]
    return quantize_rows(jnp.pad(x_MK, ((0, round_up(M, BLOCK) - M), (0, 0))).T, power_of_two)


def requantize_columns(x: Quantized, power_of_two: bool) -> Quantized:
    """`quantize_columns` of the matrix that rows in float8 stand for, rounded to bfloat16."""
    return quantize_columns(rounded(dequantize_rows(x), jnp.bfloat16), power_of_two)


def quantize_rows_and_columns(x_MK: Array, power_of_two: bool) -> tuple[Quantized, Quantized]:
    return quantize_rows(x_MK, power_of_two), quantize_columns(x_MK, power_of_two)


def quantize_blocks(w_KN: Array, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """Blocks of 128x128; the transposed copy has the same values and scales."""
    K, N = w_KN.shape
    tiles = _tiles(w_KN, round_up(K, BLOCK)).reshape(blocks(K), BLOCK, blocks(N), BLOCK)
    scales_kn, multiplier_kn = scale_and_multiplier(_amax(tiles, axis=(1, 3)), power_of_two)
    values = _e4m3(tiles * multiplier_kn[:, None, :, None])
    values_KN = values.reshape(blocks(K) * BLOCK, blocks(N) * BLOCK)[:K, :N]
    return Quantized(values_KN, scales_kn), Quantized(values_KN.T, scales_kn.T)


def quantize_e5m6(x_MK: Array) -> E5M6:
    M, K = x_MK.shape
    tiles_Mk128 = _tiles(x_MK, round_up(M, BLOCK))
    scales_Mk, multiplier_Mk = e5m6_scale_and_multiplier(_amax(tiles_Mk128, axis=2))
    half = e5m6_round(tiles_Mk128 * multiplier_Mk[:, :, None])[:M]
    first, second, low = e5m6_bytes(half[..., : BLOCK // 2], half[..., BLOCK // 2 :])
    high_MK = jnp.concatenate([first, second], axis=2).reshape(M, K)
    return E5M6(high_MK, low.reshape(M, K // 2), scales_Mk.T)


def dequantize_e5m6(packed: E5M6, dtype: jax.typing.DTypeLike) -> Float[Array, 'M K']:
    M, K = packed.high_MK.shape
    low = packed.low_Mh.reshape(M, K // BLOCK, BLOCK // 2)
    low_MK = jnp.concatenate([low & 15, low >> 4], axis=2).reshape(M, K)
    half_MK = (packed.high_MK.astype(jnp.uint16) << 8) | (low_MK.astype(jnp.uint16) << 4)
    values_MK = jax.lax.bitcast_convert_type(half_MK, jnp.float16).astype(jnp.float32)
    return (values_MK * jnp.repeat(packed.scales_kQ.T[:M], BLOCK, axis=1)).astype(dtype)


def _e4m3(x: Array) -> Array:
    """Rounds to float8. The barrier keeps XLA from cancelling this against a later conversion to a wider type."""
    return jax.lax.optimization_barrier(x.astype(E4M3))


def _power_of_two(amax: Array, floor: float, exponent: int, mantissa: int) -> tuple[Array, Array]:
    """The smallest power of two that brings amax to at most 2**exponent with that mantissa, and its inverse."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(amax, floor), jnp.int32)
    # amax = 1.m * 2**e: the scale is 2**(e - exponent), or twice that if m exceeds the mantissa, which then carries.
    scale = ((bits + (0x7FFFFF - mantissa)) & _EXPONENT_BITS) - (exponent << 23)
    multiplier = (254 << 23) - scale
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731
    return _where_finite(amax, as_float(scale), as_float(multiplier))


def _where_finite(amax: Array, scale: Array, multiplier: Array) -> tuple[Array, Array]:
    finite = amax < jnp.inf
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, multiplier, jnp.nan)


def _amax(x: Array, axis: int | tuple[int, ...]) -> Array:
    """The largest magnitude, or NaN if there is one: compared as integers, since XLA's CPU maximum passes NaNs over."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis), jnp.float32)


def _tiles(x_MK: Array, rows: int) -> Float32[Array, 'rows k 128']:
    """The matrix in float32, filled up with zeros to `rows` and to whole tiles of K."""
    M, K = x_MK.shape
    padded = jnp.pad(x_MK.astype(jnp.float32), ((0, rows - M), (0, round_up(K, BLOCK) - K)))
    return padded.reshape(rows, blocks(K), BLOCK)
