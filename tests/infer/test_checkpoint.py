import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

import deepseek_jax as ds
from deepseek_jax.checkpoint import write_model_file
from deepseek_jax.tokenizer import ByteTokenizer
from infer.checkpoint import compute_params, load
from tests.support import random_params


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_load_reads_a_run_directory(tmp_path, monkeypatch, config, params):
    write_model_file(tmp_path, config, 'bytes')
    monkeypatch.setattr(ds, 'load_run', lambda directory: (config, params))
    loaded_config, loaded, tokenizer = load(tmp_path)
    assert loaded_config == config
    assert_trees_equal(loaded, params)
    assert isinstance(tokenizer, ByteTokenizer)


def test_load_reads_a_published_layout_with_its_tokenizer(tmp_path, config, params):
    directory = tmp_path / 'published'
    ds.save_hf(directory, config, params)
    with pytest.raises(FileNotFoundError, match=r'tokenizer.json. is missing'):
        load(directory)
    write_tokenizer(directory)
    loaded_config, loaded, tokenizer = load(str(directory))
    assert loaded_config.mla == config.mla
    assert loaded['head_DV'].shape == params['head_DV'].shape
    assert tokenizer.decode(tokenizer.encode('h\u00e9llo')) == 'h\u00e9llo'


def write_tokenizer(directory):
    """A tokenizer.json of single bytes, beginning and end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ['<\uff5cbegin\u2581of\u2581sentence\uff5c>', '<\uff5cend\u2581of\u2581sentence\uff5c>']
    )
    tokenizer.save(str(directory / 'tokenizer.json'))


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent. is not a directory'):
        load(tmp_path / 'absent')
    with pytest.raises(ValueError, match='must hold model.json'):
        load(tmp_path)
    (tmp_path / 'model.json').write_text(json.dumps({'tokenizer': 'bytes'}))
    with pytest.raises(ValueError, match='model.json is damaged'):
        load(tmp_path)


def test_load_needs_the_tokenizer_file_that_a_run_names(tmp_path, config):
    write_model_file(tmp_path, config, 'tokenizer.json')
    with pytest.raises(FileNotFoundError, match=r'tokenizer.json. is missing'):
        load(tmp_path)


def test_compute_params_halve_a_bf16_model_and_change_no_result(config):
    config = dataclasses.replace(config, num_layers=1, num_dense_layers=0, precision=ds.PrecisionConfig(recipe='bf16'))
    params = random_params(config, std=0.3)
    rounded = compute_params(params, config)
    assert size(rounded) < 0.6 * size(params)
    # Back in float32, so that one program serves both.
    widened = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)
    assert not np.array_equal(widened['head_DV'], params['head_DV'])
    tokens_BT = np.arange(24).reshape(2, 12)
    results = [ds.forward(tree, tokens_BT, config).logits_BTV for tree in (params, widened)]
    np.testing.assert_array_equal(*results)


def test_compute_params_leave_an_fp32_model_alone(config, params):
    assert_trees_equal(compute_params(params, config), params)
    assert size(compute_params(params, config)) == size(params)


def size(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
