"""Moving tokens to experts and back: a sort by expert, with gathers in both directions of differentiation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.router import expert_load


class Plan(NamedTuple):
    """Where J = M * K routed rows go; row `m * K + k` is token `m` for its `k`-th expert.

    Attributes:
      order_J: routed row that stands at each place once sorted by expert; ties keep the order of the tokens.
      inverse_J: place of each routed row in that order.
      group_sizes_E: rows of each expert.
    """

    order_J: Int[Array, ' J']
    inverse_J: Int[Array, ' J']
    group_sizes_E: Int[Array, ' E']


def plan(experts_MK: Int[Array, 'M K'], num_experts: int) -> Plan:
    """The sort by expert of all routed rows."""
    order_J = jnp.argsort(experts_MK.reshape(-1), stable=True)
    inverse_J = jnp.zeros_like(order_J).at[order_J].set(jnp.arange(order_J.size, dtype=order_J.dtype))
    return Plan(order_J, inverse_J, expert_load(experts_MK, num_experts))


def permute(x_MD: Float[Array, 'M D'], plan: Plan) -> Float[Array, 'J D']:
    """Each token's row once per chosen expert, sorted by expert."""
    top_k = plan.order_J.size // x_MD.shape[0]
    return _permute(x_MD, plan.order_J // top_k, plan.inverse_J)


def unpermute(y_JD: Float[Array, 'J D'], plan: Plan, gates_MK: Float[Array, 'M K']) -> Float[Array, 'M D']:
    """The sum over each token's experts, weighted by the gates in float32; returned in the dtype of `y_JD`."""
    y_MKD = _reorder(y_JD, plan.inverse_J, plan.order_J).reshape(*gates_MK.shape, y_JD.shape[-1])
    return jnp.sum(y_MKD.astype(jnp.float32) * gates_MK[..., None], axis=1).astype(y_JD.dtype)


@jax.custom_vjp
def _permute(x_MD, tokens_J, inverse_J):
    return x_MD[tokens_J]


def _permute_forward(x_MD, tokens_J, inverse_J):
    return x_MD[tokens_J], (inverse_J, x_MD.shape[0])


def _permute_backward(residuals, d_JD):
    inverse_J, num_tokens = residuals
    d_MKD = d_JD[inverse_J].reshape(num_tokens, -1, d_JD.shape[-1])
    return d_MKD.astype(jnp.float32).sum(axis=1).astype(d_JD.dtype), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _reorder(y_JD, places_J, inverse_J):
    return y_JD[places_J]


def _reorder_forward(y_JD, places_J, inverse_J):
    return y_JD[places_J], inverse_J


def _reorder_backward(inverse_J, d_JD):
    return d_JD[inverse_J], None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
