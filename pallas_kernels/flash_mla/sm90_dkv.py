"""Gradients of the keys and values of attention, on Hopper.

A block of the grid takes 64 keys of one head and walks over the blocks of 128 queries that see them. Its two math warpgroups
have parts that cost the same:

    first    s^T = k q^T,  p^T = exp2(s^T - lse)             dv = dv + p^T d_out     p^T, in bfloat16, goes to the second
    second   dp^T = v d_out^T,  ds^T = p^T (dp^T - delta)    dk = dk + ds^T q

Every sum has one owner and one order: two runs give the same bits. The rotary key is one for all heads: its gradients are
left in float32, a part a head.
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
from pallas_kernels.flash_mla.parts import LOG2_E, PART, ROPE, VALUE, WG_ROWS, WGMMA
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight, padded, query_ranges
from pallas_kernels.implementation import traced_once
from pallas_kernels.tiles import COMPILER, accumulate

KEYS = WG_ROWS
WIDE_CHUNK = 32  # columns of one copy of float32 results


@traced_once('scale', 'config', 'interpret')
def key_gradients(
    x: Inputs,
    sight: Sight | None,
    scale: float,
    lse_BHt: Float32[Array, 'B H _'],
    delta_BHt: Float32[Array, 'B H _'],
    d_out_BTHU: Float[Array, 'B T H U'],
    config: tuned.KeyConfig = tuned.KEY,
    interpret: Any = None,
) -> tuple[Float[Array, 'B S H N'], Float32[Array, 'B S H R'], Float[Array, 'B S H U']]:
    """The gradients of `k`, of `k_rope` for each head, and of `v`.

    Log-sum-exp and delta are padded with zeros to a multiple of 128 queries.
    """
    B, T, H, _ = x.q_BTHN.shape
    S = x.k_BSHN.shape[1]
    queries, stages = config.queries, config.stages
    blocks, steps = pl.cdiv(S, KEYS), pl.cdiv(T, queries)

    def body(*refs: Any) -> None:
        inputs, sights, outputs, scratch = parts.split(refs, 8, 0 if sight is None else 3, 3)
        q_gmem, q_rope_gmem, k_gmem, k_rope_gmem, v_gmem, lse_gmem, delta_gmem, d_out_gmem = inputs
        d_k_gmem, d_k_rope_gmem, d_v_gmem = outputs
        k_smem, k_rope_smem, v_smem, q_smem, q_rope_smem, d_out_smem, p_union, *scratch = scratch
        lse_smem, delta_smem, k_full, q_full, d_out_full, q_empty, d_out_empty, p_full, p_empty, *sight_scratch = (
            scratch
        )
        p_smem, d_k_rope_smem = p_union
        batch, head, block, warpgroup = (lax.axis_index(name) for name in ('batch', 'head', 'block', 'warpgroup'))
        first = block * KEYS
        rows, shape = pl.ds(first, KEYS), (KEYS, queries)
        if sight is None:
            begin, end = lax.div(first, jnp.int32(queries)), jnp.int32(steps)
            walk = parts.Walk(begin, lax.min(begin + pl.cdiv(KEYS, queries), end), end, end)
        else:
            walk = parts.Walk(*(sights[2][batch, block, number] for number in range(4)))
        slot_of = lambda step: lax.rem(step, jnp.int32(stages))  # noqa: E731
        part_of = lambda ref, rows, width: parts.part(ref, batch, rows, head, width)  # noqa: E731

        @pl.when(warpgroup == 2)
        @jax.named_scope('copy')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[0], action='decrease')
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=k_full)
            copy(part_of(k_gmem, rows, PART), k_smem)
            copy(k_rope_gmem.at[batch, rows], k_rope_smem)
            copy(part_of(v_gmem, rows, VALUE), v_smem)

            @pl.loop(0, walk.steps)
            def _(step: Any) -> None:
                slot, of_step, later = slot_of(step), pl.ds(walk.block_of(step) * queries, queries), step >= stages
                pl.when(later)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=q_full.at[slot])
                copy(part_of(q_gmem, of_step, PART), q_smem.at[slot])
                copy(part_of(q_rope_gmem, of_step, ROPE), q_rope_smem.at[slot])
                copy(lse_gmem.at[batch, head, of_step], lse_smem.at[slot])
                if sight is not None:
                    for source, target in zip(sights[:2], sight_scratch, strict=True):
                        copy(source.at[batch, of_step], target.at[slot])
                pl.when(later)(lambda: plgpu.barrier_wait(d_out_empty.at[slot]))
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=d_out_full.at[slot])
                copy(part_of(d_out_gmem, of_step, VALUE), d_out_smem.at[slot])
                copy(delta_gmem.at[batch, head, of_step], delta_smem.at[slot])

            def drain(step: Any) -> None:
                plgpu.barrier_wait(q_empty.at[slot_of(step)])
                plgpu.barrier_wait(d_out_empty.at[slot_of(step)])

            walk.last(stages, drain)

        of_column = lambda ref: plgpu.load(ref, layout=WGMMA.reduce(0))  # noqa: E731

        @pl.when(warpgroup == 0)
        @jax.named_scope('values')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[1], action='increase')
            plgpu.barrier_wait(k_full)

            def add(step: Any, query_block: Any, d_v: Array, masked: bool) -> Array:
                slot = slot_of(step)
                plgpu.barrier_wait(q_full.at[slot])
                scores = parts.product(
                    (k_smem, q_smem.at[slot].T),
                    (k_rope_smem, q_rope_smem.at[slot].T),
                )
                lse = of_column(lse_smem.at[slot]) * LOG2_E
                bounds = [of_column(ref.at[slot]) for ref in sight_scratch] if masked else []
                plgpu.commit_smem()  # between these reads and the next copy to their place
                plgpu.barrier_arrive(q_empty.at[slot])
                p = jnp.exp2(scores * (scale * LOG2_E) - parts.columns_of(lse, KEYS))
                if masked:
                    seen = parts.seen(shape, first, query_block * queries, bounds, keys_are_rows=True)
                    p = jnp.where(seen, p, 0.0)
                rounded = p.astype(p_smem.dtype)
                pl.when(step > 0)(lambda: plgpu.barrier_wait(p_empty))
                p_smem[...] = rounded
                plgpu.barrier_arrive(p_full)
                plgpu.barrier_wait(d_out_full.at[slot])
                d_v = accumulate(d_v, rounded, d_out_smem.at[slot], interpret)
                plgpu.barrier_arrive(d_out_empty.at[slot])
                return d_v

            d_v = walk.run(add, parts.zeros(KEYS, VALUE))
            pl.when(walk.steps > 0)(
                lambda: plgpu.barrier_wait(p_empty)
            )  # the other one has read the values for the last time
            parts.store(d_v, v_smem, part_of(d_v_gmem, rows, VALUE))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == 1)
        @jax.named_scope('keys')
        def _() -> None:
            plgpu.set_max_registers(parts.REGISTERS[1], action='increase')
            plgpu.barrier_wait(k_full)

            def add(step: Any, carry: tuple) -> tuple:
                d_k, d_k_rope = carry
                slot = slot_of(step)
                plgpu.barrier_wait(d_out_full.at[slot])
                d_p = parts.product((v_smem, d_out_smem.at[slot].T))
                delta = of_column(delta_smem.at[slot])
                plgpu.commit_smem()
                plgpu.barrier_arrive(d_out_empty.at[slot])
                plgpu.barrier_wait(p_full)
                p = plgpu.load(p_smem, layout=WGMMA).astype(jnp.float32)
                plgpu.barrier_arrive(p_empty)
                d_s = (p * (d_p - parts.columns_of(delta, KEYS))).astype(q_smem.dtype)
                plgpu.barrier_wait(q_full.at[slot])
                d_k = accumulate(d_k, d_s, q_smem.at[slot], interpret)
                d_k_rope = accumulate(d_k_rope, d_s, q_rope_smem.at[slot], interpret)
                plgpu.barrier_arrive(q_empty.at[slot])
                return d_k, d_k_rope

            d_k, d_k_rope = lax.fori_loop(0, walk.steps, add, (parts.zeros(KEYS, PART), parts.zeros(KEYS, ROPE)))
            # The first one's last reading of the keys came before its last p.
            parts.store(d_k * scale, k_smem, part_of(d_k_gmem, rows, PART))
            for chunk in range(0, ROPE, WIDE_CHUNK):
                target = d_k_rope_gmem.at[batch, rows, pl.ds(head * ROPE + chunk, WIDE_CHUNK)]
                staging_smem = d_k_rope_smem.at[chunk // WIDE_CHUNK]
                parts.store(d_k_rope[:, chunk : chunk + WIDE_CHUNK] * scale, staging_smem, target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tile, ints, floats, dtype = parts.tile, parts.ints, parts.floats, jnp.bfloat16
    out = lambda width, dtype: jax.ShapeDtypeStruct((B, S, H * width), dtype)  # noqa: E731
    kernel = plgpu.kernel(
        body,
        out_type=(out(PART, dtype), out(ROPE, jnp.float32), out(VALUE, dtype)),
        scratch_types=[
            tile(KEYS, PART),
            tile(KEYS, ROPE),
            tile(KEYS, VALUE),
            tile(stages, queries, PART),
            tile(stages, queries, ROPE),
            tile(stages, queries, VALUE),
            plgpu.RefUnion(tile(KEYS, queries), tile(ROPE // WIDE_CHUNK, KEYS, WIDE_CHUNK, dtype=jnp.float32)),
            floats(stages, queries),
            floats(stages, queries),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=3 if sight is None else 5, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
            *([] if sight is None else [ints(stages, queries)] * 2),
        ],
        grid=(B, H, blocks),
        grid_names=('batch', 'head', 'block'),
        num_threads=3,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name='flash_mla_dkv',
        interpret=interpret,
    )
    operands = [*parts.flat(*x), lse_BHt, delta_BHt, *parts.flat(d_out_BTHU)]
    if sight is not None:
        operands += [*(padded(x, queries) for x in sight), query_ranges(sight, queries, KEYS, S)]
    d_k, d_k_rope, d_v = kernel(*operands)
    return d_k.reshape(B, S, H, PART), d_k_rope.reshape(B, S, H, ROPE), d_v.reshape(B, S, H, VALUE)
