"""Attention over the paged latent cache on Hopper: every page is read once for 64 rows of queries.

Rows are the heads of all queries of a sequence. A block of the grid takes 64 of them and walks over the pages of its share
(`schedule.py`). One warpgroup copies pages into two slots of shared memory; two math warpgroups share the work of a page:

    the warpgroup of the page's slot          both, as soon as p is there
    s = q c^T + q_rope r^T   wgmma            o = o * exp2(old m - new m)
    m = max(m, s)                             o = o + p c   wgmma: warpgroup w has columns [256 w, 256 w + 256) of c
    p = exp2(s - m)

so that scores are computed once, and while one page is worked on the next one is on its way. p stays in registers; the other
warpgroup gets it by way of shared memory, with the running maximum and sum. They take turns with the pages, and so with that
memory: whoever reads it there is the next one to write. Float8 pages lie in slots of their own: each warpgroup first turns its
columns of a page into bfloat16, in a place of which there is one.

A part of a sequence that is all of it is written out. Other parts leave a result and its log-sum-exp, and a second kernel
adds those up, in float32 and in the order of the pages. Such a result is bfloat16, as the output is: a sequence that was cut
is rounded once more than another one.
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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_mla.reference import LatentPages
from pallas_kernels.decode_mla.schedule import PAGE, Schedule, place, schedule, share
from pallas_kernels.decode_mla.sm90_combine import LOWEST, combine_parts
from pallas_kernels.decode_mla.tuned import FEW, MANY, CombineConfig
from pallas_kernels.fp8 import BLOCK, E4M3
from pallas_kernels.implementation import hopper_cores, traced_once
from pallas_kernels.tiles import COMPILER, accumulate, rows_of, swizzled

WGMMA = plgpu.Layout.WGMMA
LATENT, ROPE = 512, 64
MAX_QUERIES = 4
HEADS = range(16, 129, 16)
ROWS = 64  # of one wgmma
SLOTS = WARPGROUPS = 2
HALF = LATENT // WARPGROUPS
CHUNK = 64  # columns that ordinary code takes at a time
# A thread has eight neighbouring columns: 16 bytes of bfloat16, stored without bank conflicts.
WIDENED = plgpu.Layout.SMEM_GMEM_COPY((PAGE, BLOCK), jnp.bfloat16, 128)
REGISTERS = 24, 240  # of a thread of the copying and of the math warpgroups


def refusal(q_BTHL: Array, q_rope_BTHR: Array, pages: LatentPages) -> str | None:
    """Why the kernel does not serve these inputs; None if it does."""
    T, H = q_BTHL.shape[1:3]
    if q_BTHL.dtype != jnp.bfloat16:
        return f'queries are {q_BTHL.dtype}, the kernel serves bfloat16'
    if (widths := (q_BTHL.shape[3], q_rope_BTHR.shape[3])) != (LATENT, ROPE):
        return f'latent and rotary widths are {widths}, the kernel serves {(LATENT, ROPE)}'
    if (page := pages.latent_PGL.shape[1]) != PAGE:
        return f'pages have {page} tokens, the kernel serves {PAGE}'
    if T > MAX_QUERIES:
        return f'{T=} exceeds {MAX_QUERIES}'
    if H not in HEADS:
        return f'{H=} must be a multiple of {HEADS.step} up to {HEADS[-1]}'
    return None


@traced_once('scale', 'cores', 'cluster', 'combine', 'interpret')
def decode_mla(
    q_BTHL: Float[Array, 'B T H L'],
    q_rope_BTHR: Float[Array, 'B T H R'],
    pages: LatentPages,
    table_BW: Int32[Array, 'B W'],
    lengths_B: Int32[Array, ' B'],
    scale: float,
    cores: int | None = None,
    cluster: int | None = None,
    combine: CombineConfig | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, 'B T H L'], Float32[Array, 'B H T']]:
    """As the reference.

    Args:
      cores: multiprocessors to fill; None takes those of the GPU.
      cluster: blocks of neighbouring rows that share the copies of pages; None takes 2 where rows allow it.
      combine: how the second kernel cuts its work; None goes by the number of rows.
      interpret: `plgpu.InterpretGPUParams`, to run on a CPU.
    """
    B, T, H, _ = q_BTHL.shape
    rows = T * H
    row_blocks = pl.cdiv(rows, ROWS)
    cluster = cluster or math.gcd(row_blocks, 2)
    combine = combine or (MANY if B * rows >= 2048 else FEW)
    blocks = max(1, (cores or hopper_cores() or 132) // row_blocks)
    plan = schedule(lengths_B, table_BW.shape[1], blocks)
    body = _Decode(rows, H, T, blocks, cluster, scale * math.log2(math.e), pages.scales_PGC is not None, interpret)
    struct, padded = jax.ShapeDtypeStruct, row_blocks * ROWS  # vectors are written whole
    out_BML, lse_BM, parts_ZML, parts_lse_ZM = plgpu.kernel(
        body,
        out_type=(
            struct((B, rows, LATENT), jnp.bfloat16),
            struct((B, padded), jnp.float32),
            struct((2 * blocks, rows, LATENT), jnp.bfloat16),
            struct((2 * blocks, padded), jnp.float32),
        ),
        scratch_types=body.scratch(),
        grid=(blocks, row_blocks // cluster),
        grid_names=('block', 'row_cluster'),
        cluster=(cluster,),
        cluster_names=('cluster',),
        num_threads=WARPGROUPS + 1,
        thread_name='warpgroup',
        compiler_params=COMPILER,
        kernel_name='decode_mla',
        interpret=interpret,
    )(
        *plan,
        table_BW,
        q_BTHL.reshape(B, rows, LATENT),
        q_rope_BTHR.reshape(B, rows, ROPE),
        *(x for x in pages if x is not None),
    )
    out_BML, lse_BM = combine_parts(plan, parts_ZML, parts_lse_ZM, out_BML, lse_BM, combine, interpret)
    return out_BML.reshape(q_BTHL.shape), lse_BM[:, :rows].reshape(B, T, H).swapaxes(1, 2)


class _Part(NamedTuple):
    """The pages of a sequence in one block's share, from `first` to before `stop`; `count` pages were there before."""

    sequence: Any
    length: Any
    pages: Any
    first: Any
    stop: Any
    count: Any


class _Gmem(NamedTuple):
    """Global memory: operands and results."""

    plan: Schedule
    table: Any
    q: Any
    q_rope: Any
    latent: Any
    rope: Any
    scales: Any
    out: Any
    lse: Any
    parts: Any  # [part, row, column]: its result
    parts_lse: Any  # [part, row]: first those of sequences that began in an earlier share, one a block, then the others

    @classmethod
    def of(cls, refs: tuple) -> '_Gmem':
        """Refs of operands and results in order, without scales if there are none."""
        plan, operands, results = refs[: len(Schedule._fields)], refs[len(Schedule._fields) : -4], refs[-4:]
        scales = operands[5] if len(operands) > 5 else None
        return cls(Schedule(*plan), *operands[:5], scales, *results)  # pyright: ignore


class _Smem(NamedTuple):
    """Shared memory and its barriers."""

    q: Any  # [1, row, 512]
    q_rope: Any
    latent: Any  # [place, half, token, 256]
    rope: Any  # [slot, token, 64]
    p: Any  # [row, token]
    running: Any  # [maximum or sum, row]
    q_full: Any
    q_empty: Any
    slot_full: Any  # of each slot
    slot_empty: Any  # of each slot
    p_full: Any  # of each warpgroup: p that it has computed, with the running maximum and sum
    float8: Any = None  # [slot, token, 512]
    widened: Any = (
        None  # of each warpgroup: its columns of a page are there in bfloat16, and the other one computes scores
    )


@dataclasses.dataclass(frozen=True)
class _Decode:
    """The kernel: called with its operands, its results and its scratch memory."""

    rows: int
    heads: int
    queries: int
    blocks: int
    cluster: int
    factor: float
    float8: bool
    interpret: Any

    def scratch(self) -> list:
        """The fields of `_Smem`."""
        tile = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=swizzled(64, jnp.bfloat16))  # noqa: E731
        slot_empty = plgpu.Barrier
        if self.cluster > 1:
            slot_empty = functools.partial(plgpu.ClusterBarrier, collective_axes=('cluster',))
        scratch = [
            tile(1, ROWS, LATENT),
            tile(1, ROWS, ROPE),
            tile(1 if self.float8 else SLOTS, WARPGROUPS, PAGE, HALF),
            tile(SLOTS, PAGE, ROPE),
            tile(ROWS, PAGE),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2 if self.float8 else 3, num_barriers=SLOTS),
            slot_empty(num_arrivals=WARPGROUPS, num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ]
        if self.float8:
            scratch += [
                plgpu.SMEM((SLOTS, PAGE, LATENT), E4M3, transforms=swizzled(BLOCK, E4M3)),
                plgpu.Barrier(num_barriers=WARPGROUPS),
            ]
        return scratch

    def __call__(self, *refs: Any) -> None:
        operands = len(Schedule._fields) + 5 + self.float8
        gmem, smem = _Gmem.of(refs[: operands + 4]), _Smem(*refs[operands + 4 :])
        warpgroup = lax.axis_index('warpgroup')

        @pl.when(warpgroup == WARPGROUPS)
        @jax.named_scope('copy')
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[0], action='decrease')
            self.copy(gmem, smem)

        @pl.when(warpgroup < WARPGROUPS)
        @jax.named_scope('attend')
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[1], action='increase')
            self.attend(gmem, smem, warpgroup)

    @property
    def first_row(self) -> Any:
        """Of this block."""
        return (lax.axis_index('row_cluster') * self.cluster + lax.axis_index('cluster')) * ROWS

    def for_each_part(self, plan: Schedule, visit: Callable[[_Part], None]) -> Any:
        """Calls `visit` for the parts of sequences in this block's share. Returns the number of their pages."""
        block = lax.axis_index('block')

        def one(sequence: Any, count: Any) -> Any:
            size = share(plan.starts[plan.lengths_B.shape[0]], self.blocks)
            start, pages = place(plan, sequence)
            inside = lambda position: lax.min(lax.max(position - start, jnp.int32(0)), pages)  # noqa: E731
            first, stop = inside(block * size), inside((block + 1) * size)
            length = lax.min(plan.lengths_B[sequence], pages * PAGE)
            pl.when(stop > first)(lambda: visit(_Part(sequence, length, pages, first, stop, count)))
            return count + stop - first

        return lax.fori_loop(plan.first_X[block], plan.stop_X[block], one, jnp.int32(0))

    def slot(self, part: _Part, index: Any) -> Any:
        """Of a page. The warpgroup of this number computes its scores."""
        return lax.rem(part.count + index - part.first, jnp.int32(SLOTS))

    def place(self, slot: Any, index: Any) -> Any:
        """Where a page lies in bfloat16."""
        return (0 if self.float8 else slot) + _zero(index)

    def copy(self, gmem: _Gmem, smem: _Smem) -> None:
        """Copies pages into the slots, and queries."""
        rows = pl.ds(self.first_row, ROWS)
        collective = 'cluster' if self.cluster > 1 else None

        def copy_page(part: _Part, index: Any) -> None:
            slot = self.slot(part, index)
            page = gmem.table[part.sequence, index]
            latent = gmem.latent.at[page]
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, barrier=smem.slot_full.at[slot], collective_axes=collective
            )
            plgpu.barrier_wait(smem.slot_empty.at[slot])
            copy(gmem.rope.at[page], smem.rope.at[slot])
            if self.float8:
                copy(latent, smem.float8.at[slot])
            else:
                for half in range(WARPGROUPS):
                    copy(latent.at[:, pl.ds(half * HALF, HALF)], smem.latent.at[slot, half])

        def copy_part(part: _Part) -> None:
            # The first page may come while the queries before are still in use.
            copy_page(part, part.first)
            plgpu.barrier_wait(smem.q_empty)
            plgpu.copy_gmem_to_smem(gmem.q.at[part.sequence, rows], smem.q.at[0], smem.q_full)
            plgpu.copy_gmem_to_smem(gmem.q_rope.at[part.sequence, rows], smem.q_rope.at[0], smem.q_full)
            pl.loop(part.first + 1, part.stop)(lambda index: copy_page(part, index))

        count = self.for_each_part(gmem.plan, copy_part)
        plgpu.barrier_wait(smem.q_empty)

        # No block of a cluster may leave while another still writes to its memory or its barriers.
        @pl.loop(count, count + SLOTS)
        def _(number: Any) -> None:
            plgpu.barrier_wait(smem.slot_empty.at[lax.rem(number, jnp.int32(SLOTS))])

    def attend(self, gmem: _Gmem, smem: _Smem, warpgroup: Any) -> None:
        """Attends to the pages in the slots."""
        for slot in range(SLOTS):
            plgpu.barrier_arrive(smem.slot_empty.at[slot])
        plgpu.barrier_arrive(smem.q_empty)

        def attend_part(part: _Part) -> None:
            plgpu.barrier_wait(smem.q_full)
            own = functools.partial(self.own_page, gmem, smem, warpgroup, part)
            others = functools.partial(self.others_page, gmem, smem, warpgroup, part)
            begins = self.slot(part, part.first) == warpgroup
            state = self.nothing(), self.scales(gmem, warpgroup, part, part.first)
            state = lax.cond(begins, lambda state: own(part.first, state), lambda state: state, state)
            first = part.first + jnp.where(begins, 1, 0)
            # Two pages a step: the other warpgroup's and this one's.
            steps = lax.div(part.stop - first, jnp.int32(2))
            both = lambda step, state: own(first + 2 * step + 1, others(first + 2 * step, state))  # noqa: E731
            state = lax.fori_loop(0, steps, both, state)
            # This warpgroup has computed its last scores of these queries.
            plgpu.barrier_arrive(smem.q_empty)
            ends = self.slot(part, part.stop - 1) == warpgroup
            (out, top, total), _ = lax.cond(
                ends, lambda state: state, lambda state: others(part.stop - 1, state), state
            )
            self.store(gmem, smem, warpgroup, part, out, top, total)

        self.for_each_part(gmem.plan, attend_part)
        plgpu.wait_smem_to_gmem(0)

    def nothing(self) -> tuple[Array, Array, Array]:
        """Output, running maximum and sum before the first page."""
        row = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))  # noqa: E731
        return plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), WGMMA), row(LOWEST), row(0)

    def scales(self, gmem: _Gmem, warpgroup: Any, part: _Part, index: Any) -> tuple:
        """Those of this warpgroup's columns of a page, or of the part's last page: they are read ahead, into registers."""
        if not self.float8:
            return ()
        page = gmem.table[part.sequence, lax.min(index, part.stop - 1)]
        numbers = range(HALF // BLOCK)
        scales = gmem.scales.at[page]
        columns = [scales.at[:, warpgroup * len(numbers) + number] for number in numbers]
        return tuple(plgpu.load(column, layout=WIDENED.reduce(1), optimized=False) for column in columns)

    def own_page(self, gmem: _Gmem, smem: _Smem, warpgroup: Any, part: _Part, index: Any, state: tuple) -> tuple:
        """The state after a page whose scores this warpgroup computes."""
        (out, before, total), scales = state
        zero = _zero(index)
        slot = warpgroup + zero
        plgpu.barrier_wait(smem.slot_full.at[slot])
        if self.float8:
            self.widen(smem, warpgroup, slot, index, scales)
            plgpu.barrier_wait(smem.widened.at[1 - warpgroup])

        def products(scores_ref: Any) -> Any:
            plgpu.wgmma(scores_ref, smem.q_rope.at[zero], smem.rope.at[slot].T)
            for half in range(WARPGROUPS):
                keys = smem.latent.at[self.place(slot, index), half]
                plgpu.wgmma(scores_ref, smem.q.at[zero, :, pl.ds(half * HALF, HALF)], keys.T)
            return scores_ref[...]

        scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, PAGE), jnp.float32))
        p, top, total = self.weigh(smem, warpgroup, part, index, scores, before, total)
        if self.float8:
            self.release(smem, slot)
        next_scales = self.scales(gmem, warpgroup, part, index + 1)
        out = self.multiply(smem, warpgroup, part, index, out * rows_of(jnp.exp2(before - top), HALF), p)
        return (out, top, total), next_scales

    def others_page(self, gmem: _Gmem, smem: _Smem, warpgroup: Any, part: _Part, index: Any, state: tuple) -> tuple:
        """The state after a page whose scores the other warpgroup computes."""
        (out, before, _), scales = state
        if self.float8:
            slot = self.slot(part, index)
            plgpu.barrier_wait(smem.slot_full.at[slot])
            self.widen(smem, warpgroup, slot, index, scales)
            plgpu.barrier_arrive(smem.widened.at[warpgroup])
            self.release(smem, slot)
        p, top, total = self.receive(smem, 1 - warpgroup)
        next_scales = self.scales(gmem, warpgroup, part, index + 1)
        out = self.multiply(smem, warpgroup, part, index, out * rows_of(jnp.exp2(before - top), HALF), p)
        return (out, top, total), next_scales

    def widen(self, smem: _Smem, warpgroup: Any, slot: Any, index: Any, scales: tuple) -> None:
        """Turns this warpgroup's columns of a page into bfloat16. All that was read of their place has been used."""
        for block, scale in enumerate(scales):
            columns = pl.ds(warpgroup * HALF + block * BLOCK, BLOCK)
            narrow = plgpu.load(smem.float8.at[slot, :, columns], layout=WIDENED)
            for start in range(0, BLOCK, CHUNK):
                wide = narrow[:, start : start + CHUNK].astype(jnp.float32) * rows_of(scale, CHUNK)
                target = smem.latent.at[self.place(slot, index), warpgroup, :, pl.ds(block * BLOCK + start, CHUNK)]
                target[...] = wide.astype(jnp.bfloat16)
        plgpu.commit_smem()

    def weigh(
        self, smem: _Smem, warpgroup: Any, part: _Part, index: Any, scores: Array, top: Array, total: Array
    ) -> tuple[Array, Array, Array]:
        """p of a page with the new running maximum and sum, all handed to the other warpgroup too.

        There it was read, whatever it was that lay there: it is the other's turn after this one's.
        """
        seen_by_all = part.length - (self.queries - 1)
        scores = lax.cond(
            (index + 1) * PAGE > seen_by_all,
            lambda scores: self.hide(scores, _zero(index), seen_by_all - index * PAGE, part.length - index * PAGE),
            lambda scores: scores,
            scores,
        )
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * self.factor)
        p = jnp.exp2(scores * self.factor - rows_of(new_top, PAGE))
        new_total = total * jnp.exp2(top - new_top) + jnp.sum(p, axis=1)
        p = p.astype(jnp.bfloat16)
        smem.p[...] = p
        smem.running[0] = new_top
        smem.running[1] = new_total
        plgpu.barrier_arrive(smem.p_full.at[warpgroup])
        return p, new_top, new_total

    def receive(self, smem: _Smem, other: Any) -> tuple[Array, Array, Array]:
        """p of the other warpgroup's page, with its running maximum and sum."""
        plgpu.barrier_wait(smem.p_full.at[other])
        top, total = (plgpu.load(smem.running.at[i], layout=WGMMA.reduce(1)) for i in range(2))
        return plgpu.load(smem.p, layout=WGMMA), top, total

    def multiply(self, smem: _Smem, warpgroup: Any, part: _Part, index: Any, out: Array, p: Array) -> Array:
        """`out` with a page's values added. A bfloat16 slot is then free, but for the part's last: the output goes there."""
        slot = self.slot(part, index)
        values = smem.latent.at[self.place(slot, index), warpgroup]
        pl.when((index + 1) * PAGE > part.length)(lambda: _clear(values, part.length - index * PAGE))
        out = accumulate(out, p, values, self.interpret)
        if not self.float8:
            pl.when(index < part.stop - 1)(lambda: self.release(smem, slot))
        return out

    def release(self, smem: _Smem, slot: Any) -> None:
        """Gives a slot back, which this warpgroup has done with."""
        if self.cluster > 1:
            plgpu.commit_smem()  # One thread arrives for its warpgroup then: it must not run ahead of the others.
        plgpu.barrier_arrive(smem.slot_empty.at[slot])

    def hide(self, scores: Array, zero: Any, seen_by_all: Any, tokens: Any) -> Array:
        """Scores of a page, with -inf for tokens after the query or past the sequence."""
        token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
        if self.queries == 1:
            return jnp.where(token < tokens, scores, -jnp.inf)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA.reduce(1)) + (self.first_row + zero)
        query = sum(jnp.where(row < first * self.heads, 0, 1) for first in range(1, self.queries))
        return jnp.where(token < rows_of(jnp.minimum(seen_by_all + query, tokens), PAGE), scores, -jnp.inf)

    def store(
        self, gmem: _Gmem, smem: _Smem, warpgroup: Any, part: _Part, out: Array, top: Array, total: Array
    ) -> None:
        """Copies a part's result to global memory, by way of the last page's place, which is free then."""
        some = total > 0
        out *= rows_of(jnp.where(some, 1 / total, 0.0), HALF)
        lse = jnp.where(some, top + jnp.log2(total), -jnp.inf)
        slot = self.slot(part, part.stop - 1)
        staged, rows = smem.latent.at[self.place(slot, part.stop), warpgroup], pl.ds(self.first_row, ROWS)
        vector = pl.ds(self.first_row + _zero(part.stop), ROWS)
        whole = (part.first == 0) & (part.stop == part.pages)

        def leave(target: Any) -> None:
            for start in range(0, HALF, CHUNK):
                staged[:, pl.ds(start, CHUNK)] = out[:, start : start + CHUNK].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, target.at[rows, pl.ds(warpgroup * HALF, HALF)])

        @pl.when(whole)
        def _() -> None:
            leave(gmem.out.at[part.sequence])

            @pl.when(warpgroup == 0)
            def _() -> None:
                gmem.lse[part.sequence, vector] = lse * math.log(2)

        @pl.when(~whole)
        def _() -> None:
            number = lax.axis_index('block') + jnp.where(part.first == 0, self.blocks, 0)
            leave(gmem.parts.at[number])

            @pl.when(warpgroup == 0)
            def _() -> None:
                gmem.parts_lse[number, vector] = lse

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if not self.float8:
            plgpu.barrier_arrive(smem.slot_empty.at[slot])


def _zero(number: Any) -> Any:
    """Of a small number, unknown to the compiler.

    Addresses that do not change are kept in registers from page to page, of which there are too few. Those with this
    term seem to change.
    """
    return lax.shift_right_logical(number, jnp.int32(30))


def _clear(values_smem: Any, tokens: Any) -> None:
    """Zeros the values past so many tokens: what lies there may be NaN, which p = 0 does not silence."""
    for start in range(0, HALF, CHUNK):
        chunk = values_smem.at[:, pl.ds(start, CHUNK)]
        values = plgpu.load(chunk, layout=WGMMA)
        token = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
        chunk[...] = jnp.where(token < tokens, values, jnp.zeros_like(values))
    plgpu.commit_smem()
