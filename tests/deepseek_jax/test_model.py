import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import flops, hf, model
from deepseek_jax.block import block
from deepseek_jax.norm import rms_norm
from tests.pallas_kernels.hopper import calls_on_h100
from tests.support import TINY, changed, param_shapes, random_params

V3 = ds.ModelConfig(
    vocab_size=129280,
    num_layers=61,
    num_dense_layers=3,
    model_dim=7168,
    dense_ffn_dim=18432,
    mla=ds.MLAConfig(
        num_heads=128, nope_head_dim=128, rope_head_dim=64, value_head_dim=128, kv_rank=512, query_rank=1536
    ),
    moe=ds.MoEConfig(
        num_experts=256, num_shared_experts=1, top_k=8, num_groups=8, top_groups=4, ffn_dim=2048, gate_scale=2.5
    ),
    mtp_depth=1,
)

CONFIGS = {
    'query_rank': TINY,
    'no_query_rank_yarn': changed(
        mla={'query_rank': None},
        moe={'num_groups': 1, 'top_groups': 1, 'num_shared_experts': 2},
        rope=ds.RopeConfig(theta=5000.0, yarn=ds.YarnConfig(scale=8.0, original_length=8)),
    ),
}
BATCH, LENGTH, PROMPT, SLOTS = 2, 12, 7, 15


@functools.cache
def example(name):
    """The configuration, its parameters, tokens, and what `forward` makes of them."""
    config = CONFIGS[name]
    params = random_params(config)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH)))
    return config, params, tokens_BT, ds.forward(params, tokens_BT, config)


@functools.partial(jax.jit, static_argnames=('config', 'absorbed'))
def extend_logits(params, tokens_BT, positions_BT, cache, config, absorbed):
    hidden_BTD, cache = ds.extend(params, tokens_BT, positions_BT, cache, config, absorbed)
    return ds.logits(params, hidden_BTD, config), cache


def positions(start, stop):
    return jnp.broadcast_to(jnp.arange(start, stop), (BATCH, stop - start))


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('absorbed', [False, True], ids=['expanded', 'absorbed'])
def test_prefill_and_decode_equal_training_forward(name, absorbed):
    config, params, tokens_BT, out = example(name)
    cache = ds.init_cache(config, BATCH, SLOTS)
    logits, cache = extend_logits(params, tokens_BT[:, :PROMPT], positions(0, PROMPT), cache, config, absorbed)
    np.testing.assert_allclose(logits, out.logits_BTV[:, :PROMPT], atol=2e-5)
    for t in range(PROMPT, LENGTH):
        logits, cache = extend_logits(
            params, tokens_BT[:, t : t + 1], positions(t, t + 1), cache, config, absorbed
        )  # fmt: skip
        np.testing.assert_allclose(logits[:, 0], out.logits_BTV[:, t], atol=2e-5)


def test_absorbed_equals_expanded_in_logits_and_cache():
    config, params, tokens_BT, _ = example('query_rank')
    empty = ds.init_cache(config, BATCH, SLOTS)
    args = (params, tokens_BT[:, :PROMPT], positions(0, PROMPT), empty, config)
    expanded, cache_expanded = extend_logits(*args, False)
    absorbed, cache_absorbed = extend_logits(*args, True)
    np.testing.assert_allclose(absorbed, expanded, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache_absorbed, cache_expanded)


def test_extend_ignores_right_padding_and_drops_positions_outside_the_cache():
    config, params, tokens_BT, out = example('query_rank')
    prompt, padded = 4, PROMPT
    cache = ds.init_cache(config, BATCH, SLOTS)
    garbage = tokens_BT.at[:, prompt:].set(1)
    logits, cache = extend_logits(params, garbage[:, :padded], positions(0, padded), cache, config, False)
    np.testing.assert_allclose(logits[:, :prompt], out.logits_BTV[:, :prompt], atol=2e-5)
    before = cache
    parked = jnp.full((BATCH, 1), SLOTS)
    _, cache = extend_logits(params, tokens_BT[:, :1], parked, cache, config, True)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    for t in range(prompt, LENGTH):
        logits, cache = extend_logits(params, tokens_BT[:, t : t + 1], positions(t, t + 1), cache, config, True)
        np.testing.assert_allclose(logits[:, 0], out.logits_BTV[:, t], atol=2e-5)


def test_scan_over_layers_equals_blocks_one_by_one():
    config, params, tokens_BT, out = example('query_rank')

    @jax.jit
    def unrolled(params, tokens_BT):
        x_BTD = params['embedding_VD'][tokens_BT]
        attend = model.causal_attend(tokens_BT, None, config)
        loads = []
        for scope, length in (('dense_layers', config.num_dense_layers), ('moe_layers', config.num_moe_layers)):
            for layer in range(length):
                weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params[scope])
                x_BTD, _, balance = block(weights, x_BTD, attend, None, config)
                loads += [] if balance is None else [balance.load_E]
        hidden_BTD = rms_norm(x_BTD, params['final_norm_D'], config.norm_eps)
        return ds.logits(params, hidden_BTD, config), jnp.stack(loads)

    logits_BTV, load_LE = unrolled(params, tokens_BT)
    np.testing.assert_allclose(logits_BTV, out.logits_BTV, atol=2e-5)
    np.testing.assert_array_equal(load_LE, out.load_LE)


def test_packed_documents_with_mask_equal_documents_apart():
    config, params, tokens_BT, _ = example('query_rank')
    cut = LENGTH // 2  # one program for both halves
    segments_BT = jnp.broadcast_to(jnp.where(jnp.arange(LENGTH) < cut, 1, 2), (BATCH, LENGTH))
    packed = ds.forward(params, tokens_BT, config, segments_BT).logits_BTV
    np.testing.assert_allclose(packed[:, :cut], ds.forward(params, tokens_BT[:, :cut], config).logits_BTV, atol=2e-5)
    np.testing.assert_allclose(packed[:, cut:], ds.forward(params, tokens_BT[:, cut:], config).logits_BTV, atol=2e-5)
    unmasked = ds.forward(params, tokens_BT, config).logits_BTV
    assert jnp.abs(unmasked[:, cut:] - packed[:, cut:]).max() > 1e-2


def test_forward_is_causal():
    config, params, tokens_BT, out = example('query_rank')
    later = tokens_BT.at[:, 8:].set((tokens_BT[:, 8:] + 1) % config.vocab_size)
    changed_out = ds.forward(params, later, config)
    np.testing.assert_allclose(changed_out.logits_BTV[:, :8], out.logits_BTV[:, :8], atol=1e-6)
    assert jnp.abs(changed_out.logits_BTV[:, 8:] - out.logits_BTV[:, 8:]).max() > 1e-2


@functools.cache
def gradient(**changes):
    """The gradient of a sum of squares, with fields of the configuration changed."""
    config = changed(num_layers=2, num_dense_layers=0, mtp_depth=0, **changes)
    tokens_BT = example('query_rank')[2]

    @jax.jit
    @jax.grad
    def loss(params):
        return jnp.sum(jnp.square(ds.states(params, tokens_BT, config).hidden_BTD[..., :3]))

    return loss(random_params(config))


@pytest.mark.parametrize(
    'changes', [{'remat': 'full'}, {'remat': 'dots'}, {'remat': 'paper'}, {'scan_unroll': 2}], ids=str
)
def test_remat_and_unroll_leave_gradients_alone(changes):
    compare = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
    jax.tree.map(compare, gradient(**changes), gradient())


def test_bf16_recipe_is_close_to_fp32():
    config, params, tokens_BT, out = example('query_rank')
    bf16 = ds.forward(params, tokens_BT, changed(config, precision=ds.PrecisionConfig(recipe='bf16')))
    assert bf16.logits_BTV.dtype == jnp.float32
    x, y = np.asarray(bf16.logits_BTV, np.float64), np.asarray(out.logits_BTV, np.float64)
    difference_BT = 1 - 2 * np.sum(x * y, -1) / (np.sum(x * x, -1) + np.sum(y * y, -1))
    # Rounding sends a few tokens to another expert, whose logits then differ; the others must agree.
    assert np.median(difference_BT) < 1e-3


def test_mtp_logits_have_one_position_less_a_depth():
    config = changed(mtp_depth=2)

    def shapes(mtp):
        forward = functools.partial(ds.forward, config=config, mtp=mtp)
        return jax.eval_shape(forward, param_shapes(config), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))

    with_mtp = shapes(True)
    assert [logits.shape[1] for logits in with_mtp.mtp_logits] == [LENGTH - 1, LENGTH - 2]
    assert with_mtp.load_LE.shape[0] == config.num_moe_layers + 2
    assert shapes(False).mtp_logits == ()


def test_init_draws_what_the_names_say():
    config = changed(num_layers=2, num_dense_layers=0, mtp_depth=0, init_std=0.02)
    params = ds.init(jax.random.key(0), config)
    shapes = jax.eval_shape(lambda key: ds.init(key, config), jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert jnp.all(params['moe_layers']['attention_norm_D'] == 1)
    assert jnp.all(params['moe_layers']['moe']['router']['router_bias_E'] == 0)
    experts_LEDF = params['moe_layers']['moe']['experts']['w_up_EDF']
    assert abs(float(experts_LEDF.std()) - 0.02) < 1e-3
    assert jnp.abs(experts_LEDF[0] - experts_LEDF[1]).max() > 1e-2


def test_v3_parameter_and_work_counts_are_the_published_ones():
    counts = flops.count_parameters(V3)
    assert str(counts) == '671.03 B parameters, 36.62 B active, 11.61 B more in MTP'
    assert flops.train_flops_per_token(V3, 4096) == pytest.approx(250.45e9, rel=1e-4)
    assert flops.train_flops_per_token(V3, 4096, mtp=True) == pytest.approx(260.64e9, rel=1e-4)
    latent = V3.mla.kv_rank + V3.mla.rope_head_dim
    assert latent * V3.num_layers * 2 / 1024 == pytest.approx(68.6, abs=0.05)
    assert hf.config_from_published(hf.config_to_published(V3)) == V3


def served_by_kernels(**changes):
    """A model at widths that the attention kernels serve."""
    mla = {'num_heads': 16, 'nope_head_dim': 128, 'rope_head_dim': 64, 'value_head_dim': 128, 'kv_rank': 512}
    return changed(TINY, mla=mla, precision=ds.PrecisionConfig(recipe='bf16'), num_layers=2, mtp_depth=0, **changes)


@pytest.mark.parametrize(
    ('absorbed', 'kernels'), [(False, {'flash_mla'}), (True, {'decode_mla', 'decode_mla_combine'})]
)
def test_prefill_and_decoding_on_a_hopper_gpu_are_traced_into_kernels(absorbed, kernels):
    config = served_by_kernels(num_dense_layers=2, moe=None)
    params, cache = param_shapes(config), jax.eval_shape(lambda: ds.init_cache(config, BATCH, 256))
    tokens_BT = jax.ShapeDtypeStruct((BATCH, 2), jnp.int32)
    extend = functools.partial(ds.extend, config=config, absorbed=absorbed)
    called = calls_on_h100(extend, params, tokens_BT, tokens_BT, cache)
    assert {name for name in called if name.startswith('kernel ')} == {f'kernel {name}' for name in kernels}


@pytest.mark.gpu
def test_gpu_prefill_and_decode_with_kernels_are_the_training_forward():
    """At widths that the attention kernels serve: tokens in one pass, a prompt by chunks over a cache, then one by one."""
    config = served_by_kernels(num_dense_layers=2, moe=None)
    with warnings.catch_warnings(action='ignore'):  # shapes are traced in float32, which no kernel serves
        params = random_params(config)
    length, cuts = 200, (0, 70, 150)
    tokens_BT = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (BATCH, length)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # as it would be if the reference served
        wanted = ds.forward(params, tokens_BT, config).logits_BTV
        cache, got = ds.init_cache(config, BATCH, 256), []
        spans = [(cuts[0], cuts[1], False), (cuts[1], cuts[2], False)]
        spans += [(t, t + 2, True) for t in range(cuts[2], length, 2)]
        for start, stop, absorbed in spans:
            new = tokens_BT[:, start:stop], positions(start, stop)
            logits, cache = extend_logits(params, *new, cache, config, absorbed)
            got.append(logits)
    x, y = np.asarray(jnp.concatenate(got, axis=1), np.float64), np.asarray(wanted, np.float64)
    assert 1 - 2 * np.sum(x * y) / (np.sum(x * x) + np.sum(y * y)) < 1e-3
