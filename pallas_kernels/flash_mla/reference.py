"""Attention of MLA with keys and values per head, in plain jax.numpy: the specification.

  s = scale * (q . k + q_rope . k_rope)   float32; the rotary key is one for all heads
  p = exp(s - lse)                         over the keys that the query sees, lse = log sum exp s
  o = sum p v                              p rounded to the type of v, sums in float32, o rounded once

Queries are taken BLOCK at a time, so that scores take memory for so many queries only. A query that sees no key has o = 0 and
lse = -inf. Backward, with delta = sum(d_o * o) - d_lse:

  d_v = sum p d_o,   d_s = p * (d_o . v - delta),   d_q = scale * sum d_s k,   d_k = scale * sum d_s q

where p and d_s are rounded to the type of the other factor. Gradients sum in float32 and are rounded once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from pallas_kernels.flash_mla.sight import Sight, causal
from pallas_kernels.fp8 import rounded

BLOCK = 512


class Inputs(NamedTuple):
    """What attention reads; letters as in `api.py`."""

    q_BTHN: Float[Array, 'B T H N']
    q_rope_BTHR: Float[Array, 'B T H R']
    k_BSHN: Float[Array, 'B S H N']
    k_rope_BSR: Float[Array, 'B S R']
    v_BSHU: Float[Array, 'B S H U']


def forward(x: Inputs, sight: Sight | None, scale: float) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T']]:
    """The output and the log-sum-exp of the scores. Without a sight, query t sees the keys up to t."""
    sight = sight or causal(*x.q_BTHN.shape[:2])

    def attend(block: tuple) -> tuple[Array, Array]:
        q_BTHN, q_rope_BTHR, *seen = block
        scores_BHTS, visible_BHTS = _scores(x._replace(q_BTHN=q_BTHN, q_rope_BTHR=q_rope_BTHR), seen, scale)
        lse_BHT = jax.nn.logsumexp(scores_BHTS, axis=-1, where=visible_BHTS)
        p_BHTS = probabilities(scores_BHTS, visible_BHTS, lse_BHT)
        out_BTHU = einsum_fp32('BHTS,BSHU->BTHU', rounded(p_BHTS, x.v_BSHU.dtype), x.v_BSHU)
        return rounded(out_BTHU, x.v_BSHU.dtype), lse_BHT.swapaxes(1, 2)

    blocks = _cut((x.q_BTHN, x.q_rope_BTHR, *sight))
    out_BTHU, lse_BTH = _join(jax.lax.map(attend, blocks), x.q_BTHN.shape[1])
    return out_BTHU, lse_BTH.swapaxes(1, 2)


def backward(
    x: Inputs, sight: Sight | None, scale: float, out_BTHU: Array, lse_BHT: Array, d_out_BTHU: Array, d_lse_BHT: Array
) -> Inputs:
    """The gradients of the inputs."""
    sight = sight or causal(*x.q_BTHN.shape[:2])
    delta_BTH = delta(out_BTHU, d_out_BTHU, d_lse_BHT).swapaxes(1, 2)

    def add(sums: tuple, block: tuple) -> tuple[tuple, tuple]:
        q_BTHN, q_rope_BTHR, lse_BTH, d_out_BTHU, delta_BTH, *seen = block
        scores_BHTS, visible_BHTS = _scores(x._replace(q_BTHN=q_BTHN, q_rope_BTHR=q_rope_BTHR), seen, scale)
        p_BHTS = probabilities(scores_BHTS, visible_BHTS, lse_BTH.swapaxes(1, 2))
        d_p_BHTS = einsum_fp32('BTHU,BSHU->BHTS', d_out_BTHU, x.v_BSHU)
        d_s_BHTS = rounded(p_BHTS * (d_p_BHTS - delta_BTH.swapaxes(1, 2)[..., None]), q_BTHN.dtype)
        terms = (
            scale * einsum_fp32('BHTS,BTHN->BSHN', d_s_BHTS, q_BTHN),
            scale * einsum_fp32('BHTS,BTHR->BSR', d_s_BHTS, q_rope_BTHR),
            einsum_fp32('BHTS,BTHU->BSHU', rounded(p_BHTS, d_out_BTHU.dtype), d_out_BTHU),
        )
        d_q = einsum_fp32('BHTS,BSHN->BTHN', d_s_BHTS, x.k_BSHN), einsum_fp32('BHTS,BSR->BTHR', d_s_BHTS, x.k_rope_BSR)
        return tuple(map(jnp.add, sums, terms)), tuple(rounded(scale * d, q_BTHN.dtype) for d in d_q)

    keys = x.k_BSHN, x.k_rope_BSR, x.v_BSHU
    sums = tuple(jnp.zeros(key.shape, jnp.float32) for key in keys)
    # Padding queries see nothing: their terms are zeros.
    blocks = _cut((x.q_BTHN, x.q_rope_BTHR, lse_BHT.swapaxes(1, 2), d_out_BTHU, delta_BTH, *sight))
    sums, d_q = jax.lax.scan(add, sums, blocks)
    d_q_BTHN, d_q_rope_BTHR = _join(d_q, x.q_BTHN.shape[1])
    return Inputs(d_q_BTHN, d_q_rope_BTHR, *(rounded(total, key.dtype) for total, key in zip(sums, keys, strict=True)))


def delta(out_BTHU: Array, d_out_BTHU: Array, d_lse_BHT: Array) -> Float32[Array, 'B H T']:
    """What a query's gradients of probabilities are compared with."""
    dot_BTH = jnp.sum(d_out_BTHU.astype(jnp.float32) * out_BTHU.astype(jnp.float32), -1)
    return dot_BTH.swapaxes(1, 2) - d_lse_BHT


def _scores(x: Inputs, seen: list, scale: float) -> tuple[Float32[Array, 'B H T S'], Bool[Array, 'B 1 T S']]:
    """Scores of a block of queries, and which of them count."""
    first_BT, last_BT = seen
    scores_BHTS = einsum_fp32('BTHN,BSHN->BHTS', x.q_BTHN, x.k_BSHN)
    scores_BHTS += einsum_fp32('BTHR,BSR->BHTS', x.q_rope_BTHR, x.k_rope_BSR)
    keys_S = jnp.arange(x.k_BSHN.shape[1])
    visible_BTS = (first_BT[..., None] <= keys_S) & (keys_S <= last_BT[..., None])
    return scale * scores_BHTS, visible_BTS[:, None]


def probabilities(scores_BHTS: Array, visible_BHTS: Array, lse_BHT: Array) -> Array:
    """`exp(s - lse)` of scores that count, 0 elsewhere."""
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, 0, lse_BHT)
    return jnp.where(visible_BHTS, jnp.exp(jnp.where(visible_BHTS, scores_BHTS, -jnp.inf) - lse_BHT[..., None]), 0)


def _cut(arrays: tuple) -> tuple:
    """Blocks of queries along a new first axis. What fills up the last one sees no key: its last one is -1."""
    T = arrays[0].shape[1]
    size = min(BLOCK, T)

    def one(x: Array) -> Array:
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        pad = [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, pad, constant_values=fill)
        return padded.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(one, arrays)


def _join(blocks: Any, T: int) -> Any:
    """The inverse of `_cut`."""
    one: Callable[[Array], Array] = lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]  # noqa: E731
    return jax.tree.map(one, blocks)


def einsum_fp32(equation: str, x: Array, y: Array) -> Float32[Array, '...']:
    """A product summed in float32."""
    wide = lambda x, y: jnp.einsum(  # noqa: E731
        equation, x.astype(jnp.float32), y.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    if x.dtype == jnp.float32:
        return wide(x, y)
    narrow = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    # XLA's CPU backend has no bfloat16 products with float32 sums for some shapes.
    return jax.lax.platform_dependent(x, y, cpu=wide, default=narrow)
