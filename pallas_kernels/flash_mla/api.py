"""Causal attention of MLA's expanded form: queries and keys of a part per head and a rotary part, values of another width.

The rotary key is one for all heads and is never copied to them. Between the passes nothing is kept but the inputs, the output
and the log-sum-exp of the scores: `reference.py` says what is computed, and where it rounds. The kernels are in `sm90.py`.

Letters: `B` sequences, `T` queries, `S` keys, `H` heads, `N` width of a head without the rotary part, `R` rotary width, `U`
width of a value.
"""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.flash_mla import reference, sm90
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight, causal, of_positions
from pallas_kernels.fp8 import BLOCK
from pallas_kernels.implementation import Implementation, choose, once
from pallas_kernels.quantize_fp8.api import E5M6, dequantize_e5m6, quantize_e5m6

SAVED = 'flash_mla'  # name of what is kept of both results for policies of `jax.checkpoint`: a pass that keeps them need not run again


def flash_mla(
    q_BTHN: Float[Array, 'B T H N'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    k_BSHN: Float[Array, 'B S H N'],
    k_rope_BSR: Float[Array, 'B S R'],
    v_BSHU: Float[Array, 'B S H U'],
    *,
    scale: float,
    first_BT: Int[Array, 'B T'] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T']]:
    """Returns `softmax(scale * (q . k + q_rope . k_rope)) v` over the keys that a query sees, and the log-sum-exp.

    Differentiable in the five arrays, through both results. A query that sees no key has the output 0 and -inf.

    Args:
      q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU: float32 or bfloat16, all of one type, none empty.
      scale: of the scores, positive.
      first_BT: a query sees the keys from this one on: the first one of its document, say (`document_starts`). None: from
        key 0.
      positions_BT: a query sees the keys up to this one, itself included: those of a cached prefix, or those before it of a
        sequence of which some queries are here; one before the first key sees none. None: its own number, for T = S.
      implementation: None takes the Hopper kernels on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: shapes or types do not fit together, or queries and keys differ in number and there are no positions.
      NotImplementedError: 'pallas' was asked for and the inputs are not bfloat16 of widths N = 128, R = 64, U = 128, or
        there is no Hopper GPU.
    """
    x = Inputs(q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU)
    _check(x, scale, first_BT, positions_BT)
    call = _Call(scale, choose('flash_mla', implementation, lambda: sm90.refusal(x)), keep_e5m6=False)
    out_BTHU, lse_BHT, _ = _attend(call, x, _sight(x, first_BT, positions_BT))  # pyright: ignore[reportGeneralTypeIssues]
    return out_BTHU, lse_BHT


def flash_mla_e5m6(
    q_BTHN: Float[Array, 'B T H N'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    k_BSHN: Float[Array, 'B S H N'],
    k_rope_BSR: Float[Array, 'B S R'],
    v_BSHU: Float[Array, 'B S H U'],
    *,
    scale: float,
    first_BT: Int[Array, 'B T'] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T'], E5M6]:
    """Returns what `flash_mla` does, and the output in 12 bits a value, which is what the backward pass keeps of it.

    It is a matrix of tokens, (B T, H U), for the layer that reads the output to keep as well [DeepSeek-V3, 3.3.3]. No
    gradient goes through it. Arguments and errors are those of `flash_mla`; H U must be a multiple of 128.
    """
    x = Inputs(q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU)
    _check(x, scale, first_BT, positions_BT)
    if (width := math.prod(v_BSHU.shape[2:])) % BLOCK:
        raise ValueError(f'flash_mla_e5m6: H U = {width} must be a multiple of {BLOCK}')
    call = _Call(scale, choose('flash_mla', implementation, lambda: sm90.refusal(x)), keep_e5m6=True)
    return _attend(call, x, _sight(x, first_BT, positions_BT))  # pyright: ignore[reportReturnType]


def _sight(x: Inputs, first: Array | None, positions: Array | None) -> Sight | None:
    if first is None and positions is None:
        return None
    positions = causal(*x.q_BTHN.shape[:2]).last_BT if positions is None else positions
    return of_positions(positions, x.k_BSHN.shape[1], first)


def _check(x: Inputs, scale: float, first: Array | None, positions: Array | None) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f'flash_mla: {what}')

    q, q_rope, k, k_rope, v = x
    if len({array.dtype for array in x}) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        refuse(f'inputs are {", ".join(str(array.dtype) for array in x)}, they must all be float32 or bfloat16')
    if [array.ndim for array in x] != [4, 4, 4, 3, 4] or any(0 in array.shape for array in x):
        refuse(
            f'queries {q.shape} and {q_rope.shape}, keys {k.shape} and {k_rope.shape} and values {v.shape} must be '
            '(B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R) and (B, S, H, U), none empty'
        )
    (B, T, H, N), S = q.shape, k.shape[1]
    if q_rope.shape[:3] != (B, T, H):
        refuse(f'rotary queries {q_rope.shape} must begin with (B, T, H) = {(B, T, H)}, as queries {q.shape}')
    if k.shape != (B, S, H, N):
        refuse(f'keys {k.shape} must be (B, S, H, N) = {(B, S, H, N)} for queries {q.shape}')
    if k_rope.shape != (B, S, q_rope.shape[3]):
        refuse(f'rotary keys {k_rope.shape} must be (B, S, R) = {(B, S, q_rope.shape[3])}')
    if v.shape[:3] != (B, S, H):
        refuse(f'values {v.shape} must begin with (B, S, H) = {(B, S, H)}, as keys {k.shape}')
    if positions is None and T != S:
        refuse(f'{T} queries of {S} keys need positions')
    for name, numbers in (('first keys', first), ('positions', positions)):
        if numbers is not None and (numbers.shape != (B, T) or not jnp.issubdtype(numbers.dtype, jnp.integer)):
            refuse(f'{name} are {numbers.dtype}{numbers.shape}, they must be integers {(B, T)}')
    if not scale > 0:
        refuse(f'{scale=} must be positive')


def module(chosen: Implementation) -> ModuleType:
    """The two passes of an implementation."""
    return reference if chosen == 'reference' else sm90


class _Call(NamedTuple):
    """What is known about a call before it runs."""

    scale: float
    chosen: Implementation
    keep_e5m6: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, x: Inputs, sight: Sight | None) -> tuple[Array, Array, E5M6 | None]:
    return _forward(call, x, sight)[0]


def _forward(call: _Call, x: Inputs, sight: Sight | None) -> tuple[tuple[Array, Array, E5M6 | None], tuple]:
    out_BTHU, lse_BHT = module(call.chosen).forward(x, sight, call.scale)
    lse_BHT = checkpoint_name(lse_BHT, SAVED)
    if not call.keep_e5m6:
        out_BTHU = checkpoint_name(once(out_BTHU), SAVED)
        return (out_BTHU, lse_BHT, None), (x, sight, out_BTHU, lse_BHT)
    rows_MK = out_BTHU.reshape(math.prod(out_BTHU.shape[:2]), -1)
    packed = quantize_e5m6(rows_MK, implementation=call.chosen)
    packed = jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED), packed)
    return (out_BTHU, lse_BHT, packed), (x, sight, packed, lse_BHT)


def _backward(call: _Call, saved: tuple, d_results: tuple[Array, Array, Any]) -> tuple[Inputs, None]:
    x, sight, out, lse_BHT = saved
    d_out_BTHU, d_lse_BHT, _ = d_results
    if call.keep_e5m6:
        out = dequantize_e5m6(out, dtype=d_out_BTHU.dtype).reshape(d_out_BTHU.shape)
    return module(call.chosen).backward(x, sight, call.scale, out, lse_BHT, d_out_BTHU, d_lse_BHT), None


_attend.defvjp(_forward, _backward)
