import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_gemm import blocked
from pallas_kernels.grouped_gemm.api import grouped_gemm

SIZES = {
    'even': [16, 16, 16, 16],
    'random_with_empty': [0, 3, 50, 11],
    'one_has_all': [0, 0, 64, 0],
    'rows_left_over': [5, 0, 9, 20],
    'all_empty': [0, 0, 0, 0],
}


def operands(sizes, rows=64, seed=0):
    rng = np.random.default_rng(seed)
    lhs = rng.standard_normal((rows, 12)).astype(np.float32)
    rhs = rng.standard_normal((len(sizes), 12, 20)).astype(np.float32)
    return jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes, jnp.int32)


def loop(lhs, rhs, sizes):
    """The definition, group by group."""
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for matrix, size in zip(np.asarray(rhs, np.float64), np.asarray(sizes), strict=True):
        out[start : start + size] = np.asarray(lhs, np.float64)[start : start + size] @ matrix
        start += size
    return out


@pytest.mark.parametrize('implementation', ['reference', 'blocked'])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_grouped_gemm_equals_loop_over_groups(sizes, implementation):
    lhs, rhs, group_sizes = operands(sizes)
    out = jax.jit(grouped_gemm, static_argnums=3)(lhs, rhs, group_sizes, implementation)
    np.testing.assert_allclose(out, loop(lhs, rhs, sizes), atol=1e-5)


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_blocked_gradients_equal_reference(sizes):
    lhs, rhs, group_sizes = operands(sizes)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((64, 20)), jnp.float32)

    def gradients(implementation):
        loss = lambda lhs, rhs: jnp.sum(grouped_gemm(lhs, rhs, group_sizes, implementation) * weights)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(lhs, rhs)

    for ours, theirs in zip(gradients('blocked'), gradients('reference'), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('rows', [1, 2, 7, 300])
def test_blocked_number_of_rows_is_free(rows):
    rng = np.random.default_rng(rows)
    sizes = np.bincount(rng.integers(0, 5, rows), minlength=5)
    lhs, rhs, group_sizes = operands(list(sizes), rows)
    out = jax.jit(blocked.grouped_gemm)(lhs, rhs, group_sizes)
    np.testing.assert_allclose(out, loop(lhs, rhs, sizes), atol=1e-5)


def test_grouped_gemm_bad_input_is_named():
    lhs, rhs, sizes = operands(SIZES['even'])
    with pytest.raises(ValueError, match=r'lhs is float32 and rhs bfloat16'):
        grouped_gemm(lhs, rhs.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"implementation='fast' is unknown"):
        grouped_gemm(lhs, rhs, sizes, 'fast')
