"""Attention of MLA on Hopper and its gradients: the three kernels together."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.flash_mla import parts
from pallas_kernels.flash_mla.reference import Inputs, delta
from pallas_kernels.flash_mla.sight import Sight
from pallas_kernels.flash_mla.sm90_dkv import key_gradients
from pallas_kernels.flash_mla.sm90_dq import query_gradients
from pallas_kernels.flash_mla.sm90_forward import attend

COPIED = 8  # rows: copies to shared memory count in these


def refusal(x: Inputs) -> str | None:
    """Why the kernels do not serve these inputs; None if they do."""
    if x.q_BTHN.dtype != jnp.bfloat16:
        return f'the inputs are {x.q_BTHN.dtype}, the kernels serve bfloat16'
    widths = x.q_BTHN.shape[-1], x.q_rope_BTHR.shape[-1], x.v_BSHU.shape[-1]
    if widths != (parts.PART, parts.ROPE, parts.VALUE):
        served = parts.PART, parts.ROPE, parts.VALUE
        return f'heads are {widths} wide (without rotation, rotated, values), the kernels serve {served}'
    return None


def forward(
    x: Inputs, sight: Sight | None, scale: float, **options: Any
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H T']]:
    """As the reference; without a sight, query t sees the keys up to t."""
    T = x.q_BTHN.shape[1]
    out_BtHU, lse_BHt = attend(Inputs(*map(_whole, x)), sight, scale, **options)
    return out_BtHU[:, :T], lse_BHt[:, :, :T]


def backward(
    x: Inputs,
    sight: Sight | None,
    scale: float,
    out_BTHU: Float[Array, 'B T H U'],
    lse_BHT: Float32[Array, 'B H T'],
    d_out_BTHU: Float[Array, 'B T H U'],
    d_lse_BHT: Float32[Array, 'B H T'],
    **options: Any,
) -> Inputs:
    """As the reference; without a sight, query t sees the keys up to t."""
    T, S = x.q_BTHN.shape[1], x.k_BSHN.shape[1]
    fill = [(0, 0), (0, 0), (0, -T % parts.ROWS)]
    lse_BHt, delta_BHt = (jnp.pad(v, fill) for v in (lse_BHT, delta(out_BTHU, d_out_BTHU, d_lse_BHT)))
    inputs = Inputs(*map(_whole, x)), sight, scale, lse_BHt, delta_BHt, _whole(d_out_BTHU)
    d_q_BTHN, d_q_rope_BTHR = (d[:, :T] for d in query_gradients(*inputs, **options))
    d_k_BSHN, d_k_rope_BSHR, d_v_BSHU = (d[:, :S] for d in key_gradients(*inputs, **options))
    d_k_rope_BSR = jnp.sum(d_k_rope_BSHR, axis=2).astype(x.k_rope_BSR.dtype)
    return Inputs(d_q_BTHN, d_q_rope_BTHR, d_k_BSHN, d_k_rope_BSR, d_v_BSHU)


def _whole(x: Array) -> Array:
    """Filled up with zeros to a number of tokens that can be copied."""
    padding = -x.shape[1] % COPIED
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x
