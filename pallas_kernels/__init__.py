"""Operations for NVIDIA Hopper GPUs: arrays in, arrays out, usable without the rest of this project.

One folder an operation: `api.py` is the public function, `reference.py` the specification in plain jax.numpy,
which runs on every backend and says where it rounds. An implementation is chosen by name; one that is asked for
by name and cannot serve its input raises, it never falls back.
"""

from pallas_kernels.decode_mla.api import LatentPages, decode_mla, quantize_latents
from pallas_kernels.decode_mla.schedule import PAGE
from pallas_kernels.exchange import Exchange, exchange
from pallas_kernels.expert_ffn_bf16.api import expert_ffn_bf16
from pallas_kernels.expert_ffn_fp8.api import ExpertWeights, expert_ffn_fp8, quantize_experts
from pallas_kernels.ffn_fp8.api import ffn_fp8
from pallas_kernels.flash_mla.api import flash_mla, flash_mla_e5m6
from pallas_kernels.flash_mla.sight import document_starts
from pallas_kernels.fp8 import Quantized
from pallas_kernels.gemm_fp8.api import gemm_fp8, wgrad_fp8
from pallas_kernels.grouped_gemm.api import grouped_gemm
from pallas_kernels.grouped_gemm_bf16.api import grouped_gemm_bf16, grouped_wgrad_bf16, masked_gemm_bf16
from pallas_kernels.grouped_gemm_fp8.api import grouped_gemm_fp8, grouped_wgrad_fp8, masked_gemm_fp8
from pallas_kernels.implementation import Implementation
from pallas_kernels.linear_fp8.api import QuantizedWeight, linear_fp8, linears_fp8
from pallas_kernels.quantize_fp8.api import (
    E5M6,
    dequantize_e5m6,
    quantize_blocks,
    quantize_columns,
    quantize_e5m6,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from pallas_kernels.routes import Routes, routes
from pallas_kernels.swiglu_quantize.api import swiglu_quantize, swiglu_quantize_backward

__all__ = [
    'E5M6',
    'PAGE',
    'Exchange',
    'ExpertWeights',
    'Implementation',
    'LatentPages',
    'Quantized',
    'QuantizedWeight',
    'Routes',
    'decode_mla',
    'dequantize_e5m6',
    'document_starts',
    'exchange',
    'expert_ffn_bf16',
    'expert_ffn_fp8',
    'ffn_fp8',
    'flash_mla',
    'flash_mla_e5m6',
    'gemm_fp8',
    'grouped_gemm',
    'grouped_gemm_bf16',
    'grouped_gemm_fp8',
    'grouped_wgrad_bf16',
    'grouped_wgrad_fp8',
    'linear_fp8',
    'linears_fp8',
    'masked_gemm_bf16',
    'masked_gemm_fp8',
    'quantize_blocks',
    'quantize_columns',
    'quantize_e5m6',
    'quantize_experts',
    'quantize_latents',
    'quantize_rows',
    'quantize_rows_and_columns',
    'requantize_columns',
    'routes',
    'swiglu_quantize',
    'swiglu_quantize_backward',
    'wgrad_fp8',
]
