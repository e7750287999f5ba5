"""The grouped products on Hopper: the dense kernel on the tiles of groups."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, Quantized
from pallas_kernels.gemm_fp8 import kernel
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.grouped_gemm_fp8 import tuned
from pallas_kernels.groups import Tiles, contiguous_tiles, group_starts, masked_tiles
from pallas_kernels.implementation import traced_once


@traced_once('out_dtype', 'config', 'interpret')
def grouped_gemm_fp8(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes_E: Array,
    out_dtype: DTypeLike,
    config: GemmConfig | None = None,
    interpret: Any = None,
) -> Float[Array, 'M N']:
    """As the reference, but for rows of no group; K a multiple of 128, N of 64."""
    (m, k), n = lhs.values.shape, rhs.values.shape[1]
    config = config or tuned.grouped_config(m, n, k)
    tiles = contiguous_tiles(group_sizes_E, config.rows, m)
    return _on_tiles(lhs, rhs, tiles, out_dtype, config, 'grouped_gemm_fp8', interpret)


@traced_once('out_dtype', 'config', 'interpret')
def masked_gemm_fp8(
    lhs: Quantized,
    rhs: Quantized,
    counts_E: Array,
    out_dtype: DTypeLike,
    config: GemmConfig | None = None,
    interpret: Any = None,
) -> Float[Array, 'M N']:
    """As the reference, but for rows of no group; K a multiple of 128, N and rows of a group of 64."""
    (m, k), n, groups = lhs.values.shape, rhs.values.shape[1], counts_E.shape[0]
    config = config or tuned.masked_config(m, groups, n, k)
    tiles = masked_tiles(counts_E, m // groups, config.rows)
    return _on_tiles(lhs, rhs, tiles, out_dtype, config, 'masked_gemm_fp8', interpret)


@traced_once('config', 'interpret')
def grouped_wgrad_fp8(
    lhs: Quantized,
    rhs: Quantized,
    group_sizes_E: Array,
    accumulator_EMN: Array | None,
    config: GemmConfig | None = None,
    interpret: Any = None,
) -> Float32[Array, 'E M N']:
    """As the reference; M and N multiples of 64."""
    m, n = lhs.values.shape[0], rhs.values.shape[0]
    config = config or tuned.wgrad_config(m, n)
    shape = jax.ShapeDtypeStruct((group_sizes_E.shape[0], m, n), jnp.float32)
    out = shape if accumulator_EMN is None else accumulator_EMN
    schedule = kernel.depth_groups(group_starts(group_sizes_E) // BLOCK, -(-group_sizes_E // BLOCK), m, n, config)
    return kernel.product(lhs, rhs, out, schedule, config, name='grouped_wgrad_fp8', interpret=interpret)


def _on_tiles(
    lhs: Quantized, rhs: Quantized, tiles: Tiles, out_dtype: DTypeLike, config: GemmConfig, name: str, interpret: Any
) -> Array:
    (m, k), n = lhs.values.shape, rhs.values.shape[1]
    schedule = kernel.row_groups(*tiles, n, k, config)
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return kernel.product(lhs, rhs, out, schedule, config, name=name, interpret=interpret)
