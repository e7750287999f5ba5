"""Operations for NVIDIA Hopper GPUs: arrays in, arrays out, usable without the rest of this project.

One folder an operation: `api.py` is the public function, `reference.py` the specification in plain jax.numpy,
which runs on every backend and says where it rounds. An implementation is chosen by name; one that is asked for
by name and cannot serve its input raises, it never falls back.
"""

from pallas_kernels.grouped_gemm.api import grouped_gemm

__all__ = ['grouped_gemm']
