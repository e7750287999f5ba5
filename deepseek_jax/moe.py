"""Feed-forward layers: the SwiGLU of dense layers, and DeepSeekMoE with routed and shared experts [2.1.2]."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from deepseek_jax import dispatch, ops, router
from deepseek_jax.config import MoEConfig, PrecisionConfig

FFN_NAMES = ('w_gate_DF', 'w_up_DF', 'w_down_FD')
EXPERT_NAMES = ('w_gate_EDF', 'w_up_EDF', 'w_down_EFD')


class Balance(NamedTuple):
    """How evenly one layer's experts were used.

    Attributes:
      load_E: tokens sent to each expert, over the global batch.
      loss: sequence-wise balance loss, without its weight.
    """

    load_E: Int[Array, '*L E']
    loss: Float[Array, '*L']


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
) -> Float[Array, 'M D']:
    """`sum_k gate_k * FFN_k(x)` over the chosen experts [eq. 12]; no token is dropped."""
    if ops.has_expert_ffn(precision):
        return ops.expert_ffn(params, x_MD, routing.gates_MK, routing.experts_MK, config.num_experts, precision)
    plan = dispatch.plan(routing.experts_MK, params['w_up_EDF'].shape[0])
    x_JD = dispatch.permute(x_MD, plan)
    hidden_JF = jax.nn.silu(ops.grouped_matmul(x_JD, params['w_gate_EDF'], plan.group_sizes_E))
    hidden_JF = hidden_JF * ops.grouped_matmul(x_JD, params['w_up_EDF'], plan.group_sizes_E)
    y_JD = ops.grouped_matmul(hidden_JF, params['w_down_EFD'], plan.group_sizes_E)
    return dispatch.unpermute(y_JD, plan, routing.gates_MK)


def moe(
    params: Mapping[str, Any],
    x_BTD: Float[Array, 'B T D'],
    config: MoEConfig,
    precision: PrecisionConfig,
) -> tuple[Float[Array, 'B T D'], Balance]:
    """Routed plus shared experts [eq. 12], and how evenly the experts were used."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = ops.keep(router.route(params['router'], x_MD, config))
    y_BTD = routed_experts(params['experts'], x_MD, routing, config, precision).reshape(x_BTD.shape)
    if config.num_shared_experts:
        with jax.named_scope('shared'):
            y_BTD = y_BTD + swiglu(params['shared'], x_BTD, precision)
    return y_BTD, balance(routing, x_BTD.shape[:-1], config)


def balance(routing: router.Routing, batch: tuple[int, ...], config: MoEConfig) -> Balance:
    """How evenly experts are used by the routing of a batch of shape (B, T)."""
    affinity_BTE = routing.affinity_ME.reshape(*batch, -1)
    load_E = router.expert_load(routing.experts_MK, config.num_experts)
    return Balance(load_E, router.balance_loss(affinity_BTE, config.top_k))
