"""DeepSeek-V3 in JAX: the model as pure functions and thin Flax modules.

Names carry dimensions. The letters, here and nowhere else:

  B batch          T query tokens    S key tokens       D model            H heads
  N no-position head dim             R rotary dim       U value dim        Q query rank
  C key/value rank F FFN hidden      E experts          e experts of a group or shard
  K chosen experts G groups          J routed rows      V vocabulary       L stacked layers
  P stages         M flattened rows

Sections and equations in brackets are those of the technical report, arXiv 2412.19437.
"""

from deepseek_jax.cache import Cache, init_cache
from deepseek_jax.checkpoint import load_run
from deepseek_jax.config import MLAConfig, ModelConfig, MoEConfig, PrecisionConfig, RopeConfig, YarnConfig
from deepseek_jax.hf import load_hf, save_hf
from deepseek_jax.model import Output, States, extend, forward, init, logits, states

__all__ = [
    'Cache',
    'MLAConfig',
    'MoEConfig',
    'ModelConfig',
    'Output',
    'PrecisionConfig',
    'RopeConfig',
    'States',
    'YarnConfig',
    'extend',
    'forward',
    'init',
    'init_cache',
    'load_hf',
    'load_run',
    'logits',
    'save_hf',
    'states',
]
