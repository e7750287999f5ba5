import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.ema import MovingAverage, no_average, updated


def states(count: int, seed: int = 0) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [
        {'head_DV': draw.standard_normal((4, 6), np.float32), 'mtp': {'final_norm_D': np.float32([number])}}
        for number in range(1, count + 1)
    ]


def test_average_weighs_states_by_age_and_forgets_the_zeros():
    average = no_average(jax.eval_shape(lambda: states(1)[0]))
    assert average.updates == 0
    for state in states(9):
        average = updated(average, jax.tree.leaves(state), 0.8)
    weights = 0.8 ** np.arange(9)[::-1]
    wanted = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *states(9))
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5), average.params, wanted)
    assert average.updates == 9
    assert {leaf.dtype for leaf in jax.tree.leaves(average.params)} == {np.dtype('float32')}


def test_first_state_is_its_own_average_and_older_averages_stay():
    (state, other) = states(2)
    first = updated(no_average(state), jax.tree.leaves(state), 0.999)
    jax.tree.map(np.testing.assert_array_equal, first.params, state)
    updated(first, jax.tree.leaves(other), 0.5)
    jax.tree.map(np.testing.assert_array_equal, first.params, state)


@pytest.mark.parametrize('every', [1, 3])
def test_parameters_may_be_given_away_at_once(every):
    given = states(8)
    average = MovingAverage(no_average(given[0]), 0.9, every)
    for step, state in enumerate(given, 1):
        params = jax.tree.map(jnp.asarray, state)
        average.step(params, step)
        jax.tree.map(lambda leaf: leaf.delete(), params)
    found = average.value()
    average.close()
    wanted = no_average(given[0])
    for step, state in enumerate(given, 1):
        if step % every == 0:
            wanted = updated(wanted, jax.tree.leaves(state), 0.9**every)
    assert found.updates == wanted.updates == 8 // every
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)


def test_average_of_parameters_on_several_devices():
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'x'))
    values = np.arange(64, dtype=np.float32).reshape(4, 16)
    average = MovingAverage(no_average({'head_DV': values}), 0.5, 1)
    average.step({'head_DV': jax.device_put(values, spread)}, 1)
    np.testing.assert_array_equal(average.value().params['head_DV'], values)
    average.close()


def test_error_in_the_thread_is_raised():
    average = MovingAverage(no_average({'head_DV': np.zeros(3)}), 0.5, 1)
    average.step({'head_DV': jnp.zeros(4)}, 1)
    with pytest.raises(ValueError, match='broadcast'):
        average.value()
    average.close()
