"""What the devices of a compiled program exchange, read off its scheduled HLO text.

A collective is started and done with at different places of the schedule; kernels in between run while data travel. What
stands in a loop's body counts as often as the loop goes round, where XLA knows how often.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
_PRODUCTS = ('mosaic_gpu', '__cublas', '__triton_gemm', '__triton_nested_gemm_fusion')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes that it goes along; empty if the program names none.
      devices: that take part in one exchange.
      result_bytes: of what a device has afterwards, each time.
      times: how often a device takes part.
      scope: where the program says that it comes from.
      products: kernels and matrix products that run between its start and its end.
      others: other kernels there.
      free: kernels and matrix products of the same loop body that could run there: they neither need it nor are needed by it.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    result_bytes: int
    times: int
    scope: str
    products: int
    others: int
    free: int

    @property
    def sent_bytes(self) -> float:
        """What a device sends each time, at least: to each other device its part, in a reduction there and back."""
        others = self.devices - 1
        shares = {
            'all-reduce': 2 * others / self.devices,
            'reduce-scatter': others,
            'collective-permute': 1,
        }
        return float(self.result_bytes * shares.get(self.kind, others / self.devices))


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.rest[: _end(self.rest, 1)])


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a program, `jax.stages.Compiled.as_text()`, in the order of its schedule."""
    computations = dict(_computations(hlo))
    entry = re.search(r'^ENTRY %?([\w.\-]+)', hlo, re.MULTILINE)
    return [] if entry is None else list(_walk(computations, entry[1], 1))


def _computations(hlo: str) -> Iterator[tuple[str, list[_Instruction]]]:
    name, instructions = None, []
    for line in hlo.splitlines():
        if head := re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line):
            name, instructions = head[1], []
        elif line.startswith('}') and name is not None:
            yield name, instructions
            name = None
        elif name is not None and (found := _INSTRUCTION.match(line)):
            instructions.append(_instruction(*found.groups()))


def _instruction(name: str, text: str) -> _Instruction:
    end = _end(text) if text.startswith('(') else text.find(' ')
    opcode, _, rest = text[end + 1 :].partition('(')
    return _Instruction(name, text[:end], opcode, rest)


def _end(text: str, depth: int = 0) -> int:
    """Where all parentheses are closed, of which so many are open at the beginning."""
    depths = itertools.accumulate(((character == '(') - (character == ')') for character in text), initial=depth)
    return next((place for place, depth in enumerate(depths) if place and depth == 0), len(text))


def _walk(computations: dict[str, list[_Instruction]], name: str, times: int) -> Iterator[Collective]:
    instructions = computations[name]
    needs = {one.name: one.operands for one in instructions}
    needed_by: dict[str, list[str]] = {name: [] for name in needs}
    for one, operands in needs.items():
        for operand in needed_by.keys() & operands:
            needed_by[operand].append(one)
    runs = {one.name: _runs(computations, one) for one in instructions}
    for index, instruction in enumerate(instructions):
        for called, rounds in _called(instruction):
            yield from _walk(computations, called, times * rounds)
        kind = instruction.opcode.removesuffix('-start')
        if kind in KINDS:
            window, result = _window(instructions, index)
            bound = _reach(needs, instruction.name) | _reach(needed_by, instruction.name)
            free = sum(kind == 'product' and name not in bound for name, kind in runs.items())
            yield _collective(kind, instruction, result, times, [runs[one.name] for one in window], free)


def _reach(edges: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """Everything that there is a way to."""
    found, left = {start}, [start]
    while left:
        more = {name for name in edges.get(left.pop(), ()) if name not in found}
        found |= more
        left += more
    return found


def _called(instruction: _Instruction) -> Iterator[tuple[str, int]]:
    """Computations whose schedules an instruction goes through, and how often."""
    if instruction.opcode == 'while':
        rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
        for called in re.findall(r'body=%?([\w.\-]+)', instruction.rest):
            yield called, 1 if rounds is None else int(rounds[1])
    elif instruction.opcode in ('call', 'conditional'):
        for called in re.findall(r'(?:to_apply|\w+_computation)=%?([\w.\-]+)', instruction.rest):
            yield called, 1
        for branches in re.findall(r'branch_computations=\{([^}]*)\}', instruction.rest):
            yield from ((called.strip().lstrip('%'), 1) for called in branches.split(','))


def _window(instructions: Sequence[_Instruction], index: int) -> tuple[Sequence[_Instruction], str]:
    """What is scheduled between a collective's start and its end, and the type of its result."""
    start = instructions[index]
    if not start.opcode.endswith('-start'):
        return [], start.type
    waited = re.compile(rf'%{re.escape(start.name)}[,)]')
    for end in range(index + 1, len(instructions)):
        if instructions[end].opcode == start.opcode.replace('-start', '-done') and waited.search(
            instructions[end].rest
        ):
            return instructions[index + 1 : end], instructions[end].type
    raise ValueError(f'{start.name} is started and never done')


def _runs(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> str | None:
    """'product' or 'other' for what runs on the device, None for what only names data."""
    if instruction.opcode == 'custom-call':
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        return 'product' if target is not None and target[1].startswith(_PRODUCTS) else None
    if instruction.opcode == 'fusion':
        return 'product' if any(kind in instruction.rest for kind in _PRODUCTS) else 'other'
    if instruction.opcode in ('while', 'call', 'conditional'):
        inside = {_runs(computations, one) for called, _ in _called(instruction) for one in computations[called]}
        return 'product' if 'product' in inside else 'other'
    return 'other' if instruction.opcode in ('dot', 'convolution', 'copy', 'sort') else None


def _collective(
    kind: str, instruction: _Instruction, result: str, times: int, window: Sequence[str | None], free: int
) -> Collective:
    axes, devices = _group(instruction.rest)
    scope = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
        kind=kind,
        axes=axes,
        devices=devices,
        result_bytes=_bytes(result),
        times=times,
        scope='' if scope is None else scope[1],
        products=window.count('product'),
        others=window.count('other'),
        free=free,
    )


def _group(rest: str) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a collective goes along, and the number of devices in a group."""
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = tuple(axis for axis in re.findall(r"'(\w+)'", found[2]) if sizes[axis] > 1)
        return axes, math.prod(sizes[axis] for axis in axes)
    if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', rest):
        return (), int(found[1])
    if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
        return (), len(found[1].split(','))
    return (), 2


def _bytes(type_: str) -> int:
    sizes = (_bits(dtype) * math.prod(int(n) for n in dims.split(',') if n) for dtype, dims in _ARRAY.findall(type_))
    return sum(sizes) // 8


def _bits(dtype: str) -> int:
    found = re.search(r'\d+', dtype)
    return 8 if found is None else int(found[0])  # pred has no number
