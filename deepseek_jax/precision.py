"""Which number format computes what: master weights are float32, the recipe says what linear layers compute in."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from deepseek_jax import router
from deepseek_jax.config import ModelConfig, PrecisionConfig
from deepseek_jax.names import map_with_names

_COMPUTE_DTYPES = {'fp32': jnp.float32, 'bf16': jnp.bfloat16}


def compute_dtype(config: PrecisionConfig) -> jnp.dtype:
    """The dtype of activations, linear layers and the latent cache."""
    return jnp.dtype(_COMPUTE_DTYPES[config.recipe])


def compute_params(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The parameters with those that are rounded to the compute dtype at every use rounded once and for all.

    Results stay the same to the bit; a bf16 model takes half the memory. Norms and router stay as they are.
    """
    dtype = compute_dtype(config.precision)

    def round_once(path: tuple[str, ...], leaf: Any) -> Any:
        name = path[-1]
        rounded = name in ('embedding_VD', 'head_DV') or (name.startswith('w_') and name not in router.PARAMETER_NAMES)
        return leaf.astype(dtype) if rounded else leaf

    return map_with_names(round_once, params)
