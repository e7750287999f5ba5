"""A step on many devices is the step on one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from tests.support import random_params
from train import parallel
from train.parallel import MeshConfig
from train.step import State, as_batch, batch_gradients, eval_step, init_state

ROWS = 8


@pytest.fixture(scope='module')
def rows(model) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, each cut elsewhere."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, 17)).astype(np.int32)
    places, ends = np.arange(17), np.arange(6, 6 + ROWS)[:, None]
    segments = np.where(places < ends, 1, np.where(places < ends + 3, 2, 0)).astype(np.int32)
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32)
    return {'tokens': tokens, 'segments': segments, 'weights': weights}


def gradients(params, rows, model, objective, microbatch_size, mesh):
    compute = jax.jit(
        lambda params, batch: batch_gradients(params, batch, 0.7, model, objective, microbatch_size, mesh)
    )
    if mesh is not None:
        params = jax.device_put(params, parallel.places(params, params, mesh))
    return compute(params, as_batch(rows, mesh))


@pytest.fixture(scope='module')
def alone(params, rows, model, objective):
    """Gradient, value and terms on one device."""
    return gradients(params, rows, model, objective, None, None)


@pytest.mark.parametrize(
    ('config', 'microbatch_size'),
    [(MeshConfig(data=4, fsdp=2), None), (MeshConfig(fsdp=2), 4)],
    ids=['all_rows_at_once', 'microbatches'],
)
def test_gradients_and_losses_equal_those_of_one_device(params, rows, model, objective, alone, config, microbatch_size):
    mesh = config.make()
    found = gradients(params, rows, model, objective, microbatch_size, mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max()), found, alone)
    np.testing.assert_array_equal(found[2].load_LE, alone[2].load_LE)
    for leaf, place in zip(
        jax.tree.leaves(found[0]), jax.tree.leaves(parallel.places(params, params, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_evaluation_equals_that_of_one_device(params, rows, model, objective):
    mesh = MeshConfig(data=2, fsdp=2).make()
    wanted = eval_step(params, as_batch(rows), model=model, config=objective)
    placed = jax.device_put(params, parallel.places(params, params, mesh))
    found = eval_step(placed, as_batch(rows, mesh), model=model, config=objective, layout=mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, wanted)


def test_state_is_made_in_its_places_and_is_that_of_one_device(model, optimizer):
    mesh = MeshConfig(data=4, fsdp=2).make()
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), model, optimizer))
    places = parallel.places(shapes, shapes.params, mesh)
    state, whole = (init_state(jax.random.key(0), model, optimizer, places=given) for given in (places, None))
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert state.params['embedding_VD'].sharding.spec == PartitionSpec(None, 'fsdp')
    moments = {leaf.sharding.spec for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (272, 16)}
    assert moments == {PartitionSpec(None, 'fsdp')}
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_without_a_mesh_everything_lies_on_the_first_device(params):
    state = State(params, {'mu': params}, np.zeros(3))  # pyright: ignore[reportArgumentType]
    assert set(jax.tree.leaves(parallel.places(state, params, None))) == {SingleDeviceSharding(jax.devices()[0])}


def test_bad_meshes_are_refused(model):
    with pytest.raises(
        ValueError, match=r'data=3 x stage=1 x fsdp=4 x expert=1 x context=1 are 12 devices, there are 8'
    ):
        MeshConfig(data=3, fsdp=4).make()
    with pytest.raises(ValueError, match=r'MeshConfig.fsdp=0 must be positive'):
        MeshConfig(fsdp=0)
    with pytest.raises(ValueError, match=r'MeshConfig.stage_parts=2 needs stage above 1'):
        MeshConfig(stage_parts=2)
    assert MeshConfig().make() is None
    odd = random_params(dataclasses.replace(model, model_dim=12))
    with pytest.raises(ValueError, match=r"12 is not a multiple of the 8 devices of mesh axis 'fsdp'"):
        parallel.places(odd, odd, MeshConfig(fsdp=8).make())
