"""Multi-token prediction modules [2.2].

Module k combines the state of the module before it (the main model for k = 1) with the embedding of the token k
places ahead, runs one block, and predicts, through the shared head, the token k + 1 places ahead:

  h'_i = M_k [RMSNorm(h_i^(k-1)) ; RMSNorm(Emb(t_(i+k)))]        [eq. 21]
  h_i^k = RMSNorm(TRM_k(h'))_i                                   [eq. 22]
  P_(i+k+1) = OutHead(h_i^k)                                     [eq. 23]

The state a module hands on is the one the head reads, after its final norm, as in the published checkpoints. `M_k`
is held as two matrices, one for each half of its input.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from deepseek_jax import gather, mla, moe, ops
from deepseek_jax.block import Block, declare, rematerialised
from deepseek_jax.config import ModelConfig
from deepseek_jax.norm import rms_norm
from deepseek_jax.sharding import ALONE, Parallel


class MTPModule(nn.Module):
    """One prediction module; scanned over depth with the state carried from module to module.

    It is given the embedding as it lies on this device.
    """

    config: ModelConfig
    parallel: Parallel = ALONE

    @nn.compact
    def __call__(
        self,
        hidden_BTD: Float[Array, 'B T D'],
        ahead_BT: Int[Array, 'B T'],
        embedding_Vd: Float[Array, 'V d'],
        attend: mla.Attend,
    ) -> tuple[jax.Array, tuple[jax.Array, moe.Balance]]:
        config = self.config
        params = declare(
            self,
            config,
            ('hidden_norm_D', 'embedding_norm_D', 'w_hidden_DD', 'w_embedding_DD', 'final_norm_D'),
            self.parallel,
        )
        with jax.named_scope('embed'):
            embedding_VD = gather.array('embedding_VD', embedding_Vd, config, self.parallel)
            ahead_BTD = embedding_VD[ahead_BT].astype(hidden_BTD.dtype)
        x_BTD = ops.einsum(
            'BTd,dD->BTD',
            rms_norm(hidden_BTD, params['hidden_norm_D'], config.norm_eps),
            params['w_hidden_DD'],
        ) + ops.einsum(
            'BTd,dD->BTD',
            rms_norm(ahead_BTD, params['embedding_norm_D'], config.norm_eps),
            params['w_embedding_DD'],
        )
        block = rematerialised(Block, config)(config, use_moe=True, parallel=self.parallel, name='block')
        x_BTD, (_, balance) = block(x_BTD, attend, None)
        hidden_BTD = rms_norm(x_BTD, params['final_norm_D'], config.norm_eps)
        return hidden_BTD, (hidden_BTD, balance)
