"""The operations that kernels serve: the model's only door to `pallas_kernels`.

Weights are float32 masters; every operation casts them to the dtype of its activations. Products accumulate in
float32. Float32 activations are multiplied in full precision (no TF32).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels


def einsum(equation: str, x: Array, w: Array) -> Array:
    """A linear layer: the product of activations and a weight, rounded once to the activations' dtype."""
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=_precision(x.dtype))


def einsum_fp32(equation: str, x: Array, y: Array) -> Array:
    """A product whose result stays float32: attention scores, router affinities, logits."""
    return jnp.einsum(equation, x, y.astype(x.dtype), precision=_precision(x.dtype), preferred_element_type=jnp.float32)


def grouped_matmul(
    x_JK: Float[Array, 'J K'], w_EKN: Float[Array, 'E K N'], group_sizes_E: Int[Array, ' E']
) -> Float[Array, 'J N']:
    """The expert linear layer: row `j`, sorted by expert, times its expert's matrix."""
    return pallas_kernels.grouped_gemm(x_JK, w_EKN.astype(x_JK.dtype), group_sizes_E)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
