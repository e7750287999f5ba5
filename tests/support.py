"""Small models and their random parameters, shared by the tests."""

import dataclasses
import functools

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax.names import map_with_names

TINY = ds.ModelConfig(
    vocab_size=96,
    num_layers=3,
    num_dense_layers=1,
    model_dim=32,
    dense_ffn_dim=48,
    mla=ds.MLAConfig(
        num_heads=4, nope_head_dim=8, rope_head_dim=4, value_head_dim=8, kv_rank=16, query_rank=24
    ),
    moe=ds.MoEConfig(
        num_experts=8, num_shared_experts=1, top_k=3, num_groups=4, top_groups=2, ffn_dim=16, gate_scale=2.5
    ),
    mtp_depth=1,
    precision=ds.PrecisionConfig(recipe='fp32'),
)  # fmt: skip


def changed(config: ds.ModelConfig = TINY, mla=None, moe=None, **fields) -> ds.ModelConfig:
    """`config` with fields replaced, those of its parts too: `changed(mla={'query_rank': None}, mtp_depth=2)`."""
    if mla:
        fields['mla'] = dataclasses.replace(config.mla, **mla)
    if moe:
        fields['moe'] = dataclasses.replace(config.moe, **moe)
    return dataclasses.replace(config, **fields)


def param_shapes(config: ds.ModelConfig) -> dict:
    """The shapes of the parameters, traced once for all recipes: how they are computed with changes no shape."""
    return _param_shapes(changed(config, precision=TINY.precision, remat='none', scan_unroll=1))


@functools.cache
def _param_shapes(config: ds.ModelConfig) -> dict:
    return jax.eval_shape(lambda key: ds.init(key, config), jax.random.key(0))


def random_params(config: ds.ModelConfig, seed: int = 0, std: float = 0.15) -> dict:
    """Parameters drawn by numpy (no compilation), float32, with norm scales and router biases away from 1 and 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if '_norm_' in path[-1]:
            values = 1 + 0.2 * values
        elif '_bias_' in path[-1]:
            values = 0.1 * values
        else:
            values = std * values
        return jax.numpy.array(values.astype(np.float32))

    return map_with_names(draw, param_shapes(config))
