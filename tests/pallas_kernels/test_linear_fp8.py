"""What float8 allows: e4m3 has 3 bits of fraction, so a value errs by at most half a step, 2**-4 of itself, and near zero
by 2**-10 of the scale of its tile. An error bound of a product follows for every element:

  |sum x' w' - sum x w| <= sum (|x' - x| |w| + |x| |w' - w| + |x' - x| |w' - w|)

Random operands do better, since their errors are independent. A step is 2**(e - 3) for values of 2**e and more, its
error has the deviation 2**(e - 3) / sqrt(12), so each operand errs by 0.036 of itself at most in the mean square, and
a product of two, whatever its length, by sqrt(2) * 0.036 = 0.051.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized
from pallas_kernels.gemm_fp8.api import gemm_fp8, wgrad_fp8
from pallas_kernels.linear_fp8.api import linear_fp8, linears_fp8
from pallas_kernels.quantize_fp8.api import dequantize_e5m6, quantize_blocks, quantize_e5m6, quantize_rows_and_columns

ROW, COLUMN, SQUARE = (1, BLOCK), (BLOCK, 1), (BLOCK, BLOCK)
# The smallest mean square error that float8 can be believed to have: less would mean that nothing was rounded.
ROUNDED = 0.015
MEAN_SQUARE = 0.051

# (M, K, widths of the weights)
SHAPES = {
    'one_row': (1, 128, (64,)),
    'odd_rows': (37, 256, (576,)),
    'down_projections': (130, 384, (256, 128, 64)),
    'partial_block': (37, 192, (320,)),
    'narrow': (50, 48, (24, 16, 40)),
}
IMPLEMENTATIONS = ['reference', pytest.param('pallas', marks=pytest.mark.gpu)]


def operands(name):
    """Rows, columns and blocks of very different size, so that no tile can borrow its neighbour's scale."""
    M, K, widths = SHAPES[name]
    rng = np.random.default_rng(len(name))
    x_MK = rng.standard_normal((M, K)) * 2.0 ** rng.integers(-12, 12, (M, 1))
    x_MK = jnp.asarray(x_MK * 2.0 ** np.repeat(rng.integers(-6, 6, -(-K // BLOCK)), BLOCK)[:K], jnp.bfloat16)
    weights = tuple(jnp.asarray(rng.standard_normal((K, N)) * 2.0 ** rng.integers(-9, 0), jnp.float32) for N in widths)
    d_outputs = tuple(
        jnp.asarray(rng.standard_normal((M, N)) * 2.0 ** rng.integers(-20, -9), jnp.bfloat16) for N in widths
    )
    return x_MK, weights, d_outputs


@functools.partial(jax.jit, static_argnames=('power_of_two', 'implementation'))
def run(x_MK, weights, d_outputs, quantized=None, **options):
    """Outputs, the gradient of x and those of the weights."""
    outputs, pull = jax.vjp(lambda x_MK, weights: linears_fp8(x_MK, weights, quantized, **options), x_MK, weights)
    return outputs, *pull(d_outputs)


def exact(array):
    return np.asarray(array, np.float64)


def rounding(x, tile, power_of_two=False):
    """How far quantisation may move each value."""
    amax = np.zeros_like(x)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            part = np.s_[i : i + tile[0], j : j + tile[1]]
            amax[part] = np.abs(x[part]).max()
    scale = amax / 448 * (2 if power_of_two else 1)
    return np.maximum(np.abs(x) * 2**-4, scale * 2**-10) * (1 + 2**-20)


def check(ours, lhs, rhs, lhs_tile, rhs_tile, power_of_two=False, mean_square=True):
    """`ours` is `lhs @ rhs` within the bound for each element, and in the mean as close as float8 must be."""
    lhs_error, rhs_error = rounding(lhs, lhs_tile, power_of_two), rounding(rhs, rhs_tile, power_of_two)
    bound = lhs_error @ np.abs(rhs) + np.abs(lhs) @ rhs_error + lhs_error @ rhs_error
    # The tensor cores keep 14 bits of a sum; the result is rounded to bfloat16 at the worst.
    bound += np.abs(lhs) @ np.abs(rhs) * 2**-10 + np.abs(lhs @ rhs) * 2**-8
    error = exact(ours) - lhs @ rhs
    assert np.all(np.abs(error) <= bound)
    if mean_square:
        relative = np.sqrt(np.sum(error**2) / np.sum((lhs @ rhs) ** 2))
        assert ROUNDED < relative < MEAN_SQUARE


def test_what_is_kept_in_twelve_bits_is_quantised_from_those():
    x_MK, weights, d_outputs = operands('down_projections')
    kept = quantize_e5m6(x_MK)

    def linears(x_MK, weights):
        return linears_fp8(x_MK, weights, kept=kept)

    outputs, pull = jax.jit(functools.partial(jax.vjp, linears))(x_MK, weights)
    assert not any(leaf.shape in (x_MK.shape, x_MK.shape[::-1]) for leaf in jax.tree.leaves(pull) if leaf.dtype == E4M3)
    d_x_MK, d_weights = jax.jit(pull)(d_outputs)
    wanted, d_x, _ = run(x_MK, weights, d_outputs)
    _, _, d_of_kept = run(dequantize_e5m6(kept), weights, d_outputs)
    for ours, theirs in zip((*outputs, d_x_MK, *d_weights), (*wanted, d_x, *d_of_kept), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r'x is \(130, 384\) and what is kept of it \(129, 384\)'):
        linears_fp8(x_MK, weights, kept=quantize_e5m6(x_MK[:129]))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('power_of_two', [False, True], ids=['amax', 'power_of_two'])
@pytest.mark.parametrize('name', SHAPES)
def test_linear_fp8_errs_no_more_than_float8_must(name, power_of_two, implementation):
    x_MK, weights, d_outputs = operands(name)
    if implementation == 'pallas' and any(w_KN.shape[0] % 128 or w_KN.shape[1] % 64 for w_KN in weights):
        pytest.skip('the kernels serve K in multiples of 128 and N in multiples of 64')
    outputs, d_x_MK, d_weights = run(x_MK, weights, d_outputs, power_of_two=power_of_two, implementation=implementation)
    assert d_x_MK.dtype == jnp.bfloat16
    x = exact(x_MK)
    options = {'power_of_two': power_of_two, 'mean_square': x.shape[0] > 1}
    d_x, d_x_bound = np.zeros_like(x), np.zeros_like(x)
    for y_MN, w_KN, d_MN, d_w_KN in zip(outputs, weights, d_outputs, d_weights, strict=True):
        w, d = exact(w_KN), exact(d_MN)
        assert (y_MN.dtype, d_w_KN.dtype) == (jnp.bfloat16, jnp.float32)
        check(y_MN, x, w, ROW, SQUARE, **options)
        check(d_w_KN, x.T, d, ROW, COLUMN, **options)
        d_error, w_error = rounding(d, ROW, power_of_two), rounding(w.T, SQUARE, power_of_two)
        d_x += d @ w.T
        d_x_bound += d_error @ np.abs(w.T) + np.abs(d) @ w_error + d_error @ w_error
        d_x_bound += np.abs(d) @ np.abs(w.T) * 2**-8
    error = exact(d_x_MK) - d_x
    assert np.all(np.abs(error) <= d_x_bound)
    assert ROUNDED < np.sqrt(np.sum(error**2) / np.sum(d_x**2)) < MEAN_SQUARE


def test_linear_fp8_is_three_float8_products():
    """Each product reads the operand that was quantised for it: the outcome is the same to the bit."""
    x_MK, (w_KN,), (d_MN,) = operands('odd_rows')
    (y_MN,), d_x_MK, (d_w_KN,) = run(x_MK, (w_KN,), (d_MN,))

    @jax.jit
    def products(x_MK, w_KN, d_MN):
        rows, columns = quantize_rows_and_columns(x_MK)
        d_rows, d_columns = quantize_rows_and_columns(d_MN)
        natural, transposed = quantize_blocks(w_KN)
        multiply = functools.partial(gemm_fp8, out_dtype=x_MK.dtype)
        return multiply(rows, transposed), multiply(d_rows, natural), wgrad_fp8(columns, d_columns)

    jax.tree.map(np.testing.assert_array_equal, (y_MN, d_x_MK, d_w_KN), products(x_MK, w_KN, d_MN))
    np.testing.assert_array_equal(y_MN, jax.jit(linear_fp8)(x_MK, w_KN))


@pytest.mark.parametrize('name', ['down_projections', 'narrow'])
def test_linears_fp8_equal_the_layers_apart(name):
    x_MK, weights, d_outputs = operands(name)
    outputs, _, d_weights = run(x_MK, weights, d_outputs)
    each = jax.jit(lambda x_MK, *pairs: [run(x_MK, (w_KN,), (d_MN,)) for w_KN, d_MN in pairs])
    apart = each(x_MK, *zip(weights, d_outputs, strict=True))
    for i, ((y_MN,), _, (d_w_KN,)) in enumerate(apart):
        # The same operands; the CPU's order of summation depends on the width.
        np.testing.assert_allclose(exact(outputs[i]), exact(y_MN), rtol=2**-7, atol=1e-5 * np.abs(exact(y_MN)).max())
        np.testing.assert_allclose(d_weights[i], d_w_KN, rtol=1e-5, atol=1e-6 * np.abs(exact(d_w_KN)).max())


def test_backward_pass_keeps_float8_only():
    x_MK, weights, _ = operands('down_projections')

    def check_kept(function, *args):
        kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
        assert {leaf.dtype for leaf in kept} == {jnp.dtype(E4M3), jnp.dtype(jnp.float32)}
        values = [leaf for leaf in kept if leaf.dtype == E4M3]
        scales = [leaf for leaf in kept if leaf.dtype == jnp.float32]
        # One of x in tiles of tokens, and each weight once; no more than a scale for each 64 values.
        assert len(values) == 1 + len(weights)
        assert sum(leaf.size for leaf in scales) < sum(leaf.size for leaf in values) / 64

    check_kept(linears_fp8, x_MK, weights)
    check_kept(jax.jit(linears_fp8), x_MK, weights)


def test_backward_pass_of_stacked_layers_keeps_float8_only():
    x_MK = jnp.ones((40, 128), jnp.bfloat16)
    w_LKN = jnp.ones((3, 128, 128), jnp.float32)
    layers = lambda x_MK, w_LKN: jax.lax.scan(lambda x, w: (linear_fp8(x, w), None), x_MK, w_LKN)[0]  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(layers, *args)[1], x_MK, w_LKN))
    assert sorted((leaf.dtype.name, leaf.shape) for leaf in kept) == [
        ('float32', (3, 1, 1)),
        ('float32', (3, 1, 128)),
        ('float8_e4m3fn', (3, 128, 128)),
        ('float8_e4m3fn', (3, 128, 128)),
    ]


def test_quantised_weight_stands_for_its_master_and_gradients_reach_the_master():
    x_MK, weights, d_outputs = operands('down_projections')
    quantized = jax.jit(lambda *weights: tuple(quantize_blocks(w_KN) for w_KN in weights))(*weights)
    unread = tuple(jnp.full_like(w_KN, jnp.nan) for w_KN in weights)
    expected = run(x_MK, weights, d_outputs)
    jax.tree.map(np.testing.assert_array_equal, run(x_MK, unread, d_outputs, quantized), expected)
    outputs, d_x_MK, no_gradients = run(x_MK, None, d_outputs, quantized)
    jax.tree.map(np.testing.assert_array_equal, (outputs, d_x_MK), expected[:2])
    assert no_gradients is None


def test_power_of_two_reaches_every_operand():
    x_MK, weights, d_outputs = operands('odd_rows')
    residuals = jax.jit(lambda *args: jax.vjp(lambda *args: linears_fp8(*args, power_of_two=True), *args)[1])
    kept = jax.tree.leaves(residuals(x_MK, weights))
    for scales in (leaf for leaf in kept if leaf.dtype == jnp.float32):
        assert np.all(np.frexp(np.asarray(scales))[0] == 0.5)
    # A gradient that powers of two hold exactly comes through its own quantisation unharmed; 448 is not one of them.
    d_outputs = tuple(jnp.full_like(d_MN, 240) for d_MN in d_outputs)
    ones = tuple(jnp.ones_like(w_KN) for w_KN in weights)
    d_x_MK = run(x_MK, ones, d_outputs, power_of_two=True)[1]
    np.testing.assert_array_equal(exact(d_x_MK), np.full(x_MK.shape, 240 * 576))


def test_float32_and_bfloat16_weights_get_gradients_of_their_dtype():
    x_MK, (w_KN,), d_outputs = operands('one_row')
    (y_MN,), d_x_MK, (d_w_KN,) = run(
        x_MK.astype(jnp.float32), (w_KN.astype(jnp.bfloat16),), (d_outputs[0].astype(jnp.float32),)
    )
    assert (y_MN.dtype, d_x_MK.dtype, d_w_KN.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    full = run(x_MK, (w_KN,), d_outputs)[2][0]
    assert full.dtype == jnp.float32
    assert np.any(exact(full) != exact(full.astype(jnp.bfloat16)))


def poisoned(array, *index):
    return array.at[index].set(jnp.nan)


def check_nan(ours, theirs, certain, possible):
    """NaN wherever it is certain, nowhere that it is not possible, and what is not possible is untouched."""
    ours, theirs = exact(ours), exact(theirs)
    certain, possible = np.broadcast_to(certain, ours.shape), np.broadcast_to(possible, ours.shape)
    assert np.all(np.isnan(ours[certain]))
    np.testing.assert_array_equal(ours[~possible], theirs[~possible])


def test_nan_in_x_reaches_its_row_and_its_channel():
    x_MK, weights, d_outputs = operands('down_projections')
    clean = run(x_MK, weights, d_outputs)
    dirty = run(poisoned(x_MK, 7, 200), weights, d_outputs)
    row, channel = np.arange(x_MK.shape[0])[:, None] == 7, np.arange(x_MK.shape[1])[:, None] == 200
    for i in range(len(weights)):
        check_nan(dirty[0][i], clean[0][i], row, row)
        check_nan(dirty[2][i], clean[2][i], channel, channel)
    np.testing.assert_array_equal(dirty[1], clean[1])


def test_nan_in_a_gradient_reaches_its_row_and_its_column():
    x_MK, weights, d_outputs = operands('down_projections')
    clean = run(x_MK, weights, d_outputs)
    dirty = run(x_MK, weights, (d_outputs[0], poisoned(d_outputs[1], 129, 5), d_outputs[2]))
    jax.tree.map(np.testing.assert_array_equal, dirty[0], clean[0])
    row, column = np.arange(x_MK.shape[0])[:, None] == 129, np.arange(weights[1].shape[1]) == 5
    check_nan(dirty[1], clean[1], row, row)
    check_nan(dirty[2][1], clean[2][1], column, column)
    for i in (0, 2):
        np.testing.assert_array_equal(dirty[2][i], clean[2][i])


def test_nan_in_a_weight_stays_in_its_block():
    x_MK, weights, d_outputs = operands('down_projections')
    clean = run(x_MK, weights, d_outputs)
    dirty = run(x_MK, (poisoned(weights[0], 130, 140), *weights[1:]), d_outputs)
    column, channel = np.arange(weights[0].shape[1]), np.arange(x_MK.shape[1])
    check_nan(dirty[0][0], clean[0][0], column == 140, column // BLOCK == 1)
    check_nan(dirty[1], clean[1], channel == 130, channel // BLOCK == 1)
    jax.tree.map(np.testing.assert_array_equal, (dirty[0][1:], dirty[2]), (clean[0][1:], clean[2]))


def test_zeros_give_zeros():
    x_MK, weights, d_outputs = operands('odd_rows')
    zeros = jax.tree.map(jnp.zeros_like, (x_MK, weights, d_outputs))
    for leaf in jax.tree.leaves(run(*zeros)):
        assert not np.any(exact(leaf))


def test_linear_fp8_bad_input_is_named():
    x_MK, (w_KN,), _ = operands('one_row')
    copy = jax.jit(quantize_blocks)(w_KN)
    with pytest.raises(ValueError, match=r'x is \(1, 128\) and a weight \(127, 64\): it must be \(128, N\)'):
        linear_fp8(x_MK, w_KN[1:])
    with pytest.raises(ValueError, match='a weight is int8, it must be float32 or bfloat16'):
        linear_fp8(x_MK, w_KN.astype(jnp.int8))
    with pytest.raises(ValueError, match='without a weight there must be a quantised one'):
        linear_fp8(x_MK, None)
    with pytest.raises(ValueError, match='at least one weight'):
        linears_fp8(x_MK, ())
    with pytest.raises(ValueError, match='1 weights and 2 quantised ones'):
        linears_fp8(x_MK, (w_KN,), (copy, copy))
    swapped = (Quantized(copy[1].values, copy[1].scales), Quantized(copy[0].values, copy[0].scales))
    with pytest.raises(ValueError, match=r'has shapes \(64, 128\) and \(128, 64\), it must have \(128, 64\)'):
        linear_fp8(x_MK, w_KN, swapped)
    with pytest.raises(ValueError, match='not empty'):
        linear_fp8(x_MK[:0], w_KN)
    if jax.default_backend() != 'gpu':
        with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
            linear_fp8(x_MK, w_KN, implementation='pallas')
