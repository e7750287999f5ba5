"""The block-scaled float8 product on Hopper: TMA, wgmma, float32 promotion of every 128 contracted values.

A persistent grid: each block of the grid (or cluster of two) walks over output tiles. One warpgroup copies operands
into a ring of shared-memory slots, running ahead across tiles; the others ("math" warpgroups, 64 rows each) multiply:

              128 of K                   math warpgroup, per slot
    lhs tile  [rows, 128]  --wgmma-->    partial (64, columns)     14-bit sums of the tensor core
    rhs tile  [columns, 128]             total += partial * scale  float32 registers

While one math warpgroup promotes its partial sums, another keeps the tensor cores busy; with two of them there are
registers enough for a second product in flight under the promotion of the first. In the right-hand scales lies the only
difference of the two forms: a scalar for each 128 columns (weights), or one scale a column (weight gradients).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks
from pallas_kernels.gemm_fp8 import tuned
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.implementation import hopper_cores

WGMMA = plgpu.Layout.WGMMA
WAVE = 64  # rows of one wgmma
# Registers a thread of the copying and of the math warpgroups: what is given up must cover what is taken.
REGISTERS = {1: (40, 232), 2: (40, 232), 3: (56, 152)}


def gemm_fp8(
    lhs: Quantized, rhs: Quantized, out_dtype: DTypeLike, config: GemmConfig | None = None, interpret=None
) -> Float[Array, 'M N']:
    """As the reference; K a multiple of 128, N of 64."""
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    config = config or tuned.gemm_config(m, n, k)
    # Shared memory is tiled by 8 rows, which tensor maps must divide evenly: an odd M is padded, copied and cut again.
    extra = -m % 8
    if extra:
        lhs = lhs._replace(values=jnp.pad(lhs.values, ((0, extra), (0, 0))))
    out_MN = _gemm(lhs, rhs, None, out_dtype, config, per_column=False, interpret=interpret)
    return out_MN[:m] if extra else out_MN


def wgrad_fp8(
    lhs: Quantized,
    rhs: Quantized,
    accumulator_MN: Array | None,
    config: GemmConfig | None = None,
    interpret=None,
) -> Float32[Array, 'M N']:
    """As the reference; K a multiple of 128, M and N of 64."""
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    config = config or tuned.wgrad_config(m, n, k)
    return _gemm(lhs, rhs, accumulator_MN, jnp.float32, config, per_column=True, interpret=interpret)


def _gemm(
    lhs: Quantized,
    rhs: Quantized,
    accumulator_MN: Array | None,
    out_dtype: DTypeLike,
    config: GemmConfig,
    per_column: bool,
    interpret,
) -> Array:
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    cores = hopper_cores() or 132
    rows, columns, cluster = config.rows, config.columns, config.cluster_m * config.cluster_n
    tiles = (pl.cdiv(m, rows * config.cluster_m), pl.cdiv(n, columns * config.cluster_n))
    steps, stages = blocks(k), config.stages
    producer = config.warpgroups
    chunk = math.gcd(128 // jnp.dtype(out_dtype).itemsize, config.wg_columns)  # columns of one output copy
    # A tile's copies use every buffer equally often: the oldest copy is then that of the buffer to be used next.
    buffers = math.gcd(config.out_buffers, config.wg_columns // chunk)
    group = math.gcd(chunk if per_column else BLOCK, config.wg_columns)  # columns promoted together
    groups = range(0, config.wg_columns, group)
    lhs_axis = 'cluster' if config.cluster_n > 1 else None
    rhs_axis = 'cluster' if config.cluster_m > 1 else None

    def body(lhs_gmem, lhs_scale_gmem, rhs_gmem, rhs_scale_gmem, out_gmem, *scratch):
        lhs_smem, rhs_smem, lhs_scale_smem, rhs_scale_smem, out_smem, full, empty = scratch
        warpgroup = lax.axis_index('warpgroup')
        member = lax.axis_index('cluster')

        def origin(linear):
            row, column = plgpu.planar_snake(linear, tiles, config.minor, config.width)
            if config.cluster_m > 1:
                row = row * config.cluster_m + member
            if config.cluster_n > 1:
                column = column * config.cluster_n + member
            return row * rows, column * columns

        def for_each_tile(visit):
            """Calls `visit(row, column, first)` for this block's tiles; `first` counts slots across tiles."""

            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes='block', init_carry=jnp.int32(0))
            def total(info, carry):
                visit(*origin(info.index[0]), carry)
                return carry + steps

            return total

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup == producer)
        @jax.named_scope('produce')
        def _():
            plgpu.set_max_registers(REGISTERS[config.warpgroups][0], action='decrease')

            def copy_tile(row, column, first):
                @pl.loop(0, steps)
                def _(block):
                    slot = slot_of(first + block)
                    at = pl.ds(block * BLOCK, BLOCK)
                    plgpu.barrier_wait(empty.at[slot])
                    copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
                    copy(lhs_gmem.at[pl.ds(row, rows), at], lhs_smem.at[slot], collective_axes=lhs_axis)
                    copy(rhs_gmem.at[pl.ds(column, columns), at], rhs_smem.at[slot], collective_axes=rhs_axis)
                    copy(lhs_scale_gmem.at[block, pl.ds(row, rows)], lhs_scale_smem.at[slot])
                    if per_column:
                        copy(rhs_scale_gmem.at[block, pl.ds(column, columns)], rhs_scale_smem.at[slot])

            total = for_each_tile(copy_tile)

            # No block of a cluster may leave while another still writes to its memory or its barriers.
            @pl.loop(0, stages)
            def _(index):
                plgpu.barrier_wait(empty.at[slot_of(total + index)])

        @pl.when(warpgroup < producer)
        @jax.named_scope('multiply')
        def _():
            plgpu.set_max_registers(REGISTERS[config.warpgroups][1], action='increase')
            wg_rows = pl.ds(lax.div(warpgroup, jnp.int32(config.wgs_n)) * WAVE, WAVE)
            wg_column = lax.rem(warpgroup, jnp.int32(config.wgs_n)) * config.wg_columns

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            def multiply_tile(row, column, first):
                def weight_scales(block):
                    """The scalars of this warpgroup's columns at one block of K."""
                    for start in groups:
                        index = lax.div(column + wg_column + start, jnp.int32(BLOCK))
                        yield rhs_scale_gmem[lax.min(index, jnp.int32(blocks(n) - 1)), block]

                def column_scales(slot):
                    for start in groups:
                        scales = rhs_scale_smem.at[slot, pl.ds(wg_column + start, group)]
                        yield plgpu.load(scales, layout=WGMMA.reduce(0))

                def promote(block, partial_ref, scalars, in_flight, totals):
                    """Waits for a block's partial sums, adds them to the totals and frees the slot."""
                    slot = slot_of(first + block)
                    row_scales = plgpu.load(lhs_scale_smem.at[slot, wg_rows], layout=WGMMA.reduce(1))
                    partial = plgpu.wgmma_accumulator_load(partial_ref, wait_n=in_flight)
                    scales = column_scales(slot) if per_column else scalars
                    new = tuple(
                        _promote(total, partial[:, start : start + group], row_scales, scale)
                        for start, total, scale in zip(groups, totals, scales, strict=True)
                    )
                    plgpu.commit_smem()  # between these reads of scales and the next copy to their place
                    plgpu.barrier_arrive(empty.at[slot])
                    return new

                def run(start, length, totals):
                    """Adds blocks `start .. start + length`; two products are in flight at any time."""

                    def link(index, before, totals):
                        block = start + index
                        slot = slot_of(first + block)
                        plgpu.barrier_wait(full.at[slot])

                        def scope(partial_ref):
                            rhs_tile = rhs_smem.at[slot, pl.ds(wg_column, config.wg_columns)]
                            plgpu.wgmma(partial_ref, lhs_smem.at[slot, wg_rows], rhs_tile.T)
                            scalars = () if per_column else tuple(weight_scales(block))
                            new = promote(block - 1, before[0], before[1], 1, totals) if before else totals
                            if index + 1 < length:
                                return link(index + 1, (partial_ref, scalars), new)
                            return promote(block, partial_ref, scalars, 0, new)

                        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((WAVE, config.wg_columns), jnp.float32))

                    return link(0, None, totals)

                zeros = plgpu.layout_cast(jnp.zeros((WAVE, group), jnp.float32), WGMMA)
                totals = (zeros,) * len(groups)
                runs, rest = divmod(steps, config.run)
                if runs:
                    totals = lax.fori_loop(0, runs, lambda i, totals: run(i * config.run, config.run, totals), totals)
                if rest:
                    totals = run(jnp.int32(runs * config.run), rest, totals)
                for index, start in enumerate(range(0, config.wg_columns, chunk)):
                    buffer = index % buffers
                    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    values = totals[start // group][:, start % group : start % group + chunk]
                    out_smem[warpgroup, buffer] = values.astype(out_dtype)
                    plgpu.commit_smem()
                    target = out_gmem.at[pl.ds(row, rows), pl.ds(column + wg_column + start, chunk)]
                    add = None if accumulator_MN is None else 'add'
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, buffer], target.at[wg_rows], reduction_op=add)

            for_each_tile(multiply_tile)
            plgpu.wait_smem_to_gmem(0)

    slot_barrier = (
        plgpu.Barrier if cluster == 1 else functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',))
    )
    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=[
            plgpu.SMEM((stages, rows, BLOCK), E4M3, transforms=_swizzled(BLOCK)),
            plgpu.SMEM((stages, columns, BLOCK), E4M3, transforms=_swizzled(BLOCK)),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.SMEM((stages, columns) if per_column else (1, 32), jnp.float32),
            plgpu.SMEM((config.warpgroups, buffers, WAVE, chunk), out_dtype, transforms=_swizzled(chunk, out_dtype)),
            plgpu.Barrier(num_arrivals=4 if per_column else 3, num_barriers=stages),
            slot_barrier(num_arrivals=config.warpgroups, num_barriers=stages),
        ],
        grid=(cores // cluster,),
        grid_names=('block',),
        cluster=(cluster,),
        cluster_names=('cluster',),
        num_threads=config.warpgroups + 1,
        thread_name='warpgroup',
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name='wgrad_fp8' if per_column else 'gemm_fp8',
        interpret=interpret,
    )
    operands = lhs.values, lhs.scales, rhs.values, rhs.scales
    if accumulator_MN is None:
        return kernel(out_type=jax.ShapeDtypeStruct((m, n), out_dtype))(*operands)
    out_ref = jax.new_ref(accumulator_MN)
    kernel(out_type=())(*operands, out_ref)
    return jax.freeze(out_ref)


def _promote(total: Array, partial: Array, row_scale: Array, column_scale: Array) -> Array:
    """`total + partial * row_scale * column_scale`; the column scale is a scalar or one a column."""
    if column_scale.ndim == 0:
        return total + partial * lax.broadcast_in_dim(row_scale * column_scale, partial.shape, [0])
    scaled = partial * lax.broadcast_in_dim(column_scale, partial.shape, [1])
    return total + scaled * lax.broadcast_in_dim(row_scale, partial.shape, [0])


def _swizzled(columns: int, dtype: DTypeLike = E4M3) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Shared-memory layout of a tile whose rows are `columns` wide: free of bank conflicts, as wgmma and TMA take it."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)  # pyright: ignore
