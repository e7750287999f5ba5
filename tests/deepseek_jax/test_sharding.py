import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import deepseek_jax as ds
from deepseek_jax import names, sharding
from tests.support import TINY, random_params

V3 = {'V': 129280, 'D': 7168, 'H': 128, 'N': 128, 'R': 64, 'U': 128, 'C': 512, 'Q': 1536, 'F': 2048, 'E': 256}
MOE_LAYERS, DENSE_LAYERS = ('moe_layers', 58), ('dense_layers', 3)


def spec(scope: tuple[str, int] | None, *path: str, gather: bool = False, **devices: int) -> tuple:
    shape = (*(() if scope is None else scope[1:]), *names.shape(path[-1], V3))
    path = (*(() if scope is None else scope[:1]), *path)
    return tuple(sharding.param_spec(path, shape, dict.fromkeys(sharding.AXES, 1) | devices, gather))


def test_param_spec_is_read_off_the_name():
    experts = 'moe', 'experts'
    assert spec(MOE_LAYERS, *experts, 'w_up_EDF') == ('stage', ('node', 'expert'), 'fsdp', None)
    assert spec(MOE_LAYERS, *experts, 'w_down_EFD') == ('stage', ('node', 'expert'), None, 'fsdp')
    assert spec(DENSE_LAYERS, 'attention', 'w_o_HUD') == (None, None, None, 'fsdp')
    assert spec(DENSE_LAYERS, 'attention', 'w_uk_CHN', fsdp=8) == (None, None, 'fsdp', None)
    assert spec(DENSE_LAYERS, 'attention', 'w_uk_CHN', fsdp=256) == (None, 'fsdp', None, None)
    assert spec(('mtp', 1), 'w_hidden_DD') == (None, 'fsdp', None)
    assert spec(None, 'embedding_VD') == (None, 'fsdp')
    assert spec(None, 'final_norm_D') == (None,)
    assert spec(MOE_LAYERS, 'moe', 'router', 'w_router_DE') == ('stage', None, None)
    assert spec(MOE_LAYERS, 'moe', 'router', 'router_bias_E') == ('stage', None)


def test_what_blocks_make_whole_is_cut_over_all_devices_of_experts():
    many = {'fsdp': 8, 'node': 16, 'expert': 8, 'gather': True}
    everywhere = ('expert', 'fsdp', 'node')
    assert spec(DENSE_LAYERS, 'attention', 'w_o_HUD', **many) == (None, None, None, everywhere)
    assert spec(None, 'head_DV', **many) == (everywhere, None)
    assert spec(DENSE_LAYERS, 'attention', 'w_uk_CHN', **many) == (None, ('fsdp', 'node'), 'expert', None)
    assert spec(DENSE_LAYERS, 'attention', 'w_uq_QHN', **many) == (None, ('fsdp', 'node'), 'expert', None)
    assert spec(DENSE_LAYERS, 'ffn_norm_D', **many) == (None, None)
    assert spec(MOE_LAYERS, 'moe', 'experts', 'w_up_EDF', **many) == ('stage', ('node', 'expert'), 'fsdp', None)
    # Neighbours first: those of fsdp where experts have none.
    assert spec(None, 'head_DV', fsdp=8, gather=True) == ('fsdp', None)
    assert spec(None, 'head_DV', fsdp=2, node=4, gather=True) == (('fsdp', 'node', 'expert'), None)
    # Outer axes that divide nothing that is left.
    assert spec(DENSE_LAYERS, 'attention', 'w_uk_CHN', fsdp=1024, expert=8, gather=True) == (None, None, 'expert', None)


@pytest.mark.parametrize(
    ('path', 'rank', 'message'),
    [
        (('dense_layers', 'attention', 'w_o_HUD'), 3, 'rank 3, its name says 4'),
        (('head_DV',), 3, 'rank 3, its name says 2'),
        (('w_up_XYZ',), 3, 'must end in _ and dimension letters'),
        (('weight',), 1, 'must end in _ and dimension letters'),
    ],
)
def test_wrong_suffix_fails_loudly(path, rank, message):
    with pytest.raises(ValueError, match=message):
        sharding.param_spec(path, (8,) * rank, dict.fromkeys(sharding.AXES, 1))


def test_every_parameter_of_the_model_has_a_spec_that_divides():
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    shardings = sharding.param_shardings(random_params(TINY), mesh)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))
    odd = {'moe_layers': {'w_up_EDF': jax.ShapeDtypeStruct((1, 9, 8, 8), jnp.float32)}}
    with pytest.raises(ValueError, match=r"9 is not a multiple of the 2 devices of mesh axis 'node x expert'"):
        sharding.param_shardings(odd, mesh)
    with pytest.raises(ValueError, match=r'must equal the 8 devices'):
        sharding.make_mesh(data=3)


def test_eight_devices_equal_one():
    """Logits, loads and every gradient on a 2 x 2 x 2 mesh equal those of one device."""
    params = random_params(TINY)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (8, 8)))
    segments_BT = jnp.ones_like(tokens_BT).at[:, 5:].set(2)
    ahead_LBT = jnp.roll(tokens_BT, -1, 1)[None]

    def loss(params, tokens_BT, segments_BT, ahead_LBT):
        out = ds.states(params, tokens_BT, TINY, segments_BT, ahead_LBT)
        logits_BTV = ds.logits(params, out.hidden_BTD, TINY)
        total = jnp.mean(jnp.square(logits_BTV)) + jnp.mean(jnp.square(out.mtp_LBTD)) + out.balance_loss_L.sum()
        return total, (logits_BTV, out.load_LE)

    step = jax.value_and_grad(loss, has_aux=True)
    (one, (logits_one, load_one)), gradients_one = jax.jit(step)(params, tokens_BT, segments_BT, ahead_LBT)

    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    batch = NamedSharding(mesh, sharding.BATCH)
    shardings = sharding.param_shardings(params, mesh)
    placed = jax.device_put(params, shardings)
    assert len(placed['moe_layers']['moe']['experts']['w_up_EDF'].addressable_shards) == 8
    assert placed['moe_layers']['moe']['experts']['w_up_EDF'].addressable_shards[0].data.shape == (2, 4, 16, 16)
    (eight, (logits_eight, load_eight)), gradients_eight = jax.jit(step, out_shardings=((None, None), shardings))(
        placed,
        jax.device_put(tokens_BT, batch),
        jax.device_put(segments_BT, batch),
        jax.device_put(ahead_LBT, NamedSharding(mesh, PartitionSpec(None, sharding.AXES))),
    )
    assert float(eight) == pytest.approx(float(one), rel=1e-5)
    np.testing.assert_allclose(logits_eight, logits_one, atol=2e-5)
    np.testing.assert_array_equal(load_eight, load_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), gradients_eight, gradients_one)
