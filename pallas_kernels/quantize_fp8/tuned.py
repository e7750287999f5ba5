"""How the kernels of this folder cut their work, for each operation.

They wait for memory and nothing else: what counts is how many bytes a multiprocessor has under way. Bytes of a thread
block in shared memory, a tile being `rows` x 128: input tile x stages + result tiles x outputs; `blocks` of them share
228 KiB and 65,536 registers.
"""

from dataclasses import dataclass
from typing import Literal

Operation = Literal['rows', 'columns', 'rows_and_columns', 'requantize', 'blocks', 'e5m6']


@dataclass(frozen=True)
class QuantizeConfig:
    """Attributes:
    rows: of an input tile, a multiple of 64; 128 where tiles run along rows too.
    warpgroups: of a thread block; they share the tile's rows, 64 at a time.
    stages: input tiles under way in a thread block.
    outputs: result tiles a thread block has room for, all but one being stored.
    blocks: thread blocks a multiprocessor holds.
    """

    rows: int
    warpgroups: int
    stages: int
    outputs: int
    blocks: int


# The first one of each list is in use.
_CANDIDATES: dict[Operation, list[QuantizeConfig]] = {
    'rows': [
        QuantizeConfig(rows=64, warpgroups=1, stages=2, outputs=2, blocks=4),
        QuantizeConfig(rows=64, warpgroups=1, stages=2, outputs=1, blocks=5),
        QuantizeConfig(rows=64, warpgroups=1, stages=4, outputs=1, blocks=3),
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=2),
    ],
    'columns': [
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=1, stages=1, outputs=1, blocks=4),
        QuantizeConfig(rows=128, warpgroups=1, stages=2, outputs=1, blocks=2),
    ],
    'rows_and_columns': [
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=1, stages=1, outputs=1, blocks=3),
        QuantizeConfig(rows=128, warpgroups=2, stages=1, outputs=1, blocks=2),
    ],
    'requantize': [
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=2, stages=3, outputs=1, blocks=2),
    ],
    'blocks': [
        QuantizeConfig(rows=128, warpgroups=2, stages=1, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=2, blocks=1),
        QuantizeConfig(rows=128, warpgroups=1, stages=1, outputs=1, blocks=2),
    ],
    'e5m6': [
        QuantizeConfig(rows=64, warpgroups=1, stages=2, outputs=1, blocks=4),
        QuantizeConfig(rows=64, warpgroups=1, stages=4, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=2),
    ],
}


def candidates(operation: Operation) -> list[QuantizeConfig]:
    """The configurations worth measuring, the one in use first."""
    return list(_CANDIDATES[operation])


def config(operation: Operation) -> QuantizeConfig:
    """The configuration in use."""
    return _CANDIDATES[operation][0]
