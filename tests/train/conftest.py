"""One tiny model and what it trains on, shared so that each program compiles once.

`CONFIG` spells for gin what the fixtures build in Python, with a list and whole numbers where the types ask for a tuple
and floats: both are taken.
"""

import random
from pathlib import Path
from typing import Any

import pytest

import deepseek_jax as ds
from tests.support import random_params
from train.data import DataConfig
from train.loss import ObjectiveConfig
from train.optimizer import OptimizerConfig
from train.schedule import Schedule
from train.sources import TextDirectory

BATCH_SIZE, SEQUENCE_LENGTH = 4, 16

CONFIG = """
from __gin__ import dynamic_registration
from deepseek_jax import config
from train import data
from train import loss
from train import optimizer
from train import run
from train import schedule
from train import sources

include 'model/tiny.gin'
include 'train/base.gin'

TOTAL_STEPS = 60
BATCH_SIZE = 4
SEQUENCE_LENGTH = 16
CHECKPOINT_EVERY = 10
EVAL_EVERY = 45
PRECISION = 'fp32'
SEED = 0

config.ModelConfig.vocab_size = 272
config.ModelConfig.num_layers = 2
config.ModelConfig.model_dim = 16
config.ModelConfig.dense_ffn_dim = 32
config.MLAConfig.num_heads = 2
config.MLAConfig.nope_head_dim = 8
config.MLAConfig.rope_head_dim = 4
config.MLAConfig.value_head_dim = 8
config.MLAConfig.kv_rank = 8
config.MLAConfig.query_rank = 12
config.MoEConfig.num_experts = 4
config.MoEConfig.num_groups = 2
config.MoEConfig.top_groups = 1
config.MoEConfig.ffn_dim = 8

run.train.eval_rows = 8
data.DataConfig.source = @sources.TextDirectory()
data.DataConfig.tokenizer = 'bytes'
data.DataConfig.heldout_fraction = 0.25
sources.TextDirectory.path = '{folder}'
optimizer.OptimizerConfig.warmup_steps = 5
learning_rate/schedule.Schedule.pieces = (('constant', 5e-3, 1000), ('cosine', 1e-3, 3000))
mtp_weight/schedule.Schedule.pieces = (('constant', 0.3, 2000), ('constant', 0.1, 1000))
bias_rate/schedule.Schedule.pieces = [['constant', 1e-3, 1000]]
loss.ObjectiveConfig.rows_per_chunk = 24
"""


@pytest.fixture(scope='session')
def model() -> ds.ModelConfig:
    """One dense layer, one layer of experts, one prediction module; more rows than the byte tokenizer's 264 ids."""
    return ds.ModelConfig(
        vocab_size=272,
        num_layers=2,
        num_dense_layers=1,
        model_dim=16,
        dense_ffn_dim=32,
        mla=ds.MLAConfig(num_heads=2, nope_head_dim=8, rope_head_dim=4, value_head_dim=8, kv_rank=8, query_rank=12),
        moe=ds.MoEConfig(num_experts=4, num_shared_experts=1, top_k=2, num_groups=2, top_groups=1, ffn_dim=8),
        mtp_depth=1,
        init_std=0.02,
        precision=ds.PrecisionConfig(recipe='fp32'),
    )


@pytest.fixture(scope='session')
def params(model) -> dict[str, Any]:
    """Random parameters. `train_step` takes its state for itself: give it a copy."""
    return random_params(model)


@pytest.fixture(scope='session')
def optimizer() -> OptimizerConfig:
    """A learning rate that changes from step to step, so that a run which loses count of its tokens is found out."""
    pieces = (('constant', 5e-3, 1000.0), ('cosine', 1e-3, 3000.0))
    return OptimizerConfig(learning_rate=Schedule(pieces=pieces), warmup_steps=5)


@pytest.fixture(scope='session')
def objective() -> ObjectiveConfig:
    """Chunks that do not divide the rows of a batch."""
    return ObjectiveConfig(
        mtp_weight=Schedule(pieces=(('constant', 0.3, 2000.0), ('constant', 0.1, 1000.0))),
        bias_rate=Schedule(pieces=(('constant', 1e-3, 1000.0),)),
        rows_per_chunk=24,
    )


@pytest.fixture(scope='session')
def folder(tmp_path_factory) -> Path:
    """Text of about 40 batches of 4 rows of 16 bytes."""
    folder = tmp_path_factory.mktemp('text')
    draw = random.Random(0)
    for number in range(24):
        words = [draw.choice(['the', 'cat', 'sat', 'on', 'mats', 'for', 'hours', 'é']) for _ in range(30)]
        (folder / f'{number}.txt').write_text(' '.join(words), encoding='utf-8')
    return folder


@pytest.fixture(scope='session')
def data(folder) -> DataConfig:
    return DataConfig(source=TextDirectory(path=str(folder)), tokenizer='bytes', heldout_fraction=0.25)


@pytest.fixture(scope='session')
def config_file(tmp_path_factory, folder) -> Path:
    """The same as a configuration for `python -m train`."""
    file = tmp_path_factory.mktemp('config') / 'small.gin'
    file.write_text(CONFIG.replace('{folder}', str(folder)), encoding='utf-8')
    return file
