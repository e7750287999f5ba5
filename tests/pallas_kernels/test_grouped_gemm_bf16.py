"""Grouped bfloat16 products: the lists of tiles, the specification, and the Hopper kernels against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_gemm_bf16 import sm90, tuned
from pallas_kernels.grouped_gemm_bf16.api import grouped_gemm_bf16, grouped_wgrad_bf16, masked_gemm_bf16
from pallas_kernels.grouped_gemm_bf16.tuned import GroupedConfig
from pallas_kernels.groups import contiguous_tiles, group_starts, masked_tiles
from tests.pallas_kernels.hopper import DEVICE, compile_for_h100, needs_hopper_tools

# In units of the largest output: one bfloat16 rounding, and float32 sums in another order.
TOLERANCE = {'bfloat16': 2**-8, 'float32': 1e-5}
OPERATIONS = 'grouped_gemm_bf16', 'masked_gemm_bf16', 'grouped_wgrad_bf16'

# Rows of a buffer of 768.
SIZES = {
    'random_with_empty': [130, 0, 70, 256],
    'one_has_all': [0, 768, 0, 0],
    'last_is_empty': [1, 128, 64, 0],
    'full': [256, 128, 128, 256],
    'all_empty': [0, 0, 0, 0],
}


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32), jnp.bfloat16)


def int32(sizes: list[int]) -> jax.Array:
    return jnp.asarray(sizes, jnp.int32)


def slices(sizes: list[int], aligned: int = 128) -> list[slice]:
    """The rows of each group, by a loop."""
    found, start = [], 0
    for size in sizes:
        found.append(slice(start, start + size))
        start += -(-size // aligned) * aligned
    return found


def masked_slices(counts: list[int], rows_each: int) -> list[slice]:
    return [slice(e * rows_each, e * rows_each + count) for e, count in enumerate(counts)]


def fill(x: jax.Array, owned: list[slice], value: float) -> jax.Array:
    """Rows of no group hold the value."""
    filled = np.full_like(x, value)
    for rows in owned:
        filled[rows] = np.asarray(x)[rows]
    return jnp.asarray(filled)


def float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def assert_rows_near(got: jax.Array, lhs: jax.Array, rhs: jax.Array, owned: list[slice], transpose_rhs: bool) -> None:
    """The rows of every group are those of the float64 product; all others may hold anything."""
    wanted, lhs_MK, got_MN = np.zeros(got.shape), float64(lhs), float64(got)
    for rows, matrix in zip(owned, float64(rhs), strict=True):
        wanted[rows] = lhs_MK[rows] @ (matrix.T if transpose_rhs else matrix)
    for rows in owned:
        atol = TOLERANCE[got.dtype.name] * np.abs(wanted).max()
        np.testing.assert_allclose(got_MN[rows], wanted[rows], rtol=0, atol=atol)


def assert_gradients_near(got: jax.Array, lhs: jax.Array, d_out: jax.Array, owned: list[slice], before=0.0) -> None:
    lhs_MK, d_MN = float64(lhs), float64(d_out)
    wanted = np.stack([lhs_MK[rows].T @ d_MN[rows] for rows in owned]) + float64(before)
    np.testing.assert_allclose(float64(got), wanted, rtol=0, atol=TOLERANCE['float32'] * np.abs(wanted).max())


def numpy_tiles(owned: list[slice], rows: int) -> list[tuple[int, int]]:
    return [(first, e) for e, group in enumerate(owned) for first in range(group.start, group.stop, rows)]


def assert_tiles(tiles, wanted: list[tuple[int, int]], capacity: int) -> None:
    assert [x.dtype for x in tiles] == [jnp.int32] * 3
    assert tiles.count.tolist() == [len(wanted)]
    listed = list(zip(tiles.row_T.tolist(), tiles.expert_T.tolist(), strict=True))
    assert listed == wanted + [(0, 0)] * (capacity - len(wanted))


@pytest.mark.parametrize('rows', [64, 128])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_contiguous_tiles_are_those_of_a_loop(sizes, rows):
    owned = slices(sizes)
    assert group_starts(int32(sizes)).tolist() == [group.start for group in owned]
    tiles = jax.jit(contiguous_tiles, static_argnums=(1, 2))(int32(sizes), rows, 768)
    assert_tiles(tiles, numpy_tiles(owned, rows), 768 // rows)


def test_contiguous_tiles_of_random_sizes_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    listed = jax.jit(contiguous_tiles, static_argnums=(1, 2))
    for _ in range(20):
        sizes = (rng.integers(0, 700, 9) * rng.integers(0, 2, 9)).tolist()
        tiles = listed(int32(sizes), 64, 9 * 768)
        assert_tiles(tiles, numpy_tiles(slices(sizes), 64), 9 * 12)


@pytest.mark.parametrize('counts', [[0, 1, 64, 0, 65, 192], [0, 0], [192, 192], [0, 128, 0]])
@pytest.mark.parametrize('rows', [64, 192])
def test_masked_tiles_are_those_of_a_loop(counts, rows):
    tiles = jax.jit(masked_tiles, static_argnums=(1, 2))(int32(counts), 192, rows)
    assert_tiles(tiles, numpy_tiles(masked_slices(counts, 192), rows), len(counts) * 192 // rows)


def test_tiles_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match='rows=96 of a tile must divide 128'):
        contiguous_tiles(int32([1]), 96, 256)
    with pytest.raises(ValueError, match='buffer_rows=200 must be a multiple of 128'):
        contiguous_tiles(int32([1]), 64, 200)
    with pytest.raises(ValueError, match='rows=128 of a tile must divide rows_each=192'):
        masked_tiles(int32([1]), 192, 128)


@pytest.mark.parametrize('out_dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('transpose_rhs', [False, True])
@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_gemm_reference_is_the_float64_product_and_zero_elsewhere(sizes, transpose_rhs, out_dtype):
    owned = slices(sizes)
    lhs = fill(normal(0, (768, 40)), owned, jnp.nan)
    rhs = normal(1, (len(sizes), 24, 40) if transpose_rhs else (len(sizes), 40, 24))
    out = grouped_gemm_bf16(
        lhs, rhs, int32(sizes), transpose_rhs=transpose_rhs, out_dtype=out_dtype, implementation='reference'
    )
    assert out.dtype == out_dtype
    assert_rows_near(out, lhs, rhs, owned, transpose_rhs)
    np.testing.assert_array_equal(out, fill(out, owned, 0))


@pytest.mark.parametrize('transpose_rhs', [False, True])
def test_masked_reference_is_the_float64_product_and_zero_elsewhere(transpose_rhs):
    counts = [3, 0, 10, 1]
    owned = masked_slices(counts, 10)
    lhs = fill(normal(0, (40, 16)), owned, jnp.nan)
    rhs = normal(1, (4, 24, 16) if transpose_rhs else (4, 16, 24))
    out = masked_gemm_bf16(
        lhs, rhs, int32(counts), transpose_rhs=transpose_rhs, out_dtype=jnp.float32, implementation='reference'
    )
    assert_rows_near(out, lhs, rhs, owned, transpose_rhs)
    np.testing.assert_array_equal(out, fill(out, owned, 0))


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
def test_wgrad_reference_adds_the_float64_product(sizes):
    owned = slices(sizes)
    lhs, d_out = (fill(normal(seed, (768, width)), owned, jnp.nan) for seed, width in ((0, 24), (1, 40)))
    before = normal(2, (len(sizes), 24, 40)).astype(jnp.float32) * 100
    assert_gradients_near(grouped_wgrad_bf16(lhs, d_out, int32(sizes)), lhs, d_out, owned)
    assert_gradients_near(grouped_wgrad_bf16(lhs, d_out, int32(sizes), before), lhs, d_out, owned, before)


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'lhs': jnp.zeros((256, 64))}, 'lhs is float32, it must be bfloat16'),
        ({'rhs': jnp.zeros((2, 64, 128))}, 'rhs is float32, it must be bfloat16'),
        ({'lhs': jnp.zeros((0, 64), jnp.bfloat16)}, r'lhs has shape \(0, 64\), it must not be empty'),
        ({'rhs': jnp.zeros((2, 32, 128), jnp.bfloat16)}, 'has K=64, rhs .* with transpose_rhs=False K=32'),
        ({'sizes': jnp.zeros(3, jnp.int32)}, r'the sizes are int32\(3,\), they must be int32\(2,\)'),
        ({'sizes': jnp.zeros(2, jnp.int16)}, r'the sizes are int16\(2,\), they must be int32\(2,\)'),
        ({'out_dtype': jnp.float16}, 'must be bfloat16 or float32'),
        ({'transpose_rhs': True}, 'has K=64, rhs .* with transpose_rhs=True K=128'),
    ],
)
def test_operands_that_do_not_fit_are_refused(changed, message):
    given = {'lhs': normal(0, (256, 64)), 'rhs': normal(1, (2, 64, 128)), 'sizes': int32([3, 4])} | changed
    operands = [given.pop(name) for name in ('lhs', 'rhs', 'sizes')]
    for operation in (grouped_gemm_bf16, masked_gemm_bf16):
        with pytest.raises(ValueError, match=message):
            operation(*operands, **given)


def test_rows_and_gradients_that_do_not_fit_are_refused():
    rhs, sizes = normal(1, (3, 64, 64)), int32([1, 2, 3])
    with pytest.raises(ValueError, match='M=200 rows must be a multiple of 128'):
        grouped_gemm_bf16(normal(0, (200, 64)), rhs, sizes)
    with pytest.raises(ValueError, match='M=200 rows must be a multiple of E=3'):
        masked_gemm_bf16(normal(0, (200, 64)), rhs, sizes)
    x = normal(0, (384, 64))
    with pytest.raises(ValueError, match='M=200 rows must be a multiple of 128'):
        grouped_wgrad_bf16(x[:200], x[:200], sizes)
    with pytest.raises(ValueError, match=r'lhs \(384, 64\) and d_out \(256, 64\) must have the same rows'):
        grouped_wgrad_bf16(x, x[:256], sizes)
    with pytest.raises(ValueError, match='d_out is float32, it must be bfloat16'):
        grouped_wgrad_bf16(x, x.astype(jnp.float32), sizes)
    with pytest.raises(ValueError, match=r'accumulator has shape \(3, 64, 32\), it must be \(3, 64, 64\)'):
        grouped_wgrad_bf16(x, x, sizes, jnp.zeros((3, 64, 32)))


@pytest.mark.parametrize(
    ('operation', 'rows', 'k', 'n', 'message'),
    [
        (grouped_gemm_bf16, 256, 96, 64, 'K=96 must be a multiple of 64'),
        (grouped_gemm_bf16, 256, 64, 96, 'N=96 must be a multiple of 64'),
        (masked_gemm_bf16, 64, 64, 64, 'R=32 must be a multiple of 64'),
        (grouped_wgrad_bf16, 256, 96, 64, 'K=96 must be a multiple of 64'),
    ],
)
def test_shapes_that_the_kernels_do_not_serve_are_refused_by_name(operation, rows, k, n, message):
    rhs = normal(1, (rows, n) if operation is grouped_wgrad_bf16 else (2, k, n))
    operands = normal(0, (rows, k)), rhs, int32([3, 4])
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=message):
        operation(*operands, implementation='pallas')
    with jax.sharding.use_abstract_mesh(mesh), pytest.warns(UserWarning, match=message):
        jax.eval_shape(operation, *operands)


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='for machines without a GPU')
def test_kernels_by_name_need_a_hopper_gpu():
    x, rhs, sizes = normal(0, (128, 64)), normal(1, (2, 64, 64)), int32([3, 0])
    with pytest.raises(NotImplementedError, match='grouped_gemm_bf16.* needs a Hopper GPU'):
        grouped_gemm_bf16(x, rhs, sizes, implementation='pallas')
    with pytest.raises(NotImplementedError, match='masked_gemm_bf16.* needs a Hopper GPU'):
        masked_gemm_bf16(x, rhs, sizes, implementation='pallas')
    with pytest.raises(NotImplementedError, match='grouped_wgrad_bf16.* needs a Hopper GPU'):
        grouped_wgrad_bf16(x, x, sizes, implementation='pallas')


def interpreted(capfd, kernel, *operands, **options) -> jax.Array:
    """The kernel's result on the CPU; fails if the interpreter saw a race."""
    # The fence between products is the kernels' only inlined code.
    params = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu='ignore')
    out = kernel(*operands, **options, interpret=params)
    out.block_until_ready()
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err
    return out


# Tails of columns; fewer and more steps than slots; a block walks over several tiles, for few blocks there are.
INTERPRETED_GEMM = {
    'tile_of_two_warpgroups': (SIZES['random_with_empty'], 192, 192, False, GroupedConfig(wg_columns=128, stages=2)),
    'transposed': (SIZES['random_with_empty'], 192, 192, True, GroupedConfig(wg_columns=128, stages=2)),
    'shared_rows': (SIZES['last_is_empty'], 128, 320, False, GroupedConfig(wg_columns=64, stages=3, cluster_n=2)),
    'side_by_side': (
        SIZES['last_is_empty'],
        320,
        192,
        True,
        GroupedConfig(wgs_m=1, wgs_n=2, wg_columns=64, stages=3, cluster_n=2, minor=0, width=2, out_buffers=1),
    ),
    'one_has_all': (SIZES['one_has_all'], 64, 64, False, GroupedConfig(wg_columns=64, stages=4)),
    'nobody_has_any': (SIZES['all_empty'], 64, 64, False, GroupedConfig(wg_columns=64, stages=2, cluster_n=2)),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ('sizes', 'k', 'n', 'transpose_rhs', 'config'), INTERPRETED_GEMM.values(), ids=INTERPRETED_GEMM
)
def test_interpreted_gemm_equals_the_product(sizes, k, n, transpose_rhs, config, capfd, monkeypatch):
    monkeypatch.setattr(sm90, 'hopper_cores', lambda: 2)
    owned = slices(sizes)
    lhs = fill(normal(0, (768, k)), owned, jnp.nan)
    rhs = normal(1, (len(sizes), n, k) if transpose_rhs else (len(sizes), k, n))
    got = interpreted(
        capfd, sm90.grouped_gemm_bf16, lhs, rhs, int32(sizes), transpose_rhs, jnp.dtype(jnp.float32), config
    )
    assert_rows_near(got, lhs, rhs, owned, transpose_rhs)


@pytest.mark.timeout(120)
@pytest.mark.parametrize('transpose_rhs', [False, True])
def test_interpreted_masked_gemm_equals_the_product(transpose_rhs, capfd, monkeypatch):
    monkeypatch.setattr(sm90, 'hopper_cores', lambda: 2)
    counts, (k, n) = [5, 0, 70, 128], (192, 192)
    owned = masked_slices(counts, 128)
    lhs = fill(normal(0, (512, k)), owned, jnp.nan)
    rhs = fill(normal(1, (4, n, k) if transpose_rhs else (4, k, n)), [slice(1), slice(2, 4)], jnp.nan)
    config = GroupedConfig(wgs_m=1, wg_columns=128, stages=4, minor=0, width=2)
    got = interpreted(
        capfd, sm90.masked_gemm_bf16, lhs, rhs, int32(counts), transpose_rhs, jnp.dtype(jnp.bfloat16), config
    )
    assert_rows_near(got, lhs, rhs, owned, transpose_rhs)


INTERPRETED_WGRAD = {
    'random_with_empty': GroupedConfig(wg_columns=128, stages=2),
    'one_has_all': GroupedConfig(wgs_m=1, wgs_n=2, wg_columns=64, stages=3, cluster_n=2, out_buffers=1),
    'last_is_empty': GroupedConfig(wg_columns=64, stages=3, cluster_m=2, width=1),
    'all_empty': GroupedConfig(wg_columns=64, stages=2),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(('case', 'config'), INTERPRETED_WGRAD.items())
def test_interpreted_wgrad_equals_the_product(case, config, capfd, monkeypatch):
    monkeypatch.setattr(sm90, 'hopper_cores', lambda: 2)
    owned = slices(SIZES[case])
    end = max(-(-rows.stop // 128) * 128 for rows in owned)
    lhs, d_out = (fill(fill(normal(seed, (768, 192)), owned, 0), [slice(end)], jnp.nan) for seed in (0, 1))
    got = interpreted(capfd, sm90.grouped_wgrad_bf16, lhs, d_out, int32(SIZES[case]), None, config)
    assert_gradients_near(got, lhs, d_out, owned)


def shape(*dimensions: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


def assert_sound(report, name: str) -> None:
    assert list(report.kernels) == [name]
    assert report.problems() == []
    # Four products of 16 contracted values a slot, one after the other and none waited for alone.
    instructions = report.kernels[name].instructions_in_full
    assert report.instructions['HGMMA'] == 4
    assert instructions['WARPGROUP.DEPBAR.LE'] == 2


@needs_hopper_tools
@pytest.mark.parametrize('transpose_rhs', [False, True])
@pytest.mark.parametrize(('k', 'n'), [(7168, 4096), (2048, 7168)])
def test_gemm_compiles_for_hopper_without_spills(k, n, transpose_rhs):
    rhs = shape(32, n, k) if transpose_rhs else shape(32, k, n)
    report = compile_for_h100(
        lambda lhs, rhs, sizes: grouped_gemm_bf16(lhs, rhs, sizes, transpose_rhs=transpose_rhs),
        shape(32768 + 32 * 128, k),
        rhs,
        shape(32, dtype=jnp.int32),
    )
    assert_sound(report, 'grouped_gemm_bf16')


@needs_hopper_tools
@pytest.mark.parametrize('rows_each', [64, 256])
def test_masked_gemm_compiles_for_hopper_without_spills(rows_each):
    operands = shape(32 * rows_each, 7168), shape(32, 7168, 4096), shape(32, dtype=jnp.int32)
    report = compile_for_h100(masked_gemm_bf16, *operands)
    assert_sound(report, 'masked_gemm_bf16')


@needs_hopper_tools
@pytest.mark.parametrize('accumulate', [False, True])
def test_wgrad_compiles_for_hopper_without_spills(accumulate):
    operands = [shape(32768 + 32 * 128, 7168), shape(32768 + 32 * 128, 4096), shape(32, dtype=jnp.int32)]
    if accumulate:
        operands.append(shape(32, 7168, 4096, dtype=jnp.float32))
    report = compile_for_h100(grouped_wgrad_bf16, *operands)
    assert_sound(report, 'grouped_wgrad_bf16')
    # The accumulating form adds in the copy engine, without reading the gradient.
    assert bool(report.kernels['grouped_wgrad_bf16'].instructions['UTMAREDG']) is accumulate


@pytest.mark.parametrize('operation', OPERATIONS)
def test_every_candidate_fits_shared_memory_and_registers(operation):
    for config in tuned.candidates(operation):
        assert config.shared_bytes <= tuned.SHARED_BYTES - tuned.RESERVED_BYTES, config
        threads = 128 * (1 + config.warpgroups)
        launched = min(65536 // threads // 8 * 8, 255)
        few, many = sm90.REGISTERS
        assert few + config.warpgroups * many <= launched * (1 + config.warpgroups), config
        assert config.wg_columns <= 256
        assert config.cluster_m == 1 or operation == 'grouped_wgrad_bf16'


def poisoned(call, *operands) -> jax.Array:
    """The result of a call, in memory that is likely to have held NaN: what is not written shows."""
    out = jax.eval_shape(call, *operands)
    jitted = jax.jit(call).lower(*operands).compile()
    for held in [jax.block_until_ready(jnp.full(out.shape, jnp.nan, out.dtype)) for _ in range(4)]:
        held.delete()
    return jitted(*operands)


GPU_SIZES = {
    'random_with_empty': [300, 0, 1000, 128, 1, 0, 64, 511],
    'one_has_all': [0, 0, 0, 3072, 0, 0, 0, 0],
    'all_empty': [0] * 8,
}


@pytest.mark.gpu
@pytest.mark.parametrize(('k', 'n'), [(64, 64), (2048, 1088), (7168, 512)])
@pytest.mark.parametrize('transpose_rhs', [False, True])
@pytest.mark.parametrize('sizes', GPU_SIZES.values(), ids=GPU_SIZES)
def test_gpu_gemm_equals_the_product(sizes, transpose_rhs, k, n):
    owned = slices(sizes)
    lhs = fill(normal(0, (3072, k)), owned, jnp.nan)
    rhs = normal(1, (8, n, k) if transpose_rhs else (8, k, n))
    for config in tuned.candidates('grouped_gemm_bf16'):
        for dtype in map(jnp.dtype, (jnp.bfloat16, jnp.float32)):
            got = poisoned(
                lambda a, b, c, d=dtype, f=config: sm90.grouped_gemm_bf16(a, b, c, transpose_rhs, d, f),
                *(lhs, rhs, int32(sizes)),
            )
            assert_rows_near(got, lhs, rhs, owned, transpose_rhs)


@pytest.mark.gpu
@pytest.mark.parametrize(('k', 'n'), [(64, 64), (2048, 1088), (7168, 512)])
@pytest.mark.parametrize('transpose_rhs', [False, True])
@pytest.mark.parametrize('rows_each', [64, 256])
def test_gpu_masked_gemm_equals_the_product(rows_each, transpose_rhs, k, n):
    counts = [0, 1, 64, rows_each, 0, rows_each // 2 + 1, 7, 0]
    owned = masked_slices(counts, rows_each)
    lhs = fill(normal(0, (8 * rows_each, k)), owned, jnp.nan)
    rhs = normal(1, (8, n, k) if transpose_rhs else (8, k, n)).at[0].set(jnp.nan)
    for config in tuned.candidates('masked_gemm_bf16'):
        if rows_each % config.rows == 0:
            got = poisoned(
                lambda a, b, c, f=config: sm90.masked_gemm_bf16(a, b, c, transpose_rhs, jnp.dtype(jnp.bfloat16), f),
                *(lhs, rhs, int32(counts)),
            )
            assert_rows_near(got, lhs, rhs, owned, transpose_rhs)


@pytest.mark.gpu
@pytest.mark.parametrize(('k', 'n'), [(64, 64), (512, 1088), (2112, 512)])
@pytest.mark.parametrize('sizes', GPU_SIZES.values(), ids=GPU_SIZES)
def test_gpu_wgrad_equals_the_product_and_adds_to_the_accumulator(sizes, k, n):
    owned = slices(sizes)
    end = max(-(-rows.stop // 128) * 128 for rows in owned)
    lhs, d_out = (fill(normal(i, (3072, w)), owned, 0).at[end:].set(jnp.nan) for i, w in ((0, k), (1, n)))
    before = jax.random.normal(jax.random.key(2), (8, k, n)) * 10
    for config in tuned.candidates('grouped_wgrad_bf16'):
        got = poisoned(lambda a, b, c, f=config: sm90.grouped_wgrad_bf16(a, b, c, None, f), *(lhs, d_out, int32(sizes)))
        assert_gradients_near(got, lhs, d_out, owned)
        added = jax.jit(lambda a, b, c, d, f=config: sm90.grouped_wgrad_bf16(a, b, c, d, f))(
            lhs, d_out, int32(sizes), before
        )
        assert_gradients_near(added, lhs, d_out, owned, before)


@pytest.mark.gpu
def test_gpu_results_are_the_same_bits_every_time():
    sizes = int32(GPU_SIZES['random_with_empty'])
    lhs, rhs = normal(0, (3072, 2048)), normal(1, (8, 2048, 1024))
    first, second = (
        np.asarray(grouped_gemm_bf16(lhs, rhs, sizes, implementation='pallas'))[:384].view(np.uint16) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
