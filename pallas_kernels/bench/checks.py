"""Whether results are right: an error against a float32 reference, in memory that was poisoned before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

POISON = 0xFF  # NaN in e4m3, bfloat16 and float32
TRIES = 16


def difference(x: Any, y: Any) -> float:
    """`1 - 2<x,y> / (<x,x> + <y,y>)` over all leaves of two trees of arrays; 0 for equal ones, NaN if one holds a NaN."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    sums = [_squares(a, b) for a, b in pairs]
    apart, total = (sum(float(pair[i]) for pair in sums) for i in range(2))
    return apart / total if total else apart


@jax.jit
def _squares(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    # Equal to the form above, without its cancellation.
    return jnp.sum((x - y) ** 2), jnp.sum(x**2) + jnp.sum(y**2)


def in_poisoned_memory(call: Callable[[], Any]) -> tuple[Any, bool]:
    """Results of a call that writes where there were NaNs, and whether all of them came to lie there.

    The allocator decides where results lie. Arrays of NaNs as large as the results are made and given back first;
    results that still lie elsewhere are kept, to occupy that memory, and the call is made again.
    """
    sizes = [array.nbytes for array in jax.tree.leaves(jax.block_until_ready(call()))]
    kept = []
    for _ in range(TRIES):
        poison = [jnp.full(size, POISON, jnp.uint8) for size in sizes + sizes]
        jax.block_until_ready(poison)
        ranges = [(start := array.unsafe_buffer_pointer(), start + array.nbytes) for array in poison]
        for array in poison:
            array.delete()
        results = jax.block_until_ready(call())
        if lies_within(_ranges(results), ranges):
            return results, True
        kept.append(results)
    return kept[-1], False


def _ranges(tree: Any) -> list[tuple[int, int]]:
    return [(start := leaf.unsafe_buffer_pointer(), start + leaf.nbytes) for leaf in jax.tree.leaves(tree)]


def lies_within(inner: list[tuple[int, int]], outer: list[tuple[int, int]]) -> bool:
    """Whether each range `[start, end)` lies in the union of `outer`."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(outer):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return all(any(low <= start and end <= high for low, high in merged) for start, end in inner)
