"""Cases of the grouped products: DeepSeek-V3's experts, in training (contiguous rows) and in decoding (masked rows)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case, random_rows, random_scales, random_values
from pallas_kernels.fp8 import BLOCK, Quantized, blocks, round_up
from pallas_kernels.grouped_gemm_fp8 import api, reference

# (N, K): outputs and inputs of an expert's two products.
WEIGHTS = [(4096, 7168), (7168, 2048)]
EXPERTS = 32
ROWS = 32768
MASKED_ROWS = 64


def zipf_sizes(groups: int, total: int) -> tuple[int, ...]:
    """Sizes that fall as 1 / rank, in random order, some odd number each, `total` in all."""
    shares = 1 / np.arange(1, groups + 1)
    sizes = np.floor(total * shares / shares.sum()).astype(int)
    sizes[0] += total - sizes.sum()
    return tuple(np.random.default_rng(0).permutation(sizes).tolist())


BALANCED = (ROWS // 4,) * 4
ZIPF = zipf_sizes(EXPERTS, ROWS)
FEW = tuple(np.random.default_rng(1).integers(1, MASKED_ROWS + 1, EXPERTS).tolist())


def cases(quick: bool) -> list[Case]:
    """Balanced and uneven groups, gradients of weights, and few rows an expert; the quick ones are the first weight's."""
    found = []
    for n, k in WEIGHTS[:1] if quick else WEIGHTS:
        found += [contiguous('4 equal', BALANCED, n, k), contiguous('32 Zipf', ZIPF, n, k)]
        found += [wgrad('wgrad, 4 equal', BALANCED, k, n), wgrad('wgrad, 32 Zipf', ZIPF, k, n), masked(n, k)]
    return found


def contiguous(name: str, sizes: Sequence[int], n: int, k: int) -> Case:
    """Rows of groups by (n, k) each."""
    rows = padded(sizes)
    real = jnp.asarray(real_rows(sizes))
    ends_E = jnp.cumsum(jnp.array([round_up(size, BLOCK) for size in sizes], jnp.int32))
    return Case(
        op='grouped_gemm_fp8',
        name=name,
        shape={'M': rows, 'N': n, 'K': k, 'E': len(sizes)},
        flops=2 * sum(sizes) * n * k,
        inputs=lambda key: operands(key, rows, n, k, sizes),
        run=api.grouped_gemm_fp8,
        reference=lambda lhs, rhs, sizes_E: reference.grouped_gemm_fp8(lhs, rhs, sizes_E, jnp.dtype(jnp.float32)),
        dense=lambda y_MN: jnp.where(real[:, None], y_MN, 0),
        peer_name='torch._scaled_grouped_mm, scales of rows',
        peer=lambda sets: peers.rowwise_grouped_products(sets, ends_E),
    )


def masked(n: int, k: int) -> Case:
    """At most 64 rows an expert."""
    rows = EXPERTS * MASKED_ROWS
    real = (jnp.arange(MASKED_ROWS) < jnp.array(FEW)[:, None]).reshape(-1)
    return Case(
        op='masked_gemm_fp8',
        name='1 to 64 rows',
        shape={'M': rows, 'N': n, 'K': k, 'E': EXPERTS},
        flops=2 * sum(FEW) * n * k,
        inputs=lambda key: operands(key, rows, n, k, FEW),
        run=api.masked_gemm_fp8,
        reference=lambda lhs, rhs, sizes_E: reference.masked_gemm_fp8(lhs, rhs, sizes_E, jnp.dtype(jnp.float32)),
        dense=lambda y_MN: jnp.where(real[:, None], y_MN, 0),
        peer_name=peers.COPY,
    )


def wgrad(name: str, sizes: Sequence[int], m: int, n: int) -> Case:
    """Gradients (m, n) of each group's weight; the peer makes one of all tokens, which is as much work."""
    tokens = padded(sizes)
    return Case(
        op='grouped_wgrad_fp8',
        name=name,
        shape={'M': m, 'N': n, 'K': tokens, 'E': len(sizes)},
        flops=2 * sum(sizes) * m * n,
        inputs=lambda key: wgrad_operands(key, m, n, sizes),
        run=api.grouped_wgrad_fp8,
        reference=lambda lhs, rhs, sizes_E: reference.grouped_wgrad_fp8(lhs, rhs, sizes_E, None),
        peer_name=f'{peers.CUBLAS}, one group',
        peer=lambda sets: peers.scaled_products(
            [(lhs, rhs) for lhs, rhs, _ in sets], blocks=False, out='float32'
        )._replace(results=None),
    )


def padded(sizes: Sequence[int]) -> int:
    """Rows of the contiguous layout."""
    return sum(round_up(size, BLOCK) for size in sizes)


def real_rows(sizes: Sequence[int]) -> np.ndarray:
    """Which rows of the contiguous layout belong to a group."""
    return np.concatenate([np.arange(round_up(size, BLOCK)) < size for size in sizes])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def operands(
    key: jax.Array, rows: int, n: int, k: int, sizes: tuple[int, ...]
) -> tuple[Quantized, Quantized, jax.Array]:
    """Random rows, a random weight a group, and the sizes."""
    lhs, *rhs = jax.random.split(key, 3)
    groups = len(sizes)
    weights = Quantized(random_values(rhs[0], groups, n, k), random_scales(rhs[1], groups, blocks(n), blocks(k)))
    return random_rows(lhs, rows, k), weights, jnp.array(sizes, jnp.int32)


def wgrad_operands(key: jax.Array, m: int, n: int, sizes: Sequence[int]) -> tuple[Quantized, Quantized, jax.Array]:
    """Two random matrices of tokens, zeros where groups are padded, and the sizes."""
    real = jnp.asarray(real_rows(sizes))
    made = [random_rows(part, width, len(real)) for part, width in zip(jax.random.split(key), (m, n), strict=True)]
    lhs, rhs = (x._replace(values=jnp.where(real, x.values, jnp.zeros_like(x.values))) for x in made)
    return lhs, rhs, jnp.array(sizes, jnp.int32)
