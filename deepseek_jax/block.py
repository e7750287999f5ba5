"""One Transformer block: pre-normalised attention and feed-forward, dense or with experts."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax import gather, mla, moe, names, ops, router
from deepseek_jax.cache import Cache
from deepseek_jax.config import ModelConfig
from deepseek_jax.norm import rms_norm
from deepseek_jax.sharding import ALONE, Parallel

NORM_NAMES = ('attention_norm_D', 'ffn_norm_D')


def block(
    params: Mapping[str, Any],
    x_BTD: Float[Array, 'B T D'],
    attend: mla.Attend,
    cache: Cache | None,
    config: ModelConfig,
    absorbed: bool = False,
    parallel: Parallel = ALONE,
) -> tuple[Float[Array, 'B T D'], Cache | None, moe.Balance | None]:
    """The block's output, its layer of the cache, and the use of its experts (None for a dense block)."""
    normed_BTD = rms_norm(x_BTD, params['attention_norm_D'], config.norm_eps)
    attention_BTD, cache = mla.attention(
        params['attention'], normed_BTD, attend, cache, config, absorbed, parallel.context
    )
    x_BTD = ops.keep(x_BTD + attention_BTD)
    normed_BTD = rms_norm(x_BTD, params['ffn_norm_D'], config.norm_eps)
    if 'moe' not in params:
        return x_BTD + moe.swiglu(params['ffn'], normed_BTD, config.precision), cache, None
    assert config.moe is not None
    ffn_BTD, balance = moe.moe(params['moe'], normed_BTD, config.moe, config.precision, parallel)
    return x_BTD + ffn_BTD, cache, balance


def declare(
    module: nn.Module, config: ModelConfig, names_: tuple[str, ...], parallel: Parallel = ALONE, **sizes: int
) -> dict[str, Any]:
    """Declares parameters of `module` from their names: shape off the letters, initial value off the noun.

    Norm scales start at one, biases at zero, weights are normal with `init_std`. `sizes` replaces dimensions. What `parallel`
    says is cut is returned whole.
    """
    if parallel.gather:
        return {name: gather.whole(name, module.get_variable('params', name), config) for name in names_}
    declared = {}
    for name in names_:
        if '_norm_' in name:
            initializer = nn.initializers.ones
        elif '_bias_' in name:
            initializer = nn.initializers.zeros
        else:
            initializer = nn.initializers.normal(config.init_std)
        shape = names.shape(name, names.dims(config) | sizes)
        declared[name] = module.param(name, initializer, shape, jnp.float32)
    return declared


class Part(nn.Module):
    """Names the parameters of one part of a block and returns them; float8 experts in their place or beside them, as they are."""

    config: ModelConfig
    parameter_names: tuple[str, ...]
    parallel: Parallel = ALONE
    sizes: tuple[tuple[str, int], ...] = ()

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        sizes = dict(self.sizes)
        if not self.has_variable('params', ops.QUANTIZED):
            return declare(self, self.config, self.parameter_names, self.parallel, **sizes)
        params = {ops.QUANTIZED: self.get_variable('params', ops.QUANTIZED)}
        if not self.has_variable('params', self.parameter_names[0]):
            return params
        if not self.parallel.gather:
            return params | declare(self, self.config, self.parameter_names, ALONE, **sizes)
        masters = {name: self.get_variable('params', name) for name in self.parameter_names}
        return {
            ops.QUANTIZED: gather.whole_experts(params[ops.QUANTIZED], self.config),
            **{name: gather.stand_in(name, master, self.config) for name, master in masters.items()},
        }


class Experts(nn.Module):
    """Names the parameters of a DeepSeekMoE layer and returns them; of the experts those of this device."""

    config: ModelConfig
    parallel: Parallel = ALONE

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Any]]:
        config = self.config.moe
        assert config is not None
        experts = self.parallel.experts
        here = config.num_experts // (1 if experts is None else experts.devices)
        params = {
            'router': Part(self.config, router.PARAMETER_NAMES, self.parallel, name='router')(),
            'experts': Part(
                self.config, moe.EXPERT_NAMES, self.parallel, (('F', config.ffn_dim), ('E', here)), name='experts'
            )(),
        }
        if config.num_shared_experts:
            sizes = (('F', config.num_shared_experts * config.ffn_dim),)
            params['shared'] = Part(self.config, moe.FFN_NAMES, self.parallel, sizes, name='shared')()
        return params


class Block(nn.Module):
    """Names the parameters of a block and applies it."""

    config: ModelConfig
    use_moe: bool
    absorbed: bool = False
    parallel: Parallel = ALONE

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, attend: mla.Attend, cache: Cache | None
    ) -> tuple[jax.Array, tuple[Cache | None, moe.Balance | None]]:
        config = self.config
        params: dict[str, Any] = declare(self, config, NORM_NAMES, self.parallel)
        params['attention'] = Part(config, mla.parameter_names(config.mla), self.parallel, name='attention')()
        if self.use_moe:
            params['moe'] = Experts(config, self.parallel, name='moe')()
        else:
            params['ffn'] = Part(config, moe.FFN_NAMES, self.parallel, name='ffn')()
        x_BTD, cache, balance = block(params, x_BTD, attend, cache, config, self.absorbed, self.parallel)
        return x_BTD, (cache, balance)


def rematerialised(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    """The module with `config.remat` applied to its backward pass; values are the same."""
    if config.remat == 'none':
        return module
    return nn.remat(module, policy=remat_policy(config), prevent_cse=False)


def remat_policy(config: ModelConfig) -> Callable[..., bool] | None:
    """What `jax.checkpoint` keeps of a block under `config.remat`, which is not 'none'."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policies = {
        'full': None,
        'paper': ops.KEEP,
        'dots': jax.checkpoint_policies.save_from_both_policies(dots, ops.KEEP),
    }
    return policies[config.remat]
