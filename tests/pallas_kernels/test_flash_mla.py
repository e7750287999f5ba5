"""Attention of MLA against the plain formula in float64, values and gradients of both results."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_mla import reference
from pallas_kernels.flash_mla.api import flash_mla

B, H, N, R, U = 2, 3, 16, 8, 12
SCALE = 0.3
NAMES = 'q', 'q_rope', 'k', 'k_rope', 'v'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries, the last one partial."""
    monkeypatch.setattr(reference, 'BLOCK', 16)


def inputs(T, S, dtype=jnp.float32):
    rng = np.random.default_rng([T, S])
    shapes = (B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, U)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def plain(q, q_rope, k, k_rope, v, visible_BTS):
    """Output and log-sum-exp as formulas say, in the precision of the inputs."""
    scores = SCALE * (jnp.einsum('bthn,bshn->bhts', q, k) + jnp.einsum('bthr,bsr->bhts', q_rope, k_rope))
    weights = jnp.where(visible_BTS[:, None], jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum('bhts,bshu->bthu', weights / jnp.where(total == 0, 1, total), v)
    return out, jnp.log(jnp.where(total == 0, 1, total))[..., 0]


def causal(T):
    return np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))


def cases():
    rng = np.random.default_rng(0)
    for T in (1, 15, 16, 17, 50):
        yield f'causal-{T}', T, T, {}, causal(T)
    cuts = np.sort(rng.integers(0, 50, (B, 4)), axis=1)
    segments = (np.arange(50)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)
    same = segments[:, :, None] == segments[:, None]
    yield 'documents', 50, 50, {'segments': (jnp.asarray(segments),) * 2}, causal(50) & same
    positions = np.array([[20], [3]]) + np.arange(18)
    yield 'prefix', 18, 40, {'positions_BT': jnp.asarray(positions)}, np.arange(40) <= positions[..., None]


CASES = {name: case for name, *case in cases()}


def results(function, x, d_out, d_lse):
    (out, lse), pull = jax.vjp(function, *x)
    return out, lse, *pull((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))


def cotangents(T):
    rng = np.random.default_rng(1)
    return rng.standard_normal((B, T, H, U)), rng.standard_normal((B, H, T))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('name', CASES)
def test_results_and_gradients_are_those_of_the_formula(name, dtype, tolerance):
    """Errors in units of the largest value: float32 sums; in bfloat16 a few roundings of 2^-9 each."""
    T, S, options, visible = CASES[name]
    x, (d_out, d_lse) = inputs(T, S, dtype), cotangents(T)
    d_out = jnp.asarray(d_out, dtype)
    ours = jax.jit(functools.partial(results, functools.partial(flash_mla, scale=SCALE, **options)))(
        x, d_out, jnp.asarray(d_lse, jnp.float32)
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (*x, d_out)]
        wanted = results(lambda *x: plain(*x, visible), wide[:5], wide[5], jnp.asarray(d_lse))
        wanted = [np.asarray(array) for array in wanted]
    for label, got, expected in zip(('out', 'lse', *NAMES), ours, wanted, strict=True):
        assert got.dtype == (jnp.float32 if label == 'lse' else dtype)
        error = np.max(np.abs(np.asarray(got, np.float64) - expected)) / np.max(np.abs(expected))
        assert error < tolerance, label


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    x = inputs(20, 20)
    segments = jnp.ones((B, 20), jnp.int32).at[:, 5].set(7), jnp.ones((B, 20), jnp.int32)
    (out, lse), pull = jax.vjp(lambda *x: flash_mla(*x, scale=SCALE, segments=segments), *x)
    assert not np.any(out[:, 5])
    assert np.all(np.isneginf(lse[:, :, 5]))
    assert np.all(np.isfinite(np.delete(lse, 5, axis=2)))
    gradients = pull((jnp.ones_like(out), jnp.zeros_like(lse)))
    assert all(np.all(np.isfinite(d)) for d in gradients)
    assert not np.any(gradients[0][:, 5])


def test_what_a_query_does_not_see_does_not_count():
    """Huge keys and values later, in other documents, and past the prefix change no bit."""
    T, S, options, visible = CASES['documents']
    x = inputs(T, S)
    row = 30
    hidden = ~visible[0, row]
    out, lse = flash_mla(*x, scale=SCALE, **options)
    q, q_rope, k, k_rope, v = x
    loud = (q, q_rope, k.at[0, hidden].set(1e3), k_rope.at[0, hidden].set(1e3), v.at[0, hidden].set(1e30))
    other, other_lse = flash_mla(*loud, scale=SCALE, **options)
    np.testing.assert_array_equal(out[0, row], other[0, row])
    np.testing.assert_array_equal(lse[0, :, row], other_lse[0, :, row])
    assert np.any(np.asarray(out[0]) != np.asarray(other[0]))


def test_only_output_and_log_sum_exp_are_kept_beside_the_inputs():
    x = inputs(50, 50)
    kept = jax.tree.leaves(jax.vjp(lambda *x: flash_mla(*x, scale=SCALE), *x)[1])
    floats = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sorted(floats) == sorted([*(array.shape for array in x), (B, 50, H, U), (B, H, 50)])


def test_scores_are_held_for_a_block_of_queries_only():
    x = jax.eval_shape(lambda: inputs(512, 512))
    program = jax.jit(functools.partial(flash_mla, scale=SCALE)).lower(*x).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * B * H * 512 * 512 / 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: (*x[:4], x[4].astype(jnp.bfloat16)), 'bfloat16, they must all be'),
        (lambda x: tuple(array.astype(jnp.float16) for array in x), 'float16'),
        (lambda x: (x[0][:, :4], x[1][:, :4], *x[2:]), '4 queries of 8 keys need positions'),
        (lambda x: (x[0][:, :0], x[1][:, :0], *x[2:]), 'must not be empty'),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(flash_mla)(*change(inputs(8, 8)), scale=SCALE)
