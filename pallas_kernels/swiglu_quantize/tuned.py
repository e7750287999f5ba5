"""How the kernels of this folder cut their work, for each operation; `quantize_fp8/tuned.py` tells what the attributes mean.

Bytes of a thread block in shared memory, a tile being `rows` x 128: inputs x stages, the transposed float8 values and, where
those do not take the place of float8 inputs, the values of the rows. Registers allow the backward pass 8 warps a
multiprocessor.
"""

from typing import Literal

from pallas_kernels.quantize_fp8.tuned import QuantizeConfig

Operation = Literal['forward', 'forward_rows', 'backward', 'backward_rows', 'backward_bf16', 'backward_bf16_rows']

# The first one of each list is in use: those were timed on an H100.
_CANDIDATES: dict[Operation, list[QuantizeConfig]] = {
    'forward': [
        QuantizeConfig(rows=128, warpgroups=2, stages=1, outputs=1, blocks=2),
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=1),
    ],
    'forward_rows': [
        QuantizeConfig(rows=64, warpgroups=1, stages=2, outputs=1, blocks=3),
        QuantizeConfig(rows=64, warpgroups=1, stages=1, outputs=1, blocks=3),
    ],
    'backward': [
        QuantizeConfig(rows=128, warpgroups=2, stages=2, outputs=1, blocks=1),
        QuantizeConfig(rows=128, warpgroups=2, stages=1, outputs=1, blocks=1),
    ],
    'backward_rows': [
        QuantizeConfig(rows=64, warpgroups=1, stages=2, outputs=1, blocks=2),
        QuantizeConfig(rows=64, warpgroups=1, stages=1, outputs=1, blocks=2),
    ],
    'backward_bf16': [
        QuantizeConfig(rows=128, warpgroups=2, stages=1, outputs=1, blocks=1),
    ],
    'backward_bf16_rows': [
        QuantizeConfig(rows=64, warpgroups=1, stages=1, outputs=1, blocks=2),
    ],
}


def candidates(operation: Operation) -> list[QuantizeConfig]:
    """The configurations worth measuring, the one in use first."""
    return list(_CANDIDATES[operation])


def config(operation: Operation) -> QuantizeConfig:
    """The configuration in use."""
    return _CANDIDATES[operation][0]
