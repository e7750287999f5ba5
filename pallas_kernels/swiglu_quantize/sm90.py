"""SwiGLU and its gradients, quantised on Hopper, in Mosaic GPU: one read of the inputs, one write of every result.

Tiles are walked as in `quantize_fp8/sm90.py`. A tile of 128 columns of H takes the gate's columns, and the same columns of
up; what is quantised of it are one matrix (h) or two (d_gate and d_up), in one or two directions.

Values are computed once, in float32, and rounded to bfloat16. Rows are quantised from registers. For the transpose they
pass through shared memory, from where an instruction transposes them on the way back; their place is that of inputs which
have been read, so that they cost no room for tiles under way. Each warpgroup computes and quantises its own 64 rows, and
after a barrier the transpose of its own 64 columns.

The arithmetic is the reference's, but for the last bits of exponentials and quotients: those are the fast ones of the GPU, to
which a gate below -87 gives zeros.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.implementation import traced_once
from pallas_kernels.quantize_fp8.reference import scale_and_multiplier
from pallas_kernels.quantize_fp8.sm90 import (
    CHUNK,
    CHUNKS,
    Input,
    Pass,
    Tile,
    check_square,
    load_transposed,
    matrix_input,
    real_scales,
    walk,
)
from pallas_kernels.quantize_fp8.tuned import QuantizeConfig
from pallas_kernels.swiglu_quantize import tuned
from pallas_kernels.swiglu_quantize.reference import swiglu, swiglu_gradients

_WGMMA = plgpu.Layout.WGMMA

# Called with a tile's inputs in shared memory, the range of its rows, and the chunk of its columns; returns the float32
# matrices to be quantised, and the terms of further sums over H.
Compute = Callable[[list, Any, int], tuple[list[Array], list[Array]]]


def refusal(gate_up: Quantized | Array, *others: Array) -> str | None:
    """Why the kernels do not serve these inputs; None if they do."""
    values = gate_up.values if isinstance(gate_up, Quantized) else gate_up
    for x in others if isinstance(gate_up, Quantized) else (gate_up, *others):
        if x.dtype != jnp.bfloat16:
            return f'the input is {x.dtype}, the kernel serves bfloat16'
    if (H := values.shape[1] // 2) % BLOCK:
        return f'{H=}, the kernel serves multiples of {BLOCK}'
    return None


@traced_once('power_of_two', 'columns', 'config', 'cores', 'interpret')
def swiglu_quantize(
    gate_up_MG: Array,
    gate_weight_M: Array | None = None,
    power_of_two: bool = False,
    columns: bool = True,
    config: QuantizeConfig | None = None,
    **options: Any,
) -> tuple[Quantized, Quantized | None]:
    """As the reference. The further options are those of `quantize_fp8.sm90.quantize_rows`."""
    config = config or tuned.config('forward' if columns else 'forward_rows')
    M, H = gate_up_MG.shape[0], gate_up_MG.shape[1] // 2
    inputs = [matrix_input(gate_up_MG, config, (0, H)), *_weights(gate_weight_M, M, config)]

    def compute(inputs_smem: list, rows: Any, chunk: int) -> tuple[list[Array], list[Array]]:
        gate_up_smem, *weight_smem = inputs_smem
        gate, up = (_load(gate_up_smem.at[half * CHUNKS + chunk, rows]) for half in range(2))
        [weight] = _spread(weight_smem, rows, gate) or [None]
        return [swiglu(gate, up, weight)], []

    one = _quantize(M, H, 1, 0, compute, config, power_of_two, columns)
    outs = walk('swiglu_quantize', (M, H), inputs, [one], config, approx_math=True, **options)
    return Quantized(*outs[:2]), Quantized(*outs[2:]) if columns else None


@traced_once('power_of_two', 'columns', 'config', 'cores', 'interpret')
def swiglu_quantize_backward(
    gate_up: Quantized | Array,
    d_hidden_MH: Array,
    gate_weight_M: Array | None = None,
    power_of_two: bool = False,
    columns: bool = True,
    config: QuantizeConfig | None = None,
    **options: Any,
) -> tuple[Quantized, tuple[Quantized, Quantized] | None, Float32[Array, 'M'] | None]:
    """As the reference. The further options are those of `quantize_fp8.sm90.quantize_rows`."""
    M, H = d_hidden_MH.shape
    quantized = isinstance(gate_up, Quantized)
    if config is None and quantized:
        config = tuned.config('backward' if columns else 'backward_rows')
    elif config is None:
        config = tuned.config('backward_bf16' if columns else 'backward_bf16_rows')
    gate_up_MG = gate_up.values if quantized else gate_up
    inputs = [matrix_input(gate_up_MG, config, (0, H)), matrix_input(d_hidden_MH, config)]
    if quantized:
        inputs.append(_scales(gate_up.scales, M, config))
    inputs += _weights(gate_weight_M, M, config)

    def compute(inputs_smem: list, rows: Any, chunk: int) -> tuple[list[Array], list[Array]]:
        gate_up_smem, d_hidden_smem, *rest = inputs_smem
        d_hidden = _load(d_hidden_smem.at[chunk, rows])
        gate, up = (_load(gate_up_smem.at[half * CHUNKS + chunk, rows]) for half in range(2))
        if quantized:
            scales_smem, *rest = rest
            scales = [scales_smem.at[pl.ds(half * config.rows, config.rows)] for half in range(2)]
            gate, up = (x * scale for x, scale in zip((gate, up), _spread(scales, rows, d_hidden), strict=True))
        [weight] = _spread(rest, rows, d_hidden) or [None]
        d_gate, d_up, terms = swiglu_gradients(gate, up, d_hidden, weight)
        return [d_gate, d_up], [] if terms is None else [terms]

    sums = 0 if gate_weight_M is None else 1
    one = _quantize(M, H, 2, sums, compute, config, power_of_two, columns, in_place=quantized)
    outs = walk('swiglu_quantize_backward', (M, H), inputs, [one], config, approx_math=True, **options)
    both = (Quantized(*outs[2:4]), Quantized(*outs[4:6])) if columns else None
    return Quantized(*outs[:2]), both, jnp.sum(outs[-1], axis=0)[:M] if sums else None


def _weights(gate_weight_M: Array | None, M: int, config: QuantizeConfig) -> list[Input]:
    """The weights of a tile's rows; those of the rows past M are zeros."""
    if gate_weight_M is None:
        return []
    weight_Q = jnp.pad(gate_weight_M, (0, round_up(M, BLOCK) - M))
    boxes = lambda row, column: [((pl.ds(row * config.rows, config.rows),), ())]  # noqa: E731
    return [Input(weight_Q, _struct((config.rows,), jnp.float32), boxes)]


def _scales(scales_gQ: Array, M: int, config: QuantizeConfig) -> Input:
    """The scales of a tile's rows, first those of the gate, then those of up."""
    scales_gQ = real_scales(scales_gQ, M)
    h = scales_gQ.shape[0] // 2

    def boxes(row: Any, column: Any) -> list[tuple[tuple, tuple]]:
        rows_gmem = pl.ds(row * config.rows, config.rows)
        return [((half * h + column, rows_gmem), (pl.ds(half * config.rows, config.rows),)) for half in range(2)]

    return Input(scales_gQ, _struct((2 * config.rows,), jnp.float32), boxes)


def _load(x_smem: Any) -> Array:
    return plgpu.load(x_smem, layout=_WGMMA).astype(jnp.float32)


def _spread(vectors_smem: list, rows: Any, like: Array) -> list[Array]:
    """Numbers of the tile's rows, each as a matrix of the shape of `like`."""
    vectors = [plgpu.load(vector.at[rows], layout=_WGMMA.reduce(1)) for vector in vectors_smem]
    return [lax.broadcast_in_dim(vector, like.shape, [0]) for vector in vectors]


def _quantize(
    M: int,
    H: int,
    matrices: int,
    sums: int,
    compute: Compute,
    config: QuantizeConfig,
    power_of_two: bool,
    columns: bool,
    in_place: bool = False,
) -> Pass:
    """Computed matrices side by side in tiles of 1x128; with `columns` the transpose of each; sums over H.

    What is transposed takes the place of the gate's tile or, with `in_place`, where gate and up are float8, that of d_h; the
    values of the rows then take the place of gate and up.
    """
    h, Q = blocks(H), round_up(M, BLOCK)
    at = lambda index: pl.ds(index * CHUNK, CHUNK)  # noqa: E731

    def run(tile: Tile, inputs_smem: list, outs_gmem: list, outs_smem: list, scratch: list) -> list[tuple[Any, Any]]:
        gmem, smem, stores = iter(outs_gmem), iter(outs_smem), []
        staged, read = scratch
        values_smem = inputs_smem[0] if in_place else next(smem)
        values_gmem, scales_gmem, scales_smem = next(gmem), next(gmem), next(smem)
        transposed = [(next(gmem), next(gmem), next(smem), next(smem)) for _ in range(matrices if columns else 0)]
        sums_gmem, sums_smem = list(gmem), list(smem)
        staged_smem = inputs_smem[1] if in_place else inputs_smem[0].at[pl.ds(0, CHUNKS)]

        def meet(barrier: Any) -> None:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        for part in tile.parts:
            rows, rows_gmem = at(part), pl.ds(tile.row * config.rows + part * CHUNK, CHUNK)
            computed, partial_sums = [], []
            for chunk in range(CHUNKS):
                chunk_matrices, chunk_terms = compute(inputs_smem, rows, chunk)
                computed.append([x.astype(jnp.bfloat16) for x in chunk_matrices])
                if columns:
                    staged_smem[chunk, rows] = computed[chunk][0]
                partial_sums.append([jnp.sum(terms, axis=1) for terms in chunk_terms])
            for index in range(sums):
                sums_smem[index][rows] = partial_sums[0][index] + partial_sums[1][index]
                stores.append((sums_smem[index].at[rows], sums_gmem[index].at[tile.column, rows_gmem]))
            for matrix in range(matrices):
                chunks = [chunk_matrices[matrix] for chunk_matrices in computed]
                if columns and not matrix:  # read back, which takes fewer registers than to hold them
                    chunks = [plgpu.load(staged_smem.at[chunk, rows], layout=_WGMMA) for chunk in range(CHUNKS)]
                amax = jnp.max(jnp.maximum(*map(jnp.abs, chunks)), axis=1).astype(jnp.float32)
                scale, multiplier = scale_and_multiplier(amax, power_of_two)
                scales = pl.ds(matrix * config.rows + part * CHUNK, CHUNK)
                scales_smem[scales] = scale
                stores.append((scales_smem.at[scales], scales_gmem.at[matrix * h + tile.column, rows_gmem]))
                for chunk, x in enumerate(chunks):
                    source = values_smem.at[matrix * CHUNKS + chunk, rows]
                    columns_gmem = pl.ds(matrix * H + tile.column * BLOCK + chunk * CHUNK, CHUNK)
                    source[...] = _float8(x, multiplier)
                    stores.append((source, values_gmem.at[rows_gmem, columns_gmem]))
            for matrix, (values_t_gmem, scales_t_gmem, values_t_smem, scales_t_smem) in enumerate(transposed):
                if matrix:
                    meet(read)
                    for chunk in range(CHUNKS):
                        staged_smem[chunk, rows] = computed[chunk][matrix]
                meet(staged)
                x = load_transposed(staged_smem.at[part])
                scale, multiplier = scale_and_multiplier(jnp.max(jnp.abs(x), axis=1).astype(jnp.float32), power_of_two)
                channels, channels_gmem = at(part), pl.ds(tile.column * BLOCK + part * CHUNK, CHUNK)
                values_t_smem[channels], scales_t_smem[channels] = _float8(x, multiplier), scale
                target = values_t_gmem.at[channels_gmem, pl.ds(tile.row * BLOCK, BLOCK)]
                stores.append((values_t_smem.at[channels], target))
                stores.append((scales_t_smem.at[channels], scales_t_gmem.at[tile.row, channels_gmem]))
        return stores

    outs = [_struct((M, matrices * H), E4M3), _struct((matrices * h, Q), jnp.float32)]
    smem = [] if in_place else [_struct((matrices * CHUNKS, config.rows, CHUNK), E4M3)]
    smem += [_struct((matrices * config.rows,), jnp.float32)]
    if columns:
        check_square(config)
        if config.warpgroups != CHUNKS or config.outputs != 1:
            raise ValueError(
                f'{config=}: transposed tiles are shared by {CHUNKS} warpgroups, and wait for their stores'
            )
        outs += [_struct((H, Q), E4M3), _struct((blocks(M), H), jnp.float32)] * matrices
        smem += [_struct((BLOCK, BLOCK), E4M3), _struct((BLOCK,), jnp.float32)] * matrices
    return Pass(
        outs=outs + [_struct((h, Q), jnp.float32)] * sums,
        smem=smem + [_struct((config.rows,), jnp.float32)] * sums,
        run=run,
        scratch=[plgpu.Barrier(num_arrivals=CHUNKS), plgpu.Barrier(num_arrivals=CHUNKS)],
        stores_inputs=in_place,
    )


def _float8(x: Array, multiplier: Array) -> Array:
    """Each row times its multiplier."""
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(multiplier, x.shape, [0])).astype(E4M3)


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
