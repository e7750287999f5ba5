"""The router: which experts a token goes to, with what weight, and what keeps the experts evenly loaded [2.1.2]."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import ops
from deepseek_jax.config import MoEConfig
from deepseek_jax.sharding import ALONE, ContextParallel

PARAMETER_NAMES = ('w_router_DE', 'router_bias_E')


class Routing(NamedTuple):
    """The router's decision for M tokens.

    Attributes:
      affinity_ME: `s = sigmoid(u . e)`, float32.
      experts_MK: chosen experts, int32.
      gates_MK: weight of each chosen expert, float32, normalised and scaled.
    """

    affinity_ME: Float[Array, 'M E']
    experts_MK: Int[Array, 'M K']
    gates_MK: Float[Array, 'M K']


@jax.named_scope('route')
def route(params: Mapping[str, Array], x_MD: Float[Array, 'M D'], config: MoEConfig) -> Routing:
    """Chooses `top_k` experts a token by `s + b`; gates use `s` alone [eq. 12-16]."""
    affinity_ME = jax.nn.sigmoid(ops.router_product(x_MD, params['w_router_DE']))
    bias_E = jax.lax.stop_gradient(params['router_bias_E'])
    experts_MK = select_experts(jax.lax.stop_gradient(affinity_ME) + bias_E, config)
    chosen_MK = jnp.take_along_axis(affinity_ME, experts_MK, axis=-1)
    gates_MK = chosen_MK / (chosen_MK.sum(axis=-1, keepdims=True) + 1e-20) * config.gate_scale
    return Routing(affinity_ME, experts_MK, gates_MK)


def select_experts(scores_ME: Float[Array, 'M E'], config: MoEConfig) -> Int[Array, 'M K']:
    """The `top_k` best experts inside the `top_groups` best groups.

    A group's score is the sum of its two best experts.
    """
    if config.top_groups < config.num_groups:
        scores_MGe = scores_ME.reshape(scores_ME.shape[0], config.num_groups, -1)
        best_MG2 = jax.lax.top_k(scores_MGe, min(2, scores_MGe.shape[-1]))[0]
        groups_MG = jax.lax.top_k(best_MG2.sum(axis=-1), config.top_groups)[1]
        allowed_MG = jnp.any(groups_MG[:, :, None] == jnp.arange(config.num_groups), axis=1)
        scores_ME = jnp.where(allowed_MG[:, :, None], scores_MGe, -jnp.inf).reshape(scores_ME.shape)
    return jax.lax.top_k(scores_ME, config.top_k)[1]


@jax.named_scope('route')
def expert_load(experts_MK: Int[Array, 'M K'], num_experts: int) -> Int[Array, ' E']:
    """Tokens sent to each expert."""
    return jnp.zeros(num_experts, jnp.int32).at[experts_MK.reshape(-1)].add(1, mode='drop')


def update_bias(
    bias_LE: Float[Array, 'L E'], load_LE: Int[Array, 'L E'], rate: Float[Array, ''] | float
) -> Float[Array, 'L E']:
    """`b += rate * sign(mean load - load)` [2.1.2], with the load counted over the whole global batch."""
    load_LE = load_LE.astype(jnp.float32)
    return bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)


@jax.named_scope('route')
def balance_loss(
    affinity_BTE: Float[Array, 'B T E'], top_k: int, context: ContextParallel = ALONE.context
) -> Float[Array, '']:
    """The sequence-wise balance loss without its weight alpha, mean over sequences [eq. 17-20].

    `sum_i f_i P_i`, where `f_i = E / (K T) * count(i in TopK(s))` counts the best of the unbiased affinity, and
    `P_i` is the mean over the sequence of `s_i / sum_j s_j`. Of sequences cut over devices the counts are
    those of the whole, and `P_i` is the share of the tokens that are here: what devices return adds up.
    """
    num_experts, length = affinity_BTE.shape[-1], context.devices * affinity_BTE.shape[1]
    normalised_BTE = affinity_BTE / affinity_BTE.sum(axis=-1, keepdims=True)
    best_BTK = jax.lax.top_k(jax.lax.stop_gradient(affinity_BTE), top_k)[1]
    # Kept, so that devices need not add them up again.
    count_BE = ops.keep(context.sum(jax.vmap(lambda best_TK: expert_load(best_TK, num_experts))(best_BTK)))
    fraction_BE = count_BE * (num_experts / (top_k * length))
    return jnp.mean(jnp.sum(fraction_BE * (normalised_BTE.sum(axis=1) / length), axis=-1))
