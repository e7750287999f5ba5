"""Tile sizes of the grouped products on Hopper, from those of the dense ones; `python -m pallas_kernels.bench search`."""

import dataclasses

from pallas_kernels.gemm_fp8 import tuned as dense
from pallas_kernels.gemm_fp8.tuned import GemmConfig

# 128 rows, which lie in one group: 128x256 of two waves, clusters share rows. Rows move fastest, since only their number
# is unknown.
_LONG = GemmConfig(wgs_m=1, wgs_n=2, waves=2, stages=4, run=1, cluster_n=2, minor=0)
_SQUARE = GemmConfig(cluster_n=2, minor=0)


def grouped_config(m: int, n: int, k: int) -> GemmConfig:
    """For rows (M, K) in the contiguous layout and weights (E, N, K)."""
    del m, n, k
    return _LONG


def masked_config(m: int, groups: int, n: int, k: int) -> GemmConfig:
    """For M / groups rows a group: blocks of 64 or 128 of them, since no more are expected, so that weights are read once."""
    configs = _few_rows(m // groups, k)
    return min(configs, key=lambda config: dense.rounds(config, m, n) * config.columns / configs[config])


def _few_rows(rows_each: int, k: int) -> dict[GemmConfig, float]:
    """Blocks whose rows divide those that a group owns, and their rates."""
    return dense.few_rows(64 if rows_each % 128 else 128, k)


def wgrad_config(m: int, n: int) -> GemmConfig:
    """For gradients (E, M, N)."""
    del m, n
    return dense.WIDE


def candidates(operation: str, m: int, groups: int, n: int, k: int) -> list[GemmConfig]:
    """Configurations worth timing at a shape."""
    if operation == 'masked_gemm_fp8':
        return list(_few_rows(m // groups, k))
    replace = dataclasses.replace
    if operation == 'grouped_wgrad_fp8':
        wide = [
            {},
            {'stages': 3, 'out_buffers': 4},
            {'cluster_n': 2},
            {'cluster_m': 2},
            {'minor': 0},
            {'width': 4},
            {'width': 16},
        ]
        return [*(replace(dense.WIDE, **change) for change in wide), dense.LONG_SHARED]
    alone = replace(_LONG, cluster_n=1)
    bands = [replace(_LONG, width=width) for width in (4, 16)]
    return [
        _LONG,
        *bands,
        alone,
        replace(_LONG, minor=1),
        _SQUARE,
        replace(_SQUARE, run=2),
        replace(_SQUARE, cluster_n=1),
    ]
