"""SwiGLU of a joined gate/up product and its gradients, quantised to float8 as they are made.

The hidden values of a SwiGLU layer are read twice, by the product with the down weight and, in the backward pass, by that
weight's gradient: both want float8, one in tiles along H and one in tiles along tokens. Their bfloat16 values never
reach memory. Between the passes [DeepSeek-V3, 3.3.3] keeps the input of SwiGLU alone, in float8; the gradients are
computed from that.

Letters: `M` tokens, `H` hidden width, `h = ceil(H / 128)`, `G = 2H` the width of gate and up side by side,
`g = ceil(G / 128)`; `Q` is M rounded up to a multiple of 128. `reference.py` says what is computed, and where it rounds.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.implementation import Implementation, choose
from pallas_kernels.swiglu_quantize import reference, sm90


def swiglu_quantize(
    gate_up_MG: Float[Array, 'M G'],
    gate_weight_M: Float32[Array, 'M'] | None = None,
    *,
    power_of_two: bool = False,
    columns: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Quantized | None]:
    """Returns h = silu(gate) * up [* gate weight], quantised along H and along tokens, from one read of the input.

    The first has values (M, H) with scales (h, Q), as from `quantize_rows`; the second values (H, Q) with scales
    (q, H rounded up to a multiple of 128), as from `quantize_columns`: rows past M count as zeros, and the scales that
    stand for them mean nothing. Both are of h rounded to bfloat16.

    Args:
      gate_up_MG: bfloat16 or float32; the gate in the first H columns, up in the last.
      gate_weight_M: what the router gives each token's choice of this expert; None is 1.
      power_of_two: scales are powers of two.
      columns: whether the second result is wanted, by a backward pass; None stands in its place if not.
      implementation: 'reference', 'pallas' (a Hopper GPU, bfloat16, H a multiple of 128), or None for the best that serves.

    Raises:
      ValueError: wrong dtype or shape, or an unknown implementation.
      NotImplementedError: 'pallas' was asked for and cannot serve this call.
    """
    _check_gate_up('swiglu_quantize', gate_up_MG)
    _check_weight('swiglu_quantize', gate_weight_M, gate_up_MG.shape[0])
    if choose('swiglu_quantize', implementation, lambda: sm90.refusal(gate_up_MG)) == 'pallas':
        return sm90.swiglu_quantize(gate_up_MG, gate_weight_M, power_of_two, columns)
    return reference.swiglu_quantize(gate_up_MG, gate_weight_M, power_of_two, columns)


def swiglu_quantize_backward(
    gate_up: Quantized | Float[Array, 'M G'],
    d_hidden_MH: Float[Array, 'M H'],
    gate_weight_M: Float32[Array, 'M'] | None = None,
    *,
    power_of_two: bool = False,
    columns: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Quantized, tuple[Quantized, Quantized] | None, Float32[Array, 'M'] | None]:
    """Returns the gradients of gate and up, quantised both ways, and that of the gate weight.

    The first is of gate and up side by side, as the input's gradient contracts them: values (M, G) with scales (g, Q). The
    second is of the gate and of up apart, as the gradients of their weights contract them: values (H, Q) each, with scales
    (q, H rounded up to a multiple of 128). As in `swiglu_quantize`, rows past M count as zeros, and what is quantised was
    rounded to bfloat16. The third is None without a gate weight.

    Args:
      gate_up: what the forward pass kept of its input: values (M, G) with scales (g, Q), dequantised here; or the
        bfloat16 or float32 input itself. 'pallas' does not serve float32.
      d_hidden_MH: the gradient of h, bfloat16 or float32.
      gate_weight_M: as in `swiglu_quantize`; so are the other arguments, and the errors.
    """
    operation = 'swiglu_quantize_backward'
    _check_gate_up(operation, gate_up)
    M, G = (gate_up.values if isinstance(gate_up, Quantized) else gate_up).shape
    if d_hidden_MH.shape != (M, G // 2) or d_hidden_MH.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f'{operation}: d_hidden is {d_hidden_MH.dtype}{d_hidden_MH.shape}, it must be bfloat16 or float32, {(M, G // 2)}'
        )
    _check_weight(operation, gate_weight_M, M)
    if choose(operation, implementation, lambda: sm90.refusal(gate_up, d_hidden_MH)) == 'pallas':
        return sm90.swiglu_quantize_backward(gate_up, d_hidden_MH, gate_weight_M, power_of_two, columns)
    return reference.swiglu_quantize_backward(gate_up, d_hidden_MH, gate_weight_M, power_of_two, columns)


def _check_gate_up(operation: str, gate_up: Quantized | Array) -> None:
    values = gate_up.values if isinstance(gate_up, Quantized) else gate_up
    if values.ndim != 2 or 0 in values.shape or values.shape[1] % 2:
        raise ValueError(
            f'{operation}: gate and up have shape {values.shape}, they must be a matrix of two equal halves, not empty'
        )
    if not isinstance(gate_up, Quantized):
        if values.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f'{operation}: gate and up are {values.dtype}, they must be bfloat16 or float32')
        return
    if values.dtype != E4M3 or gate_up.scales.dtype != jnp.float32:
        raise ValueError(
            f'{operation}: gate and up are {values.dtype} with {gate_up.scales.dtype} scales, '
            'they must be float8_e4m3fn with float32 scales'
        )
    if gate_up.scales.shape != (shape := (blocks(values.shape[1]), round_up(values.shape[0], BLOCK))):
        raise ValueError(
            f'{operation}: scales have shape {gate_up.scales.shape}, values of shape {values.shape} need {shape}'
        )


def _check_weight(operation: str, gate_weight_M: Array | None, M: int) -> None:
    if gate_weight_M is not None and (gate_weight_M.shape, gate_weight_M.dtype) != ((M,), jnp.float32):
        raise ValueError(
            f'{operation}: the gate weight is {gate_weight_M.dtype}{gate_weight_M.shape}, it must be float32{(M,)}'
        )
