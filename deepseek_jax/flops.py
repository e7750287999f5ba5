"""Parameters and work of a model, from its configuration alone."""

import math
from typing import NamedTuple

import jax

from deepseek_jax import model, names
from deepseek_jax.config import ModelConfig

PEAK_FLOPS = {
    'NVIDIA H100 80GB HBM3': 989.4e12,
    'NVIDIA H200': 989.4e12,
    'NVIDIA H800': 989.4e12,
}
"""Bfloat16 operations a second of each `jax.Device.device_kind`, without sparsity, as its maker states them."""


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
      total: the main model's, embedding and head included.
      active: those of the main model whose matrices multiply one token's state: chosen experts only, head included,
        embedding (a lookup) and vectors not.
      mtp: what the MTP modules add of their own; embedding and head are shared.
    """

    total: int
    active: int
    mtp: int

    def __str__(self) -> str:
        return f'{_short(self.total)} parameters, {_short(self.active)} active, {_short(self.mtp)} more in MTP'


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts parameters by shape; nothing is allocated."""
    sizes = _sizes(config)
    main = {path: size for path, size in sizes.items() if path[0] != 'mtp'}
    return ParameterCounts(
        total=sum(main.values()),
        active=_active(main, config),
        mtp=sum(sizes.values()) - sum(main.values()),
    )


def train_flops_per_token(config: ModelConfig, length: int, mtp: bool = False) -> float:
    """Floating-point operations of forward and backward for one token of a causal sequence of `length` tokens.

    `6 * active + 3 * layers * length * H * (N + R + U)`: six a multiplied parameter (two forward, four backward); the
    attention core multiplies N + R and U numbers a head for each of `length / 2` keys on average. With `mtp`, each
    module adds its own active parameters, one attention core and one more product with the head.
    """
    sizes = _sizes(config)
    core = 3 * length * config.mla.num_heads
    core *= config.mla.nope_head_dim + config.mla.rope_head_dim + config.mla.value_head_dim
    main = {path: size for path, size in sizes.items() if path[0] != 'mtp'}
    work = 6.0 * _active(main, config) + config.num_layers * core
    if mtp:
        modules = {path: size for path, size in sizes.items() if path[0] == 'mtp'}
        head = config.model_dim * config.vocab_size
        work += 6.0 * _active(modules, config) + config.mtp_depth * (core + 6 * head)
    return work


def mfu(flops_per_token: float, tokens_per_second: float, device_kind: str, devices: int = 1) -> float | None:
    """Model FLOPs utilisation, `flops_per_token * tokens_per_second / (devices * peak)`; None for an unknown device.

    The peak is that of bfloat16 in every recipe, so that float8 and bfloat16 compare; what is computed again in the
    backward pass does not count.
    """
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak)


def _sizes(config: ModelConfig) -> dict[tuple[str, ...], int]:
    shapes = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {names.path_names(path): math.prod(leaf.shape) for path, leaf in leaves}


def _active(sizes: dict[tuple[str, ...], int], config: ModelConfig) -> int:
    total = 0
    for path, size in sizes.items():
        if path[-1] == 'embedding_VD' or len(names.letters(path[-1])) == 1:
            continue
        if 'experts' in path and config.moe is not None:
            size = size // config.moe.num_experts * config.moe.top_k
        total += size
    return total


def _short(count: int) -> str:
    return f'{count / 1e9:.2f} B' if count >= 1e8 else f'{count / 1e6:.2f} M'
