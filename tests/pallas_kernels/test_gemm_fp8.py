"""Block-scaled float8 products: the specification, and the Hopper kernel against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels as pk
from pallas_kernels.fp8 import BLOCK, E4M3, Quantized, blocks, round_up
from pallas_kernels.gemm_fp8 import kernel, sm90, tuned
from pallas_kernels.gemm_fp8.tuned import GemmConfig
from pallas_kernels.implementation import choose
from tests.pallas_kernels.hopper import compile_for_h100, needs_hopper_tools

SIMILARITY = 1e-3
# In units of the largest output: one bfloat16 rounding, and float32 sums in another order.
TOLERANCE = {jnp.bfloat16: 2**-8, jnp.float32: 1e-5}

INPUTS = {
    'random': lambda key, shape: jax.random.normal(key, shape),
    'heavy_tailed': lambda key, shape: jax.random.t(key, 2.0, shape),
    'all_equal': lambda key, shape: jnp.full(shape, 0.37),
    'tiny': lambda key, shape: jax.random.normal(key, shape) * 1e-30,
    'huge': lambda key, shape: jax.random.normal(key, shape) * 1e30,
    'zero_rows': lambda key, shape: jax.random.normal(key, shape) * (jnp.arange(shape[0])[:, None] % 3 > 0),
}


def rows(seed: int, m: int, k: int) -> Quantized:
    """A matrix with scales of 1x128 tiles, the padding of the scales poisoned."""
    scales_kQ = np.full((blocks(k), round_up(m, BLOCK)), np.nan, np.float32)
    scales_kQ[:, :m] = np.random.default_rng([seed, m]).uniform(0.5, 1, (blocks(k), m))
    return Quantized(_e4m3(seed, (m, k)), jnp.asarray(scales_kQ))


def weight(seed: int, n: int, k: int) -> Quantized:
    scales = np.random.default_rng([seed, n]).uniform(0.5, 1, (blocks(n), blocks(k)))
    return Quantized(_e4m3(seed, (n, k)), jnp.asarray(scales, jnp.float32))


def _e4m3(seed: int, shape: tuple[int, int]) -> jax.Array:
    values = (np.random.default_rng([seed, *shape]).standard_normal(shape) * 60).clip(-448, 448)
    return jnp.asarray(values.astype(E4M3))


def float64(x: Quantized, tile_rows: int) -> np.ndarray:
    """The matrix that `x` stands for."""
    values = np.asarray(x.values, np.float64)
    scales = np.asarray(x.scales, np.float64)
    scales = scales.T[: len(values)] if tile_rows == 1 else scales.repeat(tile_rows, 0)[: len(values)]
    return values * scales.repeat(BLOCK, 1)[:, : values.shape[1]]


def similarity_error(x: jax.Array, y: jax.Array) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if not x.any() and not y.any():
        return 0.0
    scale = max(np.abs(y).max(), 1e-300)
    x, y = x / scale, y / scale
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


def assert_near(got: jax.Array, wanted: np.ndarray | jax.Array) -> None:
    wanted = np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(
        np.asarray(got, np.float64), wanted, rtol=0, atol=TOLERANCE[got.dtype.type] * np.abs(wanted).max()
    )


@pytest.mark.parametrize(('m', 'n', 'k'), [(1, 64, 128), (37, 200, 300), (130, 576, 256)])
@pytest.mark.parametrize('out_dtype', [jnp.bfloat16, jnp.float32])
def test_gemm_reference_is_the_float64_product(m, n, k, out_dtype):
    lhs, rhs = rows(0, m, k), weight(1, n, k)
    out_MN = pk.gemm_fp8(lhs, rhs, out_dtype=out_dtype, implementation='reference')
    assert out_MN.dtype == out_dtype
    assert_near(out_MN, float64(lhs, 1) @ float64(rhs, BLOCK).T)


def test_wgrad_reference_adds_the_float64_product():
    lhs, rhs, before = rows(0, 96, 384), rows(1, 64, 384), jax.random.normal(jax.random.key(2), (96, 64)) * 1e5
    product = float64(lhs, 1) @ float64(rhs, 1).T
    assert_near(pk.wgrad_fp8(lhs, rhs, implementation='reference'), product)
    assert_near(pk.wgrad_fp8(lhs, rhs, before, implementation='reference'), product + np.asarray(before))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda a, b: (a._replace(values=a.values.astype(jnp.bfloat16)), b), 'lhs is bfloat16 with float32 scales'),
        (lambda a, b: (a, b._replace(scales=b.scales.astype(jnp.bfloat16))), 'rhs is float8_e4m3fn with bfloat16'),
        (lambda a, b: (a._replace(values=a.values[:, :128]), b), r'lhs \(64, 128\) and rhs \(128, 256\) must have'),
        (lambda a, b: (a._replace(scales=a.scales.T), b), r'lhs scales have shape \(128, 2\).*need \(2, 128\)'),
        (lambda a, b: (a, b._replace(scales=b.scales[:, :1])), r'rhs scales have shape \(1, 1\).*need \(1, 2\)'),
        (lambda a, b: (a._replace(values=a.values[:0]), b), r'lhs values have shape \(0, 256\)'),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    lhs, rhs = change(rows(0, 64, 256), weight(1, 128, 256))
    with pytest.raises(ValueError, match=message):
        pk.gemm_fp8(lhs, rhs)


def test_output_type_accumulator_and_implementation_are_checked():
    lhs, rhs = rows(0, 64, 256), weight(1, 128, 256)
    with pytest.raises(ValueError, match='must be bfloat16 or float32'):
        pk.gemm_fp8(lhs, rhs, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"implementation='cuda' is unknown"):
        choose('gemm_fp8', 'cuda', lambda: None)
    with pytest.raises(ValueError, match=r'accumulator is float32\(64, 64\), it must be float32\(64, 128\)'):
        pk.wgrad_fp8(lhs, rows(1, 128, 256), jnp.zeros((64, 64)))


@pytest.mark.parametrize(
    ('m', 'n', 'k', 'message'), [(64, 96, 128, 'N=96 must be a multiple of 64'), (64, 64, 192, 'K=192 must be')]
)
def test_shapes_that_the_kernel_does_not_serve_are_refused_by_name(m, n, k, message):
    h100 = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', platform='gpu', num_cores=132)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=message):
        pk.gemm_fp8(rows(0, m, k), weight(1, n, k), implementation='pallas')
    with jax.sharding.use_abstract_mesh(mesh), pytest.warns(UserWarning, match=message):
        jax.eval_shape(pk.gemm_fp8, rows(0, m, k), weight(1, n, k))


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='for machines without a GPU')
def test_kernel_by_name_needs_a_hopper_gpu():
    with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
        pk.gemm_fp8(rows(0, 64, 128), weight(1, 64, 128), implementation='pallas')


INTERPRETED = [
    ((200, 192, 512), GemmConfig(wgs_m=2, wg_columns=64, stages=3, run=1), jnp.float32),  # tails of rows and columns
    ((64, 256, 384), GemmConfig(wgs_m=1, wgs_n=2, wg_columns=32, stages=3, run=4), jnp.bfloat16),  # partial run
    ((300, 128, 512), GemmConfig(wgs_m=1, wg_columns=64, stages=3, run=2, cluster_m=2), jnp.bfloat16),
    ((131, 192, 256), GemmConfig(wgs_m=1, wg_columns=64, stages=2, run=2, cluster_n=2), jnp.bfloat16),  # odd rows
    ((300, 128, 512), GemmConfig(wgs_m=1, waves=2, wg_columns=64, stages=2, run=1, cluster_n=2), jnp.bfloat16),
    ((70, 192, 640), GemmConfig(wgs_m=2, wg_columns=32, stages=3, run=4, tile_scales=True), jnp.bfloat16),
]


def interpreted(capfd, function, *operands, **options) -> jax.Array:
    """The kernel's result on the CPU; fails if the interpreter saw a race."""
    out_MN = function(*operands, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    out_MN.block_until_ready()
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err
    return out_MN


@pytest.mark.timeout(120)
@pytest.mark.parametrize(('shape', 'config', 'out_dtype'), INTERPRETED)
def test_interpreted_gemm_equals_the_reference(shape, config, out_dtype, capfd, monkeypatch):
    m, n, k = shape
    # Few blocks, so that each walks over several tiles.
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    lhs, rhs = rows(0, m, k), weight(1, n, k)
    got = interpreted(capfd, sm90.gemm_fp8, lhs, rhs, jnp.dtype(out_dtype), config)
    assert_near(got, pk.gemm_fp8(lhs, rhs, out_dtype=jnp.float32, implementation='reference'))


@pytest.mark.timeout(120)
def test_interpreted_wgrad_equals_the_reference(capfd, monkeypatch):
    monkeypatch.setattr(kernel, 'hopper_cores', lambda: 2)
    lhs, rhs = rows(0, 192, 384), rows(1, 128, 384)
    config = GemmConfig(wgs_m=2, wg_columns=64, stages=2, run=2)
    got = interpreted(capfd, sm90.wgrad_fp8, lhs, rhs, None, config)
    assert_near(got, pk.wgrad_fp8(lhs, rhs, implementation='reference'))


def rows_shape(m: int, k: int) -> Quantized:
    return Quantized(
        jax.ShapeDtypeStruct((m, k), E4M3), jax.ShapeDtypeStruct((blocks(k), round_up(m, BLOCK)), jnp.float32)
    )


def weight_shape(n: int, k: int) -> Quantized:
    return Quantized(jax.ShapeDtypeStruct((n, k), E4M3), jax.ShapeDtypeStruct((blocks(n), blocks(k)), jnp.float32))


@needs_hopper_tools
@pytest.mark.parametrize(
    ('m', 'n', 'k'),
    [
        (64, 4096, 7168),
        (128, 24576, 1536),
        (128, 32768, 512),
        (4096, 4096, 7168),
        (4096, 512, 32768),
        (8195, 2112, 7168),
    ],
)
def test_gemm_compiles_for_hopper_without_spills(m, n, k):
    config = tuned.gemm_config(m, n, k)
    report = compile_for_h100(
        lambda lhs, rhs: sm90.gemm_fp8(lhs, rhs, jnp.dtype(jnp.bfloat16)), rows_shape(m, k), weight_shape(n, k)
    )
    assert report.problems() == []
    # Four products of 32 contracted values a block, for each block of a run and of the run that is cut short.
    copies = config.waves * (config.run + blocks(k) % config.run if blocks(k) >= config.run else blocks(k))
    assert report.kernels['gemm_fp8'].instructions['QGMMA'] == 4 * copies


@needs_hopper_tools
@pytest.mark.parametrize('accumulate', [False, True])
def test_wgrad_compiles_for_hopper_without_spills(accumulate):
    operands = [rows_shape(7168, 4096), rows_shape(2112, 4096)]
    if accumulate:
        operands.append(jax.ShapeDtypeStruct((7168, 2112), jnp.float32))
    report = compile_for_h100(lambda lhs, rhs, before=None: sm90.wgrad_fp8(lhs, rhs, before), *operands)
    assert report.problems() == []
    # The accumulating form adds in the copy engine, without reading the gradient.
    assert bool(report.kernels['wgrad_fp8'].instructions['UTMAREDG']) is accumulate


@pytest.mark.parametrize('operation', ['gemm_fp8', 'wgrad_fp8'])
def test_every_candidate_fits_shared_memory(operation):
    for m in (64, 128, 4096):
        for config in tuned.candidates(operation, m, 4096, 7168):
            slot = (config.rows + config.columns) * (BLOCK + 4)
            chunks = config.out_buffers * config.warpgroups * 64 * 128
            assert config.stages * slot + chunks <= 232_448 - 1024, config
            assert config.warpgroups in kernel.REGISTERS


def poison(shape: tuple[int, int], dtype: jnp.dtype) -> None:
    """Leaves NaN in memory that the next result of this size is likely to get: what is not written shows."""
    for held in [jax.block_until_ready(jnp.full(shape, jnp.nan, dtype)) for _ in range(4)]:
        held.delete()


def poisoned(call, *operands):
    shape = jax.eval_shape(call, *operands)
    poison(shape.shape, shape.dtype)
    return jax.jit(call)(*operands)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('m', 'n', 'k'), [(1, 64, 128), (63, 576, 1536), (128, 2112, 7168), (4100, 4096, 2048), (333, 7168, 512)]
)
def test_gpu_gemm_of_quantised_inputs_equals_the_reference(m, n, k):
    quantise = jax.jit(lambda x: pk.quantize_rows(x.astype(jnp.bfloat16), implementation='pallas'))
    multiply = jax.jit(lambda a, b: pk.gemm_fp8(a, b, implementation='pallas'))
    _, rhs = pk.quantize_blocks(jax.random.normal(jax.random.key(n), (k, n)))
    rhs_NK = float64(rhs, BLOCK)
    for kind, draw in INPUTS.items():
        lhs = quantise(draw(jax.random.key(m), (m, k)))
        poison((m, n), jnp.bfloat16)
        assert similarity_error(multiply(lhs, rhs), float64(lhs, 1) @ rhs_NK.T) < SIMILARITY, kind


@pytest.mark.gpu
@pytest.mark.parametrize(('tokens', 'm', 'n'), [(1, 64, 128), (200, 512, 576), (4096, 1536, 2112)])
def test_gpu_wgrad_of_quantised_inputs_equals_the_reference(tokens, m, n):
    quantise = jax.jit(lambda x: pk.quantize_columns(x.astype(jnp.bfloat16), implementation='pallas'))
    multiply = jax.jit(lambda a, b: pk.wgrad_fp8(a, b, implementation='pallas'))
    accumulate = jax.jit(lambda a, b, c: pk.wgrad_fp8(a, b, c, implementation='pallas'))
    rhs = quantise(jax.random.normal(jax.random.key(n), (tokens, n)))
    rhs_NK = float64(rhs, 1)
    for kind, draw in INPUTS.items():
        lhs = quantise(draw(jax.random.key(tokens), (tokens, m)))
        wanted = float64(lhs, 1) @ rhs_NK.T
        poison((m, n), jnp.float32)
        assert similarity_error(multiply(lhs, rhs), wanted) < SIMILARITY, kind
        before = jnp.asarray(wanted, jnp.float32)
        assert similarity_error(accumulate(lhs, rhs, before), 2 * wanted) < SIMILARITY, kind


@pytest.mark.gpu
@pytest.mark.parametrize('operation', ['gemm_fp8', 'wgrad_fp8'])
@pytest.mark.parametrize('m', [64, 128, 4096])
def test_gpu_every_candidate_equals_the_reference(operation, m):
    n, k = 2112, 2048
    gemm = operation == 'gemm_fp8'
    lhs, rhs = rows(0, m, k), weight(1, n, k) if gemm else rows(1, n, k)
    wanted = float64(lhs, 1) @ float64(rhs, BLOCK if gemm else 1).T
    for config in tuned.candidates(operation, m, n, k):
        if gemm:
            got = poisoned(lambda a, b, c=config: sm90.gemm_fp8(a, b, jnp.float32, c), lhs, rhs)
        else:
            got = poisoned(lambda a, b, c=config: sm90.wgrad_fp8(a, b, None, c), lhs, rhs)
        assert similarity_error(got, wanted) < 1e-6, config


@pytest.mark.gpu
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_gpu_nan_and_inf_stay_in_their_row(bad):
    x = jax.random.normal(jax.random.key(0), (300, 1024)).astype(jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (1024, 576))
    _, rhs = pk.quantize_blocks(w)
    clean = pk.gemm_fp8(pk.quantize_rows(x), rhs, implementation='pallas')
    got = pk.gemm_fp8(pk.quantize_rows(x.at[77, 500].set(bad)), rhs, implementation='pallas')
    assert np.isnan(np.asarray(got[77], np.float32)).all()
    np.testing.assert_array_equal(np.delete(np.asarray(got), 77, 0), np.delete(np.asarray(clean), 77, 0))


@pytest.mark.gpu
def test_gpu_results_are_the_same_bits_every_time():
    lhs, rhs = rows(0, 4096, 2048), weight(1, 7168, 2048)
    first, second = (np.asarray(pk.gemm_fp8(lhs, rhs, implementation='pallas')) for _ in range(2))
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))
