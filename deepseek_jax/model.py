"""The whole model: embedding, dense blocks, expert blocks, final norm, head, multi-token prediction."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax import mla, moe, names, ops, rope
from deepseek_jax.block import Block, declare, rematerialised
from deepseek_jax.cache import Cache
from deepseek_jax.config import ModelConfig
from deepseek_jax.mtp import MTPModule
from deepseek_jax.norm import rms_norm
from deepseek_jax.precision import compute_dtype
from deepseek_jax.sharding import ALONE, ContextParallel, Parallel
from deepseek_jax.stages import through_stages

Params = Mapping[str, Any]


class States(NamedTuple):
    """What the blocks compute, before the head.

    Attributes:
      hidden_BTD: the main model's state after the final norm; of sequences cut over devices, that of this one's tokens.
      mtp_LBTD: the state of each MTP module after its final norm; None unless asked for.
      load_LE: tokens sent to each expert, int32; expert layers of the main model, then of the MTP modules.
      balance_loss_L: sequence-wise balance loss of the same layers, without its weight.
      dropped_L: choices of experts that were not computed for want of room, int32; devices' counts add up.
      cache: the latent cache with these tokens added; None if none was given.
    """

    hidden_BTD: Float[Array, 'B T D']
    mtp_LBTD: Float[Array, 'L B T D'] | None
    load_LE: Int[Array, 'L E']
    balance_loss_L: Float[Array, ' L']
    dropped_L: Int[Array, ' L']
    cache: Cache | None


class Output(NamedTuple):
    """What `forward` returns.

    Attributes:
      logits_BTV: float32; position `i` predicts token `i + 1`.
      mtp_logits: for each depth k = 1, 2, ..., float32 logits (B, T - k, V); position `i` predicts token `i + k + 1`.
      load_LE, balance_loss_L: as in `States`.
    """

    logits_BTV: Float[Array, 'B T V']
    mtp_logits: tuple[Array, ...]
    load_LE: Int[Array, 'L E']
    balance_loss_L: Float[Array, ' L']


class DeepSeekV3(nn.Module):
    """Names the parameters of the whole model and applies it."""

    config: ModelConfig
    absorbed: bool = False
    parallel: Parallel = ALONE

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, attend: mla.Attend, cache: Cache | None, ahead_LBT: jax.Array | None
    ) -> States:
        config = self.config
        params = declare(self, config, ('embedding_VD', 'final_norm_D', 'head_DV'), self.parallel)
        with jax.named_scope('embed'):
            x_BTD = params['embedding_VD'][tokens_BT].astype(compute_dtype(config.precision))
        caches, balances = [], []
        start = 0
        for name, length in (('dense_layers', config.num_dense_layers), ('moe_layers', config.num_moe_layers)):
            if length == 0:
                continue
            stages = self.parallel.stages if name == names.PIPELINED else ALONE.stages
            length //= stages.devices
            stack = nn.scan(
                rematerialised(Block, config),
                variable_axes={'params': 0},
                split_rngs={'params': True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=length,
                unroll=min(config.scan_unroll, length),
            )(config, use_moe=name == 'moe_layers', absorbed=self.absorbed, parallel=self.parallel, name=name)
            if stages.devices > 1:
                x_BTD, balance = through_stages(stack, x_BTD, attend, stages)
                balances.append(balance)
                continue
            part = jax.tree.map(lambda leaf, start=start, length=length: leaf[start : start + length], cache)
            x_BTD, (part, balance) = stack(x_BTD, attend, part)
            caches.append(part)
            balances.append(balance)
            start += length
        hidden_BTD = rms_norm(x_BTD, params['final_norm_D'], config.norm_eps)
        mtp_LBTD = None
        if ahead_LBT is not None and config.mtp_depth:
            _, (mtp_LBTD, balance) = nn.scan(
                MTPModule,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.mtp_depth,
            )(
                config, self.parallel, name='mtp'
            )(hidden_BTD, ahead_LBT, self.get_variable('params', 'embedding_VD'), attend)
            balances.append(balance)
        balance = _join_balances(balances)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        return States(hidden_BTD, mtp_LBTD, *balance, cache)


def init(key: Array, config: ModelConfig, shardings: Any = None) -> dict[str, Any]:
    """Random float32 parameters: weights normal with `init_std`, norms one, router biases zero.

    Under `jax.eval_shape` it gives shapes and uses no memory.

    Args:
      key: a JAX random key.
      config: the model.
      shardings: where each parameter goes, a tree like the parameters'; each device makes its own part.
    """
    # Random bits take most of the compilation on a CPU, and optimising code that runs once gains nothing. Only an
    # outermost jit may carry such an option.
    outermost = not isinstance(key, jax.core.Tracer)
    options = {'xla_backend_optimization_level': 0} if outermost and jax.default_backend() == 'cpu' else None

    @functools.partial(jax.jit, out_shardings=shardings, compiler_options=options)
    def make(key: Array) -> dict[str, Any]:
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        ahead_LBT = jnp.zeros((config.mtp_depth, 1, 1), jnp.int32)
        module = DeepSeekV3(config)
        attend = causal_attend(tokens_BT, None, config)
        return dict(module.init(key, tokens_BT, attend, None, ahead_LBT)['params'])

    return make(key)


def causal_attend(
    tokens_BT: Int[Array, 'B T'],
    segments_BT: Int[Array, 'B T'] | None,
    config: ModelConfig,
    context: ContextParallel = ALONE.context,
) -> mla.Attend:
    """Attention of tokens to themselves and those before; with segments, to those of the same document.

    The tokens are those of whole sequences, the queries those of them that are on this device.
    """
    positions_T = context.positions(tokens_BT.shape[1])
    rotation = rope.rotation(positions_T[None], config.mla.rope_head_dim, config.rope)
    first_BT = None if segments_BT is None else context.part(ops.document_starts(segments_BT))
    return mla.Attend(jnp.broadcast_to(positions_T, (len(tokens_BT), len(positions_T))), rotation, first_BT)


def states(
    params: Params,
    tokens_BT: Int[Array, 'B T'],
    config: ModelConfig,
    segments_BT: Int[Array, 'B T'] | None = None,
    ahead_LBT: Int[Array, 'L B T'] | None = None,
    parallel: Parallel = ALONE,
) -> States:
    """The model without its head, for training.

    Args:
      params: as from `init`.
      tokens_BT: token ids.
      config: the model.
      segments_BT: document of each token; tokens attend within their document. None: one document a row.
      ahead_LBT: for each MTP depth k, the token k places after each position; None leaves the modules out.
      parallel: this is mapped over devices, and `params` has what of them is this one's. All else is of whole
        sequences; states are of the tokens that are this device's.

    Raises:
      ValueError: T cannot be cut as `parallel.context` says.
    """
    attend = causal_attend(tokens_BT, segments_BT, config, parallel.context)
    module = DeepSeekV3(config, parallel=parallel)
    tokens_BT = parallel.context.part(tokens_BT)
    ahead_LBT = None if ahead_LBT is None else parallel.context.part(ahead_LBT, axis=2)
    return module.apply({'params': params}, tokens_BT, attend, None, ahead_LBT)  # pyright: ignore


def tokens_ahead(tokens_BT: Int[Array, 'B T'], length: int, depth: int) -> Int[Array, 'L B {length}']:
    """For k = 1..depth, the token k places after each of the first `length` positions; 0 past the end."""
    padded = jnp.pad(tokens_BT, ((0, 0), (0, depth)))
    return jnp.stack([padded[:, k : k + length] for k in range(1, depth + 1)])


@jax.named_scope('head')
def logits(params: Params, hidden_BTD: Float[Array, '*rows D'], config: ModelConfig) -> Float[Array, '*rows V']:
    """The head: float32 logits over all V rows, those included that no token id uses."""
    return ops.einsum_fp32('...D,DV->...V', hidden_BTD, params['head_DV'])


@functools.partial(jax.jit, static_argnames=('config', 'mtp'))
def forward(
    params: Params,
    tokens_BT: Int[Array, 'B T'],
    config: ModelConfig,
    segments_BT: Int[Array, 'B T'] | None = None,
    mtp: bool = False,
) -> Output:
    """Logits of every position, as in training; with `mtp`, those of each prediction module too.

    Args:
      params: as from `init` or `load_hf`.
      tokens_BT: token ids.
      config: the model.
      segments_BT: document of each token; tokens attend within their document. None: one document a row.
      mtp: also run the prediction modules.
    """
    length = tokens_BT.shape[1]
    ahead_LBT = tokens_ahead(tokens_BT, length, config.mtp_depth) if mtp and config.mtp_depth else None
    out = states(params, tokens_BT, config, segments_BT, ahead_LBT)
    mtp_logits = ()
    if out.mtp_LBTD is not None:
        mtp_logits = tuple(
            logits(params, out.mtp_LBTD[k - 1, :, : max(length - k, 0)], config) for k in range(1, config.mtp_depth + 1)
        )
    return Output(logits(params, out.hidden_BTD, config), mtp_logits, out.load_LE, out.balance_loss_L)


def extend(
    params: Params,
    tokens_BT: Int[Array, 'B T'],
    positions_BT: Int[Array, 'B T'],
    cache: Cache,
    config: ModelConfig,
    absorbed: bool,
) -> tuple[Float[Array, 'B T D'], Cache]:
    """The state of new tokens after the final norm, given the cached past, and the cache with them added.

    Each token is written to the slot of its position and attends to all slots up to it. So a prompt may be padded
    on the right: what padding leaves behind is overwritten before a query can see it. Positions outside the cache
    are not written.

    Args:
      params: as from `init`.
      tokens_BT: token ids.
      positions_BT: position of each token in its sequence.
      cache: as from `init_cache`.
      config: the model.
      absorbed: which form of attention: False expands the latent (prefill), True attends to it (decode).
    """
    attend = mla.Attend(positions_BT, rope.rotation(positions_BT, config.mla.rope_head_dim, config.rope))
    out = DeepSeekV3(config, absorbed).apply({'params': params}, tokens_BT, attend, cache, None)
    return out.hidden_BTD, out.cache  # pyright: ignore


def _join_balances(balances: list[moe.Balance | None]) -> moe.Balance:
    used = [balance for balance in balances if balance is not None]
    if not used:
        return moe.Balance(jnp.zeros((0, 0), jnp.int32), jnp.zeros(0), jnp.zeros(0, jnp.int32))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *used)
