"""How much a long sum loses: `gemm_fp8`, which promotes every 128 products, and cuBLASLt that sums in the tensor cores.

All products are positive, so what is cut off each time adds up and nothing cancels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Row, first_line
from pallas_kernels.fp8 import BLOCK, Quantized, blocks, round_up
from pallas_kernels.gemm_fp8.api import gemm_fp8

ROWS, COLUMNS, DEPTH = 256, 256, 16384


def measure() -> Row:
    """A row without times: relative errors `|out - exact| / |exact|` against float64, and peer's over ours as ratio."""
    shape = {'M': ROWS, 'N': COLUMNS, 'K': DEPTH}
    row = Row('accumulation', 'positive products', shape, 0, 0, peer='cuBLASLt, fast accumulation')
    errors: dict[str, float | None] = {}
    try:
        keys = jax.random.split(jax.random.key(0), 2)
        lhs, rhs = (positive(key, rows) for key, rows in zip(keys, (ROWS, COLUMNS), strict=True))
        exact = np.asarray(lhs, np.float64) @ np.asarray(rhs, np.float64).T
        ones = (
            Quantized(lhs, jnp.ones((blocks(DEPTH), round_up(ROWS, BLOCK)))),
            Quantized(rhs, jnp.ones((blocks(COLUMNS), blocks(DEPTH)))),
        )
        ours = gemm_fp8(*ones, out_dtype=jnp.dtype(jnp.float32), implementation='pallas')
        errors['error'] = error = relative_error(ours, exact)
    except Exception as raised:  # as in `cases.measure`
        return dataclasses.replace(row, failure=first_line(raised))
    try:
        errors['peer_error'] = peer_error = relative_error(peers.without_promotion(lhs, rhs), exact)
        errors['ratio'] = peer_error / error if error else None
    except Exception as raised:  # torch missing, or a version that does not write float32
        row = dataclasses.replace(row, peer_failure=first_line(raised))
    return dataclasses.replace(row, **errors)


def positive(key: jax.Array, rows: int) -> jax.Array:
    """e4m3 values of [0.5, 1.5)."""
    return jax.random.uniform(key, (rows, DEPTH), minval=0.5, maxval=1.5).astype(jnp.float8_e4m3fn)


def relative_error(result: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(result, np.float64) - exact) / np.linalg.norm(exact))
