"""A dense SwiGLU layer in float8 against the same layer in float32; `difference` and its sizes as in test_expert_ffn_fp8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ffn_fp8.api import ffn_fp8
from pallas_kernels.fp8 import E4M3
from pallas_kernels.linear_fp8.api import QuantizedWeight
from pallas_kernels.quantize_fp8.api import quantize_blocks
from tests.pallas_kernels.hopper import calls_on_h100
from tests.pallas_kernels.test_expert_ffn_fp8 import difference

ROWS, D, F = 150, 256, 160

# Kernels of the layer and its gradients, and how often each is called.
KERNELS = {
    'quantize_blocks': 3,
    'quantize_rows': 1,
    'quantize_rows_and_columns': 2,
    'gemm_fp8': 4,
    'swiglu_quantize': 2,
    'swiglu_quantize_backward': 1,
    'wgrad_fp8': 3,
}


def drawn(rows: int, width: int, inner: int):
    """Input, masters and the output's gradient."""
    rng = np.random.default_rng(0)
    x_MD, d_MD = (jnp.asarray(rng.standard_normal((rows, width)), jnp.bfloat16) for _ in 'xd')
    shapes = [(width, inner), (width, inner), (inner, width)]
    weights = tuple(jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5, jnp.float32) for shape in shapes)
    return x_MD, weights, d_MD


@functools.cache
def example():
    return drawn(ROWS, D, F)


def plain(x_MD, weights):
    """The same layer in float32."""
    w_gate, w_up, w_down = weights
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    x = x_MD.astype(jnp.float32)
    return dot(jax.nn.silu(dot(x, w_gate)) * dot(x, w_up), w_down)


@functools.partial(jax.jit, static_argnames='layer')
def with_gradients(layer, x_MD, weights, d_MD, *copies):
    out_MD, pull = jax.vjp(lambda x, w: layer(x, w, *copies), x_MD, weights)
    return out_MD, *pull(d_MD.astype(out_MD.dtype))


of_powers_of_two = functools.partial(ffn_fp8, power_of_two=True)


@functools.cache
def results(layer):
    return with_gradients(layer, *example())


@functools.cache
def quantised_before():
    return tuple(QuantizedWeight(*jax.jit(quantize_blocks)(w)) for w in example()[1])


@pytest.mark.parametrize('layer', [ffn_fp8, of_powers_of_two])
def test_output_and_every_gradient_are_those_of_float32_to_the_precision_of_float8(layer):
    ours, theirs = results(layer), results(plain)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape
        assert 2e-4 < difference(x, y) < 6e-3, path
    assert [leaf.dtype for leaf in jax.tree.leaves(ours)] == [jnp.bfloat16] * 2 + [jnp.float32] * 3


def test_output_is_the_same_without_a_gradient():
    x_MD, weights, _ = example()
    np.testing.assert_array_equal(jax.jit(ffn_fp8)(x_MD, weights), results(ffn_fp8)[0])


def test_weights_quantised_before_give_the_same_bits():
    ours = with_gradients(ffn_fp8, *example(), quantised_before())
    jax.tree.map(np.testing.assert_array_equal, ours, results(ffn_fp8))


def test_without_masters_there_is_the_same_output_and_a_gradient_of_x():
    x_MD, _, d_MD = example()
    out_MD, d_x_MD, none = with_gradients(ffn_fp8, x_MD, None, d_MD, quantised_before())
    assert none is None
    jax.tree.map(np.testing.assert_array_equal, (out_MD, d_x_MD), results(ffn_fp8)[:2])


def test_backward_pass_keeps_float8_matrices_only():
    x_MD, weights, _ = example()
    kept = jax.tree.leaves(jax.eval_shape(lambda x, w: jax.vjp(ffn_fp8, x, w)[1], x_MD, weights))
    values = sum(leaf.size for leaf in kept if leaf.dtype == E4M3)
    padded, rows = 2 * 128, 2 * 128
    assert values == rows * D + ROWS * 2 * padded + 3 * D * padded  # x by tokens, gate_up by rows, the weights
    assert sum(leaf.size for leaf in kept if leaf.dtype != E4M3) < values / 50


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x, w, c: (x[:, :128], w, c), r'x is \(150, 128\), w_gate \(256, 160\)'),
        (lambda x, w, c: (x, (w[0], w[1], w[2].T), c), r'w_down \(256, 160\): they must be \(M, D\)'),
        (lambda x, w, c: (x, tuple(v.astype(jnp.float16) for v in w), c), 'a weight is float16'),
        (lambda x, w, c: (x, w, c[::-1]), r'quantised weights have shapes \(\(160, 256\), \(256, 160\)'),
        (lambda x, w, c: (x, None, None), 'without weights there must be quantised ones'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    x_MD, weights, _ = example()
    with pytest.raises(ValueError, match=message):
        ffn_fp8(*change(x_MD, weights, quantised_before()))


def test_on_hopper_every_product_is_a_kernel():
    """The layer with its gradients, traced for an H100: no product of XLA, and no kernel is missing."""
    rows = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    weights = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(256, 128)] * 2 + [(128, 256)])

    def step(x_MD, weights, d_MD):
        out_MD, pull = jax.vjp(ffn_fp8, x_MD, weights)
        return out_MD, pull(d_MD)

    called = calls_on_h100(step, rows, weights, rows)
    assert {name: count for name, count in called.items() if name.startswith('kernel ')} == {
        f'kernel {name}': count for name, count in KERNELS.items()
    }
    assert not [name for name in called if 'dot' in name]


@functools.cache
def gpu_step(implementation):
    layer = functools.partial(ffn_fp8, implementation=implementation)
    return jax.jit(lambda *given: with_gradients(layer, *given))


@pytest.mark.gpu
@pytest.mark.parametrize(('rows', 'width', 'inner'), [(700, 512, 384), (1, 128, 64), (256, 1024, 448)])
def test_gpu_layer_and_every_gradient_are_those_of_the_reference(rows, width, inner):
    """What differs are values next to the middle of two float8 numbers, after sums in another order."""
    given = drawn(rows, width, inner)
    ours, theirs, again = (gpu_step(name)(*given) for name in ('pallas', 'reference', 'pallas'))
    for (path, x), y, z in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), jax.tree.leaves(again), strict=True
    ):
        assert x.dtype == y.dtype
        assert difference(x, y) < 1e-4, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(z))
