"""Held-out text: how well parameters predict it, and which experts it goes to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import deepseek_jax as ds
from train import data
from train.loss import ObjectiveConfig
from train.parallel import Layout
from train.step import as_batch, eval_step


class Heldout(NamedTuple):
    """An evaluation.

    Attributes:
      bits_per_byte: of the text that the targets stand for.
      loss: nats a target.
      load_LE: tokens sent to each expert, numpy int64.
      dropped: choices of experts that were not computed for want of room.
    """

    bits_per_byte: float
    loss: float
    load_LE: np.ndarray
    dropped: int


def evaluate(
    params: Any,
    batches: Iterator[data.Row],
    byte_lengths: np.ndarray,
    model: ds.ModelConfig,
    objective: ObjectiveConfig,
    layout: Layout | None = None,
    add_up: Callable[[Sequence[int]], Sequence[int]] = lambda counts: counts,
) -> Heldout:
    """The evaluation of parameters on batches of held-out rows, by `Tokenizer.byte_lengths()`.

    Where the batches are a process's share of the rows, `add_up` adds up what all processes have counted in theirs.
    """
    nats, weight, num_bytes, load, dropped = 0.0, 0, 0, 0, 0
    for rows in batches:
        losses = eval_step(params, as_batch(rows, layout), model=model, config=objective, layout=layout)
        nats += float(losses.nats)
        weight += int(rows['weights'].sum())
        num_bytes += data.target_bytes(rows, byte_lengths)
        load = load + np.asarray(losses.load_LE, np.int64)
        dropped += int(losses.dropped)
    weight, num_bytes = add_up([weight, num_bytes])
    return Heldout(data.bits_per_byte(nats, num_bytes), nats / weight, np.asarray(load), dropped)
