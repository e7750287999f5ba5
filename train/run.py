"""The training loop."""

import dataclasses
import functools
import inspect
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax import checkpoint as run_files
from deepseek_jax import flops
from deepseek_jax.config import check_values
from train import data as data_lib
from train import plot, schedule
from train.checkpoint import CheckpointConfig, Checkpoints, Progress
from train.data import DataConfig
from train.loss import ObjectiveConfig
from train.metrics import METRICS_FILE, TIMING_FILE, MetricsFile, ProgressDisplay, read_jsonl
from train.optimizer import OptimizerConfig
from train.step import Hyperparameters, State, StepMetrics, as_batch, eval_step, init_state, train_step

CONFIG_FILE = 'config.gin'
PLOT_FILE = 'loss.png'


class Result(NamedTuple):
    """How a run ended."""

    step: int
    heldout_bits_per_byte: float


def train(
    *,
    model: ds.ModelConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    checkpoints: CheckpointConfig,
    total_steps: int,
    batch_size: int,
    sequence_length: int,
    checkpoint_every: int,
    eval_every: int,
    eval_rows: int,
    seed: int,
    batch_ramp: schedule.BatchRamp | None = None,
    init_from: str | None = None,
    run_dir: str | None = None,
    config_text: Callable[[], str] | None = None,
    print_only: bool = False,
) -> Result | None:
    """Trains a model, or goes on with the run that `run_dir` holds, and returns how it ended.

    A run that was stopped at any moment and started again ends in the same state, bit for bit, as one that was not.

    Args:
      model: the model.
      data: what to train on.
      optimizer: AdamW and its learning rate.
      objective: the loss and the load rule.
      checkpoints: which checkpoints stay.
      total_steps: optimizer steps of the whole run.
      batch_size: sequences a step.
      sequence_length: tokens a sequence.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      eval_every: steps between evaluations on held-out text; the last step is always evaluated.
      eval_rows: held-out sequences an evaluation reads.
      seed: of the initial parameters and the order of the data.
      batch_ramp: smaller batches at the beginning; `batch_size` is the final size.
      init_from: a run directory or a published checkpoint whose parameters a new run starts from.
      run_dir: where everything is written; made if it does not exist.
      config_text: gives the configuration as text, to be kept in the run directory.
      print_only: print the counts of the model and the run and return None.

    Raises:
      ValueError, TypeError: a value that cannot be trained with; nothing has been written.
      FileNotFoundError: `init_from` or the data does not exist.
    """
    arguments = dict(locals())
    _check_arguments(arguments)
    tokens = schedule.total_tokens(total_steps, batch_size, sequence_length, batch_ramp)
    if print_only:
        print(_describe(model, sequence_length, tokens))
        return None
    if run_dir is None:
        raise ValueError('run_dir=None: name the directory that the run is written to')
    directory = pathlib.Path(run_dir)
    _check_run_dir(directory, model, _tokenizer_name(data))
    corpus = data_lib.load_corpus(data)
    _check_vocabulary(corpus, model)
    rows = data_lib.training_rows(corpus, sequence_length, seed)
    saved = Checkpoints(directory, checkpoints) if (directory / run_files.CHECKPOINTS).exists() else None
    state, progress = _restore_or_init(saved, model, optimizer, seed, init_from)
    if progress.step > total_steps:
        raise ValueError(f'{total_steps=} is below step {progress.step}, which {directory} has already reached')
    saved = saved or _make_run_dir(directory, model, corpus, checkpoints)
    if config_text is not None:
        (directory / CONFIG_FILE).write_text(config_text(), encoding='utf-8')
    loop = _Loop(
        directory=directory,
        corpus=corpus,
        model=model,
        optimizer=optimizer,
        objective=objective,
        sequence_length=sequence_length,
        eval_rows=eval_rows,
        eval_batch_size=min(batch_size, eval_rows),
        total_steps=total_steps,
        total_tokens=tokens,
        resume_step=progress.step,
    )
    print(
        f'{flops.count_parameters(model)}; {len(corpus.train.tokens):,} training tokens in '
        f'{len(corpus.train.names):,} documents; {directory}: from step {progress.step} to {total_steps}',
        file=sys.stderr,
    )
    rows.set_state({'next_index': progress.next_row})
    size = functools.partial(batch_ramp, final=batch_size) if batch_ramp is not None else lambda tokens: batch_size
    try:
        for batch, next_progress in _batches(rows, progress, total_steps, size):
            state = loop.step(state, batch, progress)
            progress = next_progress
            if progress.step % eval_every == 0 or progress.step == total_steps:
                loop.evaluate(state, progress)
            if progress.step % checkpoint_every == 0 or progress.step == total_steps:
                # A run that resumes from this step does not take it again: its line must be there.
                loop.write_pending()
                saved.save(state, progress)
        return loop.finish()
    finally:
        loop.close()
        saved.close()


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """One start of a run: takes steps and evaluations and writes down what they measured.

    A step's measurements are read after the next step has been given to the device, so that it never waits.
    """

    directory: pathlib.Path
    corpus: data_lib.Corpus
    model: ds.ModelConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    sequence_length: int
    eval_rows: int
    eval_batch_size: int
    total_steps: int
    total_tokens: int
    resume_step: int

    def __post_init__(self) -> None:
        self._byte_lengths = self.corpus.tokenizer.byte_lengths()
        self._metrics = MetricsFile(self.directory / METRICS_FILE, self.resume_step)
        self._timing = MetricsFile(self.directory / TIMING_FILE, self.resume_step)
        self._display = ProgressDisplay(self.total_steps, self.resume_step)
        self._pending: tuple[int, int, int, Hyperparameters, StepMetrics] | None = None
        self._last_time = time.monotonic()

    def step(self, state: State, rows: data_lib.Row, progress: Progress) -> State:
        """Takes the step after `progress`."""
        values = self._hyperparameters(progress)
        state, metrics = train_step(
            state,
            as_batch(rows),
            values,
            model=self.model,
            optimizer=self.optimizer,
            config=self.objective,
        )
        self.write_pending()
        num_bytes = data_lib.target_bytes(rows, self._byte_lengths)
        self._pending = (progress.step + 1, rows['weights'].size, num_bytes, values, metrics)
        return state

    def evaluate(self, state: State, progress: Progress) -> None:
        """Reads held-out text and writes an evaluation line and the picture."""
        self.write_pending()
        nats, weight, num_bytes, load = 0.0, 0.0, 0, 0
        batches = data_lib.heldout_batches(
            self.corpus, self.sequence_length, self.eval_batch_size, max_rows=self.eval_rows
        )
        for rows in batches:
            losses = eval_step(state.params, as_batch(rows), model=self.model, config=self.objective)
            nats += float(losses.nats)
            weight += float(rows['weights'].sum())
            num_bytes += data_lib.target_bytes(rows, self._byte_lengths)
            load = load + np.asarray(losses.load_LE, np.int64)
        bits_per_byte = data_lib.bits_per_byte(nats, num_bytes)
        self._metrics.write(
            step=progress.step,
            tokens=progress.tokens,
            heldout_bits_per_byte=bits_per_byte,
            heldout_loss=nats / weight,
            expert_load=np.round(load / np.maximum(np.sum(load, -1, keepdims=True), 1), 6).tolist(),
        )
        self._display.message(f'step {progress.step}: held-out {bits_per_byte:.4f} bits a byte')
        plot.plot_run(read_jsonl(self.directory / METRICS_FILE), self.directory / PLOT_FILE)
        self._last_time = time.monotonic()

    def finish(self) -> Result:
        """The last evaluation's result."""
        lines = [line for line in read_jsonl(self.directory / METRICS_FILE) if 'heldout_bits_per_byte' in line]
        return Result(lines[-1]['step'], lines[-1]['heldout_bits_per_byte'])

    def close(self) -> None:
        self._display.close()
        self._metrics.close()
        self._timing.close()

    def _hyperparameters(self, progress: Progress) -> Hyperparameters:
        at = functools.partial(lambda curve: curve(progress.tokens, self.total_tokens))
        warmup = min(1.0, (progress.step + 1) / max(self.optimizer.warmup_steps, 1))
        return Hyperparameters(
            learning_rate=at(self.optimizer.learning_rate) * warmup,
            mtp_weight=at(self.objective.mtp_weight),
            bias_rate=at(self.objective.bias_rate),
        )

    def write_pending(self) -> None:
        """Writes the lines of the last step, if they are not written yet."""
        if self._pending is None:
            return
        step, tokens, num_bytes, values, metrics = self._pending
        self._pending = None
        losses = jax.device_get(metrics.losses)
        load = np.asarray(losses.load_LE, np.float64)
        bits_per_byte = data_lib.bits_per_byte(float(losses.nats), num_bytes) if num_bytes else None
        self._metrics.write(
            step=step,
            loss=float(losses.loss),
            bits_per_byte=bits_per_byte,
            mtp_loss=float(losses.mtp_loss),
            balance_loss=float(losses.balance_loss),
            grad_norm=float(metrics.grad_norm),
            learning_rate=values.learning_rate,
            mtp_weight=values.mtp_weight,
            bias_rate=values.bias_rate,
            load_max_over_mean=np.round(load.max(-1) / load.mean(-1), 6).tolist() if load.size else [],
        )
        now = time.monotonic()
        rate = tokens / (now - self._last_time)
        self._timing.write(step=step, seconds=round(now - self._last_time, 4), tokens_per_second=round(rate, 1))
        self._last_time = now
        self._display.update(step, float(losses.loss), bits_per_byte, rate)


def _batches(
    rows: Any, progress: Progress, total_steps: int, size: Callable[[int], int]
) -> Iterator[tuple[data_lib.Row, Progress]]:
    """Batches up to the last step, each with the progress once it has been trained on."""
    while progress.step < total_steps:
        batch = data_lib.batch(rows, size(progress.tokens))
        progress = Progress(
            step=progress.step + 1,
            tokens=progress.tokens + batch['weights'].size,
            next_row=progress.next_row + len(batch['weights']),
        )
        yield batch, progress


def _restore_or_init(
    saved: Checkpoints | None, model: ds.ModelConfig, optimizer: OptimizerConfig, seed: int, init_from: str | None
) -> tuple[State, Progress]:
    if saved is not None and saved.latest_step is not None:
        shapes = jax.eval_shape(lambda key: init_state(key, model, optimizer), jax.random.key(0))
        return saved.restore(shapes)
    initial = None if init_from is None else _load_initial(init_from, model)
    state = init_state(jax.random.key(seed), model, optimizer)
    if initial is not None:
        state = state._replace(params=initial)
    # Bound to its device like restored arrays: the program is another one for arrays that are not.
    return jax.device_put(state, jax.devices()[0]), Progress()


def _load_initial(path: str, model: ds.ModelConfig) -> Any:
    """The parameters of a run or a published checkpoint, which must be of the configured model's shapes."""
    is_run = (pathlib.Path(path) / run_files.MODEL_FILE).exists()
    found, params = ds.load_run(path) if is_run else ds.load_hf(path)
    neutral = {'rope': model.rope, 'precision': model.precision, 'remat': model.remat, 'scan_unroll': model.scan_unroll}
    neutral |= {'init_std': model.init_std, 'norm_eps': model.norm_eps}
    if dataclasses.replace(found, **neutral) != model:
        raise ValueError(f'init_from={path!r} holds another model: {found} where the run has {model}')
    return params


def _make_run_dir(
    directory: pathlib.Path, model: ds.ModelConfig, corpus: data_lib.Corpus, config: CheckpointConfig
) -> Checkpoints:
    directory.mkdir(parents=True, exist_ok=True)
    # First: without it the directory is taken for something else and left alone.
    run_files.write_model_file(directory, model, _tokenizer_name(corpus.config))
    corpus.tokenizer.save(directory)
    return Checkpoints(directory, config)


def _describe(model: ds.ModelConfig, sequence_length: int, tokens: int) -> str:
    counts = flops.count_parameters(model)
    work = flops.train_flops_per_token(model, sequence_length, mtp=model.mtp_depth > 0)
    return f'{counts}\n{work / 1e9:.2f} GFLOP a token at length {sequence_length}; {tokens:,} tokens in the run'


def _check_arguments(arguments: dict[str, Any]) -> None:
    hints = {name: p.annotation for name, p in inspect.signature(train).parameters.items()}
    check_values('train', hints, {name: value for name, value in arguments.items() if name != 'config_text'})
    for name in ('total_steps', 'batch_size', 'sequence_length', 'checkpoint_every', 'eval_every', 'eval_rows'):
        if arguments[name] < 1:
            raise ValueError(f'train.{name}={arguments[name]} must be at least 1')
    if arguments['seed'] < 0:
        raise ValueError(f'train.seed={arguments["seed"]} must not be negative')
    ramp, batch_size = arguments['batch_ramp'], arguments['batch_size']
    if ramp is not None and ramp.start > batch_size:
        raise ValueError(f'BatchRamp.start={ramp.start} exceeds {batch_size=}')
    depth = arguments['model'].mtp_depth
    if arguments['sequence_length'] <= depth:
        raise ValueError(f'train.sequence_length={arguments["sequence_length"]} must exceed the MTP {depth=}')


def _tokenizer_name(data: DataConfig) -> str:
    return 'bytes' if data.tokenizer == 'bytes' else 'tokenizer.json'


def _check_run_dir(directory: pathlib.Path, model: ds.ModelConfig, tokenizer: str) -> None:
    """A directory to go on with must hold this model and tokenizer; one that holds anything else is left alone."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f'run_dir={str(directory)!r}: {str(nearest)!r} is a file; name a directory')
    if nearest != directory or not any(directory.iterdir()):
        return
    found, found_tokenizer = run_files.read_model_file(directory)
    for field in dataclasses.fields(model):
        old, new = getattr(found, field.name), getattr(model, field.name)
        if old != new and field.name not in ('precision', 'remat', 'scan_unroll', 'init_std'):
            raise ValueError(f'{directory} holds a run of another shape: its model has {field.name}={old}, not {new}')
    if found_tokenizer != tokenizer:
        raise ValueError(f'{directory} holds a run with tokenizer {found_tokenizer!r}, not {tokenizer!r}')


def _check_vocabulary(corpus: data_lib.Corpus, model: ds.ModelConfig) -> None:
    if corpus.tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f'ModelConfig.vocab_size={model.vocab_size} is below the {corpus.tokenizer.vocab_size} ids of '
            f'tokenizer {corpus.config.tokenizer!r}'
        )
