"""What the kernels are compared with: cuBLASLt through torch, XLA, and copies of as many bytes.

torch is optional and no dependency: without it the rows that need it have no ratio. It reads the same random inputs.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import Clock, JaxWork, TorchWork, Work, number_of_sets
from pallas_kernels.fp8 import Quantized

CUBLAS = 'cuBLASLt (torch._scaled_mm)'
COPY = 'copy of as many bytes'
CEILING_SIZE = 8192
CEILING_BYTES = 2**31


class PeerWork(NamedTuple):
    """The peer's calls, and its results for the first input set as jax arrays, if it computes the same numbers."""

    work: Work
    results: Callable[[], Any] | None


@functools.cache
def load_torch() -> Any:
    """The module torch.

    Raises:
      RuntimeError: it is not installed or sees no GPU.
    """
    try:
        torch = importlib.import_module('torch')
    except ImportError as error:
        raise RuntimeError('torch is not installed') from error
    if not torch.cuda.is_available():
        raise RuntimeError('torch sees no GPU')
    return torch


def to_torch(x: jax.Array) -> Any:
    """A torch tensor of the same bytes on the same device; float8 goes over as bytes."""
    torch = load_torch()
    if x.dtype != jnp.float8_e4m3fn:
        return torch.from_dlpack(jax.block_until_ready(x))
    return torch.from_dlpack(jax.block_until_ready(_as_bytes(x))).view(torch.float8_e4m3fn)


@jax.jit
def _as_bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def scaled_products(sets: Sequence[tuple[Quantized, Quantized]], *, blocks: bool, out: str) -> PeerWork:
    """`lhs @ rhs.T` by cuBLASLt with float32 scales, of 1x128 tiles on the left.

    Args:
      sets: values (M, K) with scales (k, Q), of which torch gets those of the M rows, and values (N, K).
      blocks: the right-hand scales are of 128x128 blocks, (n, k), not of 1x128 tiles.
      out: torch's name of the result's dtype.
    """
    torch = load_torch()
    calls = []
    for lhs, rhs in sets:
        rows, columns = lhs.values.shape[0], rhs.values.shape[0]
        rhs_scales = to_torch(rhs.scales if blocks else rhs.scales[:, :columns])
        operands = (to_torch(lhs.values), to_torch(rhs.values).T, to_torch(lhs.scales[:, :rows]).T)
        calls.append(
            functools.partial(
                torch._scaled_mm, *operands, rhs_scales.T if blocks else rhs_scales, out_dtype=getattr(torch, out)
            )
        )
    return PeerWork(TorchWork(torch, calls), lambda: from_torch(calls[0]()))


def rowwise_grouped_products(sets: Sequence[tuple[Quantized, Quantized, jax.Array]], ends_E: jax.Array) -> PeerWork:
    """torch's grouped FP8 product, of coarser scales: one a row and one a column, here all ones. bfloat16.

    Args:
      sets: values (M, K) and (E, N, K).
      ends_E: int32 row past each group's last.
    """
    torch = load_torch()
    ends = to_torch(ends_E)
    calls = []
    for lhs, rhs, _ in sets:
        ones = [torch.ones(shape, device='cuda') for shape in (lhs.values.shape[:1], rhs.values.shape[:2])]
        operands = to_torch(lhs.values), to_torch(rhs.values).transpose(1, 2), *ones, ends
        calls.append(functools.partial(torch._scaled_grouped_mm, *operands, out_dtype=torch.bfloat16))
    return PeerWork(TorchWork(torch, calls), None)


def from_torch(x: Any) -> jax.Array:
    """A jax array of the same bytes; waits for torch."""
    load_torch().cuda.synchronize()
    return jnp.from_dlpack(x)


def without_promotion(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """`lhs @ rhs.T` of e4m3 matrices by cuBLASLt with fast accumulation: sums stay in the tensor cores. float32."""
    torch = load_torch()
    one = torch.ones((), device='cuda')
    return from_torch(
        torch._scaled_mm(
            to_torch(lhs), to_torch(rhs).T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
        )
    )


def copies(moved_bytes: int) -> list[Work]:
    """Reads half of `moved_bytes` and writes as many, in one elementwise kernel: XLA's, and torch's if it is there."""
    size = -(-moved_bytes // 8)
    keys = jax.random.split(jax.random.key(2), number_of_sets(4 * size))
    make = jax.jit(lambda key: jax.random.bits(key, (size,), jnp.uint32))
    sets = [(make(key),) for key in keys]
    works: list[Work] = [JaxWork(lambda x: ~x, sets)]
    try:
        torch = load_torch()
    except RuntimeError:
        return works
    tensors = [to_torch(jax.lax.bitcast_convert_type(x, jnp.int32)) for (x,) in sets]
    calls = [functools.partial(torch.bitwise_not, x, out=torch.empty_like(x)) for x in tensors]
    return [*works, TorchWork(torch, calls)]


def copy_gbs(clock: Clock) -> float:
    """Rate of the fastest large copy, bytes read and written: a kernel of XLA or torch, or the copy engine."""
    times, _ = clock.microseconds(copies(CEILING_BYTES))
    best = CEILING_BYTES / min(times) * 1e-3
    try:
        torch = load_torch()
    except RuntimeError:
        return best
    source = torch.randint(0, 255, (CEILING_BYTES // 2,), dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    # This one is no kernel.
    (us,), _ = clock.microseconds([TorchWork(torch, [lambda: target.copy_(source)])], 'span')
    return max(best, CEILING_BYTES / us * 1e-3)


def gemm_tflops(clock: Clock) -> float:
    """Rate of the fastest large product: FP8 with one scale a matrix by cuBLASLt; 0 without torch."""
    try:
        torch = load_torch()
    except RuntimeError:
        return 0.0
    size = CEILING_SIZE
    lhs, rhs = ((160 * torch.randn(size, size, device='cuda')).clamp(-448, 448).to(torch.float8_e4m3fn) for _ in 'ab')
    one = torch.ones((), device='cuda')
    best = 0.0
    for fast in (False, True):
        call = functools.partial(torch._scaled_mm, lhs, rhs.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)
        (us,), _ = clock.microseconds([TorchWork(torch, [call])])
        best = max(best, 2 * size**3 / us * 1e-6)
    return best


def free() -> None:
    """Gives cached memory of torch back to the device."""
    try:
        load_torch().cuda.empty_cache()
    except RuntimeError:
        return
