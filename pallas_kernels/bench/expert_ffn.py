"""Cases of the routed experts of one layer, output and all gradients: float8 against bfloat16, and that against XLA."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import JaxWork
from pallas_kernels.expert_ffn_bf16.api import expert_ffn_bf16
from pallas_kernels.expert_ffn_fp8.api import expert_ffn_fp8
from pallas_kernels.routes import routes

TOKENS, TOP_K, EXPERTS, MODEL, HIDDEN = 8192, 8, 32, 7168, 2048


def cases(quick: bool) -> list[Case]:
    """DeepSeek-V3's width with 32 of its experts on one device; the quick ones have a quarter of tokens and experts.

    So has the comparison with `jax.lax.ragged_dot`, which XLA turns into products over all groups: at the full size it takes
    32 times the work and more than 60 GB of temporaries.
    """
    full, small = ((TOKENS // share, TOP_K, EXPERTS // share, MODEL, HIDDEN) for share in (1, 4))
    return [
        _case('fp8', expert_ffn_fp8, expert_ffn_bf16, 'bfloat16 kernels', *(small if quick else full)),
        _case('bf16', expert_ffn_bf16, _ragged_dot, 'jax.lax.ragged_dot', *small),
    ]


def _case(
    name: str,
    layer: Callable[..., Any],
    peer: Callable[..., Any],
    peer_name: str,
    T: int,
    K: int,
    E: int,
    D: int,
    F: int,
) -> Case:
    return Case(
        op='expert_ffn',
        name=name,
        shape={'T': T, 'K': K, 'E': E, 'D': D, 'F': F},
        flops=3 * 6 * T * K * D * F,
        inputs=lambda key: _inputs(key, T, K, E, D, F),
        run=lambda *inputs, implementation: _step(functools.partial(layer, implementation=implementation), *inputs),
        # The float32 layer does not fit beside the others: the bfloat16 one, whose error is a hundredth of float8's.
        reference=lambda *inputs: _step(functools.partial(expert_ffn_bf16, implementation='reference'), *inputs),
        peer_name=peer_name,
        peer=lambda sets: _work(peer, sets),
        method='span',
    )


def _inputs(key: jax.Array, T: int, K: int, E: int, D: int, F: int) -> tuple:
    """Input, gates, random distinct experts, masters, and the output's gradient."""
    keys = jax.random.split(key, 7)
    x_TD, d_TD = (jax.random.normal(k, (T, D), jnp.bfloat16) for k in keys[:2])
    gates_TK = jax.random.uniform(keys[2], (T, K), minval=0.05, maxval=0.2)
    experts_TK = jax.lax.top_k(jax.random.uniform(keys[3], (T, E)), K)[1]
    shapes = (E, D, F), (E, D, F), (E, F, D)
    weights = tuple(jax.random.normal(k, s) * s[1] ** -0.5 for k, s in zip(keys[4:], shapes, strict=True))
    return x_TD, gates_TK, experts_TK, weights, d_TD


def _step(
    layer: Callable[..., Any],
    x_TD: jax.Array,
    gates_TK: jax.Array,
    experts_TK: jax.Array,
    weights: tuple,
    d_TD: jax.Array,
):
    """Output, and gradients of x, gates and weights."""
    made = routes(experts_TK, weights[0].shape[0])
    out_TD, pull = jax.vjp(lambda x, g, w: layer(x, g, made, w), x_TD, gates_TK, weights)
    return out_TD, pull(d_TD)


def _ragged_dot(x_TD: jax.Array, gates_TK: jax.Array, made: Any, weights: tuple) -> jax.Array:
    """The layer as plain JAX: rows sorted by expert without padding, and `jax.lax.ragged_dot`."""
    tokens, top_k = made.row_TK.shape
    order_J = jnp.argsort(made.row_TK.reshape(-1))
    w_gate, w_up, w_down = (w.astype(x_TD.dtype) for w in weights)
    multiply = functools.partial(jax.lax.ragged_dot, group_sizes=made.group_sizes_E)
    x_JD = x_TD[order_J // top_k]
    hidden_JF = jax.nn.silu(multiply(x_JD, w_gate)) * multiply(x_JD, w_up)
    y_JD = multiply(hidden_JF, w_down)
    weighted = y_JD.astype(jnp.float32) * gates_TK.reshape(-1)[order_J][:, None]
    return jax.ops.segment_sum(weighted, order_J // top_k, num_segments=tokens).astype(x_TD.dtype)


def _work(layer: Callable[..., Any], sets: list[tuple]) -> peers.PeerWork:
    return peers.PeerWork(JaxWork(functools.partial(_step, layer), sets), None)
