"""Quantisation on Hopper, in Mosaic GPU: one read of the input, one write of every result.

Thread blocks stay for the whole call, several to a multiprocessor. Each walks its tiles of the input in a ring: while
one is quantised, the copy engine fetches the next ones and stores the results of the last. A tile is some multiple of
64 rows and 128 columns, held as two chunks of 64 columns; a warpgroup works on 64x64 values at a time.

  input    [stage, chunk, row, 64]     bfloat16: swizzled rows of 128 bytes, read without conflicts, transposed too
  values   [output, chunk, row, 64]    float8: swizzled rows of 64 bytes

Rows and columns past the edge of the input arrive as zeros, and what lies past the edge of a matrix of values is not
written: the copy engine does both. It needs rows of whole 16 bytes, hence K in multiples of 64 (whole chunks). Stores of
one dimension, those of scales, it does not clip, hence scales of whole blocks of rows. Shared memory is tiled by rows:
the usual tiles of 8 rows would need M in multiples of 8.

The arithmetic is the reference's, bit for bit: both call the same functions on the same float32 values.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.implementation import hopper_cores, traced_once
from pallas_kernels.quantize_fp8 import tuned
from pallas_kernels.quantize_fp8.reference import (
    E5M6,
    e5m6_bytes,
    e5m6_round,
    e5m6_scale_and_multiplier,
    scale_and_multiplier,
)
from pallas_kernels.quantize_fp8.tuned import Operation, QuantizeConfig

CHUNK = 64
CHUNKS = BLOCK // CHUNK
_WGMMA = plgpu.Layout.WGMMA


def refusal(x_MK: Array) -> str | None:
    """Why the kernels do not serve this matrix (`quantize_blocks` has its own rule); None if they do."""
    if x_MK.dtype != jnp.bfloat16:
        return f'the input is {x_MK.dtype}, the kernel serves bfloat16'
    if x_MK.shape[1] % CHUNK:
        return f'the input has {x_MK.shape[1]} columns, the kernel serves multiples of {CHUNK}'
    return None


def blocks_refusal(*weights: Array) -> str | None:
    """Why `quantize_blocks` does not serve these matrices; None if it does."""
    for w_KN in weights:
        *stack, K, N = w_KN.shape
        if K % CHUNK or N % CHUNK:
            return f'the input has shape {w_KN.shape}, the kernel serves multiples of {CHUNK}'
        if stack and K % BLOCK:
            return f'the input has shape {w_KN.shape}, the kernel serves stacks of {BLOCK} rows or a multiple'
    return None


@traced_once('power_of_two', 'config', 'cores', 'interpret')
def quantize_rows(x_MK: Array, power_of_two: bool = False, **options: Any) -> Quantized:
    """As the reference. All kernels here take these options:

    config: how the work is cut; None takes the one in use, of `tuned.py`.
    cores: multiprocessors to fill; None takes those of the GPU that the call is compiled for.
    interpret: `plgpu.InterpretGPUParams`, to run on a CPU.
    """
    return Quantized(*_quantize('rows', x_MK, [functools.partial(_rows, power_of_two=power_of_two)], **options))


@traced_once('power_of_two', 'config', 'cores', 'interpret')
def quantize_columns(x_MK: Array, power_of_two: bool = False, **options: Any) -> Quantized:
    """As the reference; the options are those of `quantize_rows`."""
    return Quantized(*_quantize('columns', x_MK, [functools.partial(_columns, power_of_two=power_of_two)], **options))


@traced_once('power_of_two', 'config', 'cores', 'interpret')
def requantize_columns(
    x: Quantized, power_of_two: bool = False, config: QuantizeConfig | None = None, **options: Any
) -> Quantized:
    """As the reference; the further options are those of `quantize_rows`."""
    config = config or tuned.config('requantize')
    M, K = x.values.shape
    scales_kQ = real_scales(x.scales, M)
    rows_of = lambda row: pl.ds(row * config.rows, config.rows)  # noqa: E731
    scales = Input(scales_kQ, _struct((config.rows,), jnp.float32), lambda row, column: [((column, rows_of(row)), ())])
    one = _requantized(M, K, config, power_of_two)
    inputs = [matrix_input(x.values, config), scales]
    return Quantized(*walk('requantize_columns', (M, K), inputs, [one], config, **options))


@traced_once('power_of_two', 'config', 'cores', 'interpret')
def quantize_rows_and_columns(x_MK: Array, power_of_two: bool = False, **options: Any) -> tuple[Quantized, Quantized]:
    """As the reference; the options are those of `quantize_rows`."""
    passes = [functools.partial(one, power_of_two=power_of_two) for one in (_rows, _columns)]
    outs = _quantize('rows_and_columns', x_MK, passes, **options)
    return Quantized(*outs[:2]), Quantized(*outs[2:])


@traced_once('power_of_two', 'config', 'cores', 'interpret')
def quantize_blocks(
    *weights: Array, power_of_two: bool = False, config: QuantizeConfig | None = None, **options: Any
) -> tuple[Quantized, Quantized]:
    """As the reference, also of stacks (E, K, N) with K a multiple of 128.

    The further options are those of `quantize_rows`.
    """
    config = config or tuned.config('blocks')
    *stack, K, _ = weights[0].shape
    N = sum(w_KN.shape[-1] for w_KN in weights)
    groups = math.prod(stack)
    one = _blocks(groups, K, N, config, power_of_two)
    flat = [w_KN.reshape(groups * K, -1) for w_KN in weights]
    inputs = [dataclasses.replace(matrix_input(flat[0], config), right=tuple(flat[1:]))]
    values, values_t, scales, scales_t = walk('quantize_blocks', (groups * K, N), inputs, [one], config, **options)
    natural = Quantized(values.reshape(*stack, K, N), scales.reshape(*stack, blocks(K), blocks(N)))
    return natural, Quantized(values_t.reshape(*stack, N, K), scales_t.reshape(*stack, blocks(N), blocks(K)))


@traced_once('config', 'cores', 'interpret')
def quantize_e5m6(x_MK: Array, **options: Any) -> E5M6:
    """As the reference; the options are those of `quantize_rows`."""
    return E5M6(*_quantize('e5m6', x_MK, [_e5m6], **options))


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile in the hands of one warpgroup.

    Attributes:
      row, column: the tile's place, in tiles.
      step: how many tiles this thread block has done before.
      warpgroup: number of this warpgroup.
      parts: which 64 rows (or columns) of the tile are this warpgroup's, in units of 64.
    """

    row: Any
    column: Any
    step: Any
    warpgroup: Any
    parts: list


@dataclasses.dataclass(frozen=True)
class Input:
    """What a tile takes of an array.

    Attributes:
      array: in global memory.
      smem: shape and type of the tile's part in shared memory.
      boxes: called with the tile's row and column; returns pairs of indices, of a box of `array` and of its place in `smem`.
      right: matrices to the right of that one, each from a new tile on.
    """

    array: Array
    smem: jax.ShapeDtypeStruct
    boxes: Callable[[Any, Any], list[tuple[tuple, tuple]]]
    right: tuple[Array, ...] = ()

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.array, *self.right

    def load(self, row: Any, column: Any, arrays_gmem: list, smem: Any, barrier: Any) -> None:
        """Copies what the tile takes; the barrier counts its boxes."""

        def copy(array_gmem: Any, column: Any) -> None:
            for source, target in self.boxes(row, column):
                plgpu.copy_gmem_to_smem(array_gmem.at[source], smem.at[target], barrier)

        if not self.right:
            return copy(arrays_gmem[0], column)
        first = 0
        for array_gmem in arrays_gmem:
            end = first + blocks(array_gmem.shape[1])
            pl.when((column >= first) & (column < end))(functools.partial(copy, array_gmem, column - first))
            first = end


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is made of each tile.

    Attributes:
      outs: the results in global memory.
      smem: shapes and types of a tile of those that are stored asynchronously, in shared memory.
      run: called with the tile, its inputs, `outs`, the tile's shared memory and `scratch`; writes the shared memory, and
        returns pairs to be stored, of a part of shared memory and its place in global memory.
      scratch: further shared memory.
      stores_inputs: whether some of those parts are of the inputs' shared memory, which are then loaded later.
    """

    outs: list[jax.ShapeDtypeStruct]
    smem: list[jax.ShapeDtypeStruct]
    run: Callable[[Tile, list, list, list, list], list[tuple[Any, Any]]]
    scratch: list = dataclasses.field(default_factory=list)
    stores_inputs: bool = False


def _quantize(
    operation: Operation,
    x_MK: Array,
    makers: list[Callable[..., Pass]],
    config: QuantizeConfig | None = None,
    cores: int | None = None,
    interpret: Any = None,
) -> list[Array]:
    """Runs the passes that `makers` make for x and the configuration on every tile of x; returns all their results."""
    config = config or tuned.config(operation)
    passes = [maker(x_MK, config=config) for maker in makers]
    return walk(f'quantize_{operation}', x_MK.shape, [matrix_input(x_MK, config)], passes, config, cores, interpret)


def real_scales(scales_kQ: Array, M: int) -> Array:
    """Zeros for rows past M, whose scales mean nothing: their values are zeros, and zero times NaN would be NaN."""
    return jnp.where(jnp.arange(scales_kQ.shape[1]) < M, scales_kQ, 0) if M % BLOCK else scales_kQ


def matrix_input(x_MK: Array, config: QuantizeConfig, offsets: tuple[int, ...] = (0,)) -> Input:
    """Tiles of a matrix, cut into chunks: [chunk, row, 64]. If they come from several offsets in K, one after another."""

    def boxes(row: Any, column: Any) -> list[tuple[tuple, tuple]]:
        rows = pl.ds(row * config.rows, config.rows)
        starts = [offset + column * BLOCK + chunk * CHUNK for offset in offsets for chunk in range(CHUNKS)]
        return [((rows, pl.ds(start, CHUNK)), (index,)) for index, start in enumerate(starts)]

    return Input(x_MK, _struct((len(offsets) * CHUNKS, config.rows, CHUNK), x_MK.dtype), boxes)


def walk(
    name: str,
    shape: tuple[int, ...],
    inputs: list[Input],
    passes: list[Pass],
    config: QuantizeConfig,
    cores: int | None = None,
    interpret: Any = None,
    approx_math: bool = False,
) -> list[Array]:
    """Runs the passes on every tile of a matrix of that shape, in one kernel of that name; returns all their results."""
    cores = cores or hopper_cores()
    if cores is None:
        raise ValueError(f'{cores=}: the call is not compiled for a Hopper GPU, its multiprocessors must be given')
    if config.rows % (CHUNK * config.warpgroups) or BLOCK % config.rows:
        raise ValueError(
            f'{config=}: each warpgroup must have the same number of times {CHUNK} rows, and tiles must divide {BLOCK} rows'
        )
    M, K = shape
    tiles_across = blocks(K)
    # Tiles cover whole blocks of rows: the scales of the rows past M are written, too.
    tiles = round_up(M, BLOCK) // config.rows * tiles_across
    thread_blocks = min(tiles, cores * config.blocks)
    parts_each = config.rows // CHUNK // config.warpgroups
    outs = [out for one in passes for out in one.outs]
    copies = sum(len(one.boxes(0, 0)) for one in inputs)
    arrays = [one.arrays for one in inputs]

    def body(*refs: Any) -> None:
        rest = iter(refs)
        inputs_gmem = [[next(rest) for _ in each] for each in arrays]
        refs = tuple(rest)
        outs_gmem, (inputs_smem, outs_smem, scratch, loaded, released) = refs[: len(outs)], refs[len(outs) :]
        block = lax.axis_index('block')
        warpgroup = lax.axis_index('warpgroup')
        steps = lax.div(tiles - block + thread_blocks - 1, thread_blocks)

        def place(step: Any) -> tuple[Any, Any]:
            tile = block + step * thread_blocks
            return lax.div(tile, tiles_across), lax.rem(tile, tiles_across)

        def load(step: Any) -> None:
            row, column = place(step)
            slot = lax.rem(step, config.stages)
            for one, gmem, smem in zip(inputs, inputs_gmem, inputs_smem, strict=True):
                one.load(row, column, gmem, smem.at[slot], loaded.at[slot])

        with jax.named_scope('fill'):
            for step in range(config.stages):
                pl.when((warpgroup == 0) & (step < steps))(lambda step=step: load(jnp.int32(step)))

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            row, column = place(step)
            parts = [warpgroup * parts_each + part for part in range(parts_each)]
            tile = Tile(row, column, step, warpgroup, parts)
            slot, output = lax.rem(step, config.stages), lax.rem(step, config.outputs)
            with jax.named_scope('wait'):
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wait_smem_to_gmem(config.outputs - 1, wait_read_only=True)
            stores = []
            with jax.named_scope('quantize'):
                tile_smem = [smem.at[slot] for smem in inputs_smem]
                gmem, smem = iter(outs_gmem), iter(outs_smem)
                for one, one_scratch in zip(passes, scratch, strict=True):
                    one_gmem = [next(gmem) for _ in one.outs]
                    one_smem = [next(smem).at[output] for _ in one.smem]
                    stores += one.run(tile, tile_smem, one_gmem, one_smem, one_scratch)
            with jax.named_scope('store'):
                plgpu.commit_smem()
                for source, target in stores:
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)
                plgpu.commit_smem_to_gmem_group()
            with jax.named_scope('load'):

                @pl.when(step + config.stages < steps)
                def _() -> None:
                    if any(one.stores_inputs for one in passes):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    # The barrier in commit_smem shows that this warpgroup has read its input, this one that all have.
                    if config.warpgroups > 1:
                        plgpu.barrier_arrive(released)

                    @pl.when(warpgroup == 0)
                    def _() -> None:
                        if config.warpgroups > 1:
                            plgpu.barrier_wait(released)
                        load(step + config.stages)

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=outs,
        grid=(thread_blocks,),
        grid_names=('block',),
        num_threads=config.warpgroups,
        thread_name='warpgroup',
        scratch_types=[
            [shared((config.stages, *one.smem.shape), one.smem.dtype) for one in inputs],
            [shared((config.outputs, *tile.shape), tile.dtype) for one in passes for tile in one.smem],
            [one.scratch for one in passes],
            plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(
            # No reduction here crosses warps: the shared memory that Pallas sets aside for those is not needed.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            approx_math=approx_math,
        ),
        kernel_name=name,
        interpret=interpret,
    )(*itertools.chain(*arrays))


def _rows(x_MK: Array, *, config: QuantizeConfig, power_of_two: bool) -> Pass:
    """Values and scales in tiles of 1x128."""
    M, K = x_MK.shape

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        [x_smem] = inputs_smem
        values_gmem, scales_gmem = outs_gmem
        values_smem, scales_smem = outs_smem
        stores = []
        for part in tile.parts:
            rows, rows_gmem = pl.ds(part * CHUNK, CHUNK), pl.ds(tile.row * config.rows + part * CHUNK, CHUNK)
            x = [plgpu.load(x_smem.at[chunk, rows], layout=_WGMMA) for chunk in range(CHUNKS)]
            amax = jnp.max(jnp.maximum(*map(jnp.abs, x)), axis=1).astype(jnp.float32)
            scale, multiplier = scale_and_multiplier(amax, power_of_two)
            scales_smem[rows] = scale
            stores.append((scales_smem.at[rows], scales_gmem.at[tile.column, rows_gmem]))
            for chunk in range(CHUNKS):
                values_smem[chunk, rows] = _times(x[chunk], multiplier).astype(E4M3)
                if _is_stored(chunk, K):
                    columns_gmem = pl.ds(tile.column * BLOCK + chunk * CHUNK, CHUNK)
                    stores.append((values_smem.at[chunk, rows], values_gmem.at[rows_gmem, columns_gmem]))
        return stores

    return Pass(
        outs=[_struct((M, K), E4M3), _struct((blocks(K), round_up(M, BLOCK)), jnp.float32)],
        smem=[_struct((CHUNKS, config.rows, CHUNK), E4M3), _struct((config.rows,), jnp.float32)],
        run=run,
    )


def _columns(x_MK: Array, *, config: QuantizeConfig, power_of_two: bool) -> Pass:
    """Values and scales of the transpose in tiles of 1x128."""
    check_square(config)
    M, K = x_MK.shape

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        [x_smem] = inputs_smem
        values_gmem, scales_gmem = outs_gmem
        values_smem, scales_smem = outs_smem
        stores = []
        for part in tile.parts:
            channels, channels_gmem = pl.ds(part * CHUNK, CHUNK), pl.ds(tile.column * BLOCK + part * CHUNK, CHUNK)
            x = load_transposed(x_smem.at[part])
            amax = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)
            scale, multiplier = scale_and_multiplier(amax, power_of_two)
            scales_smem[channels] = scale
            values_smem[channels] = _times(x, multiplier).astype(E4M3)
            tokens_gmem = pl.ds(tile.row * BLOCK, BLOCK)
            stores.append((scales_smem.at[channels], scales_gmem.at[tile.row, channels_gmem]))
            stores.append((values_smem.at[channels], values_gmem.at[channels_gmem, tokens_gmem]))
        return stores

    return Pass(
        outs=[_struct((K, round_up(M, BLOCK)), E4M3), _struct((blocks(M), round_up(K, BLOCK)), jnp.float32)],
        smem=[_struct((BLOCK, BLOCK), E4M3), _struct((BLOCK,), jnp.float32)],
        run=run,
    )


def _requantized(M: int, K: int, config: QuantizeConfig, power_of_two: bool) -> Pass:
    """Values and scales of the transpose in tiles of 1x128, by way of bfloat16 in shared memory, which is transposed there."""
    check_square(config)
    at = lambda index: pl.ds(index * CHUNK, CHUNK)  # noqa: E731

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        x_smem, row_scales_smem = inputs_smem
        values_gmem, scales_gmem = outs_gmem
        values_smem, scales_smem = outs_smem
        wide_smem, written, read = scratch
        for part in tile.parts:
            row_scales = plgpu.load(row_scales_smem.at[at(part)], layout=_WGMMA.reduce(1))
            for chunk in range(CHUNKS):
                x = _times(plgpu.load(x_smem.at[chunk, at(part)], layout=_WGMMA), row_scales)
                wide_smem[chunk, at(part)] = x.astype(jnp.bfloat16)
        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)
        stores = []
        for part in tile.parts:
            channels_gmem = pl.ds(tile.column * BLOCK + part * CHUNK, CHUNK)
            x = load_transposed(wide_smem.at[part])
            scale, multiplier = scale_and_multiplier(jnp.max(jnp.abs(x), axis=1).astype(jnp.float32), power_of_two)
            scales_smem[at(part)] = scale
            values_smem[at(part)] = _times(x, multiplier).astype(E4M3)
            stores.append((scales_smem.at[at(part)], scales_gmem.at[tile.row, channels_gmem]))
            stores.append((values_smem.at[at(part)], values_gmem.at[channels_gmem, pl.ds(tile.row * BLOCK, BLOCK)]))
        plgpu.barrier_arrive(read)  # before the next tile is written there
        plgpu.barrier_wait(read)
        return stores

    return Pass(
        outs=[_struct((K, round_up(M, BLOCK)), E4M3), _struct((blocks(M), round_up(K, BLOCK)), jnp.float32)],
        smem=[_struct((BLOCK, BLOCK), E4M3), _struct((BLOCK,), jnp.float32)],
        run=run,
        scratch=[
            shared((CHUNKS, BLOCK, CHUNK), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=config.warpgroups),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
    )


def _blocks(groups: int, K: int, N: int, config: QuantizeConfig, power_of_two: bool) -> Pass:
    """Values and scales in blocks of 128x128, natural and transposed; each group of rows is transposed by itself."""
    check_square(config)

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        [w_smem] = inputs_smem
        values_gmem, values_t_gmem, scales_gmem, scales_t_gmem = outs_gmem
        values_smem, values_t_smem = outs_smem
        amax_smem, exchanged = scratch
        at = lambda index: pl.ds(index * CHUNK, CHUNK)  # noqa: E731
        group, row = lax.div(tile.row, blocks(K)), lax.rem(tile.row, blocks(K))

        w = [[plgpu.load(w_smem.at[chunk, at(part)], layout=_WGMMA) for chunk in range(CHUNKS)] for part in tile.parts]
        # Maxima of rows go through shared memory, in two sets: a warp may write the next tile's before another has read
        # this one's. Every warp then reads them all, and reduces them in registers.
        turn = lax.rem(tile.step, 2)
        largest = functools.reduce(jnp.maximum, [jnp.abs(chunk) for chunks in w for chunk in chunks])
        amax_smem[turn, at(tile.warpgroup)] = jnp.max(largest, axis=1).astype(jnp.float32)
        plgpu.barrier_arrive(exchanged)
        plgpu.barrier_wait(exchanged)
        amax = jnp.max(plgpu.load(amax_smem.at[turn], layout=_WGMMA.reduce(0)))
        # The bits of a scalar cannot be had, those of a vector can. Every warp holds all of this one.
        amax_8 = plgpu.layout_cast(lax.broadcast_in_dim(amax, (8,), ()), _WGMMA.reduce(0))
        scale, multiplier = map(jnp.max, scale_and_multiplier(amax_8, power_of_two))

        @pl.when(tile.warpgroup == 0)
        def _() -> None:
            scales_gmem[tile.row, tile.column] = scale
            scales_t_gmem[group, tile.column, row] = scale

        stores = []
        for part, chunks in zip(tile.parts, w, strict=True):
            for chunk in range(CHUNKS):
                values_smem[chunk, at(part)] = (chunks[chunk].astype(jnp.float32) * multiplier).astype(E4M3)
                if _is_stored(chunk, N):
                    target = values_gmem.at[at(tile.row * CHUNKS + part), at(tile.column * CHUNKS + chunk)]
                    stores.append((values_smem.at[chunk, at(part)], target))
        for part in tile.parts:
            for chunk in range(CHUNKS):
                transposed = load_transposed(w_smem.at[part, at(chunk)])
                values_t_smem[chunk, at(part)] = (transposed.astype(jnp.float32) * multiplier).astype(E4M3)
                if _is_stored(chunk, K):
                    target = values_t_gmem.at[group, at(tile.column * CHUNKS + part), at(row * CHUNKS + chunk)]
                    stores.append((values_t_smem.at[chunk, at(part)], target))
        return stores

    values_smem = _struct((CHUNKS, BLOCK, CHUNK), E4M3)
    return Pass(
        outs=[
            _struct((groups * K, N), E4M3),
            _struct((groups, N, K), E4M3),
            _struct((groups * blocks(K), blocks(N)), jnp.float32),
            _struct((groups, blocks(N), blocks(K)), jnp.float32),
        ],
        smem=[values_smem, values_smem],
        run=run,
        scratch=[
            plgpu.SMEM((2, CHUNK * config.warpgroups), jnp.float32),
            plgpu.Barrier(num_arrivals=config.warpgroups),
        ],
    )


def _e5m6(x_MK: Array, *, config: QuantizeConfig) -> Pass:
    """Two planes of bytes and scales in tiles of 1x128. The halves of a tile that share bytes are its chunks."""
    M, K = x_MK.shape

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        [x_smem] = inputs_smem
        high_gmem, low_gmem, scales_gmem = outs_gmem
        high_smem, low_smem, scales_smem = outs_smem
        stores = []
        for part in tile.parts:
            rows, rows_gmem = pl.ds(part * CHUNK, CHUNK), pl.ds(tile.row * config.rows + part * CHUNK, CHUNK)
            x = [plgpu.load(x_smem.at[chunk, rows], layout=_WGMMA) for chunk in range(CHUNKS)]
            amax = jnp.max(jnp.maximum(*map(jnp.abs, x)), axis=1).astype(jnp.float32)
            scale, multiplier = e5m6_scale_and_multiplier(amax)
            scales_smem[rows] = scale
            stores.append((scales_smem.at[rows], scales_gmem.at[tile.column, rows_gmem]))
            *high, low = e5m6_bytes(*(e5m6_round(_times(chunk, multiplier)) for chunk in x))
            for chunk in range(CHUNKS):
                high_smem[chunk, rows] = high[chunk]
                columns_gmem = pl.ds(tile.column * BLOCK + chunk * CHUNK, CHUNK)
                stores.append((high_smem.at[chunk, rows], high_gmem.at[rows_gmem, columns_gmem]))
            low_smem[rows] = low
            stores.append((low_smem.at[rows], low_gmem.at[rows_gmem, pl.ds(tile.column * CHUNK, CHUNK)]))
        return stores

    return Pass(
        outs=[
            _struct((M, K), jnp.uint8),
            _struct((M, K // 2), jnp.uint8),
            _struct((blocks(K), round_up(M, BLOCK)), jnp.float32),
        ],
        smem=[
            _struct((CHUNKS, config.rows, CHUNK), jnp.uint8),
            _struct((config.rows, CHUNK), jnp.uint8),
            _struct((config.rows,), jnp.float32),
        ],
        run=run,
    )


def _is_stored(chunk: int, columns: int) -> bool:
    """Whether to store a chunk of each tile; the copy engine leaves out what lies past the edge of the matrix.

    It does not for a matrix of one chunk. Mosaic takes away dimensions of size one, that of chunks among them, and then
    the second chunk is the first once more. (To have loaded that twice changes no maximum.)
    """
    return chunk == 0 or columns > CHUNK


def check_square(config: QuantizeConfig) -> None:
    if config.rows != BLOCK:
        raise ValueError(f'{config=}: tiles that are transposed have {BLOCK} rows')


def _times(x: Array, multiplier: Array) -> Array:
    """Each row in float32, times its multiplier."""
    return x.astype(jnp.float32) * lax.broadcast_in_dim(multiplier, x.shape, [0])


def load_transposed(x_smem: Any) -> Array:
    """The transpose of a part of shared memory of 64 columns, in registers."""
    # Neighbours in a row of the transpose lie in different rows of the memory. For 16 bits there is an instruction that
    # transposes on the way; 32 bits are read one by one, and their results are written one by one.
    pairs = jnp.dtype(x_smem.dtype).itemsize == 2
    return plgpu.load(x_smem.T, layout=_WGMMA if pairs else plgpu.Layout._WGMMA_ACC_32BIT)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory; matrices are cut into pieces of at most 128 bytes of a row, which are swizzled."""
    if len(shape) < 3:
        return plgpu.SMEM(shape, dtype)
    itemsize = jnp.dtype(dtype).itemsize
    columns = min(shape[-1], 128 // itemsize)
    tiling = plgpu.TilingTransform((1, columns))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(columns * itemsize)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
