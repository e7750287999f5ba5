import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_fp8.api import linear_fp8
from tests.pallas_kernels.hopper import DEVICE, compile_for_h100, needs_hopper_tools, read_dumps

SIZE = 128
ARGUMENT = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def chain(x_gmem, y_gmem, *, accumulators: int):
    """Adds up products whose accumulators all hold registers of one warpgroup at the same time, 64 a thread each."""

    def body(x_smem, barrier):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
        plgpu.barrier_wait(barrier)

        def step(index, total):
            def multiply(*accs):
                for acc in accs:
                    plgpu.wgmma(acc, x_smem.at[pl.ds(64 * index, 64)], x_smem)
                return [acc[...] for acc in accs]

            return sum(pl.run_scoped(multiply, *[plgpu.ACC((64, SIZE), jnp.float32)] * accumulators), total)

        zeros = plgpu.layout_cast(jnp.zeros((64, SIZE), jnp.float32), plgpu.Layout.WGMMA)
        y_gmem[...] = jax.lax.fori_loop(0, 2, step, zeros)

    pl.run_scoped(body, plgpu.SMEM((SIZE, SIZE), jnp.bfloat16, transforms=SWIZZLED), plgpu.Barrier())


def kernel(x, accumulators: int):
    body = functools.partial(chain, accumulators=accumulators)
    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((64, SIZE), jnp.float32), kernel_name='chain')(x)


@functools.cache
def kernel_report(accumulators: int):
    report = compile_for_h100(functools.partial(kernel, accumulators=accumulators), ARGUMENT)
    assert list(report.kernels) == ['chain']
    return report


@needs_hopper_tools
def test_a_sound_kernel_has_no_problems():
    report = kernel_report(accumulators=1)
    kernel = report.kernels['chain']
    assert report.problems() == []
    assert kernel.instructions_in_full['HGMMA.64x128x16.F32.BF16'] == 8, 'one a slice of 16 along K, in a loop'
    assert report.instructions['HGMMA'] == 8
    assert report.instructions['QGMMA'] == 0
    assert 64 < kernel.registers < 255
    assert SIZE * SIZE * 2 < kernel.shared_bytes < SIZE * SIZE * 2 + 1024


@needs_hopper_tools
def test_products_that_wait_for_each_other_are_reported():
    report = kernel_report(accumulators=2)
    kernel = report.kernels['chain']
    assert (kernel.spill_stores, kernel.spill_loads) == (0, 0)
    assert any('C7519' in warning for warning in kernel.serialized_warnings)
    assert report.problems()


@needs_hopper_tools
def test_spills_are_reported():
    report = kernel_report(accumulators=5)
    kernel = report.kernels['chain']
    assert kernel.registers == 255
    assert kernel.spill_stores > 0
    assert kernel.spill_loads > 0
    assert kernel.stack_bytes > 0
    assert kernel.instructions['STL'] > 0
    assert kernel.instructions['LDL'] > 0
    assert kernel.serialized_warnings
    assert any('spills' in problem for problem in report.problems())


@needs_hopper_tools
def test_kernels_of_one_name_are_told_apart():
    def two(x):
        return [kernel(x, accumulators=count) for count in (1, 2)]

    report = compile_for_h100(two, ARGUMENT)
    assert set(report.kernels) == {'chain', 'chain#2'}
    assert sorted(bool(one.problems()) for one in report.kernels.values()) == [False, True]


@needs_hopper_tools
def test_a_program_that_does_not_compile_raises():
    with pytest.raises(RuntimeError, match='No FFI handler registered for nowhere'):
        compile_for_h100(jax.ffi.ffi_call('nowhere', ARGUMENT), ARGUMENT)


def test_the_plugin_is_pinned_to_the_version_of_jax():
    root = Path(__file__).resolve().parents[2]
    (jax_pin,) = re.findall(r'^jax==(.+)$', (root / 'constraints.txt').read_text(), re.MULTILINE)
    pins = re.findall(
        r'^jax-cuda13-\w+==([^;]+);', (root / 'tests/pallas_kernels/hopper.txt').read_text(), re.MULTILINE
    )
    assert pins == [jax_pin] * 2


DUMPS = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'gemm'
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirement
ptxas info    : Compiling entry function 'gemm_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gemm_mosaic_gpu_kernel
    24 bytes stack frame, 32 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 24 bytes stack, 8 bytes smem
ptxas warning : Registers are spilled to local memory in function 'gemm_mosaic_gpu_kernel', 32 bytes spill stores
ptxas info    : Compile time = 96.244 ms

	.target	sm_90a
gemm_mosaic_gpu_kernel:
   -:-:-:Y:02        /*0760*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], RZ, !UPT
   -:-:-:-:12        /*0770*/             @!UP0 STL.64 [R1], R2
   -:-:-:-:12        /*0780*/              @!PT LDL R88, [R1]
; ModuleID = 'LLVMDialectModule'
declare i32 @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr, ptr)
  %7 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 1, i32 132, i32 2, i32 3, i32 4, i32 5, i32 384, i32 6, i32 7, i32 240000, i32 0, ptr %1, ptr %439)
!0 = !{i32 2, !"Debug Info Version", i32 3}
"""


def test_dumps_are_read():
    other = re.sub(r'.*(C75|QGMMA).*\n', '', DUMPS).replace("'gemm", "'add").replace('240000', '0')
    (name, kernel), (second, added) = read_dumps(DUMPS + other)
    assert (name, second) == ('gemm', 'add')
    assert (kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.stack_bytes) == (168, 32, 28, 24)
    assert (kernel.shared_bytes, added.shared_bytes) == (240_008, 8)
    assert [len(kernel.serialized_warnings), len(kernel.warnings)] == [1, 1]
    assert kernel.instructions == {'QGMMA': 1, 'STL': 1, 'LDL': 1}
    assert added.instructions == {'STL': 1, 'LDL': 1}
    assert (len(kernel.problems()), len(added.problems())) == (5, 2)


def test_calls_of_the_same_shapes_share_one_kernel_of_a_program():
    """In two scans and under differentiation, as layers of a model call them."""

    def layers(x_MK, weights):
        for w_LKN in weights:
            x_MK, _ = jax.lax.scan(lambda x, w: (linear_fp8(x, w), None), x_MK, w_LKN)
        return x_MK.astype(jnp.float32).sum()

    x_MK = jax.ShapeDtypeStruct((256, 384), jnp.bfloat16)
    weights = [jax.ShapeDtypeStruct((2, 384, 384), jnp.float32)] * 2
    known = set(core.KNOWN_KERNELS)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        traced = jax.jit(jax.grad(layers, argnums=(0, 1))).trace(x_MK, weights)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    # Outputs and gradients of inputs are one product of the same shapes. Inputs and gradients are quantised alike, and would
    # share a kernel, too, if the types of both named the abstract mesh, which stands for the device here.
    kernels = ('quantize_blocks', 'quantize_rows_and_columns', 'quantize_rows_and_columns', 'gemm_fp8', 'wgrad_fp8')
    assert len(set(core.KNOWN_KERNELS) - known) == len(kernels)
    assert text.count('@mosaic_gpu_v2') > len(kernels)
