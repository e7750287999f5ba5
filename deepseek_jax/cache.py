"""The latent cache: what MLA keeps of the past, C + R values a token a layer."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.config import ModelConfig
from deepseek_jax.precision import compute_dtype


class Cache(NamedTuple):
    """Normalised key/value latents and rotated rotary keys of every layer; slot `s` holds position `s`."""

    latent_LBSC: Float[Array, '*L B S C']
    rope_LBSR: Float[Array, '*L B S R']

    @property
    def max_length(self) -> int:
        return self.latent_LBSC.shape[-2]

    def write(
        self, latent_BTC: Float[Array, 'B T C'], rope_BTR: Float[Array, 'B T R'], positions_BT: Int[Array, 'B T']
    ) -> 'Cache':
        """One layer's cache (no L axis) with the tokens put in the slots of their positions.

        Positions outside the cache are dropped.
        """
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        slots_BT = jnp.where(positions_BT < 0, self.max_length, positions_BT)
        return Cache(
            self.latent_LBSC.at[rows_B1, slots_BT].set(latent_BTC.astype(self.latent_LBSC.dtype), mode='drop'),
            self.rope_LBSR.at[rows_B1, slots_BT].set(rope_BTR.astype(self.rope_LBSR.dtype), mode='drop'),
        )


def init_cache(config: ModelConfig, batch_size: int, max_length: int) -> Cache:
    """An empty cache for `batch_size` sequences of up to `max_length` tokens, in the compute dtype."""
    if batch_size < 1 or max_length < 1:
        raise ValueError(f'init_cache: {batch_size=} and {max_length=} must be at least 1')
    dtype, shape = compute_dtype(config.precision), (config.num_layers, batch_size, max_length)
    return Cache(jnp.zeros((*shape, config.mla.kv_rank), dtype), jnp.zeros((*shape, config.mla.rope_head_dim), dtype))
