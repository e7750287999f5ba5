"""Cases of `wgrad_fp8`: gradients of DeepSeek-V3's weights, contracted over tokens."""

import jax

from pallas_kernels.bench import gemm_fp8, peers
from pallas_kernels.bench.cases import Case, random_rows
from pallas_kernels.fp8 import Quantized
from pallas_kernels.gemm_fp8 import reference
from pallas_kernels.gemm_fp8.api import wgrad_fp8

TOKENS = 4096


def cases(quick: bool) -> list[Case]:
    """One weight at three numbers of tokens, then every weight of the forward cases; the quick one is the first."""
    shapes = [(7168, 4096, tokens) for tokens in (TOKENS, 8192, 16384)]
    shapes += [(k, n, TOKENS) for n, k in gemm_fp8.WEIGHTS]
    shapes = list(dict.fromkeys(shapes))
    return [case(*shape) for shape in (shapes[:1] if quick else shapes)]


def case(m: int, n: int, k: int) -> Case:
    """The product of (m, k) and (n, k), k tokens."""
    return Case(
        op='wgrad_fp8',
        name='wgrad',
        shape={'M': m, 'N': n, 'K': k},
        flops=2 * m * n * k,
        inputs=lambda key: operands(key, m, n, k),
        run=wgrad_fp8,
        reference=lambda lhs, rhs: reference.wgrad_fp8(lhs, rhs, None),
        peer_name=peers.CUBLAS,
        peer=lambda sets: peers.scaled_products(sets, blocks=False, out='float32'),
    )


def operands(key: jax.Array, m: int, n: int, k: int) -> tuple[Quantized, Quantized]:
    """Two random matrices in tiles of 1x128."""
    lhs, rhs = jax.random.split(key)
    return random_rows(lhs, m, k), random_rows(rhs, n, k)
