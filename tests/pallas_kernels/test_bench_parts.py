"""Times of kernels summed into parts, and the benchmark of a whole layer that prints them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import moe_layer
from deepseek_jax import moe
from deepseek_jax.config import PrecisionConfig
from pallas_kernels.bench import checks, parts, timing
from pallas_kernels.bench.parts import Fused, Kernel, Rule

TINY = moe_layer.Size(T=64, E=4, K=2, D=128, F=128)
SORT = '_ZN3cub6detail10radix_sort29DeviceRadixSortOnesweepKernelINS1_5radix10policy_hubIijyE10Policy1000E'

# As XLA writes it: computations of fusions first, then the program in the order in which it runs.
HLO = r"""HloModule jit__step, is_scheduled=true, entry_computation_layout={(bf16[64,128]{1,0})->bf16[64,128]{1,0}}

FileNames
1 "a.py"

%region_1.3 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b), metadata={op_name="jit(_step)/route/add" stack_frame_id=4}
}

%fused_add (param_0: bf16[256,128], param_1: s32[64,8], param_2: bf16[64,128]) -> bf16[64,128] {
  %param_0 = bf16[256,128]{1,0} parameter(0)
  %broadcast.7 = f32[999,999]{1,0} broadcast(%c), dimensions={}, metadata={op_name="jit(_step)/jvp(shared)/zeros"}
  %gather.1 = bf16[64,8,128]{2,1,0} gather(%param_0, %param_1), metadata={op_name="jit(_step)/jvp(combine)/gather"}
  %reduce.1 = bf16[64,128]{1,0} reduce(%gather.1, %c), to_apply=%region_1.3, metadata={op_name="jit(_step)/jvp(combine)/reduce_sum"}
  %mul.1 = bf16[64,128]{1,0} multiply(%param_2, %param_2), metadata={op_name="jit(_step)/jvp(shared)/mul"}
  ROOT %add.2 = bf16[64,128]{1,0} add(%reduce.1, %mul.1), metadata={op_name="jit(_step)/jvp(shared)/add"}
}

ENTRY %main.9 (x_TD.1: bf16[64,128], w.1: f32[128,128]) -> (bf16[64,128], /*index=5*/f32[128,128]) {
  %x_TD.1 = bf16[64,128]{1,0} parameter(0), metadata={op_name="x_TD"}
  %wrapped_iota = s32[512]{0} fusion(), kind=kLoop, calls=%iota, metadata={op_name="jit(_step)/jvp(sort)/iota"}
  %custom-call.1 = (s32[512]{0}, s32[512]{0}, u8[544]{0}) custom-call(%a, %wrapped_iota), custom_call_target="xla.gpu.ext.cub_sort_pairs", metadata={op_name="jit(_step)/jvp(sort)/jit(argsort)/sort"}, backend_config={descending = false}
  %bitcast.2 = s32[512]{0} bitcast(%custom-call.1), metadata={op_name="jit(_step)/nothing"}
  %mpmd_map.2 = (f8e4m3fn[64,128]{1,0}, f32[1,64]{1,0}) custom-call(%x_TD.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(_step)/jvp()/quantize_rows/mpmd_map" stack_frame_id=1}, backend_config={module = "ML\EFR\00 = x("}
  %mpmd_map.1 = (f8e4m3fn[64,128]{1,0}, f32[1,64]{1,0}) custom-call(%x_TD.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(_step)/jvp(shared)/quantize_rows/mpmd_map" stack_frame_id=1}, backend_config={module = "ML\EFR"}
  %cublas-gemm.1 = (bf16[64,128]{1,0}, s8[4]{0}) custom-call(%x_TD.1, %w.1), custom_call_target="__cublas$gemm", metadata={op_name="jit(_step)/jvp(route)/dot_general"}
  %cublas-gemm.2 = (bf16[64,128]{1,0}, s8[4]{0}) custom-call(%x_TD.1, %w.1), custom_call_target="__cublas$gemm", metadata={op_name="jit(_step)/jvp(shared)/a,b->c/dot_general"}
  %loop_multiply_fusion.1 = bf16[64,128]{1,0} fusion(%b), kind=kLoop, calls=%other, metadata={op_name="jit(_step)/jvp(swiglu)/mul" deduplicated_name="loop_multiply_fusion"}
  %copy.2 = s32[512]{0} copy(%bitcast.2), metadata={scheduling_name="copy.2"}
  %loop_multiply_fusion = bf16[64,128]{1,0} fusion(%b), kind=kLoop, calls=%other, metadata={op_name="jit(_step)/jvp(permute)/mul" deduplicated_name="loop_multiply_fusion"}
  ROOT %loop_add_fusion.3 = bf16[64,128]{1,0} fusion(%b, %a, %c), kind=kLoop, calls=%fused_add, metadata={op_name="jit(_step)/jvp(shared)/add"}
}
"""
TIMINGS = [
    ('wrapped_iota', 1.0),
    (SORT, 2.0),
    (SORT, 3.0),
    ('quantize_rows_mosaic_gpu_kernel', 4.0),
    ('quantize_rows_mosaic_gpu_kernel', 5.0),
    ('nvjet_hsh_128x256', 6.0),
    ('sm80_xmma_gemm_f32f32', 7.0),
    ('loop_multiply_fusion', 8.0),
    ('loop_multiply_fusion', 9.0),
    ('loop_add_fusion_3', 10.0),
    ('memset', 11.0),
]


class FakeCupti:
    """Reports the listed kernels, pass by pass, whatever ran."""

    def __init__(self, *passes: list[tuple[str, float]]):
        self.timings = [kernel for kernels in passes for kernel in kernels]

    def _cupti_init(self):
        pass

    def _cupti_get_timings(self, finalize):
        return self.timings


class FakeClock(timing.Clock):
    """A clock that runs every work once and gives the works of a call the times 10, 20, ... ms."""

    def microseconds(self, works, method=None):
        assert method == 'span'
        for work in works:
            work.enqueue()
            work.wait()
        return [1e4 * (i + 1) for i in range(len(works))], method


def cheap_layers(size: moe_layer.Size) -> dict:
    """Contenders that compile fast: the shared expert alone."""

    def layer(params, x_BTD):
        y_BTD = moe.swiglu(params['shared'], x_BTD, PrecisionConfig(recipe='bf16'))
        return y_BTD, moe.Balance(jnp.zeros(size.E, jnp.int32), jnp.mean(params['router']['w_router_DE']), jnp.int32(0))

    return dict.fromkeys(('fp8', 'bf16', 'ragged_dot'), layer)


def work() -> timing.JaxWork:
    return timing.JaxWork(lambda x: x + 1, [(np.ones(3),)])


def operations(timings=TIMINGS) -> list[str]:
    kernels = parts.located(timings, parts.instructions(HLO))
    assert [(kernel.name, kernel.milliseconds) for kernel in kernels] == timings
    return [kernel.op_name.removeprefix('jit(_step)/') for kernel in kernels]


def recipe(scope: str, name: str = 'loop_fusion') -> str:
    return parts.part_of(Kernel(name, 1.0, scope), moe_layer.RULES)


def test_kernel_times_are_medians_over_the_passes():
    passes = [[('a', 1.0), ('b', 5.0)], [('a', 3.0), ('b', 4.0)], [('a', 2.0), ('b', 9.0)]]
    clock = timing.Clock('kernels', FakeCupti(*passes))
    times = parts.kernel_milliseconds(clock, work(), passes=3)
    assert times == [('a', pytest.approx(2)), ('b', pytest.approx(5))]


@pytest.mark.parametrize('passes', [[[], []], [[('a', 1.0)], [('b', 1.0)]], [[('a', 1.0)], [('a', 1.0), ('a', 1.0)]]])
def test_passes_of_other_kernels_are_refused(passes):
    with pytest.raises(timing.LostKernelsError, match='in 2 passes'):
        parts.kernel_milliseconds(timing.Clock('kernels', FakeCupti(*passes)), work(), passes=2)


def test_kernels_find_their_instructions():
    assert operations() == [
        'jvp(sort)/iota',
        'jvp(sort)/jit(argsort)/sort',
        'jvp(sort)/jit(argsort)/sort',
        'jvp()/quantize_rows/mpmd_map',
        'jvp(shared)/quantize_rows/mpmd_map',
        'jvp(route)/dot_general',
        'jvp(shared)/a,b->c/dot_general',
        'jvp(swiglu)/mul',
        'jvp(permute)/mul',
        'jvp(shared)/add',
        '',
    ]


def test_kernels_of_several_library_calls_keep_what_these_share():
    """Three kernels of two products: which is whose is not known."""
    timings = [*TIMINGS[:7], ('splitKreduce_kernel', 1.0), *TIMINGS[7:]]
    assert operations(timings)[4:9] == ['jvp(shared)/quantize_rows/mpmd_map', *['jit(_step)'] * 3, 'jvp(swiglu)/mul']
    both = HLO.replace('jvp(route)/dot_general', 'jvp(shared)/dot_general')
    kernels = parts.located(timings, parts.instructions(both))
    assert [kernel.op_name for kernel in kernels[5:8]] == ['jit(_step)/jvp(shared)'] * 3


def test_fused_instructions_are_listed_with_their_size():
    fusion = parts.instructions(HLO)[-1]
    assert fusion.kernels == ('loop_add_fusion_3',)
    assert [(one.op_name.rpartition('/')[2], one.elements) for one in fusion.fused] == [
        ('gather', 64 * 8 * 128), ('reduce_sum', 64 * 128), ('mul', 64 * 128), ('add', 64 * 128)
    ]  # fmt: skip


def test_a_fusion_belongs_where_most_of_its_elements_do():
    rules = [Rule('ours', scope='shared'), Rule('moved', scope='combine')]
    kernel = parts.located(TIMINGS, parts.instructions(HLO))[9]
    assert parts.part_of(kernel, rules) == 'moved'
    assert parts.part_of(kernel._replace(fused=()), rules) == 'ours'
    assert parts.part_of(kernel._replace(fused=(Fused('nowhere', 10**9),)), rules) == 'ours'


def test_the_first_rule_that_holds_counts_and_the_rest_is_other():
    kernels = [
        Kernel('a_1', 1.0, 'x/y'),
        Kernel('a_2', 2.0),
        Kernel('b', 4.0, 'x'),
        Kernel('c', 8.0),
        Kernel('d', 16.0),
    ]
    rules = [Rule('both', kernel='^a', scope='x'), Rule('name', kernel='^a'), Rule('scope', scope='^x')]
    assert parts.sums(kernels, rules) == {'both': 1, 'name': 2, 'scope': 4, 'other': 24}
    assert [kernel.name for kernel in parts.longest(kernels, rules)] == ['d', 'c']
    assert [kernel.name for kernel in parts.longest(kernels, rules, count=1)] == ['d']


@pytest.mark.parametrize(
    ('part', 'scope', 'name'),
    [
        (moe_layer.PRODUCTS, 'jvp()/grouped_gemm_fp8/mpmd_map', 'grouped_gemm_fp8_mosaic_gpu_kernel'),
        (moe_layer.PRODUCTS, 'transpose(jvp())/grouped_gemm_bf16/mpmd_map', 'grouped_gemm_bf16_mosaic_gpu_kernel'),
        (moe_layer.WEIGHT_GRADIENTS, '', 'grouped_wgrad_bf16_mosaic_gpu_kernel'),
        (moe_layer.WEIGHT_GRADIENTS, 'transpose(jvp())/split', 'wrapped_slice_1'),
        (moe_layer.WEIGHT_GRADIENTS, 'transpose(jvp(weights))/convert_element_type', 'loop_convert_fusion'),
        (moe_layer.PREPARED, 'jvp(weights)/concatenate', 'input_concatenate_fusion'),
        (moe_layer.PREPARED, 'jvp(shared)/quantize_blocks/mpmd_map', 'quantize_blocks_mosaic_gpu_kernel'),
        (moe_layer.PREPARED, 'jvp(shared)/convert_element_type', 'wrapped_convert_2'),
        (moe_layer.SHARED, 'transpose(jvp(shared))/convert_element_type', 'loop_convert_fusion'),
        (moe_layer.SHARED, 'jvp(shared)/quantize_rows_and_columns/mpmd_map', 'quantize_rows_and_columns_mosaic_gpu'),
        (moe_layer.SHARED, 'transpose(jvp(shared))/...D,DF->...F/transpose', 'gemm_fusion_dot_14'),
        (moe_layer.SHARED, '', 'wgrad_fp8_mosaic_gpu_kernel'),
        (moe_layer.SHARED, '', 'nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT'),
        (moe_layer.QUANTISED, 'jvp()/quantize_rows/mpmd_map', 'quantize_rows_mosaic_gpu_kernel'),
        (moe_layer.QUANTISED, 'transpose(jvp())/requantize_columns/mpmd_map', 'requantize_columns_mosaic_gpu_kernel'),
        (moe_layer.SWIGLU, 'jvp()/swiglu_quantize/mpmd_map', 'swiglu_quantize_mosaic_gpu_kernel'),
        (moe_layer.SWIGLU, 'transpose(jvp(swiglu))/split', 'input_convert_reduce_fusion'),
        (moe_layer.ROUTER, 'jvp(route)/MD,DE->ME/dot_general', 'nvjet_sss'),
        (moe_layer.ROUTER, 'transpose(jvp(route))/mul', 'loop_multiply_fusion'),
        (moe_layer.ROUTER, 'jvp(sort)/scatter', 'input_scatter_fusion'),
        (moe_layer.ROUTER, '', SORT),
        (moe_layer.PERMUTE, 'jvp(permute)/jit(_take)/select_n', 'loop_select_fusion'),
        (moe_layer.PERMUTE, 'transpose(jvp(combine))/permute/jit(_take)/select_n', 'loop_select_fusion'),
        (moe_layer.COMBINE, 'jvp(combine)/reduce_sum', 'loop_reduce_fusion'),
        (moe_layer.COMBINE, 'transpose(jvp(permute))/combine/reduce_sum', 'loop_reduce_fusion'),
        (parts.OTHER, 'transpose(jvp())/add_any', 'loop_add_fusion'),
        (parts.OTHER, 'jvp(permuted)/mul', 'loop_multiply_fusion'),
    ],
)
def test_kernels_of_a_layer_belong_to_their_parts(part, scope, name):
    assert recipe(f'jit(<lambda>)/jit(step)/{scope}' if scope else '', name) == part


@functools.cache
def results(name: str) -> dict:
    """What a contender computes at a tiny size, by the reference implementation."""
    sets = moe_layer.inputs(TINY, jax.random.key(0))
    return jax.jit(functools.partial(moe_layer.step, moe_layer.layers(TINY)[name]))(*sets)


def test_the_contenders_compute_the_same_layer():
    params, x_BTD, _ = moe_layer.inputs(TINY, jax.random.key(0))
    bf16 = results('bf16')
    assert bf16['output'].shape == x_BTD.shape == bf16['d_x'].shape
    for name, part in params.items():
        assert jax.tree.map(lambda d: (d.shape, d.dtype), bf16[f'd_{name}']) == jax.tree.map(
            lambda w: (w.shape, w.dtype), part
        )
    for name, low, high in (('ragged_dot', 0, 1e-4), ('fp8', 1e-4, 5e-3)):
        other = results(name)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == jax.tree.map(lambda x: (x.shape, x.dtype), bf16)
        np.testing.assert_array_equal(other['load'], bf16['load'])
        for part in ('output', 'd_x', 'd_router', 'd_experts', 'd_shared'):
            assert low <= checks.difference(other[part], bf16[part]) < high, (name, part)
            assert all(np.any(leaf) for key, leaf in _leaves(other[part]) if 'bias' not in key)


def _leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_the_command_measures_writes_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(moe_layer, 'SMALL', TINY)
    monkeypatch.setattr(moe_layer, 'layers', cheap_layers)
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.5')
    monkeypatch.setattr(moe_layer, 'hopper_cores', lambda: 132)
    monkeypatch.setattr(timing.Clock, 'detect', lambda: FakeClock('kernels'))
    monkeypatch.setattr(parts, 'kernel_milliseconds', lambda clock, work: [*TIMINGS[:3], ('grouped_gemm_fp8', 2.0)])
    monkeypatch.setattr(timing.JaxWork, 'compiled_text', lambda self: HLO)
    data, picture = tmp_path / 'a.json', tmp_path / 'a.png'
    arguments = ['--quick', '--router-experts', '16', '--output', str(data), '--plot', str(picture)]
    assert moe_layer.main(arguments) == 0
    written = json.loads(data.read_text())
    assert written['command'].endswith(' '.join(arguments))
    assert {'device', 'jax', 'driver', 'date'} <= written.keys()
    (size,) = written['sizes']
    assert size['shape'] == TINY._asdict()
    assert {name: one['ms'] for name, one in size['contenders'].items()} == {'bf16': 10, 'fp8': 20, 'ragged_dot': 30}
    assert size['ratios'] == {'bf16 / fp8': 0.5, 'ragged_dot / bf16': 3}
    assert size['contenders']['ragged_dot']['errors']['output'] == 0
    table = size['parts_ms']['fp8']
    assert table.keys() == set(moe_layer.PARTS)
    assert sum(table.values()) == pytest.approx(20)
    assert (table[moe_layer.PRODUCTS], table[moe_layer.ROUTER], table[moe_layer.IDLE]) == (2, 6, 12)
    assert [kernel['part'] for kernel in size['kernels']['fp8']] == [moe_layer.ROUTER] * 3 + [moe_layer.PRODUCTS]
    assert written['router'] == {
        'experts': 16, 'groups': 8, 'top_groups': 4, 'ms': 10, 'share_of_layer': {'fp8': 0.5, 'bf16': 1}
    }  # fmt: skip
    assert picture.read_bytes().startswith(b'\x89PNG')
    assert len(list(tmp_path.iterdir())) == 2
    printed = capsys.readouterr().out
    for text in (
        'ragged_dot / bf16: 3.00',
        'products and input gradients',
        '50.0% of the fp8 layer',
        'error against bf16',
    ):
        assert text in printed


def test_a_contender_that_does_not_fit_is_told_and_others_fail(monkeypatch):
    def too_large(*_, **__):
        raise jax.errors.JaxRuntimeError(f'{reason}: Out of memory while trying to allocate 56.25GiB\nand more')

    monkeypatch.setattr(moe_layer, 'layers', lambda size: cheap_layers(size) | {'ragged_dot': too_large})
    reason = 'RESOURCE_EXHAUSTED'
    result = moe_layer.measure(TINY, FakeClock('span'), (*moe_layer.RECIPES, moe_layer.RAGGED), with_parts=True)
    failure = result['contenders']['ragged_dot']['failure']
    assert failure.startswith('out of memory: ')
    assert failure.endswith('56.25GiB')
    assert result['ratios'] == {'bf16 / fp8': 0.5}
    assert result['parts_failure'] == 'CUPTI does not serve'
    printed = moe_layer.lines(result)
    assert any(line.startswith('  ragged_dot') and failure in line for line in printed)
    assert printed[-1] == 'no table of parts: CUPTI does not serve'
    reason = 'INTERNAL'
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
        moe_layer.measure(TINY, FakeClock('span'), (*moe_layer.RECIPES, moe_layer.RAGGED))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'need a Hopper GPU'),
        (['--quick', '--router-experts', '256'], 'need a Hopper GPU'),
        (['--router-experts', '20'], 'must be a multiple of num_groups=8'),
        (['--router-experts', '8'], 'top_k=8 exceeds'),
        (['--output', 'missing/a.json'], 'missing is no folder'),
        (['--plot', 'missing/a.png'], 'missing is no folder'),
    ],
)
def test_bad_input_or_no_gpu_ends_with_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moe_layer, 'hopper_cores', lambda: None)
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.5')
    try:
        code = moe_layer.main(arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, '')
    assert message in err.splitlines()[-1]
    assert 'GPU' not in message or err.count('\n') == 1
