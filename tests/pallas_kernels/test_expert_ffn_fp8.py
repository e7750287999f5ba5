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
from tests.pallas_kernels.hopper import DEVICE

# Kernels of the layer and its gradients, and how often each is called.
FP8_KERNELS = {
    'quantize_blocks': 2,
    'quantize_rows': 3,
    'requantize_columns': 2,
    'grouped_gemm_fp8': 4,
    'swiglu_quantize': 1,
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


def plain(x_TD, gates_TK, weights):
    """The same layer in float32, every expert for every token."""
    w_gate, w_up, w_down = weights
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = x_TD.astype(jnp.float32)
    hidden = jax.nn.silu(dot('TD,EDF->TEF', x, w_gate)) * dot('TD,EDF->TEF', x, w_up)
    y_TED = dot('TEF,EFD->TED', hidden, w_down)
    chosen = jax.nn.one_hot(example()[2], EXPERTS)
    return dot('TED,TKE,TK->TD', y_TED, chosen, gates_TK)


@functools.cache
def results(power_of_two=False, quantised_before=False):
    """Output and gradients of x, gates and weights, in float8 and in float32."""
    x_TD, gates_TK, experts_TK, weights, d_TD = example()
    made = routes(experts_TK, EXPERTS)
    copies = quantize_experts(*weights, power_of_two=power_of_two) if quantised_before else None
    ours = lambda x, g, w: expert_ffn_fp8(x, g, made, w, copies, power_of_two=power_of_two)  # noqa: E731
    found = []
    for function, d in ((ours, d_TD), (plain, d_TD.astype(jnp.float32))):
        out, pull = jax.vjp(function, x_TD, gates_TK, weights)
        found.append((out, *jax.jit(pull)(d)))
    return found


@pytest.mark.parametrize('power_of_two', [False, True])
def test_output_and_every_gradient_are_those_of_float32_to_the_precision_of_float8(power_of_two):
    ours, theirs = results(power_of_two)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape
        assert 2e-4 < difference(x, y) < 6e-3, path
    assert [leaf.dtype for leaf in jax.tree.leaves(ours)] == [jnp.bfloat16] * 2 + [jnp.float32] * 4


def test_an_expert_without_tokens_has_gradients_of_zeros_and_no_other():
    for d_w in results()[0][3]:
        used_E = np.any(np.asarray(d_w) != 0, axis=(1, 2))
        assert used_E.tolist() == [True] * (EXPERTS - 1) + [False]


def test_weights_quantised_before_give_the_same_bits():
    for x, y in zip(jax.tree.leaves(results()[0]), jax.tree.leaves(results(quantised_before=True)[0]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_without_masters_there_is_the_same_output_and_a_gradient_of_x():
    x_TD, gates_TK, experts_TK, weights, d_TD = example()
    made, copies = routes(experts_TK, EXPERTS), quantize_experts(*weights)
    out_TD, pull = jax.vjp(lambda x, g: expert_ffn_fp8(x, g, made, None, copies), x_TD, gates_TK)
    np.testing.assert_array_equal(out_TD, results()[0][0])
    for x, y in zip(jax.jit(pull)(d_TD), results()[0][1:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_backward_pass_keeps_float8_matrices_only():
    x_TD, gates_TK, experts_TK, weights, _ = example()
    made = routes(experts_TK, EXPERTS)
    kept = jax.tree.leaves(
        jax.vjp(lambda *args: expert_ffn_fp8(args[0], args[1], made, args[2]), x_TD, gates_TK, weights)[1]
    )
    rows = made.token_M.shape[0]
    values = [leaf for leaf in kept if leaf.dtype == E4M3]
    # x once a token, gate_up and h by rows, the weights once.
    padded = 2 * 128
    assert sum(leaf.size for leaf in values) == TOKENS * D + rows * 3 * padded + EXPERTS * 3 * D * padded
    for leaf in kept:
        if leaf.dtype != E4M3:
            assert leaf.size <= 4 * rows + EXPERTS * 24, (leaf.dtype, leaf.shape)


def test_tokens_do_not_see_each_other():
    """A NaN in one token's input is in that token's output and in no other's."""
    x_TD, gates_TK, experts_TK, weights, _ = example()
    out_TD = expert_ffn_fp8(x_TD.at[7, 3].set(jnp.nan), gates_TK, routes(experts_TK, EXPERTS), weights)
    assert np.isnan(np.asarray(out_TD[7], np.float32)).all()
    clean_TD = results()[0][0]
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
    """The layer with its gradients, lowered for an H100: no product of XLA, and no kernel is missing."""
    rows = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    experts_TK, gates_TK = jax.ShapeDtypeStruct((512, 2), jnp.int32), jax.ShapeDtypeStruct((512, 2), jnp.float32)
    weights = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(4, 256, 128)] * 2 + [(4, 128, 256)])

    def step(x_TD, gates_TK, experts_TK, weights, d_TD):
        made = routes(experts_TK, 4)
        out_TD, pull = jax.vjp(lambda x, g, w: layer(x, g, made, w), x_TD, gates_TK, weights)
        return out_TD, pull(d_TD)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        traced = jax.jit(step).trace(rows, gates_TK, experts_TK, weights, rows)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert 'dot_general' not in text
    assert 'ragged_dot' not in text
    assert text.count('@mosaic_gpu_v2') == sum(kernels.values())


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
