"""Compiles StableHLO programs for one GPU of a given target configuration: `hopper_compile.py TARGET`.

Each line of the input names a folder with a `program.mlir`. What Mosaic GPU says of each kernel is in the folder's file
`dumps` afterwards, one kernel after the other, and messages are in `errors`; the answer is a line with the exit status.

A process of its own, run by `hopper.py`: the CUDA plug-in is on its path, and Mosaic GPU reads the variables that turn
its dumps on. It goes around jax.jit, and so around every compilation cache, which would leave no dumps. Mosaic GPU keeps
what it compiled for as long as the process lives, so every program gets a fork, which has jax but no plug-in loaded yet.
"""

import os
import sys
from pathlib import Path

from jax._src import compiler
from jax._src.lib import _jax
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.interpreters import mlir

# Asked for one by one, they go to standard output. A folder for dumps gets all there are: 200 MB of some kernels.
DUMPS = 'MOSAIC_GPU_DUMP_PTXAS', 'MOSAIC_GPU_DUMP_SASS_CTRL', 'MOSAIC_GPU_DUMP_HOST_LLVM'


def compile_in(folder: str, target: str) -> None:
    os.chdir(folder)
    for name, stream in (('dumps', sys.stdout), ('errors', sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ |= dict.fromkeys(DUMPS, '1') | {'MOSAIC_GPU_CUDA_ROOT': f'{folder}/cuda'}
    (device,) = topologies.get_topology_desc(platform='cuda', target_config=target, topology='1x1x1').devices
    with mlir.make_ir_context():
        device.client.compile(
            ir.Module.parse(Path('program.mlir').read_text()),
            executable_devices=_jax.DeviceList((device,)),
            compile_options=compiler.get_compile_options(num_replicas=1, num_partitions=1),
        )


target = Path(sys.argv[1]).read_text()
while line := sys.stdin.readline():
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    else:
        status = 1
        try:
            compile_in(line.rstrip('\n'), target)
            status = 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(status)
