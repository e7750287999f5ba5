"""Where the time of one program goes: its kernels, what XLA says they compute, and their sums by rules.

CUPTI gives names and times of kernels in the order of their launch, XLA's compiled program the instructions in the order
in which they run, each with its `op_name`: the path of functions and named scopes that it came from. The two are laid side
by side:

  kernel                             instruction
  loop_select_fusion_1               %loop_select_fusion.1, which gives its kernel its name
  quantize_rows_mosaic_gpu_kernel    %mpmd_map.75, whose op_name ends in quantize_rows/mpmd_map
  nvjet_..., ...radix_sort...        the library calls between the instructions of the kernels before and after

A name that several kernels have goes to its instructions in turn. Instructions inside loops are not looked at.
"""

import math
import os.path
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pallas_kernels.bench.timing import Clock, LostKernelsError, Work

OTHER = 'other'
PASSES = 10

_HEADER = re.compile(r'(ENTRY )?%([\w.-]+) .*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\(')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_SAME_AS = re.compile(r'\bdeduplicated_name="([^"]*)"')
_ELEMENTS = re.compile(r' = \(?\w+\[([\d,]*)\]')
_CALLS = re.compile(r'\bcalls=%([\w.-]+)')
# What takes no time, or says nothing about where a fusion comes from.
_SILENT = {'parameter', 'constant', 'bitcast', 'broadcast', 'tuple', 'get-tuple-element'}
_LIBRARY = {'custom-call', 'sort'}  # and fusions of kind kCustom, which may be a library's


class Fused(NamedTuple):
    """An instruction inside a fusion: where it comes from, and the number of elements that it computes."""

    op_name: str
    elements: int


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
      kernels: the names that its kernel may have; none if a library chooses it.
      library: whether its kernels may have other names.
      op_name: where it comes from; empty if XLA does not say.
      fused: what a fusion consists of, as far as XLA says where it comes from.
    """

    kernels: tuple[str, ...]
    library: bool
    op_name: str
    fused: tuple[Fused, ...] = ()


class Kernel(NamedTuple):
    """One kernel of a pass: its name, its time, and from where the instruction comes that it computes."""

    name: str
    milliseconds: float
    op_name: str = ''
    fused: tuple[Fused, ...] = ()


class Rule(NamedTuple):
    """Kernels that belong to a part: both expressions are found, `kernel` in the name and `scope` in the `op_name`."""

    part: str
    kernel: str = ''
    scope: str = ''


def kernel_milliseconds(clock: Clock, work: Work, passes: int = PASSES) -> list[tuple[str, float]]:
    """Name and median milliseconds of each kernel of a pass, in the order of launch.

    Raises:
      LostKernelsError: CUPTI did not see the same kernels in every pass.
    """
    work.enqueue()
    work.wait()
    seen = clock.kernels(work, passes)
    size = len(seen) // passes
    rounds = [seen[i * size : (i + 1) * size] for i in range(passes)]
    names = [name for name, _ in rounds[0]]
    if not seen or len(seen) % passes or any([name for name, _ in one] != names for one in rounds):
        raise LostKernelsError(f'CUPTI saw {len(seen)} kernels in {passes} passes, and not the same in each')
    times = zip(*([seconds for _, seconds in one] for one in rounds), strict=True)
    return [(name, 1e3 * statistics.median(seconds)) for name, seconds in zip(names, times, strict=True)]


def instructions(text: str) -> list[Instruction]:
    """The instructions of a compiled program's entry computation, those without a kernel left out."""
    entry: list[tuple[str, str, str]] = []
    bodies: dict[str, list[Fused]] = {}
    here, is_entry = None, False
    for line in text.splitlines():
        if header := _HEADER.match(line):
            is_entry, here = bool(header[1]), bodies.setdefault(header[2], [])
        elif line.startswith('}'):
            here = None
        elif here is not None and (found := _INSTRUCTION.match(line)) and found[2] not in _SILENT:
            if is_entry:
                entry.append((found[1], found[2], line))
            elif op_name := _first(_OP_NAME, line):
                here.append(Fused(op_name, math.prod(int(size) for size in _first(_ELEMENTS, line).split(',') if size)))
    return [_instruction(*one, bodies) for one in entry]


def _instruction(name: str, opcode: str, line: str, bodies: dict[str, list[Fused]]) -> Instruction:
    op_name = _first(_OP_NAME, line)
    fused = tuple(bodies.get(_first(_CALLS, line), ()))
    if 'custom_call_target="mosaic_gpu' in line:
        kernel = op_name.rpartition('/')[0].rpartition('/')[2]
        return Instruction((f'{kernel}_mosaic_gpu_kernel',), False, op_name)
    names = (name,) if opcode != 'custom-call' else ()
    library = opcode in _LIBRARY or 'kind=kCustom' in line
    if same := _first(_SAME_AS, line):
        names = (*names, same)
    return Instruction(tuple(re.sub(r'[.-]', '_', name) for name in names), library, op_name, fused)


def _first(pattern: re.Pattern[str], line: str) -> str:
    found = pattern.search(line)
    return found[1] if found else ''


def located(timings: Sequence[tuple[str, float]], program: Sequence[Instruction]) -> list[Kernel]:
    """The kernels of a pass with the `op_name` of their instructions, empty where none is found."""
    bearers: dict[str, list[int]] = {}
    for index, instruction in enumerate(program):
        for name in instruction.kernels:
            bearers.setdefault(name, []).append(index)
    taken: set[int] = set()
    indices: list[int | None] = []
    for name, _ in timings:
        index = next((i for i in bearers.get(name, ()) if i not in taken), None)
        if index is not None:
            taken.add(index)
        indices.append(index)
    kernels = []
    for place, ((name, milliseconds), index) in enumerate(zip(timings, indices, strict=True)):
        if index is not None:
            kernels.append(Kernel(name, milliseconds, program[index].op_name, program[index].fused))
        else:
            kernels.append(Kernel(name, milliseconds, _of_library(place, indices, program, taken)))
    return kernels


def _of_library(place: int, indices: list[int | None], program: Sequence[Instruction], taken: set[int]) -> str:
    """The `op_name` of a library's kernel: of several calls in a row of which one may be meant, what they share."""
    start = next((i for i in range(place, -1, -1) if indices[i] is not None), -1)
    end = next((i for i in range(place, len(indices)) if indices[i] is not None), len(indices))
    first = indices[start] if start >= 0 else -1
    last = indices[end] if end < len(indices) else len(program)
    assert first is not None
    assert last is not None
    calls = [program[i].op_name for i in range(first + 1, last) if program[i].library and i not in taken]
    if len(calls) == end - start - 1:
        return calls[place - start - 1]
    return os.path.commonpath(calls) if all(calls) and calls else ''


def part_of(kernel: Kernel, rules: Sequence[Rule]) -> str:
    """The part that a kernel belongs to: that of the first rule that holds, `OTHER` if none does.

    A fusion belongs to the part that most of the elements are computed for inside it: its own `op_name` is that of its
    last instruction, which may be no more than the sum of two parts.
    """
    votes = Counter()
    for op_name, elements in kernel.fused:
        if part := _matching(kernel.name, op_name, rules):
            votes[part] += elements
    if votes:
        return votes.most_common(1)[0][0]
    return _matching(kernel.name, kernel.op_name, rules) or OTHER


def _matching(name: str, op_name: str, rules: Sequence[Rule]) -> str | None:
    fits = (rule for rule in rules if re.search(rule.kernel, name) and re.search(rule.scope, op_name))
    return next((rule.part for rule in fits), None)


def sums(kernels: Iterable[Kernel], rules: Sequence[Rule]) -> dict[str, float]:
    """Milliseconds of each part, in the order of the rules, and of `OTHER`, which no rule is about."""
    total = dict.fromkeys([*(rule.part for rule in rules), OTHER], 0.0)
    for kernel in kernels:
        total[part_of(kernel, rules)] += kernel.milliseconds
    return total


def longest(kernels: Iterable[Kernel], rules: Sequence[Rule], part: str = OTHER, count: int = 5) -> list[Kernel]:
    """The kernels of a part that take longest, in that order."""
    members = (kernel for kernel in kernels if part_of(kernel, rules) == part)
    return sorted(members, key=lambda kernel: -kernel.milliseconds)[:count]
