"""SwiGLU and its gradients, quantised to float8: the specification, in plain jax.numpy.

With gate and up the two halves of a joined product, s = 1 / (1 + exp(-gate)), and w the token's gate weight, 1 if there
is none:

  h      = gate * s * up * w
  d_gate = d_h * w * up * (s + gate * s * (1 - s))
  d_up   = d_h * w * gate * s
  d_w    = sum over H of d_h * gate * s * up

Everything is float32 from the inputs on, up to the results, which are rounded to bfloat16: what is quantised, in both
directions, are the values that a layer in bfloat16 would hand on. d_w is summed from float32. How they are quantised, and
what becomes of values that are not finite, is told in `quantize_fp8/reference.py`.

Between the passes [DeepSeek-V3, 3.3.3] keeps the input of SwiGLU in float8 and computes the output anew: the gradients
are those at the dequantised input, whatever the forward pass multiplied.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.fp8 import Quantized, dequantize_rows, rounded
from pallas_kernels.quantize_fp8.reference import quantize_columns, quantize_rows


def swiglu(gate: Array, up: Array, weight: Array | None) -> Array:
    """h, of float32 arrays of one shape. Kernels call this function too."""
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden if weight is None else hidden * weight


def swiglu_gradients(
    gate: Array, up: Array, d_hidden: Array, weight: Array | None
) -> tuple[Array, Array, Array | None]:
    """d_gate, d_up and the terms of d_w, of float32 arrays of one shape. Kernels call this function too."""
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    d_up, d_silu = d_hidden * silu, d_hidden * up
    term = None if weight is None else d_up * up
    if weight is not None:
        d_up, d_silu = d_up * weight, d_silu * weight
    return d_silu * (sigmoid + silu * (1 - sigmoid)), d_up, term


def swiglu_quantize(
    gate_up_MG: Array, gate_weight_M: Array | None, power_of_two: bool, columns: bool
) -> tuple[Quantized, Quantized | None]:
    gate_MH, up_MH = jnp.split(gate_up_MG.astype(jnp.float32), 2, axis=1)
    weight_M1 = None if gate_weight_M is None else gate_weight_M[:, None]
    hidden_MH = rounded(swiglu(gate_MH, up_MH, weight_M1), jnp.bfloat16)
    return quantize_rows(hidden_MH, power_of_two), quantize_columns(hidden_MH, power_of_two) if columns else None


def swiglu_quantize_backward(
    gate_up: Quantized | Array, d_hidden_MH: Array, gate_weight_M: Array | None, power_of_two: bool, columns: bool
) -> tuple[Quantized, tuple[Quantized, Quantized] | None, Float32[Array, 'M'] | None]:
    gate_up_MG = dequantize_rows(gate_up) if isinstance(gate_up, Quantized) else gate_up.astype(jnp.float32)
    gate_MH, up_MH = jnp.split(gate_up_MG, 2, axis=1)
    weight_M1 = None if gate_weight_M is None else gate_weight_M[:, None]
    d_gate_MH, d_up_MH, terms_MH = swiglu_gradients(gate_MH, up_MH, d_hidden_MH.astype(jnp.float32), weight_M1)
    d_gate_MH, d_up_MH = (rounded(x, jnp.bfloat16) for x in (d_gate_MH, d_up_MH))
    rows = quantize_rows(jnp.concatenate([d_gate_MH, d_up_MH], axis=1), power_of_two)
    both = (quantize_columns(d_gate_MH, power_of_two), quantize_columns(d_up_MH, power_of_two)) if columns else None
    return rows, both, None if terms_MH is None else jnp.sum(terms_MH, axis=1)
