"""Experts on many devices compute what one device computes; what has no room is counted."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import deepseek_jax as ds
from deepseek_jax import gather, moe, router, sharding
from deepseek_jax.ops import QTensor
from tests.support import TINY, changed, random_params
from tests.train.meshes import OnMeshes, assert_close
from train import parallel
from train.parallel import MeshConfig

ONE_HOP, TWO_HOPS = MeshConfig(data=2, expert=4), MeshConfig(expert=8, expert_nodes=2)
LAYOUTS = {
    'data 2 x expert 4': ONE_HOP,
    'fsdp 2 x expert 2': MeshConfig(fsdp=2, expert=2),
    'node 2 x gpu 4': TWO_HOPS,
    'fsdp 8': MeshConfig(fsdp=8),
    'fsdp 8, ZeRO-3': MeshConfig(fsdp=8, zero=3),
    'fsdp 2 x expert 4, ZeRO-3': MeshConfig(fsdp=2, expert=4, zero=3),
    'node 2 x gpu 2 x fsdp 2, ZeRO-3': MeshConfig(fsdp=2, expert=4, expert_nodes=2, zero=3),
}
SIZES = {'rows': 8, 'length': 16}


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (SIZES['rows'], SIZES['length'] + 1))
    segments = np.where(np.arange(SIZES['length'] + 1) < 9, 1, 2) * np.ones_like(tokens)
    weights = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)
    return {'tokens': tokens.astype(np.int32), 'segments': segments.astype(np.int32), 'weights': weights}


STEP = OnMeshes(TINY, batch())


@pytest.mark.parametrize('name', LAYOUTS)
def test_loss_and_every_gradient_equal_those_of_one_device(name):
    STEP.check_gradients(LAYOUTS[name])


@pytest.mark.parametrize(
    ('config', 'remat'),
    [(TWO_HOPS, 'paper'), (ONE_HOP, 'full'), (MeshConfig(fsdp=4, zero=3), 'paper')],
    ids=['two_hops', 'one_hop', 'zero_3'],
)
def test_so_do_those_in_parts_and_recomputed(config, remat):
    STEP.check_gradients(config, 8, dataclasses.replace(TINY, remat=remat))


@pytest.mark.parametrize(
    ('mesh', 'heads', 'tolerance'),
    [
        (MeshConfig(fsdp=2), 2, 1e-5),
        (MeshConfig(fsdp=2), 16, 1e-5),
        # Other fusions round bf16 elsewhere, in the backward pass.
        (MeshConfig(fsdp=2, expert=2), 16, 2e-2),
    ],
    ids=['parts_of_heads', 'fsdp', 'fsdp_and_expert'],
)
def test_blocks_gather_float8_copies_of_what_they_would_quantise(mesh, heads, tolerance, monkeypatch):
    """Widths of which the parts are whole blocks, and heads of which they are, or are not."""
    model = changed(
        TINY,
        num_layers=2,
        mtp_depth=0,
        model_dim=256,
        dense_ffn_dim=128,
        mla={
            'kv_rank': 256,
            'query_rank': 128,
            'num_heads': heads,
            'rope_head_dim': 16,
            'nope_head_dim': 32,
            'value_head_dim': 16,
        },
        moe={'ffn_dim': 128},
        precision=ds.PrecisionConfig(recipe='fp8'),
    )
    once, _ = STEP.gradients(mesh, None, model)
    gathered, whole = [], gather.whole
    monkeypatch.setattr(
        gather, 'whole', lambda name, part, *rest: gathered.append((name, part)) or whole(name, part, *rest)
    )
    found, _ = STEP.gradients(dataclasses.replace(mesh, zero=3), None, model)
    assert_close(found[0], once[0], tolerance)
    assert_close(found[1:], once[1:])
    float8 = {name for name, part in gathered if isinstance(part, QTensor)}
    assert {'w_dq_DQ', 'w_o_HUD', 'w_gate_DF'} <= float8
    assert float8.issuperset({'w_uq_QHN', 'w_qr_QHR', 'w_uk_CHN', 'w_uv_CHU'}) == (heads == 16)


def test_evaluation_equals_that_of_one_device():
    STEP.check_evaluation(TWO_HOPS)


# A layer of experts alone, with given choices.


def choices(name: str) -> np.ndarray:
    """Of 64 tokens three of eight experts each, in two of the four groups; the skewed ones prefer experts 0 to 3."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(64):
        groups = rng.choice(4, 2, replace=False, p=None if name == 'even' else [0.55, 0.35, 0.05, 0.05])
        found.append(rng.permutation([2 * groups[0], 2 * groups[0] + 1, 2 * groups[1] + rng.integers(2)]))
    return np.array(found, np.int32)


def layer(config: MeshConfig, recipe: str, name: str) -> dict[str, np.ndarray]:
    """Output, gradients and dropped choices of the routed experts, their widths whole float8 tiles."""
    shape = (8, 128, 128)
    keys = iter(jax.random.split(jax.random.key(0), 6))
    weights = {name: jax.random.normal(next(keys), shape) / 12 for name in moe.EXPERT_NAMES}
    x_MD = jax.random.normal(next(keys), (64, 128)).astype(jnp.float32 if recipe == 'fp32' else jnp.bfloat16)
    gates_MK = jax.nn.softmax(jax.random.normal(next(keys), (64, 3)))
    d_MD = jax.random.normal(next(keys), (64, 128))
    precision = ds.PrecisionConfig(recipe=recipe, power_of_two_scales=recipe == 'fp8')
    assert TINY.moe is not None
    layout = config.make()

    def run(weights: dict, x_MD: jax.Array, gates_MK: jax.Array, experts_MK: jax.Array, d_MD: jax.Array) -> dict:
        def outputs(weights: dict, x_MD: jax.Array, gates_MK: jax.Array) -> tuple:
            routing = router.Routing(gates_MK, experts_MK, gates_MK)
            experts = None if layout is None else layout.parallel.experts
            y_MD, dropped = moe.routed_experts(weights, x_MD, routing, TINY.moe, precision, experts)
            return jnp.sum(y_MD * d_MD), (y_MD, dropped)

        gradients, (y_MD, dropped) = jax.grad(outputs, (0, 1, 2), has_aux=True)(weights, x_MD, gates_MK)
        found = {'y': y_MD, 'd_x': gradients[1], 'd_gates': gradients[2], **gradients[0]}
        return {**found, 'dropped': dropped if layout is None else jax.lax.psum(dropped, sharding.AXES)}

    if layout is not None:
        rows, experts = sharding.BATCH, PartitionSpec(sharding.EXPERT_AXES)
        out = {'y': rows, 'd_x': rows, 'd_gates': rows, **dict.fromkeys(weights, experts), 'dropped': PartitionSpec()}
        run = jax.shard_map(
            run, mesh=layout.mesh, in_specs=(experts, rows, rows, rows, rows), out_specs=out, check_vma=False
        )
    found = jax.jit(run)(weights, x_MD, gates_MK, choices(name), d_MD)
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def errors(found: dict, wanted: dict) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
        for name, value in wanted.items()
        if name != 'dropped'
    }


@pytest.mark.parametrize('config', [MeshConfig(expert=4), TWO_HOPS], ids=['one_hop', 'two_hops'])
@pytest.mark.parametrize(('recipe', 'bound'), [('fp32', 1e-6), ('bf16', 4e-3), ('fp8', 4e-3)])
def test_a_layer_loses_nothing_on_the_way_but_a_rounding_to_bf16(recipe, bound, config):
    """Rows travel in float8, and where scales are powers of two everywhere, a device reads what one device alone would; what
    devices add to a row is rounded to bf16 before it returns."""
    found, wanted = layer(config, recipe, 'skewed'), layer(MeshConfig(), recipe, 'skewed')
    assert found['dropped'] == wanted['dropped'] == 0
    assert max(errors(found, wanted).values()) < bound
    if recipe == 'fp8':
        assert min(errors(found, layer(MeshConfig(), 'fp32', 'skewed')).values()) > 2 * bound  # float8 it is


@pytest.mark.parametrize('factor', [0.5, 0.8, 1.25])
@pytest.mark.parametrize('name', ['even', 'skewed'])
def test_choices_without_room_are_counted_exactly(name, factor):
    """A count by hand: every device sends each other one the first rows that it has for it, and computes the first choices in the order of
    its experts."""
    found = layer(MeshConfig(expert=4, capacity_factor=factor), 'fp32', name)
    experts_MK = choices(name)
    rows, per = 16, 2
    slots = min(rows, int(np.ceil(factor * rows * 2 / 4)))  # a row goes to two devices at most
    computed = collections.Counter()
    for sender in range(4):
        sent = collections.Counter()
        for experts in experts_MK[sender * rows : (sender + 1) * rows]:
            for device in set(experts // per):
                sent[device] += 1
                if sent[device] <= slots:
                    computed[device] += int((experts // per == device).sum())
    room = int(np.ceil(factor * rows * 3))
    dropped = experts_MK.size - sum(min(count, room) for count in computed.values())
    assert found['dropped'] == dropped
    assert (dropped > 0) == (factor < 1 or name == 'skewed')


@pytest.mark.parametrize('recipe', ['fp32', 'bf16', 'fp8'])
def test_a_choice_that_is_dropped_adds_nothing(recipe):
    """Outputs of rows that lost nothing are what they were, those of the others lack an expert, and all is finite."""
    config = MeshConfig(expert=8, expert_nodes=2, capacity_factor=0.7)
    found, wanted = layer(config, recipe, 'skewed'), layer(MeshConfig(), recipe, 'skewed')
    assert all(np.isfinite(value).all() for value in found.values())
    apart = np.linalg.norm(found['y'] - wanted['y'], axis=1) > 0.02 * np.linalg.norm(wanted['y'], axis=1)
    assert found['dropped'] / 3 <= apart.sum() <= found['dropped']
    gone = (found['d_gates'] == 0) & (wanted['d_gates'] != 0)
    assert gone.sum() == found['dropped']


def test_bad_expert_meshes_are_refused():
    with pytest.raises(ValueError, match=r'expert=6 must be a multiple of expert_nodes=4'):
        MeshConfig(expert=6, expert_nodes=4)
    with pytest.raises(ValueError, match=r'capacity_factor=0.0 must be positive'):
        MeshConfig(expert=2, capacity_factor=0.0)
    with pytest.raises(ValueError, match=r'capacity_factor=2.0 needs expert above 1'):
        MeshConfig(capacity_factor=2.0)
    odd = random_params(changed(TINY, moe={'num_experts': 12}))
    with pytest.raises(ValueError, match=r"12 is not a multiple of the 8 devices of mesh axis 'node x expert'"):
        parallel.places(odd, odd, TWO_HOPS.make())
