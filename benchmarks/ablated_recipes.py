"""Float8 recipes that lack a part of ours, to show what that part is for [DeepSeek-V3, 3.3.2 and appendix B.2].

  per_tensor       one scale a matrix (a matrix an expert), for tiles of 1x128 and blocks of 128x128
  no_promotion     one scale a matrix, and sums over all of K stay in the tensor cores, for a promotion to float32 of every 128
  gradient_blocks  gradients of activations in blocks of 128x128, for tiles of 1x128: one scale for 128 tokens

`python benchmarks/ablated_recipes.py NAME --config FILE.gin ...` is `python -m train` with the arguments that follow the
name, its recipe 'fp8' in that form. `benchmarks/loss_gap.py --recipes` takes the names, too.

Quantisation is XLA's here, from the specification in jax.numpy; products are those of the kernels. Scales that a part less would
have are written for every tile, all the same, so that nothing else changes.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn_fp8 import api as expert_ffn
from pallas_kernels.ffn_fp8 import api as ffn
from pallas_kernels.fp8 import BLOCK, Quantized
from pallas_kernels.gemm_fp8 import kernel
from pallas_kernels.groups import group_starts
from pallas_kernels.implementation import hopper_cores
from pallas_kernels.linear_fp8 import api as linear
from pallas_kernels.quantize_fp8 import api as quantize
from pallas_kernels.quantize_fp8 import reference
from pallas_kernels.swiglu_quantize import api as swiglu_quantize
from pallas_kernels.swiglu_quantize import reference as swiglu

DIFFERENTIATED = ((linear, '_linears'), (ffn, '_ffn'), (expert_ffn, '_ffn'))


@contextlib.contextmanager
def per_tensor() -> Iterator[None]:
    """One scale a matrix."""
    exact = reference.scale_and_multiplier

    def scale_and_multiplier(amax: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
        return exact(jnp.broadcast_to(jnp.max(amax), amax.shape), power_of_two)

    products = functools.partial(_zeros_elsewhere, expert_ffn.grouped_gemm_fp8)
    with (
        _by_the_specification(),
        mock.patch.object(reference, 'scale_and_multiplier', scale_and_multiplier),
        mock.patch.object(expert_ffn, 'grouped_gemm_fp8', products),
    ):
        yield


def _zeros_elsewhere(
    multiply: Callable[..., jax.Array], x: Any, weights: Any, sizes_E: jax.Array, **options: Any
) -> jax.Array:
    """Experts' products with zeros in the rows of none, which kernels leave as they are: a scale that all rows share would
    be that of whatever the memory held."""
    y_MN, starts_E = multiply(x, weights, sizes_E, **options), group_starts(sizes_E)
    row_M1 = jnp.arange(len(y_MN))[:, None]
    real_M1 = jnp.any((starts_E <= row_M1) & (row_M1 < starts_E + sizes_E), axis=1, keepdims=True)
    return jnp.where(real_M1, y_MN, 0)


@contextlib.contextmanager
def no_promotion() -> Iterator[None]:
    """As `per_tensor`, and a product's sums stay in the tensor cores' accumulators up to its end. Needs a Hopper GPU."""
    if hopper_cores() is None:
        raise NotImplementedError(
            f'no_promotion is a property of Hopper GPUs, this program is for {jax.default_backend()!r}'
        )
    with per_tensor(), unpromoted():
        yield


@contextlib.contextmanager
def unpromoted() -> Iterator[None]:
    """Products without promotion, of operands with one scale a matrix; matrices that lie side by side along K are products
    of their own."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(kernel, '_Tile', UnpromotedTile))
        for module in (linear, ffn):
            enter(mock.patch.object(module, 'join', functools.partial(_apart_along_k, module.join)))
            enter(mock.patch.object(module, 'gemm_fp8', functools.partial(_product_by_product, module.gemm_fp8)))
        enter(_fresh_traces())
        yield


class _Apart(NamedTuple):
    """Weights that stand side by side along K, each with a scale of its own."""

    parts: tuple[Quantized, ...]


def _apart_along_k(
    join: Callable[..., Quantized], parts: Sequence[Quantized], axis: int, whole: bool = False
) -> Quantized | _Apart:
    if axis == 0 or len(parts) == 1:
        return join(parts, axis, whole)
    return _Apart(tuple(join([part], axis, whole=True) for part in parts))


def _product_by_product(
    multiply: Callable[..., jax.Array], lhs: Quantized, rhs: Quantized | _Apart, *, out_dtype: Any, **options: Any
) -> jax.Array:
    if isinstance(rhs, Quantized):
        return multiply(lhs, rhs, out_dtype=out_dtype, **options)
    products, start = [], 0
    for part in rhs.parts:
        k = slice(start, start := start + part.values.shape[1])
        lhs_part = Quantized(lhs.values[:, k], lhs.scales[k.start // BLOCK : k.stop // BLOCK])
        products.append(multiply(lhs_part, part, out_dtype=jnp.float32, **options))
    return sum(products).astype(out_dtype)


@contextlib.contextmanager
def gradient_blocks() -> Iterator[None]:
    """One scale for 128 channels of 128 tokens of an activation's gradient.

    Where experts' gradients are quantised anew along tokens, that is done in tiles of 1x128, of what the blocks have left of
    them.
    """
    blocks, backward = _Flag(), _Flag()
    exact = reference.scale_and_multiplier

    def scale_and_multiplier(amax: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
        if blocks.on:
            rows, k = amax.shape
            tiles = amax.reshape(rows // BLOCK, BLOCK, k)
            amax = jnp.broadcast_to(tiles.max(axis=1, keepdims=True), tiles.shape).reshape(amax.shape)
        return exact(amax, power_of_two)

    def in_blocks(function: Callable) -> Callable:
        """A function that quantises gradients when it is called by a backward pass."""
        return lambda *args, **options: (
            blocks.during(function, *args, **options) if backward.on else function(*args, **options)
        )

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_by_the_specification())
        enter(mock.patch.object(reference, 'scale_and_multiplier', scale_and_multiplier))
        made = functools.partial(blocks.during, swiglu.swiglu_quantize_backward)
        enter(mock.patch.object(swiglu, 'swiglu_quantize_backward', made))
        for module, layer in DIFFERENTIATED:
            for name in ('quantize_rows', 'quantize_rows_and_columns'):
                if hasattr(module, name):
                    enter(mock.patch.object(module, name, in_blocks(getattr(module, name))))
            differentiated = getattr(module, layer)
            forward, exact_backward = differentiated.fwd, differentiated.bwd
            stack.callback(differentiated.defvjp, forward, exact_backward)
            differentiated.defvjp(forward, functools.partial(backward.during, exact_backward))
        yield


ABLATIONS = {'per_tensor': per_tensor, 'no_promotion': no_promotion, 'gradient_blocks': gradient_blocks}


class _Flag:
    """On while a function runs: while it is traced, that is."""

    def __init__(self) -> None:
        self.on = False

    def during(self, function: Callable, *args: Any, **options: Any) -> Any:
        before, self.on = self.on, True
        try:
            return function(*args, **options)
        finally:
            self.on = before


@contextlib.contextmanager
def _by_the_specification() -> Iterator[None]:
    """Everything is quantised by `reference.py`, on GPUs too."""
    with contextlib.ExitStack() as stack:
        for module in (quantize, swiglu_quantize):
            stack.enter_context(mock.patch.object(module, 'choose', return_value='reference'))
        stack.enter_context(_fresh_traces())
        yield


@contextlib.contextmanager
def _fresh_traces() -> Iterator[None]:
    """Nothing that was traced before or within is used on the other side."""
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()


class UnpromotedTile(kernel._Tile):
    """A tile whose sums over K are those of the tensor cores, times the scales of its last block of K."""

    def totals(self) -> tuple:
        tile, config, smem = self.kernel, self.kernel.config, self.smem
        (weight_scale,) = self.weight_scales(jnp.int32(0), 1)
        columns = pl.ds(tile.column_of(self.warpgroup), config.wg_columns)

        def scope(*sums: Any) -> tuple:
            def add(step: Any, _: Any) -> Any:
                slot = tile.slot(self.first + step)
                for wave, sum_ref in enumerate(sums):
                    plgpu.barrier_wait(tile.arrived(smem, slot, wave))
                    lhs_tile, rhs_tile = (
                        smem.lhs.at[slot, tile.rows_of(self.warpgroup, wave)],
                        smem.rhs.at[slot, columns],
                    )
                    plgpu.wgmma(sum_ref, lhs_tile, rhs_tile.T)
                plgpu.wgmma_wait(0)
                scale = self.scale(step, weight_scale)
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.empty.at[slot])
                return scale

            scale = lax.fori_loop(0, self.place.steps, add, jnp.float32(0))
            waves = [plgpu.wgmma_accumulator_load(sum_ref, wait_n=0) * scale for sum_ref in sums]
            return tuple(tuple(wave[:, start : start + tile.chunk] for start in tile.chunks) for wave in waves)

        accumulator = plgpu.WGMMAAccumulatorRef((kernel.WAVE, config.wg_columns), jnp.float32)
        return pl.run_scoped(scope, *(accumulator,) * config.waves)

    def scale(self, step: Any, weight_scale: Any) -> Any:
        """The scale of the tile's first row and first column, which is that of all."""
        tile, smem = self.kernel, self.smem
        slot = tile.slot(self.first + step)
        if tile.config.tile_scales:
            tile_slot = tile.scale_slot(self.first)
            return smem.lhs_scales[tile_slot, step, 0] * smem.rhs_scales[tile_slot, step]
        return smem.lhs_scales[slot, 0] * (smem.rhs_scales[slot, 0] if tile.per_column else weight_scale)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ABLATIONS:
        print(f'error: the first argument must be one of {", ".join(ABLATIONS)}', file=sys.stderr)
        return 2
    from train.__main__ import main as train

    name = sys.argv.pop(1)
    with ABLATIONS[name]():
        return train()


if __name__ == '__main__':
    sys.exit(main())
