"""Tile sizes of the grouped bfloat16 kernels on Hopper."""

import dataclasses

from pallas_kernels.tiles import TileConfig

SHARED_BYTES = 232_448
RESERVED_BYTES = 2048  # for barriers and alignment
STEP = 64  # contracted values of one slot: 128 bytes


@dataclasses.dataclass(frozen=True)
class GroupedConfig(TileConfig):
    """How one kernel cuts its work: `TileConfig`, with two math warpgroups and 256 columns of each at most.

    Clusters along rows share the right operand, which only weight gradients can: other row tiles may belong to another
    expert.
    """

    wg_columns: int = 256
    out_buffers: int = 2

    @property
    def shared_bytes(self) -> int:
        """Of the operand ring and the output chunks."""
        return self.stages * (self.rows + self.columns) * STEP * 2 + self.warpgroups * self.out_buffers * 64 * 128


_CONTIGUOUS = GroupedConfig(cluster_n=2)
# The grid of tiles is square in bytes; neighbours along rows share the wider operand.
_WGRAD = GroupedConfig(cluster_m=2)
# Few rows: the time is that of reading weights. Tiles of one expert's rows are neighbours in time and share them in L2.
_FEW_ROWS = GroupedConfig(wgs_m=1, wg_columns=128, stages=8, minor=0)
# Tiles of 64 rows: less is computed in vain where groups are small.
_SIDE_BY_SIDE = GroupedConfig(wgs_m=1, wgs_n=2, wg_columns=128, stages=5, out_buffers=1)
_MANY_ROWS = GroupedConfig(minor=0)


def contiguous_config() -> GroupedConfig:
    """The configuration of the contiguous layout."""
    return _CONTIGUOUS


def masked_config(rows_each: int) -> GroupedConfig:
    """The configuration for experts that own this many rows each, a multiple of 64."""
    return _FEW_ROWS if rows_each <= 128 or rows_each % _MANY_ROWS.rows else _MANY_ROWS


def wgrad_config() -> GroupedConfig:
    """The configuration of weight gradients."""
    return _WGRAD


def candidates(operation: str) -> list[GroupedConfig]:
    """Configurations worth timing."""
    if operation == 'masked_gemm_bf16':
        few = [
            _FEW_ROWS,
            dataclasses.replace(_FEW_ROWS, wgs_n=2, stages=5, out_buffers=1),
            dataclasses.replace(_FEW_ROWS, minor=1),
        ]
        return [*few, _MANY_ROWS]
    wide = [GroupedConfig(), GroupedConfig(cluster_n=2), _SIDE_BY_SIDE]
    if operation == 'grouped_wgrad_bf16':
        return [*wide, GroupedConfig(cluster_m=2)]
    return [*wide, GroupedConfig(cluster_n=2, width=16), GroupedConfig(cluster_n=2, minor=0)]
