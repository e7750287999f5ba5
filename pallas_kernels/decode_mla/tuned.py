"""How the decoding kernels cut their work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Of the kernel that reads the pages.

    Attributes:
      overhead: what a sequence costs whatever its length, in pages: queries are read and outputs written for each.
      min_share: pages of a block at least; a shorter share costs more in partial results than further blocks save.
      patience: by how many powers of two a score may exceed the maximum that exponentials refer to before the output is
        scaled to a new one; None does so with every page.
      vote: who finds out whether any maximum grew: the warpgroup that 'score's, or both as they 'read' the maxima.
      terms: bfloat16 numbers whose sum is a partial result, 1 or 2.
    """

    overhead: int = 2
    min_share: int = 2
    patience: float | None = 8.0
    vote: str = 'read'
    terms: int = 2


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


DECODE = DecodeConfig()
# A sequence in few parts is one of many; one of few may be in as many parts as the GPU has multiprocessors.
MANY, FEW = CombineConfig(4, 512, 2), CombineConfig(1, 256, 32)
