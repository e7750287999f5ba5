import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import (
    __main__ as main,
)
from pallas_kernels.bench import (
    accumulation,
    cases,
    checks,
    expert_ffn,
    gemm_fp8,
    grouped_gemm_fp8,
    linear_fp8,
    peers,
    quantize_fp8,
    report,
    roofline,
    search,
    timing,
    wgrad_fp8,
)
from pallas_kernels.bench.cases import Ceilings, Row

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {'device': 'a GPU', 'driver': '1', 'jax': '2', 'jaxlib': '2', 'torch': None}


class FakeClock(timing.Clock):
    """Gives every work the next of the listed times, after it ran once."""

    def __init__(self, *times: float):
        super().__init__('span')
        self._times = list(times)

    def microseconds(self, works, method=None):
        for work in works:
            work.enqueue()
            work.wait()
        return [self._times.pop(0) for _ in works], method or self.method


class FakeWork:
    """Calls that take `seconds` a pass, and as long again once a round."""

    def __init__(self, seconds: float, calls: int = 1):
        self.seconds, self.calls, self.queued = seconds, calls, 0

    def enqueue(self):
        self.queued += 1

    def wait(self):
        pass

    def span(self, passes):
        return self.seconds * (passes + 1)


class FakeCupti:
    """Reports `kernels` kernels for every pass of the works that it watches."""

    def __init__(self, work: FakeWork, kernels: int, milliseconds: float):
        self.work, self.kernels, self.milliseconds = work, kernels, milliseconds

    def _cupti_init(self):
        self.start = self.work.queued

    def _cupti_get_timings(self, finalize):
        return [('kernel', self.milliseconds)] * (self.kernels * (self.work.queued - self.start))


def product(lhs, rhs):
    return gemm_fp8.case('fprop', 8, 128, 256).run(lhs, rhs, implementation='reference')


def small_case(**changes) -> cases.Case:
    """A product that a CPU does, served by the reference under the kernel's name."""

    def peer(sets):
        return peers.PeerWork(timing.JaxWork(product, sets), lambda: 2 * product(*sets[0]))

    ours = {'run': lambda *inputs, implementation: product(*inputs), 'peer': peer}
    return dataclasses.replace(gemm_fp8.case('fprop', 8, 128, 256), **{**ours, **changes})


def rows() -> list[Row]:
    product = Row('gemm_fp8', 'fprop', {'M': 1, 'N': 2, 'K': 3}, flops=8_000_000, bytes=1_000_000, peer='peer')
    mover = Row('quantize_fp8', 'rows', {'M': 1, 'K': 3}, flops=0, bytes=2_000_000)
    return [cases.timed(product, 10.0, 20.0), cases.timed(mover, 4.0, 2.0), dataclasses.replace(mover, failure='no')]


def test_a_product_counts_operations_and_bytes():
    case = gemm_fp8.case('fprop', 6, 256, 384)
    assert case.flops == 2 * 6 * 256 * 384
    values = 6 * 384 + 256 * 384 + 2 * 6 * 256
    scales = 4 * (3 * 128 + 2 * 3)
    assert case.moved_bytes() == values + scales
    wgrad = wgrad_fp8.case(256, 128, 512)
    assert wgrad.moved_bytes() == (256 + 128) * 512 + 4 * 4 * (256 + 128) + 4 * 256 * 128


@pytest.mark.parametrize(
    ('name', 'dtype', 'expected'),
    [
        ('rows', 'bfloat16', 3 * 256 * 384 + 4 * 3 * 256),
        ('columns', 'bfloat16', 3 * 256 * 384 + 4 * 2 * 384),
        ('rows_and_columns', 'bfloat16', 4 * 256 * 384 + 4 * (3 * 256 + 2 * 384)),
        ('e5m6', 'bfloat16', 3.5 * 256 * 384 + 4 * 3 * 256),
        ('blocks', 'float32', 6 * 256 * 384 + 4 * 2 * 6),
    ],
)
def test_a_quantisation_counts_bytes_and_compares_with_its_reference(name, dtype, expected):
    case = quantize_fp8.case(name, (256, 384), dtype)
    assert case.flops == 0
    assert case.moved_bytes() == expected
    inputs = case.inputs(jax.random.key(0))
    results = case.run(*inputs, implementation='reference')
    assert checks.difference(case.dense(results), case.reference(*inputs)) == 0
    copies = 2 if name in ('rows_and_columns', 'blocks') else 1
    dense = jax.tree.leaves(case.dense(results))
    source = inputs[0].T if name == 'columns' else inputs[0]
    assert len(dense) == copies
    assert checks.difference(dense[0], source) < 2e-3


def test_cases_are_distinct_and_as_promised():
    listed = [case for cases in main.CASES.values() for case in cases(False)]
    names = [(case.op, case.name, tuple(case.shape.items())) for case in listed]
    assert len(set(names)) == len(names)
    products = {tuple(case.shape.values()) for case in listed if case.op == 'gemm_fp8' and case.name == 'fprop'}
    assert products == {(m, n, k) for m in (64, 128, 4096, 8192) for n, k in gemm_fp8.WEIGHTS}
    gradients = {tuple(case.shape.values()) for case in listed if case.op == 'wgrad_fp8'}
    assert {(7168, 4096, 4096), (7168, 4096, 8192), (7168, 4096, 16384), (512, 32768, 4096)} <= gradients
    for op in ('gemm_fp8', 'wgrad_fp8', 'quantize_fp8', 'linear_fp8', 'grouped_gemm_fp8', 'swiglu_quantize'):
        quick = [(case.name, case.shape) for case in main.CASES[op](True)]
        assert quick
        assert all(one in [(case.name, case.shape) for case in main.CASES[op](False)] for one in quick)


@pytest.mark.parametrize('form', ['contiguous', 'wgrad', 'masked'])
def test_a_grouped_case_compares_real_rows_with_its_reference(form, monkeypatch):
    sizes = (130, 0, 3)
    monkeypatch.setattr(grouped_gemm_fp8, 'FEW', (5, 0, 64))
    monkeypatch.setattr(grouped_gemm_fp8, 'EXPERTS', 3)
    case = {
        'contiguous': lambda: grouped_gemm_fp8.contiguous('three', sizes, 64, 128),
        'wgrad': lambda: grouped_gemm_fp8.wgrad('three', sizes, 64, 128),
        'masked': lambda: grouped_gemm_fp8.masked(64, 128),
    }[form]()
    assert case.flops == 2 * (69 if form == 'masked' else 133) * 64 * 128
    inputs = case.inputs(jax.random.key(0))
    wide = {} if form == 'wgrad' else {'out_dtype': jnp.float32}
    results = case.run(*inputs, **wide, implementation='reference')
    assert checks.difference(case.dense(results), case.reference(*inputs)) == 0
    assert np.any(results)


def test_zipf_sizes_are_uneven_and_complete():
    sizes = grouped_gemm_fp8.zipf_sizes(32, 32768)
    assert (len(sizes), sum(sizes)) == (32, 32768)
    assert max(sizes) > 20 * min(sizes) > 0


def test_the_expert_cases_compare_the_same_layer():
    """Forward and gradients of float8, bfloat16 and plain JAX at a small size."""
    inputs = jax.jit(expert_ffn._inputs, static_argnums=range(1, 6))(jax.random.key(0), 40, 2, 4, 128, 128)
    float8, bfloat16 = expert_ffn.cases(True)
    results = [jax.jit(functools.partial(case.run, implementation='reference'))(*inputs) for case in (float8, bfloat16)]
    plain = jax.jit(functools.partial(expert_ffn._step, expert_ffn._ragged_dot))(*inputs)
    assert checks.difference(results[1], plain) < 1e-4
    assert 1e-4 < checks.difference(results[0], plain) < 5e-3


def test_the_linear_case_keeps_the_output_and_compares_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (128, 256), jnp.bfloat16)
    w = jax.random.normal(keys[1], (256, 128)) / 16
    dy = jax.random.normal(keys[2], (128, 128), jnp.bfloat16)
    (case,) = linear_fp8.cases(False)
    assert case.flops == 3 * 2 * 4096 * 4096 * 7168
    results = jax.jit(functools.partial(case.run, implementation='reference'))(x, w, dy)
    expected = jax.jit(case.reference)(x, w, dy)
    dx, dw = case.dense(results)
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    np.testing.assert_allclose(results[0], jnp.sum((x.astype(jnp.float32) @ w) * dy), rtol=0.3)
    assert 1e-5 < checks.difference((dx, dw), expected) < 3e-3
    assert case.peer is not None
    assert 0 < checks.difference(case.peer([(x, w, dy)]).results(), expected) < 1e-4


def test_inputs_are_random_and_as_many_as_exceed_the_cache():
    assert [timing.number_of_sets(size) for size in (1, 10_000_000, 109_999_999, 10**9)] == [32, 11, 2, 1]
    lhs, rhs = gemm_fp8.operands(jax.random.key(0), 64, 256, 384)
    for x in (lhs, rhs):
        values = np.asarray(x.values, np.float32)
        assert np.isfinite(values).all()
        assert 100 < values.std() < 200
        assert (np.asarray(x.scales) > 0).all()
    other, _ = gemm_fp8.operands(jax.random.key(1), 64, 256, 384)
    assert not np.array_equal(np.asarray(lhs.values, np.float32), np.asarray(other.values, np.float32))


def test_times_become_rates_ratio_and_share():
    product, mover, failed = (cases.with_share(row, Ceilings(copy_gbs=1000.0, gemm_tflops=1.6)) for row in rows())
    assert (product.tflops, product.gbs, product.ratio) == pytest.approx((0.8, 100, 2))
    assert (product.bound, product.share) == ('compute', pytest.approx(0.5))
    assert (mover.tflops, mover.gbs, mover.ratio) == (None, pytest.approx(500), pytest.approx(0.5))
    assert (mover.bound, mover.share) == ('memory', pytest.approx(0.5))
    assert failed.share is None


def test_ceilings_rise_to_what_was_reached():
    ceilings = Ceilings(copy_gbs=700.0, gemm_tflops=0.0).including(rows())
    assert (ceilings.copy_gbs, ceilings.gemm_tflops) == pytest.approx((1000, 0.8)), 'a peer of 2 us moved 1000 GB/s'


def test_a_case_is_measured_and_checked():
    row = cases.measure(small_case(), FakeClock(5.0, 10.0))
    assert row.failure is None
    assert (row.us, row.peer_us, row.ratio, row.method) == (5, 10, 2, 'span')
    assert row.tflops == pytest.approx(row.flops / 5e-6 / 1e12)
    assert 0 < row.error < 1e-5
    assert row.peer_error == pytest.approx(1 - 2 * 2 / (1 + 4), rel=0.01), 'the peer is twice the result'
    assert row.poisoned is not None


def test_a_case_without_a_peer_of_its_own_is_compared_with_a_copy():
    row = cases.measure(small_case(peer=None), FakeClock(5.0, 10.0))
    assert (row.failure, row.peer_failure, row.ratio) == (None, None, 2)


def test_a_failing_kernel_or_peer_is_written_into_the_row():
    def fails(*_, **__):
        raise NotImplementedError('too odd\nand more')

    def run(*inputs, implementation):
        return fails() if implementation == 'pallas' else product(*inputs)

    row = cases.measure(small_case(run=run), FakeClock())
    assert (row.failure, row.us, row.error) == ('NotImplementedError: too odd', None, None)
    row = cases.measure(small_case(peer=fails), FakeClock(5.0))
    assert (row.failure, row.peer_failure, row.us, row.ratio) == (None, 'NotImplementedError: too odd', 5, None)


def test_torch_is_optional():
    if 'torch' in sys.modules:
        pytest.skip('torch is loaded')
    row = cases.measure(small_case(peer=gemm_fp8.case('fprop', 8, 128, 256).peer), FakeClock(5.0))
    assert row.us == 5
    assert row.peer_failure.startswith('RuntimeError: torch')


def test_difference_is_the_one_of_the_specification():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30, 40)).astype(np.float32)
    expected = 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())
    assert checks.difference([x, x], [y, y]) == pytest.approx(expected, rel=1e-5)
    assert checks.difference(x, x) == 0
    assert checks.difference(0 * x, 0 * x) == 0
    assert np.isnan(checks.difference(np.where(x > 2, np.nan, x), x))
    assert checks.difference(x.astype(jnp.bfloat16), x) < 1e-5


def test_poison_is_seen_where_results_lie_in_it():
    assert checks.lies_within([(10, 20), (40, 45)], [(15, 30), (5, 15), (40, 50)])
    assert not checks.lies_within([(10, 31)], [(5, 15), (15, 30)])
    assert not checks.lies_within([(10, 20), (30, 35)], [(5, 25)])
    results, poisoned = checks.in_poisoned_memory(lambda: [jnp.arange(1000.0) + 1])
    assert isinstance(poisoned, bool)
    np.testing.assert_array_equal(results[0], np.arange(1000.0) + 1)
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32):
        poison = np.full(16, checks.POISON, np.uint8).view(dtype)
        assert np.isnan(poison.astype(np.float32)).all()


def test_span_takes_out_what_a_round_costs_once():
    (first, second), method = timing.Clock('span').microseconds([FakeWork(2e-3, calls=4), FakeWork(1e-6)])
    assert (first, second, method) == (pytest.approx(500), pytest.approx(1), 'span')


def test_kernel_times_are_those_of_a_call():
    work = FakeWork(2e-3, calls=4)
    clock = timing.Clock('kernels', FakeCupti(work, kernels=8, milliseconds=0.01))
    assert clock.microseconds([work]) == ([pytest.approx(20)], 'kernels'), 'two kernels of 10 us a call'
    assert clock.microseconds([work], 'span') == ([pytest.approx(500)], 'span')
    clock = timing.Clock('kernels', FakeCupti(work, kernels=0, milliseconds=0.01))
    assert clock.microseconds([work]) == ([pytest.approx(500)], 'span'), 'CUPTI lost the kernels'


def test_a_pass_is_the_sum_of_its_kernels():
    assert timing.seconds_of_a_pass([1.0, 2.0, 1.0, 2.0, 1.0, 9.0], passes=3) == 3
    with pytest.raises(timing.LostKernelsError, match='7 kernels in 3 passes'):
        timing.seconds_of_a_pass([1.0] * 7, passes=3)


def test_a_clock_without_cupti_takes_spans(capsys):
    if jax.default_backend() == 'gpu':
        pytest.skip('CUPTI may serve')
    assert timing.Clock.detect().method == 'span'
    assert 'CUPTI does not serve' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='CUPTI does not serve'):
        timing.Clock.detect('kernels')


def test_works_of_jax_run_every_set():
    sets = [(jnp.full(3, i),) for i in range(4)]
    work = timing.JaxWork(lambda x: x + 1, sets)
    assert [int(out[0]) for out in work.enqueue()] == [1, 2, 3, 4]
    assert work.calls == 4
    assert work.span(2) > 0


def test_promotion_is_compared_with_none(monkeypatch):
    small = {'ROWS': 8, 'COLUMNS': 128, 'DEPTH': 512}
    for name, value in small.items():
        monkeypatch.setattr(accumulation, name, value)
    original = accumulation.gemm_fp8

    def reference(*operands, implementation, **options):
        return 1.001 * original(*operands, implementation='reference', **options)

    monkeypatch.setattr(accumulation, 'gemm_fp8', reference)
    monkeypatch.setattr(
        peers, 'without_promotion', lambda *x: 1.01 * jnp.matmul(x[0].astype('f4'), x[1].T.astype('f4'))
    )
    row = accumulation.measure()
    assert row.failure is None
    assert (row.error, row.peer_error, row.ratio) == pytest.approx((0.001, 0.01, 10), rel=1e-3)
    assert row.us is None


def test_json_holds_every_row_and_where_it_was_measured(tmp_path):
    path = tmp_path / 'out.json'
    report.write_json(path, rows(), Ceilings(1000.0, 2.0), machine=MACHINE, command='python -m x', timing='kernels')
    written = json.loads(path.read_text())
    assert MACHINE.items() <= written.items()
    assert (written['command'], written['timing']) == ('python -m x', 'kernels')
    assert written['ceilings'] == {'copy_gbs': 1000, 'gemm_tflops': 2}
    assert [Row(**row) for row in written['rows']] == rows()
    assert written['date'].startswith('20')
    assert list(tmp_path.iterdir()) == [path]


def test_the_machine_is_named():
    named = report.machine()
    assert named['device'] == jax.devices()[0].device_kind
    assert named['jax'] == jax.__version__
    assert {'driver', 'torch', 'platform'} <= named.keys()


@pytest.mark.parametrize('some', [slice(None), slice(0, 1), slice(1, 2), slice(2, 3)])
def test_the_roofline_is_drawn(tmp_path, some):
    path = tmp_path / 'out.png'
    roofline.plot(path, rows()[some], Ceilings(1000.0, 2.0), 'a GPU')
    assert path.read_bytes().startswith(b'\x89PNG')
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_shows_failures_and_unpoisoned_results():
    product, _, failed = rows()
    assert '10.0' in report.line(product)
    assert '2.00' in report.line(product)
    assert '!' not in report.line(product)
    assert '!' in report.line(dataclasses.replace(product, poisoned=False))
    assert report.line(failed).endswith('failed: no')
    assert 'no peer: torch' in report.line(dataclasses.replace(product, peer_failure='torch'))


def test_search_takes_the_fastest_right_candidate(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Config:
        kind: str

    def run(case, config):
        if config.kind == 'broken':
            raise ValueError('does not compile')
        factor = 1.1 if config.kind == 'wrong' else 1
        return lambda lhs, rhs: factor * product(lhs, rhs)

    space = search.Space(
        cases=lambda quick: [small_case(), small_case()],
        key=search._gemm_key,
        candidates=lambda case: [Config(kind) for kind in ('slow', 'broken', 'wrong', 'fast')],
        run=run,
    )
    monkeypatch.setitem(search.SPACES, 'gemm_fp8', space)
    winners = search.search('gemm_fp8', FakeClock(7.0, 3.0), budget=60.0, quick=False)
    assert winners == [{'op': 'gemm_fp8', 'key': {'m': 8, 'n': 128, 'k': 256}, 'config': {'kind': 'fast'}, 'us': 3}]
    progress = capsys.readouterr().err
    assert 'does not compile' in progress
    assert 'wrong: error' in progress


def test_candidates_past_the_budget_are_left_out():
    outcomes = search.compile_all(lambda config: config, [1, 2], budget=-1.0)
    assert [(config, built) for config, built, _ in outcomes] == [(1, None), (2, None)]
    assert all('budget' in failure for _, _, failure in outcomes)
    assert search.compile_all(lambda config: 2 * config, [1, 2], budget=60.0) == [(1, 2, None), (2, 4, None)]


@pytest.mark.parametrize('op', ['gemm_fp8', 'wgrad_fp8', 'grouped_gemm_fp8', 'quantize_fp8'])
def test_every_searched_case_has_candidates_with_the_one_in_use(op):
    space = search.SPACES[op]
    for case in space.cases(True):
        configs = list(space.candidates(case))
        assert len(configs) > 1
        assert all(dataclasses.is_dataclass(config) for config in configs)
        assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'need a Hopper GPU'),
        (['gemm_fp8', '--quick'], 'need a Hopper GPU'),
        (['search', 'gemm_fp8'], 'need a Hopper GPU'),
        (['gemm_fp9'], "'gemm_fp9' is no operation"),
        (['search', 'linear_fp8'], 'invalid choice'),
    ],
)
def test_bad_input_or_no_gpu_is_one_line_and_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(main, 'hopper_cores', lambda: None)
    try:
        code = main.main(arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, '')
    assert (err.count('\n'), err.startswith('error: ')) == (1, True)
    assert message in err


def test_files_that_cannot_be_written_are_refused_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, 'hopper_cores', lambda: 132)
    assert main.main(['--output', str(tmp_path / 'missing' / 'a.json')]) == 2
    assert 'is no folder' in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='CUPTI may serve')
@pytest.mark.parametrize('arguments', [[], ['search', 'gemm_fp8']])
def test_kernel_times_asked_for_without_cupti_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(main, 'hopper_cores', lambda: 132)
    assert main.main([*arguments, '--timing', 'kernels']) == 2
    assert capsys.readouterr().err.startswith('error: CUPTI does not serve')


def test_the_command_measures_writes_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, 'hopper_cores', lambda: 132)
    monkeypatch.setattr(timing.Clock, 'detect', lambda method: FakeClock(5.0, 10.0, 4.0))
    monkeypatch.setattr(peers, 'copy_gbs', lambda clock: 3000.0)
    monkeypatch.setattr(peers, 'gemm_tflops', lambda clock: 1500.0)
    monkeypatch.setitem(main.CASES, 'gemm_fp8', lambda quick: [small_case()])
    bad = functools.partial(small_case, op='wgrad_fp8', run=lambda: None)
    monkeypatch.setitem(main.CASES, 'wgrad_fp8', lambda quick: [bad()])
    data, picture = tmp_path / 'a.json', tmp_path / 'a.png'
    assert main.main(['gemm_fp8', '--output', str(data), '--plot', str(picture)]) == 0
    (row,) = json.loads(data.read_text())['rows']
    assert (row['us'], row['peer_us']) == (5, 10)
    assert row['share'] > 0
    assert picture.stat().st_size > 0
    assert 'gemm_fp8 fprop' in capsys.readouterr().out
    assert main.main(['wgrad_fp8']) == 1, 'a row failed'


def test_without_a_gpu_the_command_ends_with_code_2():
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'pallas_kernels.bench']
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count('\n')) == (2, '', 1)


@pytest.mark.parametrize(
    ('blocks', 'case'), [(True, gemm_fp8.case('fprop', 6, 256, 384)), (False, wgrad_fp8.case(192, 64, 384))]
)
def test_peer_gets_the_scales_of_the_rows_alone(blocks, case, monkeypatch):
    """Ours are filled up to whole blocks of rows, which cuBLASLt refuses."""
    shapes = []
    torch = types.SimpleNamespace(
        _scaled_mm=lambda *operands, out_dtype: shapes.extend(x.shape for x in operands), float32=None
    )
    monkeypatch.setattr(peers, 'load_torch', lambda: torch)
    monkeypatch.setattr(peers, 'to_torch', np.asarray)
    monkeypatch.setattr(peers, 'TorchWork', lambda torch, calls: calls)
    [call] = peers.scaled_products([case.inputs(jax.random.key(0))], blocks=blocks, out='float32').work
    call()
    m, n, k = case.shape.values()
    assert shapes == [(m, k), (k, n), (m, k // 128), (k // 128, n // 128 if blocks else n)]
