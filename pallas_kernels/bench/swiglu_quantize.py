"""Cases of `swiglu_quantize`: SwiGLU between the two products of an expert, and its gradients."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case, random_rows
from pallas_kernels.fp8 import Quantized, dequantize_rows
from pallas_kernels.swiglu_quantize import api

ROWS = [4096, 32768, 65536]
WIDTH = 2048


def cases(quick: bool) -> list[Case]:
    """Forward and backward, with and without the transposed copy; the quick ones are those of 4096 rows."""
    names = ['forward', 'forward_rows', 'backward', 'backward_rows']
    return [case(name, rows, WIDTH) for name in names for rows in (ROWS[:1] if quick else ROWS)]


def case(name: str, rows: int, width: int) -> Case:
    """One call with gate weights. The error is that of the values that the results stand for."""
    backward = name.startswith('backward')
    operation = api.swiglu_quantize_backward if backward else api.swiglu_quantize
    run = functools.partial(operation, columns=not name.endswith('_rows'))

    def inputs(key: jax.Array) -> tuple:
        gate_up, d_hidden, weight = jax.random.split(key, 3)
        gate_weight_M = jax.random.uniform(weight, (rows,))
        if backward:
            d_hidden_MH = jax.random.normal(d_hidden, (rows, width), jnp.bfloat16)
            return random_rows(gate_up, rows, 2 * width), d_hidden_MH, gate_weight_M
        return jax.random.normal(gate_up, (rows, 2 * width), jnp.bfloat16), gate_weight_M

    return Case(
        op='swiglu_quantize',
        name=name,
        shape={'M': rows, 'H': width},
        flops=0,
        inputs=inputs,
        run=run,
        reference=lambda *inputs: _dense(run(*inputs, implementation='reference')),
        peer_name=peers.COPY,
        dense=jax.jit(_dense),
    )


def _dense(results: tuple) -> tuple:
    is_quantized = lambda x: isinstance(x, Quantized)  # noqa: E731
    return jax.tree.map(lambda x: dequantize_rows(x) if is_quantized(x) else x, results, is_leaf=is_quantized)
