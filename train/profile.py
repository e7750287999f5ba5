"""Where the time of a training step goes on a GPU: a table by part, and what share of the peak the step reaches.

`python -m train --profile N` takes 3 steps to warm up, N steps by the clock, and N more under JAX's profiler, after another
one to warm up. For the last ones the step is compiled once more, so that kernels are launched one by one: those that a CUDA
graph launches bear no instruction in a trace. A traced step has longer gaps, then. Rates are those of the steps by the
clock; parts are those of the traced ones.

A trace has a line for every stream of a GPU, with an event for each kernel and each copy: its name, its start and its
duration from CUPTI, and `hlo_op`, the instruction that launched it. Which part of the model that instruction comes
from only the program knows: the trace holds it too, as a protocol buffer, with the path of functions and named scopes
of each instruction, and of those that were fused into it:

  kernel                               path                                        part
  flash_mla_mosaic_gpu_kernel          .../attend/flash_mla                        attention
  grouped_gemm_fp8_mosaic_gpu_kernel   .../transpose(jvp(...))/.../experts/...     experts: input gradients
  nvjet_..., gemm_fusion_dot_4         .../mtp/linear/dot_general                  linear layers in bf16
  loop_add_fusion_7                    .../moe_layers/add                          norms and elementwise

A fusion has the path that most of its elements are computed under. On a CPU there are no kernels to tell apart: the
table is left out, the rates stay.
"""

import collections
import itertools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from deepseek_jax import flops
from train import processes

REPORT_FILE = 'profile.json'
WARM_UP = 3

ATTENTION = 'attention'
LINEAR_FP8 = 'linear layers in fp8'
LINEAR_BF16 = 'linear layers in bf16'
LINEAR_JOINED = 'linear layers joined and cut'
EXPERTS_FORWARD = 'experts: outputs'
EXPERTS_DGRAD = 'experts: input gradients'
EXPERTS_WGRAD = 'experts: weight gradients'
WEIGHTS = 'weights quantised or cast'
QUANTISE = 'activations quantised'
SWIGLU = 'SwiGLU'
ROUTES = 'permute and combine'
ROUTER = 'router and sort'
STACKS = 'layers stacked and sliced'
ELEMENTWISE = 'norms and elementwise'
EMBEDDING = 'embedding'
LOSS = 'head and loss'
OPTIMIZER = 'optimizer and accumulation'
DISPATCH = 'tokens on their way to experts and back, exposed'
CONTEXT = 'keys of other devices, exposed'
STAGES = 'rows on their way through stages, exposed'
GATHER = 'parameters gathered, exposed'
REDUCE = 'gradients reduced, exposed'
COLLECTIVES = 'other collectives, exposed'
COPIES = 'copies and fills, exposed'
OTHER = 'other'
IDLE = 'idle'

BEHIND = (DISPATCH, CONTEXT, STAGES, GATHER, REDUCE, COLLECTIVES, COPIES)
"""Parts whose time counts only where nothing else runs."""


class Event(NamedTuple):
    """Something that ran on a device: a kernel, a copy, a fill.

    Attributes:
      name: of the kernel, or what kind of copy.
      scope: path of functions and named scopes that it computes; empty if that is not known.
      start, duration: nanoseconds.
    """

    name: str
    scope: str
    start: float
    duration: float


class Rule(NamedTuple):
    """Events that belong to a part: both expressions are found, `kernel` in the name and `scope` in the path."""

    part: str
    kernel: str = ''
    scope: str = ''


def _within(*scopes: str) -> str:
    """Matches a path with one of these scopes on it, bare or as in `transpose(jvp(loss))`."""
    return rf'(^|[/(])({"|".join(scopes)})([/)]|$)'


# What the backward pass computes again is not a gradient.
_BACKWARD = r'^(?!.*rematted_computation).*transpose\('

_COLLECTIVE = r'(?i)^(nccl|nvshmem)|all_?(reduce|gather|to_?all)|reduce_?scatter|collective_?permute'

RULES = (
    Rule(COPIES, kernel='^Mem(cpy|set)'),
    Rule(LOSS, scope=_within('loss', 'head')),
    Rule(ATTENTION, kernel='^(flash|decode)_mla'),
    Rule(EXPERTS_WGRAD, kernel='^grouped_wgrad_'),
    Rule(EXPERTS_DGRAD, kernel='^(grouped|masked)_gemm_', scope=_BACKWARD),
    Rule(EXPERTS_FORWARD, kernel='^(grouped|masked)_gemm_'),
    Rule(LINEAR_FP8, kernel='^(gemm|wgrad)_fp8_'),
    Rule(WEIGHTS, kernel='^quantize_blocks_'),
    Rule(QUANTISE, kernel='^(re)?quantize_'),
    Rule(SWIGLU, kernel='^swiglu_quantize'),
    Rule(DISPATCH, kernel=_COLLECTIVE, scope=_within('dispatch', 'collect')),
    Rule(CONTEXT, kernel=_COLLECTIVE, scope=_within('context')),
    Rule(STAGES, kernel=_COLLECTIVE, scope=_within('stage')),
    Rule(GATHER, kernel=_COLLECTIVE, scope=_within('gather')),
    Rule(REDUCE, kernel=_COLLECTIVE, scope=_within('reduce')),
    Rule(COLLECTIVES, kernel=_COLLECTIVE),
    Rule(EMBEDDING, scope=_within('embed')),
    Rule(ROUTER, scope=_within('route', 'sort')),
    Rule(ROUTER, kernel='radix_sort|RadixSort'),
    Rule(ROUTES, scope=_within('permute', 'combine')),
    Rule(SWIGLU, scope=_within('swiglu')),
    Rule(ATTENTION, scope=_within('attend')),
    Rule(WEIGHTS, scope=_within('weights')),
    Rule(LINEAR_BF16, kernel='(?i)gemm|nvjet|cutlass|cublas|xmma|splitK'),
    Rule(LINEAR_JOINED, scope=_within('linear')),
    # What the scan over layers keeps: buffers filled with zeros, then written a layer at a time, then read.
    Rule(STACKS, kernel='^(loop|wrapped)_broadcast'),
    Rule(STACKS, scope=r'jit\(dynamic_(update_)?index_in_dim\)'),
    Rule(ELEMENTWISE, scope=_within('DeepSeekV3', 'dense_layers', 'moe_layers', 'mtp', r'jvp\(.*\)')),
    Rule(OPTIMIZER, scope=r'^jit\('),
)

PARTS = (*dict.fromkeys(rule.part for rule in RULES), OTHER)


def part_of(name: str, scope: str) -> str:
    """The part that an event belongs to: that of the first rule that holds, `OTHER` if none does."""
    fits = (rule.part for rule in RULES if re.search(rule.kernel, name) and re.search(rule.scope, scope))
    return next(fits, OTHER)


def shares(events: Sequence[Event]) -> dict[str, float]:
    """Nanoseconds of each part of the span from the first event's start to the last one's end; they add up to it.

    Time in which several events run, on streams of their own, is divided evenly among them; copies and collectives have
    a share only of what is left. Time in which nothing runs is `IDLE`.
    """
    total = dict.fromkeys((*PARTS, IDLE), 0.0)
    parts = [part_of(event.name, event.scope) for event in events]
    spans = [(event.start, event.start + event.duration) for event in events]
    # Ends have negative numbers, and so come before what starts at the same moment.
    edges = [edge for i, (start, end) in enumerate(spans) if end > start for edge in ((start, i), (end, ~i))]
    running: set[int] = set()
    last = min(edges, default=(0.0,))[0]
    for moment, i in sorted(edges):
        if running:
            front = {i for i in running if parts[i] not in BEHIND} or running
            for j in front:
                total[parts[j]] += (moment - last) / len(front)
        else:
            total[IDLE] += moment - last
        last = moment
        if i >= 0:
            running.add(i)
        else:
            running.remove(~i)
    return total


def longest(events: Sequence[Event], steps: int, count: int = 60) -> list[dict[str, Any]]:
    """The kernels that take longest, those of one name and path together: part, milliseconds and launches a step."""
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in events:
        total = totals[event.name, event.scope]
        total[0] += event.duration
        total[1] += 1
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return [
        {
            'part': part_of(name, scope),
            'milliseconds': 1e-6 * duration / steps,
            'launches': launches / steps,
            'name': name,
            'scope': scope,
        }
        for (name, scope), (duration, launches) in ranked
    ]


class Rates(NamedTuple):
    """What steps took, and what they computed.

    Attributes:
      device_kind, devices: what ran them.
      seconds: of a step, by the clock.
      tokens: of a step.
      flops_per_token: as `flops.train_flops_per_token` counts them.
      peak_bytes: of memory in use since the program began; None where that is not counted.
    """

    device_kind: str
    devices: int
    seconds: float
    tokens: int
    flops_per_token: float
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        return flops.mfu(self.flops_per_token, self.tokens_per_second, self.device_kind, self.devices)


def report(rates: Rates, devices: Mapping[str, Sequence[Event]], steps: int) -> dict[str, Any]:
    """What profile.json holds: rates and, if GPUs were traced, milliseconds a step of the parts of the first one."""
    found: dict[str, Any] = {
        'device': rates.device_kind,
        'devices': rates.devices,
        'steps': steps,
        'step_ms': 1e3 * rates.seconds,
        'tokens_per_step': rates.tokens,
        'tokens_per_second': rates.tokens_per_second,
        'flops_per_token': rates.flops_per_token,
        'tflops': 1e-12 * rates.flops_per_token * rates.tokens_per_second,
        'mfu': rates.mfu,
        'mfu_formula': _formula(rates),
        'peak_memory_bytes': rates.peak_bytes,
        'parts_ms': None,
    }
    if traced := sorted(name for name, events in devices.items() if events):
        found['traced_device'], events = traced[0], devices[traced[0]]
        found['parts_ms'] = {part: 1e-6 * duration / steps for part, duration in shares(events).items()}
        found['kernels'] = longest(events, steps)
    return found


def _formula(rates: Rates) -> str:
    formula = (
        'flops_per_token * tokens_per_second / (devices * peak), causal, with MTP, nothing counted that is recomputed'
    )
    peak = flops.PEAK_FLOPS.get(rates.device_kind)
    return formula + (', no peak known' if peak is None else f', peak {1e-12 * peak:.1f} TFLOP/s (dense bf16)')


def lines(found: Mapping[str, Any]) -> list[str]:
    """What is printed of a report."""
    shown = [f'{found["steps"]} steps on {found["devices"]} x {found["device"]}']
    if (parts := found['parts_ms']) is None:
        shown.append('no table of parts: the trace holds no kernels of a GPU')
    else:
        whole = sum(parts.values())
        rows = {part: milliseconds for part, milliseconds in parts.items() if milliseconds or part == IDLE}
        shown.append(f'  {"on " + found["traced_device"]:34}{"ms a step":>11}{"share":>9}')
        shown += [f'  {part:34}{ms:11.3f}{ms / whole:9.1%}' for part, ms in (rows | {'traced step': whole}).items()]
    mfu, memory = found['mfu'], found['peak_memory_bytes']
    kernels = '' if parts is None else f', of which kernels as traced take {sum(parts.values()) - parts[IDLE]:.3f} ms'
    rates = {
        'step by the clock': f'{found["step_ms"]:.3f} ms{kernels}',
        'tokens a second': f'{found["tokens_per_second"]:,.0f}, {found["tokens_per_step"]:,} a step',
        'TFLOP/s': f'{found["tflops"]:.4g}, {1e-9 * found["flops_per_token"]:.4g} GFLOP a token',
        'MFU': f'{"not known" if mfu is None else f"{mfu:.1%}"} = {found["mfu_formula"]}',
        'peak memory': 'not counted here' if memory is None else f'{memory / 2**30:.2f} GiB',
    }
    return shown + [f'  {name:20}{value}' for name, value in rates.items()]


class Profiler:
    """Times and traces steps of a run, and then says where their time went.

    Steps are timed between waits, so that evaluations and checkpoints must not come in between. Of several processes the main
    one traces its devices.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: int,
        *,
        steps_left: int,
        tokens_per_step: int,
        flops_per_token: float,
        num_devices: int = 1,
    ) -> None:
        """Nothing is written to the folder before there is a trace.

        Args:
          folder: for the trace and profile.json.
          steps: to be timed, and as many to be traced.
          steps_left: of the run.
          tokens_per_step: of all devices together.
          flops_per_token: as `flops.train_flops_per_token` counts them.
          num_devices: that the run trains on.

        Raises:
          ValueError: the run has not steps enough.
        """
        if steps < 1:
            raise ValueError(f'profile={steps} must be at least 1')
        if steps_left <= (needed := WARM_UP + 2 * steps + 1):
            raise ValueError(f'{steps_left=} must exceed {needed}: {WARM_UP} + 1 to warm up, {steps} twice')
        self._folder, self._steps = folder, steps
        self._tokens, self._flops_per_token, self._num_devices = tokens_per_step, flops_per_token, num_devices
        self._first: int | None = None
        self._began = self._seconds = 0.0

    def before_step(self, step: int, wait: Callable[[], object], launch_separately: Callable[[], object]) -> bool:
        """To be called before each step; False ends the run: all is measured, printed and written.

        Args:
          step: number of the steps that were taken.
          wait: returns when the device has finished them.
          launch_separately: makes the steps that follow launch each kernel by itself.
        """
        if self._first is None:
            self._first = step
        taken = step - self._first
        if taken == WARM_UP:
            wait()
            self._began = time.perf_counter()
        elif taken == WARM_UP + self._steps:
            wait()
            self._seconds = (time.perf_counter() - self._began) / self._steps
            launch_separately()
        elif taken == WARM_UP + self._steps + 1:
            wait()
            if processes.is_main():
                jax.profiler.start_trace(self._folder, profiler_options=_options())
        elif taken == WARM_UP + 2 * self._steps + 1:
            wait()
            if processes.is_main():
                jax.profiler.stop_trace()
                self._report()
            return False
        return True

    def _report(self) -> None:
        device = jax.local_devices()[0]
        rates = Rates(
            device_kind=device.device_kind,
            devices=self._num_devices,
            seconds=self._seconds,
            tokens=self._tokens,
            flops_per_token=self._flops_per_token,
            peak_bytes=(device.memory_stats() or {}).get('peak_bytes_in_use'),
        )
        found = report(rates, read_trace(self._folder), self._steps)
        (self._folder / REPORT_FILE).write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
        print('\n'.join(lines(found)), flush=True)


def _options() -> jax.profiler.ProfileOptions:
    """Kernels and programs alone: tracing the host takes its time."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    return options


def read_trace(folder: pathlib.Path) -> dict[str, list[Event]]:
    """The events of each GPU in the newest trace below a folder, by the name of its plane; none for a CPU's trace."""
    file = max(folder.rglob('*.xplane.pb'), key=lambda file: file.stat().st_mtime_ns)
    space = file.read_bytes()
    found = ProfileData.from_serialized_xspace(space)
    planes = [plane for plane in found.planes if plane.name.startswith('/device:GPU:')]
    # A trace holds every program of the process: reading them takes long.
    scopes = scopes_of_programs(space) if planes else {}
    devices = {}
    for plane in planes:
        lines = (line for line in plane.lines if (line.name or '').startswith('Stream'))
        devices[plane.name] = [_event(event, scopes) for line in lines for event in line.events]
    return devices


def _event(event: Any, scopes: Mapping[tuple[int, str], str]) -> Event:
    """An event with the path of its instruction; if the program is not there, with what its launch was annotated by."""
    stats = {name: value for name, value in event.stats if name in ('program_id', 'hlo_op', 'prefix', 'name')}
    annotated = '/'.join(str(stats[name]) for name in ('prefix', 'name') if name in stats)
    scope = scopes.get((int(stats.get('program_id', -1)), str(stats.get('hlo_op'))), annotated)
    return Event(event.name, scope, event.start_ns, event.duration_ns)


# Numbers of the fields that are read, as XSpace (tsl) and HloProto (xla) define them.
_SPACE_PLANES = 1
_PLANE_NAME, _PLANE_EVENTS, _PLANE_STATS = 2, 4, 5
_MAP_VALUE = 2
_EVENT_ID, _EVENT_STATS = 1, 5
_STAT_ID, _STAT_NAME, _STAT_BYTES = 1, 2, 6
_HLO_MODULE, _MODULE_COMPUTATIONS = 1, 3
_COMPUTATION_INSTRUCTIONS, _COMPUTATION_ID = 2, 5
_NAME, _OPCODE, _SHAPE, _METADATA, _ID, _OPERANDS, _CALLED = 1, 2, 3, 7, 35, 36, 38
_OP_NAME = 2
_DIMENSIONS = 3

# What takes no time, or says nothing about where a fusion comes from.
_SILENT = {b'parameter', b'constant', b'bitcast', b'broadcast', b'tuple', b'get-tuple-element'}


def scopes_of_programs(space: bytes) -> dict[tuple[int, str], str]:
    """The path of each instruction of the programs in a serialized XSpace, by the program's number and its name."""
    scopes = {}
    for plane in _all(memoryview(space), _SPACE_PLANES):
        if _text(plane, _PLANE_NAME) != '/host:metadata':
            continue
        stats = [_first(entry, _MAP_VALUE, b'') for entry in _all(plane, _PLANE_STATS)]
        hlo = {_first(stat, _STAT_ID, 0) for stat in stats if _text(stat, _STAT_NAME) == 'Hlo Proto'}
        for program in (_first(entry, _MAP_VALUE, b'') for entry in _all(plane, _PLANE_EVENTS)):
            for stat in _all(program, _EVENT_STATS):
                if _first(stat, _STAT_ID, 0) in hlo:
                    found = scopes_of_module(_first(_first(stat, _STAT_BYTES, b''), _HLO_MODULE, b''))
                    scopes |= {(_first(program, _EVENT_ID, 0), name): scope for name, scope in found.items()}
    return scopes


def scopes_of_module(module: bytes | memoryview) -> dict[str, str]:
    """The path of each instruction of a serialized HloModuleProto; of a fusion, that under which most is computed.

    What has no path of its own, as the second half of a reduction that was split, has that of its first operand with one.
    """
    computations = {
        _first(computation, _COMPUTATION_ID, 0): [
            dict(_fields(instruction)) for instruction in _all(computation, _COMPUTATION_INSTRUCTIONS)
        ]
        for computation in _all(module, _MODULE_COMPUTATIONS)
    }
    scopes, by_id = {}, {}
    # Operands come before what reads them.
    for instruction in itertools.chain.from_iterable(computations.values()):
        scope = _path(instruction)
        if instruction[_OPCODE] == b'fusion':
            called = _numbers(instruction.get(_CALLED, b''))
            scope = _path_of_fusion([fused for number in called for fused in computations[number]]) or scope
        if not scope:
            operands = _numbers(instruction.get(_OPERANDS, b''))
            scope = next((by_id[number] for number in operands if by_id.get(number)), '')
        by_id[instruction.get(_ID, 0)] = scopes[bytes(instruction[_NAME]).decode()] = scope
    return scopes


def _path_of_fusion(instructions: Sequence[Mapping[int, Any]]) -> str:
    """The path of the kernel that is called, if the fusion is of slices around one; else that of most elements."""
    votes = collections.Counter()
    for instruction in instructions:
        if instruction[_OPCODE] == b'custom-call':
            return _path(instruction)
        if instruction[_OPCODE] not in _SILENT and (path := _path(instruction).rpartition('/')[0]):
            votes[path] += math.prod(_numbers(_first(instruction.get(_SHAPE, b''), _DIMENSIONS, b'')))
    return votes.most_common(1)[0][0] if votes else ''


def _path(instruction: Mapping[int, Any]) -> str:
    return _text(instruction.get(_METADATA, b''), _OP_NAME)


def _text(message: bytes | memoryview, field: int) -> str:
    return bytes(_first(message, field, b'')).decode()


def _first(message: bytes | memoryview, field: int, default: Any) -> Any:
    return next(_all(message, field), default)


def _all(message: bytes | memoryview, field: int) -> Iterator[Any]:
    return (value for number, value in _fields(message) if number == field)


def _numbers(packed: bytes | memoryview) -> list[int]:
    """A packed field of integers."""
    numbers, at = [], 0
    while at < len(packed):
        number, at = _varint(packed, at)
        numbers.append(number)
    return numbers


def _fields(message: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a serialized protocol buffer: an integer, or the bytes of anything else."""
    message, at = memoryview(message), 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """An integer, least seven bits first, and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
