"""Which number format computes what: master weights are float32, the recipe says what linear layers compute in."""

import jax.numpy as jnp

from deepseek_jax.config import PrecisionConfig

_COMPUTE_DTYPES = {'fp32': jnp.float32, 'bf16': jnp.bfloat16}


def compute_dtype(config: PrecisionConfig) -> jnp.dtype:
    """The dtype of activations, linear layers and the latent cache."""
    return jnp.dtype(_COMPUTE_DTYPES[config.recipe])
