"""Cases of `quantize_fp8`: what reads and writes memory around the products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case
from pallas_kernels.fp8 import dequantize_blocks, dequantize_rows
from pallas_kernels.quantize_fp8 import api

ROWS = [(4096, 7168), (32768, 7168)]
WEIGHTS = [(7168, 4096), (7168, 16384)]

OPERATIONS: dict[str, Callable[..., Any]] = {
    'rows': api.quantize_rows,
    'columns': api.quantize_columns,
    'rows_and_columns': api.quantize_rows_and_columns,
    'e5m6': api.quantize_e5m6,
    'blocks': api.quantize_blocks,
}


def cases(quick: bool) -> list[Case]:
    """Activations in bfloat16, weights in float32 and bfloat16; the quick ones are those of 4096 rows."""
    of_rows = ROWS[:1] if quick else ROWS
    activations = [case(name, shape, 'bfloat16') for name in OPERATIONS if name != 'blocks' for shape in of_rows]
    of_weights = WEIGHTS[:1] if quick else WEIGHTS
    return activations + [case('blocks', shape, dtype) for shape in of_weights for dtype in ('float32', 'bfloat16')]


def case(name: str, shape: tuple[int, int], dtype: str) -> Case:
    """One quantisation of a normal matrix. The error is that of the values that the results stand for."""
    operation, dense = OPERATIONS[name], _DENSE[name]
    letters = ('K', 'N') if name == 'blocks' else ('M', 'K')
    return Case(
        op='quantize_fp8',
        name=f'{name} {dtype}',
        shape=dict(zip(letters, shape, strict=True)),
        flops=0,
        inputs=lambda key: (jax.random.normal(key, shape, jnp.dtype(dtype)),),
        run=operation,
        reference=lambda x: dense(operation(x, implementation='reference')),
        peer_name=peers.COPY,
        dense=jax.jit(dense),
    )


_DENSE: dict[str, Callable[[Any], Any]] = {
    'rows': dequantize_rows,
    'columns': dequantize_rows,
    'rows_and_columns': lambda results: [dequantize_rows(x) for x in results],
    'e5m6': lambda packed: api.dequantize_e5m6(packed, dtype=jnp.dtype(jnp.float32)),
    'blocks': lambda results: [dequantize_blocks(*x) for x in results],
}
