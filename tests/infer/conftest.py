"""Tiny random models and engines, shared so that each program compiles once."""

import dataclasses

import pytest

import deepseek_jax as ds
from deepseek_jax.tokenizer import ByteTokenizer
from infer.engine import Engine
from tests.support import random_params

# More rows than the 264 ids of the byte tokenizer, as published models have.
VOCAB_SIZE = 272
MAX_LENGTH, MAX_BATCH = 48, 3


@pytest.fixture(scope='session')
def config() -> ds.ModelConfig:
    return ds.ModelConfig(
        vocab_size=VOCAB_SIZE,
        num_layers=3,
        num_dense_layers=1,
        model_dim=32,
        dense_ffn_dim=64,
        mla=ds.MLAConfig(num_heads=2, nope_head_dim=8, rope_head_dim=4, value_head_dim=8, kv_rank=16, query_rank=12),
        moe=ds.MoEConfig(num_experts=8, num_shared_experts=1, top_k=2, num_groups=2, top_groups=1, ffn_dim=16),
        precision=ds.PrecisionConfig(recipe='fp32'),
    )


@pytest.fixture(scope='session')
def params(config):
    return random_params(config, std=0.3)


@pytest.fixture(scope='session')
def small_model(config):
    """A dense model of one layer, for tests that need some model and no particular one."""
    small = dataclasses.replace(config, num_layers=1, moe=None)
    return small, random_params(small, std=0.3)


@pytest.fixture(scope='session')
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope='session')
def engine(params, config, tokenizer) -> Engine:
    return Engine(params, config, tokenizer, MAX_LENGTH, MAX_BATCH)


@pytest.fixture(scope='session')
def small_engine(small_model, tokenizer) -> Engine:
    config, params = small_model
    return Engine(params, config, tokenizer, MAX_LENGTH, MAX_BATCH)
