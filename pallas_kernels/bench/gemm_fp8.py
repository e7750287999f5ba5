"""Cases of `gemm_fp8`: the products of DeepSeek-V3's linear layers, forward and for the input's gradient."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case, random_rows, random_scales, random_values
from pallas_kernels.fp8 import BLOCK, Quantized, blocks, round_up
from pallas_kernels.gemm_fp8 import reference
from pallas_kernels.gemm_fp8.api import gemm_fp8

# (N, K): outputs and inputs of a layer.
WEIGHTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
ROWS = [64, 128, 4096, 8192]


def cases(quick: bool) -> list[Case]:
    """fprop, then dgrad, whose product is that with the weight transposed; the quick ones are three.

    Inputs get gradients in training only, where there are many rows. Contracted widths are filled up to whole blocks.
    """
    if quick:
        return [case('fprop', m, 4096, 7168) for m in (128, 4096)] + [case('dgrad', 4096, 7168, 4096)]
    fprop = [case('fprop', m, n, k) for n, k in WEIGHTS for m in ROWS]
    dgrad = [case('dgrad', m, k, round_up(n, BLOCK)) for n, k in WEIGHTS for m in ROWS if m > 128]
    return fprop + dgrad


def case(name: str, m: int, n: int, k: int) -> Case:
    """The product of (m, k) and (n, k)."""
    return Case(
        op='gemm_fp8',
        name=name,
        shape={'M': m, 'N': n, 'K': k},
        flops=2 * m * n * k,
        inputs=lambda key: operands(key, m, n, k),
        run=functools.partial(gemm_fp8, out_dtype=jnp.dtype(jnp.bfloat16)),
        reference=lambda lhs, rhs: reference.gemm_fp8(lhs, rhs, jnp.dtype(jnp.float32)),
        peer_name=peers.CUBLAS,
        peer=lambda sets: peers.scaled_products(sets, blocks=True, out='bfloat16'),
    )


def operands(key: jax.Array, m: int, n: int, k: int) -> tuple[Quantized, Quantized]:
    """Random rows in tiles of 1x128, and a random weight in blocks of 128x128."""
    lhs, *rhs = jax.random.split(key, 3)
    return random_rows(lhs, m, k), Quantized(random_values(rhs[0], n, k), random_scales(rhs[1], blocks(n), blocks(k)))
