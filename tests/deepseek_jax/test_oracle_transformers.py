"""Checkpoints in the published layout against the logits that transformers computed from them.

The files come from `tests/oracles/make_transformers_files.py`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import deepseek_jax as ds
from tests.oracles import numpy_model

DIRECTORIES = sorted((pathlib.Path(__file__).parents[1] / 'oracles' / 'transformers').iterdir())
LOGIT_TOLERANCE = 2e-4
ORACLE_TOLERANCE = 5e-5
CLOSEST_CALL = 1e-4
"""The smallest gap of a routing decision; float32 rounding cannot turn it."""

ARCHITECTURE_FIELDS = (
    'attention_bias',
    'first_k_dense_replace',
    'hidden_act',
    'hidden_size',
    'intermediate_size',
    'kv_lora_rank',
    'model_type',
    'moe_intermediate_size',
    'n_group',
    'n_routed_experts',
    'n_shared_experts',
    'norm_topk_prob',
    'num_attention_heads',
    'num_experts_per_tok',
    'num_hidden_layers',
    'num_nextn_predict_layers',
    'q_lora_rank',
    'qk_nope_head_dim',
    'qk_rope_head_dim',
    'rms_norm_eps',
    'routed_scaling_factor',
    'scoring_func',
    'tie_word_embeddings',
    'topk_group',
    'topk_method',
    'v_head_dim',
    'vocab_size',
)

each_directory = pytest.mark.parametrize('directory', DIRECTORIES, ids=lambda directory: directory.name)


@functools.cache
def load(directory: pathlib.Path) -> tuple[ds.ModelConfig, dict]:
    """The checkpoint, with everything to be computed in float32."""
    config, params = ds.load_hf(directory)
    return dataclasses.replace(config, precision=ds.PrecisionConfig(recipe='fp32')), params


@functools.cache
def reference(directory: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(directory / 'reference.npz') as arrays:
        return dict(arrays)


def test_there_are_checkpoints():
    assert len(DIRECTORIES) >= 5


@each_directory
def test_forward_equals_transformers(directory):
    config, params = load(directory)
    expected = reference(directory)
    out = ds.forward(params, jnp.asarray(expected['tokens']), config, mtp=config.mtp_depth > 0)
    np.testing.assert_allclose(out.logits_BTV, expected['logits'], rtol=0, atol=LOGIT_TOLERANCE)
    assert len(out.mtp_logits) == config.mtp_depth == ('mtp_logits' in expected)
    if config.mtp_depth:
        np.testing.assert_allclose(out.mtp_logits[0], expected['mtp_logits'], rtol=0, atol=LOGIT_TOLERANCE)


@each_directory
def test_numpy_model_equals_transformers(directory):
    config, params = load(directory)
    expected = reference(directory)
    tokens_BT = expected['tokens']
    ahead = [numpy_model.embedded_ahead(tokens_BT, 1, tokens_BT.shape[1])] if config.mtp_depth else []
    out = numpy_model.forward(params, config, tokens_BT, ahead=ahead)
    assert min(routing.margin for layer in out.routings for routing in layer) > CLOSEST_CALL
    np.testing.assert_allclose(out.logits_BTV, expected['logits'], rtol=0, atol=ORACLE_TOLERANCE)
    if config.mtp_depth:
        np.testing.assert_allclose(out.mtp_logits[0][:, :-1], expected['mtp_logits'], rtol=0, atol=ORACLE_TOLERANCE)


@each_directory
def test_save_hf_writes_what_load_hf_read(directory, tmp_path):
    config, params = load(directory)
    ds.save_hf(tmp_path / 'written', config, params, dtype='float32')

    original, written = load_file(directory / 'model.safetensors'), load_file(tmp_path / 'written/model.safetensors')
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name, strict=True)

    again, params_again = ds.load_hf(tmp_path / 'written')
    assert dataclasses.replace(again, precision=config.precision) == config
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), params_again, params)


@each_directory
def test_save_hf_writes_the_published_config(directory, tmp_path):
    ds.save_hf(tmp_path / 'written', *load(directory))
    original, written = (json.loads((path / 'config.json').read_text()) for path in (directory, tmp_path / 'written'))
    assert {name: written[name] for name in ARCHITECTURE_FIELDS} == {
        name: original[name] for name in ARCHITECTURE_FIELDS
    }
