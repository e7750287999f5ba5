import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_jax as ds
from tests.train.conftest import BATCH_SIZE, SEQUENCE_LENGTH
from train import run
from train.checkpoint import CheckpointConfig, Checkpoints, Progress
from train.metrics import read_jsonl
from train.optimizer import make_optimizer
from train.schedule import BatchRamp
from train.step import State

STEPS = 10


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
                patch.setattr(run.plot, 'plot_run', lambda lines, path: path.touch())
            return run.train(**{**arguments, **changes})

    initial = State(params, make_optimizer(optimizer).init(params))

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


def state_of(directory: Path, params, optimizer) -> State:
    """The newest checkpoint's state."""
    shapes = jax.eval_shape(lambda params: State(params, make_optimizer(optimizer).init(params)), params)
    checkpoints = Checkpoints(directory, CheckpointConfig())
    state, progress = checkpoints.restore(shapes)
    checkpoints.close()
    assert progress.step == STEPS
    return state


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


def test_interrupted_and_resumed_equals_uninterrupted(start, whole, tmp_path, params, optimizer, monkeypatch):
    class Killed(BaseException):
        pass

    taken, batch = itertools.count(1), run.data_lib.batch

    def batch_or_end(rows, size):
        if next(taken) == 8:
            raise Killed
        return batch(rows, size)

    with monkeypatch.context() as patch:
        patch.setattr(run.data_lib, 'batch', batch_or_end)
        with pytest.raises(Killed):
            start(tmp_path / 'run')
    lines = read_jsonl(tmp_path / 'run' / 'metrics.jsonl')
    assert {path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()} == {'4'}
    assert lines[-1]['step'] == 6, 'lines past the checkpoint are there to be replaced'
    result = start(tmp_path / 'run')
    assert result == run.Result(STEPS, read_jsonl(whole / 'metrics.jsonl')[-1]['heldout_bits_per_byte'])
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    resumed, uninterrupted = (state_of(directory, params, optimizer) for directory in (tmp_path / 'run', whole))
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    timing = [line['step'] for line in read_jsonl(tmp_path / 'run' / 'timing.jsonl')]
    assert timing == list(range(1, STEPS + 1))


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

    def spy(self, state, progress):
        seen[progress.step] = [line['step'] for line in read_jsonl(tmp_path / 'run' / 'metrics.jsonl')]
        save(self, state, progress)

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
    taken = list(run._batches(rows(0), Progress(), 12, size))
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
        rest = list(run._batches(rows(progress.next_row), progress, 12, size))
        assert [progress for _, progress in rest] == [progress for _, progress in taken[cut:]]
        for (found, _), (wanted, _) in zip(rest, taken[cut:], strict=True):
            np.testing.assert_array_equal(found['index'], wanted['index'])
