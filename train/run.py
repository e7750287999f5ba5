"""A run: its arguments checked, what it starts from, and the order of steps, evaluations and checkpoints."""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax

import deepseek_jax as ds
from deepseek_jax import checkpoint as run_files
from deepseek_jax import flops
from deepseek_jax.config import check_values
from train import data as data_lib
from train import memory, parallel, processes, schedule
from train.checkpoint import CheckpointConfig, Checkpoints, Progress
from train.data import DataConfig
from train.ema import Average, MovingAverage, no_average
from train.guard import GuardConfig
from train.loop import Loop, Result, batches
from train.loss import ObjectiveConfig
from train.optimizer import OptimizerConfig
from train.parallel import Layout, MeshConfig
from train.prefetch import prefetch
from train.preflight import preflight as compile_step
from train.profile import Profiler
from train.step import State, init_state, state_shapes
from train.stop import StopSignals

PROFILE_FOLDER = 'profile'
CONFIG_FILE = 'config.gin'
ONE_DEVICE = MeshConfig()


def train(
    *,
    model: ds.ModelConfig,
    data: DataConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    guard: GuardConfig,
    checkpoints: CheckpointConfig,
    total_steps: int,
    batch_size: int,
    sequence_length: int,
    checkpoint_every: int,
    eval_every: int,
    eval_rows: int,
    seed: int,
    mesh: MeshConfig = ONE_DEVICE,
    batch_ramp: schedule.BatchRamp | None = None,
    length_ramp: schedule.LengthRamp | None = None,
    microbatch_size: int | None = None,
    ema_decay: float | None = None,
    ema_every: int = 1,
    init_from: str | None = None,
    run_dir: str | None = None,
    config_text: Callable[[], str] | None = None,
    print_only: bool = False,
    preflight: int | None = None,
    profile: int | None = None,
    stop: StopSignals | None = None,
) -> Result | None:
    """Trains a model, or goes on with the run that `run_dir` holds, and returns how it ended.

    A run that was stopped at any moment and started again ends in the same state, bit for bit, as one that was not.

    Args:
      model: the model.
      data: what to train on.
      optimizer: AdamW and its learning rate.
      objective: the loss and the load rule.
      guard: which steps are skipped because their loss or gradient cannot be right.
      checkpoints: which checkpoints stay.
      total_steps: optimizer steps of the whole run.
      batch_size: sequences a step.
      sequence_length: tokens a sequence.
      checkpoint_every: steps between checkpoints; the last step is always saved.
      eval_every: steps between evaluations on held-out text; the last step is always evaluated.
      eval_rows: held-out sequences an evaluation reads.
      seed: of the initial parameters and the order of the data.
      mesh: the devices to train on. Batches, microbatches too, must be multiples of the number that rows are cut over, and the
        sequence length one of twice the number that each sequence is.
      batch_ramp: smaller batches at the beginning; `batch_size` is the final size.
      length_ramp: shorter sequences at the beginning, as many more of them; `sequence_length` is the final one, and all else
        that counts sequences, batches and microbatches too, counts those.
      microbatch_size: sequences whose activations are in memory at a time; it divides every batch, and None is the
        whole batch. The result is the same up to rounding.
      ema_decay: a step's decay of the parameters' moving average, which is evaluated and saved too; None keeps none.
      ema_every: steps between states of the parameters that are averaged.
      init_from: a run directory or a published checkpoint whose parameters a new run starts from.
      run_dir: where everything is written; made if it does not exist.
      config_text: gives the configuration as text, to be kept in the run directory.
      print_only: print the counts of the model and the run and return None.
      preflight: compile a step for so many H100s, print the counts and what it needs, and return None.
      profile: take so many steps by the clock and trace as many, print where their time goes, save nothing but that, and
        return None.
      stop: signals that end this start of the run after the step that they come in, with a checkpoint.

    Raises:
      ValueError, TypeError: a value that cannot be trained with; nothing has been written.
      FileNotFoundError: `init_from` or the data does not exist.
      TrainingError: the run cannot go on: too many skipped steps, or too little memory.
    """
    arguments = dict(locals())
    _check_arguments(arguments)
    tokens = schedule.total_tokens(total_steps, batch_size, sequence_length, batch_ramp)
    if print_only:
        print(_describe(model, sequence_length, tokens))
        return None
    if preflight is not None:
        print(_describe(model, sequence_length, tokens), flush=True)
        found = compile_step(
            model, optimizer, objective, guard, mesh, preflight, batch_size, sequence_length, microbatch_size
        )
        print(found)
        if not found.fits:
            raise memory.OutOfMemoryError(
                f'a step needs {found.needed_bytes / 1e9:.1f} GB a device, which an H100 lacks'
            )
        return None
    if run_dir is None:
        raise ValueError('run_dir=None: name the directory that the run is written to')
    processes.check_same({name: value for name, value in arguments.items() if name not in ('config_text', 'stop')})
    layout = mesh.make()
    share = parallel.row_share(layout)
    directory = pathlib.Path(run_dir)
    _check_run_dir(directory, model, _tokenizer_name(data))
    with processes.main_first('corpus'):
        corpus = data_lib.load_corpus(data)
    _check_vocabulary(corpus, model)
    # What opens and restores checkpoints waits for the other processes to do the same.
    shared = f'see the same directory {directory}, on storage that all of them share'
    begun = (directory / run_files.CHECKPOINTS).exists()
    processes.check_same({run_files.CHECKPOINTS: begun}, shared)
    saved = Checkpoints(directory, checkpoints) if begun else None
    processes.check_same({'saved step': None if saved is None else saved.latest_step}, shared)
    state, progress = _restore_or_init(saved, model, optimizer, guard, seed, init_from, layout)
    if progress.step > total_steps:
        raise ValueError(f'{total_steps=} is below step {progress.step}, which {directory} has already reached')
    average = None
    if ema_decay is not None:
        average = MovingAverage(_restore_or_begin_average(saved, state), ema_decay, ema_every)
    size = functools.partial(batch_ramp, final=batch_size) if batch_ramp is not None else lambda tokens: batch_size
    profiler = None
    if profile is not None:
        profiler = Profiler(
            directory / PROFILE_FOLDER,
            profile,
            steps_left=total_steps - progress.step,
            tokens_per_step=size(progress.tokens) * sequence_length,
            flops_per_token=flops.train_flops_per_token(model, sequence_length, mtp=model.mtp_depth > 0),
            num_devices=mesh.size,
        )
    rows = data_lib.training_rows(corpus, sequence_length, seed, *share, first_row=progress.next_row)
    if saved is None:
        with processes.main_first('run directory'):
            if processes.is_main():
                _make_run_dir(directory, model, corpus)
        processes.check_same({run_files.MODEL_FILE: (directory / run_files.MODEL_FILE).exists()}, shared)
        saved = Checkpoints(directory, checkpoints)
    if config_text is not None and processes.is_main():
        (directory / CONFIG_FILE).write_text(config_text(), encoding='utf-8')
    loop = Loop(
        directory=directory,
        corpus=corpus,
        model=model,
        optimizer=optimizer,
        objective=objective,
        guard=guard,
        average=average,
        microbatch_size=microbatch_size,
        batch_sizes=_batch_sizes(total_steps, batch_size, sequence_length, batch_ramp),
        sequence_length=sequence_length,
        eval_rows=eval_rows,
        eval_batch_size=_round_up(min(microbatch_size or batch_size, eval_rows), mesh.row_multiple),
        total_steps=total_steps,
        total_tokens=tokens,
        resume_step=progress.step,
        layout=layout,
        share=share,
    )
    processes.say(
        f'{flops.count_parameters(model)}; {len(corpus.train.tokens):,} training tokens in '
        f'{len(corpus.train.names):,} documents; {directory}: from step {progress.step} to {total_steps}'
    )
    length = None if length_ramp is None else functools.partial(length_ramp, final=sequence_length)
    taken = batches(rows, progress, total_steps, size, share[1], length)
    listening = contextlib.nullcontext() if stop is None else stop.listening()
    asked = lambda: stop is not None and stop.received is not None  # noqa: E731
    try:
        with (
            processes.ending_alone(lambda: saved.latest_step),
            listening,
            contextlib.closing(prefetch(map(loop.prepare, taken))) as inputs,
        ):
            for given, waited in inputs:
                if profiler and not profiler.before_step(
                    progress.step, functools.partial(jax.block_until_ready, state), loop.launch_separately
                ):
                    return None
                state = loop.step(state, given, waited, asked())
                progress = given.progress
                if profiler:
                    continue
                if progress.step % eval_every == 0 or progress.step == total_steps:
                    loop.evaluate(state, progress)
                # Alone, a run stops at once; together, when the measurements say that one of them was asked.
                stopped = loop.asked_to_stop if processes.several() else asked()
                if progress.step % checkpoint_every == 0 or progress.step == total_steps or stopped:
                    # A run that resumes from this step does not take it again: its line must be there.
                    loop.write_pending()
                    saved.save(state, progress, None if average is None else average.value())
                if stopped:
                    break
        return loop.finish(progress.step)
    finally:
        loop.close()
        saved.close()


def _batch_sizes(steps: int, batch_size: int, sequence_length: int, ramp: schedule.BatchRamp | None) -> list[int]:
    """The sizes of all batches of a run, ascending."""
    sizes, tokens = set(), 0
    for _ in range(steps):
        if ramp is None or tokens >= ramp.tokens:
            return sorted(sizes | {batch_size})
        size = ramp(tokens, batch_size)
        sizes.add(size)
        tokens += size * sequence_length
    return sorted(sizes)


def _restore_or_init(
    saved: Checkpoints | None,
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    guard: GuardConfig,
    seed: int,
    init_from: str | None,
    layout: Layout | None,
) -> tuple[State, Progress]:
    shapes = state_shapes(model, optimizer, guard, layout)
    if saved is not None and saved.latest_step is not None:
        return saved.restore(shapes)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    initial = None if init_from is None else _load_initial(init_from, model)
    state = init_state(jax.random.key(seed), model, optimizer, guard, places)
    if initial is not None:
        state = state._replace(params=parallel.put(initial, places.params))
    # Bound to its devices like restored arrays: the program is another one for arrays that are not.
    return jax.device_put(state, places), Progress()


def _restore_or_begin_average(saved: Checkpoints | None, state: State) -> Average:
    if saved is not None and saved.latest_step is not None:
        average = saved.restore_average(state.params)
        if average is not None:
            return average
        processes.say(f'checkpoint {saved.latest_step} holds no average of the parameters: it begins here')
    return no_average(state.params)


def _load_initial(path: str, model: ds.ModelConfig) -> Any:
    """The parameters of a run or a published checkpoint, which must be of the configured model's shapes."""
    is_run = (pathlib.Path(path) / run_files.MODEL_FILE).exists()
    found, params = ds.load_run(path) if is_run else ds.load_hf(path)
    neutral = {'rope': model.rope, 'precision': model.precision, 'remat': model.remat, 'scan_unroll': model.scan_unroll}
    neutral |= {'init_std': model.init_std, 'norm_eps': model.norm_eps}
    if dataclasses.replace(found, **neutral) != model:
        raise ValueError(f'init_from={path!r} holds another model: {found} where the run has {model}')
    return params


def _make_run_dir(directory: pathlib.Path, model: ds.ModelConfig, corpus: data_lib.Corpus) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # First: without it the directory is taken for something else and left alone.
    run_files.write_model_file(directory, model, _tokenizer_name(corpus.config))
    corpus.tokenizer.save(directory)


def _describe(model: ds.ModelConfig, sequence_length: int, tokens: int) -> str:
    counts = flops.count_parameters(model)
    work = flops.train_flops_per_token(model, sequence_length, mtp=model.mtp_depth > 0)
    return f'{counts}\n{work / 1e9:.2f} GFLOP a token at length {sequence_length}; {tokens:,} tokens in the run'


def _check_arguments(arguments: dict[str, Any]) -> None:
    hints = {name: p.annotation for name, p in inspect.signature(train).parameters.items()}
    check_values('train', hints, {name: value for name, value in arguments.items() if name != 'config_text'})
    positive = ('total_steps', 'batch_size', 'sequence_length', 'checkpoint_every', 'eval_every', 'eval_rows')
    for name in (*positive, 'microbatch_size', 'ema_every'):
        if arguments[name] is not None and arguments[name] < 1:
            raise ValueError(f'train.{name}={arguments[name]} must be at least 1')
    if arguments['seed'] < 0:
        raise ValueError(f'train.seed={arguments["seed"]} must not be negative')
    ramp, batch_size = arguments['batch_ramp'], arguments['batch_size']
    if ramp is not None and ramp.start > batch_size:
        raise ValueError(f'BatchRamp.start={ramp.start} exceeds {batch_size=}')
    _check_microbatch_size(arguments)
    _check_lengths(arguments)
    _check_mesh(arguments)
    ema_decay = arguments['ema_decay']
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f'train.{ema_decay=} must lie between 0 and 1')


def _check_lengths(arguments: dict[str, Any]) -> None:
    whole, ramp, context = arguments['sequence_length'], arguments['length_ramp'], arguments['mesh'].context
    lengths = {f'train.sequence_length={whole}': whole}
    lengths |= {f'LengthRamp.pieces: a length of {length}': length for length in (ramp.lengths if ramp else ())}
    for what, length in lengths.items():
        if whole % length:
            raise ValueError(f'{what} must divide train.sequence_length={whole}')
        if length <= (depth := arguments['model'].mtp_depth):
            raise ValueError(f'{what} must exceed the MTP {depth=}')
        if context > 1 and length % (2 * context):
            raise ValueError(
                f'{what} must be a multiple of {2 * context}: two chunks for each of the {context=} devices of train.mesh that '
                'sequences are cut over'
            )


def _check_microbatch_size(arguments: dict[str, Any]) -> None:
    microbatch_size = arguments['microbatch_size']
    sizes = _batch_sizes(*(arguments[name] for name in ('total_steps', 'batch_size', 'sequence_length', 'batch_ramp')))
    for size in sizes:
        if microbatch_size is not None and size % microbatch_size:
            ramp = '' if size == arguments['batch_size'] else ', which BatchRamp gives'
            raise ValueError(f'train.{microbatch_size=} must divide every batch, and does not divide {size}{ramp}')


def _check_mesh(arguments: dict[str, Any]) -> None:
    mesh, microbatch_size = arguments['mesh'], arguments['microbatch_size']
    if mesh.expert > 1 and arguments['model'].moe is None:
        raise ValueError(f'train.mesh has expert={mesh.expert}, and the model has no experts')
    layers = arguments['model'].num_moe_layers
    if mesh.stage > 1 and (layers < mesh.stage or layers % mesh.stage):
        raise ValueError(
            f'train.mesh has stage={mesh.stage}, which must divide the {layers} expert layers of the model'
        )
    sizes = _batch_sizes(*(arguments[name] for name in ('total_steps', 'batch_size', 'sequence_length', 'batch_ramp')))
    for size in (*sizes, *(() if microbatch_size is None else (microbatch_size,))):
        if size % mesh.row_multiple:
            each = '' if mesh.stage_parts == 1 else f', in {mesh.stage_parts} parts each'
            raise ValueError(
                f'train.mesh has {mesh.row_devices} devices ({mesh}, but for context) that rows are cut over{each}: batches and '
                f'microbatches must be multiples of {mesh.row_multiple}, and {size} is not'
            )
    if mesh.zero == 3 and arguments['model'].remat == 'none':
        raise ValueError("train.mesh has zero=3, and ModelConfig.remat='none' would keep what each block gathers")
    if mesh.context > 1 and arguments['model'].remat == 'none':
        raise ValueError(
            f"train.mesh has context={mesh.context}, and ModelConfig.remat='none' would keep keys and values of whole sequences"
        )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


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
