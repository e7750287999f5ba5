"""Parameter names carry their dimensions: shape, initial value, sharding and weight decay are read off them.

`w_up_EDF` is a weight of shape (E, D, F). The letters are listed in the package's docstring. Parameters of stacked
blocks (`STACKED` scopes) have one leading L axis more than their letters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.config import ModelConfig

LETTERS = 'BTSDHNRUQCFEeKGJVLPM'
STACKED = ('dense_layers', 'moe_layers', 'mtp')
"""Top-level scopes whose parameters are stacked along a leading L axis."""
PIPELINED = 'moe_layers'
"""The one of them whose layers may lie on many devices."""


def letters(name: str) -> str:
    """The dimension letters of a name: `'w_up_EDF'` gives `'EDF'`. Raises `ValueError` if it carries none."""
    suffix = name.rpartition('_')[2]
    if not suffix or any(letter not in LETTERS for letter in suffix) or '_' not in name:
        raise ValueError(f'parameter name {name!r} must end in _ and dimension letters out of {LETTERS}')
    return suffix


def dims(config: ModelConfig) -> dict[str, int]:
    """The size of each dimension letter that names a parameter; F is the dense FFN's."""
    sizes = {
        'V': config.vocab_size,
        'D': config.model_dim,
        'H': config.mla.num_heads,
        'N': config.mla.nope_head_dim,
        'R': config.mla.rope_head_dim,
        'U': config.mla.value_head_dim,
        'C': config.mla.kv_rank,
        'F': config.dense_ffn_dim,
    }
    if config.mla.query_rank is not None:
        sizes['Q'] = config.mla.query_rank
    if config.moe is not None:
        sizes['E'] = config.moe.num_experts
    return sizes


def shape(name: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one (unstacked) parameter, given the size of each letter."""
    return tuple(dims[letter] for letter in letters(name))


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
    """The keys of a `jax.tree_util` path as plain strings."""
    return tuple(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)


def is_stacked(path: Sequence[str]) -> bool:
    """Whether the parameter at this path has a leading L axis."""
    return path[0] in STACKED


def is_router_bias(path: Sequence[str]) -> bool:
    """Whether the leaf is the routers' selection bias: state kept by the load rule, not by the optimizer."""
    return path[-1] == 'router_bias_E'


def map_with_names(function, tree, *rest):
    """`jax.tree.map` whose function also gets the path of the leaf as a tuple of strings, first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_names(path), *leaves), tree, *rest)
