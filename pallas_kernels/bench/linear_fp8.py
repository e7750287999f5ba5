"""Case of `linear_fp8`: output and both gradients, quantisation of x, w and dy included, against bfloat16 in XLA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import JaxWork
from pallas_kernels.linear_fp8.api import linear_fp8

SHAPE = (4096, 4096, 7168)


def cases(quick: bool) -> list[Case]:
    """One layer of 7168 inputs and 4096 outputs, its weight in float32, for 4096 tokens."""
    del quick
    m, n, k = SHAPE
    return [
        Case(
            op='linear_fp8',
            name='value_and_grad',
            shape={'M': m, 'N': n, 'K': k},
            flops=6 * m * n * k,
            inputs=lambda key: _inputs(key, m, n, k),
            run=lambda x, w, dy, implementation: _step(
                lambda x, w: linear_fp8(x, w, implementation=implementation), x, w, dy
            ),
            reference=lambda x, w, dy: _step(_linear_float32, x.astype(jnp.float32), w, dy)[1],
            dense=lambda results: results[1],
            peer_name='bfloat16 jnp.dot (XLA)',
            peer=_bfloat16,
            method='span',
        )
    ]


def _inputs(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Input, weight and the output's gradient, which is random and not of one value, as that of a sum would be."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.float32) * k**-0.5
    dy = jax.random.normal(keys[2], (m, n), jnp.bfloat16)
    return x, w, dy


def _step(linear: Callable[..., Any], x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple:
    """The loss `sum(y * dy)`, without which the output would not be computed, and its gradients for x and w."""

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(linear(x, w).astype(jnp.float32) * dy)

    return jax.value_and_grad(loss, (0, 1))(x, w)


def _linear_float32(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)


def _bfloat16(sets: list[tuple]) -> peers.PeerWork:
    def step(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple:
        return _step(lambda x, w: jnp.dot(x, w.astype(jnp.bfloat16)), x, w, dy)

    work = JaxWork(step, sets)
    return peers.PeerWork(work, lambda: work.enqueue()[0][1])
