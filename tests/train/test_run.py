import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import deepseek_jax as ds
from tests.train.conftest import BATCH_SIZE, SEQUENCE_LENGTH
from train import loop, memory, run
from train.checkpoint import CheckpointConfig, Checkpoints, Progress
from train.ema import Average, no_average, updated
from train.errors import TrainingError
from train.guard import GuardConfig, SkippedStepsError, no_history
from train.metrics import read_jsonl
from train.optimizer import make_optimizer
from train.parallel import MeshConfig
from train.schedule import BatchRamp, LengthRamp, Schedule
from train.step import State
from train.stop import StopSignals

STEPS = 10
GUARD = GuardConfig()


@pytest.fixture(scope='module')
def start(model, data, optimizer, objective, params) -> Iterator[Callable[..., run.Result | None]]:
    """Starts a run of ten steps in a directory: evaluations every fifth, checkpoints every fourth.

    What takes most of a short run is not done again: parameters are given and counted once, and only a run with
    `picture` draws one. test_main.py starts runs with nothing replaced.
    """

    def start(directory: Path, picture: bool = False, **changes):
        arguments = {
            'model': model,
            'data': data,
            'optimizer': optimizer,
            'objective': objective,
            'guard': GUARD,
            'checkpoints': CheckpointConfig(),
            'total_steps': STEPS,
            'batch_size': BATCH_SIZE,
            'sequence_length': SEQUENCE_LENGTH,
            'checkpoint_every': 4,
            'eval_every': 5,
            'eval_rows': 8,
            'seed': 0,
            'run_dir': str(directory),
            'config_text': lambda: 'the configuration\n',
        }
        with pytest.MonkeyPatch.context() as patch:
            if not picture:
                patch.setattr(loop.plot, 'plot_run', lambda lines, path: path.touch())
            return run.train(**{**arguments, **changes})

    initial = State(params, make_optimizer(optimizer).init(params), no_history(GUARD))

    def init_state(*_):
        return jax.tree.map(lambda leaf: leaf.copy(), initial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'init_state', init_state)
        patch.setattr(run.flops, 'count_parameters', functools.cache(run.flops.count_parameters))
        yield start


@pytest.fixture(scope='module')
def whole(start, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    start(directory, picture=True)
    return directory


def shapes_of(params, optimizer) -> State:
    return jax.eval_shape(
        lambda params: State(params, make_optimizer(optimizer).init(params), no_history(GUARD)), params
    )


def state_of(directory: Path, params, optimizer) -> tuple[State, Average | None]:
    """The newest checkpoint's state and average."""
    checkpoints = Checkpoints(directory, CheckpointConfig())
    state, progress = checkpoints.restore(shapes_of(params, optimizer))
    average = checkpoints.restore_average(params)
    checkpoints.close()
    # What was read ahead of the steps does not count.
    assert progress == Progress(step=STEPS, tokens=STEPS * BATCH_SIZE * SEQUENCE_LENGTH, next_row=STEPS * BATCH_SIZE)
    return state, average


class Killed(BaseException):
    """What a test ends a run with."""


@pytest.fixture
def spoil(monkeypatch):
    """Makes the losses of these steps nan, or ends the run where one would begin; counts from `first`."""

    def spoil(*steps: int, end: int | None = None, first: int = 1):
        taken, batch = itertools.count(first), BATCH

        def spoilt(rows, size):
            step, found = next(taken), batch(rows, size)
            if step == end:
                raise Killed
            return {**found, 'weights': found['weights'] * np.float32(np.nan)} if step in steps else found

        monkeypatch.setattr(loop.data_lib, 'batch', spoilt)

    return spoil


BATCH = loop.data_lib.batch


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    files = (path for path in sorted(directory.rglob('*')) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_run_directory_holds_what_is_promised(whole, model):
    assert {'config.gin', 'model.json', 'metrics.jsonl', 'timing.jsonl', 'loss.png', 'checkpoints'} == {
        path.name for path in whole.iterdir()
    }
    assert (whole / 'config.gin').read_text() == 'the configuration\n'
    assert (whole / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert {path.name for path in (whole / 'checkpoints').iterdir()} == {'8', '10'}
    config, params = ds.load_run(whole)
    assert config == model
    assert params['head_DV'].shape == (16, 272)
    assert [line['step'] for line in read_jsonl(whole / 'timing.jsonl')] == list(range(1, STEPS + 1))


def test_metrics_are_those_of_every_step_and_evaluation(whole, optimizer, objective):
    lines = read_jsonl(whole / 'metrics.jsonl')
    steps = [line for line in lines if 'loss' in line]
    evaluations = [line for line in lines if 'heldout_bits_per_byte' in line]
    assert len(lines) == len(steps) + len(evaluations)
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert [line['step'] for line in evaluations] == [5, 10]
    for line in steps:
        tokens = (line['step'] - 1) * BATCH_SIZE * SEQUENCE_LENGTH
        warmup = min(1.0, line['step'] / optimizer.warmup_steps)
        assert line['learning_rate'] == optimizer.learning_rate(tokens, 640) * warmup
        assert line['mtp_weight'] == objective.mtp_weight(tokens, 640)
        assert line['bias_rate'] == objective.bias_rate(tokens, 640)
        assert len(line['load_max_over_mean']) == 2
    # Nothing but bytes of text are predicted, a few ends of documents among them.
    for line in evaluations:
        assert line['tokens'] == line['step'] * BATCH_SIZE * SEQUENCE_LENGTH
        assert 1 <= line['heldout_bits_per_byte'] * np.log(2) / line['heldout_loss'] < 1.1
        np.testing.assert_allclose(np.sum(line['expert_load'], axis=-1), 1, atol=1e-5)
    assert steps[-1]['loss'] < steps[0]['loss']
    assert evaluations[1]['heldout_loss'] < evaluations[0]['heldout_loss']


@pytest.mark.parametrize(
    'options', [{}, {'ema_decay': 0.7, 'ema_every': 3, 'microbatch_size': 2}], ids=['plain', 'all']
)
def test_interrupted_and_resumed_equals_uninterrupted(start, whole, tmp_path, params, optimizer, spoil, options):
    if options:
        whole = tmp_path / 'whole'
        start(whole, **options)
    spoil(end=8)
    with pytest.raises(Killed):
        start(tmp_path / 'run', **options)
    lines = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'4'}
    assert lines[-1]['step'] == 6, 'lines past the checkpoint are there to be replaced'
    spoil()
    result = start(tmp_path / 'run', **options)
    assert result == run.Result(STEPS, read_jsonl(whole / 'metrics.jsonl')[-1]['heldout_bits_per_byte'])
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    resumed, uninterrupted = (state_of(directory, params, optimizer) for directory in (tmp_path / 'run', whole))
    assert (resumed[1] is None) == (options == {})
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    timing = [line['step'] for line in read_jsonl(tmp_path / 'run' / 'timing.jsonl')]
    assert timing == list(range(1, STEPS + 1))


def test_run_that_a_signal_stops_saves_its_step_and_loses_nothing(
    start, whole, tmp_path, params, optimizer, monkeypatch
):
    step, stop = loop.Loop.step, StopSignals()

    def step_and_signal(self, state, given, waited, asked):
        if given.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, state, given, waited, asked)

    monkeypatch.setattr(loop.Loop, 'step', step_and_signal)
    result = start(tmp_path / 'run', stop=stop)
    assert (result, stop.received) == (run.Result(3, None, finished=False), signal.SIGTERM)
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'3'}
    monkeypatch.undo()
    assert start(tmp_path / 'run', stop=StopSignals()).finished
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    states = (state_of(directory, params, optimizer)[0] for directory in (tmp_path / 'run', whole))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_run_on_a_mesh_goes_on_on_one_device_and_equals_it(start, whole, tmp_path, spoil):
    spoil(end=8)
    with pytest.raises(Killed):
        start(tmp_path / 'run', mesh=MeshConfig(fsdp=2, expert=2, capacity_factor=2.0))
    spoil()
    start(tmp_path / 'run')
    found, wanted = (read_jsonl(directory / 'metrics.jsonl') for directory in (tmp_path / 'run', whole))
    assert [line['step'] for line in found] == [line['step'] for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        name = 'loss' if 'loss' in line else 'heldout_loss'
        np.testing.assert_allclose(line[name], other[name], rtol=1e-4)
    assert [line.get('dropped_choices') for line in found[:4]] == [0] * 4  # those taken on the mesh
    params = ds.load_run(tmp_path / 'run')[1]
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {SingleDeviceSharding(jax.devices()[0])}


def test_choices_that_find_no_room_are_written_and_shown(start, tmp_path, capsys):
    start(tmp_path / 'run', total_steps=2, eval_every=2, mesh=MeshConfig(expert=2, capacity_factor=0.1))
    *steps, evaluation = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    shown = re.findall(r'step (\d+): (\d+) choices of experts \(.*%\) found no room', capsys.readouterr().err)
    assert [(line['step'], line['dropped_choices']) for line in steps] == [(int(a), int(b)) for a, b in shown]
    assert len(shown) == 2
    assert evaluation['dropped_choices'] > 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'mesh': MeshConfig(data=3)}, 'train.mesh has 3 devices .* and 4 is not'),
        ({'mesh': MeshConfig(data=4), 'microbatch_size': 2}, 'train.mesh has 4 devices .* and 2 is not'),
        ({'mesh': MeshConfig(data=16), 'batch_size': 16}, 'are 16 devices, there are 8'),
        ({'mesh': MeshConfig(fsdp=2, zero=3)}, "zero=3, and ModelConfig.remat='none' would keep"),
        ({'mesh': MeshConfig(context=2)}, "context=2, and ModelConfig.remat='none' would keep"),
        (
            {'mesh': MeshConfig(context=3), 'sequence_length': 16},
            'sequence_length=16 must be a multiple of 6: two chunks .* context=3 devices',
        ),
        ({'mesh': MeshConfig(data=3, context=2)}, 'train.mesh has 3 devices .* and 4 is not'),
        ({'mesh': MeshConfig(stage=3)}, r'stage=3, which must divide the \d+ expert layers'),
    ],
)
def test_mesh_that_cannot_share_the_batch_is_refused(start, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()


def test_schedules_are_read_at_the_tokens_before_a_step(start, tmp_path, optimizer, objective):
    tokens = BATCH_SIZE * SEQUENCE_LENGTH
    line = lambda end: Schedule(pieces=(('linear', end, 3.0 * tokens),), start=0.5)  # noqa: E731
    start(
        tmp_path / 'run',
        total_steps=3,
        optimizer=dataclasses.replace(optimizer, learning_rate=line(0.2), warmup_steps=0),
        objective=dataclasses.replace(objective, mtp_weight=line(0.8), bias_rate=line(0.0)),
    )
    for line, share in zip(read_jsonl(tmp_path / 'run' / 'metrics.jsonl'), (0, 1 / 3, 2 / 3), strict=False):
        found = [line[name] for name in ('learning_rate', 'mtp_weight', 'bias_rate')]
        np.testing.assert_allclose(found, [0.5 - 0.3 * share, 0.5 + 0.3 * share, 0.5 - 0.5 * share])


def test_microbatches_give_the_run_of_whole_batches(start, whole, tmp_path):
    start(tmp_path / 'run', microbatch_size=2)
    for found, wanted in zip(*(read_jsonl(path / 'metrics.jsonl') for path in (tmp_path / 'run', whole)), strict=True):
        assert found.keys() == wanted.keys()
        for name in found:
            np.testing.assert_allclose(found[name], wanted[name], rtol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    ('match', 'changes'),
    [
        ('train.microbatch_size=3 must divide every batch, and does not divide 4$', {'microbatch_size': 3}),
        (
            'train.microbatch_size=4 must divide every batch, and does not divide 2, which BatchRamp gives',
            {'microbatch_size': 4, 'batch_ramp': BatchRamp(start=2, tokens=100.0, multiple_of=2)},
        ),
        ('train.microbatch_size=0 must be at least 1', {'microbatch_size': 0}),
        ('train.ema_every=0 must be at least 1', {'ema_every': 0}),
        (r'train.ema_decay=1.0 must lie between 0 and 1', {'ema_decay': 1.0}),
    ],
)
def test_bad_part_of_a_step_is_refused_before_anything_is_written(start, tmp_path, match, changes):
    with pytest.raises(ValueError, match=match):
        start(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()


def test_sequences_grow_and_a_resumed_run_goes_on_with_their_length(start, tmp_path, spoil):
    """Four steps of half the length, two sequences for one, in microbatches of as many tokens."""
    ramp = LengthRamp(pieces=((SEQUENCE_LENGTH // 2, 4.0 * BATCH_SIZE * SEQUENCE_LENGTH),))
    changes = {'length_ramp': ramp, 'total_steps': 6, 'checkpoint_every': 2, 'microbatch_size': BATCH_SIZE // 2}
    assert start(tmp_path / 'whole', **changes).finished
    lines = read_jsonl(tmp_path / 'whole' / 'timing.jsonl')
    assert [line['step'] for line in lines if 'compile_seconds' in line] == [1, 5]
    spoil(end=4)
    with pytest.raises(Killed):
        start(tmp_path / 'cut', **changes)
    loop.data_lib.batch = BATCH
    assert start(tmp_path / 'cut', **changes).finished
    cut, whole = (tmp_path / name / 'metrics.jsonl' for name in ('cut', 'whole'))
    assert cut.read_bytes() == whole.read_bytes()
    for pieces, match in (
        (((5, 10.0),), r'LengthRamp.pieces: a length of 5 must divide train.sequence_length='),
        (((1, 10.0),), r'LengthRamp.pieces: a length of 1 must exceed the MTP depth=1'),
    ):
        with pytest.raises(ValueError, match=match):
            start(tmp_path / 'other', length_ramp=LengthRamp(pieces=pieces))
    assert not (tmp_path / 'other').exists()


def test_batch_sizes_are_those_that_the_run_reaches():
    ramp = BatchRamp(start=2, tokens=200.0, multiple_of=2)
    taken = loop.batches(({'weights': np.zeros(8)} for _ in itertools.count()), Progress(), 12, lambda t: ramp(t, 8))
    sizes = [len(batch['weights']) for batch, _ in taken]
    for steps in (1, 4, 12):
        assert run._batch_sizes(steps, 8, 8, ramp) == sorted(set(sizes[:steps]))
    assert run._batch_sizes(10**12, 8, 8, None) == [8]


def test_bad_steps_are_skipped_and_logged_and_a_resumed_run_counts_them(
    start, tmp_path, spoil, params, optimizer, capsys
):
    """Skipped are steps 4, which is saved, and 5: in a row only if the resumed run knows of the first."""
    spoil(3, 4, 5)
    with pytest.raises(SkippedStepsError):
        start(tmp_path / 'strict')
    spoil(4, 5)
    start(tmp_path / 'whole')
    spoil(4, 5, end=7)
    with pytest.raises(Killed):
        start(tmp_path / 'run')
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'4'}
    spoil(5, first=5)
    capsys.readouterr()
    start(tmp_path / 'run')
    error = capsys.readouterr().err
    assert 'step 5 skipped: the loss is not finite\n' in error
    assert '6 steps in ' in error
    assert ' s, 1 of them skipped; ' in error
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (tmp_path / 'whole' / 'metrics.jsonl').read_bytes()
    resumed, uninterrupted = (state_of(tmp_path / name, params, optimizer)[0] for name in ('run', 'whole'))
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    assert resumed.guard.accepted == STEPS - 2
    lines = [line for line in read_jsonl(tmp_path / 'run' / 'metrics.jsonl') if 'loss' in line]
    assert {line['step']: line['skipped'] for line in lines if 'skipped' in line} == dict.fromkeys(
        (4, 5), 'the loss is not finite'
    )


def test_bad_steps_in_a_row_end_the_run_and_it_goes_on_from_the_newest_checkpoint(start, whole, tmp_path, spoil):
    """The last of them would be saved: it is not."""
    spoil(6, 7, 8)
    with pytest.raises(SkippedStepsError, match='the last 3 steps were skipped') as error:
        start(tmp_path / 'run')
    assert isinstance(error.value, TrainingError)
    assert '\n' not in str(error.value)
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'4'}
    spoil()
    start(tmp_path / 'run')
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_bad_steps_in_a_row_are_counted_across_a_restart(start, tmp_path, spoil):
    spoil(3, 4, end=5)
    with pytest.raises(Killed):
        start(tmp_path / 'run')
    spoil(5, first=5)
    with pytest.raises(SkippedStepsError, match='of step 5 the loss is not finite'):
        start(tmp_path / 'run')


def test_average_is_that_of_all_steps_and_is_evaluated(start, whole, tmp_path, params, optimizer):
    options = {'checkpoint_every': 1, 'checkpoints': CheckpointConfig(keep=STEPS), 'total_steps': 6, 'eval_every': 3}
    start(tmp_path / 'run', ema_decay=0.6, ema_every=2, **options)
    wanted = no_average(params)
    for step in range(1, 7):
        saved = ds.load_run(tmp_path / 'run', step)[1]
        if step % 2 == 0:
            wanted = updated(wanted, jax.tree.leaves(saved), 0.6**2)
        checkpoints = Checkpoints(tmp_path / 'run', CheckpointConfig())
        if step == checkpoints.latest_step:
            found = checkpoints.restore_average(params)
        checkpoints.close()
    assert found.updates == wanted.updates == 3
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    lines = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    without = [{name: line[name] for name in line if 'ema' not in name} for line in lines]
    assert [line for line in without if 'loss' in line] == [
        line for line in read_jsonl(whole / 'metrics.jsonl') if 'loss' in line
    ][:6], 'the average does not change the training'
    evaluations = [line for line in lines if 'heldout_bits_per_byte' in line]
    assert all(line['heldout_ema_bits_per_byte'] != line['heldout_bits_per_byte'] for line in evaluations)


def test_average_without_memory_is_the_newest_parameters(start, tmp_path):
    start(tmp_path / 'run', ema_decay=1e-12, total_steps=2, eval_every=1)
    evaluations = [line for line in read_jsonl(tmp_path / 'run' / 'metrics.jsonl') if 'loss' not in line]
    assert len(evaluations) == 2
    assert all(line['heldout_ema_bits_per_byte'] == line['heldout_bits_per_byte'] for line in evaluations)


def test_average_may_begin_and_end_in_the_middle(start, whole, tmp_path, capsys):
    start(tmp_path / 'run', total_steps=4)
    start(tmp_path / 'run', total_steps=8, ema_decay=0.5)
    assert 'checkpoint 4 holds no average of the parameters: it begins here\n' in capsys.readouterr().err
    start(tmp_path / 'run')
    lines = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    assert [line['step'] for line in lines if 'heldout_ema_bits_per_byte' in line] == [5, 8]
    assert [line for line in lines if 'loss' in line] == [
        line for line in read_jsonl(whole / 'metrics.jsonl') if 'loss' in line
    ]


def test_waiting_and_compiling_are_timed(start, tmp_path, capsys):
    start(tmp_path / 'run', total_steps=3, batch_ramp=BatchRamp(start=2, tokens=40.0, multiple_of=2))
    timing = read_jsonl(tmp_path / 'run' / 'timing.jsonl')
    assert all(line['input_wait_seconds'] >= 0 and line['seconds'] > 0 for line in timing)
    assert ['compile_seconds' in line for line in timing] == [True, False, True], 'once for each batch size'
    error = capsys.readouterr().err
    assert f'step for 2 x {SEQUENCE_LENGTH} tokens compiled in ' in error
    assert f'step for 4 x {SEQUENCE_LENGTH} tokens compiled in ' in error
    waited = sum(line['input_wait_seconds'] for line in timing)
    (line,) = [line for line in error.splitlines() if 'waiting for input' in line]
    assert line.startswith('3 steps in ')
    assert f'; {waited:.1f} s (' in line


def test_memory_that_runs_out_in_a_step_is_explained(start, tmp_path, monkeypatch):
    """The device says so where a step's results are read, after the next one was given to it."""
    device_get, reads = jax.device_get, itertools.count(1)

    def failing(tree):
        if next(reads) == 3:
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
        return device_get(tree)

    monkeypatch.setattr(loop.jax, 'device_get', failing)
    monkeypatch.setattr(memory, 'explain', lambda present, sizes, need, limit: f'{present} {sizes}')
    with pytest.raises(memory.OutOfMemoryError) as error:
        start(tmp_path / 'run', checkpoint_every=2)
    assert str(error.value) == "Setting(microbatch_size=4, remat='none') [1, 2, 4]"
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'2'}


def test_finished_run_goes_on_with_more_steps(start, whole, tmp_path):
    first = start(tmp_path / 'run', total_steps=5)
    assert first.step == 5
    start(tmp_path / 'run')
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_finished_run_started_again_changes_nothing(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    result = start(tmp_path / 'run', init_from='a directory that is gone')
    assert result.step == STEPS
    assert contents(tmp_path / 'run') == before


def test_fewer_steps_than_taken_are_refused(start, whole):
    before = contents(whole)
    with pytest.raises(ValueError, match='total_steps=9 is below step 10, which .* has already reached'):
        start(whole, total_steps=9)
    assert contents(whole) == before


def test_evaluations_do_not_change_the_training(start, whole, tmp_path):
    start(tmp_path / 'run', eval_every=3, checkpoint_every=100, eval_rows=5)

    def steps(directory):
        return [line for line in read_jsonl(directory / 'metrics.jsonl') if 'loss' in line]

    assert steps(tmp_path / 'run') == steps(whole)


def test_lines_of_a_step_are_written_before_its_checkpoint(start, tmp_path, monkeypatch):
    """A run killed right after a save does not take that step again, so its line must be there."""
    seen = {}
    save = Checkpoints.save

    def spy(self, state, progress, average):
        seen[progress.step] = [line['step'] for line in read_jsonl(tmp_path / 'run' / 'metrics.jsonl')]
        save(self, state, progress, average)

    monkeypatch.setattr(Checkpoints, 'save', spy)
    start(tmp_path / 'run', total_steps=3, checkpoint_every=1, eval_every=100)
    assert seen == {1: [1], 2: [1, 2], 3: [1, 2, 3, 3]}


def test_initial_parameters_come_from_another_run(start, whole, tmp_path):
    options = {'total_steps': 1, 'init_from': str(whole), 'checkpoint_every': 1}
    # A directory that was made and no more; then a run that was stopped before its first checkpoint.
    (tmp_path / 'run').mkdir()
    start(tmp_path / 'run', **options)
    text = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
    fresh = read_jsonl(whole / 'metrics.jsonl')[0]
    assert json.loads(text.splitlines()[0])['loss'] < fresh['loss'] - 0.5, 'it starts where the other one ended'
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '1')
    start(tmp_path / 'run', **options)
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == text


def test_initial_parameters_of_another_model_are_refused(start, whole, tmp_path, model):
    config = json.loads((whole / 'model.json').read_text())
    other = tmp_path / 'other'
    shutil.copytree(whole, other)
    config['model']['model_dim'] = 24
    (other / 'model.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='model_dim=24|params/'):
        start(tmp_path / 'run', init_from=str(other))
    assert not (tmp_path / 'run').exists()


def test_run_with_another_tokenizer_is_refused(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    file = tmp_path / 'run' / 'model.json'
    file.write_text(file.read_text().replace('"bytes"', '"tokenizer.json"'))
    before = contents(tmp_path / 'run')
    with pytest.raises(ValueError, match="tokenizer 'tokenizer.json', not 'bytes'"):
        start(tmp_path / 'run')
    assert contents(tmp_path / 'run') == before


@pytest.mark.parametrize(
    ('match', 'changes'),
    [
        ('train.total_steps=0 must be at least 1', {'total_steps': 0}),
        ('train.eval_rows=0 must be at least 1', {'eval_rows': 0}),
        ('train.seed=-1 must not be negative', {'seed': -1}),
        ('train.sequence_length=1 must exceed the MTP depth=1', {'sequence_length': 1}),
        ('BatchRamp.start=8 exceeds batch_size=4', {'batch_ramp': BatchRamp(start=8, tokens=100.0, multiple_of=4)}),
        ('run_dir=None', {'run_dir': None}),
    ],
)
def test_bad_argument_is_refused_before_anything_is_written(start, tmp_path, match, changes):
    with pytest.raises(ValueError, match=match):
        start(tmp_path / 'run', **changes)
    assert not (tmp_path / 'run').exists()


def test_batches_grow_and_continue_from_any_progress():
    def rows(first: int):
        return ({'weights': np.zeros(8), 'index': np.array(index)} for index in itertools.count(first))

    ramp = BatchRamp(start=2, tokens=200.0, multiple_of=2)
    size = lambda tokens: ramp(tokens, 8)  # noqa: E731
    taken = list(loop.batches(rows(0), Progress(), 12, size))
    sizes = [len(batch['index']) for batch, _ in taken]
    assert sizes[0] == 2
    assert sizes[-1] == 8
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    assert np.concatenate([batch['index'] for batch, _ in taken]).tolist() == list(range(sum(sizes)))
    assert [progress.step for _, progress in taken] == list(range(1, 13))
    assert taken[-1][1] == Progress(step=12, tokens=8 * sum(sizes), next_row=sum(sizes))
    for cut in (1, 5, 11):
        progress = taken[cut - 1][1]
        rest = list(loop.batches(rows(progress.next_row), progress, 12, size))
        assert [progress for _, progress in rest] == [progress for _, progress in taken[cut:]]
        for (found, _), (wanted, _) in zip(rest, taken[cut:], strict=True):
            np.testing.assert_array_equal(found['index'], wanted['index'])
