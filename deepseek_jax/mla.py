"""Multi-head latent attention [2.1.1, eq. 1-11], in two forms over one latent.

Expanded: the latent is projected up to a key and a value per head, then attention as usual: training and prefill.
Absorbed: the up-projections are moved into the query and the output, and every head attends over the latent itself:
decode, where reading C + R values a token costs far less than H * (N + R + U). Both forms compute the same function.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax import ops, rope
from deepseek_jax.cache import Cache
from deepseek_jax.config import MLAConfig, ModelConfig
from deepseek_jax.norm import rms_norm

Params = Mapping[str, Any]


class Attend(NamedTuple):
    """What every attention layer of one call shares.

    Attributes:
      positions_BT: position of each query token; also the cache slot it is written to, and the last one it looks at.
      rotation: cosines and sines of `positions_BT`.
      segments_BT: document of each token, without a cache; tokens look at those of their document. None: all are of one.
    """

    positions_BT: Int[Array, 'B T']
    rotation: rope.Rotation
    segments_BT: Int[Array, 'B T'] | None = None

    def mask(self, keys: int) -> Bool[Array, 'B T S']:
        """True where a query may look at one of so many keys."""
        mask_BTS = jnp.arange(keys) <= self.positions_BT[:, :, None]
        if self.segments_BT is not None:
            mask_BTS &= self.segments_BT[:, :, None] == self.segments_BT[:, None]
        return mask_BTS


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

    Without a cache the keys are the tokens of `x_BTD`; with one, they are its slots, these tokens included. With
    `remat='paper'` the backward pass keeps what the down-projections give and the output of attention, and computes all
    between them again [3.2.3].
    """

    def between(params: Params, queries: tuple, latent_BTC: Array, k_rope_BTR: Array, cache: Cache | None) -> tuple:
        q_BTHN, q_rope_BTHR = _queries(params, queries, attend.rotation, config)
        latent_BSC = rms_norm(latent_BTC, params['latent_norm_C'], config.mla.latent_norm_eps)
        k_rope_BSR = rope.rotate(k_rope_BTR, attend.rotation.cos, attend.rotation.sin)
        if cache is not None:
            cache = cache.write(latent_BSC, k_rope_BSR, attend.positions_BT)
            latent_BSC, k_rope_BSR = cache
        inputs = q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR
        if absorbed:
            return _absorbed(params, *inputs, attend, config), cache
        return _expanded(params, *inputs, attend, cache is not None, config), cache

    if config.remat == 'paper':
        between = jax.checkpoint(between, policy=ops.KEEP_ATTENTION, prevent_cse=False)
    out_BTHU, cache = between(params, *_down(params, x_BTD, config), cache)
    return ops.linear('BTHU,HUD->BTD', out_BTHU, params['w_o_HUD'], config.precision), cache


def _down(params: Params, x_BTD: Array, config: ModelConfig) -> tuple[tuple, Array, Array]:
    """What attention makes of its input: the queries' latent, or the queries; the latent `c^KV`; the rotary key."""
    if config.mla.query_rank is None:
        weights = [params[name] for name in ('w_q_DHN', 'w_qr_DHR', 'w_dkv_DC', 'w_kr_DR')]
        *queries, latent_BTC, k_rope_BTR = ops.linears(
            'BTD,DHN,DHR,DC,DR->BTHN,BTHR,BTC,BTR', x_BTD, weights, config.precision
        )
    else:
        weights = [params[name] for name in ('w_dq_DQ', 'w_dkv_DC', 'w_kr_DR')]
        *queries, latent_BTC, k_rope_BTR = ops.linears('BTD,DQ,DC,DR->BTQ,BTC,BTR', x_BTD, weights, config.precision)
    return tuple(queries), latent_BTC, k_rope_BTR


def _queries(params: Params, queries: tuple, rotation: rope.Rotation, config: ModelConfig) -> tuple[Array, Array]:
    """Queries `q^C` (B, T, H, N) and rotated `q^R` (B, T, H, R) of each head [eq. 6-9]."""
    if config.mla.query_rank is None:
        q_BTHN, q_rope_BTHR = queries
    else:
        c_BTQ = rms_norm(*queries, params['query_norm_Q'], config.mla.latent_norm_eps)
        weights = [params[name] for name in ('w_uq_QHN', 'w_qr_QHR')]
        q_BTHN, q_rope_BTHR = ops.linears('BTQ,QHN,QHR->BTHN,BTHR', c_BTQ, weights, config.precision)
    return q_BTHN, rope.rotate(q_rope_BTHR, rotation.cos[:, :, None], rotation.sin[:, :, None])


def attention_probabilities(
    scores_BHTS: Float[Array, 'B H T S'], mask_BTS: Bool[Array, 'B T S']
) -> Float[Array, 'B H T S']:
    """Softmax over the allowed keys, in float32. Every query must have at least one."""
    return jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min), axis=-1)


def _expanded(
    params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend: Attend, cached: bool, config: ModelConfig
):
    """Keys and values per head from the latent [eq. 2, 5], then `softmax(q k / sqrt(N + R)) v` [eq. 10]."""
    weights = [params[name] for name in ('w_uk_CHN', 'w_uv_CHU')]
    k_BSHN, v_BSHU = ops.linears('BSC,CHN,CHU->BSHN,BSHU', latent_BSC, weights, config.precision)
    inputs = q_BTHN, q_rope_BTHR, k_BSHN, k_rope_BSR, v_BSHU
    positions_BT = attend.positions_BT if cached else None
    return ops.attention(*inputs, config.softmax_scale, positions_BT, attend.segments_BT)


def _absorbed(params: Params, q_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, attend: Attend, config: ModelConfig):
    """`q . (W_uk c) = (W_uk^T q) . c` and `sum_s p_s (W_uv c_s) = W_uv (sum_s p_s c_s)`."""
    q_BTHC = ops.einsum('BTHN,CHN->BTHC', q_BTHN, params['w_uk_CHN'])
    scores_BHTS = ops.einsum_fp32('BTHC,BSC->BHTS', q_BTHC, latent_BSC)
    scores_BHTS += ops.einsum_fp32('BTHR,BSR->BHTS', q_rope_BTHR, k_rope_BSR)
    mask_BTS = attend.mask(latent_BSC.shape[1])
    probabilities_BHTS = attention_probabilities(scores_BHTS * config.softmax_scale, mask_BTS).astype(latent_BSC.dtype)
    out_BTHC = ops.einsum('BHTS,BSC->BTHC', probabilities_BHTS, latent_BSC)
    return ops.einsum('BTHC,CHU->BTHU', out_BTHC, params['w_uv_CHU'])
