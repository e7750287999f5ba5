"""The block-scaled float8 product on Hopper: TMA, wgmma, float32 promotion of every 128 contracted values.

A persistent grid: each block of the grid (or cluster of two) walks over output tiles. One warpgroup copies operands
into a ring of shared-memory slots, running ahead across tiles; the others ("math" warpgroups) multiply, each of them one
or two waves of 64 rows:

              128 of K                   math warpgroup, per slot and wave
    lhs tile  [rows, 128]  --wgmma-->    partial (64, columns)     14-bit sums of the tensor core
    rhs tile  [columns, 128]             total += partial * scale  float32 registers

While one math warpgroup promotes its partial sums, another keeps the tensor cores busy; with two of them there are
registers enough for a second product in flight under the promotion of the first. In the right-hand scales lies the only
difference of the two forms: a scalar for each 128 columns (weights), or one scale a column (weight gradients).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
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
    wave_size = WAVE * config.wgs_m
    rows, columns, cluster = config.rows, config.columns, config.cluster
    tiles = (pl.cdiv(m, rows * config.cluster_m), pl.cdiv(n, columns * config.cluster_n))
    steps, stages, waves = blocks(k), config.stages, config.waves
    producer = config.warpgroups
    chunk = math.gcd(128 // jnp.dtype(out_dtype).itemsize, config.wg_columns)
    chunks = range(0, config.wg_columns, chunk)  # columns of one copy of results, and promoted together
    # A tile's copies use every buffer equally often: the oldest copy is then that of the buffer to be used next.
    buffers = math.gcd(config.out_buffers, len(chunks))
    scale_slots = config.scale_slots(k)
    scale_width = round_up(steps, 4)  # copies are of whole 16 bytes
    if config.tile_scales:
        rhs_scales_shape = (scale_slots, round_up(steps, 32))
    else:
        rhs_scales_shape = (stages, round_up(columns, 32)) if per_column else (1, 32)  # slots of whole 128 bytes
    lhs_axis = 'cluster' if config.cluster_n > 1 else None
    rhs_axis = 'cluster' if config.cluster_m > 1 else None

    def body(lhs_gmem, lhs_scale_gmem, rhs_gmem, rhs_scale_gmem, out_gmem, *scratch):
        lhs_smem, rhs_smem, lhs_scale_smem, rhs_scale_smem, out_smem, full, later, empty, *scale_barriers = scratch
        scales_full, scales_empty = scale_barriers if config.tile_scales else (None, None)
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

        def arrived(slot, wave):
            """The barrier of a wave's rows; with those of the first wave comes all else."""
            return later.at[slot * (waves - 1) + wave - 1] if wave else full.at[slot]

        def scale_slot_of(first):
            return lax.rem(lax.div(first, jnp.int32(steps)), jnp.int32(scale_slots))

        @pl.when(warpgroup == producer)
        @jax.named_scope('produce')
        def _():
            plgpu.set_max_registers(REGISTERS[config.warpgroups][0], action='decrease')

            def copy_tile(row, column, first):
                if config.tile_scales:
                    slot = scale_slot_of(first)
                    plgpu.barrier_wait(scales_empty.at[slot])
                    copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=scales_full.at[slot])
                    copy(lhs_scale_gmem.at[:, pl.ds(row, rows)], lhs_scale_smem.at[slot])
                    weight_block = rhs_scale_gmem.at[lax.div(column, jnp.int32(BLOCK))]
                    copy(weight_block, rhs_scale_smem.at[slot, pl.ds(0, scale_width)])

                @pl.loop(0, steps)
                def _(block):
                    slot = slot_of(first + block)
                    at = pl.ds(block * BLOCK, BLOCK)
                    plgpu.barrier_wait(empty.at[slot])
                    copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
                    for wave in range(waves):
                        wave_rows = pl.ds(wave * wave_size, wave_size)
                        source, target = lhs_gmem.at[pl.ds(row, rows), at].at[wave_rows], lhs_smem.at[slot, wave_rows]
                        plgpu.copy_gmem_to_smem(source, target, arrived(slot, wave), collective_axes=lhs_axis)
                    copy(rhs_gmem.at[pl.ds(column, columns), at], rhs_smem.at[slot], collective_axes=rhs_axis)
                    if not config.tile_scales:
                        copy(lhs_scale_gmem.at[block, pl.ds(row, rows)], lhs_scale_smem.at[slot])
                    if per_column:
                        target = rhs_scale_smem.at[slot, pl.ds(0, columns)]
                        copy(rhs_scale_gmem.at[block, pl.ds(column, columns)], target)

            total = for_each_tile(copy_tile)

            # No block of a cluster may leave while another still writes to its memory or its barriers.
            @pl.loop(0, stages)
            def _(index):
                plgpu.barrier_wait(empty.at[slot_of(total + index)])

            if config.tile_scales:

                @pl.loop(0, scale_slots)
                def _(index):
                    plgpu.barrier_wait(scales_empty.at[scale_slot_of(total + index * steps)])

        @pl.when(warpgroup < producer)
        @jax.named_scope('multiply')
        def _():
            plgpu.set_max_registers(REGISTERS[config.warpgroups][1], action='increase')
            wg_row = lax.div(warpgroup, jnp.int32(config.wgs_n)) * WAVE
            wg_column = lax.rem(warpgroup, jnp.int32(config.wgs_n)) * config.wg_columns

            def rows_of(wave):
                return pl.ds(wave * wave_size + wg_row, WAVE)

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            if config.tile_scales:

                @pl.loop(0, scale_slots)
                def _(slot):
                    plgpu.barrier_arrive(scales_empty.at[slot])

            def multiply_tile(row, column, first):
                scale_slot = scale_slot_of(first)
                if config.tile_scales:
                    plgpu.barrier_wait(scales_full.at[scale_slot])

                def weight_scales(start, count):
                    """The scales of this warpgroup's columns at `count` blocks of K, or at the last one past the end."""
                    if per_column or config.tile_scales:
                        return (None,) * count
                    column_block = lax.min(lax.div(column + wg_column, jnp.int32(BLOCK)), jnp.int32(blocks(n) - 1))
                    at = [lax.min(start + index, jnp.int32(steps - 1)) for index in range(count)]
                    return tuple(rhs_scale_gmem[column_block, block] for block in at)

                def scales_of(block, wave, weight_scale):
                    """The scales of a wave's rows, and for each chunk of columns a scalar or those of the columns."""
                    slot = slot_of(first + block)
                    place = (scale_slot, block) if config.tile_scales else (slot,)
                    row_scales = plgpu.load(lhs_scale_smem.at[*place, rows_of(wave)], layout=WGMMA.reduce(1))
                    if not per_column:
                        scale = rhs_scale_smem[scale_slot, block] if config.tile_scales else weight_scale
                        return row_scales, [scale] * len(chunks)
                    at = [rhs_scale_smem.at[slot, pl.ds(wg_column + start, chunk)] for start in chunks]
                    return row_scales, (plgpu.load(scales, layout=WGMMA.reduce(0)) for scales in at)

                def promote(product, in_flight, totals):
                    """Waits for a product's partial sums and adds them to the totals; the last wave's frees the slot."""
                    block, wave, weight_scale, partial_ref = product
                    row_scales, column_scales = scales_of(block, wave, weight_scale)
                    partial = plgpu.wgmma_accumulator_load(partial_ref, wait_n=in_flight)
                    new = tuple(
                        _promote(total, partial[:, start : start + chunk], row_scales, scale)
                        for start, total, scale in zip(chunks, totals[wave], column_scales, strict=True)
                    )
                    if wave == waves - 1:
                        if not config.tile_scales:
                            plgpu.commit_smem()  # between these reads of scales and the next copy to their place
                        plgpu.barrier_arrive(empty.at[slot_of(first + block)])
                    return (*totals[:wave], new, *totals[wave + 1 :])

                def multiply(products, before, totals):
                    """Makes these products; each is in flight while the one before it is promoted."""
                    (block, wave, weight_scale), *rest = products
                    slot = slot_of(first + block)
                    plgpu.barrier_wait(arrived(slot, wave))

                    def scope(partial_ref):
                        rhs_tile = rhs_smem.at[slot, pl.ds(wg_column, config.wg_columns)]
                        plgpu.wgmma(partial_ref, lhs_smem.at[slot, rows_of(wave)], rhs_tile.T)
                        product = block, wave, weight_scale, partial_ref
                        new = promote(before, 1, totals) if before else totals
                        return multiply(rest, product, new) if rest else promote(product, 0, new)

                    return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((WAVE, config.wg_columns), jnp.float32))

                def add_blocks(start, scales, totals):
                    products = [(start + i, wave, scale) for i, scale in enumerate(scales) for wave in range(waves)]
                    for chain in itertools.batched(products, config.run):
                        totals = multiply(chain, None, totals)
                    return totals

                def add_round(index, carry):
                    scales, totals = carry
                    ahead = weight_scales((index + 1) * count, count)  # early, so that no product waits for them
                    return ahead, add_blocks(index * count, scales, totals)

                zeros = plgpu.layout_cast(jnp.zeros((WAVE, chunk), jnp.float32), WGMMA)
                count = max(1, config.run // waves)
                rounds, rest = divmod(steps, count)
                carry = weight_scales(jnp.int32(0), count), ((zeros,) * len(chunks),) * waves
                scales, totals = lax.fori_loop(0, rounds, add_round, carry)
                if rest:
                    totals = add_blocks(jnp.int32(rounds * count), scales[:rest], totals)
                if config.tile_scales:
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(scales_empty.at[scale_slot])
                for wave, start in itertools.product(range(waves), chunks):
                    buffer = start // chunk % buffers
                    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    out_smem[warpgroup, buffer] = totals[wave][start // chunk].astype(out_dtype)
                    plgpu.commit_smem()
                    target = out_gmem.at[pl.ds(row, rows), pl.ds(column + wg_column + start, chunk)]
                    add = None if accumulator_MN is None else 'add'
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, buffer], target.at[rows_of(wave)], reduction_op=add)

            for_each_tile(multiply_tile)
            plgpu.wait_smem_to_gmem(0)

    slot_barrier = (
        plgpu.Barrier if cluster == 1 else functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',))
    )
    scale_barriers = []
    if config.tile_scales:
        scale_barriers.append(plgpu.Barrier(num_arrivals=2, num_barriers=scale_slots))
        scale_barriers.append(plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=scale_slots))
        rhs = rhs._replace(scales=jnp.pad(rhs.scales, ((0, 0), (0, scale_width - steps))))
    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=[
            plgpu.SMEM((stages, rows, BLOCK), E4M3, transforms=_swizzled(BLOCK)),
            plgpu.SMEM((stages, columns, BLOCK), E4M3, transforms=_swizzled(BLOCK)),
            plgpu.SMEM((scale_slots, steps, rows) if config.tile_scales else (stages, rows), jnp.float32),
            plgpu.SMEM(rhs_scales_shape, jnp.float32),
            plgpu.SMEM((config.warpgroups, buffers, WAVE, chunk), out_dtype, transforms=_swizzled(chunk, out_dtype)),
            plgpu.Barrier(num_arrivals=2 + per_column + (not config.tile_scales), num_barriers=stages),
            plgpu.Barrier(num_barriers=stages * max(1, waves - 1)),
            slot_barrier(num_arrivals=config.warpgroups, num_barriers=stages),
            *scale_barriers,
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
