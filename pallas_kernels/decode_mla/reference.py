"""Attention of MLA's absorbed form over a paged cache, in plain jax.numpy: the specification.

A cached token is a latent c of L numbers, key and value of every head at once, and a rotary key r. For a query (q, q_r):

  s = scale * (q . c + q_r . r)   float32
  p = exp(s - lse)                over the keys that the query sees, lse = log sum exp s
  o = sum p c                     p rounded to the type of q, sums in float32, o rounded once

Float8 latents are multiplied by their scales, both the scales and the products rounded to the type of q. A query that sees no key has o = 0
and lse = -inf. What lies in pages beyond a sequence's length does not count, whatever it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.flash_mla.reference import einsum_fp32, probabilities
from pallas_kernels.fp8 import Quantized, dequantize_rows, rounded
from pallas_kernels.quantize_fp8.reference import quantize_rows


class LatentPages(NamedTuple):
    """The cache: pages of G tokens, of any sequences in any order.

    Attributes:
      latent_PGL: bfloat16 (or float32), or float8_e4m3fn with scales.
      rope_PGR: rotary keys, in the type of the queries.
      scales_PGC: float32, one for each token and 128 of its latent numbers; only of float8 latents.
    """

    latent_PGL: Float[Array, 'P G L']
    rope_PGR: Float[Array, 'P G R']
    scales_PGC: Float32[Array, 'P G C'] | None = None


def quantize_latents(latent_ML: Float[Array, 'M L']) -> tuple[Float[Array, 'M L'], Float32[Array, 'M C']]:
    """Float8 latents of tokens and their scales, as pages hold them: powers of two, with which bfloat16 loses nothing."""
    values_ML, scales_CQ = quantize_rows(latent_ML, power_of_two=True)
    return values_ML, scales_CQ[:, : latent_ML.shape[0]].T


def decode_mla(
    q_BTHL: Float[Array, 'B T H L'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    pages: LatentPages,
    table_BW: Int32[Array, 'B W'],
    lengths_B: Int32[Array, ' B'],
    scale: float,
) -> tuple[Float[Array, 'B T H L'], Float32[Array, 'B H T']]:
    """The output and the log-sum-exp of the scores, one sequence at a time: memory holds one sequence's keys."""
    dtype, T = q_BTHL.dtype, q_BTHL.shape[1]

    def attend(sequence: tuple) -> tuple[Array, Array]:
        q_THL, q_rope_THR, table_W, length = sequence
        latent_SL, rope_SR = _gathered(pages, table_W, length, dtype)
        scores_HTS = einsum_fp32('THL,SL->HTS', q_THL, latent_SL) + einsum_fp32('THR,SR->HTS', q_rope_THR, rope_SR)
        # The last of the T queries is the last cached token.
        visible_1TS = (jnp.arange(len(latent_SL)) < (length - T + 1 + jnp.arange(T))[:, None])[None]
        scores_HTS *= scale
        lse_HT = jax.nn.logsumexp(scores_HTS, axis=-1, where=visible_1TS)
        p_HTS = probabilities(scores_HTS, visible_1TS, lse_HT)
        return rounded(einsum_fp32('HTS,SL->THL', rounded(p_HTS, dtype), latent_SL), dtype), lse_HT

    return jax.lax.map(attend, (q_BTHL, q_rope_BTHR, table_BW, lengths_B))


def _gathered(pages: LatentPages, table_W: Array, length: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Latents and rotary keys of a sequence, with zeros from its length on."""

    def tokens(pages_PGX: Array) -> Array:
        return jnp.take(pages_PGX, table_W, axis=0, mode='clip').reshape(-1, pages_PGX.shape[-1])

    latent_SL, rope_SR = tokens(pages.latent_PGL), tokens(pages.rope_PGR)
    if pages.scales_PGC is not None:
        scales_CS = rounded(tokens(pages.scales_PGC), dtype).astype(jnp.float32).T
        latent_SL = rounded(dequantize_rows(Quantized(latent_SL, scales_CS)), dtype)
    real_S1 = (jnp.arange(len(latent_SL)) < length)[:, None]
    return jnp.where(real_S1, latent_SL, 0), jnp.where(real_S1, rope_SR, 0)
