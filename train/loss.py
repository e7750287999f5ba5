"""The training objective: next-token and multi-token cross-entropy and the sequence-wise balance loss."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import deepseek_jax as ds
from deepseek_jax import gather
from deepseek_jax.config import check_types, require_positive
from deepseek_jax.model import tokens_ahead
from deepseek_jax.sharding import ALONE, Parallel
from train.cross_entropy import cross_entropy
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
      dropped: choices of experts that were not computed for want of room.
    """

    loss: Float[Array, '']
    mtp_loss: Float[Array, '']
    balance_loss: Float[Array, '']
    nats: Float[Array, '']
    load_LE: Int[Array, 'L E']
    dropped: Int[Array, '']


def totals(batch: Mapping[str, Array], model: ds.ModelConfig, axes: Sequence[str] = ()) -> Totals:
    """The totals of a whole batch, as `objective` takes it; with mesh axes, of one whose rows are cut over them."""
    segments = batch['segments']
    sums = [batch['weights'].sum(), *(_same_document(segments, k + 1).sum() for k in range(1, model.mtp_depth + 1))]
    weight, *mtp_weights = (jnp.maximum(jax.lax.psum(weight, axes), 1.0) for weight in sums)
    return Totals(weight, tuple(mtp_weights), len(segments) * jax.lax.axis_size(axes))


def objective(
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    model: ds.ModelConfig,
    config: ObjectiveConfig,
    mtp_weight: Float[Array, ''] | float,
    whole: Totals | None = None,
    parallel: Parallel = ALONE,
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
      parallel: this is mapped over devices, and `params` has what of them is this one's. Rows are whole; of sequences
        that are cut over devices, the share of this one's tokens is returned.

    Raises:
      ValueError: T cannot be cut as `parallel.context` says.
    """
    whole = totals(batch, model) if whole is None else whole
    tokens, segments = batch['tokens'], batch['segments']
    length = tokens.shape[1] - 1
    ahead_LBT = tokens_ahead(tokens, length, model.mtp_depth) if model.mtp_depth else None
    states = ds.states(params, tokens[:, :-1], model, segments[:, :-1], ahead_LBT, parallel)
    hidden_LBTD = states.hidden_BTD[None]
    if states.mtp_LBTD is not None:
        hidden_LBTD = jnp.concatenate([hidden_LBTD, states.mtp_LBTD])
    # Found in whole rows: the next tokens may lie on another device.
    targets_LBT, weights_LBT = (parallel.context.part(x, axis=2) for x in _targets(batch, model.mtp_depth))
    factors = [1 / whole.weight, *(mtp_weight / (model.mtp_depth * weight) for weight in whole.mtp_weights)]
    # All heads in one call: the gradient of the one matrix that they share is then added up in one place.
    prediction_loss, nats_N = cross_entropy(
        hidden_LBTD.reshape(-1, hidden_LBTD.shape[-1]),
        gather.array('head_DV', params['head_DV'], model, parallel),
        targets_LBT.reshape(-1),
        (weights_LBT * jnp.stack(factors)[:, None, None]).reshape(-1),
        model,
        config.rows_per_chunk,
    )
    nats, *mtp_nats = jnp.sum(nats_N.reshape(weights_LBT.shape) * weights_LBT, axis=(1, 2))
    mtp_losses = [nats / weight for nats, weight in zip(mtp_nats, whole.mtp_weights, strict=True)]
    mtp_loss = sum(mtp_losses, start=jnp.zeros(())) / max(model.mtp_depth, 1)
    # A mean over the batch's sequences, so a part counts by how many of them it has.
    balance_loss = states.balance_loss_L.sum() * (len(tokens) / whole.num_sequences)
    total = prediction_loss + config.balance_weight * balance_loss
    return total, Losses(nats / whole.weight, mtp_loss, balance_loss, nats, states.load_LE, states.dropped_L.sum())


def _targets(batch: Mapping[str, Array], mtp_depth: int) -> tuple[Int[Array, 'L B T'], Float[Array, 'L B T']]:
    """Targets and their weights: of the next token, then of each depth, those past the end with weight zero."""
    tokens, segments = batch['tokens'], batch['segments']
    targets, weights = [tokens[:, 1:]], [batch['weights']]
    for k in range(1, mtp_depth + 1):
        targets.append(jnp.pad(tokens[:, k + 1 :], ((0, 0), (0, k))))
        weights.append(jnp.pad(_same_document(segments, k + 1), ((0, 0), (0, k))))
    return jnp.stack(targets), jnp.stack(weights)


def _same_document(segments: Array, distance: int) -> Array:
    """1 where a token and the one `distance` places on belong to the same document, float32."""
    here, there = segments[:, :-distance], segments[:, distance:]
    return ((here == there) & (there > 0)).astype(jnp.float32)
