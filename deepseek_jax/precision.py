"""Which number format computes what [3.3]: master weights are float32, the recipe says what linear layers compute in.

                                           fp32      bf16      fp8
  linear layers: attention projections,    fp32      bf16      e4m3, all three products; sums, weight gradients fp32
    dense FFN, shared and routed experts
  projection into the MTP module           fp32      bf16      bf16
  attention core, activations, cache       fp32      bf16      bf16; the output is kept in 12 bits for the backward pass
  norms, softmax, router, logits           fp32      fp32      fp32

The projection into the MTP module is a linear layer, and the report does not except it; the published checkpoints hold
it in bf16, as they hold everything that float8 does not compute. Decoding moves `w_uk` and `w_uv` into queries and
outputs, which is part of the attention core: bf16.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from deepseek_jax import gather, names, ops, router
from deepseek_jax.config import ModelConfig, PrecisionConfig
from deepseek_jax.ops import QTensor
from deepseek_jax.sharding import ALONE, Cut, Parallel

__all__ = ['Float8Copies', 'QTensor', 'compute_dtype', 'compute_params', 'is_float8']

_COMPUTE_DTYPES = {'fp32': jnp.float32, 'bf16': jnp.bfloat16, 'fp8': jnp.bfloat16}
_ABSORBED = ('w_uk_CHN', 'w_uv_CHU')


def compute_dtype(config: PrecisionConfig) -> jnp.dtype:
    """The dtype of activations, of the latent cache, and of the linear layers that are not float8."""
    return jnp.dtype(_COMPUTE_DTYPES[config.recipe])


def is_float8(path: Sequence[str], config: PrecisionConfig) -> bool:
    """Whether the parameter at this path is the weight of a linear layer that computes in float8."""
    name = path[-1]
    return (
        config.recipe == 'fp8'
        and name.startswith('w_')
        and any(part in path for part in ('attention', 'ffn', 'shared', 'experts'))
    )


def compute_params(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The parameters as the model computes with them, rounded once and for all instead of at every use.

    Results stay the same to the bit, and a bf16 model takes half the memory. Norms and router stay as they are. Under
    'fp8', weights of float8 layers become a `QTensor`; that of `w_uk` and `w_uv` holds the bf16 weight beside, which
    decoding multiplies. The routed experts of a layer become one `ExpertWeights`.
    """
    dtype = compute_dtype(config.precision)

    def round_once(path: tuple[str, ...], leaf: Array) -> Array | QTensor:
        name = path[-1]
        if is_float8(path, config.precision):
            weight = _quantize(path, leaf, config)
            return weight._replace(rounded=leaf.astype(dtype)) if name in _ABSORBED else weight
        rounded = name in ('embedding_VD', 'head_DV') or (name.startswith('w_') and name not in router.PARAMETER_NAMES)
        return leaf.astype(dtype) if rounded else leaf

    if config.precision.recipe == 'fp8':
        params = _map_experts(lambda path, experts: _quantize_experts(path, experts, config), params)
    return names.map_with_names(round_once, params)


class Float8Copies(NamedTuple):
    """The weights that compute in float8, quantised. They go with their masters, which get the gradients.

    Attributes:
      tensors: a `QTensor` for each weight that is not a routed expert's, by its path.
      experts: an `ExpertWeights` for each scope of routed experts, by its path, under the name that it has there.
    """

    tensors: dict[tuple[str, ...], QTensor]
    experts: dict[tuple[str, ...], dict[str, Any]]

    @classmethod
    def of(cls, params: Mapping[str, Any], config: ModelConfig, parallel: Parallel = ALONE) -> 'Float8Copies':
        """Those of these masters: to be made once a step, whatever the number of microbatches. None under other recipes.

        Of masters that are made whole where they are used, what has the inner cut alone is quantised, if it is whole blocks of 128:
        they are what blocks of the whole would be.
        """
        copies = cls({}, {})
        if config.precision.recipe != 'fp8':
            return copies

        def cuts(path: tuple[str, ...]) -> tuple[Cut, ...]:
            return gather.cuts(path[-1], config) if parallel.gather else ()

        def whole_blocks(path: tuple[str, ...], leaf: Array) -> bool:
            if not (found := cuts(path)):
                return True
            (dimension, _), *outer = found
            size = leaf.shape[dimension + names.is_stacked(path)]
            size *= math.prod(jax.lax.axis_size(cut.axes) for cut in outer if cut.dimension == dimension)
            if names.letters(path[-1])[dimension] == 'H':
                # Heads are one side of a matrix together with their width. Products are of weights of several widths.
                size *= math.gcd(config.mla.nope_head_dim, config.mla.rope_head_dim, config.mla.value_head_dim)
            return size % ops.BLOCK == 0

        def add_experts(path: tuple[str, ...], experts: Any) -> dict[str, Any]:
            if whole_blocks((*path, 'w_up_EDF'), experts['w_up_EDF']):
                copies.experts[path] = _quantize_experts(path, experts, config)
            return {}

        def add(path: tuple[str, ...], leaf: Array) -> None:
            if is_float8(path, config.precision) and whole_blocks(path, leaf):
                copies.tensors[path] = _quantize(path, leaf, config, cuts(path)[1:])

        names.map_with_names(add, _map_experts(add_experts, params))
        return copies

    def beside(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that compute with these copies, and whose gradients are those of the masters `params`."""

        def with_copy(path: tuple[str, ...], leaf: Any) -> Any:
            return self.tensors[path]._replace(master=leaf) if path in self.tensors else leaf

        return _map_experts(
            lambda path, experts: {**experts, **self.experts.get(path, {})}, names.map_with_names(with_copy, params)
        )


@jax.named_scope('weights')
def _quantize(path: tuple[str, ...], leaf: Array, config: ModelConfig, outer: Sequence[Cut] = ()) -> QTensor:
    inputs = 2 if path[-1] == 'w_o_HUD' else 1
    quantize = lambda w: ops.quantize(gather.joined(w, outer), inputs, config.precision)  # noqa: E731
    return jax.lax.map(quantize, leaf) if names.is_stacked(path) else quantize(leaf)


@jax.named_scope('weights')
def _quantize_experts(path: tuple[str, ...], experts: Mapping[str, Array], config: ModelConfig) -> dict[str, Any]:
    quantize = lambda experts: ops.quantize_experts(experts, config.precision)  # noqa: E731
    return jax.lax.map(quantize, experts) if names.is_stacked(path) else quantize(experts)


def _map_experts(function: Callable[[tuple[str, ...], Any], Any], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """The tree with `function(path, experts)` in the place of every scope of routed experts."""
    if not isinstance(tree, Mapping):
        return tree
    if path[-1:] == ('experts',):
        return function(path, tree)
    return {key: _map_experts(function, child, (*path, key)) for key, child in tree.items()}
