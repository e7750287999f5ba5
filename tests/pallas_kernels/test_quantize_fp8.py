import dataclasses
import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8 import E4M3, Quantized
from pallas_kernels.quantize_fp8 import api, reference, sm90, tuned
from tests.pallas_kernels.hopper import DEVICE, compile_for_h100, needs_hopper_tools

INPUTS = ['random', 'heavy_tailed', 'all_equal', 'tiny', 'huge', 'zero_rows']
ODD_M = [1, 3, 127, 129, 200]
OPERATIONS = ['rows', 'columns', 'rows_and_columns', 'blocks', 'e5m6']
BF16, F32 = jnp.bfloat16, jnp.float32


def matrix(kind, M, K, dtype=BF16):
    rng = np.random.default_rng(M * K)
    x = rng.standard_normal((M, K))
    match kind:
        case 'heavy_tailed':
            x *= np.exp(3 * rng.standard_normal((M, K)))
        case 'all_equal':
            x[:] = 0.7
        case 'tiny':
            x *= 1e-30
        case 'huge':
            x *= 1e30
        case 'zero_rows':
            x[::2] = 0
    return jnp.asarray(x, dtype)


def run(operation, module, x, power_of_two=False, **options):
    function = getattr(module, f'quantize_{operation}')
    return function(x, **options) if operation == 'e5m6' else function(x, power_of_two=power_of_two, **options)


@functools.cache
def compiled(function, **options):
    return jax.jit(functools.partial(function, **options))


def jitted(function, *args, **options):
    return compiled(function, **options)(*args)


def f64(x):
    return np.asarray(x).astype(np.float64)


def without_padding(results):
    """The results without the scales of rows that do not exist."""
    cut = lambda x: x._replace(scales=x.scales[:, : len(x.values)]) if isinstance(x, Quantized) else x  # noqa: E731
    return jax.tree.map(cut, results, is_leaf=lambda x: isinstance(x, Quantized))


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(f64(a), f64(b))


def tiles_of(x, height, width):
    """(rows of tiles, columns of tiles, height, width), filled up with zeros."""
    x = np.pad(x, ((0, -x.shape[0] % height), (0, -x.shape[1] % width)))
    return x.reshape(x.shape[0] // height, height, x.shape[1] // width, width).swapaxes(1, 2)


def assert_quantized(x, quantized, height, power_of_two):
    """The definition in float64: `height` rows by 128 columns share a scale, each value is a nearest e4m3."""
    tiles = tiles_of(f64(x), height, 128)
    values = tiles_of(f64(quantized.values), height, 128)
    scales = f64(quantized.scales) if height == 128 else f64(quantized.scales).T[: x.shape[0]]
    expected = np.maximum(np.abs(tiles).max((2, 3)), 2.0**-116) / 448
    if power_of_two:
        np.testing.assert_array_equal(scales, np.exp2(np.ceil(np.log2(expected))))
    else:
        np.testing.assert_allclose(scales, expected, rtol=2**-23)
    exact = tiles / (scales if power_of_two else expected)[..., None, None]
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-9))), -6) - 3)
    if power_of_two:
        np.testing.assert_array_equal(values, np.rint(exact / step) * step)
    assert np.all(np.abs(values - exact) <= step * (0.5 + 1e-5))


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('dtype', [BF16, F32], ids=['bf16', 'f32'])
@pytest.mark.parametrize('kind', INPUTS)
def test_reference_is_the_definition(kind, dtype, power_of_two):
    x = matrix(kind, 130, 192, dtype)
    rows, columns = jitted(api.quantize_rows_and_columns, x, power_of_two=power_of_two)
    assert_quantized(x, rows, 1, power_of_two)
    filled = np.pad(f64(x), ((0, 126), (0, 0))).T
    assert_quantized(filled, columns, 1, power_of_two)
    natural, transposed = jitted(api.quantize_blocks, x, power_of_two=power_of_two)
    assert_quantized(x, natural, 128, power_of_two)
    assert_equal(transposed, (natural.values.T, natural.scales.T))


@pytest.mark.parametrize('M', ODD_M)
@pytest.mark.parametrize('K', [64, 128, 192, 576, 7])
def test_shapes(M, K):
    Q, m, k = -(-M // 128) * 128, -(-M // 128), -(-K // 128)
    rows, columns = jax.eval_shape(api.quantize_rows_and_columns, jax.ShapeDtypeStruct((M, K), BF16))
    assert (rows.values.shape, rows.scales.shape) == ((M, K), (k, Q))
    assert (columns.values.shape, columns.scales.shape) == ((K, Q), (m, k * 128))
    natural, transposed = jax.eval_shape(api.quantize_blocks, jax.ShapeDtypeStruct((M, K), F32))
    assert (natural.values.shape, natural.scales.shape) == ((M, K), (m, k))
    assert (transposed.values.shape, transposed.scales.shape) == ((K, M), (k, m))


@pytest.mark.parametrize('M', [3, 129])
def test_padding_is_that_of_zeros(M):
    x = matrix('random', M, 192)
    rows, columns = jitted(api.quantize_rows_and_columns, x)
    np.testing.assert_array_equal(f64(columns.values[:, M:]), 0)
    np.testing.assert_allclose(f64(rows.scales[:, M:]), 2.0**-116 / 448, rtol=2**-23)
    assert_equal((rows, columns), (jitted(api.quantize_rows, x), jitted(api.quantize_columns, x)))


@pytest.mark.parametrize('kind', ['random', 'heavy_tailed'])
@pytest.mark.parametrize('power_of_two', [False, True])
def test_dequantized_is_similar(kind, power_of_two):
    x = matrix(kind, 64, 512)
    values, scales = jitted(api.quantize_rows, x, power_of_two=power_of_two)
    x, y = f64(x), f64(values) * np.repeat(f64(scales).T[: len(x)], 128, axis=1)
    assert 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()) < 1e-3


def natural_blocks(x, **options):
    return api.quantize_blocks(x, **options)[0]


def through_e5m6(x):
    return api.dequantize_e5m6(api.quantize_e5m6(x))


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nonfinite_stays_in_its_tile(bad, power_of_two):
    clean = matrix('random', 130, 256)
    dirty = clean.at[1, 5].set(bad)
    for make, own in (
        (api.quantize_rows, np.s_[1, :128]),
        (api.quantize_columns, np.s_[5, :128]),
        (natural_blocks, np.s_[:128, :128]),
    ):
        ours, theirs = (jitted(make, x, power_of_two=power_of_two) for x in (dirty, clean))
        inside = np.zeros(ours.values.shape, bool)
        inside[own] = True
        np.testing.assert_array_equal(np.isnan(f64(ours.values)), inside)
        np.testing.assert_array_equal(f64(ours.values)[~inside], f64(theirs.values)[~inside])
        assert np.isnan(f64(ours.scales)).sum() == 1
        np.testing.assert_array_equal(f64(ours.scales) != f64(theirs.scales), np.isnan(f64(ours.scales)))
    values, expected = (f64(jitted(through_e5m6, x)) for x in (dirty, clean))
    assert np.isnan(values[1, :128]).all()
    assert np.isnan(values).sum() == 128
    np.testing.assert_array_equal(values[~np.isnan(values)], expected[~np.isnan(values)])


@pytest.mark.parametrize('error', [-2, -1, 0, 1, 2])
def test_quotient_is_rounded_to_nearest_from_two_last_bits_away(error):
    rng = np.random.default_rng(0)
    near_exact = (1.75 * np.exp2(np.arange(-110, 120))).astype(np.float32).view(np.int32)[:, None] + np.arange(-9, 10)
    divisor = np.exp2(rng.uniform(-116, 128, 20_000)).astype(np.float32)
    divisor = np.concatenate([divisor, near_exact.astype(np.int32).view(np.float32).ravel()])
    nearest = np.float32(448) / divisor
    inexact = (nearest.view(np.int32) + error).astype(np.int32).view(np.float32)
    np.testing.assert_array_equal(jax.jit(reference.nearest_quotient)(inexact, divisor), nearest)


@pytest.mark.parametrize('dtype', [BF16, F32], ids=['bf16', 'f32'])
@pytest.mark.parametrize('kind', INPUTS)
def test_e5m6_is_the_definition(kind, dtype):
    x = matrix(kind, 7, 256, dtype)
    packed = jitted(api.quantize_e5m6, x)
    shapes = [part.shape for part in packed]
    assert shapes == [(7, 256), (7, 128), (2, 128)]
    tiles = tiles_of(f64(x), 1, 128)
    scales = f64(packed.scales_kQ).T[:7]
    amax = np.maximum(np.abs(tiles).max((2, 3)), 2.0**-110)
    np.testing.assert_array_equal(scales, np.exp2(np.ceil(np.log2(amax / 65024))))
    exact = tiles / scales[..., None, None]
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-9))), -14) - 6)
    expected = np.rint(exact / step) * step * scales[..., None, None]
    for out_dtype in (BF16, F32):
        assert_equal(
            api.dequantize_e5m6(packed, dtype=out_dtype), expected.swapaxes(1, 2).reshape(7, 256).astype(out_dtype)
        )


def test_e5m6_keeps_what_it_can_hold():
    """Every 12-bit value but the 128 with all exponent bits set comes back, subnormals and both ends included."""
    half = (np.arange(2**12, dtype=np.uint16) << 4).view(np.float16).astype(np.float32)
    half = np.resize(half[np.isfinite(half)], (32, 128))
    half[:, 0] = 65024  # the scale is 1
    packed = jitted(api.quantize_e5m6, jnp.asarray(half))
    np.testing.assert_array_equal(packed.scales_kQ[:, :32], 1)
    np.testing.assert_array_equal(jitted(api.dequantize_e5m6, packed, dtype=F32), half)


# Each configuration of an operation runs on one of these, so that all of the tails occur.
SHAPES = {
    'rows': [(129, 192, BF16), (200, 64, BF16), (3, 576, BF16), (1, 128, BF16)],
    'columns': [(129, 192, BF16), (127, 64, BF16), (3, 576, BF16)],
    'rows_and_columns': [(129, 192, BF16), (1, 576, BF16), (200, 64, BF16)],
    'blocks': [(192, 320, F32), (576, 64, BF16), (64, 192, F32)],
    'e5m6': [(129, 256, BF16), (200, 128, BF16), (3, 384, BF16)],
}
CASES = [
    pytest.param(operation, config, *shape, id=f'{operation}-{config.warpgroups}x{config.stages}-{shape[0]}x{shape[1]}')
    for operation in OPERATIONS
    for config, shape in zip(tuned.candidates(operation), SHAPES[operation], strict=True)
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(('operation', 'config', 'M', 'K', 'dtype'), CASES)
def test_kernel_interpreted_equals_reference(operation, config, M, K, dtype, capfd):
    """One or two thread blocks take all tiles: every stage and every result buffer is used again."""
    x = np.array(matrix('heavy_tailed', M, K, dtype))
    x[M // 2, K // 2] = np.inf
    x[0] = 0
    x = jnp.asarray(x)
    power_of_two = config != tuned.config(operation)
    ours = run(
        operation,
        sm90,
        x,
        power_of_two,
        config=dataclasses.replace(config, blocks=1),
        cores=1 + (operation == 'e5m6'),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert_equal(ours, jitted(functools.partial(run, operation, reference), x, power_of_two=power_of_two))
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err


@pytest.mark.parametrize('interpret', [None, plgpu.InterpretGPUParams(detect_races=True)], ids=['reference', 'kernel'])
def test_a_stack_of_weights_is_quantised_matrix_by_matrix(interpret, capfd):
    w_EKN = jnp.stack([matrix('heavy_tailed', 256, 192, F32) * scale for scale in (1, 1e-3, 1e4)])
    if interpret is None:
        ours = jitted(api.quantize_blocks, w_EKN)
    else:
        ours = sm90.quantize_blocks(w_EKN, cores=2, interpret=interpret)
    each = [jitted(api.quantize_blocks, w_KN) for w_KN in w_EKN]
    assert_equal(ours, jax.tree.map(lambda *parts: jnp.stack(parts), *each))
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err


@pytest.mark.parametrize('interpret', [None, plgpu.InterpretGPUParams(detect_races=True)], ids=['reference', 'kernel'])
@pytest.mark.parametrize('stack', [(), (2,)])
def test_weights_side_by_side_are_quantised_as_one(stack, interpret, capfd):
    whole = jnp.stack([matrix('heavy_tailed', 128, 448, F32) * scale for scale in (1, 1e-3)])
    whole = whole if stack else whole[0]
    weights = whole[..., :128], whole[..., 128:384], whole[..., 384:]
    wanted = jitted(api.quantize_blocks, whole)
    if interpret is None:
        assert_equal(jitted(api.quantize_blocks, *weights), wanted)
    else:
        assert_equal(sm90.quantize_blocks(*weights, cores=1, interpret=interpret), wanted)
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err


@pytest.mark.parametrize(
    ('shapes', 'dtypes', 'problem'),
    [
        ([(8, 128), (4, 128)], (F32, F32), r'float32\(4, 128\)'),
        ([(8, 128), (8, 128)], (F32, BF16), r'bfloat16\(8, 128\)'),
        ([(8, 64), (8, 128)], (F32, F32), '64 columns'),
    ],
)
def test_weights_that_cannot_stand_side_by_side_are_named(shapes, dtypes, problem):
    with pytest.raises(ValueError, match=problem):
        # Past the shape checks that hold in tests alone.
        inspect.unwrap(api.quantize_blocks)(
            *(jnp.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        )


def float8_rows(M, K):
    """Rows in float8 whose scales past M are NaN, as they may be."""
    rows = jitted(api.quantize_rows, matrix('heavy_tailed', M, K))
    return rows._replace(scales=jnp.asarray(np.where(np.arange(rows.scales.shape[1]) < M, rows.scales, np.nan), F32))


@pytest.mark.parametrize('power_of_two', [False, True])
def test_requantised_columns_are_those_of_what_the_rows_stand_for(power_of_two):
    rows = float8_rows(200, 192)
    dense = np.asarray(rows.values, np.float32) * np.asarray(rows.scales).T[:200].repeat(128, 1)[:, :192]
    wanted = jitted(api.quantize_columns, jnp.asarray(dense).astype(BF16), power_of_two=power_of_two)
    assert_equal(jitted(api.requantize_columns, rows, power_of_two=power_of_two), wanted)


@pytest.mark.timeout(120)
@pytest.mark.parametrize('config', tuned.candidates('requantize'))
@pytest.mark.parametrize(('M', 'K'), [(300, 256), (128, 384)])
def test_interpreted_requantisation_equals_the_reference(M, K, config, capfd):
    rows = float8_rows(M, K)
    options = {'cores': 1, 'interpret': plgpu.InterpretGPUParams(detect_races=True)}
    ours = sm90.requantize_columns(rows, config=dataclasses.replace(config, blocks=2), **options)
    assert_equal(ours, jitted(reference.requantize_columns, rows, power_of_two=False))
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err


@needs_hopper_tools
@pytest.mark.parametrize('config', tuned.candidates('requantize'))
def test_requantisation_compiled_fits_the_multiprocessor(config):
    rows = Quantized(jax.ShapeDtypeStruct((4097, 896), E4M3), jax.ShapeDtypeStruct((7, 4224), F32))
    call = functools.partial(sm90.requantize_columns, config=config)
    [kernel] = compile_for_h100(call, rows).kernels.values()
    assert kernel.problems() == []
    assert 4 * config.warpgroups * config.blocks * 32 * -(-kernel.registers // 8) * 8 <= 65_536
    assert (kernel.shared_bytes + 1024) * config.blocks <= 228 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize('config', tuned.candidates('requantize'))
@pytest.mark.parametrize(('M', 'K'), [(300, 256), (20000, 896)])
def test_requantisation_on_the_device_equals_the_reference(M, K, config):
    rows = float8_rows(M, K)
    ours = jax.jit(functools.partial(sm90.requantize_columns, config=config))(rows)
    assert_equal(without_padding(ours), without_padding(jitted(reference.requantize_columns, rows, power_of_two=False)))


def test_rows_that_do_not_fit_are_not_requantised():
    rows = float8_rows(128, 192)
    with pytest.raises(ValueError, match=r'scales float32\(1, 128\).*float32 scales \(2, 128\)'):
        api.requantize_columns(rows._replace(scales=rows.scales[:1]))
    with pytest.raises(ValueError, match='the input is bfloat16'):
        api.requantize_columns(rows._replace(values=rows.values.astype(BF16)))
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match='K=192, the kernel serves multiples of 128'),
    ):
        api.requantize_columns(rows, implementation='pallas')


COMPILED = [(operation, BF16) for operation in OPERATIONS] + [('blocks', F32)]


@needs_hopper_tools
@pytest.mark.timeout(120)
@pytest.mark.parametrize(('operation', 'dtype'), COMPILED, ids=lambda case: getattr(case, '__name__', case))
def test_kernel_compiled_fits_the_multiprocessor(operation, dtype):
    """As many thread blocks as the grid counts on live on a multiprocessor at once; none of them spills."""
    K = 7104 if operation == 'blocks' else 4097
    x = jax.ShapeDtypeStruct((K, 896 if operation == 'e5m6' else 576), dtype)
    [kernel] = compile_for_h100(functools.partial(run, operation, api), x).kernels.values()
    assert kernel.problems() == []
    config = tuned.config(operation)
    warps = 4 * config.warpgroups * config.blocks
    assert warps * 32 * -(-kernel.registers // 8) * 8 <= 65_536
    assert (kernel.shared_bytes + 1024) * config.blocks <= 228 * 1024
    if dtype == BF16:
        chunks = 2 * config.rows // 64 // config.warpgroups
        both = operation in ('blocks', 'rows_and_columns')
        assert kernel.instructions['LDSM'] == 4 * chunks * (1 + both), 'one for 8x8 values of each of 4 lanes, no other'
        assert kernel.instructions['LDS'] <= (16 if operation == 'blocks' else 0)


@pytest.mark.gpu
@pytest.mark.parametrize(('operation', 'config', 'M', 'K', 'dtype'), CASES)
def test_kernel_on_the_device_equals_reference(operation, config, M, K, dtype):
    for rows in (M, M + 200 * 128):  # fewer tiles than thread blocks, and several for each
        kernel = jax.jit(functools.partial(run, operation, sm90, config=config))
        specification = jax.jit(functools.partial(run, operation, reference))
        for kind in [*INPUTS, 'nan']:
            x = matrix(kind, rows, K, dtype)
            if kind == 'nan':
                x = x.at[rows // 2, K // 2].set(jnp.nan).at[0, 0].set(jnp.inf)
            expected = specification(jax.device_put(x, jax.devices('cpu')[0]))
            # Memory that the results are likely to get: what is not written shows.
            poison = [jnp.full(part.nbytes, 0x7F, jnp.uint8).block_until_ready() for part in jax.tree.leaves(expected)]
            del poison
            ours = kernel(x)
            if operation == 'e5m6' and kind == 'nan':
                ours, expected = map(api.dequantize_e5m6, (ours, expected))  # there are many NaNs
            assert_equal(without_padding(ours), without_padding(expected))


def test_float32_weights_and_bfloat16_activations_are_served():
    assert sm90.refusal(jnp.zeros((129, 192), BF16)) is None
    assert 'float32' in sm90.refusal(jnp.zeros((129, 192), F32))
    assert '200 columns' in sm90.refusal(jnp.zeros((129, 200), BF16))
    assert sm90.blocks_refusal(jnp.zeros((64, 192), F32)) is None
    assert '(64, 200)' in sm90.blocks_refusal(jnp.zeros((64, 200), F32))
    assert sm90.blocks_refusal(jnp.zeros((3, 128, 64), F32)) is None
    assert '(3, 64, 64)' in sm90.blocks_refusal(jnp.zeros((3, 64, 64), F32))


@pytest.mark.parametrize('operation', OPERATIONS)
def test_bad_input_is_named(operation):
    with pytest.raises(ValueError, match='float16'):
        run(operation, api, jnp.zeros((4, 128), jnp.float16))
    with pytest.raises(ValueError, match=r'\(0, 128\)'):
        run(operation, api, jnp.zeros((0, 128), BF16))
    with pytest.raises(NotImplementedError, match='Hopper'):
        run(operation, api, jnp.zeros((4, 128), BF16), implementation='pallas')


def test_e5m6_wants_whole_tiles():
    with pytest.raises(ValueError, match='K=192'):
        api.quantize_e5m6(jnp.zeros((4, 192), BF16))


def test_unserved_input_warns_on_hopper():
    x = jax.ShapeDtypeStruct((4, 200), BF16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        with pytest.warns(UserWarning, match='200 columns'):
            jax.eval_shape(api.quantize_rows, x)
        with pytest.raises(NotImplementedError, match='200 columns'):
            jax.eval_shape(functools.partial(api.quantize_rows, implementation='pallas'), x)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            rows = jax.eval_shape(api.quantize_rows, jax.ShapeDtypeStruct((5, 192), BF16))
    assert (rows.values.shape, rows.scales.shape) == ((5, 192), (2, 128))


def test_configuration_must_fit_the_tile():
    x = jnp.zeros((128, 128), BF16)
    with pytest.raises(ValueError, match='128 rows'):
        sm90.quantize_columns(x, config=tuned.config('rows'), cores=1)
    with pytest.raises(ValueError, match='number of times 64 rows'):
        sm90.quantize_rows(x, config=tuned.QuantizeConfig(64, 2, 1, 1, 1), cores=1)
