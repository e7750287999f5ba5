"""How the attention kernels cut their work.

Every kernel has two math warpgroups of 64 rows and one warpgroup that copies. Bytes of shared memory of the forward kernel:
its queries (2, 64, 192), and for each slot of the ring the keys and values of a block, all bfloat16.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Of the forward kernel.

    Attributes:
      keys: of one step.
      stages: slots of the ring of keys and values.
      take_turns: one warpgroup multiplies while the other computes exponentials.
    """

    keys: int = 128
    stages: int = 2
    take_turns: bool = True


@dataclasses.dataclass(frozen=True)
class QueryConfig:
    """Of the gradients of queries.

    Attributes:
      keys: of one step.
      stages: slots of the ring of keys and values.
    """

    keys: int = 64
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class KeyConfig:
    """Of the gradients of keys and values.

    Attributes:
      queries: of one step.
      stages: slots of the ring of queries.
    """

    queries: int = 128
    stages: int = 2


FORWARD = ForwardConfig()
QUERY = QueryConfig()
KEY = KeyConfig()
