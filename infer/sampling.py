"""From logits to tokens, each row of the batch by its own rules.

Every rule is an array with one value a row, so that one compiled program serves any mix of requests. The order is
that of the logits processors in transformers; vLLM differs in applying min-p before top-k:

1. ids that may never be drawn are removed;
2. repetition penalty `r`: the logits of tokens seen before become `x / r` where positive, `x * r` where negative;
3. temperature `t`: `x / t`; rows with `t = 0` take the largest logit and skip the rest;
4. top-k: logits below the k-th largest are removed;
5. top-p: of the distribution that is left, the smallest set of most likely tokens that reaches `p` stays;
6. min-p: tokens less than `p` times as likely as the most likely one are removed.

Steps 4 to 6 come down to one threshold a row, so tokens that tie with the last one kept stay too. It is found without
sorting the vocabulary, and the search is skipped while no row asks for top-k or top-p.

The draw is the Gumbel maximum `argmax(z + g)`, `g = -log(-log(u))`, which follows `softmax(z)`. The noise of a row
comes from its own key, made of the request's seed and the position of the token: not from its place in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from infer.request import SamplingParams


class SamplingRows(NamedTuple):
    """Sampling parameters of the rows of a batch (without B: of one request). `top_k` is 0 where it is off."""

    temperature_B: Float[Array, '*B']
    top_k_B: Int[Array, '*B']
    top_p_B: Float[Array, '*B']
    min_p_B: Float[Array, '*B']
    repetition_penalty_B: Float[Array, '*B']
    seed_B2: UInt32[Array, '*B 2']


def one_row(params: SamplingParams, seed: int) -> SamplingRows:
    """The parameters of one request, without B; `seed` stands for a `params.seed` of None."""
    seed = seed if params.seed is None else params.seed
    return SamplingRows(
        temperature_B=jnp.float32(params.temperature),
        top_k_B=jnp.int32(params.top_k),
        top_p_B=jnp.float32(params.top_p),
        min_p_B=jnp.float32(params.min_p),
        repetition_penalty_B=jnp.float32(params.repetition_penalty),
        seed_B2=jnp.uint32([seed >> 32, seed & 0xFFFFFFFF]),
    )


def greedy_rows(batch_size: int) -> SamplingRows:
    """Parameters of `batch_size` rows that each take the most likely token."""
    row = one_row(SamplingParams(temperature=0.0), seed=0)
    return jax.tree.map(lambda value: jnp.broadcast_to(value, (batch_size, *value.shape)), row)


def token_keys(seed_B2: UInt32[Array, 'B 2'], position_B: Int[Array, ' B']) -> Key[Array, ' B']:
    """The random keys of the tokens that will stand at `position_B`: the seed with the position folded in."""
    keys_B = jax.random.wrap_key_data(seed_B2, impl='threefry2x32')
    return jax.vmap(jax.random.fold_in)(keys_B, position_B)


def filter_logits(
    logits_BV: Float[Array, 'B V'], rows: SamplingRows, seen_BV: Bool[Array, 'B V'], allowed_V: Bool[Array, ' V']
) -> Float[Array, 'B V']:
    """Logits whose softmax is the distribution to draw from: at most 0, -inf for tokens that may not be drawn.

    Rows with temperature 0 come back at temperature 1 without top-k, top-p and min-p: their largest value is the
    token to take. Needs at least one allowed id.
    """
    penalty_B1 = rows.repetition_penalty_B[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)

    # The maximum is taken away before the division, so that a temperature next to 0 cannot overflow.
    random_B = rows.temperature_B > 0
    divisor_B = jnp.where(random_B, rows.temperature_B, 1.0)
    z_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / divisor_B[:, None]

    ranked_B = random_B & ((rows.top_k_B > 0) | (rows.top_p_B < 1))
    threshold_B = jax.lax.cond(
        jnp.any(ranked_B), _rank_threshold, lambda z_BV, _: jnp.full(z_BV.shape[0], -jnp.inf), z_BV, rows
    )
    # p_i >= min_p * p_max is z_i >= log(min_p), since the largest z is 0 and the earlier steps never remove it.
    threshold_B = jnp.maximum(threshold_B, jnp.log(rows.min_p_B))
    threshold_B = jnp.where(random_B, threshold_B, -jnp.inf)
    return jnp.where(z_BV >= threshold_B[:, None], z_BV, -jnp.inf)


def _rank_threshold(z_BV: Float[Array, 'B V'], rows: SamplingRows) -> Float[Array, ' B']:
    """The smallest value that top-k, then top-p, keep in each row."""
    vocab_size = z_BV.shape[-1]
    count_B = jnp.where(rows.top_k_B > 0, jnp.minimum(rows.top_k_B, vocab_size), vocab_size)
    kth_B = _reaching(jnp.ones_like(z_BV), z_BV, count_B.astype(jnp.float32))
    mass_BV = jnp.where(z_BV >= kth_B[:, None], jnp.exp(z_BV), 0.0)
    pth_B = _reaching(mass_BV, z_BV, rows.top_p_B * mass_BV.sum(-1))
    # Rounding may let the sum reach all of the mass early: a top_p of 1 is taken at its word.
    return jnp.where(rows.top_p_B < 1, jnp.maximum(kth_B, pth_B), kth_B)


def _reaching(
    weight_BV: Float[Array, 'B V'], z_BV: Float[Array, 'B V'], goal_B: Float[Array, ' B']
) -> Float[Array, ' B']:
    """The largest threshold in each row for which `sum(weight[z >= threshold])` reaches the goal.

    The bits of non-negative floats, read as integers, have the order of the floats. As z <= 0, the answer is found by
    bisection over the 31 bits of -z: exact, and 31 sums cost a fraction of one sort of a large vocabulary.
    """
    key_BV = jax.lax.bitcast_convert_type(jnp.abs(z_BV), jnp.int32)
    infinity = jnp.full_like(goal_B, jnp.inf)

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        reached_B = jnp.sum(jnp.where(key_BV <= middle_B[:, None], weight_BV, 0.0), axis=-1) >= goal_B
        return jnp.where(reached_B, low_B, middle_B + 1), jnp.where(reached_B, middle_B, high_B)

    low_B = jnp.zeros(goal_B.shape, jnp.int32)
    high_B = jax.lax.bitcast_convert_type(infinity, jnp.int32)
    _, high_B = jax.lax.fori_loop(0, 31, halve, (low_B, high_B))
    return -jax.lax.bitcast_convert_type(high_B, jnp.float32)


@jax.jit
def sample(
    logits_BV: Float[Array, 'B V'],
    keys_B: Key[Array, ' B'],
    rows: SamplingRows,
    seen_BV: Bool[Array, 'B V'],
    allowed_V: Bool[Array, ' V'],
) -> tuple[Int[Array, ' B'], Float[Array, ' B']]:
    """One token a row, and its log-probability in the model's own distribution (`log_softmax` of `logits_BV`).

    Args:
      logits_BV: float32.
      keys_B: from `token_keys`.
      rows: sampling parameters.
      seen_BV: tokens in the prompt or the output so far, for the repetition penalty.
      allowed_V: False for ids that are never drawn, whatever their logit.
    """
    z_BV = filter_logits(logits_BV, rows, seen_BV, allowed_V)

    def draw(z_BV: Float[Array, 'B V']) -> Float[Array, 'B V']:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, z_BV.shape[1:], jnp.float32))(keys_B)
        return jnp.where(rows.temperature_B[:, None] > 0, z_BV + noise_BV, z_BV)

    z_BV = jax.lax.cond(jnp.any(rows.temperature_B > 0), draw, lambda z_BV: z_BV, z_BV)
    token_B = jnp.argmax(z_BV, axis=-1)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
