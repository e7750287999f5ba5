"""Steps whose loss or gradient cannot be right: skipped on the device, counted, and after some in a row the end.

A step is bad if its loss or its gradient's norm is not finite, or if the norm exceeds `factor` times the median of the
last `window` accepted norms, once there are `min_history` of them. A bad step changes neither parameters, moments nor
routers' biases; its batch is not read again. The device decides, so the host need not wait for the norm; what it
decides from is part of the state, so a resumed run decides as an uninterrupted one.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.config import check_types, require_positive
from train.errors import TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are skipped, and when to stop.

    Attributes:
      window: accepted gradient norms that the median is of; part of the checkpoints' shape.
      factor: times the median that a gradient norm may reach.
      min_history: accepted norms before the median counts; until then only loss and norm must be finite.
      max_in_a_row: skipped steps, one after the other, that end the run.
    """

    window: int = 128
    factor: float = 10.0
    min_history: int = 32
    max_in_a_row: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'window', 'min_history', 'max_in_a_row')
        if self.min_history > self.window:
            raise ValueError(f'GuardConfig.min_history={self.min_history} exceeds window={self.window}')
        if not self.factor > 1:
            raise ValueError(f'GuardConfig.factor={self.factor} must be above 1: the median itself is no outlier')


DEFAULT = GuardConfig()


class GuardState(NamedTuple):
    """What the next step is judged by.

    Attributes:
      norms: the last accepted gradient norms in a ring: norm k (0, 1, ...) at place k modulo the window.
      accepted: how many there have been.
      skipped_in_a_row: steps skipped since the last accepted one.
    """

    norms: Float[Array, ' window']
    accepted: Int[Array, '']
    skipped_in_a_row: Int[Array, '']


class Verdict(NamedTuple):
    """What became of a step.

    Attributes:
      reason: 0 if it was accepted, else one of the constants below.
      limit: what its gradient norm was held against; infinity without enough history.
      skipped_in_a_row: steps skipped since the last accepted one, this one included.
    """

    reason: Int[Array, '']
    limit: Float[Array, '']
    skipped_in_a_row: Int[Array, '']

    @property
    def accepted(self) -> Bool[Array, '']:
        return self.reason == 0


BAD_LOSS, BAD_NORM, LARGE_NORM = 1, 2, 3


class SkippedStepsError(TrainingError):
    """Too many steps in a row were skipped."""


def no_history(config: GuardConfig) -> GuardState:
    """The state before the first step."""
    return GuardState(jnp.zeros(config.window, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    history: GuardState, loss: Float[Array, ''], grad_norm: Float[Array, ''], config: GuardConfig
) -> tuple[Verdict, GuardState]:
    """Whether a step is taken, and the history with it.

    `loss` is the whole objective's.
    """
    window = len(history.norms)
    filled = jnp.minimum(history.accepted, window)
    ordered = jnp.sort(jnp.where(jnp.arange(window) < filled, history.norms, jnp.inf))
    median = (ordered[(filled - 1) // 2] + ordered[filled // 2]) / 2
    limit = jnp.where(history.accepted >= config.min_history, config.factor * median, jnp.inf)
    bad = [~jnp.isfinite(loss), ~jnp.isfinite(grad_norm), grad_norm > limit]
    reason = jnp.select(bad, [BAD_LOSS, BAD_NORM, LARGE_NORM], 0).astype(jnp.int32)
    in_a_row = jnp.where(reason == 0, 0, history.skipped_in_a_row + 1)
    longer = history.norms.at[history.accepted % window].set(grad_norm)
    norms = jnp.where(reason == 0, longer, history.norms)
    return Verdict(reason, limit, in_a_row), GuardState(norms, history.accepted + (reason == 0), in_a_row)


def why_skipped(verdict: Verdict, grad_norm: float) -> str | None:
    """The reason in words; None for an accepted step."""
    texts = {
        BAD_LOSS: 'the loss is not finite',
        BAD_NORM: 'the gradient norm is not finite',
        LARGE_NORM: f'the gradient norm {grad_norm:.6g} exceeds the limit {float(verdict.limit):.6g}',
    }
    return texts.get(int(verdict.reason))


def check_streak(verdict: Verdict, step: int, reason: str, config: GuardConfig) -> None:
    """Raises `SkippedStepsError` if `step` was the last of too many skipped in a row."""
    in_a_row = int(verdict.skipped_in_a_row)
    if in_a_row >= config.max_in_a_row:
        raise SkippedStepsError(
            f'the last {in_a_row} steps were skipped (GuardConfig.max_in_a_row={config.max_in_a_row}); of step {step} '
            f'{reason}; none of them changed the parameters, and starting again goes on from the newest checkpoint'
        )
