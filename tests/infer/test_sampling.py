import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.request import SamplingParams
from infer.sampling import SamplingRows, filter_logits, greedy_rows, one_row, sample, token_keys

B, V = 4, 64
ALLOWED = np.ones(V, bool)
ALLOWED[[3, 60, 61, 62, 63]] = False
NONE_SEEN = np.zeros((B, V), bool)


def stack(params):
    return jax.tree.map(lambda *values: jnp.asarray(np.stack(values)), *[one_row(p, seed=0) for p in params])


def draw(logits_BV, rows, seen_BV=None, position=0, allowed_V=ALLOWED):
    rows = rows if isinstance(rows, SamplingRows) else stack(rows)
    keys_B = token_keys(rows.seed_B2, jnp.full(len(logits_BV), position))
    seen_BV = np.zeros(logits_BV.shape, bool) if seen_BV is None else seen_BV
    token_B, logprob_B = sample(jnp.asarray(logits_BV), keys_B, rows, jnp.asarray(seen_BV), jnp.asarray(allowed_V))
    return np.asarray(token_B), np.asarray(logprob_B)


def many(params, count):
    """The same parameters in `count` rows, with seeds 0, 1, 2, ..."""
    rows = jax.tree.map(lambda value: jnp.broadcast_to(value, (count, *value.shape)), one_row(params, seed=0))
    return rows._replace(seed_B2=jnp.stack([jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)], axis=1))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def oracle(logits_V, p, seen_V, margin=1e-5):
    """The distribution to draw from, step by step in float64; None if a step hangs on rounding."""
    x = logits_V.astype(np.float64)
    x[seen_V] = np.where(x[seen_V] > 0, x[seen_V] / p.repetition_penalty, x[seen_V] * p.repetition_penalty)
    x[~ALLOWED] = -np.inf
    x = x / p.temperature
    if p.top_k:
        x[x < np.sort(x)[-min(p.top_k, V)]] = -np.inf
    if p.top_p < 1:
        order = np.argsort(x)
        reached = np.cumsum(softmax(x)[order])
        if np.abs(reached[:-1] - (1 - p.top_p)).min() < margin:
            return None
        x[order[:-1][reached[:-1] <= 1 - p.top_p]] = -np.inf
    ratios = softmax(x) / softmax(x).max()
    if p.min_p and np.abs(np.sort(ratios)[:-1] - p.min_p).min() < margin:
        return None
    x[ratios < p.min_p] = -np.inf
    return softmax(x)


RULES = st.fixed_dictionaries(
    {
        'temperature': st.sampled_from([0.3, 1.0, 2.5]),
        'top_k': st.sampled_from([0, 1, 5, 40, 64, 1000]),
        'top_p': st.sampled_from([0.05, 0.3, 0.9, 0.999, 1.0]),
        'min_p': st.sampled_from([0.0, 0.02, 0.5, 1.0]),
        'repetition_penalty': st.sampled_from([0.7, 1.0, 1.3]),
    }
)
jitted_filter = jax.jit(filter_logits)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(RULES, min_size=B, max_size=B))
def test_filter_logits_equals_plain_numpy_in_each_row(seed, rules):
    params = [SamplingParams(**rule) for rule in rules]
    random = np.random.default_rng(seed)
    logits_BV = random.normal(0, 3, (B, V)).astype(np.float32)
    seen_BV = random.random((B, V)) < 0.3
    z_BV = np.asarray(jitted_filter(jnp.asarray(logits_BV), stack(params), jnp.asarray(seen_BV), jnp.asarray(ALLOWED)))
    for z_V, *row in zip(z_BV, logits_BV, params, seen_BV, strict=True):
        expected = oracle(*row)
        if expected is not None:
            np.testing.assert_allclose(softmax(z_V), expected, atol=1e-5)
            np.testing.assert_array_equal(np.isneginf(z_V), expected == 0)


def test_filter_logits_keeps_ties_of_the_last_one():
    logits_BV = np.tile(np.float32([3, 2, 2, 0, 1, 0] + [-1] * (V - 6)), (B, 1))
    logits_BV[:, 3] = 9  # not allowed
    params = [SamplingParams(top_k=k) for k in (1, 2, 3, 4)]
    z_BV = jitted_filter(jnp.asarray(logits_BV), stack(params), jnp.asarray(NONE_SEEN), jnp.asarray(ALLOWED))
    assert (np.asarray(z_BV) > -np.inf).sum(1).tolist() == [1, 3, 3, 4]


def test_sample_follows_the_filtered_distribution():
    params = SamplingParams(temperature=1.5, top_k=6, top_p=0.95, min_p=0.01)
    logits_V = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
    count = 8192
    tokens, _ = draw(np.tile(logits_V, (count, 1)), many(params, count))
    expected = oracle(logits_V, params, np.zeros(V, bool))
    assert expected is not None
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(np.bincount(tokens, minlength=V) / count - expected) <= 4.5 * deviation)


def test_sample_never_takes_a_forbidden_id():
    count = 8192
    logits_BV = np.zeros((count, V), np.float32)
    logits_BV[:, ~ALLOWED] = 50
    for temperature in (0.0, 1.0, 1000.0):
        tokens, _ = draw(logits_BV, many(SamplingParams(temperature=temperature), count))
        assert ALLOWED[tokens].all()
    assert len(set(tokens.tolist())) == ALLOWED.sum()


def test_sample_at_temperature_zero_takes_the_largest_penalised_logit():
    logits_BV = np.full((B, V), -5, np.float32)
    logits_BV[:, 7], logits_BV[:, 8], logits_BV[:, 9] = 4.0, 3.0, 2.9
    seen_BV = np.zeros((B, V), bool)
    seen_BV[1, [7]] = seen_BV[2, [7, 8]] = True
    params = [SamplingParams(temperature=0, repetition_penalty=1.5, top_k=1)] * 3 + [SamplingParams(temperature=1e-30)]
    assert draw(logits_BV, params, seen_BV)[0].tolist() == [7, 8, 9, 7]
    negative_BV = logits_BV - 10
    assert draw(negative_BV, params, seen_BV)[0].tolist() == [7, 8, 9, 7]


def test_sample_returns_the_models_own_log_probability():
    logits_BV = np.random.default_rng(1).normal(0, 3, (B, V)).astype(np.float32)
    params = [SamplingParams(temperature=t, top_k=3, repetition_penalty=2.0, seed=5) for t in (0, 0.5, 1, 2)]
    tokens, logprobs = draw(logits_BV, params, np.ones((B, V), bool))
    expected = [np.log(softmax(row.astype(np.float64))[token]) for row, token in zip(logits_BV, tokens, strict=True)]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_sample_depends_on_seed_and_position_not_on_neighbours():
    random = np.random.default_rng(2)
    logits_BV = random.normal(0, 1, (B, V)).astype(np.float32)
    params = [SamplingParams(seed=11, top_p=0.99), *[SamplingParams(seed=i, temperature=0.0) for i in range(B - 1)]]
    tokens, seen = [], set()
    for position in range(20):
        alone = draw(np.tile(logits_BV[0], (B, 1)), [params[0]] * B, position=position)[0]
        mixed = draw(logits_BV[[1, 2, 0, 3]], [params[i] for i in (1, 2, 0, 3)], position=position)[0]
        assert set(alone.tolist()) == {int(mixed[2])}
        tokens.append(int(mixed[2]))
        seen.add(
            int(
                draw(np.tile(logits_BV[0], (B, 1)), [SamplingParams(seed=s) for s in range(B)], position=position)[0][0]
            )
        )
    assert len(set(tokens)) > 5
    assert len(seen) > 5


def test_seeds_use_all_64_bits():
    low, high = one_row(SamplingParams(seed=5), 0), one_row(SamplingParams(seed=5 + 2**32), 0)
    assert low.seed_B2.tolist() == [0, 5]
    assert high.seed_B2.tolist() == [1, 5]
    assert one_row(SamplingParams(), 9).seed_B2.tolist() == [0, 9]
    keys = token_keys(jnp.stack([low.seed_B2, high.seed_B2]), jnp.zeros(2, int))
    assert not np.array_equal(jax.random.key_data(keys[0]), jax.random.key_data(keys[1]))
    np.testing.assert_array_equal(
        jax.random.key_data(keys[0]), jax.random.key_data(jax.random.fold_in(jax.random.key(5, impl='threefry2x32'), 0))
    )


def test_sample_compiles_once_for_all_parameters():
    logits_BV = np.zeros((B, V), np.float32)
    draw(logits_BV, [SamplingParams()] * B)
    before = sample._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    draw(
        logits_BV,
        [SamplingParams(temperature=0.0), SamplingParams(top_k=4), SamplingParams(top_p=0.5), SamplingParams()],
    )
    assert sample._cache_size() == before  # pyright: ignore[reportFunctionMemberAccess]


def test_greedy_rows_are_rows_of_greedy_parameters():
    rows = greedy_rows(3)
    assert [leaf.shape for leaf in rows] == [(3,)] * 5 + [(3, 2)]
    np.testing.assert_array_equal(rows.temperature_B, 0)


@pytest.mark.parametrize('top_p', [1e-9, 0.5, 1.0])
def test_filter_logits_always_keeps_the_most_likely_token(top_p):
    logits_BV = np.full((B, V), -np.inf, np.float32)
    logits_BV[:, 10] = 1
    params = [SamplingParams(top_p=top_p, top_k=k, min_p=1.0) for k in (0, 1, 2, 64)]
    z_BV = jitted_filter(jnp.asarray(logits_BV), stack(params), jnp.asarray(NONE_SEEN), jnp.asarray(ALLOWED))
    np.testing.assert_array_equal(np.isfinite(z_BV), np.arange(V) == np.full((B, 1), 10))
