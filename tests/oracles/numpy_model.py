"""DeepSeek-V3 in float64 numpy: the equations of the report as plain loops, the oracle for the JAX model.

Written from the technical report (arXiv 2412.19437v2; numbers in brackets are its sections and equations) and, for
YaRN, from arXiv 2309.00071 with the rounding that the published weights were trained with. It shares with the code
under test only the layout of the parameter tree and the fields of `ModelConfig`; derived quantities such as the softmax
scale are derived here again. One sequence at a time, one token at a time through the experts: clarity, not speed.

Every function takes and returns float64. Suffixes are the dimension letters of `deepseek_jax`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.config import ModelConfig, MoEConfig, RopeConfig, YarnConfig

Array = np.ndarray
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for one sequence.

    Attributes:
      affinity_TE: `s`, the sigmoid affinities.
      chosen: per token, the experts it went to, ascending.
      preferred: per token, the plain top K of the unbiased affinities, ascending (what eq. 18 counts).
      margin: the smallest gap, over all selections made here, between what was just taken and just not taken.
    """

    affinity_TE: Array
    chosen: tuple[tuple[int, ...], ...]
    preferred: tuple[tuple[int, ...], ...]
    margin: float


@dataclasses.dataclass(frozen=True)
class Output:
    """The outputs of `forward`. MoE layers are in order: main model first, then one a prediction module.

    Attributes:
      logits_BTV: next-token logits.
      mtp_logits: per depth, (B, T, V) logits at every position, the ones without a target included.
      balance_loss_L: per MoE layer, `sum_i f_i P_i` averaged over the sequences (alpha = 1).
      load_LE: per MoE layer and expert, how many (token, choice) pairs went there, over the batch.
      routings: per MoE layer, per sequence, the decisions.
    """

    logits_BTV: Array
    mtp_logits: list[Array]
    balance_loss_L: Array
    load_LE: Array
    routings: list[list[Routing]]

    @property
    def selections(self) -> list[list[tuple[Any, Any]]]:
        """Every discrete decision: two outputs with equal selections lie in one smooth piece of the model."""
        return [[(routing.chosen, routing.preferred) for routing in layer] for layer in self.routings]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(x: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
    """`(silu(x W_gate) * (x W_up)) W_down` with `silu(z) = z sigmoid(z)`."""
    gate = x @ w_gate
    return (gate * sigmoid(gate) * (x @ w_up)) @ w_down


def temperature(scale: float, coefficient: float) -> float:
    """`0.1 * coefficient * ln(scale) + 1`: YaRN's `sqrt(t)` [4.3]; 1 where the context is not extended."""
    return 1.0 + 0.1 * coefficient * math.log(scale) if scale > 1 else 1.0


def rope_frequencies(rope: RopeConfig, rotary_dim: int) -> Array:
    """The R/2 angles per position: pair i turns by `theta^(-2i/R)`, slowed down by YaRN where it turns too slowly.

    Over the original length a pair turns `rotations(i) = length * theta^(-2i/R) / (2 pi)` times. Pairs with more than
    `beta_fast` rotations keep their frequency, pairs with fewer than `beta_slow` are divided by `scale`, between
    the two a linear ramp over i blends both. The ramp's ends are rounded outwards and clamped to [0, R - 1].
    """
    plain = np.array([rope.theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2)])
    yarn = rope.yarn
    if yarn is None:
        return plain

    def pair_with(rotations: float) -> float:
        # rotations(i) = rotations, solved for i.
        return rotary_dim * math.log(yarn.original_length / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), rotary_dim - 1)
    width = high - low if high != low else 0.001
    slowed = np.array([min(max((i - low) / width, 0.0), 1.0) for i in range(rotary_dim // 2)])
    return plain * (1 - slowed) + plain / yarn.scale * slowed


def rope_magnitude(yarn: YarnConfig | None) -> float:
    """The factor on cosines and sines."""
    if yarn is None:
        return 1.0
    return temperature(yarn.scale, yarn.mscale) / temperature(yarn.scale, yarn.mscale_all_dim)


def rotate(x_TR: Array, rope: RopeConfig) -> Array:
    """`x_TR` rotated to positions 0..T-1; the pair (x[2i], x[2i+1]) is one complex number."""
    length, rotary_dim = x_TR.shape
    angles = np.arange(length)[:, None] * rope_frequencies(rope, rotary_dim)
    turned = (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * rope_magnitude(rope.yarn) * np.exp(1j * angles)
    result = np.empty_like(x_TR)
    result[:, 0::2], result[:, 1::2] = turned.real, turned.imag
    return result


def attention(u_TD: Array, weights: Tree, config: ModelConfig, segments_T: Array) -> Array:
    """Multi-head latent attention [eq. 1-11] of one sequence; a position sees earlier ones of its own segment."""
    mla, eps = config.mla, config.mla.latent_norm_eps
    scale = 1 / math.sqrt(mla.nope_head_dim + mla.rope_head_dim)
    if config.rope.yarn is not None:
        scale *= temperature(config.rope.yarn.scale, config.rope.yarn.mscale_all_dim) ** 2
    latent_TC = rms_norm(u_TD @ weights['w_dkv_DC'], weights['latent_norm_C'], eps)
    rotary_key_TR = rotate(u_TD @ weights['w_kr_DR'], config.rope)
    if mla.query_rank is None:
        query_source, w_query, w_rotary_query = u_TD, weights['w_q_DHN'], weights['w_qr_DHR']
    else:
        query_source = rms_norm(u_TD @ weights['w_dq_DQ'], weights['query_norm_Q'], eps)
        w_query, w_rotary_query = weights['w_uq_QHN'], weights['w_qr_QHR']

    length = len(u_TD)
    order = np.arange(length)
    visible = (order[None, :] <= order[:, None]) & (segments_T[None, :] == segments_T[:, None])
    output_TD = np.zeros_like(u_TD)
    for head in range(mla.num_heads):
        query = np.concatenate(
            [query_source @ w_query[:, head], rotate(query_source @ w_rotary_query[:, head], config.rope)], axis=-1
        )
        key = np.concatenate([latent_TC @ weights['w_uk_CHN'][:, head], rotary_key_TR], axis=-1)
        value_TU = latent_TC @ weights['w_uv_CHU'][:, head]
        scores_TT = np.where(visible, query @ key.T * scale, -np.inf)
        scores_TT = np.exp(scores_TT - scores_TT.max(axis=-1, keepdims=True))
        probabilities_TT = scores_TT / scores_TT.sum(axis=-1, keepdims=True)
        output_TD += probabilities_TT @ value_TU @ weights['w_o_HUD'][head]
    return output_TD


def take_top(values: Array, count: int) -> tuple[list[int], float]:
    """The indices of the `count` largest values, ascending, and the gap to the largest value not taken."""
    order = np.argsort(-values, kind='stable')
    gap = values[order[count - 1]] - values[order[count]] if count < len(values) else np.inf
    return sorted(int(i) for i in order[:count]), float(gap)


def route(u_TD: Array, router: Tree, moe: MoEConfig) -> tuple[Routing, list[list[float]]]:
    """The routing of one sequence and, per token, the gates of its chosen experts [eq. 13-16; 2.1.2].

    A group's score is the sum of its two best (or its only) `s + b`; experts outside the best groups cannot be chosen.
    """
    affinity_TE = sigmoid(u_TD @ router['w_router_DE'])
    group_size = moe.num_experts // moe.num_groups
    chosen_by_token, preferred_by_token, gates_by_token, gaps = [], [], [], []
    for affinity_E in affinity_TE:
        biased_E = affinity_E + router['router_bias_E']
        group_scores = np.array([np.sort(group)[-2:].sum() for group in biased_E.reshape(moe.num_groups, group_size)])
        groups, group_gap = take_top(group_scores, moe.top_groups)
        candidates = [group * group_size + i for group in groups for i in range(group_size)]
        places, expert_gap = take_top(biased_E[candidates], moe.top_k)
        chosen = [candidates[place] for place in places]
        total = sum(affinity_E[expert] for expert in chosen) + 1e-20
        gates_by_token.append([moe.gate_scale * affinity_E[expert] / total for expert in chosen])
        preferred, preferred_gap = take_top(affinity_E, moe.top_k)
        chosen_by_token.append(tuple(chosen))
        preferred_by_token.append(tuple(preferred))
        gaps += [group_gap, expert_gap, preferred_gap]
    return Routing(affinity_TE, tuple(chosen_by_token), tuple(preferred_by_token), min(gaps)), gates_by_token


def mixture(u_TD: Array, weights: Tree, moe: MoEConfig) -> tuple[Array, Routing]:
    """Shared experts plus the gated sum of each token's routed experts [eq. 12], and the routing."""
    routing, gates_by_token = route(u_TD, weights['router'], moe)
    experts = weights['experts']
    output_TD = np.zeros_like(u_TD)
    for token, (chosen, gates) in enumerate(zip(routing.chosen, gates_by_token, strict=True)):
        for expert, gate in zip(chosen, gates, strict=True):
            output_TD[token] += gate * swiglu(
                u_TD[token], experts['w_gate_EDF'][expert], experts['w_up_EDF'][expert], experts['w_down_EFD'][expert]
            )
    if moe.num_shared_experts:
        shared = weights['shared']
        output_TD += swiglu(u_TD, shared['w_gate_DF'], shared['w_up_DF'], shared['w_down_FD'])
    return output_TD, routing


def balance_loss(routing: Routing, moe: MoEConfig) -> float:
    """`sum_i f_i P_i` of one sequence [eq. 17-20, alpha = 1]."""
    length = len(routing.affinity_TE)
    shares_TE = routing.affinity_TE / routing.affinity_TE.sum(axis=-1, keepdims=True)
    total = 0.0
    for expert in range(moe.num_experts):
        count = sum(expert in preferred for preferred in routing.preferred)
        frequency = moe.num_experts / (moe.top_k * length) * count
        total += frequency * shares_TE[:, expert].mean()
    return total


def block(x_TD: Array, weights: Tree, config: ModelConfig, segments_T: Array) -> tuple[Array, Routing | None]:
    """One pre-norm Transformer block; a block with `ffn` weights is dense and has no routing."""
    u_TD = rms_norm(x_TD, weights['attention_norm_D'], config.norm_eps)
    x_TD = x_TD + attention(u_TD, weights['attention'], config, segments_T)
    u_TD = rms_norm(x_TD, weights['ffn_norm_D'], config.norm_eps)
    if 'ffn' in weights:
        ffn = weights['ffn']
        return x_TD + swiglu(u_TD, ffn['w_gate_DF'], ffn['w_up_DF'], ffn['w_down_FD']), None
    assert config.moe is not None
    y_TD, routing = mixture(u_TD, weights['moe'], config.moe)
    return x_TD + y_TD, routing


def layer_of(stacked: Tree, layer: int) -> Tree:
    """The tree of one layer out of a stacked tree."""
    return {
        name: layer_of(value, layer) if isinstance(value, dict) else value[layer] for name, value in stacked.items()
    }


def forward_sequence(
    params: Tree, config: ModelConfig, tokens_T: Array, segments_T: Array, ahead_T: Sequence[Array]
) -> tuple[Array, list[Array], list[Routing]]:
    """Logits (T, V), logits of each prediction module, and the routings of one sequence. See `forward`."""
    routings: list[Routing] = []
    x_TD = params['embedding_VD'][tokens_T]
    for layer in range(config.num_dense_layers):
        x_TD, _ = block(x_TD, layer_of(params['dense_layers'], layer), config, segments_T)
    for layer in range(config.num_moe_layers):
        x_TD, routing = block(x_TD, layer_of(params['moe_layers'], layer), config, segments_T)
        assert routing is not None
        routings.append(routing)
    h_TD = rms_norm(x_TD, params['final_norm_D'], config.norm_eps)
    logits_TV = h_TD @ params['head_DV']

    mtp_logits = []
    for depth, embedded_T in enumerate(ahead_T):
        module = layer_of(params['mtp'], depth)
        embedding_TD = params['embedding_VD'][embedded_T]
        x_TD = rms_norm(h_TD, module['hidden_norm_D'], config.norm_eps) @ module['w_hidden_DD']
        x_TD = x_TD + rms_norm(embedding_TD, module['embedding_norm_D'], config.norm_eps) @ module['w_embedding_DD']
        x_TD, routing = block(x_TD, module['block'], config, segments_T)
        assert routing is not None
        routings.append(routing)
        h_TD = rms_norm(x_TD, module['final_norm_D'], config.norm_eps)
        mtp_logits.append(h_TD @ params['head_DV'])
    return logits_TV, mtp_logits, routings


def forward(
    params: Tree,
    config: ModelConfig,
    tokens_BT: Array,
    segments_BT: Array | None = None,
    ahead: Sequence[Array] = (),
) -> Output:
    """The model's outputs for a batch.

    Args:
      params: nested dict of arrays in the layout of `deepseek_jax`, of any float type; computed in float64.
      config: the model.
      tokens_BT: token ids.
      segments_BT: document number of every position; attention stays inside a document. None: one document a row.
      ahead: for each prediction module in use, the (B, T) token ids whose embeddings it takes: at depth k and
        position i, `t_{i+k}` [2.2]. Module 1 reads the main model's state after the final norm, module k + 1 the
        state of module k after its own final norm.
    """
    params = to_float64(params)
    if segments_BT is None:
        segments_BT = np.zeros_like(tokens_BT)
    sequences = [
        forward_sequence(params, config, tokens_BT[b], segments_BT[b], [tokens[b] for tokens in ahead])
        for b in range(len(tokens_BT))
    ]
    logits, mtp_logits, routings_by_sequence = zip(*sequences, strict=True)
    routings = [list(layer) for layer in zip(*routings_by_sequence, strict=True)]
    moe = config.moe
    num_experts = moe.num_experts if moe is not None else 0
    load_LE = np.zeros((len(routings), num_experts), dtype=np.int64)
    balance_loss_L = np.zeros(len(routings))
    for layer, of_layer in enumerate(routings):
        assert moe is not None
        balance_loss_L[layer] = np.mean([balance_loss(routing, moe) for routing in of_layer])
        for routing in of_layer:
            for chosen in routing.chosen:
                load_LE[layer, list(chosen)] += 1
    return Output(
        np.stack(logits),
        [np.stack(depth) for depth in zip(*mtp_logits, strict=True)],
        balance_loss_L,
        load_LE,
        routings,
    )


def embedded_ahead(tokens: Array, depth: int, length: int) -> Array:
    """(B, length) ids `t_{i+depth}`, with id 0 where the row has no such token."""
    shifted = tokens[:, depth : depth + length]
    return np.pad(shifted, [(0, 0), (0, length - shifted.shape[1])])


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> float:
    """Mean of `-log softmax(logits)[target]` over all positions given."""
    total = 0.0
    for logits_V, target in zip(logits_BTV.reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1), strict=True):
        peak = logits_V.max()
        total += peak + math.log(np.exp(logits_V - peak).sum()) - logits_V[target]
    return total / targets_BT.size


def loss(
    params: Tree,
    config: ModelConfig,
    tokens_BT1: Array,
    segments_BT: Array | None,
    mtp_weight: float,
    balance_weight: float,
) -> tuple[float, Output]:
    """The training loss and the outputs it was made of.

    `CE + mtp_weight / depth * sum_k CE_k + balance_weight * sum over MoE layers of the balance loss` [eq. 17, 24, 25].
    The first T of the T + 1 given tokens are the input. Depth k at position i takes `Emb(t_{i+k})` and predicts
    `t_{i+k+1}`; its mean runs over the positions i < T - k that have a target. The k - 1 last positions, which have no
    token to embed, embed id 0: their cross-entropy is left out, their routing counts.
    """
    length = tokens_BT1.shape[1] - 1
    ahead = [embedded_ahead(tokens_BT1, depth, length) for depth in range(1, config.mtp_depth + 1)]
    output = forward(params, config, tokens_BT1[:, :-1], segments_BT, ahead)
    total = cross_entropy(output.logits_BTV, tokens_BT1[:, 1:])
    for depth, logits_BTV in enumerate(output.mtp_logits, start=1):
        value = cross_entropy(logits_BTV[:, : length - depth], tokens_BT1[:, depth + 1 :])
        total += mtp_weight / config.mtp_depth * value
    return total + balance_weight * float(output.balance_loss_L.sum()), output


def to_float64(tree: Tree) -> Tree:
    """The same tree with every leaf a float64 numpy array."""
    return {
        name: to_float64(value) if isinstance(value, dict) else np.asarray(value, dtype=np.float64)
        for name, value in tree.items()
    }
