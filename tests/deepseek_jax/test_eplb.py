import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deepseek_jax.eplb import Placement, gpu_loads, rebalance_experts

# The example of https://github.com/deepseek-ai/EPLB: load, cluster and the placement published there.
PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_CLUSTER = {'num_replicas': 16, 'num_groups': 4, 'num_nodes': 2, 'num_gpus': 8}
PUBLISHED_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@st.composite
def problems(draw):
    """A load and a cluster that fit each other, for either policy."""
    num_groups, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_gpus = num_nodes * draw(st.integers(1, 4))
    fewest = -(-num_experts // num_gpus)
    num_replicas = num_gpus * draw(st.integers(fewest, fewest + 3))
    # Large and small, with ties and zeros.
    loads = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6))
    load_LE = draw(arrays.arrays(np.float64, (draw(st.integers(1, 3)), num_experts), elements=loads))
    sizes = {'num_replicas': num_replicas, 'num_groups': num_groups, 'num_nodes': num_nodes, 'num_gpus': num_gpus}
    return load_LE, sizes


def test_placement_equals_the_published_example():
    placement = rebalance_experts(PUBLISHED_LOAD, **PUBLISHED_CLUSTER)
    np.testing.assert_array_equal(placement.physical_to_logical, PUBLISHED_PLACEMENT)
    np.testing.assert_array_equal(placement.replica_counts_LE[0], [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1])
    np.testing.assert_array_equal(placement.logical_to_physical[0, :3], [[12, -1], [13, 15], [11, -1]])
    assert {field.dtype for field in placement} == {np.dtype(np.int32)}


def test_gpu_loads_share_an_expert_equally_among_its_replicas():
    placement = rebalance_experts(PUBLISHED_LOAD, **PUBLISHED_CLUSTER)
    by_hand = [165 / 2 + 39, 165 / 2 + 4, 73 + 104 / 2, 61 + 104 / 2, 183 / 2 + 56, 183 / 2 + 40, 90 + 66, 86 + 66]
    np.testing.assert_allclose(gpu_loads(PUBLISHED_LOAD, placement, 8)[0], by_hand)
    # One expert alone, with two replicas on different GPUs.
    np.testing.assert_array_equal(gpu_loads(np.eye(12)[[5, 5]], placement, 8)[0], [0.5, 0.5, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ('load', 'num_gpus', 'placed'),
    [
        ([1, 10, 2, 3], 2, [1, 0, 3, 2]),  # the second GPU is lighter throughout, but full after two
        ([1, 10, 2, 3], 4, [0, 1, 2, 3]),  # one a GPU: nothing to gain
        ([5, 5, 5, 5], 2, [0, 2, 1, 3]),  # ties go to the lowest index
        ([0, 0], 2, [0, 1]),  # nothing known of the load
    ],
)
def test_packing_fills_the_lightest_gpu_that_has_room(load, num_gpus, placed):
    placement = rebalance_experts([load], num_replicas=len(load), num_groups=1, num_nodes=1, num_gpus=num_gpus)
    np.testing.assert_array_equal(placement.physical_to_logical, [placed])


@given(problems())
def test_maps_are_inverse_and_every_expert_has_a_replica(problem):
    load_LE, sizes = problem
    physical, logical, counts_LE = rebalance_experts(load_LE, **sizes)
    assert physical.shape == (len(load_LE), sizes['num_replicas'])
    assert logical.shape == (*load_LE.shape, counts_LE.max())
    assert counts_LE.shape == load_LE.shape
    assert counts_LE.min() >= 1
    assert np.all(counts_LE.sum(axis=1) == sizes['num_replicas'])
    for layer, expert in np.ndindex(load_LE.shape):
        count = counts_LE[layer, expert]
        np.testing.assert_array_equal(logical[layer, expert, :count], np.flatnonzero(physical[layer] == expert))
        assert np.all(logical[layer, expert, count:] == -1)


@given(problems())
def test_gpus_carry_all_of_the_load(problem):
    load_LE, sizes = problem
    loads = gpu_loads(load_LE, rebalance_experts(load_LE, **sizes), sizes['num_gpus'])
    assert loads.shape == (len(load_LE), sizes['num_gpus'])
    # Halves of the smallest numbers are rounded.
    np.testing.assert_allclose(loads.sum(axis=1), load_LE.sum(axis=1), atol=1e-300)


@given(problems())
def test_replicas_of_a_group_lie_on_one_node_when_nodes_divide_groups(problem):
    load_LE, sizes = problem
    sizes['num_nodes'] = np.gcd(sizes['num_groups'], sizes['num_nodes']).item()
    physical = rebalance_experts(load_LE, **sizes).physical_to_logical
    group = physical // (load_LE.shape[1] // sizes['num_groups'])
    node = np.arange(sizes['num_replicas']) // (sizes['num_replicas'] // sizes['num_nodes'])
    for layer in group:
        assert len(set(zip(layer, node, strict=True))) == sizes['num_groups']


@given(problems())
def test_global_policy_knows_no_groups_or_nodes(problem):
    load_LE, sizes = problem
    as_one = rebalance_experts(load_LE, **{**sizes, 'num_groups': 1, 'num_nodes': 1})
    if sizes['num_groups'] % sizes['num_nodes']:
        placement = rebalance_experts(load_LE, **sizes)
        for field, expected in zip(placement, as_one, strict=True):
            np.testing.assert_array_equal(field, expected)


@given(problems())
def test_replicas_go_to_the_largest_load_per_replica(problem):
    """No expert got its last replica while another had more load per replica, even counted at the end."""
    load_LE, sizes = problem
    counts_LE = rebalance_experts(load_LE, **{**sizes, 'num_groups': 1, 'num_nodes': 1}).replica_counts_LE
    for load_E, counts_E in zip(load_LE, counts_LE, strict=True):
        copied = counts_E > 1
        assert np.all(load_E[copied] / (counts_E[copied] - 1) >= np.max(load_E / counts_E))


@given(problems())
def test_layers_are_independent(problem):
    load_LE, sizes = problem
    together = rebalance_experts(load_LE, **sizes).physical_to_logical
    for layer in range(len(load_LE)):
        alone = rebalance_experts(load_LE[layer : layer + 1], **sizes).physical_to_logical
        np.testing.assert_array_equal(alone[0], together[layer])


# 256 experts in 8 groups: 4 nodes of 8 GPUs, the same with spare replicas, and 18 nodes, which do not divide the groups.
@pytest.mark.parametrize(('num_replicas', 'num_nodes', 'num_gpus'), [(256, 4, 32), (288, 4, 32), (288, 18, 144)])
def test_largest_gpu_load_of_skewed_experts_falls(num_replicas, num_nodes, num_gpus):
    load_LE = np.random.default_rng(0).zipf(1.6, (8, 256)).clip(max=1000)
    placement = rebalance_experts(
        load_LE, num_replicas=num_replicas, num_groups=8, num_nodes=num_nodes, num_gpus=num_gpus
    )
    balanced = gpu_loads(load_LE, placement, num_gpus).max(axis=1)
    # Without replicas the experts lie in order, as evenly as they divide.
    plain = np.array([[part.sum() for part in np.array_split(load_E, num_gpus)] for load_E in load_LE]).max(axis=1)
    assert np.all(balanced <= plain)
    if num_replicas > 256:
        assert balanced.mean() < 0.6 * plain.mean()


@pytest.mark.parametrize(
    ('load', 'message'),
    [
        ([1.0, 2.0], r'load_LE.shape=\(2,\) must be \[layers, experts\]'),
        ([[[1.0, 2.0]]], r'load_LE.shape=\(1, 1, 2\) must be'),
        ([[1.0, 2.0], [3.0, -4.0]], 'load -4.0 of layer=1, expert=1 must be finite and not negative'),
        ([[np.nan, 2.0]], 'load nan of layer=0, expert=0 must be finite'),
        ([[1.0, np.inf]], 'load inf of layer=0, expert=1 must be finite'),
    ],
)
def test_bad_loads_are_refused(load, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(load, num_replicas=2, num_groups=1, num_nodes=1, num_gpus=1)
    with pytest.raises(ValueError, match=message):
        gpu_loads(load, Placement(*np.zeros((3, 0, 0, 0), np.int32)), 1)


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'num_groups': 5}, 'num_experts=12 must be a multiple of num_groups=5'),
        ({'num_nodes': 3}, 'num_gpus=8 must be a multiple of num_nodes=3'),
        ({'num_replicas': 20}, 'num_replicas=20 must be a multiple of num_gpus=8'),
        ({'num_replicas': 8}, 'num_replicas=8 must be at least num_experts=12'),
        *[
            ({name: size}, f'{name}={size} must be positive')
            for name, size in itertools.product(PUBLISHED_CLUSTER, (0, -8))
        ],
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(PUBLISHED_LOAD, **{**PUBLISHED_CLUSTER, **sizes})


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match='num_experts=0 must be positive'):
        rebalance_experts(np.zeros((2, 0)), **PUBLISHED_CLUSTER)


def test_gpu_loads_refuses_another_shape():
    placement = rebalance_experts(PUBLISHED_LOAD, **PUBLISHED_CLUSTER)
    with pytest.raises(ValueError, match=r'load_LE.shape=\(2, 11\) must be that of the placement, \(2, 12\)'):
        gpu_loads(np.ones((2, 11)), placement, 8)
    for num_gpus in (0, 3):
        with pytest.raises(ValueError, match=f'num_gpus={num_gpus} must be positive and divide num_replicas=16'):
            gpu_loads(PUBLISHED_LOAD, placement, num_gpus)
