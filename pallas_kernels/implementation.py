"""Which code serves a call: by name, or the first of the default order that can."""

import functools
import warnings
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array

Implementation = Literal['reference', 'pallas']


def hopper_cores() -> int | None:
    """Multiprocessors of the Hopper GPU that the call is compiled for; None if it is compiled for anything else.

    The device of an abstract mesh counts before the devices present: programs are compiled for GPUs without any.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind, cores = abstract.device_kind, abstract.num_cores
        return cores or 132 if any(name in kind for name in ('H100', 'H200', 'H800', 'H20', 'GH200')) else None
    if jax.default_backend() != 'gpu':
        return None
    device = jax.devices()[0]
    if getattr(device, 'compute_capability', None) != '9.0':
        return None
    return device.core_count


def traced_once(*static: str) -> Callable[[Callable], Callable]:
    """Marks a function that calls a kernel: calls that differ in nothing but their values share its trace.

    A program lowers and compiles a kernel once for each trace that it holds, half a second each, one after the other. In
    the caller's trace nothing else changes.

    Args:
      static: names of the arguments that are not arrays.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)


def once(x: Array) -> Array:
    """x, a kernel's result that a scan over layers both stacks and goes on with.

    XLA has a kernel write straight into a stack, and runs it a second time for what else reads the result: never behind
    a barrier.
    """
    return jax.lax.optimization_barrier(x)


def choose(operation: str, implementation: str | None, refusal: Callable[[], str | None]) -> Implementation:
    """The implementation that serves a call.

    None takes 'pallas' on a Hopper GPU and 'reference' elsewhere. On a Hopper GPU an input that the kernel does not
    serve goes to the reference with a warning, never in silence.

    Args:
      operation: name of the operation, for messages.
      implementation: 'reference', 'pallas' or None.
      refusal: says why the kernel does not serve this input (the value, then the rule), or None if it does.

    Raises:
      ValueError: the name is unknown.
      NotImplementedError: 'pallas' was asked for by name and cannot serve the input, or there is no Hopper GPU.
    """
    if implementation == 'reference':
        return 'reference'
    if implementation not in (None, 'pallas'):
        raise ValueError(f"{operation}: {implementation=} is unknown, choose 'reference' or 'pallas'")
    if hopper_cores() is None:
        if implementation is None:
            return 'reference'
        raise NotImplementedError(
            f"{operation}: implementation='pallas' needs a Hopper GPU (compute capability 9.0), "
            f'this program is for {jax.default_backend()!r}'
        )
    if (reason := refusal()) is None:
        return 'pallas'
    if implementation == 'pallas':
        raise NotImplementedError(f'{operation}: {reason}')
    warnings.warn(f'{operation} is served by the reference: {reason}', stacklevel=3)
    return 'reference'
