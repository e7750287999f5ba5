"""Multi-head latent attention [2.1.1, eq. 1-11], in two forms over one latent.

Expanded: the latent is projected up to a key and a value per head, then attention as usual: training and prefill.
Absorbed: the up-projections are moved into the query and the output, and every head attends over the latent itself:
decode, where reading C + R values a token costs far less than H * (N + R + U). Both forms compute the same function.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax import ops, rope
from deepseek_jax.cache import Cache
from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.norm import rms_norm

Params = Mapping[str, Array]


class Attend(NamedTuple):
    """What every attention layer of one call shares.

    Attributes:
      positions_BT: position of each query token; also the cache slot it is written to.
      mask_BTS: True where a query may look at a key.
      rotation: cosines and sines of `positions_BT`.
    """

    positions_BT: Int[Array, 'B T']
    mask_BTS: Bool[Array, '#B T S']
    rotation: rope.Rotation


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
) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """The attention layer's output and the cache with these tokens added (None without a cache).

    Without a cache the keys are the tokens of `x_BTD`; with one, they are its slots, these tokens included.
    """
    q_BTHN, q_rope_BTHR = project_queries(params, x_BTD, attend.rotation, config)
    latent_BSC, k_rope_BSR = project_latent(params, x_BTD, attend.rotation, config)
    if cache is not None:
        cache = cache.write(latent_BSC, k_rope_BSR, attend.positions_BT)
        latent_BSC, k_rope_BSR = cache
    form = _absorbed if absorbed else _expanded
    out_BTHU = form(params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend.mask_BTS, config.softmax_scale)
    return ops.einsum('BTHU,HUD->BTD', out_BTHU, params['w_o_HUD']), cache


def project_queries(params: Params, x_BTD: Array, rotation: rope.Rotation, config: ModelConfig) -> tuple[Array, Array]:
    """Queries `q^C` (B, T, H, N) and rotated `q^R` (B, T, H, R) of each head [eq. 6-9]."""
    if config.mla.query_rank is None:
        q_BTHN = ops.einsum('BTD,DHN->BTHN', x_BTD, params['w_q_DHN'])
        q_rope_BTHR = ops.einsum('BTD,DHR->BTHR', x_BTD, params['w_qr_DHR'])
    else:
        c_BTQ = ops.einsum('BTD,DQ->BTQ', x_BTD, params['w_dq_DQ'])
        c_BTQ = rms_norm(c_BTQ, params['query_norm_Q'], config.mla.latent_norm_eps)
        q_BTHN = ops.einsum('BTQ,QHN->BTHN', c_BTQ, params['w_uq_QHN'])
        q_rope_BTHR = ops.einsum('BTQ,QHR->BTHR', c_BTQ, params['w_qr_QHR'])
    return q_BTHN, rope.rotate(q_rope_BTHR, rotation.cos[:, :, None], rotation.sin[:, :, None])


def project_latent(params: Params, x_BTD: Array, rotation: rope.Rotation, config: ModelConfig) -> tuple[Array, Array]:
    """What the cache keeps: normalised latent `c^KV` (B, T, C) and rotated shared key `k^R` (B, T, R) [eq. 1, 3]."""
    latent_BTC = ops.einsum('BTD,DC->BTC', x_BTD, params['w_dkv_DC'])
    latent_BTC = rms_norm(latent_BTC, params['latent_norm_C'], config.mla.latent_norm_eps)
    k_rope_BTR = ops.einsum('BTD,DR->BTR', x_BTD, params['w_kr_DR'])
    return latent_BTC, rope.rotate(k_rope_BTR, rotation.cos, rotation.sin)


def attention_probabilities(
    scores_BHTS: Float[Array, 'B H T S'], mask_BTS: Bool[Array, '#B T S']
) -> Float[Array, 'B H T S']:
    """Softmax over the allowed keys, in float32. Every query must have at least one."""
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min), axis=-1)


def _expanded(params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, mask_BTS, scale: float):
    """Keys and values per head from the latent [eq. 2, 5], then `softmax(q k / sqrt(N + R)) v` [eq. 10]."""
    k_BSHN = ops.einsum('BSC,CHN->BSHN', latent_BSC, params['w_uk_CHN'])
    v_BSHU = ops.einsum('BSC,CHU->BSHU', latent_BSC, params['w_uv_CHU'])
    scores_BHTS = ops.einsum_fp32('BTHN,BSHN->BHTS', q_BTHN, k_BSHN)
    scores_BHTS += ops.einsum_fp32('BTHR,BSR->BHTS', q_rope_BTHR, k_rope_BSR)
    probabilities_BHTS = attention_probabilities(scores_BHTS * scale, mask_BTS).astype(v_BSHU.dtype)
    return ops.einsum('BHTS,BSHU->BTHU', probabilities_BHTS, v_BSHU)


def _absorbed(params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, mask_BTS, scale: float):
    """`q . (W_uk c) = (W_uk^T q) . c` and `sum_s p_s (W_uv c_s) = W_uv (sum_s p_s c_s)`."""
    q_BTHC = ops.einsum('BTHN,CHN->BTHC', q_BTHN, params['w_uk_CHN'])
    scores_BHTS = ops.einsum_fp32('BTHC,BSC->BHTS', q_BTHC, latent_BSC)
    scores_BHTS += ops.einsum_fp32('BTHR,BSR->BHTS', q_rope_BTHR, k_rope_BSR)
    probabilities_BHTS = attention_probabilities(scores_BHTS * scale, mask_BTS).astype(latent_BSC.dtype)
    out_BTHC = ops.einsum('BHTS,BSC->BTHC', probabilities_BHTS, latent_BSC)
    return ops.einsum('BTHC,CHU->BTHU', out_BTHC, params['w_uv_CHU'])
