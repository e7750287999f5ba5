"""How the second kernel of decoding cuts its work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Of the kernel that adds partial results.

    Attributes:
      rows, columns: of a block, all of one sequence.
      ahead: parts that are read at a time.
    """

    rows: int
    columns: int
    ahead: int


# A sequence in few parts is one of many; one of few may be in as many parts as the GPU has multiprocessors.
MANY, FEW = CombineConfig(4, 512, 2), CombineConfig(1, 256, 32)
