"""Feed-forward layers: the SwiGLU of dense layers, and DeepSeekMoE with routed and shared experts [2.1.2]."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import dispatch, ops, router
from deepseek_jax.config import MoEConfig, PrecisionConfig
from deepseek_jax.sharding import ALONE, ContextParallel, ExpertParallel, Parallel

FFN_NAMES = ('w_gate_DF', 'w_up_DF', 'w_down_FD')
EXPERT_NAMES = ('w_gate_EDF', 'w_up_EDF', 'w_down_EFD')


class Balance(NamedTuple):
    """How evenly one layer's experts were used.

    Attributes:
      load_E: tokens sent to each expert, of those that are here.
      loss: sequence-wise balance loss, without its weight; of sequences cut over devices a share, which add up to it.
      dropped: choices of an expert that were not computed, because a device had no room for them.
    """

    load_E: Int[Array, '*L E']
    loss: Float[Array, '*L']
    dropped: Int[Array, '*L']


def swiglu(
    params: Mapping[str, Any], x_BTD: Float[Array, '*rows D'], precision: PrecisionConfig
) -> Float[Array, '*rows D']:
    """The SwiGLU of a dense layer, and of shared experts."""
    w_gate_DF, w_up_DF, w_down_FD = (params[name] for name in FFN_NAMES)
    return ops.swiglu(x_BTD, w_gate_DF, w_up_DF, w_down_FD, precision)


def routed_experts(
    params: Mapping[str, Any],
    x_MD: Float[Array, 'M D'],
    routing: router.Routing,
    config: MoEConfig,
    precision: PrecisionConfig,
    parallel: ExpertParallel | None = None,
) -> tuple[Float[Array, 'M D'], Int[Array, '']]:
    """`sum_k gate_k * FFN_k(x)` over the chosen experts [eq. 12], and how many choices were dropped: none unless experts lie
    on many devices with a bounded capacity. `dropped` of all devices add up to what all dropped.
    """
    experts_MK, gates_MK, num_experts = routing.experts_MK, routing.gates_MK, config.num_experts
    exchange = max_routed = None
    if parallel is not None:
        capacities, max_routed = parallel.room(len(x_MD), config)
        exchange, experts_MK = ops.exchange(experts_MK, num_experts, parallel.axes, capacities)
        num_experts //= parallel.devices
    if ops.has_expert_ffn(precision):
        y_MD, sizes_E = ops.expert_ffn(params, x_MD, gates_MK, experts_MK, num_experts, precision, exchange, max_routed)
        return y_MD, routing.experts_MK.size - sizes_E.sum()
    if exchange is not None:
        here_MK = experts_MK < num_experts
        x_MD, gates_MK = exchange.send(x_MD), jnp.where(here_MK, exchange.send(gates_MK), 0)
    plan = dispatch.plan(experts_MK, num_experts, max_routed)
    x_JD = dispatch.permute(x_MD, plan)
    hidden_JF = jax.nn.silu(ops.grouped_matmul(x_JD, params['w_gate_EDF'], plan.group_sizes_E))
    hidden_JF = hidden_JF * ops.grouped_matmul(x_JD, params['w_up_EDF'], plan.group_sizes_E)
    y_JD = ops.grouped_matmul(hidden_JF, params['w_down_EFD'], plan.group_sizes_E)
    y_MD = dispatch.unpermute(y_JD, plan, gates_MK)
    dropped = routing.experts_MK.size - plan.group_sizes_E.sum()
    return y_MD if exchange is None else exchange.bring(y_MD), dropped


def moe(
    params: Mapping[str, Any],
    x_BTD: Float[Array, 'B T D'],
    config: MoEConfig,
    precision: PrecisionConfig,
    parallel: Parallel = ALONE,
) -> tuple[Float[Array, 'B T D'], Balance]:
    """Routed plus shared experts [eq. 12], and how evenly the experts were used."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = ops.keep(router.route(params['router'], x_MD, config))
    y_MD, dropped = routed_experts(params['experts'], x_MD, routing, config, precision, parallel.experts)
    y_BTD = y_MD.reshape(x_BTD.shape)
    if config.num_shared_experts:
        with jax.named_scope('shared'):
            y_BTD = y_BTD + swiglu(params['shared'], x_BTD, precision)
    return y_BTD, balance(routing, dropped, x_BTD.shape[:-1], config, parallel.context)


def balance(
    routing: router.Routing,
    dropped: jax.Array,
    batch: tuple[int, ...],
    config: MoEConfig,
    context: ContextParallel = ALONE.context,
) -> Balance:
    """How evenly experts are used by the routing of a batch of shape (B, T), T of this device."""
    affinity_BTE = routing.affinity_ME.reshape(*batch, -1)
    load_E = router.expert_load(routing.experts_MK, config.num_experts)
    return Balance(load_E, router.balance_loss(affinity_BTE, config.top_k, context), dropped)
