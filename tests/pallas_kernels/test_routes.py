import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize_fp8.api import quantize_rows
from pallas_kernels.routes import buffer_rows, combine, permute, permute_vector, routes

CASES = {'few': (13, 3, 6), 'many': (300, 2, 4), 'one_token': (1, 2, 8), 'one_choice': (200, 1, 3)}


def choices(name: str) -> np.ndarray:
    """Distinct experts a token; the last expert gets none."""
    tokens, top_k, experts = CASES[name]
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(experts - 1, top_k, replace=False) for _ in range(tokens)])


@pytest.mark.parametrize('name', CASES)
def test_rows_are_sorted_by_expert_from_whole_blocks_on(name):
    tokens, top_k, experts = CASES[name]
    experts_TK = choices(name)
    made = jax.jit(routes, static_argnums=1)(jnp.asarray(experts_TK), experts)
    token_M, start = np.full(made.token_M.shape, tokens), 0
    for expert in range(experts):
        mine = [token for token in range(tokens) if expert in experts_TK[token]]
        assert made.group_sizes_E[expert] == len(mine)
        token_M[start : start + len(mine)] = mine
        start += -(-len(mine) // 128) * 128
    assert start <= len(token_M) == buffer_rows(tokens * top_k, experts)
    np.testing.assert_array_equal(made.token_M, token_M)
    for token in range(tokens):
        for k in range(top_k):
            assert token_M[made.row_TK[token, k]] == token


def test_the_worst_choice_fits_the_buffer():
    assert buffer_rows(5, 8) == 5 * 128  # five experts with one row each
    assert buffer_rows(1024, 8) == 2048  # seven with one row, one with the rest
    assert buffer_rows(1, 256) == 128


@pytest.mark.parametrize('name', CASES)
def test_permuted_and_combined_rows_are_the_tokens_again(name):
    tokens, top_k, experts = CASES[name]
    made = jax.jit(routes, static_argnums=1)(jnp.asarray(choices(name)), experts)
    x = jax.jit(quantize_rows)(jax.random.normal(jax.random.key(0), (tokens, 192)))
    moved = jax.jit(permute)(x, made.token_M)
    assert (moved.values.shape, moved.scales.shape) == ((len(made.token_M), 192), (2, len(made.token_M)))
    values = np.asarray(x.values, np.float32)
    wanted = np.concatenate([values, np.zeros((1, 192))])[np.asarray(made.token_M)]
    np.testing.assert_array_equal(np.asarray(moved.values, np.float32), wanted)
    scales = np.concatenate([np.asarray(x.scales)[:, :tokens], np.zeros((2, 1))], axis=1)[:, np.asarray(made.token_M)]
    np.testing.assert_array_equal(moved.scales, scales)
    together = combine(moved.values.astype(jnp.bfloat16), made.row_TK, jnp.float32)
    np.testing.assert_array_equal(together, top_k * values)


def test_numbers_of_rows_without_a_token_are_zero():
    experts_TK = choices('few')
    made = routes(jnp.asarray(experts_TK), 6)
    gates_TK = jax.random.uniform(jax.random.key(0), experts_TK.shape, minval=0.5)
    gate_M = permute_vector(gates_TK, made)
    np.testing.assert_array_equal(gate_M[made.row_TK], gates_TK)
    assert not np.asarray(gate_M)[np.asarray(made.token_M) == 13].any()
