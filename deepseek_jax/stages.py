"""The expert layers as a pipeline: each device holds a stretch of them, and microbatches travel from one to the next
[GPipe, arXiv 1811.06965].

What is before and after these layers (embedding, dense layers, head, prediction modules) every device computes for rows of its own.
They are cut into microbatches, those of all devices pass through all stages, and come back:

  3 stages, a microbatch of each device      tick   0  1  2  3  4
                                        stage 0     a  b  c
                                        stage 1        a  b  c
                                        stage 2           a  b  c

So a pass takes stages * parts + stages - 1 ticks, of which a device works in stages * parts: the share of the others is
(stages - 1) / (stages * parts + stages - 1). In them it computes what nobody reads, so that all run one program. The backward
pass is what JAX makes of it, in the same ticks from the last to the first.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepseek_jax import moe
from deepseek_jax.mla import Attend
from deepseek_jax.sharding import STAGE_AXIS, StageParallel


def through_stages(
    stack: nn.Module, x_BTD: Float[Array, 'B T D'], attend: Attend, stages: StageParallel
) -> tuple[Float[Array, 'B T D'], moe.Balance]:
    """Applies layers that are cut over `stages`, inside `jax.shard_map`.

    Args:
      stack: this device's layers, from and to hidden states, as `nn.scan` makes them of `Block`.
      x_BTD: of this device's rows.
      attend: of these rows, whose positions are the same in all.
      stages: how many there are, and how rows are cut.

    Returns:
      What all layers make of the rows, and how evenly experts were used: of all layers, zeros for those of other devices,
      and for the rows of all devices along `stage`; the loss as a mean that counts as one over this device's rows does.

    Raises:
      ValueError: the rows cannot be cut into `stages.parts`.
    """
    B, T, D = x_BTD.shape
    if B % stages.parts:
        raise ValueError(f'{B} rows of a device cannot be cut into {stages.parts} parts for the stages')
    rows, count = B // stages.parts, stages.devices * stages.parts
    stage = lax.axis_index(STAGE_AXIS)
    x_MBTD = _of_all(x_BTD).reshape(count, rows, T, D)
    first_MBT = None if attend.first_BT is None else _of_all(attend.first_BT).reshape(count, rows, T)

    def tick(stack: nn.Module, incoming_BTD: Array, number: Array) -> tuple[Array, tuple[Array, Any]]:
        microbatch = number - stage
        chosen = jnp.clip(microbatch, 0, count - 1)
        taken_BTD = jnp.where(stage == 0, x_MBTD[chosen], incoming_BTD)
        first_BT = None if first_MBT is None else first_MBT[chosen]
        y_BTD, (_, balance) = stack(taken_BTD, Attend(attend.positions_BT[:rows], attend.rotation, first_BT), None)
        is_one = (microbatch >= 0) & (microbatch < count)
        balance = jax.tree.map(lambda value: jnp.where(is_one, value, 0), balance)
        with jax.named_scope(STAGE_AXIS):
            sent_BTD = lax.ppermute(y_BTD, STAGE_AXIS, [(i, i + 1) for i in range(stages.devices - 1)])
        return sent_BTD, (y_BTD, balance)

    ticks = nn.scan(tick, variable_broadcast='params', split_rngs={'params': False})
    numbers = jnp.arange(count + stages.devices - 1)
    _, (y_NBTD, balance) = ticks(stack, jnp.zeros((rows, T, D), x_BTD.dtype), numbers)
    # What the last stage made of a microbatch goes back to the device that it is from.
    done_MBTD = jnp.where(stage == stages.devices - 1, y_NBTD[stages.devices - 1 :], 0)
    with jax.named_scope(STAGE_AXIS):
        y_BTD = lax.psum_scatter(done_MBTD.reshape(stages.devices, B, T, D), STAGE_AXIS)
    return y_BTD, _among_all_layers(jax.tree.map(lambda values: values.sum(axis=0), balance), stage, stages)


@jax.named_scope(STAGE_AXIS)
def _of_all(x: Array) -> Array:
    return lax.all_gather(x, STAGE_AXIS)


def _among_all_layers(balance: moe.Balance, stage: Array, stages: StageParallel) -> moe.Balance:
    balance = balance._replace(loss=balance.loss / stages.parts)

    def placed(values: Array) -> Array:
        whole = jnp.zeros((stages.devices, *values.shape), values.dtype)
        return whole.at[stage].set(values).reshape(-1, *values.shape[1:])

    return jax.tree.map(placed, balance)
