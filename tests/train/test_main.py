"""`python -m train` as its users start it: in processes of their own, without the checks of the test session."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

import deepseek_jax as ds
from tests.conftest import ROOT
from train import __main__, run
from train.errors import TrainingError
from train.metrics import read_jsonl

ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(ROOT)}

# Runs the module once for each line of arguments, because importing it takes seconds.
SERVE = """
import contextlib, io, json, runpy, sys, traceback
for line in sys.stdin:
    sys.argv = ['train', *json.loads(line)]
    code, out = 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module('train', run_name='__main__', alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    print(json.dumps([code, out.getvalue()]), flush=True)
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Path:
    """The working directory of the commands."""
    place = tmp_path_factory.mktemp('place')
    (place / 'empty').mkdir()
    (place / 'a_file').write_text('kept')
    (place / 'notes').mkdir()
    (place / 'notes' / 'a.txt').write_text('kept')
    (place / 'broken.gin').write_text('TOTAL_STEPS = = 3\n')
    (place / 'little.gin').write_text(
        'from __gin__ import dynamic_registration\nfrom train import run\nrun.train.seed = 3\n'
    )
    return place


@pytest.fixture(scope='module')
def command(place) -> Iterator[Callable[..., Ended]]:
    """`python -m train` with the given arguments."""
    errors = place.parent / f'{place.name}_stderr'
    with errors.open('wb') as stderr, errors.open('rb') as written:
        server = subprocess.Popen(
            [sys.executable, '-c', SERVE],
            cwd=place,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert server.stdin is not None
        assert server.stdout is not None

        def command(*arguments: str | Path) -> Ended:
            print(json.dumps([str(argument) for argument in arguments]), file=server.stdin, flush=True)
            code, out = json.loads(server.stdout.readline())
            return Ended(code, out, written.read().decode())

        yield command
        server.stdin.close()
        server.stdout.close()
        assert server.wait() == 0


def contents(directory: Path) -> dict[Path, bytes | None]:
    """Everything below a directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob('*')}


REFUSED = {
    'configuration that is not there': (['--config', 'gone.gin'], ["'gone.gin'", 'does not exist']),
    'configuration that does not parse': (['--config', 'broken.gin'], ['broken.gin', 'line 1']),
    'configuration without values': (['--config', 'little.gin'], ['required keyword-only', "'total_steps'"]),
    'no configuration': ([], ['--config', 'required']),
    'unknown option': (['--config', '{config}', '--bogus'], ['--bogus']),
    'profile of no number of steps': (['--profile', 'many'], ['--profile', "invalid int value: 'many'"]),
    'profile of more steps than the run has': (['--profile', '29'], ['steps_left=60 must exceed 62', '29 twice']),
    'profile of no steps': (['--profile', '0'], ['profile=0 must be at least 1']),
    'unknown macro': (['--set', 'TOTAL_STEP = 3'], ['TOTAL_STEP = 3', 'no macro named']),
    'macro that nothing sets': (['--set', 'SEED = %NO_SUCH'], ["'NO_SUCH/gin.macro'", 'No bindings']),
    'unknown name': (['--set', 'nothing.such = 3'], ['nothing.such = 3', "No configurable matching 'nothing'"]),
    'unknown field': (['--set', 'config.MLAConfig.heads = 3'], ["doesn't have a parameter named 'heads'"]),
    'no value': (['--set', 'TOTAL_STEPS ='], ["'TOTAL_STEPS ='", 'Unable to parse']),
    'no name': (['--set', 'TOTAL_STEPS'], ["'TOTAL_STEPS'", "'NAME = value'"]),
    'wrong type of a macro': (['--set', "BATCH_SIZE = 'four'"], ["train.batch_size='four'", 'of type int']),
    'wrong type of a field': (['--set', 'config.RopeConfig.theta = None'], ['RopeConfig.theta=None', 'of type float']),
    'wrong choice': (['--set', "PRECISION = 'fp7'"], ["recipe='fp7'", "'fp32', 'bf16'"]),
    'class for an object': (
        ['--set', 'data.DataConfig.source = @sources.TextDirectory'],
        ['DataConfig.source', 'must be an instance'],
    ),
    'number out of range': (['--set', 'TOTAL_STEPS = 0'], ['train.total_steps=0', 'at least 1']),
    'top-k above the allowed groups': (
        ['--set', 'config.MoEConfig.top_k = 3'],
        ['top_k=3', 'exceeds the 2 experts in the allowed groups'],
    ),
    'bfloat16 moments that would never decay': (
        ['--set', 'optimizer.OptimizerConfig.beta2 = 0.999'],
        ['beta2=0.999', 'use beta2 <= 0.99'],
    ),
    'vocabulary smaller than the tokenizer': (
        ['--set', 'config.ModelConfig.vocab_size = 263'],
        ['vocab_size=263', '264 ids', "'bytes'"],
    ),
    'empty corpus': (['--set', "sources.TextDirectory.path = 'empty'"], ['empty holds no documents', '*.txt']),
    'corpus that is not there': (['--set', "sources.TextDirectory.path = 'gone'"], ['gone is not a directory']),
    'corpus smaller than a row': (['--set', 'SEQUENCE_LENGTH = 100000'], ['sequence_length=100000', 'shorten']),
    'tokenizer that is not there': (['--set', "data.DataConfig.tokenizer = 'gone.json'"], ["'gone.json' does not exist"]),
    'initial parameters that are not there': (['--set', "run.train.init_from = 'gone'"], ['gone/config.json is missing']),
    'initial parameters in a directory without any': (['--set', "run.train.init_from = 'notes'"], ['notes/config.json']),
    'run directory that is a file': (['--run-dir', 'a_file'], ["run_dir='a_file'", "'a_file' is a file", 'name a directory']),
    'run directory below a file': (['--run-dir', 'a_file/run'], ["run_dir='a_file/run'", "'a_file' is a file", 'name a directory']),
    'run directory that holds something else': (['--run-dir', 'notes'], ['notes is not a run directory', 'model.json']),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_ends_with_2_and_one_line_and_nothing_written(command, place, config_file, case):
    arguments, phrases = REFUSED[case]
    if arguments and '--config' not in arguments:
        arguments = ['--config', str(config_file), *arguments]
    arguments = [argument.format(config=config_file) for argument in arguments]
    if '--run-dir' not in arguments:
        arguments += ['--run-dir', 'run']
    before = contents(place)
    ended = command(*arguments)
    assert ended.code == 2, ended.err
    assert ended.out == ''
    assert ended.err.startswith('error: ')
    assert ended.err.endswith('\n')
    assert ended.err.count('\n') == 1
    assert len(ended.err) < 400
    for phrase in phrases:
        assert phrase in ended.err
    assert contents(place) == before


@pytest.fixture
def called(monkeypatch) -> Callable[..., dict]:
    """What `main` calls `train` with, which does what it is told instead; and the exit code."""

    def called(*arguments: str, ending: BaseException | None = None, stopped: run.Result | None = None) -> dict:
        given: dict = {}

        def call(function, **keywords):
            given.update(keywords, function=function)
            if ending is not None:
                raise ending
            if stopped is not None:
                keywords['stop'].received = signal.SIGTERM
            return stopped

        monkeypatch.setattr(__main__.loader, 'parse', lambda *_: None)
        monkeypatch.setattr(__main__.loader, 'call', call)
        monkeypatch.setattr('sys.argv', ['train', '--config', 'some.gin', *arguments])
        return given | {'code': __main__.main()}

    return called


def test_profile_is_handed_on_and_prints_no_configuration(called, capsys):
    given = called('--profile', '3')
    assert (given['function'], given['profile'], given['print_only'], given['code']) == (run.train, 3, False, 0)
    assert capsys.readouterr().out == ''
    assert called()['profile'] is None


def test_a_run_that_cannot_go_on_ends_with_1_and_one_line(called, capsys):
    assert called(ending=TrainingError('too many steps skipped'))['code'] == 1
    assert capsys.readouterr().err == 'error: too many steps skipped\n'


def test_a_run_that_a_signal_ended_exits_as_shells_say_it(called, capsys):
    assert called(stopped=run.Result(7, None, finished=False))['code'] == 128 + signal.SIGTERM
    assert capsys.readouterr().err == 'step 7 is saved: the same command goes on from it\n'
    assert called(stopped=run.Result(9, 1.5))['code'] == 0, 'it came with the last step'


@pytest.fixture(scope='module')
def trained(command, place, config_file) -> tuple[Path, Ended]:
    """A run of two steps on JSON lines, the third of which is not UTF-8."""
    lines = [json.dumps({'text': f'record {number} of the file, and the same words again'}) for number in range(40)]
    encoded = [line.encode() for line in lines]
    encoded[2] = b'{"text": "caf\xe9"}'
    (place / 'lines.jsonl').write_bytes(b'\n'.join(encoded))
    (place / 'lines.gin').write_text(
        'from __gin__ import dynamic_registration\n'
        'from train import data\n'
        'from train import sources\n'
        f"include '{config_file}'\n"
        'TOTAL_STEPS = 2\n'
        'data.DataConfig.source = @sources.JsonLines()\n'
        "sources.JsonLines.path = 'lines.jsonl'\n"
    )
    return place / 'runs' / 'lines', command('--config', 'lines.gin')


def test_bad_line_is_reported_with_its_number_and_training_goes_on(trained):
    directory, ended = trained
    assert ended.code == 0, ended.err
    reported = [line for line in ended.err.splitlines() if 'left out' in line]
    assert len(reported) == 2
    assert "lines.jsonl:3: line left out: 'utf-8'" in reported[0]
    assert 'lines.jsonl: 1 lines left out, 39 kept' in reported[1]
    assert [line['step'] for line in read_jsonl(directory / 'metrics.jsonl')] == [1, 2, 2]


def test_run_directory_defaults_to_the_name_of_the_configuration(trained, place):
    assert {path.name for path in (place / 'runs').iterdir()} == {'lines'}
    assert {path.name for path in trained[0].iterdir()} == {
        'config.gin', 'model.json', 'metrics.jsonl', 'timing.jsonl', 'loss.png', 'checkpoints',
    }  # fmt: skip


def test_saved_configuration_starts_the_same_run(trained, command, tmp_path):
    directory = trained[0]
    assert 'optimizer.OptimizerConfig.epsilon = 1e-08\n' in (directory / 'config.gin').read_text(), 'defaults are kept'
    ended = command('--config', directory / 'config.gin', '--run-dir', tmp_path / 'run')
    assert ended.code == 0, ended.err
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == (directory / 'metrics.jsonl').read_bytes()
    assert (tmp_path / 'run' / 'config.gin').read_text() == (directory / 'config.gin').read_text()


def test_run_of_another_model_is_refused_and_left_alone(trained, command, place):
    before = contents(place)
    ended = command('--config', 'lines.gin', '--set', 'config.ModelConfig.model_dim = 24')
    assert (ended.code, ended.out) == (2, '')
    assert ended.err == 'error: runs/lines holds a run of another shape: its model has model_dim=16, not 24\n'
    assert contents(place) == before


def test_checkpoint_of_another_shape_is_refused_and_left_alone(trained, command, tmp_path):
    directory = tmp_path / 'run'
    shutil.copytree(trained[0], directory)
    model = (directory / 'model.json').read_text()
    (directory / 'model.json').write_text(model.replace('"dense_ffn_dim": 32', '"dense_ffn_dim": 40'))
    before = contents(tmp_path)
    arguments = ['--config', 'lines.gin', '--run-dir', directory, '--set', 'config.ModelConfig.dense_ffn_dim = 40']
    ended = command(*arguments, '--set', 'TOTAL_STEPS = 4')
    assert (ended.code, ended.out) == (2, '')
    errors = [line for line in ended.err.splitlines() if 'left out' not in line]
    assert len(errors) == 1
    assert errors[0].startswith('error: the checkpoint is of another shape: params/dense_layers/ffn/')
    assert '(1, 16, 32) in it and (1, 16, 40) in the configured model' in errors[0] or '(1, 32, 16)' in errors[0]
    assert contents(tmp_path) == before


def committed(directory: Path) -> int:
    """The newest whole checkpoint's step, 0 before the first."""
    with contextlib.suppress(FileNotFoundError):
        return max((int(path.name) for path in (directory / 'checkpoints').iterdir() if path.name.isdigit()), default=0)
    return 0


def last_line(directory: Path) -> int:
    """The step of the last line of metrics, 0 before the first."""
    return max((line['step'] for line in read_jsonl(directory / 'metrics.jsonl')), default=0)


@pytest.mark.timeout(600)
def test_killed_run_started_again_writes_the_same_bytes(command, config_file, tmp_path):
    # First: the other processes find its compiled programs.
    ended = command('--config', config_file, '--run-dir', tmp_path / 'whole')
    assert ended.code == 0, ended.err
    directory = tmp_path / 'killed'
    arguments = [sys.executable, '-m', 'train', '--config', str(config_file), '--run-dir', str(directory)]
    with subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 200
        while not 0 < committed(directory) < last_line(directory):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    step = committed(directory)
    assert 10 <= step < last_line(directory) < 60, 'a whole checkpoint, lines beyond it, steps left'
    again = subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert f'from step {step} to 60' in again.stderr
    assert (directory / 'metrics.jsonl').read_bytes() == (tmp_path / 'whole' / 'metrics.jsonl').read_bytes()
    steps = [line['step'] for line in read_jsonl(directory / 'metrics.jsonl')]
    assert steps == sorted([*range(1, 61), 45, 60])
    assert [line['step'] for line in read_jsonl(directory / 'timing.jsonl')] == list(range(1, 61))
    states = [ds.load_run(tmp_path / name)[1] for name in ('whole', 'killed')]
    jax.tree.map(np.testing.assert_array_equal, *states)
