"""Multi-head latent attention [2.1.1, eq. 1-11], in two forms over one latent.

Expanded: the latent is projected up to a key and a value per head, then attention as usual: training and prefill.
Absorbed: the up-projections are moved into the query and the output, and every head attends over the latent itself:
decode, where reading C + R values a token costs far less than H * (N + R + U). Both forms compute the same function.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import ops, rope
from deepseek_jax.cache import Cache
from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.norm import rms_norm
from deepseek_jax.sharding import ALONE, ContextParallel

Params = Mapping[str, Any]


class Attend(NamedTuple):
    """What every attention layer of one call shares.

    Attributes:
      positions_BT: position of each query token; also the cache slot it is written to, and the last one it looks at.
      rotation: cosines and sines of `positions_BT`.
      first_BT: position of the first token that each query looks at, without a cache: that of its document. None: 0.
    """

    positions_BT: Int[Array, 'B T']
    rotation: rope.Rotation
    first_BT: Int[Array, 'B T'] | None = None


def parameter_names(config: MLAConfig) -> tuple[str, ...]:
    """Names of the layer's parameters; they bear the paper's symbols."""
    if config.query_rank is None:
        queries = ('w_q_DHN', 'w_qr_DHR')
    else:
        queries = ('w_dq_DQ', 'query_norm_Q', 'w_uq_QHN', 'w_qr_QHR')
    return (*queries, 'w_dkv_DC', 'w_kr_DR', 'latent_norm_C', 'w_uk_CHN', 'w_uv_CHU', 'w_o_HUD')


def attention(
    params: Params,
    x_BTD: Float[Array, 'B T D'],
    attend: Attend,
    cache: Cache | None,
    config: ModelConfig,
    absorbed: bool,
    context: ContextParallel = ALONE.context,
) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """The attention layer's output and the cache with these tokens added (None without a cache).

    Without a cache the keys are the tokens of `x_BTD`; where sequences are cut over devices, those of the other devices too,
    whose latents and rotated keys come from there. With one, they are its slots, these tokens included.
    """
    q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR = project(params, x_BTD, attend.rotation, config)
    if cache is not None:
        cache = cache.write(latent_BSC, k_rope_BSR, attend.positions_BT)
        latent_BSC, k_rope_BSR = cache
    elif context.devices > 1:
        keys_BSc = context.whole(jnp.concatenate([latent_BSC, k_rope_BSR], axis=-1))
        latent_BSC, k_rope_BSR = jnp.split(keys_BSc, [config.mla.kv_rank], axis=-1)
    inputs = params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend
    out_BTHU, kept = _absorbed(*inputs, config) if absorbed else _expanded(*inputs, cache is not None, config)
    return ops.linear('BTHU,HUD->BTD', out_BTHU, params['w_o_HUD'], config.precision, kept), cache


def project(
    params: Params, x_BTD: Float[Array, 'B T D'], rotation: rope.Rotation, config: ModelConfig
) -> tuple[Array, Array, Array, Array]:
    """What attention is made of [eq. 1, 3, 6-9].

    Queries `q^C` (B, T, H, N) and rotated `q^R` (B, T, H, R) of each head; what the cache keeps: the normalised latent
    `c^KV` (B, T, C) and the rotated shared key `k^R` (B, T, R).
    """
    return _up(params, ops.keep(_down(params, x_BTD, config)), rotation, config)


def _down(params: Params, x_BTD: Array, config: ModelConfig) -> tuple:
    """The products with the layer's input: the queries' latent (without one, the queries), `c^KV` and `k^R` as they come."""
    if config.mla.query_rank is None:
        weights = [params[name] for name in ('w_q_DHN', 'w_qr_DHR', 'w_dkv_DC', 'w_kr_DR')]
        return ops.linears('BTD,DHN,DHR,DC,DR->BTHN,BTHR,BTC,BTR', x_BTD, weights, config.precision)
    weights = [params[name] for name in ('w_dq_DQ', 'w_dkv_DC', 'w_kr_DR')]
    return ops.linears('BTD,DQ,DC,DR->BTQ,BTC,BTR', x_BTD, weights, config.precision)


def _up(params: Params, down: tuple, rotation: rope.Rotation, config: ModelConfig) -> tuple[Array, Array, Array, Array]:
    """`project` from what `_down` returned: norms, the queries' up-projections, rotation."""
    *queries, latent_BTC, k_rope_BTR = down
    if config.mla.query_rank is not None:
        c_BTQ = rms_norm(*queries, params['query_norm_Q'], config.mla.latent_norm_eps)
        weights = [params[name] for name in ('w_uq_QHN', 'w_qr_QHR')]
        queries = ops.linears('BTQ,QHN,QHR->BTHN,BTHR', c_BTQ, weights, config.precision)
    q_BTHN, q_rope_BTHR = queries
    q_rope_BTHR = rope.rotate(q_rope_BTHR, rotation.cos[:, :, None], rotation.sin[:, :, None])
    latent_BTC = rms_norm(latent_BTC, params['latent_norm_C'], config.mla.latent_norm_eps)
    return q_BTHN, q_rope_BTHR, latent_BTC, rope.rotate(k_rope_BTR, rotation.cos, rotation.sin)


def _expanded(
    params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend: Attend, cached: bool, config: ModelConfig
):
    """Keys and values per head from the latent [eq. 2, 5], then `softmax(q k / sqrt(N + R)) v` [eq. 10]; what is kept of it."""
    weights = [params[name] for name in ('w_uk_CHN', 'w_uv_CHU')]
    k_BSHN, v_BSHU = ops.linears('BSC,CHN,CHU->BSHN,BSHU', latent_BSC, weights, config.precision)
    inputs = q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU
    # Query t of as many queries as keys sees keys up to t: kernels know that without being told.
    aligned = not cached and q_BTHN.shape[1] == latent_BSC.shape[1]
    sight = attend.first_BT, None if aligned else attend.positions_BT
    return ops.attention(*inputs, config.softmax_scale, *sight, config.precision, keep_output=not cached)


def _absorbed(params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend: Attend, config: ModelConfig):
    """`q . (W_uk c) = (W_uk^T q) . c` and `sum_s p_s (W_uv c_s) = W_uv (sum_s p_s c_s)`. Nothing is kept."""
    q_BTHC = ops.einsum('BTHN,CHN->BTHC', q_BTHN, params['w_uk_CHN'])
    inputs = q_BTHC, q_rope_BTHR, latent_BSC, k_rope_BSR
    out_BTHC = ops.latent_attention(*inputs, config.softmax_scale, attend.positions_BT)
    return ops.einsum('BTHC,CHU->BTHU', out_BTHC, params['w_uv_CHU']), None
