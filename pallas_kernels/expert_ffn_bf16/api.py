"""The routed experts of a layer in bfloat16, forward and backward [DeepSeek-V3, eq. 12]: the float8 layer's peer.

  x        rows of tokens, moved                                     (M, D)
  gate_up  = x @ [w_gate, w_up]                                      bf16
  h        = gate * silu(gate_up[gate half]) * gate_up[up half]      float32, rounded to bf16 once
  y        = h @ w_down                                              bf16
  out      = sum over a token's experts of y                         float32, rounded once

Products sum in float32. Rows move by gathers in both directions of differentiation; masters are rounded to bfloat16 for
each call, and their gradients are those of the grouped products, in float32.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from pallas_kernels.expert_ffn_fp8.api import SAVED
from pallas_kernels.grouped_gemm_bf16.api import grouped_gemm_bf16, grouped_wgrad_bf16
from pallas_kernels.implementation import Implementation, once
from pallas_kernels.routes import Routes, combine, permute_vector


def expert_ffn_bf16(
    x_TD: Float[Array, 'T D'],
    gates_TK: Float32[Array, 'T K'],
    routes: Routes,
    weights: tuple[Array, Array, Array],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, 'T D']:
    """Returns `sum_k gates[t, k] * W_down (silu(W_gate x_t) * W_up x_t)` over the experts of token t, bfloat16.

    Differentiable in x, the gates and the weights.

    Args:
      x_TD: bfloat16.
      gates_TK: what each token's experts count.
      routes: of `pallas_kernels.routes.routes`; dropless.
      weights: w_gate (E, D, F), w_up (E, D, F) and w_down (E, F, D), float32 or bfloat16.
      implementation: 'reference', 'pallas' (a Hopper GPU; D and F multiples of 64), or None for what serves best.

    Raises:
      ValueError: x is not bfloat16, or shapes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve the call.
    """
    if x_TD.dtype != jnp.bfloat16:
        raise ValueError(f'expert_ffn_bf16: x is {x_TD.dtype}, it must be bfloat16')
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    E, D, F = w_gate_EDF.shape
    fits = w_up_EDF.shape == (E, D, F) and w_down_EFD.shape == (E, F, D)
    if not fits or (len(routes.group_sizes_E), x_TD.shape[1]) != (E, D):
        raise ValueError(
            f'expert_ffn_bf16: weights are {w_gate_EDF.shape}, {w_up_EDF.shape} and {w_down_EFD.shape}, '
            f'x is {x_TD.shape} and routes lead to {len(routes.group_sizes_E)} experts'
        )
    multiply = functools.partial(_product, implementation)
    x_MD = _permute(x_TD, routes)
    gate_up_MG = checkpoint_name(once(multiply(x_MD, (w_gate_EDF, w_up_EDF), routes.group_sizes_E)), SAVED)
    gate_M1 = permute_vector(gates_TK, routes)[:, None]
    with jax.named_scope('swiglu'):
        gate_MF, up_MF = jnp.split(gate_up_MG.astype(jnp.float32), 2, axis=1)
        hidden_MF = (gate_M1 * jax.nn.silu(gate_MF) * up_MF).astype(x_TD.dtype)
    return _combine(multiply(hidden_MF, (w_down_EFD,), routes.group_sizes_E), routes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation: Implementation | None, x_MK: Array, weights: tuple[Array, ...], sizes_E: Array) -> Array:
    """x times the weights (E, K, N) side by side."""
    return _product_forward(implementation, x_MK, weights, sizes_E)[0]


def _product_forward(implementation, x_MK, weights, sizes_E):
    with jax.named_scope('weights'):
        joined_EKN = jnp.concatenate([w_EKN.astype(x_MK.dtype) for w_EKN in weights], axis=2)
    y_MN = grouped_gemm_bf16(x_MK, joined_EKN, sizes_E, implementation=implementation)
    return y_MN, (x_MK, joined_EKN, sizes_E, [jnp.zeros((0, w_EKN.shape[2]), w_EKN.dtype) for w_EKN in weights])


def _product_backward(implementation, residuals, d_MN):
    x_MK, joined_EKN, sizes_E, masters = residuals
    d_x_MK = grouped_gemm_bf16(d_MN, joined_EKN, sizes_E, transpose_rhs=True, implementation=implementation)
    ends = itertools.accumulate(master.shape[1] for master in masters)
    parts = jnp.split(d_MN, list(ends)[:-1], axis=1)  # of activations, which are smaller than the gradients of weights
    wgrad = functools.partial(grouped_wgrad_bf16, implementation=implementation)
    d_weights = tuple(
        wgrad(x_MK, part_MN, sizes_E).astype(master.dtype) for part_MN, master in zip(parts, masters, strict=True)
    )
    return d_x_MK, d_weights, None


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
@jax.named_scope('permute')
def _permute(x_TD: Array, routes: Routes) -> Array:
    """Each row's token; zeros where there is none."""
    return jnp.take(x_TD, routes.token_M, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def _combine(y_MD: Array, routes: Routes) -> Array:
    """The sum of each token's rows."""
    return combine(y_MD, routes.row_TK, y_MD.dtype)


# Each is the other's transpose.
_permute.defvjp(lambda x, routes: (_permute(x, routes), routes), lambda routes, d: (_combine(d, routes), None))
_combine.defvjp(lambda y, routes: (_combine(y, routes), routes), lambda routes, d: (_permute(d, routes), None))
