"""The dense block-scaled products on Hopper; the kernel is in `kernel.py`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8 import Quantized
from pallas_kernels.gemm_fp8 import kernel, tuned
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.implementation import traced_once


@traced_once('out_dtype', 'config', 'interpret')
def gemm_fp8(
    lhs: Quantized, rhs: Quantized, out_dtype: DTypeLike, config: GemmConfig | None = None, interpret: Any = None
) -> Float[Array, 'M N']:
    """As the reference; K a multiple of 128, N of 64."""
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    config = config or tuned.gemm_config(m, n, k)
    # Shared memory is tiled by 8 rows, which tensor maps must divide evenly: an odd M is padded, copied and cut again.
    extra = -m % 8
    if extra:
        lhs = lhs._replace(values=jnp.pad(lhs.values, ((0, extra), (0, 0))))
    weight = Quantized(rhs.values[None], rhs.scales[None])
    out = jax.ShapeDtypeStruct((m + extra, n), out_dtype)
    schedule = kernel.dense(m + extra, n, k, config)
    out_MN = kernel.product(lhs, weight, out, schedule, config, name='gemm_fp8', interpret=interpret)
    return out_MN[:m] if extra else out_MN


@traced_once('config', 'interpret')
def wgrad_fp8(
    lhs: Quantized,
    rhs: Quantized,
    accumulator_MN: Array | None,
    config: GemmConfig | None = None,
    interpret: Any = None,
) -> Float32[Array, 'M N']:
    """As the reference; K a multiple of 128, M and N of 64."""
    (m, k), n = lhs.values.shape, rhs.values.shape[0]
    config = config or tuned.wgrad_config(m, n, k)
    out = jax.ShapeDtypeStruct((1, m, n), jnp.float32) if accumulator_MN is None else accumulator_MN[None]
    schedule = kernel.dense(m, n, k, config)
    return kernel.product(lhs, rhs, out, schedule, config, name='wgrad_fp8', interpret=interpret)[0]
