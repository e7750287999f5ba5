"""One start of a run: batches in, steps and evaluations, lines out."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import deepseek_jax as ds
from train import data as data_lib
from train import evaluation, parallel, plot, processes
from train.checkpoint import Progress
from train.compilation import StepPrograms
from train.ema import MovingAverage, on_devices
from train.guard import GuardConfig, check_streak, why_skipped
from train.loss import ObjectiveConfig
from train.metrics import METRICS_FILE, TIMING_FILE, MetricsFile, NoDisplay, NoFile, ProgressDisplay, read_jsonl
from train.optimizer import OptimizerConfig
from train.parallel import Layout
from train.step import Hyperparameters, State, StepMetrics, as_batch

PLOT_FILE = 'loss.png'


class Result(NamedTuple):
    """How a start of a run ended.

    Attributes:
      step: the last one taken.
      heldout_bits_per_byte: of the last evaluation; None if there was none yet.
      finished: whether the run is at its end; else it was asked to stop, and a checkpoint of that step is saved.
    """

    step: int
    heldout_bits_per_byte: float | None
    finished: bool = True


class Input(NamedTuple):
    """A batch on the device.

    Attributes:
      batch: its arrays.
      num_tokens: targets, of all processes together.
      num_bytes: bytes of text that this process's targets with a weight stand for.
      progress: once it has been trained on.
    """

    batch: dict[str, jax.Array]
    num_tokens: int
    num_bytes: int
    progress: Progress


def batches(
    rows: Any,
    progress: Progress,
    total_steps: int,
    size: Callable[[int], int],
    shares: int = 1,
    length: Callable[[int], int] | None = None,
) -> Iterator[tuple[data_lib.Row, Progress]]:
    """Batches up to the last step, each with the progress once it has been trained on.

    Args:
      rows: one after the other; where they are in several shares, those of one.
      progress: what was trained on before.
      total_steps: of the run.
      size: rows of a batch, by the tokens before it.
      shares: of the rows.
      length: of the sequences that rows are cut into, by the same; None leaves them whole.
    """
    while progress.step < total_steps:
        seen = progress.tokens
        batch = data_lib.batch(rows, size(seen) // shares)
        progress = Progress(
            step=progress.step + 1,
            tokens=progress.tokens + batch['weights'].size * shares,
            next_row=progress.next_row + len(batch['weights']) * shares,
        )
        yield batch if length is None else data_lib.cut_rows(batch, length(seen)), progress


class _Taken(NamedTuple):
    """A step that was given to the device, whose measurements are not read yet."""

    given: Input
    values: Hyperparameters
    metrics: StepMetrics
    sums: processes.Sum
    waited: float
    compile_seconds: float | None


@dataclasses.dataclass(kw_only=True)
class Loop:
    """One start of a run: takes steps and evaluations and writes down what they measured.

    A step's measurements are read after the next step has been given to the device, so that it never waits. Of several
    processes each has a Loop, and that of the main one alone writes.

    Attributes:
      share: which share of the rows this process reads, and how many there are.
      asked_to_stop: whether a process was, by the last step whose lines are written: the same one for all.
    """

    directory: pathlib.Path
    corpus: data_lib.Corpus
    model: ds.ModelConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    guard: GuardConfig
    average: MovingAverage | None
    microbatch_size: int | None
    batch_sizes: list[int]
    sequence_length: int
    eval_rows: int
    eval_batch_size: int
    total_steps: int
    total_tokens: int
    resume_step: int
    layout: Layout | None = None
    share: tuple[int, int] = (0, 1)
    asked_to_stop: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        self._byte_lengths = self.corpus.tokenizer.byte_lengths()
        writes = processes.is_main()
        self._metrics = MetricsFile(self.directory / METRICS_FILE, self.resume_step) if writes else NoFile()
        self._timing = MetricsFile(self.directory / TIMING_FILE, self.resume_step) if writes else NoFile()
        self._display = ProgressDisplay(self.total_steps, self.resume_step) if writes else NoDisplay()
        self._sums = processes.Sums()
        self._programs = StepPrograms(
            model=self.model,
            optimizer=self.optimizer,
            objective=self.objective,
            guard=self.guard,
            microbatch_size=self.microbatch_size,
            batch_sizes=self.batch_sizes,
            sequence_length=self.sequence_length,
            report=self._display.message,
            layout=self.layout,
        )
        self._pending: _Taken | None = None
        self._num_steps, self._num_skipped, self._waited = 0, 0, 0.0
        self._began = self._last_time = time.monotonic()

    def prepare(self, batch: tuple[data_lib.Row, Progress]) -> Input:
        """A batch on its way to the device; called in another thread."""
        rows, progress = batch
        num_bytes = data_lib.target_bytes(rows, self._byte_lengths)
        return Input(as_batch(rows, self.layout), rows['weights'].size * self.share[1], num_bytes, progress)

    def step(self, state: State, given: Input, waited: float, stop: bool = False) -> State:
        """Takes a step with a batch that was waited for so many seconds; `stop` says that this process was asked to."""
        values = self._hyperparameters(given)
        compile_seconds = None if self._programs.has(given.batch) else self._compile(state, given, values)
        state, metrics = self._programs(state, given.batch, values)
        sums = self._sums.begin([self._counted(given.num_bytes), stop])
        if self.average is not None:
            self.average.step(state.params, given.progress.step)
        self.write_pending()
        self._pending = _Taken(given, values, metrics, sums, waited, compile_seconds)
        return state

    def launch_separately(self) -> None:
        """Makes the steps that follow launch each kernel by itself, for a trace."""
        self.write_pending()
        self._programs.launch_separately()
        self._last_time = time.monotonic()

    def write_pending(self) -> None:
        """Writes the lines of the last step, if they are not written yet.

        Raises `SkippedStepsError` if too many in a row were skipped, one step late: what was given to the device since
        then is forgotten.
        """
        if self._pending is None:
            return
        (given, values, metrics, sums, waited, compile_seconds), self._pending = self._pending, None
        with self._programs.explained():
            losses, grad_norm, verdict = jax.device_get(metrics)
        num_bytes, asked = sums.value()
        self.asked_to_stop |= asked > 0
        step = given.progress.step
        load = np.asarray(losses.load_LE, np.float64)
        bits_per_byte = data_lib.bits_per_byte(float(losses.nats), num_bytes) if num_bytes else None
        reason = why_skipped(verdict, float(grad_norm))
        self._metrics.write(
            step=step,
            loss=float(losses.loss),
            bits_per_byte=bits_per_byte,
            mtp_loss=float(losses.mtp_loss),
            balance_loss=float(losses.balance_loss),
            grad_norm=float(grad_norm),
            learning_rate=values.learning_rate,
            mtp_weight=values.mtp_weight,
            bias_rate=values.bias_rate,
            load_max_over_mean=np.round(load.max(-1) / load.mean(-1), 6).tolist() if load.size else [],
            **self._dropped(int(losses.dropped)),
            **({} if reason is None else {'skipped': reason}),
        )
        now = time.monotonic()
        rate = given.num_tokens / (now - self._last_time)
        self._timing.write(
            step=step,
            seconds=round(now - self._last_time, 4),
            tokens_per_second=round(rate, 1),
            input_wait_seconds=round(waited, 4),
            **({} if compile_seconds is None else {'compile_seconds': round(compile_seconds, 4)}),
        )
        self._last_time = now
        self._num_steps += 1
        self._waited += waited
        self._display.update(step, float(losses.loss), bits_per_byte, rate)
        if losses.dropped:
            share = int(losses.dropped) / load.sum()
            self._display.message(
                f'step {step}: {losses.dropped:,} choices of experts ({share:.3%}) found no room on their devices'
            )
        if reason is not None:
            self._num_skipped += 1
            self._display.message(f'step {step} skipped: {reason}')
            check_streak(verdict, step, reason, self.guard)

    def evaluate(self, state: State, progress: Progress) -> None:
        """Reads held-out text and writes an evaluation line and the picture."""
        self.write_pending()
        found = self._heldout(state.params)
        text = f'step {progress.step}: held-out {found.bits_per_byte:.4f} bits a byte'
        load, averaged = found.load_LE, {}
        if self.average is not None and self.average.value().updates:
            bits_per_byte = self._heldout(on_devices(self.average.value().params, state.params)).bits_per_byte
            averaged = {'heldout_ema_bits_per_byte': bits_per_byte}
            text += f', {bits_per_byte:.4f} with averaged parameters'
        self._metrics.write(
            step=progress.step,
            tokens=progress.tokens,
            heldout_bits_per_byte=found.bits_per_byte,
            heldout_loss=found.loss,
            expert_load=np.round(load / np.maximum(np.sum(load, -1, keepdims=True), 1), 6).tolist(),
            **self._dropped(found.dropped),
            **averaged,
        )
        self._display.message(text)
        if processes.is_main():
            plot.plot_run(read_jsonl(self.directory / METRICS_FILE), self.directory / PLOT_FILE)
        self._last_time = time.monotonic()

    def finish(self, step: int) -> Result:
        """The result after this step, and a line that sums up."""
        if self._num_steps:
            seconds = time.monotonic() - self._began
            self._display.message(
                f'{self._num_steps} steps in {seconds:.0f} s, {self._num_skipped} of them skipped; '
                f'{self._waited:.1f} s ({self._waited / seconds:.1%}) waiting for input'
            )
        lines = [line for line in read_jsonl(self.directory / METRICS_FILE) if 'heldout_bits_per_byte' in line]
        return Result(step, lines[-1]['heldout_bits_per_byte'] if lines else None, step == self.total_steps)

    def close(self) -> None:
        self._display.close()
        self._metrics.close()
        self._timing.close()
        if self.average is not None:
            self.average.close()

    def _dropped(self, count: int) -> dict[str, int]:
        """The metric of choices of experts that were not computed, where there can be some."""
        experts = None if self.layout is None else self.layout.parallel.experts
        return {} if experts is None or experts.capacity_factor is None else {'dropped_choices': count}

    def _heldout(self, params: Any) -> evaluation.Heldout:
        share, shares = self.share
        batches = data_lib.heldout_batches(
            self.corpus, self.sequence_length, self.eval_batch_size // shares, self.eval_rows, share, shares
        )
        add_up = lambda counts: self._sums.begin([self._counted(count) for count in counts]).value()  # noqa: E731
        return evaluation.evaluate(params, batches, self._byte_lengths, self.model, self.objective, self.layout, add_up)

    def _counted(self, count: int) -> int:
        """What this process adds to a sum over rows: nothing, if another one that has the same rows does."""
        return count if parallel.is_first_of_share(self.layout) else 0

    def _compile(self, state: State, given: Input, values: Hyperparameters) -> float:
        # The step before must not wait for this to be read, nor its seconds count it.
        self.write_pending()
        seconds = self._programs.compile(state, given.batch, values)
        rows, length = given.batch['weights'].shape
        self._display.message(f'step for {rows} x {length} tokens compiled in {seconds:.1f} s')
        self._last_time = time.monotonic()
        return seconds

    def _hyperparameters(self, given: Input) -> Hyperparameters:
        tokens = given.progress.tokens - given.num_tokens
        at = functools.partial(lambda curve: curve(tokens, self.total_tokens))
        warmup = min(1.0, given.progress.step / max(self.optimizer.warmup_steps, 1))
        return Hyperparameters(
            learning_rate=at(self.optimizer.learning_rate) * warmup,
            mtp_weight=at(self.objective.mtp_weight),
            bias_rate=at(self.objective.bias_rate),
        )
