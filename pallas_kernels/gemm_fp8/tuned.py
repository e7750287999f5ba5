"""Tile sizes of the Hopper kernels: reviewed data, found by `python -m pallas_kernels.bench search` on an H100."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How one kernel cuts its work.

    Attributes:
      wgs_m, wgs_n: math warpgroups of a block along rows and along columns; three in all at most.
      wg_columns: columns a warpgroup owns.
      waves: times 64 rows that a warpgroup owns; it multiplies them one after the other.
      stages: slots of the operand ring.
      run: products that follow each other without a pause: above 1 two of them are in flight, which takes registers
        for two partial sums. Two math warpgroups of one wave have them.
      tile_scales: scales of a tile come in one copy before its first block of K and not with each block. For few rows:
        a block then takes less time than the fence between reads of its scales and the next copy to their place.
      cluster_m, cluster_n: blocks of a cluster along rows (they share the right operand) or along columns.
      minor, width: order of the tiles: the dimension that moves fastest (0 rows, 1 columns) within a band this wide.
      out_buffers: output chunks a warpgroup may have in flight.
    """

    wgs_m: int = 2
    wgs_n: int = 1
    wg_columns: int = 128
    waves: int = 1
    stages: int = 6
    run: int = 4
    tile_scales: bool = False
    cluster_m: int = 1
    cluster_n: int = 1
    minor: int = 1
    width: int = 8
    out_buffers: int = 1

    @property
    def warpgroups(self) -> int:
        return self.wgs_m * self.wgs_n

    @property
    def rows(self) -> int:
        return self.wgs_m * self.waves * 64

    @property
    def columns(self) -> int:
        return self.wgs_n * self.wg_columns


_WIDE = GemmConfig(wgs_m=3, stages=4, run=1, out_buffers=2)
_WIDE_SHARED = dataclasses.replace(_WIDE, cluster_n=2)
_TALL = GemmConfig(wgs_m=2, waves=2, stages=4, run=1)
_TALL_SHARED = dataclasses.replace(_TALL, cluster_n=2)
_SQUARE = GemmConfig(run=1)
_SQUARE_SHARED = GemmConfig(cluster_n=2)
_NARROW = GemmConfig(wg_columns=32, stages=8, out_buffers=2)
_MIDDLE = GemmConfig(wg_columns=64, stages=7, run=1, out_buffers=2)
_SHORT = GemmConfig(stages=5, out_buffers=2)

_ANY = 1 << 31

# (N, K) -> configurations for up to so many rows; what is not listed takes the default.
_GEMM: dict[tuple[int, int], dict[int, GemmConfig]] = {
    (2112, 7168): {_ANY: _WIDE_SHARED},
    (24576, 1536): {128: _MIDDLE, _ANY: _WIDE_SHARED},
    (32768, 512): {128: _SHORT},
    (7168, 16384): {128: _MIDDLE, _ANY: _WIDE_SHARED},
    # 22 x 32 wide tiles are 5.3 rounds of 132 multiprocessors, 32 x 32 square ones 7.8.
    (4096, 7168): {4096: _SQUARE_SHARED, _ANY: _WIDE_SHARED},
    (7168, 2048): {128: _MIDDLE, _ANY: _WIDE_SHARED},
    # Gradients of inputs. 88 wide tiles would leave a third of the multiprocessors idle.
    (512, 32768): {4096: _SQUARE},
}
_DEFAULT = {128: _NARROW, _ANY: _WIDE}


def gemm_config(m: int, n: int, k: int) -> GemmConfig:
    """The configuration for activations (M, K) by a weight (N, K)."""
    table = _DEFAULT | _GEMM.get((n, k), {})
    config = table[min(rows for rows in table if m <= rows)]
    # One wave of 64 rows needs one warpgroup.
    return dataclasses.replace(config, wgs_m=1) if m <= 64 else config


def wgrad_config(m: int, n: int, k: int) -> GemmConfig:
    """The configuration for a weight's gradient (M, N) over K tokens."""
    del m, n, k
    return _WIDE


def candidates(operation: str, m: int, n: int, k: int) -> list[GemmConfig]:
    """Configurations worth timing at a shape."""
    del n, k
    if operation == 'gemm_fp8' and m <= 128:
        wgs_m = 1 if m <= 64 else 2
        return [
            GemmConfig(wgs_m=wgs_m, wgs_n=wgs_n, wg_columns=columns, stages=stages, run=run, out_buffers=2)
            for wgs_n, columns, stages in ((1, 32, 8), (1, 64, 7), (1, 128, 5), (2 if wgs_m == 1 else 1, 32, 6))
            for run in (1, 4)
        ]
    wide = [_WIDE, _WIDE_SHARED, dataclasses.replace(_WIDE, cluster_m=2)]
    if operation == 'wgrad_fp8':
        return [*wide, GemmConfig(run=2, cluster_n=2), GemmConfig(run=1, cluster_n=2)]
    pairs = [GemmConfig(run=run, cluster_n=2) for run in (2, 4, 8)]
    return [*wide, *pairs, GemmConfig(cluster_m=2), GemmConfig(run=2), GemmConfig(stages=5, out_buffers=2)]
