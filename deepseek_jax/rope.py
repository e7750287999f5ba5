"""Rotary position embedding of the shared rotary part, with YaRN for extended contexts [2.1.1, 4.3].

Pairs are interleaved, (x[0], x[1]), (x[2], x[3]), ..., as in the published weights.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.config import RopeConfig, YarnConfig, yarn_mscale


class Rotation(NamedTuple):
    """Cosines and sines of each position, float32; the last axis has one entry a pair (R / 2)."""

    cos: Float[Array, 'B T r']
    sin: Float[Array, 'B T r']


def rotation(positions_BT: Int[Array, 'B T'], rope_head_dim: int, config: RopeConfig) -> Rotation:
    """The rotation of each position: angle `position * frequency` for every pair."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies(rope_head_dim, config)
    magnitude = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        magnitude = yarn_mscale(yarn.scale, yarn.mscale) / yarn_mscale(yarn.scale, yarn.mscale_all_dim)
    return Rotation(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def rotate(x: Float[Array, '*shape R'], cos: Float[Array, '*#shape r'], sin: Float[Array, '*#shape r']):
    """Rotates each pair of the last axis, in float32; returns the dtype of `x`.

    `cos` and `sin` broadcast against `x` with R / 2 in place of R.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def frequencies(rope_head_dim: int, config: RopeConfig) -> np.ndarray:
    """Radians a token of each pair, float32 (R / 2): `theta ** (-2 i / R)`, changed by YaRN if configured."""
    exponents = np.arange(0, rope_head_dim, 2, dtype=np.float64) / rope_head_dim
    base = config.theta**-exponents
    if config.yarn is None:
        return base.astype(np.float32)
    keep = _yarn_keep(rope_head_dim, config.theta, config.yarn)
    return (base * keep + base / config.yarn.scale * (1.0 - keep)).astype(np.float32)


def _yarn_keep(rope_head_dim: int, theta: float, yarn: YarnConfig) -> np.ndarray:
    """How much of each frequency stays: 1 above `beta_fast` rotations in the original length, 0 below `beta_slow`."""

    def pair_with(rotations: float) -> float:
        return rope_head_dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), rope_head_dim - 1)
    ramp = (np.arange(rope_head_dim // 2) - low) / max(high - low, 1e-3)
    return 1.0 - np.clip(ramp, 0.0, 1.0)
