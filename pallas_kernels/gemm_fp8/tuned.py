"""Tile sizes of the Hopper kernels: reviewed data, found by `python -m pallas_kernels.bench search` on an H100."""

import dataclasses

from pallas_kernels.fp8 import BLOCK, blocks, round_up
from pallas_kernels.tiles import TileConfig

CORES = 132
SHARED_BYTES = 232_448
RESERVED_BYTES = 2048  # for barriers and alignment
ROWS_IN_FLIGHT = 1024  # of the left operand; more were slower


@dataclasses.dataclass(frozen=True)
class GemmConfig(TileConfig):
    """How one kernel cuts its work: `TileConfig`, with three math warpgroups at most and columns that divide 128.

    Attributes:
      waves: times 64 rows that a warpgroup owns; it multiplies them one after the other.
      run: products that follow each other without a pause: above 1 two of them are in flight, which takes registers
        for two partial sums. One or two math warpgroups of one wave have them.
      tile_scales: scales of a tile come in one copy before its first block of K and not with each block. For few rows:
        a block then takes less time than the fence between reads of its scales and the next copy to their place.
        One block of 128 columns a tile, no cluster, `gemm_fp8` only.
    """

    stages: int = 6
    waves: int = 1
    run: int = 4
    tile_scales: bool = False

    @property
    def rows(self) -> int:
        return self.wgs_m * self.waves * 64

    def scale_slots(self, k: int) -> int:
        """Slots for the scales of a whole tile: two, unless they are large."""
        return 2 if blocks(k) * self.rows * 8 <= 64 * 1024 else 1

    def with_stages(self, k: int) -> 'GemmConfig':
        """As many slots as serve and as shared memory has room for beside the scales of a tile and the results."""
        scales = self.scale_slots(k) * 4 * (blocks(k) * self.rows + round_up(blocks(k), 32))
        results = self.warpgroups * self.out_buffers * 64 * min(self.wg_columns * 4, 128)
        room = SHARED_BYTES - RESERVED_BYTES - results - (scales if self.tile_scales else 0)
        slot = (self.rows + self.columns) * (BLOCK if self.tile_scales else BLOCK + 4)
        return dataclasses.replace(self, stages=min(ROWS_IN_FLIGHT // self.rows, room // slot))


# Many rows: blocks of 192x128 and 128x256, the latter of two waves, and squares.
WIDE = GemmConfig(wgs_m=3, stages=4, run=1, out_buffers=2)
_WIDE_SHARED = dataclasses.replace(WIDE, cluster_n=2)
LONG_SHARED = GemmConfig(wgs_m=1, wgs_n=2, waves=2, stages=4, run=1, cluster_m=2)
_SQUARE_SHARED = GemmConfig(cluster_n=2)

# How fast a block computes, relative to the first: the tiles of a product divided among the multiprocessors take whole
# rounds, and the time of a round is the size of a tile over this rate.
_MANY_ROWS = {_WIDE_SHARED: 1.0, LONG_SHARED: 0.93, _SQUARE_SHARED: 0.9}
_FEW_ROWS_RATES = {16: 0.25, 32: 0.4, 64: 0.7, 128: 0.9}


def few_rows(m: int, k: int) -> dict[GemmConfig, float]:
    """Blocks of 64 or 128 rows, which is all of them up to 128: weights are then read once."""
    wgs_m = 1 if m <= 64 else 2
    configs = {}
    for columns, rate in _FEW_ROWS_RATES.items():
        config = GemmConfig(
            wgs_m=wgs_m,
            wg_columns=columns,
            run=1 if wgs_m == 2 and columns >= 64 else 4,
            # There the scales of a tile leave too little room for operands.
            tile_scales=not (wgs_m == 2 and columns == 32),
        )
        configs[config.with_stages(k)] = rate
    return configs


def gemm_config(m: int, n: int, k: int) -> GemmConfig:
    """The configuration for activations (M, K) by a weight (N, K): that of the least estimated time."""
    configs = (few_rows(m, k) if m <= 512 else {}) | (_MANY_ROWS if m > 128 else {})
    return min(configs, key=lambda config: rounds(config, m, n) * config.rows * config.columns / configs[config])


def rounds(config: GemmConfig, m: int, n: int) -> int:
    """How many tiles the busiest multiprocessor computes."""
    clusters = -(-m // (config.rows * config.cluster_m)) * -(-n // (config.columns * config.cluster_n))
    return -(-clusters // (CORES // config.cluster))


def wgrad_config(m: int, n: int, k: int) -> GemmConfig:
    """The configuration for a weight's gradient (M, N) over K tokens."""
    del m, n, k
    return WIDE


def candidates(operation: str, m: int, n: int, k: int) -> list[GemmConfig]:
    """Configurations worth timing at a shape."""
    del n
    if operation == 'gemm_fp8' and m <= 128:
        few = [dataclasses.replace(config, run=run) for config in few_rows(m, k) for run in (1, 4)]
        other = [dataclasses.replace(config, tile_scales=not config.tile_scales) for config in few]
        return few + [config.with_stages(k) for config in other]
    wide = [WIDE, _WIDE_SHARED, dataclasses.replace(WIDE, cluster_m=2), LONG_SHARED]
    wide.append(dataclasses.replace(LONG_SHARED, wgs_m=2, wgs_n=1, cluster_m=1, cluster_n=2))
    if operation == 'wgrad_fp8':
        return [*wide, GemmConfig(run=2, cluster_n=2), GemmConfig(run=1, cluster_n=2)]
    return [*wide, *(GemmConfig(run=run, cluster_n=2) for run in (2, 4)), GemmConfig(cluster_m=2), GemmConfig(run=2)]
