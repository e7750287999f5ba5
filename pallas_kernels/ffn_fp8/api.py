"""A dense SwiGLU layer in float8, forward and backward [DeepSeek-V3, 3.3].

  gate_up = x @ [w_gate, w_up]                        bf16; kept as float8, 1x128
  h       = silu(gate_up[gate half]) * gate_up[up half]      quantised at once: 1x128
  y       = h @ w_down                                bf16

As `expert_ffn_fp8` without experts: neither h nor its gradient is ever written in its own format. Kept for the backward pass are
float8 matrices: x in tiles of tokens, gate_up, and the weights; h is computed again, from the float8 gate_up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.expert_ffn_fp8.api import SAVED, Call
from pallas_kernels.fp8 import Quantized, dequantize_rows, rounded
from pallas_kernels.gemm_fp8.api import gemm_fp8, wgrad_fp8
from pallas_kernels.implementation import Implementation
from pallas_kernels.linear_fp8.api import QuantizedWeight, join, quantized_weights
from pallas_kernels.quantize_fp8.api import quantize_rows, quantize_rows_and_columns
from pallas_kernels.swiglu_quantize.api import swiglu_quantize, swiglu_quantize_backward

Copies = tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]


def ffn_fp8(
    x_MD: Float[Array, 'M D'],
    weights: tuple[Array, Array, Array] | None,
    quantized: Copies | None = None,
    *,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, 'M D']:
    """Returns `W_down (silu(W_gate x) * W_up x)` in the dtype of x. Every product sums in float32 and rounds once.

    Differentiable in x, whose gradient has its dtype, and in the weights: a float32 weight's gradient is never rounded.

    Args:
      x_MD: bfloat16 or float32, not empty.
      weights: the masters w_gate (D, F), w_up (D, F) and w_down (F, D). None if there are only quantised ones, which get no
        gradient.
      quantized: what `quantize_blocks` made of each. The masters are then not read, and still get their gradients.
      power_of_two: scales of all operands are powers of two.
      implementation: 'reference', 'pallas' (a Hopper GPU; D a multiple of 128, F of 64), or None for what serves best.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve the call.
    """
    if weights is None and quantized is None:
        raise ValueError('ffn_fp8: without weights there must be quantised ones')
    shapes = tuple(w.shape for w in weights or ()) or tuple(w.natural.values.shape for w in quantized or ())
    D, F = shapes[0]
    if shapes != ((D, F), (D, F), (F, D)) or x_MD.shape[1:] != (D,):
        gate, up, down = shapes
        raise ValueError(
            f'ffn_fp8: x is {x_MD.shape}, w_gate {gate}, w_up {up} and w_down {down}: '
            'they must be (M, D), (D, F), (D, F) and (F, D)'
        )
    for w in weights or ():
        if w.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f'ffn_fp8: a weight is {w.dtype}, it must be float32 or bfloat16')
    if quantized is not None and (found := tuple(w.natural.values.shape for w in quantized)) != shapes:
        raise ValueError(f'ffn_fp8: quantised weights have shapes {found}, they must have {shapes}')
    dtypes = tuple(w.dtype for w in weights or ())
    return _ffn(Call(dtypes, F, power_of_two, implementation), x_MD, weights, quantized)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(call: Call, x_MD: Array, weights: tuple | None, quantized: Copies | None) -> Array:
    return _output(call, quantize_rows(x_MD, **call.options), _joined(call, weights, quantized), x_MD.dtype)[0]


def _forward(call: Call, x_MD: Array, weights: tuple | None, quantized: Copies | None) -> tuple[Array, tuple]:
    joined = gate_up_weight, down_weight = _joined(call, weights, quantized)
    if call.dtypes:
        rows, columns = quantize_rows_and_columns(x_MD, **call.options)
    else:
        rows, columns = quantize_rows(x_MD, **call.options), None
    y_MD, gate_up_MG = _output(call, rows, joined, x_MD.dtype)
    gate_up = quantize_rows(gate_up_MG, **call.options)
    gate_up = Quantized(*(checkpoint_name(leaf, SAVED) for leaf in gate_up))
    return y_MD, (columns, gate_up, gate_up_weight.natural, down_weight.natural)


def _output(
    call: Call, rows: Quantized, weights: tuple[QuantizedWeight, QuantizedWeight], dtype: jnp.dtype
) -> tuple[Array, Array]:
    multiply = functools.partial(gemm_fp8, out_dtype=dtype, implementation=call.implementation)
    gate_up_weight, down_weight = weights
    gate_up_MG = multiply(rows, gate_up_weight.transposed)
    hidden, _ = swiglu_quantize(gate_up_MG, columns=False, **call.options)
    return multiply(hidden, down_weight.transposed), gate_up_MG


def _backward(call: Call, residuals: tuple, d_MD: Array) -> tuple:
    x_columns, gate_up, gate_up_weight, down_weight = residuals
    multiply = functools.partial(gemm_fp8, out_dtype=d_MD.dtype, implementation=call.implementation)
    if call.dtypes:
        d_rows, d_columns = quantize_rows_and_columns(d_MD, **call.options)
    else:
        d_rows, d_columns = quantize_rows(d_MD, **call.options), None
    d_hidden_MP = multiply(d_rows, down_weight)
    d_gate_up, both, _ = swiglu_quantize_backward(gate_up, d_hidden_MP, columns=bool(call.dtypes), **call.options)
    d_x_MD = multiply(d_gate_up, gate_up_weight)
    if both is None or d_columns is None:
        return d_x_MD, None, None
    wgrad, F = functools.partial(wgrad_fp8, implementation=call.implementation), call.width
    d_gate_DF, d_up_DF = (wgrad(x_columns, d_half)[:, :F] for d_half in both)
    _, hidden_columns = swiglu_quantize(rounded(dequantize_rows(gate_up), d_MD.dtype), **call.options)
    assert hidden_columns is not None
    gradients = d_gate_DF, d_up_DF, wgrad(hidden_columns, d_columns)[:F]
    return d_x_MD, tuple(d.astype(dtype) for d, dtype in zip(gradients, call.dtypes, strict=True)), None


_ffn.defvjp(_forward, _backward)


def _joined(call: Call, weights: tuple | None, quantized: Copies | None) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Gate and up side by side, and down, F filled up with zeros to whole blocks."""
    gate, up, down = quantized_weights(weights, quantized, **call.options)
    whole = functools.partial(join, whole=True)
    gate_up = whole([gate.natural, up.natural], axis=1), whole([gate.transposed, up.transposed], axis=0)
    return QuantizedWeight(*gate_up), QuantizedWeight(whole([down.natural], axis=0), whole([down.transposed], axis=1))
