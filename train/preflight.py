"""`python -m train --preflight --gpus N`: the step compiled for N H100s by a machine that has none.

XLA compiles for a description of the GPU (`h100.txtpb`), kernels included; what it says of memory and what the schedule holds of
collectives is what the GPUs would get. Nothing runs, no data is read, nothing is written.
"""

import collections
import contextlib
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, SingleDeviceSharding

import deepseek_jax as ds
from train import memory
from train.collectives import Collective, collectives
from train.guard import GuardConfig
from train.loss import ObjectiveConfig
from train.optimizer import OptimizerConfig
from train.parallel import Layout, MeshConfig
from train.step import Hyperparameters, State, jit_step, state_shapes

TARGET = pathlib.Path(__file__).parent / 'h100.txtpb'
PLUGIN = 'jax_cuda13_plugin'
GPUS_OF_A_HOST = 8
MEMORY = 80 * 10**9
"""Bytes of one H100."""


def find_compiler() -> None:
    """Makes the compiler for GPUs known to JAX, and keeps JAX off those that are there. To be called before JAX is used.

    The compiler is that of JAX's plug-in for CUDA: of the environment, or where `make setup` puts it.

    Raises:
      FileNotFoundError: it is in neither place.
    """
    jax.config.update('jax_platforms', 'cpu')
    apart = pathlib.Path(sys.prefix) / 'hopper'
    if importlib.util.find_spec(PLUGIN) is None and apart.is_dir():
        sys.path.append(str(apart))
    spec = importlib.util.find_spec(PLUGIN)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f'--preflight compiles for GPUs with {PLUGIN}, which is not installed: `make setup`')
    plugin = pathlib.Path(spec.submodule_search_locations[0])
    os.environ['MOSAIC_GPU_RUNTIME_LIB_PATH'] = str(plugin / 'libmosaic_gpu_runtime.so')
    tools = plugin.parent / 'nvidia' / 'cu13'
    if tools.is_dir():
        os.environ['PATH'] = os.pathsep.join([str(tools / 'bin'), os.environ.get('PATH', '')])
        os.environ['MOSAIC_GPU_CUDA_ROOT'] = str(tools)


class Preflight(NamedTuple):
    """What a compiled step needs.

    Attributes:
      argument_bytes: a device's part of the state and the batch.
      needed_bytes: with everything that a step has beside.
      collectives: of one step.
      compile_seconds: what it took.
    """

    argument_bytes: int
    needed_bytes: int
    collectives: list[Collective]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= MEMORY

    def __str__(self) -> str:
        lines = [
            f'compiled in {self.compile_seconds:.0f} s',
            f'memory a device: {_size(self.argument_bytes)} of state and batch, '
            f'{_size(self.needed_bytes - self.argument_bytes)} beside; of {_size(MEMORY)} it needs '
            f'{_size(self.needed_bytes)}: {"fits" if self.fits else "does not fit"}',
        ]
        return '\n'.join([*lines, *_table(self.collectives)])


def devices(gpus: int) -> list[Any]:
    """So many H100s, in hosts of eight, that programs can be compiled for after `find_compiler`.

    Raises:
      ValueError: the number is none that hosts make up.
    """
    hosts, rest = divmod(gpus, GPUS_OF_A_HOST)
    if gpus < 1 or (hosts and rest):
        raise ValueError(f'--gpus {gpus} must be positive and, above {GPUS_OF_A_HOST}, whole hosts of {GPUS_OF_A_HOST}')
    topology = f'1x{max(hosts, 1)}x{min(gpus, GPUS_OF_A_HOST)}'
    return list(
        topologies.get_topology_desc('h100', 'cuda', target_config=TARGET.read_text(), topology=topology).devices
    )


def preflight(
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    objective: ObjectiveConfig,
    guard: GuardConfig,
    mesh: MeshConfig,
    gpus: int,
    batch_size: int,
    sequence_length: int,
    microbatch_size: int | None,
) -> Preflight:
    """Compiles a step for so many H100s.

    Raises:
      ValueError: the mesh is not of so many devices, or cannot hold the model.
    """
    if mesh.size != gpus:
        raise ValueError(f'--gpus {gpus}: the mesh of the configuration (parallel.MeshConfig) has {mesh.size} devices')
    present = devices(gpus)
    layout = mesh.make(present)
    state, batch = shapes(model, optimizer, guard, layout, present, batch_size, sequence_length)
    began = time.monotonic()
    # A mesh says what kernels are for; for one GPU, a device of no mesh does.
    alone = AbstractMesh((), (), abstract_device=_abstract(present[0]))
    with contextlib.nullcontext() if layout else jax.sharding.use_abstract_mesh(alone):
        traced = jit_step(jax.tree.map(lambda leaf: leaf.sharding, state)).trace(
            state,
            batch,
            Hyperparameters(0.0, 0.0, 0.0),
            model=model,
            optimizer=optimizer,
            config=objective,
            guard=guard,
            microbatch_size=microbatch_size,
            layout=layout,
        )
        program = traced.lower(lowering_platforms=('cuda',)).compile()
    stats: Any = program.memory_analysis()
    needed = memory.needed_bytes(program)
    assert needed is not None
    return Preflight(
        argument_bytes=stats.argument_size_in_bytes,
        needed_bytes=needed,
        collectives=collectives(program.as_text() or ''),
        compile_seconds=time.monotonic() - began,
    )


def shapes(
    model: ds.ModelConfig,
    optimizer: OptimizerConfig,
    guard: GuardConfig,
    layout: Layout | None,
    present: Sequence[Any],
    batch_size: int,
    sequence_length: int,
) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """What a step is given, in its places."""
    rows = SingleDeviceSharding(present[0]) if layout is None else layout.batch
    lengths = {'tokens': sequence_length + 1, 'segments': sequence_length + 1, 'weights': sequence_length}
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, length), 'float32' if name == 'weights' else 'int32', sharding=rows)
        for name, length in lengths.items()
    }
    return state_shapes(model, optimizer, guard, layout, present[0]), batch


def _abstract(device: Any) -> jax.sharding.AbstractDevice:
    return jax.sharding.AbstractDevice(device_kind=device.device_kind, platform='gpu', num_cores=device.core_count)


def _table(found: Sequence[Collective]) -> list[str]:
    """Collectives of a step, those of a kind, an origin and a window in one line, the largest first."""
    groups = collections.defaultdict(list)
    totals: dict[str, float] = collections.defaultdict(float)
    for one in found:
        axes = ' x '.join(one.axes) or ('one way' if one.kind == 'collective-permute' else str(one.devices))
        groups[one.kind, axes, _origin(one.scope), _meanwhile(one)].append(one)
        totals[axes] += one.times * one.sent_bytes
    rows = [
        (*key, sum(one.times for one in ones), sum(one.times * one.sent_bytes for one in ones) / 1e6)
        for key, ones in groups.items()
    ]
    if not rows:
        return ['no collectives']
    lines = [f'{"collective":20}{"along":36}{"for":20}{"meanwhile":34}{"a step":>8}{"MB sent a device":>20}']
    for kind, axes, origin, meanwhile, times, sent in sorted(rows, key=lambda row: -row[-1]):
        lines.append(f'{kind:20}{axes:36}{origin:20}{meanwhile:34}{times:8,}{sent:20,.2f}')
    shown = sorted((sent, axes) for axes, sent in totals.items() if sent >= 1e-3 * sum(totals.values()))
    along = ', '.join(f'{_size(sent)} along {axes}' for sent, axes in reversed(shown))
    return [*lines, f'a device sends {_size(sum(totals.values()))} a step: {along}']


def _meanwhile(one: Collective) -> str:
    """What runs while data travel, and why it is no product: all that its loop has need it or are needed by it, or those that
    do not run at another time."""
    if one.products:
        return 'a product'
    return f'{"other kernels" if one.others else "nothing"}, {"products apart" if one.free else "no product could"}'


def _size(count: float | int) -> str:
    return f'{count / 1e9:.2f} GB' if count >= 1e9 else f'{count / 1e6:.3f} MB'


def _origin(scope: str) -> str:
    """What a collective is for, of the names that the program gives its parts."""
    backward = ', backward' if 'transpose(' in scope else ''
    found = re.search(r'\b(dispatch|collect|context|stage|gather|reduce)\b', scope)
    return ('sums' if found is None else found[1]) + backward
