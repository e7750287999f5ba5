"""What holds for every test: eight virtual CPU devices, checked annotations, a compilation cache between runs.

Variables that are set already are kept. Processes that a test starts inherit them all.
"""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile much and compute little: without optimisation of the generated code compiling takes half the time, and
# without MLIR for each fusion half of that.
FLAGS = {
    'xla_force_host_platform_device_count': DEVICES,
    'xla_backend_optimization_level': 0,
    'xla_backend_extra_options': 'xla_cpu_disable_new_fusion_emitters',
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{flag}={value}'
# XLA makes one thread a device. Calls are queued without waiting, so a later call can hold a thread that a collective
# of an earlier one waits for: XLA aborts after 40 s. Twice the threads end that (it reads their number from NPROC).
os.environ.setdefault('NPROC', str(2 * DEVICES))
os.environ.setdefault('MPLBACKEND', 'Agg')

# A size limit makes jax lock the directory, which the test workers share.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(2**30))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

install_import_hook(['deepseek_jax', 'infer', 'pallas_kernels', 'train'], 'beartype.beartype')


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker('gpu'):
        import jax

        if jax.default_backend() != 'gpu':
            pytest.skip('needs a GPU: JAX_PLATFORMS=cuda,cpu')
