"""Causal attention of MLA's expanded form: queries and keys of a part per head and a rotary part, values of another width.

The rotary key is one for all heads and is never copied to them. Between the passes nothing is kept but the inputs, the output
and the log-sum-exp of the scores: `reference.py` says what is computed, and where it rounds. The kernels are in `sm90.py`.

Letters: `B` sequences, `T` queries, `S` keys, `H` heads, `N` width of a head without the rotary part, `R` rotary width, `U`
width of a value.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.flash_mla import reference, sm90
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight, of_documents, of_positions
from pallas_kernels.implementation import Implementation, choose

SAVED = 'flash_mla'  # name of both results for policies of `jax.checkpoint`: a pass that keeps them need not run again


def flash_mla(
    q_BTHN: Float[Array, 'B T H N'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    k_BSHN: Float[Array, 'B S H N'],
    k_rope_BSR: Float[Array, 'B S R'],
    v_BSHU: Float[Array, 'B S H U'],
    *,
    scale: float,
    segments_BT: Int[Array, 'B T'] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T']]:
    """Returns `softmax(scale * (q . k + q_rope . k_rope)) v` over the keys that a query sees, and the log-sum-exp.

    Differentiable in the five arrays, through both results. A query that sees no key has the output 0 and -inf.

    Args:
      q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU: float32 or bfloat16, all of one type, none empty.
      scale: of the scores.
      segments_BT: numbers of documents, for T = S; a query sees keys of its own document only. A document is a run of
        equal numbers. None: one document.
      positions_BT: a query sees the keys up to this one, itself included: those of a cached prefix, say; one before the
        first key sees none. None: its own number, for T = S.
      implementation: None takes the Hopper kernels on a Hopper GPU and the reference elsewhere.

    Raises:
      ValueError: types differ or are no floats, queries and keys differ in number and there are no positions, or there are
        positions and segments.
      NotImplementedError: 'pallas' was asked for and the inputs are not bfloat16 of widths N = 128, R = 64, U = 128, or
        there is no Hopper GPU.
    """
    x = Inputs(q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU)
    dtypes = {array.dtype for array in x}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f'flash_mla: inputs are {", ".join(str(array.dtype) for array in x)}, they must all be float32 or bfloat16'
        )
    if 0 in q_BTHN.shape or 0 in v_BSHU.shape:
        raise ValueError(f'flash_mla: queries {q_BTHN.shape} and values {v_BSHU.shape} must not be empty')
    T, S = q_BTHN.shape[1], k_BSHN.shape[1]
    if positions_BT is None and T != S:
        raise ValueError(f'flash_mla: {T} queries of {S} keys need positions')
    sight = None
    if segments_BT is not None:
        if positions_BT is not None:
            raise ValueError('flash_mla: segments and positions exclude each other')
        sight = of_documents(segments_BT)
    elif positions_BT is not None:
        sight = of_positions(positions_BT, S)
    return _attend(scale, choose('flash_mla', implementation, lambda: sm90.refusal(x)), x, sight)


def module(chosen: Implementation) -> ModuleType:
    """The two passes of an implementation."""
    return reference if chosen == 'reference' else sm90


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, chosen: Implementation, x: Inputs, sight: Sight | None) -> tuple[Array, Array]:
    return module(chosen).forward(x, sight, scale)


def _forward(scale: float, chosen: Implementation, x: Inputs, sight: Sight | None) -> tuple[tuple[Array, Array], tuple]:
    out_BTHU, lse_BHT = (checkpoint_name(y, SAVED) for y in module(chosen).forward(x, sight, scale))
    return (out_BTHU, lse_BHT), (x, sight, out_BTHU, lse_BHT)


def _backward(
    scale: float, chosen: Implementation, saved: tuple, d_results: tuple[Array, Array]
) -> tuple[Inputs, None]:
    x, sight, out_BTHU, lse_BHT = saved
    return module(chosen).backward(x, sight, scale, out_BTHU, lse_BHT, *d_results), None


_attend.defvjp(_forward, _backward)
