"""Times every candidate configuration of a kernel at every shape of the benchmark, and names the fastest."""

import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import checks, gemm_fp8, grouped_gemm_fp8, quantize_fp8, wgrad_fp8
from pallas_kernels.bench.cases import Case, first_line, with_rows
from pallas_kernels.bench.timing import Clock, JaxWork
from pallas_kernels.gemm_fp8 import sm90 as gemm_sm90
from pallas_kernels.gemm_fp8 import tuned as gemm_tuned
from pallas_kernels.grouped_gemm_fp8 import sm90 as grouped_sm90
from pallas_kernels.grouped_gemm_fp8 import tuned as grouped_tuned
from pallas_kernels.quantize_fp8 import sm90 as quantize_sm90
from pallas_kernels.quantize_fp8 import tuned as quantize_tuned

ERROR_LIMIT = 1e-4  # a tile that is missing or wrong errs far more, rounding the output to bfloat16 far less


@dataclasses.dataclass(frozen=True)
class Space:
    """What is searched for one operation.

    Attributes:
      cases: the shapes.
      key: what a configuration is looked up by.
      candidates: configurations worth trying at a case.
      run: the kernel with a configuration: a function of the case's inputs.
    """

    cases: Callable[[bool], list[Case]]
    key: Callable[[Case], dict[str, Any]]
    candidates: Callable[[Case], Sequence[Any]]
    run: Callable[[Case, Any], Callable[..., Any]]


def _gemm_key(case: Case) -> dict[str, Any]:
    return {letter.lower(): size for letter, size in case.shape.items()}


def _gemm_run(case: Case, config: Any) -> Callable[..., Any]:
    if case.op == 'wgrad_fp8':
        return lambda lhs, rhs: gemm_sm90.wgrad_fp8(lhs, rhs, None, config=config)
    return lambda lhs, rhs: gemm_sm90.gemm_fp8(lhs, rhs, jnp.dtype(jnp.bfloat16), config=config)


def _grouped_run(case: Case, config: Any) -> Callable[..., Any]:
    kernel = getattr(grouped_sm90, case.op)
    last = None if case.op == 'grouped_wgrad_fp8' else jnp.dtype(jnp.bfloat16)
    return lambda lhs, rhs, sizes_E: kernel(lhs, rhs, sizes_E, last, config=config)


def _grouped_candidates(case: Case) -> Sequence[Any]:
    m, n, k, groups = case.shape.values()
    return grouped_tuned.candidates(case.op, m, groups, n, k)


def _quantize_key(case: Case) -> dict[str, Any]:
    operation, dtype = case.name.split()
    rows, columns = case.shape.values()
    return {'operation': operation, 'dtype': dtype, 'rows': rows, 'columns': columns}


def _quantize_run(case: Case, config: Any) -> Callable[..., Any]:
    kernel = getattr(quantize_sm90, f'quantize_{case.name.split()[0]}')
    return lambda x: kernel(x, config=config)


SPACES = {
    'gemm_fp8': Space(
        gemm_fp8.cases, _gemm_key, lambda case: gemm_tuned.candidates(case.op, **_gemm_key(case)), _gemm_run
    ),
    'wgrad_fp8': Space(
        wgrad_fp8.cases, _gemm_key, lambda case: gemm_tuned.candidates(case.op, **_gemm_key(case)), _gemm_run
    ),
    'grouped_gemm_fp8': Space(
        grouped_gemm_fp8.cases,
        lambda case: {'operation': case.op, 'groups': case.name, **_gemm_key(case)},
        _grouped_candidates,
        _grouped_run,
    ),
    'quantize_fp8': Space(
        quantize_fp8.cases,
        _quantize_key,
        lambda case: quantize_tuned.candidates(_quantize_key(case)['operation']),
        _quantize_run,
    ),
}


def search(
    op: str, clock: Clock, budget: float, quick: bool, rows: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The fastest right configuration at every shape: {op, key, config, us}; progress goes to standard error.

    Args:
      budget: seconds for compiling at one shape; candidates that were not reached are counted and left out.
      rows: only shapes with these numbers of rows; None searches all.
    """
    space, winners, seen = SPACES[op], [], set()
    for case in with_rows(space.cases(quick), rows):
        name = json.dumps(key := space.key(case))
        if name in seen:
            continue
        seen.add(name)
        tried = try_candidates(space, case, clock, budget)
        for entry in tried:
            print(f'{op} {name} {json.dumps(entry)}', file=sys.stderr, flush=True)
        if right := [entry for entry in tried if entry['us'] is not None]:
            best = min(right, key=lambda entry: entry['us'])
            winners.append({'op': op, 'key': key, 'config': best['config'], 'us': best['us']})
    return winners


def try_candidates(space: Space, case: Case, clock: Clock, budget: float) -> list[dict[str, Any]]:
    """Each candidate as {config, us, failure}; exactly one of the last two is None."""
    sets = case.input_sets()
    expected = jax.jit(case.reference)(*sets[0])
    configs = list(space.candidates(case))

    def build(config: Any) -> JaxWork:
        return JaxWork(space.run(case, config), sets)

    tried = []
    for config, work, failure in compile_all(build, configs, budget):
        us = None
        if work is not None:
            try:
                results, _ = checks.in_poisoned_memory(work.run_once)
                error = checks.difference(case.dense(results[0]), expected)
                del results
                if error <= ERROR_LIMIT:
                    (us,), _ = clock.microseconds([work])
                else:  # NaN, too
                    failure = f'wrong: error {error:.1e}'
            except Exception as raised:  # launching can fail where compiling did not
                failure = first_line(raised)
        tried.append({'config': dataclasses.asdict(config), 'us': us, 'failure': failure})
    return tried


def compile_all[C, W](
    build: Callable[[C], W], configs: Sequence[C], budget: float
) -> list[tuple[C, W | None, str | None]]:
    """(config, what was built or None, why not or None), built in threads, for at most `budget` seconds of starting."""
    deadline = time.monotonic() + budget

    def one(config: C) -> W:
        if time.monotonic() > deadline:
            raise TimeoutError('the budget was spent before its turn')
        return build(config)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(one, config) for config in configs]
    outcomes = []
    for config, future in zip(configs, futures, strict=True):
        raised = future.exception()
        if raised is None:
            outcomes.append((config, future.result(), None))
        else:
            outcomes.append((config, None, first_line(raised)))
    return outcomes
