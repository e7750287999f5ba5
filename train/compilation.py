"""The compiled programs of a run's steps, kept for the next start."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import deepseek_jax as ds
from train import memory
from train.guard import GuardConfig
from train.loss import ObjectiveConfig
from train.optimizer import OptimizerConfig
from train.parallel import Layout
from train.step import Hyperparameters, State, StepMetrics, jit_step

logger = logging.getLogger(__name__)

type Shape = tuple[int, int]
"""Sequences of a batch, and targets of each."""


def keep_programs() -> str | None:
    """Makes JAX keep what it compiles for the next start, and returns the directory; None if it keeps nothing.

    What the environment says (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) stays; else the directory is
    `deepseek_v3_jax/jax` under XDG_CACHE_HOME or ~/.cache. JAX runs what it reads there, so it must be the user's own.
    Programs that compile within a second are not kept.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
        directory = root / 'deepseek_v3_jax' / 'jax'
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning('compiled programs are not kept: %s', error)
            return None
        jax.config.update('jax_compilation_cache_dir', str(directory))
    return jax.config.jax_compilation_cache_dir or None


@dataclasses.dataclass(kw_only=True)
class StepPrograms:
    """`train_step` as one program a shape of batches, compiled when the first one of it comes.

    Where a program does not fit on the device, the error says what would: that takes a few compilations.

    Attributes:
      model, optimizer, objective, guard, layout: what `train_step` is compiled for.
      microbatch_size: of whole sequences; of shorter ones there are as many tokens in a microbatch.
      batch_sizes: of the whole run, which another microbatch size would have to divide.
      sequence_length: of whole sequences.
      report: shows a line to the user.
    """

    model: ds.ModelConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    guard: GuardConfig
    microbatch_size: int | None
    batch_sizes: Sequence[int]
    sequence_length: int
    report: Callable[[str], None]
    layout: Layout | None = None

    def __post_init__(self) -> None:
        self._lowered: dict[Shape, jax.stages.Lowered] = {}
        self._programs: dict[Shape, jax.stages.Compiled] = {}
        self._alone: set[Shape] = set()

    def has(self, batch: Mapping[str, jax.Array]) -> bool:
        """Whether the program for this batch is compiled."""
        return _shape(batch) in self._programs

    def compile(self, state: State, batch: Mapping[str, jax.Array], values: Hyperparameters) -> float:
        """Compiles the program for such a batch and returns the seconds that took, tracing included."""
        self._shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (state, dict(batch))
        )
        self._values = values
        began = time.monotonic()
        with self.explained():
            self._lowered[_shape(batch)] = self._lower(self._present())
            program = self._programs[_shape(batch)] = self._lowered[_shape(batch)].compile()
        if not memory.fits_twice(program, memory.available_bytes()):
            self._alone.add(_shape(batch))
        return time.monotonic() - began

    def __call__(
        self, state: State, batch: Mapping[str, jax.Array], values: Hyperparameters
    ) -> tuple[State, StepMetrics]:
        """`train_step`, with its program compiled before.

        A step's temporaries are taken when it is given to the device: where those of two do not fit, the step before
        is waited for.
        """
        with self.explained():
            if _shape(batch) in self._alone:
                jax.block_until_ready(state)
            return self._programs[_shape(batch)](state, dict(batch), values)

    def launch_separately(self) -> None:
        """Compiles every program once more, with each kernel launched by itself: in a trace, a kernel that a graph
        launches bears nothing of the instruction it belongs to."""
        for shape, lowered in self._lowered.items():
            self._programs[shape] = lowered.compile({'xla_gpu_graph_min_graph_size': 2**30})

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises `memory.OutOfMemoryError` in place of JAX's error, also where a step's results are waited for."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error):
                raise
            self.report('out of memory: compiling the training step in smaller parts to see what fits')
            multiple = 1 if self.layout is None else self.layout.row_multiple
            sizes = memory.divisors(self.batch_sizes, multiple)
            text = memory.explain(self._present(), sizes, self._needed_bytes, memory.available_bytes())
            raise memory.OutOfMemoryError(text) from error

    def _present(self) -> memory.Setting:
        rows, _ = _shape(self._shapes[1])
        return memory.Setting(self.microbatch_size or rows // self._pieces, self.model.remat)

    @property
    def _pieces(self) -> int:
        """Sequences that a whole one is cut into."""
        _, length = _shape(self._shapes[1])
        return self.sequence_length // length

    def _needed_bytes(self, setting: memory.Setting) -> int | float | None:
        try:
            return memory.needed_bytes(self._lower(setting).compile())
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error):
                raise
            return math.inf

    def _lower(self, setting: memory.Setting) -> jax.stages.Lowered:
        places, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, self._shapes[0]))
        traced = _step_to(tuple(places), tree).trace(
            *self._shapes,
            self._values,
            model=dataclasses.replace(self.model, remat=setting.remat),
            optimizer=self.optimizer,
            config=self.objective,
            guard=self.guard,
            microbatch_size=setting.microbatch_size * self._pieces,
            layout=self.layout,
        )
        return traced.lower()


@functools.cache
def _step_to(places: tuple[jax.sharding.Sharding, ...], tree: Any) -> jax.stages.Wrapped:
    """The step whose state stays where it is, so that the next step's program takes it; one function for each place,
    for JAX to find what it has traced and compiled."""
    return jit_step(jax.tree.unflatten(tree, places))


def _shape(batch: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> Shape:
    rows, length = batch['weights'].shape
    return rows, length
