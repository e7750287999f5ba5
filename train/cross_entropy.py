"""Cross-entropy of a large vocabulary, without its logits.

Logits exist for a chunk of rows at a time. Differentiated, the forward pass takes each chunk's gradients while its logits
are there, for the loss is a sum whose derivative is known up to one factor: three products with the head, none of them
made twice. What waits for the backward pass is the gradient of the hidden states, in their dtype, and that of the head,
float32.

  for each chunk:  logits = hidden @ head
                   d_logits = weight * (softmax(logits) - [target])
                   d_hidden = d_logits @ head.T
                   d_head += hidden.T @ d_logits
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

import deepseek_jax as ds
from deepseek_jax import ops


class _Chunk(NamedTuple):
    hidden_MD: Array
    targets_M: Array
    weights_M: Array


@jax.named_scope('loss')
def cross_entropy(
    hidden_ND: Float[Array, 'N D'],
    head_DV: Float[Array, 'D V'],
    targets_N: Int[Array, ' N'],
    weights_N: Float[Array, ' N'],
    model: ds.ModelConfig,
    rows_per_chunk: int,
) -> tuple[Float32[Array, ''], Float32[Array, ' N']]:
    """The weighted sum of `-log softmax(hidden @ head)[target]`, and each row's own in nats, which has no gradient."""
    total, nats_N = _cross_entropy(hidden_ND, head_DV, targets_N, weights_N, model, rows_per_chunk)  # pyright: ignore
    return total, jax.lax.stop_gradient(nats_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden_ND: Array, head_DV: Array, targets_N: Array, weights_N: Array, model: ds.ModelConfig, rows_per_chunk: int
) -> tuple[Array, Array]:
    params = _rounded_head(head_DV, hidden_ND.dtype)

    def one(_: None, chunk: _Chunk) -> tuple[None, Array]:
        logits_MV = ds.logits(params, chunk.hidden_MD, model)
        return None, _logsumexp(logits_MV) - _at(logits_MV, chunk.targets_M)

    chunks = _chunks(_Chunk(hidden_ND, targets_N, weights_N), rows_per_chunk)
    _, nats = jax.lax.scan(one, None, chunks)
    nats_N = nats.reshape(-1)[: len(weights_N)]
    return jnp.sum(nats_N * weights_N), nats_N


def _forward(
    hidden_ND: Array, head_DV: Array, targets_N: Array, weights_N: Array, model: ds.ModelConfig, rows_per_chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    params = _rounded_head(head_DV, hidden_ND.dtype)

    def one(d_head_DV: Array, chunk: _Chunk) -> tuple[Array, tuple[Array, Array]]:
        logits_MV = ds.logits(params, chunk.hidden_MD, model)
        lse_M = _logsumexp(logits_MV)
        is_target_MV = jnp.arange(logits_MV.shape[1]) == chunk.targets_M[:, None]
        d_logits_MV = (jnp.exp(logits_MV - lse_M[:, None]) - is_target_MV) * chunk.weights_M[:, None]
        d_logits_MV = d_logits_MV.astype(chunk.hidden_MD.dtype)
        with jax.named_scope('head'):
            d_hidden_MD = ops.einsum('MV,DV->MD', d_logits_MV, params['head_DV'])
            d_head_DV = ops.add_weight_gradient(d_head_DV, chunk.hidden_MD, d_logits_MV)
        return d_head_DV, (lse_M - _at(logits_MV, chunk.targets_M), d_hidden_MD)

    chunks = _chunks(_Chunk(hidden_ND, targets_N, weights_N), rows_per_chunk)
    d_head_DV, (nats, d_hidden) = jax.lax.scan(one, jnp.zeros(head_DV.shape, jnp.float32), chunks)
    nats_N = nats.reshape(-1)[: len(weights_N)]
    d_hidden_ND = d_hidden.reshape(-1, d_hidden.shape[-1])[: len(weights_N)]
    return (jnp.sum(nats_N * weights_N), nats_N), (d_hidden_ND, d_head_DV.astype(head_DV.dtype), nats_N)


@jax.named_scope('loss')
def _backward(
    model: ds.ModelConfig, rows_per_chunk: int, saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, Array]:
    d_total, _ = cotangents
    d_hidden_ND, d_head_DV, nats_N = saved
    return (d_hidden_ND * d_total).astype(d_hidden_ND.dtype), d_head_DV * d_total, None, nats_N * d_total


_cross_entropy.defvjp(_forward, _backward)


def _rounded_head(head_DV: Array, dtype: jnp.dtype) -> dict[str, Any]:
    """The head as products read it, rounded once for all chunks."""
    return {'head_DV': head_DV.astype(dtype)}


def _logsumexp(logits_MV: Float32[Array, 'M V']) -> Float32[Array, ' M']:
    """`log sum_v exp(logits)` in one pass: sums are kept relative to the largest so far."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(left[0], right[0])
        return largest, left[1] * jnp.exp(left[0] - largest) + right[1] * jnp.exp(right[0] - largest)

    lowest = jnp.float32(
        jnp.finfo(jnp.float32).min
    )  # minus infinity would leave the difference of two of them undefined
    operands = logits_MV, jnp.ones_like(logits_MV)
    largest_M, total_M = jax.lax.reduce(operands, (lowest, jnp.float32(0)), join, (1,))
    return largest_M + jnp.log(total_M)


def _at(logits_MV: Array, targets_M: Array) -> Array:
    return jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]


def _chunks(rows: _Chunk, rows_per_chunk: int) -> _Chunk:
    """Chunks along a new leading axis; the last one is filled up with rows of weight zero."""
    num_rows = len(rows.targets_M)
    chunk = min(rows_per_chunk, num_rows)

    def cut(array: Array) -> Array:
        return jnp.pad(array, ((0, -num_rows % chunk), *[(0, 0)] * (array.ndim - 1))).reshape(
            -1, chunk, *array.shape[1:]
        )

    return jax.tree.map(cut, rows)
