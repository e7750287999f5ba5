"""Root mean square normalisation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def rms_norm(x: Float[Array, '*rows D'], scale_D: Float[Array, ' D'], epsilon: float) -> Float[Array, '*rows D']:
    """`x / sqrt(mean(x^2) + epsilon) * scale`, computed in float32 and returned in the dtype of `x`.

    The backward pass computes it again from `x`, of which it keeps nothing else [3.2.3].
    """
    x_fp32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_fp32), axis=-1, keepdims=True) + epsilon)
    return (x_fp32 * inverse * scale_D).astype(x.dtype)
