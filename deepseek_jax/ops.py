"""The operations that kernels serve: the model's only door to `pallas_kernels`.

Weights are float32 masters; every operation casts them to the dtype of its activations or, in the linear layers of the
float8 recipe, quantises them. Products accumulate in float32. Float32 activations are multiplied in full precision
(no TF32).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

import pallas_kernels
from deepseek_jax.config import PrecisionConfig
from pallas_kernels import E5M6, PAGE, Exchange, ExpertWeights, Quantized, QuantizedWeight, linears_fp8, quantize_blocks
from pallas_kernels.expert_ffn_fp8 import api as expert_ffn_fp8
from pallas_kernels.flash_mla import api as flash_mla
from pallas_kernels.fp8 import BLOCK, dequantize_blocks, rounded
from pallas_kernels.implementation import hopper_cores

QUANTIZED = 'quantized'
"""The name that float8 experts have in place of those of their masters."""
_KEPT = 'kept'
KEEP = jax.checkpoint_policies.save_only_these_names(_KEPT, flash_mla.SAVED, expert_ffn_fp8.SAVED)
"""Policy of a rematerialised block: what `keep` marks, the output of attention, and what SwiGLU of the experts reads."""


class QTensor(NamedTuple):
    """A weight in float8, in blocks of 128x128 of its matrix (K inputs, N outputs), ready for every product.

    It stands in a parameter tree where the weight stood: stacked weights have a leading L axis in every field, and
    functions over a scanned tree see one layer's. Gradients are those of the master, and end here if there is none.

    Attributes:
      values: e4m3, in the shape of the weight.
      scales: float32 (k, n), what the blocks of `values` are to be multiplied by.
      transposed_values: e4m3 (N, K), the same values, the inputs contiguous.
      transposed_scales: float32 (n, k).
      rounded: the weight itself, rounded to the dtype that products outside float8 read; None if they are to make do
        with `dequantize`.
      master: the weight in float32, which float8 products do not read.
    """

    values: Array
    scales: Array
    transposed_values: Array
    transposed_scales: Array
    rounded: Array | None = None
    master: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape

    def matrices(self) -> QuantizedWeight:
        """The matrix (K, N) of one layer's weight and its transpose."""
        values_NK = self.transposed_values
        natural = Quantized(self.values.reshape(values_NK.shape[::-1]), self.scales)
        return QuantizedWeight(natural, Quantized(values_NK, self.transposed_scales))

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Array:
        """The weight that the values and scales stand for, rounded once to `dtype`: float32 holds it to the last bit."""
        *stacked, N, K = self.transposed_values.shape
        weight = dequantize_blocks(self.values.reshape(*stacked, K, N), self.scales)
        return weight.astype(dtype).reshape(self.shape)


def keep(values: Any) -> Any:
    """The values, which a block that is rematerialised with `KEEP` keeps for its backward pass."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), values)


def quantize(w: Float[Array, '*inputs_outputs'], inputs: int, precision: PrecisionConfig) -> QTensor:
    """One layer's weight in float8; its first `inputs` axes are those that its product contracts."""
    natural, transposed = quantize_blocks(_matrix(w, inputs), power_of_two=precision.power_of_two_scales)
    return QTensor(natural.values.reshape(w.shape), natural.scales, transposed.values, transposed.scales)


def linear(equation: str, x: Array, w: Array | QTensor, precision: PrecisionConfig, kept: E5M6 | None = None) -> Array:
    """A linear layer of the recipe, rounded once to the activations' dtype.

    `equation` is einsum's, with the contracted letters last in x and first in w: `'BTHU,HUD->BTD'`. Under 'fp8' output
    and gradients are products of float8 matrices and the backward pass keeps float8 only; a float32 weight's gradient
    is float32. Under other recipes it is `einsum`. `kept` is what `attention` kept of x.
    """
    return linears(equation, x, (w,), precision, kept)[0]


def linears(
    equation: str,
    x: Array,
    weights: Sequence[Array | QTensor],
    precision: PrecisionConfig,
    kept: E5M6 | None = None,
) -> tuple[Array, ...]:
    """Linear layers of one input, as `linear`: `'BTD,DC,DR->BTC,BTR'`. Under 'fp8' they are one product."""
    inputs, outputs = equation.split('->')
    x_letters, *w_letters = inputs.split(',')
    y_letters = outputs.split(',')
    if precision.recipe != 'fp8' or x.size == 0:
        triples = zip(w_letters, y_letters, weights, strict=True)
        return tuple(einsum(f'{x_letters},{letters}->{y}', x, w) for letters, y, w in triples)
    contracted = sum(letter not in y_letters[0] for letter in w_letters[0])
    rows, width = x.shape[:-contracted], math.prod(x.shape[-contracted:])
    masters, quantized = _masters_and_copies(weights, contracted)
    with jax.named_scope('linear'):
        options = {'power_of_two': precision.power_of_two_scales, 'kept': kept}
        products = linears_fp8(x.reshape(-1, width), masters, quantized, **options)
    return tuple(y_MN.reshape(*rows, *w.shape[contracted:]) for y_MN, w in zip(products, weights, strict=True))


def swiglu(
    x: Float[Array, '*rows D'],
    w_gate_DF: Array | QTensor,
    w_up_DF: Array | QTensor,
    w_down_FD: Array | QTensor,
    precision: PrecisionConfig,
) -> Float[Array, '*rows D']:
    """`W_down (silu(W_gate x) * W_up x)` in the recipe's format; SwiGLU's input is what a rematerialised block keeps of it."""
    if precision.recipe != 'fp8' or x.size == 0:
        gate, up = keep(linears('...D,DF,DF->...F,...F', x, (w_gate_DF, w_up_DF), precision))
        with jax.named_scope('swiglu'):
            hidden = jax.nn.silu(gate) * up
        return linear('...F,FD->...D', hidden, w_down_FD, precision)
    masters, quantized = _masters_and_copies((w_gate_DF, w_up_DF, w_down_FD), 1)
    with jax.named_scope('linear'):
        power_of_two = precision.power_of_two_scales
        y_MD = pallas_kernels.ffn_fp8(x.reshape(-1, x.shape[-1]), masters, quantized, power_of_two=power_of_two)  # pyright: ignore
    return y_MD.reshape(x.shape)


@jax.named_scope('linear')
def einsum(equation: str, x: Array, w: Array | QTensor) -> Array:
    """A product of activations with a weight or with each other, rounded once to the activations' dtype."""
    with jax.named_scope('weights'):
        if isinstance(w, QTensor):
            w = w.dequantize(x.dtype) if w.rounded is None else w.rounded
        w = w.astype(x.dtype)
    return jnp.einsum(equation, x, w, precision=_precision(x.dtype))


def einsum_fp32(equation: str, x: Array, y: Array) -> Array:
    """A product whose result stays float32: attention scores, router affinities, logits."""
    return jnp.einsum(equation, x, y.astype(x.dtype), precision=_precision(x.dtype), preferred_element_type=jnp.float32)


def add_weight_gradient(
    accumulator_KN: Float32[Array, 'K N'], x_MK: Float[Array, 'M K'], d_out_MN: Float[Array, 'M N']
) -> Float32[Array, 'K N']:
    """`accumulator + x.T @ d_out` in float32: one pass over the accumulator where there is a kernel that adds."""
    (M, K), N = x_MK.shape, d_out_MN.shape[1]
    if x_MK.dtype != jnp.bfloat16 or hopper_cores() is None or any(size % BLOCK for size in (M, K, N)):
        return accumulator_KN + jnp.einsum(
            'MK,MN->KN', x_MK, d_out_MN, precision=_precision(x_MK.dtype), preferred_element_type=jnp.float32
        )
    rows_E = jnp.full(1, M, jnp.int32)
    return pallas_kernels.grouped_wgrad_bf16(x_MK, d_out_MN, rows_E, accumulator_KN[None])[0]


def router_product(x_MD: Float[Array, 'M D'], w_DE: Float[Array, 'D E']) -> Float32[Array, 'M E']:
    """`x @ w` of the router in float32: w, which is float32, loses nothing.

    Bfloat16 activations go through the tensor cores, with w cut into three bfloat16 terms that add up to it, and so does the
    gradient of w; that of x, which is rounded to bfloat16, has two terms each.
    """
    if x_MD.dtype == jnp.bfloat16:
        return _split_product(x_MD, w_DE)
    return einsum_fp32('MD,DE->ME', x_MD, w_DE)


@jax.custom_vjp
def _split_product(x_MD: Array, w_DE: Array) -> Array:
    products = jnp.dot(x_MD, jnp.concatenate(_terms(w_DE, 3), axis=1), preferred_element_type=jnp.float32)
    large, middle, small = jnp.split(products, 3, axis=1)
    return large + (middle + small)


def _split_product_backward(saved: tuple[Array, Array], d_ME: Array) -> tuple[Array, Array]:
    x_MD, w_DE = saved
    d_w_DE = _split_product(x_MD.T, d_ME)
    (d_large, d_small), (w_large, w_small) = _terms(d_ME, 2), _terms(w_DE, 2)
    d_terms = jnp.concatenate([d_large, d_large, d_small], axis=1)
    w_terms = jnp.concatenate([w_large, w_small, w_large], axis=1)
    return jnp.dot(d_terms, w_terms.T, preferred_element_type=jnp.float32).astype(x_MD.dtype), d_w_DE


_split_product.defvjp(lambda x, w: (_split_product(x, w), (x, w)), _split_product_backward)


def _terms(x: Array, count: int) -> list[Array]:
    """Bfloat16 arrays, each of what the ones before leave of x: three add up to a float32 x."""
    terms = []
    for _ in range(count):
        terms.append(rounded(x, jnp.bfloat16))
        x = x - terms[-1]
    return terms


def document_starts(segments_BT: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """The position of the first token of each token's document, for `attention`; a document is a run of equal numbers."""
    return pallas_kernels.document_starts(segments_BT)


@jax.named_scope('attend')
def attention(
    q_BTHN: Float[Array, 'B T H N'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    k_BSHN: Float[Array, 'B S H N'],
    k_rope_BSR: Float[Array, 'B S R'],
    v_BSHU: Float[Array, 'B S H U'],
    scale: float,
    first_BT: Int[Array, 'B T'] | None,
    positions_BT: Int[Array, 'B T'] | None,
    precision: PrecisionConfig,
    keep_output: bool = True,
) -> tuple[Float[Array, 'B T H U'], E5M6 | None]:
    """`softmax(scale * (q k + q_rope k_rope)) v` over the keys from a first one, or from key 0, up to each query's position.

    Without positions, query t sees the keys up to t. Scores are never kept for the backward pass, nor held for more than a
    block of queries. Under 'fp8' that pass keeps the output in 12 bits a value, for its gradient and for that of the layer
    that reads it, and returns that too: where H U is a multiple of 128, and `keep_output` says that such a pass may come.
    """
    if not q_BTHN.size:
        return jnp.zeros((*q_BTHN.shape[:3], v_BSHU.shape[3]), v_BSHU.dtype), None
    inputs = q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU
    options: Any = {'scale': scale, 'first_BT': first_BT, 'positions_BT': positions_BT}
    if precision.recipe == 'fp8' and keep_output and math.prod(v_BSHU.shape[2:]) % BLOCK == 0:
        out_BTHU, _, kept = pallas_kernels.flash_mla_e5m6(*inputs, **options)
        return out_BTHU, kept
    return pallas_kernels.flash_mla(*inputs, **options)[0], None


@jax.named_scope('attend')
def latent_attention(
    q_BTHC: Float[Array, 'B T H C'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    latent_BSC: Float[Array, 'B S C'],
    k_rope_BSR: Float[Array, 'B S R'],
    scale: float,
    positions_BT: Int[Array, 'B T'],
) -> Float[Array, 'B T H C']:
    """`softmax(scale * (q c + q_rope k_rope)) c` over the slots up to each query's position.

    The T queries of a row stand at positions one after the other; a row whose last position lies outside the cache is
    idle, its output means nothing. The slots are read as pages: where S is no multiple of a page they are copied.
    """
    B, S = latent_BSC.shape[:2]
    fill = [(0, 0), (0, -S % PAGE), (0, 0)]
    pages = [jnp.pad(x, fill).reshape(-1, PAGE, x.shape[2]) for x in (latent_BSC, k_rope_BSR)]
    table_BW = jnp.arange(len(pages[0]), dtype=jnp.int32).reshape(B, -1)
    last_B = positions_BT[:, -1].astype(jnp.int32)
    lengths_B = jnp.where((last_B >= 0) & (last_B < S), last_B + 1, 0)
    cache = pallas_kernels.LatentPages(*pages)
    return pallas_kernels.decode_mla(q_BTHC, q_rope_BTHR, cache, table_BW, lengths_B, scale=scale)[0]


def grouped_matmul(
    x_JK: Float[Array, 'J K'], w_EKN: Float[Array, 'E K N'], group_sizes_E: Int[Array, ' E']
) -> Float[Array, 'J N']:
    """The expert linear layer: row `j`, sorted by expert, times its expert's matrix."""
    return pallas_kernels.grouped_gemm(x_JK, w_EKN.astype(x_JK.dtype), group_sizes_E)


def quantize_experts(params: Mapping[str, Array], precision: PrecisionConfig) -> dict[str, ExpertWeights]:
    """What stands for one layer's routed experts in float8, ready for every product; gradients end here."""
    return {QUANTIZED: pallas_kernels.quantize_experts(*_masters(params), power_of_two=precision.power_of_two_scales)}


def has_expert_ffn(precision: PrecisionConfig) -> bool:
    """Whether `expert_ffn` computes the recipe's routed experts here; else they go through `grouped_matmul`.

    Its rows are padded to 128 an expert, which pays for bf16 where the kernels are.
    """
    return precision.recipe == 'fp8' or (precision.recipe == 'bf16' and hopper_cores() is not None)


def exchange(
    experts_MK: Int[Array, 'M K'], num_experts: int, axes: Sequence[str], capacities: Sequence[int]
) -> tuple[Exchange, Int[Array, 'R K']]:
    """The way of rows to the devices of their experts, and the experts of those that come here: `pallas_kernels.exchange`."""
    return keep(pallas_kernels.exchange(experts_MK, num_experts, axes, capacities))


@jax.named_scope('experts')
def expert_ffn(
    params: Mapping[str, Any],
    x_MD: Float[Array, 'M D'],
    gates_MK: Float[Array, 'M K'],
    experts_RK: Int[Array, 'R K'],
    num_experts: int,
    precision: PrecisionConfig,
    exchange: Exchange | None = None,
    max_routed: int | None = None,
) -> tuple[Float[Array, 'M D'], Int[Array, ' E']]:
    """The routed experts of a layer by grouped kernels, where `has_expert_ffn` says so, and how many rows each computed.

    Under 'fp8' every product is in float8, which is all that the backward pass keeps; `params` are the masters, or what
    `quantize_experts` made of them, or both: then the masters are not read and get the gradients. With an exchange
    `experts_RK` and `num_experts` are those of the rows that come to this device and of its weights; else R is M.
    """
    if not x_MD.size:
        return x_MD, jnp.zeros(num_experts, jnp.int32)
    routes = keep(pallas_kernels.routes(experts_RK, num_experts, max_routed))
    if precision.recipe == 'bf16':
        if exchange is not None:
            x_MD, gates_MK = keep((exchange.send(x_MD), exchange.send(gates_MK)))
        y_MD = pallas_kernels.expert_ffn_bf16(x_MD, gates_MK, routes, _masters(params))
        return y_MD if exchange is None else exchange.bring(y_MD), routes.group_sizes_E
    y_MD = pallas_kernels.expert_ffn_fp8(
        x_MD,
        gates_MK,
        routes,
        _masters(params) if 'w_up_EDF' in params else None,
        params.get(QUANTIZED),
        exchange=exchange,
        power_of_two=precision.power_of_two_scales,
    )
    return y_MD, routes.group_sizes_E


def _masters(params: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    return params['w_gate_EDF'], params['w_up_EDF'], params['w_down_EFD']


def _masters_and_copies(
    weights: Sequence[Array | QTensor], inputs: int
) -> tuple[tuple[Array, ...] | None, tuple[QuantizedWeight, ...] | None]:
    """The matrices of the weights' masters and of their float8 copies, None where there are none."""
    masters = [w.master if isinstance(w, QTensor) else w for w in weights]
    masters = None if masters[0] is None else tuple(_matrix(w, inputs) for w in masters)  # pyright: ignore
    return masters, tuple(w.matrices() for w in weights) if isinstance(weights[0], QTensor) else None  # pyright: ignore


def _matrix(w: Array, inputs: int) -> Float[Array, 'K N']:
    return w.reshape(math.prod(w.shape[:inputs]), -1)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
