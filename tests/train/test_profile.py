import functools
import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.profiler import ProfileData
from jaxlib import _hlo

from deepseek_jax.config import PrecisionConfig
from tests.pallas_kernels.hopper import DEVICE
from tests.support import changed
from tests.train.conftest import BATCH_SIZE, SEQUENCE_LENGTH
from train import guard, profile, run
from train.checkpoint import CheckpointConfig
from train.profile import IDLE, PARTS, Event, Profiler, Rates, part_of, shares
from train.step import Hyperparameters, init_state, train_step

# Types of jaxlib's reader have no module, which Python remarks on when they are made; as an error it ends the process.
pytestmark = pytest.mark.filterwarnings('ignore:builtin type .* has no __module__ attribute:DeprecationWarning')

FORWARD, BACKWARD = 'jit(step)/jvp(DeepSeekV3)/while/body', 'jit(step)/transpose(jvp(DeepSeekV3))/while/body'
REMAT = f'{BACKWARD}/moe_layers/checkpoint/rematted_computation'
EXAMPLES = [
    ('grouped_wgrad_bf16_mosaic_gpu_kernel', 'jit(step)/jvp(loss)/while/body/head/grouped_wgrad_bf16', profile.LOSS),
    ('nvjet_tst_256x128', 'jit(step)/jvp(loss)/while/body/head/dot_general', profile.LOSS),
    ('flash_mla_dkv_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/attend/flash_mla_dkv', profile.ATTENTION),
    ('loop_multiply_fusion_3', f'{BACKWARD}/moe_layers/checkpoint/attend', profile.ATTENTION),
    ('gemm_fp8_mosaic_gpu_kernel', f'{FORWARD}/moe_layers/linear/gemm_fp8', profile.LINEAR_FP8),
    ('wgrad_fp8_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/linear/wgrad_fp8', profile.LINEAR_FP8),
    ('nvjet_tst_256x128', f'{FORWARD}/mtp/linear/BTd,dD->BTD/dot_general', profile.LINEAR_BF16),
    ('gemm_fusion_dot_general_4', f'{REMAT}/linear/dot_general', profile.LINEAR_BF16),
    ('input_concatenate_fusion_9', f'{FORWARD}/moe_layers/linear', profile.LINEAR_JOINED),
    ('grouped_gemm_fp8_mosaic_gpu_kernel', f'{FORWARD}/moe_layers/experts/x', profile.EXPERTS_FORWARD),
    ('grouped_gemm_fp8_mosaic_gpu_kernel', f'{REMAT}/experts/grouped_gemm_fp8', profile.EXPERTS_FORWARD),
    ('grouped_gemm_bf16_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/experts/x', profile.EXPERTS_DGRAD),
    ('grouped_wgrad_fp8_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/experts/x', profile.EXPERTS_WGRAD),
    ('quantize_blocks_mosaic_gpu_kernel', f'{FORWARD}/moe_layers/linear/quantize_blocks', profile.WEIGHTS),
    ('wrapped_convert_2', f'{FORWARD}/mtp/linear/weights', profile.WEIGHTS),
    ('quantize_rows_and_columns_mosaic_gpu_kernel', f'{FORWARD}/moe_layers/linear/x', profile.QUANTISE),
    ('requantize_columns_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/experts/x', profile.QUANTISE),
    ('swiglu_quantize_backward_mosaic_gpu_kernel', f'{BACKWARD}/moe_layers/experts/x', profile.SWIGLU),
    ('loop_multiply_fusion', f'{FORWARD}/moe_layers/shared/swiglu/jit(silu)', profile.SWIGLU),
    ('loop_select_fusion', f'{BACKWARD}/moe_layers/experts/permute/jit(_take)', profile.ROUTES),
    ('loop_add_fusion', f'{FORWARD}/moe_layers/experts/combine', profile.ROUTES),
    ('gemm_fusion_dot_3', f'{FORWARD}/moe_layers/route', profile.ROUTER),
    ('input_scatter_fusion', f'{FORWARD}/moe_layers/experts/sort', profile.ROUTER),
    ('DeviceRadixSortOnesweepKernel', '', profile.ROUTER),
    ('loop_dynamic_update_slice_fusion', f'{FORWARD}/jit(dynamic_update_index_in_dim)', profile.STACKS),
    ('loop_broadcast_fusion_2', '', profile.STACKS),
    ('input_reduce_fusion', f'{BACKWARD}/moe_layers/moe_layers/checkpoint', profile.ELEMENTWISE),
    ('loop_add_fusion', 'jit(step)/moe_layers/add', profile.ELEMENTWISE),
    ('input_scatter_fusion', 'jit(step)/transpose(jvp(DeepSeekV3))/embed', profile.EMBEDDING),
    ('gemm_fusion_dot_8', 'jit(step)/transpose(jvp(loss))/while/body/checkpoint/head/dot_general', profile.LOSS),
    ('loop_exponential_fusion', 'jit(step)/jvp(loss)/while/body', profile.LOSS),
    ('loop_select_fusion_2', 'jit(step)', profile.OPTIMIZER),
    ('loop_add_fusion_2', 'jit(step)/while/body', profile.OPTIMIZER),
    ('ncclDevKernel_AllReduce_Sum_f32_RING_LL', 'jit(step)/psum', profile.COLLECTIVES),
    ('ncclDevKernel_SendRecv', 'jit(step)/jvp(DeepSeekV3)/experts/dispatch/all_to_all', profile.DISPATCH),
    ('ncclDevKernel_SendRecv', 'jit(step)/transpose(jvp(DeepSeekV3))/experts/collect/all_to_all', profile.DISPATCH),
    ('ncclDevKernel_AllGather_RING_LL', f'{REMAT}/context/all_gather', profile.CONTEXT),
    ('ncclDevKernel_ReduceScatter_Sum_bf16', 'transpose(jvp(DeepSeekV3))/context/reduce_scatter', profile.CONTEXT),
    ('ncclDevKernel_SendRecv', f'{REMAT}/stage/ppermute', profile.STAGES),
    ('ncclDevKernel_AllGather_RING_LL', 'jit(step)/shard_map/gather/all_gather', profile.GATHER),
    ('ncclDevKernel_ReduceScatter_Sum_f32_RING_LL', 'jit(step)/shard_map/reduce/reduce_scatter', profile.REDUCE),
    ('MemcpyD2D', '', profile.COPIES),
    ('loop_maximum_fusion', '', profile.OTHER),
]


@pytest.mark.parametrize(('name', 'scope', 'part'), EXAMPLES)
def test_an_event_belongs_to_the_part_that_its_name_and_scope_say(name, scope, part):
    assert part_of(name, scope) == part


def test_every_part_has_an_example():
    assert {part for _, _, part in EXAMPLES} == set(PARTS)


def event(part: str, start: float, duration: float) -> Event:
    name, scope, _ = next(example for example in EXAMPLES if example[2] == part)
    return Event(name, scope, start, duration)


def nonzero(events: list[Event]) -> dict[str, float]:
    return {part: duration for part, duration in shares(events).items() if duration}


A, B, C, COPY, SUM = profile.ATTENTION, profile.ROUTER, profile.LOSS, profile.COPIES, profile.COLLECTIVES
CASES = {
    'one after the other, with a gap': ([(A, 10, 5), (B, 15, 5), (A, 30, 1)], {A: 6, B: 5, IDLE: 10}),
    'two at once share the time': ([(A, 0, 10), (B, 4, 10)], {A: 7, B: 7}),
    'one inside another': ([(A, 0, 9), (B, 3, 3), (C, 3, 3)], {A: 7, B: 1, C: 1}),
    'of the same part': ([(A, 0, 10), (A, 5, 10)], {A: 15}),
    'a copy counts where nothing else runs': ([(A, 0, 10), (COPY, 8, 6)], {A: 10, COPY: 4}),
    'collectives too': ([(SUM, 0, 10), (A, 2, 3)], {SUM: 7, A: 3}),
    'copies among themselves': ([(COPY, 0, 4), (SUM, 0, 4)], {COPY: 2, SUM: 2}),
    'no time at all': ([(A, 5, 0), (B, 5, 2), (C, 7, 0)], {B: 2}),
    'nothing': ([], {}),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_parts_add_up_to_the_span(case):
    given, expected = CASES[case]
    events = [event(part, float(start), float(duration)) for part, start, duration in given]
    for order in (events, events[::-1]):
        assert nonzero(order) == expected
    running = [one for one in events if one.duration]
    span = max((one.start + one.duration for one in running), default=0) - min(
        (one.start for one in running), default=0
    )
    assert sum(expected.values()) == span


def test_longest_kernels_are_added_up_by_name_and_scope():
    events = [Event('a', 'x', 0, 1e6), Event('b', 'x', 5, 7e6), Event('a', 'x', 9, 4e6), Event('a', 'y', 9, 1.0)]
    found = profile.longest(events, steps=2, count=2)
    assert [(one['name'], one['scope'], one['milliseconds'], one['launches']) for one in found] == [
        ('b', 'x', 3.5, 0.5),
        ('a', 'x', 2.5, 1.0),
    ]


HLO = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b), metadata={op_name="sum"}
}

%fused (p0: f32[64,64], p1: f32[64]) -> f32[64] {
  %p0 = f32[64,64] parameter(0), metadata={op_name="jit(step)/parameters/large"}
  %p1 = f32[64] parameter(1)
  %zero = f32[] constant(0)
  %wide = f32[64,64] broadcast(%p1), dimensions={0}, metadata={op_name="jit(step)/broadcasts/large"}
  %multiply.1 = f32[64,64] multiply(%p0, %wide), metadata={op_name="jit(step)/route/mul"}
  %reduce.1 = f32[64] reduce(%multiply.1, %zero), dimensions={1}, to_apply=%sum, metadata={op_name="jit(step)/loss/sum"}
  ROOT %negate.1 = f32[64] negate(%reduce.1), metadata={op_name="jit(step)/loss/neg"}
}

%sliced (q0: f32[2,64]) -> f32[64] {
  %q0 = f32[2,64] parameter(0)
  %slice.1 = f32[1,64] slice(%q0), slice={[0:1], [0:64]}, metadata={op_name="jit(step)/index/slice"}
  %bitcast.1 = f32[64] bitcast(%slice.1)
  ROOT %call.1 = f32[64] custom-call(%bitcast.1), custom_call_target="k", metadata={op_name="jit(step)/experts/k/call"}
}

%bare (r0: f32[64]) -> f32[64] {
  %r0 = f32[64] parameter(0)
  ROOT %abs.1 = f32[64] abs(%r0)
}

ENTRY %main (x: f32[64,64], y: f32[64], z: f32[2,64]) -> f32[64] {
  %x = f32[64,64] parameter(0)
  %y = f32[64] parameter(1)
  %z = f32[2,64] parameter(2)
  %fusion.1 = f32[64] fusion(%x, %y), kind=kInput, calls=%fused, metadata={op_name="jit(step)/loss/neg"}
  %fusion.2 = f32[64] fusion(%z), kind=kCustom, calls=%sliced
  %fusion.3 = f32[64] fusion(%fusion.2), kind=kLoop, calls=%bare, metadata={op_name="jit(step)/embed/abs"}
  %copy.1 = f32[64] copy(%fusion.3)
  ROOT %add.1 = f32[64] add(%fusion.1, %copy.1), metadata={op_name="jit(step)/head/add"}
}
"""


@functools.cache
def module() -> bytes:
    return _hlo.hlo_module_from_text(HLO).as_serialized_hlo_module_proto()


def test_scope_of_an_instruction_is_where_most_of_it_comes_from():
    scopes = profile.scopes_of_module(module())
    assert {name: scopes[name] for name in ('fusion.1', 'fusion.2', 'fusion.3', 'copy.1', 'add.1')} == {
        'fusion.1': 'jit(step)/route',
        'fusion.2': 'jit(step)/experts/k/call',
        'fusion.3': 'jit(step)/embed/abs',
        'copy.1': 'jit(step)/embed/abs',
        'add.1': 'jit(step)/head/add',
    }


SPACE = """
planes {{
  name: "/host:metadata"
  event_metadata {{ key: 7 value {{ id: 7 name: "jit_step(7)" stats {{ metadata_id: 3 bytes_value: "{hlo}" }} }} }}
  stat_metadata {{ key: 3 value {{ id: 3 name: "Hlo Proto" }} }}
}}
planes {{ name: "/host:CPU" lines {{ name: "Stream of thoughts" events {{ metadata_id: 1 duration_ps: 9000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "thought" }} }} }}
{gpus}
"""
GPU = """
planes {{
  name: "/device:GPU:{number}"
  lines {{ name: "Stream #13(Kernel)" timestamp_ns: 1000
    events {{ metadata_id: 1 offset_ps: 0 duration_ps: 3000000
      stats {{ metadata_id: 1 str_value: "fusion.1" }} stats {{ metadata_id: 2 int64_value: 7 }}
      stats {{ metadata_id: 4 str_value: "wrong" }} }}
    events {{ metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000
      stats {{ metadata_id: 1 str_value: "fusion.1" }} stats {{ metadata_id: 2 int64_value: 8 }}
      stats {{ metadata_id: 4 str_value: "head/neg" }} stats {{ metadata_id: 5 str_value: "jit(step)" }} }} }}
  lines {{ name: "Stream #14(MemcpyD2H)" timestamp_ns: 1000
    events {{ metadata_id: 3 offset_ps: 1000000 duration_ps: 5000000 }} }}
  lines {{ name: "CUPTI overhead" timestamp_ns: 1000 events {{ metadata_id: 3 offset_ps: 0 duration_ps: 90000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "input_reduce_fusion_1" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "loop_add_fusion" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2H" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "program_id" }} }}
  stat_metadata {{ key: 4 value {{ id: 4 name: "name" }} }}
  stat_metadata {{ key: 5 value {{ id: 5 name: "prefix" }} }}
}}
"""


def field(number: int, data: bytes) -> bytes:
    """A field of bytes, serialized."""
    size, prefix = len(data), b''
    while size >= 0x80:
        prefix, size = prefix + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + prefix + bytes([size]) + data


def write_trace(folder: Path, gpus: int, date: int = 0) -> Path:
    hlo = ''.join(f'\\{byte:03o}' for byte in field(1, module()))
    text = SPACE.format(hlo=hlo, gpus=''.join(GPU.format(number=number) for number in range(gpus)))
    file = folder / 'plugins' / 'profile' / f'{date}' / 'host.xplane.pb'
    file.parent.mkdir(parents=True)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    os.utime(file, ns=(date, date))
    return file


def test_events_of_a_trace_have_the_scopes_of_their_program(tmp_path):
    write_trace(tmp_path, gpus=2, date=5)
    write_trace(tmp_path, gpus=0, date=4)
    devices = profile.read_trace(tmp_path)
    assert set(devices) == {'/device:GPU:0', '/device:GPU:1'}
    assert devices['/device:GPU:0'] == devices['/device:GPU:1']
    start = devices['/device:GPU:0'][0].start
    assert [one._replace(start=one.start - start) for one in devices['/device:GPU:0']] == [
        Event('input_reduce_fusion_1', 'jit(step)/route', 0, 3000),
        Event('loop_add_fusion', 'jit(step)/head/neg', 4000, 1000),
        Event('MemcpyD2H', '', 1000, 5000),
    ]
    write_trace(tmp_path, gpus=0, date=6)
    assert profile.read_trace(tmp_path) == {}


RATES = Rates(
    device_kind='NVIDIA H100 80GB HBM3',
    devices=2,
    seconds=0.5,
    tokens=8192,
    flops_per_token=60e9,
    peak_bytes=3 * 2**30,
)


def test_report_of_a_gpu(tmp_path):
    write_trace(tmp_path, gpus=2)
    found = profile.report(RATES, profile.read_trace(tmp_path), steps=2)
    assert json.loads(json.dumps(found)) == found
    assert {part: ms for part, ms in found['parts_ms'].items() if ms} == pytest.approx(
        {profile.ROUTER: 0.0015, profile.LOSS: 0.0005, profile.COPIES: 0.001}
    )
    assert found['traced_device'] == '/device:GPU:0'
    assert [one['launches'] for one in found['kernels']] == [0.5, 0.5, 0.5]
    assert (found['tokens_per_second'], found['tflops']) == (16384.0, pytest.approx(983.04))
    assert found['mfu'] == pytest.approx(983.04 / 989.4 / 2)
    shown = '\n'.join(profile.lines(found))
    for expected in ('router and sort', ' 50.0%', 'idle', '  0.0%', 'traced step', '100.0%', '500.000 ms', '16,384'):
        assert expected in shown
    assert 'MFU                 49.7% = flops_per_token * tokens_per_second / (devices * peak), causal' in shown
    assert 'peak 989.4 TFLOP/s (dense bf16)' in shown
    assert '3.00 GiB' in shown
    assert 'step by the clock   500.000 ms, of which kernels as traced take 0.003 ms' in shown
    assert profile.ATTENTION not in shown


def test_report_without_a_gpu_says_so_and_keeps_the_rates(tmp_path):
    write_trace(tmp_path, gpus=0)
    rates = RATES._replace(device_kind='cpu', devices=1, peak_bytes=None)
    found = profile.report(rates, profile.read_trace(tmp_path), steps=2)
    assert (found['parts_ms'], found['mfu'], found['tokens_per_second']) == (None, None, 16384.0)
    shown = '\n'.join(profile.lines(found))
    for expected in (
        'the trace holds no kernels of a GPU',
        'MFU                 not known',
        'no peak known',
        'not counted',
    ):
        assert expected in shown
    assert 'idle' not in shown


@pytest.fixture
def few_programs():
    """A trace holds every program of the process, and takes minutes to read with those that earlier tests have left."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def profiler(tmp_path):
    return functools.partial(Profiler, tmp_path / 'profile', tokens_per_step=512, flops_per_token=1e6)


@pytest.mark.usefixtures('few_programs')
def test_profiler_waits_four_times_writes_a_trace_and_ends_the_run(profiler, tmp_path, capsys):
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x, events = jnp.ones((64, 64)), []
    one = profiler(2, steps_left=9)
    called = [functools.partial(events.append, name) for name in ('wait', 'separate')]
    for number in range(40, 60):
        if not one.before_step(number, *called):
            break
        events.append(number)
        x = step(x)
    assert events == [40, 41, 42, 'wait', 43, 44, 'wait', 'separate', 45, 'wait', 46, 47, 'wait']
    found = json.loads((tmp_path / 'profile' / 'profile.json').read_text())
    assert found['device'] == 'cpu'
    assert found['steps'] == 2
    assert found['tokens_per_second'] == pytest.approx(512e3 / found['step_ms'])
    assert found['parts_ms'] is None
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    names = {name for _, name in profile.scopes_of_programs(trace.read_bytes())}
    assert any('dot' in name or 'fusion' in name for name in names)
    assert capsys.readouterr().out.splitlines() == profile.lines(found)


def test_profiler_refuses_a_run_without_enough_steps(profiler, tmp_path):
    profiler(2, steps_left=9)
    with pytest.raises(ValueError, match=r'steps_left=8 must exceed 8: 3 \+ 1 to warm up, 2 twice'):
        profiler(2, steps_left=8)
    with pytest.raises(ValueError, match='profile=0 must be at least 1'):
        profiler(0, steps_left=100)
    assert list(tmp_path.iterdir()) == []


def arguments_of_a_step(model, optimizer, rows: int, length: int):
    state = jax.eval_shape(lambda key: init_state(key, model, optimizer), jax.random.key(0))
    shape = jax.ShapeDtypeStruct
    batch = {name: shape((rows, length + 1), jnp.int32) for name in ('tokens', 'segments')}
    batch['weights'] = shape((rows, length), jnp.float32)
    return state, batch, Hyperparameters(*[shape((), jnp.float32)] * len(Hyperparameters._fields))


def test_parts_can_be_told_apart_in_a_compiled_step(model, optimizer, objective):
    given = arguments_of_a_step(model, optimizer, BATCH_SIZE, SEQUENCE_LENGTH)
    program = train_step.lower(*given, model=model, optimizer=optimizer, config=objective).compile()
    (compiled,) = program.runtime_executable().hlo_modules()
    scopes = profile.scopes_of_module(compiled.as_serialized_hlo_module_proto())
    parts = Counter(part_of('a kernel of XLA', scope) for scope in scopes.values() if scope.startswith('jit('))
    expected = {profile.ATTENTION, profile.LOSS, profile.ROUTER, profile.SWIGLU, profile.EMBEDDING, profile.OPTIMIZER}
    assert {part for part in expected if parts[part] < 3} == set()
    assert parts[profile.OTHER] == 0


def kernels(jaxpr: Jaxpr, path: str = 'jit(step)') -> Iterator[tuple[str, str]]:
    """Names of the Mosaic GPU kernels of a program and their paths."""
    for equation in jaxpr.eqns:
        here = f'{path}/{equation.source_info.name_stack}'
        if equation.primitive.name == 'mpmd_map':
            yield f'{equation.params["name"]}_mosaic_gpu_kernel', here
            continue
        is_jaxpr = lambda value: isinstance(value, Jaxpr | ClosedJaxpr)  # noqa: E731
        for value in filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr)):
            yield from kernels(value.jaxpr if isinstance(value, ClosedJaxpr) else value, here)


def test_kernels_of_a_step_belong_to_parts_of_their_own(optimizer, objective):
    """Of one block of experts, which the backward pass computes again."""
    widths = {'nope_head_dim': 128, 'rope_head_dim': 64, 'value_head_dim': 128, 'num_heads': 2}
    model = changed(
        mla=widths | {'kv_rank': 128, 'query_rank': 128},
        moe={'ffn_dim': 128},
        model_dim=128,
        num_layers=1,
        num_dense_layers=0,
        mtp_depth=0,
        remat='full',
        precision=PrecisionConfig(recipe='fp8'),
    )
    given = arguments_of_a_step(model, optimizer, rows=1, length=128)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        traced = train_step.trace(*given, model=model, optimizer=optimizer, config=objective)
    parts = Counter(part_of(*kernel) for kernel in kernels(traced.jaxpr.jaxpr))
    assert parts[profile.EXPERTS_FORWARD] == 2 + 1  # the second product is not needed again
    assert parts[profile.EXPERTS_DGRAD] == 2
    assert parts[profile.EXPERTS_WGRAD] == 3
    assert parts[profile.ATTENTION] == 2 + 2
    assert parts.keys() == {
        profile.ATTENTION, profile.EXPERTS_FORWARD, profile.EXPERTS_DGRAD, profile.EXPERTS_WGRAD, profile.LINEAR_FP8,
        profile.WEIGHTS, profile.QUANTISE, profile.SWIGLU,
    }  # fmt: skip


@pytest.mark.usefixtures('few_programs')
def test_profiled_run_stops_after_its_steps(tmp_path, model, data, optimizer, objective, capsys):
    arguments = {'model': model, 'data': data, 'optimizer': optimizer, 'objective': objective, 'guard': guard.DEFAULT}
    arguments |= {'checkpoints': CheckpointConfig(), 'batch_size': 4, 'sequence_length': 16, 'seed': 0}
    arguments |= {'checkpoint_every': 2, 'eval_every': 2, 'eval_rows': 8, 'total_steps': 60}
    with pytest.raises(ValueError, match='steps_left=60 must exceed 62'):
        run.train(**arguments, run_dir=str(tmp_path / 'no'), profile=29)
    assert list(tmp_path.iterdir()) == []
    assert run.train(**arguments, run_dir=str(tmp_path / 'run'), profile=2) is None
    found = json.loads((tmp_path / 'run' / 'profile' / 'profile.json').read_text())
    assert found['tokens_per_step'] == 64
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert {line['step'] for line in lines} <= set(range(1, 9))
    assert not any('heldout_bits_per_byte' in line for line in lines)
    assert 'tokens a second' in capsys.readouterr().out
