"""Attention of MLA's absorbed form over a paged cache of latents: what sampling a token costs.

All heads read one latent a token, as key and as value: `reference.py` says what is computed, and where it rounds.

Letters: `B` sequences, `T` queries of each, `H` heads, `L` width of a latent, `R` rotary width, `C` blocks of 128 of L,
`P` pages of the cache, `G` tokens of a page, `W` pages that a sequence can have.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.decode_mla import reference, sm90
from pallas_kernels.decode_mla.reference import LatentPages, quantize_latents
from pallas_kernels.fp8 import E4M3, blocks
from pallas_kernels.implementation import Implementation, choose

__all__ = ['LatentPages', 'decode_mla', 'quantize_latents']


def decode_mla(
    q_BTHL: Float[Array, 'B T H L'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    pages: LatentPages,
    table_BW: Int[Array, 'B W'],
    lengths_B: Int[Array, ' B'],
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'B T H L'], Float32[Array, 'B H T']]:
    """Returns `softmax(scale * (q . c + q_rope . r)) c` over the cached tokens that a query sees, and the log-sum-exp.

    The T queries are the last T cached tokens; each sees the tokens up to its own. One that sees none, for a sequence
    shorter than T, has the output 0 and -inf.

    Args:
      q_BTHL: queries, multiplied by the keys' part of the up-projection; bfloat16, or float32 with the reference.
      q_rope_BTHR: their rotary part, of the same type.
      pages: the cache, latents of that type or float8. Pages may hold anything where no sequence has tokens.
      table_BW: int32, the pages of each sequence in order. Entries past its length are not read.
      lengths_B: int32, cached tokens of each sequence, those of the queries included; at most W pages of them.
      scale: of the scores, positive.
      implementation: None takes the Hopper kernel on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve the input (`sm90.refusal`), or there is no Hopper GPU.
    """
    _check(q_BTHL, q_rope_BTHR, pages, table_BW, lengths_B, scale)
    if choose('decode_mla', implementation, lambda: sm90.refusal(q_BTHL, q_rope_BTHR, pages)) == 'reference':
        return reference.decode_mla(q_BTHL, q_rope_BTHR, pages, table_BW, lengths_B, scale)
    return sm90.decode_mla(q_BTHL, q_rope_BTHR, pages, table_BW, lengths_B, scale)


def _check(q: Array, q_rope: Array, pages: LatentPages, table: Array, lengths: Array, scale: float) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f'decode_mla: {what}')

    latent, rope, scales = pages
    shapes = f'queries {q.shape} and {q_rope.shape}'
    if q.ndim != 4 or q_rope.ndim != 4 or q.shape[:3] != q_rope.shape[:3] or 0 in q.shape + q_rope.shape:
        refuse(f'{shapes} must be (B, T, H, L) and (B, T, H, R), none empty')
    if latent.ndim != 3 or rope.ndim != 3 or latent.shape[:2] != rope.shape[:2] or 0 in latent.shape:
        refuse(f'pages {latent.shape} and {rope.shape} must be (P, G, L) and (P, G, R), none empty')
    if (latent.shape[2], rope.shape[2]) != (q.shape[3], q_rope.shape[3]):
        refuse(f'{shapes} must be as wide as pages {latent.shape} and {rope.shape}')
    if q.dtype not in (jnp.bfloat16, jnp.float32) or {q_rope.dtype, rope.dtype} != {q.dtype}:
        refuse(
            f'queries are {q.dtype} and {q_rope.dtype}, rotary keys {rope.dtype}: '
            'they must all be bfloat16 or all float32'
        )
    if latent.dtype not in (q.dtype, E4M3):
        refuse(f'latents are {latent.dtype}, they must be {q.dtype} as the queries or float8_e4m3fn')
    if (scales is None) == (latent.dtype == E4M3):
        refuse(f'{latent.dtype} latents {"need" if scales is None else "take no"} scales')
    if scales is not None:
        wanted = (*latent.shape[:2], blocks(latent.shape[2]))
        if (scales.shape, scales.dtype) != (wanted, jnp.float32):
            refuse(f'scales are {scales.dtype}{scales.shape}, latents {latent.shape} need float32{wanted}')
    if table.ndim != 2 or table.dtype != jnp.int32 or table.shape[0] != q.shape[0] or 0 in table.shape:
        refuse(f'the table is {table.dtype}{table.shape}, it must be int32 (B={q.shape[0]}, W), not empty')
    if (lengths.shape, lengths.dtype) != (q.shape[:1], jnp.int32):
        refuse(f'lengths are {lengths.dtype}{lengths.shape}, they must be int32{q.shape[:1]}')
    if not scale > 0:
        refuse(f'{scale=} must be positive')
