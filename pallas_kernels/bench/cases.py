"""What is measured: a case names an operation, its random inputs, its reference and its peer; a row is what came out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.bench import checks, peers
from pallas_kernels.bench.timing import Clock, JaxWork, Method, Work, number_of_sets
from pallas_kernels.fp8 import BLOCK, Quantized, blocks, round_up


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      op, name: the operation, and which of its uses this is: ('gemm_fp8', 'dgrad').
      shape: dimension letters and sizes, for the reader.
      flops: useful floating-point operations of one call, 0 for what only moves bytes.
      inputs: makes one set of random inputs on the device.
      run: the operation; takes one set and the keyword `implementation`.
      reference: float32 arrays that `dense` of the results must come near; takes one set.
      dense: results as float32 arrays.
      peer: makes the peer's work from the input sets, or None if the peer is a copy of as many bytes.
      peer_name: what the peer is.
      method: how its time is taken if not as the clock does.
    """

    op: str
    name: str
    shape: dict[str, int]
    flops: int
    inputs: Callable[[jax.Array], tuple]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    peer_name: str
    peer: Callable[[list[tuple]], 'peers.PeerWork'] | None = None
    dense: Callable[[Any], Any] = lambda results: results
    method: Method | None = None

    def moved_bytes(self) -> int:
        """Bytes of the inputs, read once, and of the results, written once."""
        shapes = jax.eval_shape(self.inputs, jax.random.key(0))
        results = jax.eval_shape(lambda *inputs: self.run(*inputs, implementation='reference'), *shapes)
        return size_in_bytes(shapes) + size_in_bytes(results)

    def input_sets(self) -> list[tuple]:
        """As many sets of random inputs as exceed the cache."""
        size = size_in_bytes(jax.eval_shape(self.inputs, jax.random.key(0)))
        make = jax.jit(self.inputs)
        return [make(key) for key in jax.random.split(jax.random.key(1), number_of_sets(size))]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. Times are those of one call; a ratio above 1 means that the peer takes longer.

    Attributes:
      method: 'kernels' or 'span', see `timing.py`.
      bound: what limits the call at this machine's ceilings.
      share: of what that ceiling allows.
      error: difference from the float32 reference, `1 - 2<x,y>/(<x,x>+<y,y>)`; for `accumulation` the relative error.
      poisoned: whether the checked results lay in memory that held NaNs before.
      failure: why there is no time; the other figures are then None.
    """

    op: str
    name: str
    shape: dict[str, int]
    flops: int
    bytes: int
    method: str | None = None
    us: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    peer: str | None = None
    peer_us: float | None = None
    peer_error: float | None = None
    peer_failure: str | None = None
    ratio: float | None = None
    bound: Literal['compute', 'memory'] | None = None
    share: float | None = None
    error: float | None = None
    poisoned: bool | None = None
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine was seen to reach: bytes read and written in a copy, and the best product."""

    copy_gbs: float
    gemm_tflops: float

    def including(self, rows: list[Row]) -> 'Ceilings':
        """The same, raised to the best that any row or its peer reached."""
        gbs, tflops = [self.copy_gbs], [self.gemm_tflops]
        for row in rows:
            times = [us for us in (row.us, row.peer_us) if us]
            gbs += [row.bytes / us * 1e-3 for us in times if not row.flops]
            tflops += [row.flops / us * 1e-6 for us in times]
        return Ceilings(max(gbs), max(tflops))


def size_in_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def timed(row: Row, us: float, peer_us: float | None) -> Row:
    """The row with its times and the rates that follow from them."""
    return dataclasses.replace(
        row,
        us=us,
        tflops=row.flops / us * 1e-6 if row.flops else None,
        gbs=row.bytes / us * 1e-3,
        peer_us=peer_us,
        ratio=peer_us / us if peer_us else None,
    )


def with_share(row: Row, ceilings: Ceilings) -> Row:
    """The row with its share of what the ceilings allow a call of so many operations and bytes."""
    if row.us is None:
        return row
    compute = row.flops / ceilings.gemm_tflops * 1e-6 if row.flops else 0.0
    memory = row.bytes / ceilings.copy_gbs * 1e-3
    bound = 'compute' if compute > memory else 'memory'
    return dataclasses.replace(row, bound=bound, share=max(compute, memory) / row.us)


def measure(case: Case, clock: Clock) -> Row:
    """The case's row, without its share. What fails is written into the row: it never ends the run."""
    row = Row(case.op, case.name, case.shape, case.flops, 0, peer=case.peer_name)
    try:
        row = dataclasses.replace(row, bytes=case.moved_bytes())
        sets = case.input_sets()
        expected = jax.jit(case.reference)(*sets[0])
        ours = JaxWork(lambda *inputs: case.run(*inputs, implementation='pallas'), sets)
        results, poisoned = checks.in_poisoned_memory(ours.run_once)
        error = checks.difference(case.dense(results[0]), expected)
        row = dataclasses.replace(row, error=error, poisoned=poisoned)
        del results
        works: list[Work] = [ours]
        try:
            if case.peer is None:
                works += peers.copies(row.bytes)
            else:
                peer = case.peer(sets)
                if peer.results:
                    row = dataclasses.replace(row, peer_error=checks.difference(peer.results(), expected))
                works.append(peer.work)
        except Exception as error:  # torch missing, or a shape that the peer does not serve
            row = dataclasses.replace(row, peer_failure=first_line(error))
        del expected
        (us, *others), method = clock.microseconds(works, case.method)
        return timed(dataclasses.replace(row, method=method), us, min(others, default=None))
    except Exception as error:  # whatever a kernel that does not compile or run raises
        return dataclasses.replace(row, failure=first_line(error))


def with_rows(cases: Sequence[Case], rows: Sequence[int] | None) -> list[Case]:
    """The cases whose first dimension is one of `rows`; all of them if it is None."""
    return [case for case in cases if not rows or next(iter(case.shape.values())) in rows]


def first_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {error}'.partition('\n')[0][:300]


def random_rows(key: jax.Array, rows: int, width: int) -> Quantized:
    """A random matrix with scales of 1x128 tiles."""
    values, scales = jax.random.split(key)
    return Quantized(random_values(values, rows, width), random_scales(scales, blocks(width), round_up(rows, BLOCK)))


def random_values(key: jax.Array, *shape: int) -> jax.Array:
    """e4m3 values as quantisation makes them from normal ones: the largest of 128 is about 448."""
    return jnp.clip(160 * jax.random.normal(key, shape), -448, 448).astype(jnp.float8_e4m3fn)


def random_scales(key: jax.Array, *shape: int) -> jax.Array:
    """Positive float32 scales, near those of normal values."""
    return jax.random.uniform(key, shape, minval=0.004, maxval=0.008)
