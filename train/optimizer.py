"""AdamW as the report uses it: moments stored in bfloat16, arithmetic and master weights in float32 [3.3.3, 4.2]."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax import names
from deepseek_jax.config import check_types, require_positive
from train.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
      learning_rate: schedule over tokens.
      warmup_steps: steps over which the learning rate grows linearly from 0.
      beta1, beta2, epsilon: of Adam.
      weight_decay: for matrices (parameters with at least two dimension letters); vectors do not decay.
      clip_norm: gradients are scaled down to this global norm.
      moment_dtype: how both moments are stored.
    """

    learning_rate: Schedule
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal['bfloat16', 'float32'] = 'bfloat16'

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, 'epsilon', 'clip_norm')
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f'OptimizerConfig: warmup_steps={self.warmup_steps} and weight_decay={self.weight_decay} must not be negative'
            )  # fmt: skip
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'OptimizerConfig.{name}={getattr(self, name)} must lie in [0, 1)')
        if self.moment_dtype == 'bfloat16' and self.beta2 > 0.99:
            raise ValueError(
                f"OptimizerConfig.beta2={self.beta2} with moment_dtype='bfloat16': changes below 1/256 are lost "
                "in rounding and the moment never decays; use beta2 <= 0.99 or moment_dtype='float32'"
            )


class AdamState(NamedTuple):
    """Steps taken and both moments, like the parameters they belong to."""

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam(beta1: float, beta2: float, epsilon: float, dtype: Any) -> optax.GradientTransformation:
    """Adam's direction with both moments stored in `dtype`; optax's own stores the second in float32."""

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = state.count + 1

        def decay(beta: float, power: int, moment: jax.Array, gradient: jax.Array) -> jax.Array:
            return beta * moment.astype(jnp.float32) + (1 - beta) * gradient.astype(jnp.float32) ** power

        mu = jax.tree.map(lambda m, g: decay(beta1, 1, m, g), state.mu, updates)
        nu = jax.tree.map(lambda v, g: decay(beta2, 2, v, g), state.nu, updates)
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        direction = jax.tree.map(
            lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + epsilon), mu, nu
        )  # fmt: skip
        store = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: E731
        return direction, AdamState(count, store(mu), store(nu))

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, Adam, weight decay: updates for a learning rate of -1, which the step multiplies in.

    Routers' biases are left alone: the load rule moves them.
    """

    def label(tree: Any) -> Any:
        return names.map_with_names(lambda path, _: 'bias' if names.is_router_bias(path) else 'trained', tree)

    def decays(tree: Any) -> Any:
        return names.map_with_names(lambda path, _: len(names.letters(path[-1])) > 1, tree)

    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.epsilon, jnp.dtype(config.moment_dtype)),
        optax.add_decayed_weights(config.weight_decay, decays),
    )
    return optax.partition({'trained': trained, 'bias': optax.set_to_zero()}, label)
