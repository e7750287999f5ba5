"""Cases of `decode_mla`: a token of many ragged sequences, and of a single long one. The peer is a copy of as many bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case, random_scales, random_values
from pallas_kernels.decode_mla import api
from pallas_kernels.decode_mla.api import LatentPages

LATENT, ROPE, PAGE = 512, 64, 64
SCALE = 192**-0.5
BATCH, MEAN = 128, 4096
LONG = [65536, 8192]
# Of a whole model, and of one of eight or of two GPUs that share its heads.
HEADS = [16, 64, 128]


def cases(quick: bool) -> list[Case]:
    """Caches of bfloat16 and of float8; the quick ones are a batch and a single sequence of bfloat16."""
    ragged = ragged_lengths(BATCH, MEAN)
    if quick:
        return [case('ragged', ragged, 64, False), case('one sequence', (LONG[1],), 128, False)]
    found = [case('ragged', ragged, heads, fp8) for heads in HEADS for fp8 in (False, True)]
    return found + [case('one sequence', (length,), heads, False) for length in LONG for heads in (16, 128)]


def ragged_lengths(count: int, mean: int) -> tuple[int, ...]:
    """Lengths from 1 to twice the mean."""
    return tuple(np.random.default_rng(0).integers(1, 2 * mean, count).tolist())


def case(name: str, lengths: tuple[int, ...], heads: int, fp8: bool) -> Case:
    """One query of each sequence. The error is that of the output."""
    run = functools.partial(api.decode_mla, scale=SCALE)
    tokens, queries = sum(lengths), len(lengths)

    def inputs(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 5)
        pages_B = -(-np.array(lengths) // PAGE)
        count, starts_B = int(pages_B.sum()), np.cumsum(pages_B) - pages_B
        numbers_BW = np.minimum(starts_B[:, None] + np.arange(pages_B.max()), count - 1)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        draw = random_values if fp8 else lambda key, *shape: normal(key, shape)
        scales = random_scales(keys[1], count, PAGE, LATENT // 128) if fp8 else None
        pages = LatentPages(draw(keys[0], count, PAGE, LATENT), normal(keys[2], (count, PAGE, ROPE)), scales)
        table_BW = jax.random.permutation(keys[3], count)[numbers_BW].astype(jnp.int32)
        q, q_rope = (normal(keys[4], (queries, 1, heads, width)) for width in (LATENT, ROPE))
        return q, q_rope, pages, table_BW, jnp.array(lengths, jnp.int32)

    return Case(
        op='decode_mla',
        name=f'{name}, {"float8" if fp8 else "bfloat16"}',
        shape={'B': queries, 'S': tokens // queries, 'H': heads},
        flops=2 * tokens * heads * (2 * LATENT + ROPE),
        inputs=inputs,
        run=run,
        reference=lambda *inputs: _output(run(*inputs, implementation='reference')),
        peer_name=peers.COPY,
        dense=jax.jit(_output),
    )


def _output(results: tuple[jax.Array, jax.Array]) -> jax.Array:
    return results[0].astype(jnp.float32)
