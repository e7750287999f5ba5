"""Where tokens stand once they are sorted by expert, each expert's rows from a multiple of 128 on, and how they get there.

Each of T tokens has K experts, hence T * K rows in a buffer of M, in the contiguous layout of `groups.py`:

    expert 0: rows of its tokens, in their order | padding | expert 1: ... | padding | ... | not used

Rows move by gathers in both directions, XLA's. A row without a token is zeros: it shares 128-token tiles with rows that count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.fp8 import Quantized, round_up
from pallas_kernels.groups import ALIGNMENT, group_starts


class Routes(NamedTuple):
    """Attributes:
    token_M: the token whose row this is, T if there is none.
    row_TK: the row of each token's k-th expert, M or more if it has none.
    group_sizes_E: rows of each expert, padding not counted.
    """

    token_M: Int32[Array, ' M']
    row_TK: Int32[Array, 'T K']
    group_sizes_E: Int32[Array, ' E']


def buffer_rows(routed: int, num_experts: int) -> int:
    """Rows that hold `routed` rows however they fall to the experts: at most one partial block each."""
    return round_up(routed + min(routed, num_experts) * (ALIGNMENT - 1), ALIGNMENT)


@jax.named_scope('sort')
def routes(experts_TK: Int[Array, 'T K'], num_experts: int, max_routed: int | None = None) -> Routes:
    """The stable sort by expert of all routed rows.

    Args:
      experts_TK: each token's experts; `num_experts` stands for one that is elsewhere, which gets no row.
      num_experts: E.
      max_routed: rows that there is room for, however they fall to the experts. The rows of the last experts that find none
        are dropped, and not counted in `group_sizes_E`. None is T K: no row is dropped.
    """
    tokens, top_k = experts_TK.shape
    expert_J = experts_TK.reshape(-1).astype(jnp.int32)
    rows = buffer_rows(expert_J.size if max_routed is None else min(max_routed, expert_J.size), num_experts)
    order_J = jnp.argsort(expert_J, stable=True).astype(jnp.int32)
    sizes_E = jnp.zeros(num_experts, jnp.int32).at[expert_J].add(1, mode='drop')
    starts_E = group_starts(sizes_E)
    place_J = jnp.arange(order_J.size, dtype=jnp.int32)
    sorted_J = expert_J[order_J]
    sorted_row_J = place_J + (starts_E - (jnp.cumsum(sizes_E) - sizes_E))[sorted_J]
    # Numbers past the end are all different, as scatters of unique indices want them.
    sorted_row_J = jnp.where((sorted_J < num_experts) & (sorted_row_J < rows), sorted_row_J, rows + place_J)
    row_J = jnp.zeros_like(order_J).at[order_J].set(sorted_row_J, unique_indices=True)
    token_M = jnp.full(rows, tokens, jnp.int32)
    token_M = token_M.at[sorted_row_J].set(order_J // top_k, unique_indices=True, mode='drop')
    return Routes(token_M, row_J.reshape(tokens, top_k), jnp.clip(rows - starts_E, 0, sizes_E).astype(jnp.int32))


@jax.named_scope('permute')
def permute(x: Quantized, token_M: Int[Array, ' M']) -> Quantized:
    """Each row's token in float8, values (T, D) to (M, D), with its scales: nothing is rounded on the way."""
    T, D = x.values.shape
    word = jnp.uint32 if D % 4 == 0 else jnp.uint8  # fewer and wider reads
    bits = jax.lax.bitcast_convert_type(x.values.reshape(T, -1, word.dtype.itemsize), word).reshape(T, -1)
    values = jnp.take(bits, token_M, axis=0, mode='fill', fill_value=0)
    scales = jnp.take(x.scales[:, : len(x.values)], token_M, axis=1, mode='fill', fill_value=0)
    return Quantized(jax.lax.bitcast_convert_type(values, x.values.dtype).reshape(-1, D), scales)


@jax.named_scope('permute')
def permute_vector(x_TK: Float[Array, 'T K'], routes: Routes) -> Float[Array, ' M']:
    """One number a row, zero for a row without a token: gates."""
    rows = routes.token_M.shape[0]
    places_J = routes.row_TK.reshape(-1)
    return jnp.zeros(rows, x_TK.dtype).at[places_J].set(x_TK.reshape(-1), unique_indices=True, mode='drop')


def take_vector(x_M: Float[Array, ' M'], routes: Routes) -> Float[Array, 'T K']:
    """The number of each token's k-th row, zero where it has none."""
    return jnp.take(x_M, routes.row_TK, mode='fill', fill_value=0)


@jax.named_scope('combine')
def combine(y_MD: Float[Array, 'M D'], row_TK: Int[Array, 'T K'], dtype: DTypeLike) -> Float[Array, 'T D']:
    """The sum of each token's rows, in float32, rounded once; rows past the end count nothing."""
    y_TKD = jnp.take(y_MD, row_TK, axis=0, mode='fill', fill_value=0)
    return jnp.sum(y_TKD.astype(jnp.float32), axis=1).astype(dtype)
