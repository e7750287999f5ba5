"""Routed experts in float8 against the same layer in float32.

`difference` is half the square of the relative error. An e4m3 operand errs by 0.026 in the mean square, a product of two
by 0.037, which is 7e-4; what depends on several products after another, by some times as much.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn_bf16.api import expert_ffn_bf16
from pallas_kernels.expert_ffn_fp8.api import expert_ffn_fp8, quantize_experts
from pallas_kernels.fp8 import E4M3
from pallas_kernels.routes import routes
from tests.pallas_kernels.hopper import DEVICE, calls_on_h100

# Kernels of the layer and its gradients, and how often each is called.
FP8_KERNELS = {
    'quantize_blocks': 2,
    'quantize_rows': 3,
    'requantize_columns': 2,
    'grouped_gemm_fp8': 4,
    'swiglu_quantize': 2,
    'swiglu_quantize_backward': 1,
    'grouped_wgrad_fp8': 3,
}
BF16_KERNELS = {'grouped_gemm_bf16': 4, 'grouped_wgrad_bf16': 3}
TOKENS, TOP_K, EXPERTS, D, F = 150, 2, 5, 256, 160


def difference(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 1 - 2 * np.sum(x * y) / (np.sum(x * x) + np.sum(y * y))


@functools.cache
def example():
    """Input, gates, choices (none of the last expert), masters and the output's gradient."""
    rng = np.random.default_rng(0)
    experts_TK = np.stack([rng.choice(EXPERTS - 1, TOP_K, replace=False) for _ in range(TOKENS)])
    x_TD = jnp.asarray(rng.standard_normal((TOKENS, D)), jnp.bfloat16)
    gates_TK = jnp.asarray(rng.uniform(0.1, 1, (TOKENS, TOP_K)), jnp.float32)
    shapes = [(EXPERTS, D, F), (EXPERTS, D, F), (EXPERTS, F, D)]
    weights = tuple(jnp.asarray(rng.standard_normal(shape) * shape[1] ** -0.5, jnp.float32) for shape in shapes)
    return x_TD, gates_TK, jnp.asarray(experts_TK), weights, jnp.asarray(rng.standard_normal((TOKENS, D)), jnp.bfloat16)


def plain(x_TD, gates_TK, experts_TK, weights):
    """The same layer in float32, every expert for every token."""
    w_gate, w_up, w_down = weights
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = x_TD.astype(jnp.float32)
    hidden = jax.nn.silu(dot('TD,EDF->TEF', x, w_gate)) * dot('TD,EDF->TEF', x, w_up)
    y_TED = dot('TEF,EFD->TED', hidden, w_down)
    chosen = jax.nn.one_hot(experts_TK, EXPERTS)
    return dot('TED,TKE,TK->TD', y_TED, chosen, gates_TK)


@functools.partial(jax.jit, static_argnames='layer')
def with_gradients(layer, x_TD, gates_TK, experts_TK, weights, d_TD, *copies):
    """Output and gradients of x, gates and weights. `layer` takes the choices, and what `copies` there are as the last."""
    out_TD, pull = jax.vjp(lambda x, g, w: layer(x, g, experts_TK, w, *copies), x_TD, gates_TK, weights)
    return out_TD, *pull(d_TD.astype(out_TD.dtype))


def float8(x_TD, gates_TK, experts_TK, weights, copies=None):
    return expert_ffn_fp8(x_TD, gates_TK, routes(experts_TK, EXPERTS), weights, copies)


def float8_of_powers_of_two(x_TD, gates_TK, experts_TK, weights):
    return expert_ffn_fp8(x_TD, gates_TK, routes(experts_TK, EXPERTS), weights, power_of_two=True)


@functools.cache
def results(layer):
    return with_gradients(layer, *example())


@functools.cache
def quantised_before():
    return jax.jit(quantize_experts)(*example()[3])


@pytest.mark.parametrize('layer', [float8, float8_of_powers_of_two])
def test_output_and_every_gradient_are_those_of_float32_to_the_precision_of_float8(layer):
    ours, theirs = results(layer), results(plain)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape
        assert 2e-4 < difference(x, y) < 6e-3, path
    assert [leaf.dtype for leaf in jax.tree.leaves(ours)] == [jnp.bfloat16] * 2 + [jnp.float32] * 4


def test_an_expert_without_tokens_has_gradients_of_zeros_and_no_other():
    for d_w in results(float8)[3]:
        used_E = np.any(np.asarray(d_w) != 0, axis=(1, 2))
        assert used_E.tolist() == [True] * (EXPERTS - 1) + [False]


def test_weights_quantised_before_give_the_same_bits():
    ours = with_gradients(float8, *example(), quantised_before())
    jax.tree.map(np.testing.assert_array_equal, ours, results(float8))


def test_without_masters_there_is_the_same_output_and_a_gradient_of_x():
    x_TD, gates_TK, experts_TK, _, d_TD = example()
    ours = with_gradients(float8, x_TD, gates_TK, experts_TK, None, d_TD, quantised_before())
    assert ours[3] is None
    jax.tree.map(np.testing.assert_array_equal, ours[:3], results(float8)[:3])


def test_backward_pass_keeps_float8_matrices_only():
    x_TD, gates_TK, experts_TK, weights, _ = example()
    made = jax.eval_shape(functools.partial(routes, num_experts=EXPERTS), experts_TK)

    def residuals(made, *args):
        return jax.vjp(lambda x, g, w: expert_ffn_fp8(x, g, made, w), *args)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, made, x_TD, gates_TK, weights))
    rows = made.token_M.shape[0]
    values = [leaf for leaf in kept if leaf.dtype == E4M3]
    # x once a token, gate_up by rows, the weights once.
    padded = 2 * 128
    assert sum(leaf.size for leaf in values) == TOKENS * D + rows * 2 * padded + EXPERTS * 3 * D * padded
    for leaf in kept:
        if leaf.dtype != E4M3:
            assert leaf.size <= 4 * rows + EXPERTS * 24, (leaf.dtype, leaf.shape)


def test_tokens_do_not_see_each_other():
    """A NaN in one token's input is in that token's output and in no other's."""
    x_TD, *rest = example()
    out_TD = with_gradients(float8, x_TD.at[7, 3].set(jnp.nan), *rest)[0]
    assert np.isnan(np.asarray(out_TD[7], np.float32)).all()
    clean_TD = results(float8)[0]
    np.testing.assert_array_equal(np.delete(out_TD, 7, 0), np.delete(clean_TD, 7, 0))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x, g, r, w: (x, g[:, :1], r, w), r'gates \(150, 1\) and routes are for \(150, 2\)'),
        (lambda x, g, r, w: (x, g, r, (w[0], w[1], w[2].swapaxes(1, 2))), r'w_down \(5, 256, 160\): they must be'),
        (lambda x, g, r, w: (x, g, r, tuple(v[:4] for v in w)), r'\(E, D\) = \(4, 256\), routes and x for \(5, 256\)'),
        (lambda x, g, r, w: (x, g, r, tuple(v.astype(jnp.float16) for v in w)), 'a weight is float16'),
        (lambda x, g, r, w: (x, g, r, None), 'without weights there must be quantised ones'),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    x_TD, gates_TK, experts_TK, weights, _ = example()
    with pytest.raises(ValueError, match=message):
        expert_ffn_fp8(*change(x_TD, gates_TK, routes(experts_TK, EXPERTS), weights))


@pytest.mark.parametrize(('layer', 'kernels'), [(expert_ffn_fp8, FP8_KERNELS), (expert_ffn_bf16, BF16_KERNELS)])
def test_on_hopper_every_product_is_a_kernel(layer, kernels):
    """The layer with its gradients, traced for an H100: no product of XLA, and no kernel is missing.

    That each kernel is also compiled is tested beside it.
    """
    rows = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    experts_TK, gates_TK = jax.ShapeDtypeStruct((512, 2), jnp.int32), jax.ShapeDtypeStruct((512, 2), jnp.float32)
    weights = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(4, 256, 128)] * 2 + [(4, 128, 256)])

    def step(x_TD, gates_TK, experts_TK, weights, d_TD):
        made = routes(experts_TK, 4)
        out_TD, pull = jax.vjp(lambda x, g, w: layer(x, g, made, w), x_TD, gates_TK, weights)
        return out_TD, pull(d_TD)

    called = calls_on_h100(step, rows, gates_TK, experts_TK, weights, rows)
    assert {name: count for name, count in called.items() if name.startswith('kernel ')} == {
        f'kernel {name}': count for name, count in kernels.items()
    }
    assert not [name for name in called if 'dot' in name]


def test_weights_of_all_experts_are_lowered_for_hopper():
    """Side by side and in stacks, which the kernel is not compiled for elsewhere."""
    shapes = [(4, 256, 128)] * 2 + [(4, 128, 256)]
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        text = jax.jit(quantize_experts).trace(*weights).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@mosaic_gpu_v2') == 2


GPU_CHOICES = {
    'random': lambda rng: np.stack([rng.choice(8, 3, replace=False) for _ in range(700)]),
    'few_experts': lambda rng: np.stack([rng.permutation([1, 4, 6]) for _ in range(700)]),
    'one_has_all': lambda rng: np.full((700, 1), 5),
    'one_token': lambda rng: np.array([[2, 7, 0]]),
}


@functools.cache
def gpu_step(implementation):
    def step(x_TD, gates_TK, experts_TK, weights, d_TD):
        made = routes(experts_TK, 8)
        layer = functools.partial(expert_ffn_fp8, implementation=implementation)
        out_TD, pull = jax.vjp(lambda x, g, w: layer(x, g, made, w), x_TD, gates_TK, weights)
        return out_TD, *pull(d_TD)

    return jax.jit(step)


def gpu_example(choice):
    rng = np.random.default_rng(0)
    experts_TK = jnp.asarray(GPU_CHOICES[choice](rng), jnp.int32)
    x_TD, d_TD = (jnp.asarray(rng.standard_normal((len(experts_TK), 512)), jnp.bfloat16) for _ in 'xd')
    shapes = [(8, 512, 384), (8, 512, 384), (8, 384, 512)]
    weights = tuple(jnp.asarray(rng.standard_normal(shape) * shape[1] ** -0.5, jnp.float32) for shape in shapes)
    return x_TD, jnp.asarray(rng.uniform(0.1, 1, experts_TK.shape), jnp.float32), experts_TK, weights, d_TD


@pytest.mark.gpu
@pytest.mark.parametrize('choice', GPU_CHOICES)
def test_gpu_layer_and_every_gradient_are_those_of_the_reference(choice):
    """What differs are values next to the middle of two float8 numbers, after sums in another order."""
    example = gpu_example(choice)
    ours, theirs, again = (gpu_step(name)(*example) for name in ('pallas', 'reference', 'pallas'))
    for (path, x), y, z in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), jax.tree.leaves(again), strict=True
    ):
        assert x.dtype == y.dtype
        assert difference(x, y) < 1e-4, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(z))
        if x.ndim == 3:  # experts without tokens
            np.testing.assert_array_equal(np.any(np.asarray(x), axis=(1, 2)), np.any(np.asarray(y), axis=(1, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_gpu_nonfinite_input_stays_in_its_token(bad):
    x_TD, *rest = gpu_example('random')
    dirty, clean = (gpu_step('pallas')(x, *rest) for x in (x_TD.at[7, 3].set(bad), x_TD))
    for ours, before in zip(dirty[:2], clean[:2], strict=True):  # output and the gradient of x
        assert np.isnan(np.asarray(ours[7], np.float32)).all()
        np.testing.assert_array_equal(np.delete(np.asarray(ours), 7, 0), np.delete(np.asarray(before), 7, 0))
