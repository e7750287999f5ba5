import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import sharding
from tests.conftest import ROOT
from train import compilation, memory
from train.compilation import StepPrograms, keep_programs
from train.guard import DEFAULT, no_history
from train.optimizer import make_optimizer
from train.step import Hyperparameters, State, as_batch, train_step

VALUES = Hyperparameters(5e-3, 0.3, 1e-3)

COMPILE = """
import jax
from train.compilation import keep_programs
print(keep_programs())
jax.jit(lambda x: x * 3 + 1)(2.0)
"""


def compile_in_a_process(home: Path, **environment: str) -> str:
    """What `keep_programs` gives in a new process, where a program is compiled after it."""
    inherited = {name: value for name, value in os.environ.items() if 'COMPILATION_CACHE' not in name}
    inherited |= {'HOME': str(home), 'PYTHONPATH': str(ROOT), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    inherited.pop('XDG_CACHE_HOME', None)
    done = subprocess.run(
        [sys.executable, '-c', COMPILE], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def programs(folder: Path) -> set[Path]:
    return set(folder.rglob('*-cache'))


def test_programs_are_kept_for_the_next_start(tmp_path):
    directory = tmp_path / '.cache' / 'deepseek_v3_jax' / 'jax'
    assert compile_in_a_process(tmp_path) == str(directory)
    kept = programs(directory)
    assert kept
    assert compile_in_a_process(tmp_path) == str(directory)
    assert programs(tmp_path) == kept, 'nothing was compiled again'


@pytest.mark.parametrize(
    ('environment', 'wanted'),
    [
        ({'XDG_CACHE_HOME': '{place}/xdg'}, '{place}/xdg/deepseek_v3_jax/jax'),
        ({'JAX_COMPILATION_CACHE_DIR': '{place}/mine'}, '{place}/mine'),
        ({'JAX_ENABLE_COMPILATION_CACHE': 'false'}, 'None'),
    ],
)
def test_environment_says_where(tmp_path, environment, wanted):
    environment = {name: value.format(place=tmp_path) for name, value in environment.items()}
    wanted = wanted.format(place=tmp_path)
    assert compile_in_a_process(tmp_path, **environment) == wanted
    assert bool(programs(tmp_path)) == (wanted != 'None')
    assert programs(tmp_path) == programs(Path(wanted))


def test_place_that_cannot_be_written_is_reported_and_training_goes_on(tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', None)
    try:
        assert keep_programs() is None
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert 'compiled programs are not kept: ' in caplog.text


@pytest.fixture
def made(model, optimizer, objective):
    """The programs of a run with batches of these sizes, and the lines it shows."""

    def made(sizes=(4,), microbatch_size=None):
        lines = []
        programs = StepPrograms(
            model=model,
            optimizer=optimizer,
            objective=objective,
            guard=DEFAULT,
            microbatch_size=microbatch_size,
            batch_sizes=sizes,
            sequence_length=16,
            report=lines.append,
        )
        return programs, lines

    return made


@pytest.fixture
def start(params, optimizer) -> State:
    return State(
        jax.tree.map(lambda leaf: leaf.copy(), params), make_optimizer(optimizer).init(params), no_history(DEFAULT)
    )


def rows(size: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 8, (size, 17)).astype(np.int32)
    return {'tokens': tokens, 'segments': np.ones_like(tokens), 'weights': np.ones((size, 16), np.float32)}


def test_program_is_the_step(made, start, model, optimizer, objective):
    programs, lines = made()
    batch = as_batch(rows(4))
    state = jax.tree.map(lambda leaf: leaf.copy(), start)
    assert not programs.has(batch)
    assert programs.compile(start, batch, VALUES) > 0
    assert programs.has(batch)
    assert not programs.has(as_batch(rows(2)))
    found = programs(start, batch, VALUES)
    wanted = train_step(state, batch, VALUES, model=model, optimizer=optimizer, config=objective)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert lines == []


def test_step_before_is_waited_for_where_two_do_not_fit(made, start, monkeypatch):
    """Donated, the state is gone when the second step is given: it is waited for before."""
    waited, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, 'block_until_ready', lambda tree: waited.append(type(tree)) or wait(tree))
    batch = as_batch(rows(4))
    monkeypatch.setattr(memory, 'available_bytes', lambda: 10**12)
    programs, _ = made()
    programs.compile(start, batch, VALUES)
    state, _ = programs(start, batch, VALUES)
    assert waited == []
    monkeypatch.setattr(memory, 'available_bytes', lambda: 10)
    programs.compile(state, batch, VALUES)
    programs(state, batch, VALUES)
    assert waited == [State]


def test_microbatches_on_eight_devices_are_the_step_on_one(made, start):
    """Two steps, so that the state must come out as it went in; its memory is used again."""
    batch = as_batch(rows(16))
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places = jax.tree.map(lambda leaf: everywhere, start)
    by_name = sharding.param_shardings(start.params, mesh)
    moments = jax.tree.map(lambda leaf: everywhere, start.optimizer)
    state = jax.tree.map(lambda leaf: leaf.copy(), start)
    spread = jax.device_put(state, places._replace(params=by_name, optimizer=moments))
    spread_batch = jax.device_put(rows(16), jax.sharding.NamedSharding(mesh, sharding.BATCH))
    results = []
    for state, given in ((start, batch), (spread, spread_batch)):
        programs, _ = made((16,), microbatch_size=8)
        programs.compile(state, given, VALUES)
        after, _ = programs(state, given, VALUES)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        results.append(programs(after, given, VALUES))
    (state, metrics), (spread, spread_metrics) = results
    np.testing.assert_array_equal(spread_metrics.losses.load_LE, metrics.losses.load_LE)
    for name in ('loss', 'mtp_loss', 'balance_loss', 'nats'):
        np.testing.assert_allclose(getattr(spread_metrics.losses, name), getattr(metrics.losses, name), rtol=1e-4)
    np.testing.assert_allclose(spread_metrics.grad_norm, metrics.grad_norm, rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), spread.params, state.params)
    assert spread.params['head_DV'].sharding.spec == by_name['head_DV'].spec


@pytest.fixture
def scarce(monkeypatch):
    """Devices of 40 bytes; a step needs 8 a sequence of a microbatch, 4 of which full recomputation saves."""

    class Program(jax.stages.Compiled):
        argument_size_in_bytes = output_size_in_bytes = alias_size_in_bytes = generated_code_size_in_bytes = 0

        def __init__(self, size):
            self.temp_size_in_bytes = size

        def memory_analysis(self):
            return self

        def __call__(self, *_):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')

    class Lowered(jax.stages.Lowered):
        def __init__(self, size):
            self.size = size

        def lower(self):
            return self

        def compile(self, compiler_options=None):
            if self.size > 100:
                raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory while compiling')
            return Program(self.size)

    class Step:
        def trace(self, state, batch, values, *, model, microbatch_size, **_):
            return Lowered(microbatch_size * (4 if model.remat == 'full' else 8))

    monkeypatch.setattr(compilation, '_step_to', lambda places, tree: Step())
    monkeypatch.setattr(memory, 'available_bytes', lambda: 40)
    monkeypatch.setattr(memory, '_gib', lambda size: f'{size} B')


def test_program_that_does_not_compile_for_want_of_memory_is_explained(made, start, scarce):
    programs, lines = made((16, 24))
    with pytest.raises(memory.OutOfMemoryError) as error:
        programs.compile(start, as_batch(rows(24)), VALUES)
    assert "train.microbatch_size=24 and ModelConfig.remat='none' needs inf B; a device has 40 B; " in str(error.value)
    assert str(error.value).endswith("what fits is train.microbatch_size=4 and ModelConfig.remat='none': 32 B")
    assert lines == ['out of memory: compiling the training step in smaller parts to see what fits']


def test_program_that_does_not_run_for_want_of_memory_is_explained(made, start, scarce):
    programs, _ = made((8,))
    batch = as_batch(rows(8))
    programs.compile(start, batch, VALUES)
    with pytest.raises(
        memory.OutOfMemoryError, match="remat='none' needs 64 B; .* what fits is train.microbatch_size=4"
    ):
        programs(start, batch, VALUES)


def test_other_errors_stay_what_they_are(made):
    programs, lines = made()
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), programs.explained():
        raise jax.errors.JaxRuntimeError('INTERNAL: something else')
    assert lines == []
