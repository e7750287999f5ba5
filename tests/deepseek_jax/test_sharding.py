import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import deepseek_jax as ds
from deepseek_jax import sharding
from tests.support import TINY, random_params


def test_param_spec_is_read_off_the_name():
    spec = sharding.param_spec
    assert spec(('moe_layers', 'moe', 'experts', 'w_up_EDF'), 4) == PartitionSpec(
        'stage', ('node', 'expert'), 'fsdp', None
    )
    assert spec(('moe_layers', 'moe', 'experts', 'w_down_EFD'), 4) == PartitionSpec(
        'stage', ('node', 'expert'), None, 'fsdp'
    )
    assert spec(('dense_layers', 'attention', 'w_o_HUD'), 4) == PartitionSpec(None, None, None, 'fsdp')
    assert spec(('dense_layers', 'attention', 'w_uk_CHN'), 4) == PartitionSpec(None, None, 'fsdp', None)
    assert spec(('dense_layers', 'attention', 'w_uk_CHN'), 4, cut_heads=False) == PartitionSpec(
        None, 'fsdp', None, None
    )
    assert spec(('mtp', 'w_hidden_DD'), 3) == PartitionSpec(None, 'fsdp', None)
    assert spec(('embedding_VD',), 2) == PartitionSpec(None, 'fsdp')
    assert spec(('final_norm_D',), 1) == PartitionSpec(None)
    assert spec(('moe_layers', 'moe', 'router', 'w_router_DE'), 3) == PartitionSpec('stage', None, None)
    assert spec(('moe_layers', 'moe', 'router', 'router_bias_E'), 2) == PartitionSpec('stage', None)


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
        sharding.param_spec(path, rank)


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
