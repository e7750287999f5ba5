"""The routed experts of a layer in float8, forward and backward [DeepSeek-V3, eq. 12 and 3.3].

  x        rows of tokens, quantised once and moved as float8        1x128
  gate_up  = x @ [w_gate, w_up]                                     bf16; kept as float8, 1x128
  h        = gate * silu(gate_up[gate half]) * gate_up[up half]      bf16, quantised at once: 1x128
  y        = h @ w_down                                             bf16
  out      = sum over a token's experts of y                        float32, rounded once

The gates enter before the last product and not after it, which is the same sum: the gradient that goes back through the
products is then that of `out` itself, quantised once a token and moved as float8 like x, and no y needs to be kept for the
gates' gradients. Kept for the backward pass are float8 matrices: x before it was moved, gate_up, and the weights; h is computed
again, from the float8 gate_up, and quantised by tiles of tokens. Gradients of weights are float32 and were never rounded; what they contract, x and the gradient of out, is
requantised along tokens from the float8 rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from pallas_kernels.exchange import Exchange
from pallas_kernels.fp8 import BLOCK, Quantized, dequantize_rows, rounded
from pallas_kernels.grouped_gemm_fp8.api import grouped_gemm_fp8, grouped_wgrad_fp8
from pallas_kernels.implementation import Implementation
from pallas_kernels.linear_fp8.api import QuantizedWeight
from pallas_kernels.quantize_fp8.api import quantize_blocks, quantize_rows, requantize_columns
from pallas_kernels.routes import Routes, combine, permute, permute_vector, take_vector
from pallas_kernels.swiglu_quantize.api import swiglu_quantize, swiglu_quantize_backward

SAVED = 'expert_ffn'  # name of what is kept of gate_up for policies of `jax.checkpoint`: its product need not run again


class ExpertWeights(NamedTuple):
    """The weights of all experts in float8, once for each product that reads them. P is F rounded up to 128.

    Attributes:
      gate_up: natural values (E, D, 2 P), transposed (E, 2 P, D); the gates' columns come first.
      down: natural (E, P, D), transposed (E, D, P).
    """

    gate_up: QuantizedWeight
    down: QuantizedWeight


class Call(NamedTuple):
    """What is known before a layer runs: of the masters, if there are any, the dtypes; and F."""

    dtypes: tuple[jnp.dtype, ...]
    width: int
    power_of_two: bool
    implementation: Implementation | None

    @property
    def options(self) -> dict:
        return {'power_of_two': self.power_of_two, 'implementation': self.implementation}


@jax.named_scope('weights')
def quantize_experts(
    w_gate_EDF: Float[Array, 'E D F'],
    w_up_EDF: Float[Array, 'E D F'],
    w_down_EFD: Float[Array, 'E F D'],
    *,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> ExpertWeights:
    """The weights in blocks of 128x128, F filled up with zeros to whole blocks.

    Raises:
      ValueError: shapes do not fit together or a dtype is neither float32 nor bfloat16.
    """
    _check_weights(w_gate_EDF, w_up_EDF, w_down_EFD)
    extra = -w_gate_EDF.shape[2] % BLOCK
    quantize = functools.partial(quantize_blocks, power_of_two=power_of_two, implementation=implementation)
    gate_up = quantize(*(jnp.pad(w, ((0, 0), (0, 0), (0, extra))) for w in (w_gate_EDF, w_up_EDF)))
    down = quantize(jnp.pad(w_down_EFD, ((0, 0), (0, extra), (0, 0))))
    return ExpertWeights(QuantizedWeight(*gate_up), QuantizedWeight(*down))


def expert_ffn_fp8(
    x_TD: Float[Array, 'T D'],
    gates_TK: Float32[Array, 'T K'],
    routes: Routes,
    weights: tuple[Array, Array, Array] | None,
    quantized: ExpertWeights | None = None,
    *,
    exchange: Exchange | None = None,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, 'T D']:
    """Returns `sum_k gates[t, k] * W_down (silu(W_gate x_t) * W_up x_t)` over the experts of token t, in the dtype of x.

    Differentiable in x, whose gradient has its dtype, in the gates, and in the weights: a float32 weight's gradient is
    never rounded.

    Args:
      x_TD: bfloat16 or float32.
      gates_TK: what each token's experts count.
      routes: of `pallas_kernels.routes.routes`; with an exchange, those of the R rows that come here.
      weights: the masters w_gate (E, D, F), w_up (E, D, F) and w_down (E, F, D). None if there are only quantised ones,
        which get no gradient.
      quantized: what `quantize_experts` made of them. The masters are then not read, and still get their gradients.
      exchange: experts lie on many devices, and `weights` are this one's. Rows travel in float8, with scales that are powers
        of two, x forward and the gradient of out backward; what becomes of them returns in the dtype of x.
      power_of_two: scales of all operands are powers of two.
      implementation: 'reference', 'pallas' (a Hopper GPU; D and F multiples of 128), or None for what serves best.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve the call.
    """
    if weights is None and quantized is None:
        raise ValueError('expert_ffn_fp8: without weights there must be quantised ones')
    apart = exchange is None and gates_TK.shape != routes.row_TK.shape
    if apart or x_TD.shape[0] != gates_TK.shape[0]:
        raise ValueError(
            f'expert_ffn_fp8: x is {x_TD.shape}, gates {gates_TK.shape} and routes are for {routes.row_TK.shape}'
        )
    if weights is not None:
        _check_weights(*weights)
    experts = weights[0].shape[:2] if weights is not None else quantized.gate_up.natural.values.shape[:2]  # pyright: ignore
    if experts != (wanted := (routes.group_sizes_E.shape[0], x_TD.shape[1])):
        raise ValueError(f'expert_ffn_fp8: weights are for (E, D) = {experts}, routes and x for {wanted}')
    dtypes, width = ((), 0) if weights is None else (tuple(w.dtype for w in weights), weights[0].shape[2])
    call = Call(dtypes, width, power_of_two, implementation)
    return _ffn(call, x_TD, gates_TK, routes, weights, quantized, exchange)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(
    call: Call,
    x_TD: Array,
    gates_TK: Array,
    routes: Routes,
    weights: tuple | None,
    quantized: ExpertWeights | None,
    exchange: Exchange | None,
) -> Array:
    return _forward(call, x_TD, gates_TK, routes, weights, quantized, exchange, keep=False)[0]


def _forward(
    call: Call,
    x_TD: Array,
    gates_TK: Array,
    routes: Routes,
    weights: tuple | None,
    quantized: ExpertWeights | None,
    exchange: Exchange | None,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    if quantized is None:
        assert weights is not None
        quantized = quantize_experts(*weights, **call.options)
    sizes_E, multiply = routes.group_sizes_E, functools.partial(grouped_gemm_fp8, implementation=call.implementation)
    x, gates_RK = _sent(call, x_TD, exchange), gates_TK
    if exchange is not None:
        gates_RK = exchange.send(gates_TK)
        # What has travelled is kept, and does not travel again.
        x, gates_RK = jax.tree.map(lambda leaf: checkpoint_name(leaf, SAVED), (x, gates_RK))
    gate_up_MG = multiply(permute(x, routes.token_M), quantized.gate_up.transposed, sizes_E)
    gate_M = permute_vector(gates_RK, routes)
    hidden, _ = swiglu_quantize(gate_up_MG, gate_M, columns=False, **call.options)
    y_MD = multiply(hidden, quantized.down.transposed, sizes_E)
    out_TD = _back(combine(y_MD, routes.row_TK, x_TD.dtype), exchange)
    if not keep:
        return out_TD, None
    gate_up = quantize_rows(gate_up_MG, **call.options)
    gate_up = Quantized(*(checkpoint_name(leaf, SAVED) for leaf in gate_up))
    return out_TD, (x, gate_up, gate_M, quantized.gate_up.natural, quantized.down.natural, routes, exchange)


def _backward(call: Call, residuals: tuple, d_out_TD: Array) -> tuple:
    x, gate_up, gate_M, w_gate_up, w_down, routes, exchange = residuals
    sizes_E, multiply = routes.group_sizes_E, functools.partial(grouped_gemm_fp8, implementation=call.implementation)
    d_out = permute(_sent(call, d_out_TD, exchange), routes.token_M)
    d_hidden_MP = multiply(d_out, w_down, sizes_E)
    d_gate_up, d_gate_up_columns, d_gate_M = swiglu_quantize_backward(
        gate_up, d_hidden_MP, gate_M, columns=bool(call.dtypes), **call.options
    )
    assert d_gate_M is not None
    d_x_MD = multiply(d_gate_up, w_gate_up, sizes_E)
    d_x_TD = _back(combine(d_x_MD, routes.row_TK, d_out_TD.dtype), exchange)
    d_gates_TK = _back(take_vector(d_gate_M, routes), exchange)
    if not call.dtypes:
        return d_x_TD, d_gates_TK, None, None, None, None
    assert d_gate_up_columns is not None
    wgrad = functools.partial(grouped_wgrad_fp8, implementation=call.implementation)
    by_tokens = functools.partial(requantize_columns, **call.options)
    x_columns = by_tokens(permute(x, routes.token_M))
    d_gate_EDP, d_up_EDP = (wgrad(x_columns, d_columns, sizes_E) for d_columns in d_gate_up_columns)
    gate_up_MG = rounded(dequantize_rows(gate_up), d_out_TD.dtype)
    _, hidden_columns = swiglu_quantize(gate_up_MG, gate_M, **call.options)
    assert hidden_columns is not None
    d_down_EPD = wgrad(hidden_columns, by_tokens(d_out), sizes_E)
    F = call.width
    gradients = d_gate_EDP[..., :F], d_up_EDP[..., :F], d_down_EPD[:, :F]
    return d_x_TD, d_gates_TK, None, tuple(d.astype(t) for d, t in zip(gradients, call.dtypes, strict=True)), None, None


_ffn.defvjp(_forward, _backward)


def _sent(call: Call, x_TD: Array, exchange: Exchange | None) -> Quantized:
    """Rows in float8, where their experts are."""
    if exchange is None:
        return quantize_rows(x_TD, **call.options)
    return exchange.send_quantized(quantize_rows(x_TD, power_of_two=True, implementation=call.implementation))


def _back(y_RD: Array, exchange: Exchange | None) -> Array:
    """The sums of the copies of rows, where they came from."""
    return y_RD if exchange is None else exchange.bring(y_RD)


def _check_weights(w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array) -> None:
    E, D, F = w_gate_EDF.shape
    if w_up_EDF.shape != (E, D, F) or w_down_EFD.shape != (E, F, D):
        raise ValueError(
            f'expert_ffn_fp8: w_gate is {w_gate_EDF.shape}, w_up {w_up_EDF.shape} and w_down {w_down_EFD.shape}: '
            f'they must be (E, D, F), (E, D, F) and (E, F, D)'
        )
    for w in (w_gate_EDF, w_up_EDF, w_down_EFD):
        if w.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f'expert_ffn_fp8: a weight is {w.dtype}, it must be float32 or bfloat16')
