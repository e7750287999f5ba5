"""Collectives are read off a schedule, with what runs while they travel."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import deepseek_jax as ds
from deepseek_jax import moe, router, sharding
from train.collectives import Collective, collectives
from train.parallel import MeshConfig
from train.preflight import Preflight

PROGRAM = """HloModule step, is_scheduled=true

%body.1 (arg.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg.1 = (s32[], f32[8,4]) parameter(0)
  %rows = u8[8,16]{1,0} custom-call(%arg.1), custom_call_target="SliceToDynamic"
  %all-to-all-start = ((u8[8,16]{1,0}), u8[8,16]{1,0}) all-to-all-start(%rows), channel_id=1, replica_groups=mesh['data'=1,'expert'=4] {'data','expert'}, dimensions={0}, metadata={op_name="jit(step)/experts/dispatch/all_to_all"}
  %fusion.1 = f32[8,4]{1,0} fusion(%arg.1), kind=kLoop, calls=%fused
  %kernel = f32[8,4]{1,0} custom-call(%fusion.1), custom_call_target="mosaic_gpu_v2"
  %all-to-all-done = u8[8,16]{1,0} all-to-all-done(%all-to-all-start)
  ROOT %out = (s32[], f32[8,4]) tuple(%all-to-all-done)
}

ENTRY %main.2 (p0: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %all-gather-start.1 = ((f32[8,4]{1,0}, bf16[2]{0}), (f32[16,4]{1,0}, /*index=1*/bf16[4]{0})) all-gather-start(%p0), replica_groups=[4,2]<=[8], dimensions={0}
  %copy = f32[8,4]{1,0} copy(%p0)
  %all-gather-done.1 = (f32[16,4]{1,0}, bf16[4]{0}) all-gather-done(%all-gather-start.1)
  %while = (s32[], f32[8,4]) while(%p0), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce = f32[2]{0} all-reduce(%copy), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %reduce-scatter = f32[4]{0} reduce-scatter(%copy), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
}
"""


def test_products_that_could_run_meanwhile_are_told_from_those_that_could_not():
    swap = collectives(PROGRAM)[1]
    needs_it = PROGRAM.replace('fusion(%arg.1)', 'fusion(%all-to-all-start)')
    is_needed = PROGRAM.replace('custom-call(%arg.1)', 'custom-call(%kernel)')
    assert [swap.free, *(collectives(text)[1].free for text in (needs_it, is_needed))] == [1, 0, 0]
    ways = (swap, swap._replace(products=0), swap._replace(products=0, others=0, free=0))
    table = str(Preflight(0, 0, [way._replace(axes=(name,)) for way, name in zip(ways, 'abc', strict=True)], 0.0))
    for name, meanwhile in zip(
        'abc', ('a product', 'other kernels, products apart', 'nothing, no product could'), strict=True
    ):
        assert re.search(rf'all-to-all +{name} +dispatch +{meanwhile} +3 ', table)


def test_a_schedule_is_read():
    gather, swap, reduce, scatter = collectives(PROGRAM)
    scope = 'jit(step)/experts/dispatch/all_to_all'
    assert gather == Collective('all-gather', (), 2, 16 * 4 * 4 + 4 * 2, 1, '', 0, 1, 1)
    assert swap == Collective('all-to-all', ('expert',), 4, 128, 3, scope, 1, 1, 1)
    assert reduce == Collective('all-reduce', (), 4, 8, 1, '', 0, 0, 1)
    assert scatter == Collective('reduce-scatter', (), 2, 16, 1, '', 0, 0, 1)
    assert [one.sent_bytes for one in (gather, swap, reduce, scatter)] == [132, 96, 12, 16]
    with pytest.raises(ValueError, match='all-to-all-start is started and never done'):
        collectives(PROGRAM.replace('all-to-all-done(%all-to-all-start)', 'all-to-all-done(%other)'))
    assert collectives('HloModule empty') == []


ROWS, D, TOP_K = 64, 2048, 4
EXPERTS = ds.MoEConfig(num_experts=8, num_shared_experts=0, top_k=TOP_K, num_groups=1, top_groups=1, ffn_dim=128)


@functools.cache
def sent_bytes(recipe: str, config: MeshConfig) -> dict[str, float]:
    """Bytes a row that a device sends for a layer and its gradient, by what for, in the compiled program."""
    layout = config.make()
    assert layout is not None
    precision = ds.PrecisionConfig(recipe=recipe)

    def outputs(weights: dict, x_MD: jax.Array, gates_MK: jax.Array, experts_MK: jax.Array) -> tuple:
        routing = router.Routing(gates_MK, experts_MK, gates_MK)
        y_MD, _ = moe.routed_experts(weights, x_MD, routing, EXPERTS, precision, layout.parallel.experts)
        return y_MD.astype(jnp.float32).sum(), y_MD

    rows, experts = sharding.BATCH, PartitionSpec(sharding.EXPERT_AXES)
    step = jax.shard_map(
        jax.value_and_grad(outputs, (0, 1, 2), has_aux=True),
        mesh=layout.mesh,
        in_specs=(experts, rows, rows, rows),
        out_specs=((PartitionSpec(), rows), (experts, rows, rows)),
        check_vma=False,
    )
    weights = dict.fromkeys(moe.EXPERT_NAMES[:2], jax.ShapeDtypeStruct((8, D, 128), 'float32'))
    weights['w_down_EFD'] = jax.ShapeDtypeStruct((8, 128, D), 'float32')
    shapes = ((D, 'bfloat16'), (TOP_K, 'float32'), (TOP_K, 'int32'))
    others = [jax.ShapeDtypeStruct((config.size * ROWS, width), dtype) for width, dtype in shapes]
    program = jax.jit(step).lower(weights, *others).compile()
    sent = {'dispatch': 0.0, 'collect': 0.0}
    for one in collectives(program.as_text() or ''):
        assert one.kind == 'all-to-all'
        found = re.search(r'\b(dispatch|collect)\b', one.scope)
        assert found is not None, one.scope
        sent[found[1]] += one.times * one.sent_bytes / ROWS
    return sent


@pytest.mark.parametrize(
    ('config', 'slots'),
    [
        (MeshConfig(expert=4), 3),
        (MeshConfig(expert=4, capacity_factor=0.5), 1.5),
        (MeshConfig(expert=8, expert_nodes=2), 1 + 2 * 3),  # to the other node, and there to three more GPUs from two
    ],
    ids=['one_hop', 'half_the_room', 'two_hops'],
)
def test_the_compiled_program_sends_what_the_formula_says(config, slots):
    """A slot for another device takes a row of D values, a float32 scale for 128 of them, and K experts and gates."""
    values = slots * (D + 4 * D / 128)
    wanted = {'dispatch': 2 * values + slots * 8 * TOP_K, 'collect': 2 * slots * 2 * D + slots * 4 * TOP_K}
    assert sent_bytes('fp8', config) == pytest.approx(wanted, rel=0.05)


def test_float8_halves_what_is_dispatched():
    config = MeshConfig(expert=4)
    float8, bfloat16 = (sent_bytes(recipe, config) for recipe in ('fp8', 'bf16'))
    assert float8['dispatch'] == pytest.approx(bfloat16['dispatch'] / 2, rel=0.06)
    assert float8['collect'] == pytest.approx(bfloat16['collect'], rel=0.01)
