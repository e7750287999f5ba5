"""The training objective: next-token and multi-token cross-entropy and the sequence-wise balance loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import deepseek_jax as ds
from deepseek_jax.config import check_types, require_positive
from deepseek_jax.model import tokens_ahead
from train.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the loss terms and of the load rule.

    Attributes:
      balance_weight: alpha of the sequence-wise balance loss [eq. 17].
      mtp_weight: lambda of the multi-token prediction loss [eq. 25], over tokens.
      bias_rate: gamma of the routers' selection bias [2.1.2], over tokens.
      rows_per_chunk: tokens whose logits exist at a time.
    """

    mtp_weight: Schedule = Schedule(pieces=(('constant', 0.3, 10e12), ('constant', 0.1, 4.8e12)))
    bias_rate: Schedule = Schedule(pieces=(('constant', 0.001, 14.3e12), ('constant', 0.0, 0.5e12)))
    balance_weight: float = 1e-4
    rows_per_chunk: int = 1024

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'rows_per_chunk')
        if self.balance_weight < 0:
            raise ValueError(f'ObjectiveConfig.balance_weight={self.balance_weight} must not be negative')


class Totals(NamedTuple):
    """What the sums over a batch are divided by; at least 1 each.

    Attributes:
      weight: of the next-token targets.
      mtp_weights: of the targets of each prediction depth.
      num_sequences: sequences.
    """

    weight: Float[Array, '']
    mtp_weights: tuple[Float[Array, ''], ...]
    num_sequences: int


class Losses(NamedTuple):
    """The terms of the objective, and what else the step needs to know.

    Of a part of a batch it holds the shares, which add up to the batch's.

    Attributes:
      loss: next-token cross-entropy, nats a weighted target.
      mtp_loss: mean over depths of the multi-token cross-entropy; 0 without modules.
      balance_loss: sum over layers, without its weight.
      nats: summed next-token cross-entropy of all weighted targets.
      load_LE: tokens sent to each expert.
    """

    loss: Float[Array, '']
    mtp_loss: Float[Array, '']
    balance_loss: Float[Array, '']
    nats: Float[Array, '']
    load_LE: Int[Array, 'L E']


def totals(batch: Mapping[str, Array], model: ds.ModelConfig) -> Totals:
    """The totals of a whole batch, as `objective` takes it."""
    segments = batch['segments']
    mtp_weights = [_same_document(segments, k + 1).sum() for k in range(1, model.mtp_depth + 1)]
    weight, *mtp_weights = (jnp.maximum(weight, 1.0) for weight in (batch['weights'].sum(), *mtp_weights))
    return Totals(weight, tuple(mtp_weights), len(segments))


def objective(
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    model: ds.ModelConfig,
    config: ObjectiveConfig,
    mtp_weight: Float[Array, ''] | float,
    whole: Totals | None = None,
) -> tuple[Float[Array, ''], Losses]:
    """The loss to minimise, and its terms.

    `loss + mtp_weight * mean_k mtp_loss_k + balance_weight * sum balance_loss` [eq. 17, 24, 25].

    Args:
      params: the model's parameters.
      batch: `tokens` (B, T + 1), `segments` (B, T + 1; 0 is padding), `weights` (B, T) of the targets.
      model: the model.
      config: weights of the terms.
      mtp_weight: lambda; the modules run whatever its value.
      whole: totals of the batch that this one is a part of: all that is returned, gradients too, is then the part's
        share. None: the batch is whole.
    """
    whole = totals(batch, model) if whole is None else whole
    tokens, segments = batch['tokens'], batch['segments']
    length = tokens.shape[1] - 1
    ahead_LBT = tokens_ahead(tokens, length, model.mtp_depth) if model.mtp_depth else None
    states = ds.states(params, tokens[:, :-1], model, segments[:, :-1], ahead_LBT)
    nats = cross_entropy(states.hidden_BTD, params['head_DV'], tokens[:, 1:], batch['weights'], config, model)
    loss = nats / whole.weight
    mtp_loss = jnp.zeros(())
    for k in range(1, model.mtp_depth + 1):
        assert states.mtp_LBTD is not None
        pad = ((0, 0), (0, k))
        weights = jnp.pad(_same_document(segments, k + 1), pad)
        targets = jnp.pad(tokens[:, k + 1 :], pad)
        total = cross_entropy(states.mtp_LBTD[k - 1], params['head_DV'], targets, weights, config, model)
        mtp_loss += total / whole.mtp_weights[k - 1] / model.mtp_depth
    # A mean over the batch's sequences, so a part counts by how many of them it has.
    balance_loss = states.balance_loss_L.sum() * (len(tokens) / whole.num_sequences)
    total = loss + mtp_weight * mtp_loss + config.balance_weight * balance_loss
    return total, Losses(loss, mtp_loss, balance_loss, nats, states.load_LE)


@jax.named_scope('loss')
def cross_entropy(
    hidden_BTD: Float[Array, 'B T D'],
    head_DV: Float[Array, 'D V'],
    targets_BT: Int[Array, 'B T'],
    weights_BT: Float[Array, 'B T'],
    config: ObjectiveConfig,
    model: ds.ModelConfig,
) -> Float[Array, '']:
    """The weighted sum of `-log softmax(hidden @ head)[target]` in nats, float32.

    Rows are taken `rows_per_chunk` at a time, and the backward pass makes each chunk's logits again, so that the
    logits of a batch are never whole in memory.
    """
    num_rows = targets_BT.size
    chunk = min(config.rows_per_chunk, num_rows)
    pad = -num_rows % chunk

    def chunks(array: Array) -> Array:
        flat = array.reshape(num_rows, *array.shape[2:])
        return jnp.pad(flat, ((0, pad), *[(0, 0)] * (flat.ndim - 1))).reshape(-1, chunk, *flat.shape[1:])

    @jax.checkpoint
    def chunk_nats(total: Array, rows: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden_MD, targets_M, weights_M = rows
        logits_MV = ds.logits({'head_DV': head_DV}, hidden_MD, model)
        target_logits_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
        nats_M = jax.nn.logsumexp(logits_MV, axis=-1) - target_logits_M
        return total + jnp.sum(nats_M * weights_M), None

    return jax.lax.scan(chunk_nats, jnp.zeros(()), (chunks(hidden_BTD), chunks(targets_BT), chunks(weights_BT)))[0]


def _same_document(segments: Array, distance: int) -> Array:
    """1 where a token and the one `distance` places on belong to the same document, float32."""
    here, there = segments[:, :-distance], segments[:, distance:]
    return ((here == there) & (there > 0)).astype(jnp.float32)
