"""`python -m pallas_kernels.bench [OP]...`: speed and accuracy of the kernels on this machine's Hopper GPU.

`python -m pallas_kernels.bench search OP`: times the candidate configurations of a kernel and prints the winners.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

# Before jax starts: torch takes memory from the same device.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

from pallas_kernels.bench import (
    accumulation,
    cases,
    decode_mla,
    expert_ffn,
    flash_mla,
    gemm_fp8,
    grouped_gemm_fp8,
    linear_fp8,
    peers,
    quantize_fp8,
    report,
    roofline,
    search,
    swiglu_quantize,
    timing,
    wgrad_fp8,
)
from pallas_kernels.implementation import hopper_cores

CASES = {
    'gemm_fp8': gemm_fp8.cases,
    'wgrad_fp8': wgrad_fp8.cases,
    'quantize_fp8': quantize_fp8.cases,
    'linear_fp8': linear_fp8.cases,
    'grouped_gemm_fp8': grouped_gemm_fp8.cases,
    'swiglu_quantize': swiglu_quantize.cases,
    'expert_ffn': expert_ffn.cases,
    'flash_mla': flash_mla.cases,
    'decode_mla': decode_mla.cases,
}
OPS = [*CASES, 'accumulation']


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}\n')


def main(arguments: list[str]) -> int:
    """Runs the command line. Returns 0; 1 if a row has no time or error; 2 for bad input or without a Hopper GPU."""
    if arguments[:1] == ['search']:
        return _search(arguments[1:])
    parser = _Parser(
        prog='python -m pallas_kernels.bench',
        description='Times each operation next to a peer of the same run. Without OP: all of them.',
        epilog='`python -m pallas_kernels.bench search --help`: search for configurations.',
    )
    parser.add_argument('ops', nargs='*', metavar='OP', help=', '.join(OPS))
    parser.add_argument('--quick', action='store_true', help='few shapes')
    parser.add_argument('--rows', type=int, nargs='+', metavar='M', help='only shapes with these numbers of rows')
    parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json', help='write the rows, device and versions')
    parser.add_argument('--timing', choices=timing.METHODS, help='see timing.py; kernels where CUPTI serves')
    parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.png', help='draw the roofline')
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in OPS:
            parser.error(f'{op!r} is no operation, choose of {", ".join(OPS)}')
    if (code := _no_gpu()) or (code := _no_folder(options.output, options.plot)):
        return code

    if (clock := _clock(options.timing)) is None:
        return 2
    machine = report.machine()
    ceilings = cases.Ceilings(peers.copy_gbs(clock), peers.gemm_tflops(clock))
    print(f'{machine["device"]}, jax {machine["jax"]}, torch {machine["torch"]}, driver {machine["driver"]}')
    print(f'times are of {clock.method}; copy {ceilings.copy_gbs:.0f} GB/s, product {ceilings.gemm_tflops:.0f} TFLOP/s')
    print(report.HEADER, flush=True)
    command = ' '.join(['python -m pallas_kernels.bench', *arguments])
    rows: list[cases.Row] = []
    for op in OPS:
        if options.ops and op not in options.ops:
            continue
        for measure in _measurements(op, options.quick, options.rows, clock):
            rows.append(measure())
            peers.free()
            ceilings = ceilings.including(rows)
            rows = [cases.with_share(row, ceilings) for row in rows]
            print(report.line(rows[-1]), flush=True)
            if options.output:  # after every row: a run that is cut short keeps what it measured
                report.write_json(options.output, rows, ceilings, machine=machine, command=command, timing=clock.method)
    if options.plot:
        roofline.plot(options.plot, rows, ceilings, machine['device'])
    return int(any(row.failure for row in rows))


def _measurements(op: str, quick: bool, rows: list[int] | None, clock: timing.Clock) -> list[Callable[[], cases.Row]]:
    if op == 'accumulation':
        return [accumulation.measure]
    return [functools.partial(cases.measure, case, clock) for case in cases.with_rows(CASES[op](quick), rows)]


def _search(arguments: list[str]) -> int:
    parser = _Parser(
        prog='python -m pallas_kernels.bench search',
        description='Times the candidate configurations at each shape; prints [{op, key, config, us}, ...].',
    )
    parser.add_argument('op', choices=search.SPACES)
    parser.add_argument('--quick', action='store_true', help='few shapes')
    parser.add_argument('--rows', type=int, nargs='+', metavar='M', help='only shapes with these numbers of rows')
    parser.add_argument('--budget', type=float, default=120, metavar='SECONDS', help='for compiling, each shape: 120')
    parser.add_argument('--timing', choices=timing.METHODS, help='see timing.py; kernels where CUPTI serves')
    parser.add_argument('--output', type=pathlib.Path, metavar='FILE', help='write here, not to standard output')
    options = parser.parse_args(arguments)
    if (code := _no_gpu()) or (code := _no_folder(options.output)):
        return code
    if (clock := _clock(options.timing)) is None:
        return 2
    winners = search.search(options.op, clock, options.budget, options.quick, options.rows)
    text = json.dumps(winners, indent=1)
    if options.output:
        options.output.write_text(text + '\n', encoding='utf-8')
    else:
        print(text)
    return 0


def _clock(method: timing.Method | None) -> timing.Clock | None:
    try:
        return timing.Clock.detect(method)
    except RuntimeError as error:
        print(f'error: {error}'.partition('\n')[0], file=sys.stderr)
        return None


def _no_gpu() -> int:
    if hopper_cores() is not None:
        return 0
    print('error: the kernels need a Hopper GPU (compute capability 9.0), jax sees none here', file=sys.stderr)
    return 2


def _no_folder(*paths: pathlib.Path | None) -> int:
    """2, with a message, if a file could not be written where it is wanted: better now than after the run."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            print(f'error: {path.parent} is no folder', file=sys.stderr)
            return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
