"""A linear layer in float8: the output and both gradients are products of e4m3 matrices [DeepSeek-V3, 3.3].

  y  = x  @ w      x in tiles of 1x128 along K,                  w in blocks of 128x128
  dx = dy @ w.T    dy in tiles of 1x128 along N,                 the same bytes of w, transposed
  dw = x.T @ dy    x and dy quantised anew, in tiles of 128 tokens; the result stays float32

What the backward pass keeps is float8: x in tiles of tokens, and w. Neither x nor w is kept in its own format. An x that is
kept in 12 bits anyway is quantised from those.

Weights that share their input share its quantisation. They share the three products, too, where outputs are narrower than
four times the input: the joining and cutting of outputs and of their gradients then costs less than a dx for each weight
(MLA joins the down-projections, and keeps the up-projections apart). The bytes of joined weights are laid side by side along
N, each from a new block of 128 on, so that the tiles are those of the weights apart:

  widths 1536, 512, 64:    | 0 .. 1535 | 1536 .. 2047 | 2048 .. 2111 |
  widths 96, 64:           | 0 .. 95, 32 columns of zeros | 128 .. 191 |

So outputs and weight gradients equal those of separate calls, and dx is summed in float32 over all weights.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fp8 import BLOCK, Quantized, round_up
from pallas_kernels.gemm_fp8.api import gemm_fp8, wgrad_fp8
from pallas_kernels.implementation import Implementation
from pallas_kernels.quantize_fp8.api import (
    E5M6,
    dequantize_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
)


class QuantizedWeight(NamedTuple):
    """A weight (K, N) in float8, once for each product that reads it: what `quantize_blocks` returns.

    Attributes:
      natural: values (K, N), scales (k, n): contracted over N, for the input's gradient.
      transposed: values (N, K), scales (n, k): contracted over K, for the output.
    """

    natural: Quantized
    transposed: Quantized


class _Call(NamedTuple):
    """What is known about a call before it runs; no `weight_dtypes` means that there are no masters."""

    weight_dtypes: tuple[jnp.dtype, ...]
    power_of_two: bool
    implementation: Implementation | None

    @property
    def options(self) -> dict:
        return {'power_of_two': self.power_of_two, 'implementation': self.implementation}


def linear_fp8(
    x_MK: Float[Array, 'M K'],
    w_KN: Array | None,
    quantized: tuple[Quantized, Quantized] | None = None,
    *,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, 'M N']:
    """Returns `x @ w` in the dtype of x. Every product sums in float32 and rounds once.

    Differentiable in x, whose gradient has its dtype, and in w: a float32 weight gets a gradient that was never rounded,
    a bfloat16 one gets it rounded once.

    Args:
      x_MK: bfloat16 or float32, not empty.
      w_KN: the master, float32 or bfloat16. None if there is only a quantised copy, which gets no gradient.
      quantized: what `quantize_blocks` made of w, once for all micro-batches of a step, say. The master is then not
        read, and still gets the gradient.
      power_of_two: scales of all operands are powers of two.
      implementation: 'reference', 'pallas' (a Hopper GPU; K a multiple of 128, N of 64), or None for what serves best.

    Raises:
      ValueError: shapes or dtypes do not fit together.
      NotImplementedError: 'pallas' was asked for and cannot serve the call.
    """
    weights = None if w_KN is None else (w_KN,)
    copies = None if quantized is None else (quantized,)
    return linears_fp8(x_MK, weights, copies, power_of_two=power_of_two, implementation=implementation)[0]


def linears_fp8(
    x_MK: Float[Array, 'M K'],
    weights: tuple[Array, ...] | None,
    quantized: tuple[tuple[Quantized, Quantized], ...] | None = None,
    *,
    kept: E5M6 | None = None,
    power_of_two: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, 'M _'], ...]:
    """Returns `x @ w` for each weight, from one quantisation of x. Otherwise as `linear_fp8`.

    'pallas' serves widths that are multiples of 64. Widths that are no multiples of 128 cost least as the last one.

    Args beside those of `linear_fp8`:
      kept: x in 12 bits a value, if something else keeps it for the backward pass: nothing more of x is kept then, and the
        weights' gradients are products with what it stands for.
    """
    if weights is None and quantized is None:
        raise ValueError('linear_fp8: without a weight there must be a quantised one')
    copies = None if quantized is None else tuple(QuantizedWeight(*copy) for copy in quantized)
    _check(x_MK, weights, copies)
    if kept is not None and kept.high_MK.shape != x_MK.shape:
        raise ValueError(
            f'linear_fp8: x is {x_MK.shape} and what is kept of it {kept.high_MK.shape}: they must be the same'
        )
    dtypes = () if weights is None else tuple(w_KN.dtype for w_KN in weights)
    return _linears(_Call(dtypes, power_of_two, implementation), x_MK, weights, copies, kept)  # pyright: ignore


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linears(
    call: _Call, x_MK: Array, weights: tuple | None, copies: tuple | None, kept: E5M6 | None
) -> tuple[Array, ...]:
    copies = quantized_weights(weights, copies, **call.options)
    rows = quantize_rows(x_MK, **call.options)
    return _output(call, rows, copies, x_MK.dtype)


def _forward(call: _Call, x_MK: Array, weights: tuple | None, copies: tuple | None, kept: E5M6 | None):
    copies = quantized_weights(weights, copies, **call.options)
    if call.weight_dtypes and kept is None:
        rows, columns = quantize_rows_and_columns(x_MK, **call.options)
    else:
        rows, columns = quantize_rows(x_MK, **call.options), kept
    natural = tuple(copy.natural for copy in copies)
    return _output(call, rows, copies, x_MK.dtype), (columns, natural)


def _backward(call: _Call, residuals: tuple, d_outputs: tuple[Array, ...]):
    columns, natural = residuals
    dtype = d_outputs[0].dtype
    if isinstance(columns, E5M6):
        columns = quantize_columns(dequantize_e5m6(columns, dtype=dtype), **call.options)
    groups = _groups(natural[0].values.shape[0], [w.values.shape[1] for w in natural])
    # A sum over groups is rounded once.
    sum_dtype = dtype if len(groups) == 1 else jnp.float32
    inputs, d_weights = [], []
    for group in groups:
        weights = natural[group]
        d_MN = _side_by_side(d_outputs[group], whole=True)
        if call.weight_dtypes:
            d_rows, d_columns = quantize_rows_and_columns(d_MN, **call.options)
            d_w_KN = wgrad_fp8(columns, d_columns, implementation=call.implementation)
            d_weights += _apart(d_w_KN, [w.values.shape[1] for w in weights])
        else:
            d_rows = quantize_rows(d_MN, **call.options)
        weight = join(weights, axis=1, whole=True)
        inputs.append(gemm_fp8(d_rows, weight, out_dtype=sum_dtype, implementation=call.implementation))
    d_x_MK = functools.reduce(jnp.add, inputs).astype(dtype)
    if not call.weight_dtypes:
        return d_x_MK, None, None, None
    return d_x_MK, tuple(d.astype(dtype) for d, dtype in zip(d_weights, call.weight_dtypes, strict=True)), None, None


_linears.defvjp(_forward, _backward)


def quantized_weights(
    weights: tuple[Array, ...] | None, copies: tuple[QuantizedWeight, ...] | None, **options: Any
) -> tuple[QuantizedWeight, ...]:
    """The copies, or if there are none what `quantize_blocks` makes of the masters."""
    if copies is not None:
        return copies
    assert weights is not None
    return tuple(QuantizedWeight(*quantize_blocks(w_KN, **options)) for w_KN in weights)


def _output(call: _Call, rows: Quantized, copies: tuple[QuantizedWeight, ...], dtype: jnp.dtype) -> tuple[Array, ...]:
    weights = [copy.transposed for copy in copies]
    outputs = []
    for group in _groups(rows.values.shape[1], [w.values.shape[0] for w in weights]):
        weight = join(weights[group], axis=0)
        y_MN = gemm_fp8(rows, weight, out_dtype=dtype, implementation=call.implementation)
        outputs += _apart(y_MN, [w.values.shape[0] for w in weights[group]])
    return tuple(outputs)


def _groups(inputs: int, widths: Sequence[int]) -> list[slice]:
    """The weights that share a product: all, or each alone."""
    if sum(widths) < 4 * inputs:
        return [slice(0, len(widths))]
    return [slice(i, i + 1) for i in range(len(widths))]


def join(parts: Sequence[Quantized], axis: int, whole: bool = False) -> Quantized:
    """Weights in blocks of 128x128 side by side along an axis, each from a new block on; `whole` fills up the last one, too."""
    values = _side_by_side([part.values for part in parts], axis, whole)
    return Quantized(values, _concatenate([part.scales for part in parts], axis))


def _side_by_side(parts: Sequence[Array], axis: int = 1, whole: bool = False) -> Array:
    """The parts along an axis, filled up with zeros to whole blocks; the last one only if asked, for contraction."""
    padded = []
    for index, part in enumerate(parts):
        width = part.shape[axis]
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, round_up(width, BLOCK) - width)
        fill = width % BLOCK and (whole or index + 1 < len(parts))
        padded.append(jnp.pad(part, pad) if fill else part)
    return _concatenate(padded, axis)


def _apart(joined_MN: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    """The inverse of `_side_by_side`."""
    parts, start = [], 0
    for width in widths:
        parts.append(jax.lax.slice_in_dim(joined_MN, start, start + width, axis=1))
        start += round_up(width, BLOCK)
    return tuple(parts)


def _concatenate(parts: Sequence[Array], axis: int) -> Array:
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def _check(x_MK: Array, weights: tuple | None, copies: tuple | None) -> None:
    if weights == () or copies == ():
        raise ValueError('linear_fp8: there must be at least one weight')
    if weights is not None and copies is not None and len(weights) != len(copies):
        raise ValueError(f'linear_fp8: {len(weights)} weights and {len(copies)} quantised ones: give one for each')
    for w_KN in weights or ():
        if w_KN.ndim != 2 or w_KN.shape[0] != x_MK.shape[1]:
            raise ValueError(
                f'linear_fp8: x is {x_MK.shape} and a weight {w_KN.shape}: it must be ({x_MK.shape[1]}, N)'
            )
        if w_KN.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f'linear_fp8: a weight is {w_KN.dtype}, it must be float32 or bfloat16')
    for i, copy in enumerate(copies or ()):
        wanted = weights[i].shape if weights is not None else (x_MK.shape[1], copy.natural.values.shape[1])
        if (copy.natural.values.shape, copy.transposed.values.shape) != (wanted, wanted[::-1]):
            raise ValueError(
                f'linear_fp8: a quantised weight has shapes {copy.natural.values.shape} and '
                f'{copy.transposed.values.shape}, it must have {wanted} and {wanted[::-1]}'
            )
