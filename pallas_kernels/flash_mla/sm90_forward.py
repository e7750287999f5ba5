"""Attention of MLA on Hopper, forward: scores never leave the multiprocessor.

A block of the grid takes 128 queries of one head, 64 for each of two math warpgroups; a third warpgroup copies keys and
values into a ring of shared-memory slots. Per block of keys a warpgroup makes

    s = q k^T + q_rope k_rope^T      wgmma, two products into one accumulator
    p = exp2(s * scale * log2(e) - m)   m the largest score of the row so far; sums and output are scaled when it grows
    o = o + p v                      wgmma with p in registers

While one warpgroup computes exponentials the other one multiplies: they hand each other a barrier. Blocks with most keys
come first, so that the last ones to run are short.
"""

import functools
import math
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
from pallas_kernels.fp8 import round_up
from pallas_kernels.implementation import traced_once
from pallas_kernels.tiles import COMPILER, accumulate, rows_of


@traced_once('scale', 'config', 'interpret')
def attend(
    x: Inputs, sight: Sight | None, scale: float, config: tuned.ForwardConfig = tuned.FORWARD, interpret: Any = None
) -> tuple[Float[Array, 'B T H U'], Float32[Array, 'B H t']]:
    """Output and log-sum-exp, the latter for a multiple of 128 queries; T and S are multiples of 8.

    Without a sight, query t sees the keys up to t.
    """
    B, T, H, _ = x.q_BTHN.shape
    S, padded_T = x.k_BSHN.shape[1], round_up(T, ROWS)
    keys, stages = config.keys, config.stages
    blocks = padded_T // ROWS

    def body(*refs: Any) -> None:
        inputs, sights, (out_gmem, lse_gmem), scratch = parts.split(refs, 5, 0 if sight is None else 3, 2)
        q_gmem, q_rope_gmem, k_gmem, k_rope_gmem, v_gmem = inputs
        q_smem, q_rope_smem, lse_smem, q_full, turn, *scratch = scratch
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
        @jax.named_scope('attend')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[1], action='increase')
            first = block * ROWS + warpgroup * WG_ROWS
            rows, shape = pl.ds(first, WG_ROWS), (WG_ROWS, keys)

            def pass_turn() -> None:
                if config.take_turns:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=q_full.at[warpgroup])
            copy(part_of(q_gmem, rows, PART), q_smem.at[warpgroup])
            copy(part_of(q_rope_gmem, rows, ROPE), q_rope_smem.at[warpgroup])
            if sight is not None:
                for source, target in zip(sights[:2], sight_scratch, strict=True):
                    copy(source.at[batch, rows], target.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def add(step: Any, key_block: Any, carry: tuple, masked: bool) -> tuple:
                out, largest, total = carry
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.k_full.at[slot])
                scores = parts.product(
                    (q_smem.at[warpgroup], ring.k.at[slot].T),
                    (q_rope_smem.at[warpgroup], ring.k_rope.at[slot].T),
                    between=pass_turn,
                )
                if masked:
                    bounds = [plgpu.load(ref.at[warpgroup], layout=WGMMA.reduce(1)) for ref in sight_scratch]
                    scores = jnp.where(parts.seen(shape, first, key_block * keys, bounds), scores, -jnp.inf)
                plgpu.barrier_arrive(ring.k_empty.at[slot])
                new_largest = lax.max(largest, scores.max(axis=1) * (scale * LOG2_E))
                shift = new_largest
                if masked and sight is not None:  # a row may have seen nothing yet
                    shift = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
                factor = jnp.exp2(largest - shift)
                weights = jnp.exp2(scores * (scale * LOG2_E) - rows_of(shift, keys))
                rounded = weights.astype(ring.v.dtype)
                total = total * factor + weights.sum(axis=1)
                out = out * rows_of(factor, VALUE)
                plgpu.barrier_wait(ring.v_full.at[slot])
                pass_turn()
                out = accumulate(out, rounded, ring.v.at[slot], interpret)
                plgpu.barrier_arrive(ring.v_empty.at[slot])
                return out, new_largest, total

            pl.when(warpgroup == 1)(pass_turn)
            start = [jnp.full((WG_ROWS,), value, jnp.float32) for value in (-jnp.inf, 0.0)]
            carry = parts.zeros(WG_ROWS, VALUE), *(plgpu.layout_cast(x, WGMMA.reduce(1)) for x in start)
            out, largest, total = walk.run(add, carry)
            pl.when(warpgroup == 0)(pass_turn)

            lse_smem[warpgroup] = (largest + jnp.log2(total)) * math.log(2)
            out = out * rows_of(1 / jnp.where(total == 0, 1.0, total), VALUE)
            parts.store(out, q_smem.at[warpgroup], part_of(out_gmem, rows, VALUE))  # where the queries were
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_gmem.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tile, ints, dtype = parts.tile, parts.ints, jnp.bfloat16
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((B, T, H * VALUE), dtype), jax.ShapeDtypeStruct((B, H, padded_T), jnp.float32)),
        scratch_types=[
            tile(WARPGROUPS, WG_ROWS, PART),
            tile(WARPGROUPS, WG_ROWS, ROPE),
            parts.floats(WARPGROUPS, WG_ROWS),
            plgpu.Barrier(num_arrivals=2 if sight is None else 4, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *parts.KeyRing.scratch(stages, keys),
            *([] if sight is None else [ints(WARPGROUPS, WG_ROWS)] * 2),
        ],
        grid=(B, H, blocks),
        grid_names=('batch', 'head', 'block'),
        num_threads=WARPGROUPS + 1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name='flash_mla',
        interpret=interpret,
    )
    operands = parts.flat(*x)
    if sight is not None:
        operands += [*(padded(x, ROWS) for x in sight), key_ranges(sight, ROWS, keys, S)]
    out, lse = kernel(*operands)
    return out.reshape(B, T, H, VALUE), lse
