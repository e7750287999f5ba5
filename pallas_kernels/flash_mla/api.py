"""Causal attention of MLA's expanded form: queries and keys of a part per head and a rotary part, values of another width.

The rotary key is one for all heads and is never copied to them. Between the passes nothing is kept but the inputs, the output
and the log-sum-exp of the scores: `reference.py` says what is computed, and where it rounds.

Letters: `B` sequences, `T` queries, `S` keys, `H` heads, `N` width of a head without the rotary part, `R` rotary width, `U`
width of a value.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.flash_mla import reference
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight


def flash_mla(
    q_BTHN: Float[Array, 'B T H N'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    k_BSHN: Float[Array, 'B S H N'],
    k_rope_BSR: Float[Array, 'B S R'],
    v_BSHU: Float[Array, 'B S H U'],
    *,
    scale: float,
    segments: tuple[Int[Array, 'B T'], Int[Array, 'B S']] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T']]:
    """Returns `softmax(scale * (q . k + q_rope . k_rope)) v` over the keys that a query sees, and the log-sum-exp.

    Differentiable in the five arrays, through both results. A query that sees no key has the output 0 and -inf.

    Args:
      q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU: float32 or bfloat16, all of one type, none empty.
      scale: of the scores.
      segments: documents of queries and keys; a query sees keys of its own document only. None: one document.
      positions_BT: a query sees the keys up to this one, itself included: those of a cached prefix, say. None: its own
        number, for T = S.

    Raises:
      ValueError: types differ or are no floats, or queries and keys differ in number and there are no positions.
    """
    x = Inputs(q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU)
    dtypes = {array.dtype for array in x}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f'flash_mla: inputs are {", ".join(str(array.dtype) for array in x)}, they must all be float32 or bfloat16'
        )
    if 0 in q_BTHN.shape or 0 in v_BSHU.shape:
        raise ValueError(f'flash_mla: queries {q_BTHN.shape} and values {v_BSHU.shape} must not be empty')
    (B, T), S = q_BTHN.shape[:2], k_BSHN.shape[1]
    if positions_BT is None:
        if T != S:
            raise ValueError(f'flash_mla: {T} queries of {S} keys need positions')
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments is None:
        segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    return _attend(scale, x, Sight(positions_BT, *segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, x: Inputs, sight: Sight) -> tuple[Array, Array]:
    return reference.forward(x, sight, scale)


def _forward(scale: float, x: Inputs, sight: Sight) -> tuple[tuple[Array, Array], tuple]:
    out_BTHU, lse_BHT = reference.forward(x, sight, scale)
    return (out_BTHU, lse_BHT), (x, sight, out_BTHU, lse_BHT)


def _backward(scale: float, saved: tuple, d_results: tuple[Array, Array]) -> tuple[Inputs, None]:
    x, sight, out_BTHU, lse_BHT = saved
    return reference.backward(x, sight, scale, out_BTHU, lse_BHT, *d_results), None


_attend.defvjp(_forward, _backward)
