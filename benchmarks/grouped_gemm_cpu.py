"""Grouped matrix product on a CPU: the blocked form against `jax.lax.ragged_dot`, forward and backward, in one run.

`python benchmarks/grouped_gemm_cpu.py` prints milliseconds and the ratio for each shape, and writes
`benchmarks/results/grouped_gemm_cpu.json`.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped_gemm

RESULTS = pathlib.Path(__file__).parent / 'results' / 'grouped_gemm_cpu.json'
SHAPES = {
    'tiny training (8 experts, 2 of them)': (4096, 128, 128, 8),
    'tiny decode (8 experts, one token)': (2, 128, 128, 8),
    '64 experts, 6 of them, 512 tokens': (3072, 256, 128, 64),
}
REPEATS = 15


def milliseconds(implementation: str, operands: tuple[jax.Array, ...]) -> float:
    """Median time of value and gradients of both matrices, after a warm-up."""

    @jax.jit
    def gradients(lhs, rhs, sizes):
        return jax.value_and_grad(lambda *x: jnp.sum(grouped_gemm(*x, sizes, implementation) ** 2), (0, 1))(lhs, rhs)

    jax.block_until_ready(gradients(*operands))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(gradients(*operands))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    rows = []
    for name, (num_rows, inner, columns, groups) in SHAPES.items():
        rng = np.random.default_rng(0)
        sizes = rng.multinomial(num_rows, rng.dirichlet(np.ones(groups)))
        operands = (
            jnp.asarray(rng.standard_normal((num_rows, inner)), jnp.float32),
            jnp.asarray(rng.standard_normal((groups, inner, columns)), jnp.float32),
            jnp.asarray(sizes, jnp.int32),
        )
        ours, peer = milliseconds('blocked', operands), milliseconds('reference', operands)
        rows.append({'shape': name, 'blocked_ms': ours, 'ragged_dot_ms': peer, 'ratio': peer / ours})
        print(f'{name:40} blocked {ours:8.2f} ms   ragged_dot {peer:8.2f} ms   {peer / ours:5.1f}x')
    result = {
        'device': f'{os.cpu_count()} CPU cores, {platform.machine()}',
        'jax': jax.__version__,
        'python': platform.python_version(),
        'command': ' '.join(['python', *sys.argv]),
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'rows': rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
