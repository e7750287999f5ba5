"""The block-scaled float8 product on Hopper: TMA, wgmma, float32 promotion of every 128 contracted values.

A persistent grid: each block of the grid (or cluster of two) walks over output tiles. One warpgroup copies operands
into a ring of shared-memory slots, running ahead across tiles; the others ("math" warpgroups) multiply, each of them one
or two waves of 64 rows:

              128 of K                   math warpgroup, per slot and wave
    lhs tile  [rows, 128]  --wgmma-->    partial (64, columns)     14-bit sums of the tensor core
    rhs tile  [columns, 128]             total += partial * scale  float32 registers

While one math warpgroup promotes its partial sums, another keeps the tensor cores busy; with one wave each, two of them
have registers enough for a second product in flight under the promotion of the first.

Two things differ between the uses. The right-hand scales: one for each block of 128x128 (weights) or one a column
(weight gradients). And the schedule, which says where tiles lie: over one matrix (`dense`), over the rows of groups that
have a right-hand matrix each (`row_groups`), or over groups of contracted values that have an output each (`depth_groups`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.implementation import hopper_cores
from pallas_kernels.tiles import COMPILER, output_chunk, swizzled

WGMMA = plgpu.Layout.WGMMA
WAVE = 64  # rows of one wgmma
# Registers a thread of the copying and of the math warpgroups: what is given up must cover what is taken.
REGISTERS = {1: (56, 232), 2: (56, 224), 3: (56, 152)}


class Place(NamedTuple):
    """Where a tile lies: its first row and column, its group, and which blocks of K make it."""

    row: Any
    column: Any
    group: Any
    first_block: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which tiles there are.

    Attributes:
      operands: int32 vectors in global memory that the functions read.
      number: tiles to walk over, clusters of them counted once.
      place: of the tile with this number, for this member of the cluster.
    """

    operands: tuple[Array, ...]
    number: Callable[..., Any]
    place: Callable[..., Place]


def dense(m: int, n: int, k: int, config: GemmConfig) -> Schedule:
    """All of one product."""
    tiles = pl.cdiv(m, config.rows * config.cluster_m), pl.cdiv(n, config.columns * config.cluster_n)

    def place(linear: Any, member: Any) -> Place:
        return Place(*_corner(linear, member, tiles, config), jnp.int32(0), jnp.int32(0), blocks(k))

    return Schedule((), lambda: tiles[0] * tiles[1], place)


def row_groups(row_T: Array, group_T: Array, count_1: Array, n: int, k: int, config: GemmConfig) -> Schedule:
    """Tile i of the rows begins at `row_T[i]` and multiplies the right-hand matrix `group_T[i]`; the first `count` count."""
    if config.cluster_m > 1:
        raise ValueError(f'{config=}: neighbouring tiles of rows belong to different groups and share nothing')
    columns = pl.cdiv(n, config.columns * config.cluster_n)

    def number(row_T: Any, group_T: Any, count_1: Any) -> Any:
        return count_1[0] * columns

    def place(linear: Any, member: Any, row_T: Any, group_T: Any, count_1: Any) -> Place:
        tile, column = plgpu.planar_snake(linear, (count_1[0], columns), config.minor, config.width)
        column = (column * config.cluster_n + member) * config.columns
        # Mosaic wants to know that tiles of 8 rows are not cut.
        return Place(pl.multiple_of(row_T[tile], WAVE), column, group_T[tile], jnp.int32(0), blocks(k))

    return Schedule((row_T, group_T, count_1), number, place)


def depth_groups(first_block_G: Array, blocks_G: Array, m: int, n: int, config: GemmConfig) -> Schedule:
    """Group g contracts `blocks_G[g]` blocks of K from `first_block_G[g]` on, and has an output of its own."""
    tiles = pl.cdiv(m, config.rows * config.cluster_m), pl.cdiv(n, config.columns * config.cluster_n)
    each = tiles[0] * tiles[1]

    def number(*_: Any) -> int:
        return first_block_G.shape[0] * each

    def place(linear: Any, member: Any, first_block_G: Any, blocks_G: Any) -> Place:
        group = lax.div(linear, jnp.int32(each))
        row, column = _corner(lax.rem(linear, jnp.int32(each)), member, tiles, config)
        return Place(row, column, group, first_block_G[group], blocks_G[group])

    return Schedule((first_block_G, blocks_G), number, place)


def _corner(linear: Any, member: Any, tiles: tuple[int, int], config: GemmConfig) -> tuple[Any, Any]:
    row, column = plgpu.planar_snake(linear, tiles, config.minor, config.width)
    if config.cluster_m > 1:
        row = row * config.cluster_m + member
    if config.cluster_n > 1:
        column = column * config.cluster_n + member
    return row * config.rows, column * config.columns


def product(
    lhs: Quantized,
    rhs: Quantized,
    out: jax.ShapeDtypeStruct | Array,
    schedule: Schedule,
    config: GemmConfig,
    *,
    name: str,
    interpret: Any = None,
) -> Array:
    """`lhs @ rhs.T` on the tiles of a schedule.

    Args:
      lhs: values (M, K), scales (k, Q) of 1x128 tiles.
      rhs: weights, values (G, N, K) and scales (G, n, k) of 128x128 blocks, or one matrix (N, K), scales (k, Q) of 1x128.
      out: what to make, (M, N) with weights and else (G, M, N) float32; an array instead is added to.
      name: of the kernel.
      interpret: `plgpu.InterpretGPUParams`, to run on a CPU.
    """
    (m, k), n = lhs.values.shape, rhs.values.shape[-2]
    if config.tile_scales:
        extra = -blocks(k) % 4  # copies are of whole 16 bytes
        rhs = rhs._replace(scales=jnp.pad(rhs.scales, ((0, 0), (0, 0), (0, extra))))
    adds = isinstance(out, jax.Array)
    body = _Product(config, m, n, k, jnp.dtype(out.dtype), rhs.values.ndim == 2, adds, schedule)
    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=body.scratch(),
        grid=((hopper_cores() or 132) // config.cluster,),
        grid_names=('block',),
        cluster=(config.cluster,),
        cluster_names=('cluster',),
        num_threads=config.warpgroups + 1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name=name,
        interpret=interpret,
    )
    operands = *schedule.operands, lhs.values, lhs.scales, rhs.values, rhs.scales
    if not adds:
        return kernel(out_type=out)(*operands)
    out_ref = jax.new_ref(out)
    kernel(out_type=())(*operands, out_ref)
    return jax.freeze(out_ref)


class _Smem(NamedTuple):
    """Shared memory. Scales of rows lie in slots of the ring, or with `tile_scales` in slots of tiles."""

    lhs: Any  # [stage, row, 128]
    rhs: Any  # [stage, column, 128]
    lhs_scales: Any  # [stage, row] or [tile, block, row]
    rhs_scales: Any  # of columns: [stage, column]; with `tile_scales`: [tile, block]
    out: Any  # [warpgroup, buffer, 64, chunk]
    full: Any  # of each slot: the first wave of rows is there, and all but rows
    later: Any  # of each slot and further wave: its rows are there
    empty: Any  # of each slot: all math warpgroups have read it
    scales_full: Any = None
    scales_empty: Any = None


@dataclasses.dataclass(frozen=True)
class _Product:
    """The kernel: called with its operands, its output and its scratch memory."""

    config: GemmConfig
    m: int
    n: int
    k: int
    out_dtype: jnp.dtype
    per_column: bool
    adds: bool
    schedule: Schedule

    @property
    def chunk(self) -> int:
        """Columns of one copy of results, and of one promotion."""
        return output_chunk(self.config.wg_columns, self.n, self.out_dtype)

    @property
    def chunks(self) -> range:
        return range(0, self.config.wg_columns, self.chunk)

    @property
    def out_buffers(self) -> int:
        # A tile's copies use every buffer equally often: the oldest copy is then that of the buffer to be used next.
        return math.gcd(self.config.out_buffers, len(self.chunks))

    @property
    def wave_rows(self) -> int:
        """Rows of one wave of all warpgroups."""
        return WAVE * self.config.wgs_m

    def scratch(self) -> list:
        """The fields of `_Smem`."""
        config, steps = self.config, blocks(self.k)
        slots = config.scale_slots(self.k)
        lhs_scales = (slots, steps, config.rows) if config.tile_scales else (config.stages, config.rows)
        # Targets of copies begin at multiples of 128 bytes.
        rhs_scales = (config.stages, round_up(config.columns, 32)) if self.per_column else (1, 32)
        if config.tile_scales:
            rhs_scales = slots, round_up(steps, 32)
        out = config.warpgroups, self.out_buffers, WAVE, self.chunk
        empty = plgpu.Barrier
        if config.cluster > 1:
            empty = functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',))
        scratch = [
            plgpu.SMEM((config.stages, config.rows, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            plgpu.SMEM((config.stages, config.columns, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            plgpu.SMEM(lhs_scales, jnp.float32),
            plgpu.SMEM(rhs_scales, jnp.float32),
            plgpu.SMEM(out, self.out_dtype, transforms=swizzled(self.chunk, self.out_dtype)),
            plgpu.Barrier(num_arrivals=2 + self.per_column + (not config.tile_scales), num_barriers=config.stages),
            plgpu.Barrier(num_barriers=config.stages * max(1, config.waves - 1)),
            empty(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ]
        if config.tile_scales:
            scratch.append(plgpu.Barrier(num_arrivals=2, num_barriers=slots))
            scratch.append(plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=slots))
        return scratch

    def __call__(self, *refs: Any) -> None:
        scalars, refs = refs[: len(self.schedule.operands)], refs[len(self.schedule.operands) :]
        (lhs, lhs_scales, rhs, rhs_scales, out), smem = refs[:5], _Smem(*refs[5:])
        warpgroup = lax.axis_index('warpgroup')
        producer = self.config.warpgroups

        @pl.when(warpgroup == producer)
        @jax.named_scope('produce')
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[producer][0], action='decrease')
            self.produce(scalars, lhs, lhs_scales, rhs, rhs_scales, smem)

        @pl.when(warpgroup < producer)
        @jax.named_scope('multiply')
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[producer][1], action='increase')
            self.consume(scalars, rhs_scales, out, smem, warpgroup)

    def for_each_tile(self, scalars: tuple, visit: Callable[[Place, Any], None]) -> Any:
        """Calls `visit(place, first)` for this block's tiles; `first` counts slots across tiles. Returns their number."""
        number, member = self.schedule.number(*scalars), lax.axis_index('cluster')

        @plgpu.nd_loop((number,), collective_axes='block', init_carry=jnp.int32(0))
        def total(info: Any, carry: Any) -> Any:
            place = self.schedule.place(info.index[0], member, *scalars)
            visit(place, carry)
            return carry + place.steps

        return total

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.config.stages))

    def scale_slot(self, first: Any) -> Any:
        """The slot for the scales of the tile whose first step this is."""
        return lax.rem(lax.div(first, jnp.int32(blocks(self.k))), jnp.int32(self.config.scale_slots(self.k)))

    def arrived(self, smem: _Smem, slot: Any, wave: int) -> Any:
        """The barrier of a wave's rows; with those of the first wave comes all else."""
        return smem.later.at[slot * (self.config.waves - 1) + wave - 1] if wave else smem.full.at[slot]

    def produce(self, scalars: tuple, lhs: Any, lhs_scales: Any, rhs: Any, rhs_scales: Any, smem: _Smem) -> None:
        """Copies operands into the ring."""
        config = self.config
        lhs_axis = 'cluster' if config.cluster_n > 1 else None
        rhs_axis = 'cluster' if config.cluster_m > 1 else None

        def copy_tile(place: Place, first: Any) -> None:
            rows, columns = pl.ds(place.row, config.rows), pl.ds(place.column, config.columns)
            weight = rhs if self.per_column else rhs.at[place.group]
            if config.tile_scales:
                slot = self.scale_slot(first)
                plgpu.barrier_wait(smem.scales_empty.at[slot])
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=smem.scales_full.at[slot])
                copy(lhs_scales.at[:, rows], smem.lhs_scales.at[slot])
                source = rhs_scales.at[place.group, lax.div(place.column, jnp.int32(BLOCK))]
                copy(source, smem.rhs_scales.at[slot, pl.ds(0, round_up(blocks(self.k), 4))])

            @pl.loop(0, place.steps)
            def _(step: Any) -> None:
                slot, block = self.slot(first + step), place.first_block + step
                contracted = pl.ds(block * BLOCK, BLOCK)
                plgpu.barrier_wait(smem.empty.at[slot])
                for wave in range(config.waves):
                    part = pl.ds(wave * self.wave_rows, self.wave_rows)
                    source, target = lhs.at[rows, contracted].at[part], smem.lhs.at[slot, part]
                    plgpu.copy_gmem_to_smem(source, target, self.arrived(smem, slot, wave), collective_axes=lhs_axis)
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=smem.full.at[slot])
                copy(weight.at[columns, contracted], smem.rhs.at[slot], collective_axes=rhs_axis)
                if not config.tile_scales:
                    copy(lhs_scales.at[block, rows], smem.lhs_scales.at[slot])
                if self.per_column:
                    copy(rhs_scales.at[block, columns], smem.rhs_scales.at[slot, pl.ds(0, config.columns)])

        total = self.for_each_tile(scalars, copy_tile)

        # No block of a cluster may leave while another still writes to its memory or its barriers.
        @pl.loop(0, config.stages)
        def _(index: Any) -> None:
            plgpu.barrier_wait(smem.empty.at[self.slot(total + index)])

        if config.tile_scales:

            @pl.loop(0, config.scale_slots(self.k))
            def _(index: Any) -> None:
                plgpu.barrier_wait(smem.scales_empty.at[self.scale_slot(total + index * blocks(self.k))])

    def consume(self, scalars: tuple, rhs_scales: Any, out: Any, smem: _Smem, warpgroup: Any) -> None:
        """Multiplies what lies in the ring, and stores the results."""
        config = self.config

        @pl.loop(0, config.stages)
        def _(slot: Any) -> None:
            plgpu.barrier_arrive(smem.empty.at[slot])

        if config.tile_scales:

            @pl.loop(0, config.scale_slots(self.k))
            def _(slot: Any) -> None:
                plgpu.barrier_arrive(smem.scales_empty.at[slot])

        def multiply_tile(place: Place, first: Any) -> None:
            if config.tile_scales:
                plgpu.barrier_wait(smem.scales_full.at[self.scale_slot(first)])
            totals = _Tile(self, place, first, rhs_scales, smem, warpgroup).totals()
            if config.tile_scales:
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem.scales_empty.at[self.scale_slot(first)])
            self.store(totals, place, out, smem, warpgroup)

        self.for_each_tile(scalars, multiply_tile)
        plgpu.wait_smem_to_gmem(0)

    def rows_of(self, warpgroup: Any, wave: int) -> Any:
        """The rows of a tile that a warpgroup multiplies in a wave."""
        return pl.ds(wave * self.wave_rows + lax.div(warpgroup, jnp.int32(self.config.wgs_n)) * WAVE, WAVE)

    def column_of(self, warpgroup: Any) -> Any:
        """The first column of a tile that is a warpgroup's."""
        return lax.rem(warpgroup, jnp.int32(self.config.wgs_n)) * self.config.wg_columns

    def store(self, totals: tuple, place: Place, out: Any, smem: _Smem, warpgroup: Any) -> None:
        """Copies a warpgroup's part of a tile to the output, in chunks of columns."""
        config = self.config
        target = out.at[place.group] if self.per_column else out
        target = target.at[pl.ds(place.row, config.rows)]
        for wave, (index, start) in itertools.product(range(config.waves), enumerate(self.chunks)):
            buffer = smem.out.at[warpgroup, index % self.out_buffers]
            plgpu.wait_smem_to_gmem(self.out_buffers - 1, wait_read_only=True)
            buffer[...] = totals[wave][index].astype(self.out_dtype)
            plgpu.commit_smem()
            columns = pl.ds(place.column + self.column_of(warpgroup) + start, self.chunk)
            plgpu.copy_smem_to_gmem(
                buffer, target.at[self.rows_of(warpgroup, wave), columns], reduction_op='add' if self.adds else None
            )


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile in the hands of one math warpgroup. `products` are triples: step, wave, scale of the weight's block."""

    kernel: _Product
    place: Place
    first: Any
    rhs_scales: Any
    smem: _Smem
    warpgroup: Any

    def totals(self) -> tuple:
        """The sums over K, for each wave a tuple of chunks (64, chunk) of float32."""
        config, steps = self.kernel.config, self.place.steps
        count = max(1, config.run // config.waves)  # steps of a round

        def add_round(index: Any, carry: tuple) -> tuple:
            scales, totals = carry
            ahead = self.weight_scales((index + 1) * count, count)  # early, so that no product waits for them
            return ahead, self.add_steps(index * count, scales, totals)

        zeros = plgpu.layout_cast(jnp.zeros((WAVE, self.kernel.chunk), jnp.float32), WGMMA)
        rounds, rest = (steps, 0) if count == 1 else divmod(steps, count)
        carry = self.weight_scales(jnp.int32(0), count), ((zeros,) * len(self.kernel.chunks),) * config.waves
        scales, totals = lax.fori_loop(0, rounds, add_round, carry)
        return self.add_steps(jnp.int32(rounds * count), scales[:rest], totals) if rest else totals

    def add_steps(self, start: Any, scales: tuple, totals: tuple) -> tuple:
        waves = range(self.kernel.config.waves)
        products = [(start + i, wave, scale) for i, scale in enumerate(scales) for wave in waves]
        for chain in itertools.batched(products, self.kernel.config.run):
            totals = self.multiply(chain, None, totals)
        return totals

    def multiply(self, products: Any, before: tuple | None, totals: tuple) -> tuple:
        """Makes these products; each is in flight while the one before it is promoted."""
        kernel, smem = self.kernel, self.smem
        (step, wave, weight_scale), *rest = products
        slot = kernel.slot(self.first + step)
        plgpu.barrier_wait(kernel.arrived(smem, slot, wave))

        def scope(partial_ref: Any) -> tuple:
            columns = pl.ds(kernel.column_of(self.warpgroup), kernel.config.wg_columns)
            lhs_tile, rhs_tile = smem.lhs.at[slot, kernel.rows_of(self.warpgroup, wave)], smem.rhs.at[slot, columns]
            plgpu.wgmma(partial_ref, lhs_tile, rhs_tile.T)
            product = step, wave, weight_scale, partial_ref
            new = self.promote(before, 1, totals) if before else totals
            return self.multiply(rest, product, new) if rest else self.promote(product, 0, new)

        return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((WAVE, kernel.config.wg_columns), jnp.float32))

    def promote(self, product: tuple, in_flight: int, totals: tuple) -> tuple:
        """Waits for a product's partial sums and adds them to the totals; the last wave's frees the slot."""
        kernel, config = self.kernel, self.kernel.config
        step, wave, weight_scale, partial_ref = product
        row_scales, column_scales = self.scales(step, wave, weight_scale)
        partial = plgpu.wgmma_accumulator_load(partial_ref, wait_n=in_flight)
        new = tuple(
            _promoted(total, partial[:, start : start + kernel.chunk], row_scales, scale)
            for start, total, scale in zip(kernel.chunks, totals[wave], column_scales, strict=True)
        )
        if wave == config.waves - 1:
            if not config.tile_scales:
                plgpu.commit_smem()  # between these reads of scales and the next copy to their place
            plgpu.barrier_arrive(self.smem.empty.at[kernel.slot(self.first + step)])
        return (*totals[:wave], new, *totals[wave + 1 :])

    def weight_scales(self, start: Any, count: int) -> tuple:
        """The scales of this warpgroup's columns at `count` steps, or at the last one past the end."""
        kernel, place = self.kernel, self.place
        if kernel.per_column or kernel.config.tile_scales:
            return (None,) * count
        block = lax.div(place.column + kernel.column_of(self.warpgroup), jnp.int32(BLOCK))
        block = lax.min(block, jnp.int32(blocks(kernel.n) - 1))
        steps = [lax.min(start + index, jnp.int32(blocks(kernel.k) - 1)) for index in range(count)]
        return tuple(self.rhs_scales[place.group, block, step] for step in steps)

    def scales(self, step: Any, wave: int, weight_scale: Any) -> tuple[Array, Any]:
        """The scales of a wave's rows, and for each chunk of columns a scalar or those of the columns."""
        kernel, smem = self.kernel, self.smem
        slot, tile_slot = kernel.slot(self.first + step), kernel.scale_slot(self.first)
        place = (tile_slot, step) if kernel.config.tile_scales else (slot,)
        rows = smem.lhs_scales.at[*place, kernel.rows_of(self.warpgroup, wave)]
        row_scales = plgpu.load(rows, layout=WGMMA.reduce(1))
        if not kernel.per_column:
            scale = smem.rhs_scales[tile_slot, step] if kernel.config.tile_scales else weight_scale
            return row_scales, [scale] * len(kernel.chunks)
        column = kernel.column_of(self.warpgroup)
        at = [smem.rhs_scales.at[slot, pl.ds(column + start, kernel.chunk)] for start in kernel.chunks]
        return row_scales, (plgpu.load(scales, layout=WGMMA.reduce(0)) for scales in at)


def _promoted(total: Array, partial: Array, row_scale: Array, column_scale: Array) -> Array:
    """`total + partial * row_scale * column_scale`; the column scale is a scalar or one a column."""
    if column_scale.ndim == 0:
        return total + partial * lax.broadcast_in_dim(row_scale * column_scale, partial.shape, [0])
    scaled = partial * lax.broadcast_in_dim(column_scale, partial.shape, [1])
    return total + scaled * lax.broadcast_in_dim(row_scale, partial.shape, [0])
