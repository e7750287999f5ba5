"""Gradients of the queries of attention, on Hopper.

As in `sm90_forward.py` a block of the grid takes 128 queries of one head and walks over their keys, with

    s = q k^T,  p = exp2(s - lse)        dp = d_out v^T
    ds = p (dp - delta)                   rounded to bfloat16, in registers
    dq = dq + ds k

Every sum has one owner and one order: two runs give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.flash_mla import parts, tuned
from pallas_kernels.flash_mla.parts import LOG2_E, PART, ROPE, ROWS, VALUE, WARPGROUPS, WG_ROWS, WGMMA
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight, key_ranges, padded
from pallas_kernels.implementation import traced_once
from pallas_kernels.tiles import COMPILER, accumulate, rows_of


@traced_once('scale', 'config', 'interpret')
def query_gradients(
    x: Inputs,
    sight: Sight | None,
    scale: float,
    lse_BHt: Float32[Array, 'B H _'],
    delta_BHt: Float32[Array, 'B H _'],
    d_out_BTHU: Float[Array, 'B T H U'],
    config: tuned.QueryConfig = tuned.QUERY,
    interpret: Any = None,
) -> tuple[Float[Array, 'B T H N'], Float[Array, 'B T H R']]:
    """The gradients of `q` and `q_rope`; log-sum-exp and delta are padded with zeros to a multiple of 128 queries."""
    B, T, H, _ = x.q_BTHN.shape
    S = x.k_BSHN.shape[1]
    keys, stages = config.keys, config.stages
    blocks = pl.cdiv(T, ROWS)

    def body(*refs: Any) -> None:
        inputs, sights, (d_q_gmem, d_q_rope_gmem), scratch = parts.split(refs, 8, 0 if sight is None else 3, 2)
        q_gmem, q_rope_gmem, k_gmem, k_rope_gmem, v_gmem, lse_gmem, delta_gmem, d_out_gmem = inputs
        q_smem, q_rope_smem, d_out_smem, lse_smem, delta_smem, q_full, *scratch = scratch
        ring, sight_scratch = parts.split(scratch, len(parts.KeyRing._fields))
        ring = parts.KeyRing(*ring)
        batch, head, warpgroup = (lax.axis_index(name) for name in ('batch', 'head', 'warpgroup'))
        block = blocks - 1 - lax.axis_index('block')
        walk = parts.walk_over_keys(sights[2] if sights else None, (batch, block), ROWS, keys, S)
        part_of = lambda ref, rows, width: parts.part(ref, batch, rows, head, width)  # noqa: E731

        @pl.when(warpgroup == WARPGROUPS)
        @jax.named_scope('copy')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[0], action='decrease')
            ring.copy(walk, (k_gmem, k_rope_gmem, v_gmem), batch, head)

        @pl.when(warpgroup < WARPGROUPS)
        @jax.named_scope('differentiate')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[1], action='increase')
            first = block * ROWS + warpgroup * WG_ROWS
            rows, shape = pl.ds(first, WG_ROWS), (WG_ROWS, keys)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=q_full.at[warpgroup])
            copy(part_of(q_gmem, rows, PART), q_smem.at[warpgroup])
            copy(part_of(q_rope_gmem, rows, ROPE), q_rope_smem.at[warpgroup])
            copy(part_of(d_out_gmem, rows, VALUE), d_out_smem.at[warpgroup])
            copy(lse_gmem.at[batch, head, rows], lse_smem.at[warpgroup])
            copy(delta_gmem.at[batch, head, rows], delta_smem.at[warpgroup])
            if sight is not None:
                for source, target in zip(sights[:2], sight_scratch, strict=True):
                    copy(source.at[batch, rows], target.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])
            of_row = lambda ref: plgpu.load(ref.at[warpgroup], layout=WGMMA.reduce(1))  # noqa: E731
            lse, delta = of_row(lse_smem) * LOG2_E, of_row(delta_smem)
            bounds = [of_row(ref) for ref in sight_scratch]

            def add(step: Any, key_block: Any, carry: tuple, masked: bool) -> tuple:
                d_q, d_q_rope = carry
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.k_full.at[slot])
                plgpu.barrier_wait(ring.v_full.at[slot])

                def weigh(scores_ref: Any, d_p_ref: Any) -> Array:
                    """`ds`; the exponentials are computed while `dp` is multiplied."""
                    plgpu.wgmma(scores_ref, q_smem.at[warpgroup], ring.k.at[slot].T)
                    plgpu.wgmma(scores_ref, q_rope_smem.at[warpgroup], ring.k_rope.at[slot].T)
                    plgpu.wgmma(d_p_ref, d_out_smem.at[warpgroup], ring.v.at[slot].T)
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                    p = jnp.exp2(scores * (scale * LOG2_E) - rows_of(lse, keys))
                    if masked:
                        p = jnp.where(parts.seen(shape, first, key_block * keys, bounds), p, 0.0)
                    d_p = plgpu.wgmma_accumulator_load(d_p_ref, wait_n=0)
                    return (p * (d_p - rows_of(delta, keys))).astype(ring.k.dtype)

                d_s = pl.run_scoped(weigh, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * 2)
                plgpu.barrier_arrive(ring.v_empty.at[slot])
                d_q = accumulate(d_q, d_s, ring.k.at[slot], interpret)
                d_q_rope = accumulate(d_q_rope, d_s, ring.k_rope.at[slot], interpret)
                plgpu.barrier_arrive(ring.k_empty.at[slot])
                return d_q, d_q_rope

            carry = parts.zeros(WG_ROWS, PART), parts.zeros(WG_ROWS, ROPE)
            d_q, d_q_rope = walk.run(add, carry)
            # Where the queries were.
            parts.store(d_q * scale, q_smem.at[warpgroup], part_of(d_q_gmem, rows, PART))
            parts.store(d_q_rope * scale, q_rope_smem.at[warpgroup], part_of(d_q_rope_gmem, rows, ROPE))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tile, ints, floats, dtype = parts.tile, parts.ints, parts.floats, jnp.bfloat16
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((B, T, H * width), dtype) for width in (PART, ROPE)),
        scratch_types=[
            tile(WARPGROUPS, WG_ROWS, PART),
            tile(WARPGROUPS, WG_ROWS, ROPE),
            tile(WARPGROUPS, WG_ROWS, VALUE),
            floats(WARPGROUPS, WG_ROWS),
            floats(WARPGROUPS, WG_ROWS),
            plgpu.Barrier(num_arrivals=5 if sight is None else 7, num_barriers=WARPGROUPS),
            *parts.KeyRing.scratch(stages, keys),
            *([] if sight is None else [ints(WARPGROUPS, WG_ROWS)] * 2),
        ],
        grid=(B, H, blocks),
        grid_names=('batch', 'head', 'block'),
        num_threads=WARPGROUPS + 1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name='flash_mla_dq',
        interpret=interpret,
    )
    operands = [*parts.flat(*x), lse_BHt, delta_BHt, *parts.flat(d_out_BTHU)]
    if sight is not None:
        operands += [*(padded(x, ROWS) for x in sight), key_ranges(sight, ROWS, keys, S)]
    d_q, d_q_rope = kernel(*operands)
    return d_q.reshape(B, T, H, PART), d_q_rope.reshape(B, T, H, ROPE)
