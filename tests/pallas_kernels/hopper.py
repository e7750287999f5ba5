"""Compiles functions for one H100 on a machine without a GPU, and reads what ptxas and the disassembler say.

The function is lowered here, where tracing errors and shape checks are the test's own; another process compiles the
lowered program, and is kept for the next one. Only that process sees the CUDA plug-in, and Mosaic GPU's dumps are turned
on for it alone. It needs the wheels of `hopper.txt`, in the folder that `make setup` makes or beside jax (the `cuda` extra
and a disassembler).
"""

import atexit
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / 'train' / 'h100.txtpb'
COMPILER = HERE / 'hopper_compile.py'
SHARED_BYTES = 232_448  # what one block may use
DEVICE = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', platform='gpu', num_cores=132)


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One Mosaic GPU kernel of a compiled program.

    Attributes:
      registers: of a thread, as launched: what a warpgroup gives up or takes later does not show.
      spill_stores, spill_loads: bytes; nonzero where registers did not suffice.
      stack_bytes: local memory of a thread, also without spills.
      shared_bytes: dynamic and static shared memory of a block.
      serialized_warnings: what ptxas says about wgmma that it made wait for each other (C7510 and its kin).
      warnings: everything else that ptxas remarks, such as register limits that it ignored.
      instructions: how often each machine instruction stands in the code, by its name up to the first dot: `QGMMA` is
        the FP8 product, `HGMMA` the bf16 one, `LDL` and `STL` touch local memory.
      instructions_in_full: the same, by the full name: `QGMMA.64x128x32.F32.E4M3.E4M3`.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int
    serialized_warnings: tuple[str, ...]
    warnings: tuple[str, ...]
    instructions: Counter[str]
    instructions_in_full: Counter[str]

    def problems(self) -> list[str]:
        """What a kernel must not have, in words; empty for a sound one."""
        found = [*self.serialized_warnings, *self.warnings]
        if self.spill_stores or self.spill_loads:
            found.append(f'spills: {self.spill_stores} bytes stored, {self.spill_loads} bytes loaded')
        if local := self.instructions['LDL'] + self.instructions['STL']:
            found.append(f'{local} instructions touch local memory')
        if self.shared_bytes > SHARED_BYTES:
            found.append(f'{self.shared_bytes} bytes of shared memory exceed {SHARED_BYTES}')
        return found


@dataclasses.dataclass(frozen=True)
class Report:
    """The kernels of one compiled program, by name; a further kernel of the same name is `name#2`."""

    kernels: dict[str, KernelReport]

    @property
    def instructions(self) -> Counter[str]:
        """Machine instructions of all kernels together."""
        return sum((kernel.instructions for kernel in self.kernels.values()), Counter())

    def problems(self) -> list[str]:
        """What no kernel must have: spills, serialized wgmma, other remarks of ptxas, too much shared memory."""
        return [f'{name}: {problem}' for name, kernel in self.kernels.items() for problem in kernel.problems()]


@dataclasses.dataclass(frozen=True)
class Tools:
    packages: Path
    ptxas: Path
    nvdisasm: Path


def find_tools() -> Tools | str:
    """Where the wheels of `hopper.txt` are, or which are missing.

    Raises:
      RuntimeError: they are there, of another version than jax.
    """
    missing = 'the plug-in jax-cuda13-plugin'
    for packages in (Path(sys.prefix) / 'hopper', Path(sysconfig.get_path('purelib'))):
        plugin = packages / 'jax_cuda13_plugin' / 'version.py'
        if not plugin.is_file() or not (packages / 'jax_plugins' / 'xla_cuda13' / 'xla_cuda_plugin.so').is_file():
            continue
        version = re.search(r'^_version = "(.+)"', plugin.read_text(), re.MULTILINE)
        if version is None or version[1] != jax.__version__:
            raise RuntimeError(f'the plug-in in {packages} is not of jax {jax.__version__}: run `make setup`')
        paths = [packages / 'nvidia' / 'cu13' / 'bin', *os.get_exec_path(), '/usr/local/cuda/bin']
        ptxas, nvdisasm = (shutil.which(tool, path=os.pathsep.join(map(str, paths))) for tool in ('ptxas', 'nvdisasm'))
        if ptxas and nvdisasm:
            return Tools(packages, Path(ptxas), Path(nvdisasm))
        missing = ' and '.join(name for name, path in (('ptxas', ptxas), ('nvdisasm', nvdisasm)) if not path)
    return f'compiling for Hopper needs the CUDA wheels of tests/pallas_kernels/hopper.txt (`make setup`); missing: {missing}'


TOOLS = find_tools()
needs_hopper_tools = pytest.mark.skipif(isinstance(TOOLS, str), reason=TOOLS if isinstance(TOOLS, str) else '')


def compile_for_h100(fn: Callable, *args) -> Report:
    """What became of the Mosaic GPU kernels of `fn(*args)`, compiled for one H100 80GB HBM3.

    Args:
      fn: a function, jitted or not. It sees a Hopper GPU: `implementation=None` takes the kernel.
      args: trees of `jax.ShapeDtypeStruct`.

    Raises:
      RuntimeError: compilation failed; the message ends with what the compiler said.
    """
    if isinstance(TOOLS, str):
        raise RuntimeError(TOOLS)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=('cuda',))
    with tempfile.TemporaryDirectory(prefix='hopper-') as folder:
        dump = Path(folder)
        (dump / 'program.mlir').write_text(lowered.as_text())
        write_disassembler(TOOLS, dump)
        if status := compile_in(TOOLS, dump):
            errors = (dump / 'errors').read_text(errors='replace')
            raise RuntimeError(f'compiling for the H100 failed ({status}):\n{errors[-4000:]}')
        dumps = (dump / 'dumps').read_text()
    kernels = {}
    for name, kernel in read_dumps(dumps):
        same = sum(known.partition('#')[0] == name for known in kernels)
        kernels[f'{name}#{same + 1}' if same else name] = kernel
    return Report(kernels)


def compile_in(tools: Tools, dump: Path) -> int:
    """Has the program in the folder compiled; returns the exit status."""
    process = compiler(tools)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f'{dump}\n')
        process.stdin.flush()
        return int(process.stdout.readline())
    except BaseException:  # a timeout among them: nobody is to read the answer that is still to come
        end(process)
        compiler.cache_clear()
        raise


@functools.cache
def compiler(tools: Tools) -> subprocess.Popen[str]:
    """The process that compiles, started once: most of a short compilation is the import of jax."""
    command = [sys.executable, str(COMPILER), str(TARGET)]
    process = subprocess.Popen(
        command, env=compiler_environment(tools), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(end, process)
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def write_disassembler(tools: Tools, dump: Path) -> None:
    """Mosaic GPU leaves the program that it disassembles in /tmp."""
    disassembler = dump / 'cuda' / 'bin' / 'nvdisasm'
    disassembler.parent.mkdir(parents=True)
    disassembler.write_text(
        f'#!/bin/sh\n"{tools.nvdisasm}" "$@"\nstatus=$?\n'
        'for file in "$@"; do case "$file" in /tmp/mosaic-gpu-*/kernel.bin) rm -r "${file%/*}" ;; esac; done\n'
        'exit $status\n'
    )
    disassembler.chmod(0o755)


def calls_on_h100(fn: Callable, *args) -> Counter[str]:
    """How often the program of `fn(*args)` for one H100 calls each primitive; `kernel NAME` is a Mosaic GPU kernel."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        return Counter(_primitives(jax.make_jaxpr(fn)(*args).jaxpr))


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """What is inside of a kernel is left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'mpmd_map':
            yield f'kernel {equation.params["name"]}'
            continue
        yield equation.primitive.name
        is_jaxpr = lambda value: isinstance(value, Jaxpr | ClosedJaxpr)  # noqa: E731
        for value in filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr)):
            yield from _primitives(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def compiler_environment(tools: Tools) -> dict[str, str]:
    """Variables of the compiling process; flags for XLA and jax that hold here are not passed on."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(('JAX_', 'XLA_', 'MOSAIC_'))}
    toolkit = tools.packages / 'nvidia' / 'cu13'
    return inherited | {
        'JAX_PLATFORMS': 'cpu',
        'MOSAIC_GPU_RUNTIME_LIB_PATH': str(tools.packages / 'jax_cuda13_plugin' / 'libmosaic_gpu_runtime.so'),
        'OPENBLAS_NUM_THREADS': '1',  # it forks
        'PATH': os.pathsep.join([str(tools.ptxas.parent), os.environ.get('PATH', os.defpath)]),
        'PYTHONPATH': str(tools.packages),
        **({'XLA_FLAGS': f'--xla_gpu_cuda_data_dir={toolkit}'} if (toolkit / 'nvvm' / 'libdevice').is_dir() else {}),
    }


def read_dumps(dumps: str) -> Iterator[tuple[str, KernelReport]]:
    """Name and report of each kernel: what ptxas said of it, its machine code and the program that launches it."""
    kernel = r'(ptxas .*?)^\s*\.target\b(.*?)^; ModuleID = (.*?)(?=^ptxas |\Z)'
    kernels = re.findall(kernel, dumps, re.DOTALL | re.MULTILINE)
    assert len(kernels) == dumps.count('Compiling entry function')
    for ptxas, code, host in kernels:
        (name,) = re.findall(r"Compiling entry function '(\w+)_mosaic_gpu_kernel'", ptxas)
        yield name, read_dump(ptxas, code, host)


def read_dump(ptxas: str, code: str, host: str) -> KernelReport:
    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, ptxas)]

    # Spills are counted once more in a warning.
    statistics = re.compile(
        r'bytes (gmem|stack frame)|Compiling entry function|Function properties|Used \d+ registers|Compile time|are spilled'
    )
    remarks = [line.strip() for line in ptxas.splitlines() if line.strip() and not statistics.search(line)]
    serialized = tuple(line for line in remarks if 'gmma' in line.lower())
    # Before an instruction may stand a predicate; its control codes come first of all.
    full = Counter(re.findall(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)', code))
    short = Counter()
    for name, count in full.items():
        short[name.partition('.')[0]] += count
    # The launch names the kernel, blocks of the grid, of a cluster, threads, three numbers each, and dynamic shared memory.
    (dynamic,) = re.findall(r'call i32 @mosaic_gpu_launch_kernel\(ptr [^,]+(?:, i32 \d+){9}, i32 (\d+)', host)
    return KernelReport(
        registers=max(numbers(r'Used (\d+) registers')),
        spill_stores=sum(numbers(r'stack frame, (\d+) bytes spill stores')),
        spill_loads=sum(numbers(r'stack frame, \d+ bytes spill stores, (\d+) bytes spill loads')),
        stack_bytes=sum(numbers(r'(\d+) bytes stack frame')),
        shared_bytes=int(dynamic) + sum(numbers(r'(\d+) bytes smem')),
        serialized_warnings=serialized,
        warnings=tuple(line for line in remarks if line not in serialized),
        instructions=short,
        instructions_in_full=full,
    )
