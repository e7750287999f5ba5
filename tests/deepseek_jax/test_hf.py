import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import deepseek_jax as ds
from deepseek_jax import hf
from tests.support import TINY, changed, random_params

CONFIG = changed(mtp_depth=2, rope=ds.RopeConfig(theta=50.0, yarn=ds.YarnConfig(scale=4.0)))


@pytest.mark.parametrize('query_rank', [24, None])
def test_round_trip_is_exact_in_fp32_and_rounds_once_in_bf16(tmp_path, query_rank):
    config = changed(CONFIG, mla={'query_rank': query_rank})
    params = random_params(config)
    ds.save_hf(tmp_path / 'fp32', config, params, dtype='float32', max_shard_bytes=40_000)
    assert len(list((tmp_path / 'fp32').glob('model-*.safetensors'))) > 3
    assert not list(tmp_path.glob('*.partial'))
    loaded_config, loaded = ds.load_hf(tmp_path / 'fp32', recipe='fp32')
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    ds.save_hf(tmp_path / 'bf16', config, params)
    assert [file.name for file in (tmp_path / 'bf16').glob('*.safetensors')] == ['model.safetensors']
    _, rounded = ds.load_hf(tmp_path / 'bf16')
    np.testing.assert_array_equal(rounded['head_DV'], params['head_DV'].astype(jnp.bfloat16).astype(jnp.float32))
    bias = rounded['moe_layers']['moe']['router']['router_bias_E']
    np.testing.assert_array_equal(bias, params['moe_layers']['moe']['router']['router_bias_E'])


def test_published_layout_of_the_mtp_layer(tmp_path):
    params = random_params(CONFIG)
    ds.save_hf(tmp_path / 'out', CONFIG, params, dtype='float32')
    tensors = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
    layer = f'model.layers.{CONFIG.num_layers + 1}.'
    width = CONFIG.model_dim
    projection = tensors[layer + 'eh_proj.weight']
    np.testing.assert_array_equal(projection[:, :width], np.asarray(params['mtp']['w_embedding_DD'][1]).T)
    np.testing.assert_array_equal(projection[:, width:], np.asarray(params['mtp']['w_hidden_DD'][1]).T)
    np.testing.assert_array_equal(tensors[layer + 'embed_tokens.weight'], params['embedding_VD'])
    np.testing.assert_array_equal(tensors[layer + 'shared_head.head.weight'], np.asarray(params['head_DV']).T)
    np.testing.assert_array_equal(tensors[layer + 'enorm.weight'], params['mtp']['embedding_norm_D'][1])
    np.testing.assert_array_equal(tensors[layer + 'hnorm.weight'], params['mtp']['hidden_norm_D'][1])
    assert layer + 'mlp.experts.7.down_proj.weight' in tensors


def test_damaged_checkpoints_are_refused_with_the_reason(tmp_path):
    directory = tmp_path / 'out'
    ds.save_hf(directory, TINY, random_params(TINY), dtype='float32')
    with pytest.raises(FileExistsError, match='is not empty'):
        ds.save_hf(directory, TINY, random_params(TINY))
    with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
        ds.load_hf(tmp_path / 'nowhere')
    tensors = safetensors.numpy.load_file(directory / 'model.safetensors')

    def reload(changes, removed=()):
        kept = {name: value for name, value in (tensors | changes).items() if name not in removed}
        safetensors.numpy.save_file(kept, directory / 'model.safetensors')
        return ds.load_hf(directory)

    name = 'model.layers.1.self_attn.o_proj.weight'
    with pytest.raises(
        ValueError, match=r"no tensor 'model\.layers\.1\.self_attn\.o_proj\.weight' of shape \(32, 32\)"
    ):
        reload({}, [name])
    with pytest.raises(ValueError, match=r'has shape \(32, 16\), config\.json implies \(32, 32\)'):
        reload({name: np.zeros((32, 16), np.float32)})
    config = json.loads((directory / 'config.json').read_text())
    (directory / 'config.json').write_text(json.dumps(config | {'num_nextn_predict_layers': 2}))
    with pytest.raises(ValueError, match='if it was saved without its MTP layer, set the field to 0'):
        reload({}, [name for name in tensors if name.startswith(f'model.layers.{TINY.num_layers}.')])
    (directory / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='block-scaled FP8'):
        reload({name + '_scale_inv': np.ones((1, 1), np.float32)})


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('scoring_func', 'softmax', "scoring_func='softmax'; this model needs 'sigmoid'"),
        ('norm_topk_prob', False, 'norm_topk_prob=False'),
        ('tie_word_embeddings', True, 'tie_word_embeddings=True'),
        ('rope_scaling', {'type': 'linear', 'factor': 2}, "rope scaling 'linear'"),
        ('quantization_config', {'quant_method': 'fp8'}, "quantization_config 'fp8'"),
    ],
)
def test_configuration_of_another_architecture_is_refused(field, value, message):
    published = hf.config_to_published(TINY) | {field: value}
    with pytest.raises(ValueError, match=message):
        hf.config_from_published(published)


def test_configuration_without_a_field_is_refused():
    published = hf.config_to_published(TINY)
    del published['kv_lora_rank']
    with pytest.raises(ValueError, match="no field 'kv_lora_rank'"):
        hf.config_from_published(published)
