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
      inverse_J: place of each routed row in that order, J or more if it has none.
      group_sizes_E: rows of each expert.
    """

    order_J: Int[Array, ' J']
    inverse_J: Int[Array, ' J']
    group_sizes_E: Int[Array, ' E']


def plan(experts_MK: Int[Array, 'M K'], num_experts: int, max_routed: int | None = None) -> Plan:
    """The sort by expert of all routed rows, or of the first `max_routed` of them: the others are dropped.

    `num_experts` in the place of an expert stands for one that is elsewhere: it is sorted behind all others, in no group.
    """
    order_J = jnp.argsort(experts_MK.reshape(-1), stable=True)
    inverse_J = jnp.zeros_like(order_J).at[order_J].set(jnp.arange(order_J.size, dtype=order_J.dtype))
    ends_E = jnp.minimum(jnp.cumsum(expert_load(experts_MK, num_experts)), len(order_J[:max_routed]))
    return Plan(order_J[:max_routed], inverse_J, jnp.diff(ends_E, prepend=0))


def permute(x_MD: Float[Array, 'M D'], plan: Plan) -> Float[Array, 'J D']:
    """Each token's row once per chosen expert, sorted by expert."""
    top_k = plan.inverse_J.size // x_MD.shape[0]
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
    d_MKD = _at(d_JD, inverse_J).reshape(num_tokens, -1, d_JD.shape[-1])
    return d_MKD.astype(jnp.float32).sum(axis=1).astype(d_JD.dtype), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _reorder(y_JD, places_J, inverse_J):
    return _at(y_JD, places_J)


def _reorder_forward(y_JD, places_J, inverse_J):
    return _at(y_JD, places_J), inverse_J


def _reorder_backward(inverse_J, d_JD):
    return d_JD[inverse_J], None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)


def _at(rows: Array, places: Array) -> Array:
    """The rows at these places, zeros past the end."""
    return jnp.take(rows, places, axis=0, mode='fill', fill_value=0)
