import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import CheckpointConfig, Checkpoints, Progress
from train.ema import Average
from train.guard import GuardConfig, no_history
from train.optimizer import OptimizerConfig, make_optimizer
from train.schedule import Schedule
from train.step import State

OPTIMIZER = OptimizerConfig(learning_rate=Schedule(pieces=(('constant', 1.0, 1.0),)))


def make_state(seed: int, width: int = 6) -> State:
    """A state with float32 parameters, bfloat16 moments, a counter and a leaf without moments."""
    draw = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    params = {
        'head_DV': array(4, width),
        'moe_layers': {'moe': {'router': {'w_router_DE': array(2, 4, 3), 'router_bias_E': array(2, 3)}}},
    }
    moments = make_optimizer(OPTIMIZER).init(params)
    rest = moments, no_history(GuardConfig())
    return State(params, *jax.tree.map(lambda leaf: jnp.asarray(draw.integers(1, 99, leaf.shape), leaf.dtype), rest))


def shapes_of(state: State) -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_same(found: State, wanted: State) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one run directory; all are closed in the end."""
    made = []

    def open_(**config) -> Checkpoints:
        made.append(Checkpoints(tmp_path, CheckpointConfig(**config)))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def steps_in(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / 'checkpoints').iterdir()}


def test_state_and_progress_come_back_bit_for_bit(opened, tmp_path):
    assert opened().latest_step is None
    progress = Progress(step=7, tokens=3 * 10**12, next_row=2**40 + 1)
    checkpoints = opened()
    checkpoints.save(make_state(0), progress)
    checkpoints.close()
    again = opened()
    assert again.latest_step == 7
    state, found = again.restore(shapes_of(make_state(1)))
    assert found == progress
    assert all(type(value) is int for value in dataclasses.astuple(found))
    assert_same(state, make_state(0))


def test_arrays_may_be_given_away_while_they_are_saved(opened):
    checkpoints = opened()
    state = make_state(0)
    checkpoints.save(state, Progress(step=1))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.close()
    assert_same(opened().restore(shapes_of(make_state(0)))[0], make_state(0))


@pytest.mark.parametrize(
    ('config', 'kept'),
    [({'keep': 2}, {6, 7}), ({'keep': 1, 'keep_every': 3}, {3, 6, 7}), ({'keep': 9}, {1, 2, 3, 4, 5, 6, 7})],
)
def test_which_checkpoints_stay(opened, tmp_path, config, kept):
    checkpoints, state = opened(**config), make_state(0)
    for step in range(1, 8):
        checkpoints.save(state, Progress(step=step))
    checkpoints.close()
    assert steps_in(tmp_path) == {str(step) for step in kept}
    assert opened(**config).latest_step == 7


def test_a_step_is_saved_once(opened):
    checkpoints = opened()
    checkpoints.save(make_state(0), Progress(step=3, tokens=30))
    checkpoints.close()
    checkpoints = opened()
    checkpoints.save(make_state(1), Progress(step=3, tokens=31))
    checkpoints.close()
    state, progress = opened().restore(shapes_of(make_state(0)))
    assert progress.tokens == 30
    assert_same(state, make_state(0))


def test_a_checkpoint_left_unfinished_does_not_count(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(make_state(0), Progress(step=1))
    checkpoints.save(make_state(1), Progress(step=2))
    checkpoints.close()
    folder = tmp_path / 'checkpoints'
    # As a process leaves it that is killed before the last step of a save, the renaming.
    (folder / '2').rename(folder / '2.orbax-checkpoint-tmp')
    checkpoints = opened()
    assert checkpoints.latest_step == 1
    assert_same(checkpoints.restore(shapes_of(make_state(0)))[0], make_state(0))
    checkpoints.save(make_state(2), Progress(step=2))
    checkpoints.close()
    assert steps_in(tmp_path) == {'1', '2'}
    assert_same(opened().restore(shapes_of(make_state(0)))[0], make_state(2))


def test_another_shape_is_refused_by_name_and_left_alone(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(make_state(0), Progress(step=1))
    checkpoints.close()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match=r'another shape: params/head_DV is \(4, 6\) in it and \(4, 5\) in the conf'):
        opened().restore(shapes_of(make_state(0, width=5)))
    missing = make_state(0)
    missing.params['final_norm_D'] = jnp.ones(4)
    with pytest.raises(ValueError, match=r'params/final_norm_D is absent in it and \(4,\)'):
        opened().restore(shapes_of(missing))
    other = make_state(0)
    other = other._replace(optimizer={'momentum': jnp.ones(3)})
    with pytest.raises(ValueError, match='another shape: optimizer/'):
        opened().restore(shapes_of(other))
    other = make_state(0)._replace(guard=no_history(GuardConfig(window=64)))
    with pytest.raises(ValueError, match=r'another shape: guard/norms is \(128,\) in it and \(64,\)'):
        opened().restore(shapes_of(other))
    assert sorted(tmp_path.rglob('*')) == before


def test_a_checkpoint_without_the_history_is_refused(opened, tmp_path):
    """As runs left them before there was one."""
    checkpoints, state = opened(), make_state(0)
    parts = {'params': state.params, 'optimizer': state.optimizer, 'progress': {'step': 1, 'tokens': 1, 'next_row': 1}}
    checkpoints._checkpointer.save_checkpointables_async(1, parts)
    checkpoints.close()
    with pytest.raises(ValueError, match="checkpoint 1 of .* has no part 'guard'"):
        opened().restore(shapes_of(state))


def test_average_comes_back_bit_for_bit_as_it_was_when_saved(opened):
    draw = np.random.default_rng(0)
    state = make_state(0)
    wanted = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), state.params)
    average = Average(jax.tree.map(np.copy, wanted), 7)
    checkpoints = opened()
    assert checkpoints.restore_average(state.params) is None
    checkpoints.save(state, Progress(step=1), average)
    jax.tree.map(lambda leaf: leaf.fill(0), average.params)
    checkpoints.close()
    found = opened().restore_average(shapes_of(state).params)
    assert found.updates == 7
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found.params)), 'it never was on a device'
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted)
    assert_same(opened().restore(shapes_of(state))[0], state)


def test_a_checkpoint_may_hold_no_average(opened):
    checkpoints = opened()
    checkpoints.save(make_state(0), Progress(step=1))
    checkpoints.close()
    assert opened().restore_average(make_state(0).params) is None


@pytest.mark.parametrize('config', [{'keep': 0}, {'keep_every': 0}])
def test_bad_value_is_refused(config):
    (name,) = config
    with pytest.raises(ValueError, match=f'CheckpointConfig.{name}=0 must be positive'):
        CheckpointConfig(**config)
