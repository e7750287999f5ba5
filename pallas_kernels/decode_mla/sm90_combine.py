"""Adds up the partial results of sequences that several blocks have worked on, in float32 and in the order of their pages."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.decode_mla.schedule import Schedule, place, share
from pallas_kernels.decode_mla.tuned import CombineConfig
from pallas_kernels.tiles import COMPILER

# Below all scores, but a number: the difference of two is no NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


def combine_parts(
    plan: Schedule,
    parts_ZML: Array,
    parts_lse_ZM: Array,
    out_BML: Array,
    lse_BM: Array,
    config: CombineConfig,
    interpret: Any,
) -> tuple[Array, Array]:
    """Output and log-sum-exp, with those of sequences in several parts, or in none, filled in."""
    (B, rows, _), blocks = out_BML.shape, parts_lse_ZM.shape[0] // 2
    height, width, ahead = dataclasses.astuple(config)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // 128)
    zeros = lambda dtype: plgpu.layout_cast(jnp.zeros((width,), dtype), layout)  # noqa: E731

    def body(starts, first, stop, lengths, parts, parts_lse, out, lse) -> None:
        sequence, first_row = lax.axis_index('sequence'), lax.axis_index('row') * height
        columns = pl.ds(lax.axis_index('column') * width, width)
        size = share(starts[lengths.shape[0]], blocks)
        start, pages = place(Schedule(starts, first, stop, lengths), sequence)
        first_block = lax.div(start, size)
        count = lax.div(start + pages - 1, size) - first_block + 1

        def write(row: Any, values: Array, value: Any) -> None:
            out[sequence, row, columns] = values

            @pl.when(lax.axis_index('column') == 0)
            def _() -> None:
                lse[sequence, row] = value

        @pl.when(pages == 0)
        def _() -> None:
            for i in range(height):
                write(first_row + i, zeros(jnp.bfloat16), jnp.float32(-jnp.inf))

        def add(step: Any, carry: tuple) -> tuple:
            indices = [step * ahead + i for i in range(ahead)]
            # A sequence's first part is its block's last one.
            numbers = [first_block + lax.min(index, count - 1) for index in indices]
            numbers = [number + jnp.where(number == first_block, blocks, 0) for number in numbers]
            return tuple(add_row(first_row + i, indices, numbers, *carry[i]) for i in range(height))

        def add_row(row: Any, indices: list, numbers: list, top: Any, total: Any, sums: Array) -> tuple:
            terms = [plgpu.load(parts.at[n, row, columns], layout=layout) for n in numbers]
            lses = [jnp.where(i < count, parts_lse[n, row], -jnp.inf) for i, n in zip(indices, numbers, strict=True)]
            new_top = functools.reduce(jnp.maximum, lses, top)
            shrink = jnp.exp2(top - new_top)
            total, sums = total * shrink, sums * shrink
            for x, term in zip(lses, terms, strict=True):
                weight = jnp.exp2(x - new_top)
                total, sums = total + weight, sums + weight * term.astype(jnp.float32)
            return new_top, total, sums

        @pl.when(count > 1)
        def _() -> None:
            nothing = jnp.float32(LOWEST), jnp.float32(0), zeros(jnp.float32)
            steps = lax.div(count + (ahead - 1), jnp.int32(ahead))
            for i, (top, total, sums) in enumerate(lax.fori_loop(0, steps, add, (nothing,) * height)):
                some = total > 0
                value = jnp.where(some, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
                write(first_row + i, (sums * jnp.where(some, 1 / total, 0.0)).astype(jnp.bfloat16), value)

    kernel = plgpu.kernel(
        body,
        out_type=(),
        grid=(out_BML.shape[2] // width, rows // height, B),
        grid_names=('column', 'row', 'sequence'),
        num_threads=1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name='decode_mla_combine',
        interpret=interpret,
    )
    # Not `jax.new_ref`: a layer's program must have no effects, or Flax's scan over layers refuses it.
    write_results = pl.run_state(lambda results: kernel(*plan, parts_ZML, parts_lse_ZM, *results))
    return write_results((out_BML, lse_BM))  # pyright: ignore[reportReturnType]
