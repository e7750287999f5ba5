"""Recipes that lack a part: each changes what it says, and leaves ours as it was."""

import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import deepseek_jax as ds
import pallas_kernels as pk
from configs import loader
from pallas_kernels.expert_ffn_fp8 import api as expert_ffn
from pallas_kernels.fp8 import E4M3, Quantized, blocks, dequantize_blocks, dequantize_rows
from pallas_kernels.gemm_fp8 import kernel, sm90
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.groups import group_starts
from pallas_kernels.routes import routes
from tests.pallas_kernels.hopper import DEVICE
from train.loss import ObjectiveConfig
from train.step import batch_gradients

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = ROOT / 'benchmarks' / 'ablated_recipes.py'
SPEC = importlib.util.spec_from_file_location('ablated_recipes', FILE)
assert SPEC is not None
assert SPEC.loader is not None
recipes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(recipes)


def uneven(seed: int, shape: tuple[int, int]) -> jax.Array:
    """Rows of very different sizes."""
    x_MK = jax.random.normal(jax.random.key(seed), shape)
    return x_MK * 4.0 ** (jnp.arange(shape[0]) % 9)[:, None]


def one_scale(seed: int, rows: int, k: int) -> Quantized:
    """A matrix whose tiles of 1x128 have the same scale."""
    values = (jax.random.normal(jax.random.key(seed), (rows, k)) * 60).astype(E4M3)
    return Quantized(values, jnp.full((blocks(k), rows), 0.37, jnp.float32))


def test_per_tensor_is_one_scale_for_rows_columns_and_each_expert():
    x_MK = uneven(0, (200, 256))
    before = pk.quantize_rows(x_MK)
    with recipes.per_tensor():
        for x in (*pk.quantize_rows_and_columns(x_MK), *pk.quantize_blocks(x_MK)):
            assert len(np.unique(x.scales)) == 1
        experts = pk.quantize_blocks(jnp.stack([x_MK, 2 * x_MK]))[0].scales
        assert len(np.unique(experts)) == 2
    after = pk.quantize_rows(x_MK)
    assert len(np.unique(before.scales)) > 9
    np.testing.assert_array_equal(after.scales, before.scales)


def test_gradient_blocks_are_those_of_gradients_alone():
    x_MK, w_KN, d_MN = uneven(0, (256, 128)), jax.random.normal(jax.random.key(1), (128, 256)), uneven(2, (256, 256))

    def output_and_gradients() -> tuple:
        @jax.jit
        def traced(x_MK: jax.Array, w_KN: jax.Array, d_MN: jax.Array) -> tuple:
            y_MN, backward = jax.vjp(lambda x, w: pk.linear_fp8(x, w), x_MK, w_KN)
            return y_MN, *backward(d_MN)

        return traced(x_MK, w_KN, d_MN)

    ours = output_and_gradients()
    with recipes.gradient_blocks():
        ablated = output_and_gradients()
    np.testing.assert_array_equal(ablated[0], ours[0])
    # What the products of the backward pass should read: gradients in blocks, the input and the weight as ever.
    d_rounded_MN = dequantize_blocks(*pk.quantize_blocks(d_MN)[0])
    w_rounded_KN = dequantize_blocks(*pk.quantize_blocks(w_KN)[0])
    x_rounded_KM = dequantize_rows(pk.quantize_columns(x_MK))
    for found, wanted in zip(ablated[1:], (d_rounded_MN @ w_rounded_KN.T, x_rounded_KM @ d_rounded_MN), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))
    for found, before, again in zip(ablated[1:], ours[1:], output_and_gradients()[1:], strict=True):
        assert not np.array_equal(found, before)
        np.testing.assert_array_equal(again, before)


def test_one_scale_is_none_of_rows_without_an_expert(monkeypatch):
    """GPU kernels leave rows of none as the memory was; between experts' rows and after them."""
    exact = expert_ffn.grouped_gemm_fp8

    def leaving(x: Quantized, weights: Any, sizes_E: jax.Array, **options: Any) -> jax.Array:
        y_MN = exact(x, weights, sizes_E, **options)
        expert_of_M = jnp.full(len(y_MN), -1)
        for expert, start in enumerate(group_starts(sizes_E)):
            rows_M = jnp.arange(len(y_MN)) - start
            expert_of_M = jnp.where((rows_M >= 0) & (rows_M < sizes_E[expert]), expert, expert_of_M)
        return jnp.where(expert_of_M[:, None] < 0, jnp.nan, y_MN)

    def gradients() -> Any:
        layer = lambda x, gates, weights: pk.expert_ffn_fp8(x, gates, made, weights).sum()  # noqa: E731
        with recipes.per_tensor():
            return jax.jit(jax.grad(layer, argnums=(0, 1, 2)))(x_TD, gates_TK, weights)

    x_TD, gates_TK = uneven(0, (96, 128)), jnp.ones((96, 2))
    weights = tuple(jax.random.normal(jax.random.key(seed), (4, 128, 128)) for seed in range(3))
    made = routes(jax.random.randint(jax.random.key(4), (96, 2), 0, 6), 4)  # experts 4 and 5 are elsewhere
    wanted = gradients()
    monkeypatch.setattr(expert_ffn, 'grouped_gemm_fp8', leaving)
    jax.tree.map(np.testing.assert_array_equal, gradients(), wanted)


@pytest.mark.parametrize('name', recipes.ABLATIONS)
def test_a_training_step_is_traced_for_a_hopper_gpu(name):
    """Nothing on the way asks for a kernel that the recipe has none of."""
    loader.parse(ROOT / 'configs' / 'train' / 'small_h100.gin', [])
    model = dataclasses.replace(loader.call(ds.ModelConfig), num_layers=2)
    params = jax.eval_shape(functools.partial(ds.init, config=model), jax.random.key(0))
    tokens = jnp.zeros((1, 513), jnp.int32)
    batch = {'tokens': tokens, 'segments': tokens, 'weights': jnp.ones((1, 512))}

    def gradients(params):
        return batch_gradients(params, batch, 0.3, model, loader.call(ObjectiveConfig), None)[0]

    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
    with jax.sharding.use_abstract_mesh(mesh), recipes.ABLATIONS[name]():
        program = jax.make_jaxpr(gradients)(params)
    assert 'gemm' in str(program)


def test_unpromoted_products_are_the_same_up_to_their_sums(monkeypatch):
    """The interpreter sums in float32: the two differ on a GPU alone."""
    lhs, rhs = one_scale(0, 128, 256), one_scale(1, 64, 256)
    weight = rhs._replace(scales=jnp.full((1, 2), 0.37, jnp.float32))
    config = GemmConfig(wgs_m=1, wgs_n=1, wg_columns=64, waves=2, stages=2)
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    wanted_MN = dequantize_rows(lhs) @ dequantize_rows(rhs).T
    with recipes.unpromoted():
        product_MN = sm90.gemm_fp8(lhs, weight, jnp.float32, config, interpret)
        wgrad_MN = sm90.wgrad_fp8(lhs, rhs, None, config, interpret)
    for found_MN in (product_MN, wgrad_MN):
        np.testing.assert_allclose(found_MN, wanted_MN, rtol=1e-5, atol=1e-4 * float(jnp.abs(wanted_MN).max()))


def test_unpromoted_gradients_of_weights_that_share_a_product_are_the_same_up_to_their_sums(monkeypatch):
    """Weights of very different sizes, whose scales would be one in a sum that stays in the tensor cores."""
    config = GemmConfig(wgs_m=1, wgs_n=1, wg_columns=64, waves=2, stages=2)
    interpreted = lambda lhs, rhs, *, out_dtype, implementation: sm90.gemm_fp8(  # noqa: E731
        lhs, rhs, out_dtype, config, plgpu.InterpretGPUParams()
    )
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    x_MK, *down = (jax.random.normal(jax.random.key(seed), (128, 128)) for seed in range(3))
    gate_up = (down[0], 30 * down[1])

    def gradients() -> tuple:
        with recipes.per_tensor():
            linears = jax.grad(lambda x: sum(y.sum() for y in pk.linears_fp8(x, gate_up)))(x_MK)
            return linears, jax.grad(lambda x: pk.ffn_fp8(x, (*gate_up, down[0])).sum())(x_MK)

    wanted = gradients()
    for module in (recipes.linear, recipes.ffn):
        monkeypatch.setattr(module, 'gemm_fp8', interpreted)
    with recipes.unpromoted():
        found = gradients()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4 * float(jnp.abs(other).max()))


def test_no_promotion_asks_for_a_hopper_gpu():
    with pytest.raises(NotImplementedError, match='Hopper'), recipes.no_promotion():
        pass
