"""Checkpoints of a training run: asynchronous, whole or absent, with a policy for which to keep."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from deepseek_jax.checkpoint import CHECKPOINTS, PARAMS, load_parts
from deepseek_jax.config import check_types, require_positive
from train.ema import Average, host_parts, is_whole, on_devices
from train.step import State

_AVERAGE = 'average'


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints stay.

    Attributes:
      keep: the newest ones.
      keep_every: also those at multiples of this many steps; None keeps no others.
    """

    keep: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'keep', 'keep_every')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come.

    Attributes:
      step: optimizer steps taken.
      tokens: tokens seen.
      next_row: rows that all processes together have taken of the global order.
    """

    step: int = 0
    tokens: int = 0
    next_row: int = 0


class Checkpoints:
    """Saves and restores the state and progress of one run directory."""

    def __init__(self, run_dir: pathlib.Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every is not None:
            keep.append(policies.EveryNSteps(config.keep_every))
        # The loop decides when to save.
        every_save: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            str((run_dir / CHECKPOINTS).absolute()),
            save_decision_policy=every_save,
            preservation_policy=policies.AnyPreservationPolicy(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step; None before the first."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: State, progress: Progress, average: Average | None = None) -> None:
        """Begins to save; the arrays may be donated as soon as this returns. A step saved before is left alone."""
        if progress.step == self.latest_step:
            return
        parts = _parts(state) | {'progress': dataclasses.asdict(progress)}
        if average is not None:
            whole = all(map(is_whole, jax.tree.leaves(state.params)))
            params = average.params if whole else on_devices(average.params, state.params)
            parts[_AVERAGE] = average._replace(params=params)._asdict()
        self._checkpointer.save_checkpointables_async(progress.step, parts)

    def restore(self, shapes: State) -> tuple[State, Progress]:
        """State and progress of the newest checkpoint. Raises `ValueError` if it is of another shape."""
        step = self.latest_step
        assert step is not None
        loaded = load_parts(self._checkpointer, step, _parts(shapes))
        progress = self._checkpointer.load_checkpointables(step, {'progress': None})['progress']
        return State(*(loaded[part] for part in _parts(shapes))), Progress(**jax.tree.map(int, progress))

    def restore_average(self, params: Any) -> Average | None:
        """The average in the newest checkpoint, for parameters like these, on the host; None if it has none."""
        step = self.latest_step
        if step is None or _AVERAGE not in self._checkpointer.checkpointables_metadata(step).metadata:
            return None
        # Arrays of numpy stand for themselves: what is loaded in their place never goes through the device.
        wanted = jax.tree.map(
            lambda leaf: (
                np.zeros(leaf.shape, np.float32)
                if is_whole(leaf)
                else jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)
            ),
            params,
        )
        average = Average(**load_parts(self._checkpointer, step, {_AVERAGE: Average(wanted, 0)._asdict()})[_AVERAGE])
        return average._replace(params=jax.tree.map(np.asarray, host_parts(average.params)))

    def close(self) -> None:
        """Waits until what was begun is on disk."""
        self._checkpointer.close()


def _parts(state: State) -> dict[str, Any]:
    """The state as named parts of a checkpoint, in its order."""
    return {PARAMS: state.params, 'optimizer': state.optimizer, 'guard': state.guard}
