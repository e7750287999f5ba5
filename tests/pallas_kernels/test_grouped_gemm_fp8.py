"""Grouped float8 products: the specification against float64, and the Hopper kernels against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.gemm_fp8 import kernel
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.grouped_gemm_fp8 import api, reference, sm90, tuned
from pallas_kernels.groups import group_starts
from tests.pallas_kernels.hopper import compile_for_h100, needs_hopper_tools
from tests.pallas_kernels.test_gemm_fp8 import (
    assert_near,
    float64,
    interpreted,
    poisoned,
    rows,
    similarity_error,
    weight,
)

SIZES = {
    'random': (130, 0, 1, 128, 77),
    'one_has_all': (0, 0, 512, 0, 0),
    'none': (0, 0, 0, 0, 0),
    'full': (128, 128, 128, 128, 128),
}
ROWS = 768


def sizes(name: str) -> jax.Array:
    return jnp.array(SIZES[name], jnp.int32)


def weights(seed: int, groups: int, n: int, k: int) -> Quantized:
    """One matrix a group."""
    stack = [weight(seed + group, n, k) for group in range(groups)]
    return Quantized(*(jnp.asarray(np.stack(parts)) for parts in zip(*stack, strict=True)))


def group_rows(name: str, rows_each: int | None = None) -> list[range]:
    """The real rows of each group, in the contiguous or the masked layout."""
    found, start = [], 0
    for index, size in enumerate(SIZES[name]):
        start = start if rows_each is None else index * rows_each
        size = size if rows_each is None else min(size, rows_each)
        found.append(range(start, start + size))
        start += round_up(size, BLOCK)
    return found


def with_nan_outside(x: Quantized, used: list[range]) -> Quantized:
    """NaN in every row, values and scales, that belongs to no group."""
    values_MK, scales_kQ = (np.full_like(part, np.nan) for part in x)
    for part in used:
        rows = slice(part.start, part.stop)
        values_MK[rows], scales_kQ[:, rows] = np.asarray(x.values)[rows], np.asarray(x.scales)[:, rows]
    return Quantized(jnp.asarray(values_MK), jnp.asarray(scales_kQ))


def expected_rows(lhs: Quantized, rhs: Quantized, used: list[range]) -> list[np.ndarray]:
    """The float64 product of each group's rows."""
    lhs_MK = float64(lhs, 1)
    each = [Quantized(*group) for group in zip(*map(np.asarray, rhs), strict=True)]
    return [lhs_MK[part] @ float64(w, BLOCK).T for part, w in zip(used, each, strict=True)]


def outside(got_MN: jax.Array, used: list[range]) -> np.ndarray:
    """The rows that belong to no group."""
    return np.delete(np.asarray(got_MN), [row for part in used for row in part], axis=0)


def assert_groups_near(got_MN: jax.Array, wanted: list[np.ndarray], used: list[range]) -> None:
    for part, wanted_MN in zip(used, wanted, strict=True):
        if part:
            assert_near(np.asarray(got_MN)[part.start : part.stop], wanted_MN)


def tokens(seed: int, m: int, name: str) -> Quantized:
    """A transposed matrix of tokens in the contiguous layout: zeros where a group is padded, NaN after the last one."""
    x = rows(seed, m, ROWS)
    values = np.array(x.values)
    used = group_rows(name)
    for part in used:
        values[:, part.stop : round_up(part.stop, BLOCK)] = 0
    end = round_up(used[-1].stop, BLOCK)
    values[:, end:] = np.nan
    return Quantized(jnp.asarray(values), x.scales)


def expected_gradients(lhs: Quantized, rhs: Quantized, name: str) -> np.ndarray:
    lhs_MK, rhs_NK = float64(lhs, 1), float64(rhs, 1)
    return np.stack([lhs_MK[:, part] @ rhs_NK[:, part].T for part in group_rows(name)])


@pytest.mark.parametrize('name', SIZES)
def test_reference_multiplies_each_group_by_its_matrix(name):
    used = group_rows(name)
    lhs, rhs = with_nan_outside(rows(0, ROWS, 256), used), weights(1, 5, 192, 256)
    got_MN = api.grouped_gemm_fp8(lhs, rhs, sizes(name), out_dtype=jnp.float32, implementation='reference')
    assert_groups_near(got_MN, expected_rows(lhs, rhs, used), used)
    assert not outside(got_MN, used).any()


@pytest.mark.parametrize('name', SIZES)
def test_masked_reference_multiplies_each_group_by_its_matrix(name):
    used = group_rows(name, rows_each=128)
    lhs, rhs = with_nan_outside(rows(0, 640, 256), used), weights(1, 5, 192, 256)
    counts_E = jnp.minimum(sizes(name), 128)
    got_MN = api.masked_gemm_fp8(lhs, rhs, counts_E, out_dtype=jnp.float32, implementation='reference')
    assert_groups_near(got_MN, expected_rows(lhs, rhs, used), used)
    assert not outside(got_MN, used).any()


@pytest.mark.parametrize('name', SIZES)
def test_wgrad_reference_contracts_each_group(name):
    lhs, rhs = tokens(0, 64, name), tokens(1, 192, name)
    before_EMN = jnp.asarray(np.random.default_rng(2).standard_normal((5, 64, 192)) * 1e5, jnp.float32)
    wanted = expected_gradients(lhs, rhs, name)
    got_EMN = api.grouped_wgrad_fp8(lhs, rhs, sizes(name), implementation='reference')
    assert not np.asarray(got_EMN)[np.array(SIZES[name]) == 0].any()
    if wanted.any():
        assert_near(got_EMN, wanted)
    added = api.grouped_wgrad_fp8(lhs, rhs, sizes(name), before_EMN, implementation='reference')
    assert_near(added, wanted + np.asarray(before_EMN, np.float64))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda a, b, s: (a._replace(values=a.values.astype(jnp.bfloat16)), b, s), 'lhs is bfloat16 with float32'),
        (lambda a, b, s: (a, b._replace(values=b.values[0]), s), r'rhs values have shape \(64, 256\).*\(5, N, 256\)'),
        (lambda a, b, s: (a, b, s[:4]), r'rhs values have shape \(5, 64, 256\).* 4 groups need'),
        (lambda a, b, s: (a, b._replace(scales=b.scales[:, :, :1]), s), r'rhs scales have shape \(5, 1, 1\)'),
        (lambda a, b, s: (a._replace(scales=a.scales.T), b, s), r'lhs scales have shape \(768, 2\).*need \(2, 768\)'),
        (lambda a, b, s: (a, b, s.astype(jnp.float32)), 'sizes are float32'),
        (lambda a, b, s: (rows(0, 320, 256), b, s), '320 rows must be a multiple of 128'),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    operands = change(rows(0, ROWS, 256), weights(1, 5, 64, 256), sizes('random'))
    with pytest.raises(ValueError, match=message):
        api.grouped_gemm_fp8(*operands)


def test_other_forms_check_what_is_theirs():
    lhs, counts_E = rows(0, 640, 256), sizes('full')
    with pytest.raises(ValueError, match='640 rows are no multiple of 3 groups'):
        api.masked_gemm_fp8(lhs, weights(1, 3, 64, 256), counts_E[:3])
    with pytest.raises(ValueError, match='must have the same width'):
        api.grouped_wgrad_fp8(lhs, rows(0, 64, 384), counts_E)
    with pytest.raises(ValueError, match='320 tokens must be a multiple of 128'):
        api.grouped_wgrad_fp8(rows(0, 64, 320), rows(0, 64, 320), counts_E)
    with pytest.raises(ValueError, match=r'it must be float32\(5, 640, 64\)'):
        api.grouped_wgrad_fp8(lhs, rows(0, 64, 256), counts_E, jnp.zeros((5, 640, 32)))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda o: api.grouped_gemm_fp8(rows(0, 640, 192), weights(1, 5, 64, 192), sizes('full'), **o), 'K=192'),
        (lambda o: api.grouped_gemm_fp8(rows(0, 640, 128), weights(1, 5, 96, 128), sizes('full'), **o), 'N=96'),
        (lambda o: api.masked_gemm_fp8(rows(0, 160, 128), weights(1, 5, 64, 128), sizes('full'), **o), 'R=32'),
        (lambda o: api.grouped_wgrad_fp8(rows(0, 96, 640), rows(0, 64, 640), sizes('full'), **o), 'M=96 must'),
    ],
)
def test_shapes_that_the_kernels_do_not_serve_are_refused_by_name(call, message):
    h100 = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', platform='gpu', num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=message):
        call({'implementation': 'pallas'})
    if jax.default_backend() != 'gpu':
        with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
            call({'implementation': 'pallas'})


GROUPED = [
    ('random', GemmConfig(wgs_m=2, wg_columns=64, stages=3, run=2, cluster_n=2, minor=0)),
    ('one_has_all', GemmConfig(wgs_m=1, wgs_n=2, waves=2, wg_columns=32, stages=3, run=1, minor=0)),
    ('none', GemmConfig(wgs_m=1, wg_columns=64, stages=2, run=1)),
]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(('name', 'config'), GROUPED)
def test_interpreted_grouped_gemm_equals_the_reference(name, config, capfd, monkeypatch):
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    used = group_rows(name)
    lhs, rhs = with_nan_outside(rows(0, ROWS, 256), used), weights(1, 5, 192, 256)
    got_MN = interpreted(capfd, sm90.grouped_gemm_fp8, lhs, rhs, sizes(name), jnp.dtype(jnp.bfloat16), config)
    assert_groups_near(got_MN, expected_rows(lhs, rhs, used), used)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(('rows_each', 'rows_wide'), [(64, 1), (128, 2)])
def test_interpreted_masked_gemm_equals_the_reference(rows_each, rows_wide, capfd, monkeypatch):
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    used = group_rows('random', rows_each)
    lhs, rhs = with_nan_outside(rows(0, 5 * rows_each, 384), used), weights(1, 5, 128, 384)
    config = GemmConfig(wgs_m=rows_wide, wg_columns=64, stages=2, run=4, tile_scales=True)
    counts_E = jnp.minimum(sizes('random'), rows_each)
    got_MN = interpreted(capfd, sm90.masked_gemm_fp8, lhs, rhs, counts_E, jnp.dtype(jnp.float32), config)
    assert_groups_near(got_MN, expected_rows(lhs, rhs, used), used)


@pytest.mark.timeout(180)
def test_interpreted_grouped_wgrad_equals_the_reference(capfd, monkeypatch):
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    lhs, rhs = tokens(0, 128, 'random'), tokens(1, 192, 'random')
    config = GemmConfig(wgs_m=2, wg_columns=64, stages=2, run=1)
    got_EMN = interpreted(capfd, sm90.grouped_wgrad_fp8, lhs, rhs, sizes('random'), None, config)
    assert_near(got_EMN, expected_gradients(lhs, rhs, 'random'))
    assert not np.asarray(got_EMN[1]).any()


def shape(*dimensions: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def rows_shape(m: int, k: int) -> Quantized:
    return Quantized(shape(m, k, dtype=E4M3), shape(blocks(k), round_up(m, BLOCK)))


def weights_shape(groups: int, n: int, k: int) -> Quantized:
    return Quantized(shape(groups, n, k, dtype=E4M3), shape(groups, blocks(n), blocks(k)))


@needs_hopper_tools
@pytest.mark.parametrize(('n', 'k'), [(4096, 7168), (7168, 2048)])
def test_grouped_gemm_compiles_for_hopper_without_spills(n, k):
    operands = rows_shape(69632, k), weights_shape(32, n, k), shape(32, dtype=jnp.int32)
    report = compile_for_h100(lambda a, b, s: sm90.grouped_gemm_fp8(a, b, s, jnp.dtype(jnp.bfloat16)), *operands)
    assert report.problems() == []
    assert report.kernels['grouped_gemm_fp8'].instructions['QGMMA'] == 8


@needs_hopper_tools
@pytest.mark.parametrize('rows_each', [64, 128])
def test_masked_gemm_compiles_for_hopper_without_spills(rows_each):
    operands = rows_shape(32 * rows_each, 7168), weights_shape(32, 4096, 7168), shape(32, dtype=jnp.int32)
    report = compile_for_h100(lambda a, b, s: sm90.masked_gemm_fp8(a, b, s, jnp.dtype(jnp.bfloat16)), *operands)
    assert report.problems() == []


@needs_hopper_tools
@pytest.mark.parametrize('accumulate', [False, True])
def test_grouped_wgrad_compiles_for_hopper_without_spills(accumulate):
    operands = [rows_shape(7168, 69632), rows_shape(4096, 69632), shape(32, dtype=jnp.int32)]
    if accumulate:
        operands.append(shape(32, 7168, 4096))
    report = compile_for_h100(lambda a, b, s, before=None: sm90.grouped_wgrad_fp8(a, b, s, before), *operands)
    assert report.problems() == []
    assert bool(report.kernels['grouped_wgrad_fp8'].instructions['UTMAREDG']) is accumulate


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('name', 'n', 'k'),
    [('random', 576, 512), ('random', 64, 128), ('random', 4096, 7168), ('one_has_all', 576, 512), ('none', 576, 512)],
)
def test_gpu_forms_equal_the_float64_products(name, n, k):
    used = group_rows(name)
    lhs, rhs, sizes_E = with_nan_outside(rows(0, ROWS, k), used), weights(1, 5, n, k), sizes(name)
    wanted = expected_rows(lhs, rhs, used)
    for config in tuned.candidates('grouped_gemm_fp8', ROWS, 5, n, k):
        got_MN = poisoned(lambda a, b, s, c=config: sm90.grouped_gemm_fp8(a, b, s, jnp.bfloat16, c), lhs, rhs, sizes_E)
        assert_groups_near(got_MN, wanted, used)


@pytest.mark.gpu
@pytest.mark.parametrize('rows_each', [64, 128])
def test_gpu_masked_gemm_equals_the_float64_product(rows_each):
    n, k = 1024, 2048
    used = group_rows('random', rows_each)
    lhs, rhs = with_nan_outside(rows(0, 5 * rows_each, k), used), weights(1, 5, n, k)
    counts_E, wanted = jnp.minimum(sizes('random'), rows_each), expected_rows(lhs, rhs, used)
    for config in tuned.candidates('masked_gemm_fp8', 5 * rows_each, 5, n, k):
        got_MN = poisoned(lambda a, b, s, c=config: sm90.masked_gemm_fp8(a, b, s, jnp.bfloat16, c), lhs, rhs, counts_E)
        assert_groups_near(got_MN, wanted, used)


@pytest.mark.gpu
@pytest.mark.parametrize('name', SIZES)
def test_gpu_grouped_wgrad_equals_the_float64_product(name):
    lhs, rhs, sizes_E = tokens(0, 1024, name), tokens(1, 576, name), sizes(name)
    wanted = expected_gradients(lhs, rhs, name)
    for config in tuned.candidates('grouped_wgrad_fp8', 1024, 5, 576, ROWS):
        got_EMN = poisoned(lambda a, b, s, c=config: sm90.grouped_wgrad_fp8(a, b, s, None, c), lhs, rhs, sizes_E)
        assert similarity_error(got_EMN, wanted) < 1e-6, config
    before_EMN = jnp.asarray(wanted, jnp.float32)
    added = jax.jit(lambda *operands: api.grouped_wgrad_fp8(*operands, implementation='pallas'))
    assert similarity_error(added(lhs, rhs, sizes_E, before_EMN), 2 * wanted) < 1e-6


@pytest.mark.gpu
def test_gpu_kernels_equal_the_reference_on_a_quantised_batch():
    sizes_E = sizes('random')
    lhs, rhs = rows(0, ROWS, 1024), weights(1, 5, 512, 1024)
    got = api.grouped_gemm_fp8(lhs, rhs, sizes_E, implementation='pallas')
    wanted = reference.grouped_gemm_fp8(lhs, rhs, sizes_E, jnp.float32)
    for part in group_rows('random'):
        if part:
            assert similarity_error(got[part.start : part.stop], wanted[part.start : part.stop]) < 1e-3


def test_groups_begin_at_whole_blocks():
    assert [part.start for part in group_rows('random')] == group_starts(sizes('random')).tolist()
