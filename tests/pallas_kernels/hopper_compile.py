"""Compiles a StableHLO file for one GPU of a given target configuration: `hopper_compile.py TARGET PROGRAM`.

A process of its own, run by `hopper.py`: the CUDA plug-in is on its path, and Mosaic GPU reads the variables that turn
its dumps on. It goes around jax.jit, and so around every compilation cache, which would leave no dumps.
"""

import sys
from pathlib import Path

from jax._src import compiler
from jax._src.lib import _jax
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.interpreters import mlir

target, program = map(Path, sys.argv[1:])
(device,) = topologies.get_topology_desc(platform='cuda', target_config=target.read_text(), topology='1x1x1').devices
with mlir.make_ir_context():
    device.client.compile(
        ir.Module.parse(program.read_text()),
        executable_devices=_jax.DeviceList((device,)),
        compile_options=compiler.get_compile_options(num_replicas=1, num_partitions=1),
    )
