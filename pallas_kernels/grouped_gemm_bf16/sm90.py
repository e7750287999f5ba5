"""Grouped bfloat16 products on Hopper: TMA, wgmma, sums in the accumulators of the tensor core.

A persistent grid: each block of the grid (or cluster of two) walks over output tiles, those of row tiles that hold rows
and no others. One warpgroup copies operands into a ring of shared-memory slots, running ahead across tiles; the others
("math" warpgroups) multiply, each of them 64 rows:

               64 contracted values                  math warpgroup, per slot
    lhs parts  one a warpgroup along rows            --wgmma-->   accumulator (64, columns), float32
    rhs parts  one a warpgroup along columns

The products differ in which tiles there are, where their operands lie and how many steps they take: `_Walk`. The
contracted dimension may be the minor or the major one of a part, wgmma reads bfloat16 either way.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.grouped_gemm_bf16 import tuned
from pallas_kernels.grouped_gemm_bf16.tuned import STEP, GroupedConfig
from pallas_kernels.groups import ALIGNMENT, Tiles, contiguous_tiles, group_starts, masked_tiles
from pallas_kernels.implementation import hopper_cores, traced_once
from pallas_kernels.tiles import COMPILER, output_chunk, swizzled

WG_ROWS = 64  # of one wgmma
# Registers a thread of the copying and of the math warpgroups: what is given up must cover what is taken.
REGISTERS = (40, 232)


class _Tile(NamedTuple):
    """One output tile.

    Attributes:
      expert: whose right-hand matrix it takes, or whose weight's gradient it is part of.
      row, column: its first ones.
      first: where the contracted dimension starts in the operands.
      steps: slots of 64 contracted values that it sums.
    """

    expert: Any
    row: Any
    column: Any
    first: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class _Walk:
    """What a block does; every function takes the schedule's refs or a tile and returns numbers or a slice.

    Attributes:
      tiles: of the whole product, over all clusters.
      tile: the tile of a number below that, for one member of a cluster.
      lhs, rhs: the part of an operand that a warpgroup with these rows or columns takes in one step.
      out: where columns of a warpgroup's rows go.
      lhs_major, rhs_major: the contracted dimension is the major one in the operand.
    """

    tiles: Callable[..., Any]
    tile: Callable[..., _Tile]
    lhs: Callable[..., Any]
    rhs: Callable[..., Any]
    out: Callable[..., Any]
    lhs_major: bool
    rhs_major: bool


@traced_once('transpose_rhs', 'out_dtype', 'config', 'interpret')
def grouped_gemm_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    rhs_EKN: BFloat16[Array, 'E _ _'],
    group_sizes_E: Int32[Array, ' E'],
    transpose_rhs: bool,
    out_dtype: DTypeLike,
    config: GroupedConfig | None = None,
    interpret=None,
) -> Float[Array, 'M N']:
    """As the reference, but for rows of no group; K and N multiples of 64, M of 128."""
    config = config or tuned.contiguous_config()
    tiles = contiguous_tiles(group_sizes_E, config.rows, lhs_MK.shape[0])
    return _gemm('grouped_gemm_bf16', lhs_MK, rhs_EKN, tiles, transpose_rhs, out_dtype, config, interpret)


@traced_once('transpose_rhs', 'out_dtype', 'config', 'interpret')
def masked_gemm_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    rhs_EKN: BFloat16[Array, 'E _ _'],
    counts_E: Int32[Array, ' E'],
    transpose_rhs: bool,
    out_dtype: DTypeLike,
    config: GroupedConfig | None = None,
    interpret=None,
) -> Float[Array, 'M N']:
    """As the reference, but for rows past a count; K and N multiples of 64, M/E a multiple of a tile's rows."""
    rows_each = lhs_MK.shape[0] // rhs_EKN.shape[0]
    config = config or tuned.masked_config(rows_each)
    tiles = masked_tiles(counts_E, rows_each, config.rows)
    return _gemm('masked_gemm_bf16', lhs_MK, rhs_EKN, tiles, transpose_rhs, out_dtype, config, interpret)


@traced_once('config', 'interpret')
def grouped_wgrad_bf16(
    lhs_MK: BFloat16[Array, 'M K'],
    d_out_MN: BFloat16[Array, 'M N'],
    group_sizes_E: Int32[Array, ' E'],
    accumulator_EKN: Float32[Array, 'E K N'] | None,
    config: GroupedConfig | None = None,
    interpret=None,
) -> Float32[Array, 'E K N']:
    """As the reference where padding rows are zeros; K and N multiples of 64."""
    config = config or tuned.wgrad_config()
    experts, (k, n) = group_sizes_E.shape[0], (lhs_MK.shape[1], d_out_MN.shape[1])
    grid = pl.cdiv(k, config.rows * config.cluster_m), pl.cdiv(n, config.columns * config.cluster_n)

    def tile(schedule, linear, member):
        starts_gmem, sizes_gmem = schedule
        expert = lax.div(linear, jnp.int32(math.prod(grid)))
        within = lax.rem(linear, jnp.int32(math.prod(grid)))
        row, column = plgpu.planar_snake(within, grid, config.minor, config.width)
        row = row * config.cluster_m + (member if config.cluster_m > 1 else 0)
        column = column * config.cluster_n + (member if config.cluster_n > 1 else 0)
        steps = lax.div(sizes_gmem[expert] + (STEP - 1), jnp.int32(STEP))
        first = pl.multiple_of(starts_gmem[expert], ALIGNMENT)
        return _Tile(expert, row * config.rows, column * config.columns, first, steps)

    def part(operand, tile, step, start, count):
        return operand.at[pl.ds(tile.first + step * STEP, STEP), pl.ds(start, count)]

    walk = _Walk(
        tiles=lambda schedule: experts * math.prod(grid),
        tile=tile,
        lhs=part,
        rhs=part,
        out=lambda out, tile, row, column, count: out.at[tile.expert, pl.ds(row, WG_ROWS), pl.ds(column, count)],
        lhs_major=True,
        rhs_major=True,
    )
    schedule = group_starts(group_sizes_E), group_sizes_E
    out = jax.ShapeDtypeStruct((experts, k, n), jnp.float32)
    return _run('grouped_wgrad_bf16', walk, schedule, lhs_MK, d_out_MN, out, accumulator_EKN, config, interpret)


def _gemm(
    name: str,
    lhs_MK: Array,
    rhs_EKN: Array,
    tiles: Tiles,
    transpose_rhs: bool,
    out_dtype: DTypeLike,
    config: GroupedConfig,
    interpret,
) -> Array:
    m, k = lhs_MK.shape
    n = rhs_EKN.shape[1 if transpose_rhs else 2]
    column_tiles = pl.cdiv(n, config.columns * config.cluster_n)

    def tile(schedule, linear, member):
        row_gmem, expert_gmem, count_gmem = schedule
        shape = count_gmem[0], column_tiles
        index, column = plgpu.planar_snake(linear, shape, config.minor, config.width)
        column = (column * config.cluster_n + member) * config.columns
        return _Tile(expert_gmem[index], pl.multiple_of(row_gmem[index], config.rows), column, 0, k // STEP)

    def rhs(rhs_gmem, tile, step, start, count):
        contracted, columns = pl.ds(step * STEP, STEP), pl.ds(start, count)
        return (
            rhs_gmem.at[tile.expert, columns, contracted]
            if transpose_rhs
            else rhs_gmem.at[tile.expert, contracted, columns]
        )

    walk = _Walk(
        tiles=lambda schedule: schedule[2][0] * column_tiles,
        tile=tile,
        lhs=lambda lhs, tile, step, start, count: lhs.at[pl.ds(start, count), pl.ds(step * STEP, STEP)],
        rhs=rhs,
        out=lambda out, tile, row, column, count: out.at[pl.ds(row, WG_ROWS), pl.ds(column, count)],
        lhs_major=False,
        rhs_major=not transpose_rhs,
    )
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return _run(name, walk, tuple(tiles), lhs_MK, rhs_EKN, out, None, config, interpret)


def _run(
    name: str,
    walk: _Walk,
    schedule: tuple[Array, ...],
    lhs: Array,
    rhs: Array,
    out: jax.ShapeDtypeStruct,
    accumulator: Array | None,
    config: GroupedConfig,
    interpret,
) -> Array:
    """Launches the walk; with an accumulator its tiles are added to it, and those without steps are left alone."""
    cores = hopper_cores() or 132
    stages, cluster, producer = config.stages, config.cluster, config.warpgroups
    chunk = output_chunk(config.wg_columns, out.shape[-1], out.dtype)
    chunks = range(0, config.wg_columns, chunk)  # columns of one copy of results
    # A tile's copies use every buffer equally often: the oldest copy is then that of the buffer to be used next.
    buffers = math.gcd(config.out_buffers, len(chunks))
    lhs_axis = 'cluster' if config.cluster_n > 1 else None
    rhs_axis = 'cluster' if config.cluster_m > 1 else None
    lhs_part = (WG_ROWS, STEP)  # either way round
    rhs_part = (STEP, config.wg_columns) if walk.rhs_major else (config.wg_columns, STEP)

    def body(*refs):
        schedule_gmem, (lhs_gmem, rhs_gmem, out_gmem, *scratch) = refs[: len(schedule)], refs[len(schedule) :]
        lhs_smem, rhs_smem, out_smem, full, empty = scratch
        warpgroup = lax.axis_index('warpgroup')
        member = lax.axis_index('cluster')

        def for_each_tile(visit):
            """Calls `visit(tile, used)` for this block's tiles; `used` counts slots across tiles, and is returned."""

            @plgpu.nd_loop((walk.tiles(schedule_gmem),), collective_axes='block', init_carry=jnp.int32(0))
            def total(info, carry):
                tile = walk.tile(schedule_gmem, info.index[0], member)
                visit(tile, carry)
                return carry + tile.steps

            return total

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup == producer)
        @jax.named_scope('produce')
        def _():
            plgpu.set_max_registers(REGISTERS[0], action='decrease')

            def copy_tile(tile, used):
                @pl.loop(0, tile.steps)
                def _(step):
                    slot = slot_of(used + step)
                    plgpu.barrier_wait(empty.at[slot])
                    copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[slot])
                    for i in range(config.wgs_m):
                        source = walk.lhs(lhs_gmem, tile, step, tile.row + i * WG_ROWS, WG_ROWS)
                        copy(source, lhs_smem.at[slot, i], collective_axes=lhs_axis)
                    for j in range(config.wgs_n):
                        source = walk.rhs(rhs_gmem, tile, step, tile.column + j * config.wg_columns, config.wg_columns)
                        copy(source, rhs_smem.at[slot, j], collective_axes=rhs_axis)

            total = for_each_tile(copy_tile)

            # No block of a cluster may leave while another still writes to its memory or its barriers.
            @pl.loop(0, stages)
            def _(index):
                plgpu.barrier_wait(empty.at[slot_of(total + index)])

        @pl.when(warpgroup < producer)
        @jax.named_scope('multiply')
        def _():
            plgpu.set_max_registers(REGISTERS[1], action='increase')
            i, j = lax.div(warpgroup, jnp.int32(config.wgs_n)), lax.rem(warpgroup, jnp.int32(config.wgs_n))

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            def multiply(tile, used):
                """The sums of a warpgroup's rows and columns; a slot is free when the product after it has started."""

                def scope(acc_ref):
                    @pl.loop(0, tile.steps)
                    def _(step):
                        slot = slot_of(used + step)
                        plgpu.barrier_wait(full.at[slot])
                        lhs_tile, rhs_tile = lhs_smem.at[slot, i], rhs_smem.at[slot, j]
                        _order_accumulators()  # pyright: ignore[reportCallIssue]
                        plgpu.wgmma(
                            acc_ref,
                            lhs_tile.T if walk.lhs_major else lhs_tile,
                            rhs_tile if walk.rhs_major else rhs_tile.T,
                        )
                        plgpu.wgmma_wait(1)

                        @pl.when(step > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(used + step - 1)])

                    return acc_ref[...]

                sums = pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((WG_ROWS, config.wg_columns), jnp.float32))

                @pl.when(tile.steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(used + tile.steps - 1)])

                return sums

            def multiply_tile(tile, used):
                sums = multiply(tile, used)
                row, column = tile.row + i * WG_ROWS, tile.column + j * config.wg_columns
                for number, start in enumerate(chunks):
                    buffer = number % buffers
                    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    out_smem[warpgroup, buffer] = sums[:, start : start + chunk].astype(out.dtype)
                    plgpu.commit_smem()
                    target = walk.out(out_gmem, tile, row, column + start, chunk)
                    add = None if accumulator is None else 'add'
                    plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, buffer], target, reduction_op=add)

            def visit(tile, used):
                if accumulator is None:
                    multiply_tile(tile, used)
                else:
                    pl.when(tile.steps > 0)(lambda: multiply_tile(tile, used))

            for_each_tile(visit)
            plgpu.wait_smem_to_gmem(0)

    slot_barrier = (
        plgpu.Barrier if cluster == 1 else functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',))
    )
    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=[
            plgpu.SMEM((stages, config.wgs_m, *lhs_part), jnp.bfloat16, transforms=swizzled(lhs_part[1], jnp.bfloat16)),
            plgpu.SMEM((stages, config.wgs_n, *rhs_part), jnp.bfloat16, transforms=swizzled(rhs_part[1], jnp.bfloat16)),
            plgpu.SMEM(
                (config.warpgroups, buffers, WG_ROWS, chunk),
                out.dtype,
                transforms=swizzled(chunk, out.dtype),
            ),
            plgpu.Barrier(num_arrivals=config.wgs_m + config.wgs_n, num_barriers=stages),
            slot_barrier(num_arrivals=config.warpgroups, num_barriers=stages),
        ],
        grid=(cores // cluster,),
        grid_names=('block',),
        cluster=(cluster,),
        cluster_names=('cluster',),
        num_threads=config.warpgroups + 1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name=name,
        interpret=interpret,
    )
    operands = *schedule, lhs, rhs
    if accumulator is None:
        return kernel(out_type=out)(*operands)
    out_ref = jax.new_ref(accumulator)
    kernel(out_type=())(*operands, out_ref)
    return jax.freeze(out_ref)


@plgpu.inline_mgpu()
def _order_accumulators(ctx):
    """Orders products of the loop's next round after those of the last one; otherwise ptxas adds it, with a remark.

    The fence is all that is left of an accumulator that nobody uses.
    """
    del ctx
    mosaic.WGMMAAccumulator.zero(WG_ROWS, 8)
