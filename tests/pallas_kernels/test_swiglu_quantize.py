import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bench import swiglu_quantize as bench
from pallas_kernels.fp8 import E4M3, Quantized, dequantize_rows
from pallas_kernels.quantize_fp8.reference import quantize_columns, quantize_rows
from pallas_kernels.quantize_fp8.tuned import QuantizeConfig
from pallas_kernels.swiglu_quantize import api, reference, sm90, tuned
from tests.pallas_kernels.hopper import DEVICE, compile_for_h100, needs_hopper_tools

BF16, F32 = jnp.bfloat16, jnp.float32
OPERATIONS = ['forward', 'forward_rows', 'backward', 'backward_rows', 'backward_bf16', 'backward_bf16_rows']
KINDS = ['random', 'heavy_tailed', 'tiny', 'huge', 'zero_rows', 'extreme_gates']


def matrix(kind, M, K, seed):
    rng = np.random.default_rng([M, K, seed])
    x = rng.standard_normal((M, K))
    match kind:
        case 'heavy_tailed':
            x *= np.exp(2 * rng.standard_normal((M, K)))
        case 'tiny':
            x *= 1e-30
        case 'huge':
            x *= 1e15
        case 'zero_rows':
            x[::2] = 0
        case 'extreme_gates':
            x *= 100
    return jnp.asarray(x, BF16)


def inputs(operation, kind, M, H, weighted=True):
    """(gate and up, [d_hidden], weights); scales that stand for rows past M are NaN."""
    gate_up = matrix(kind, M, 2 * H, 0)
    weight = jnp.asarray(np.random.default_rng(M).uniform(0.1, 1, M), F32) if weighted else None
    if operation.startswith('forward'):
        return gate_up, weight
    if 'bf16' not in operation:
        gate_up = compiled(quantize_rows, power_of_two=False)(gate_up)
        gate_up = gate_up._replace(scales=gate_up.scales.at[:, M:].set(jnp.nan))
    d_hidden = matrix('random' if kind == 'extreme_gates' else kind, M, H, 1)
    return gate_up, d_hidden, weight


def run(operation, module, *args, power_of_two=False, **options):
    function = module.swiglu_quantize if operation.startswith('forward') else module.swiglu_quantize_backward
    return function(*args, power_of_two=power_of_two, columns=not operation.endswith('_rows'), **options)


@functools.cache
def compiled(function, *args, **options):
    return jax.jit(functools.partial(function, *args, **options))


def jitted(operation, module, *args, **options):
    return compiled(run, operation, module, **options)(*args)


def f64(x):
    return np.asarray(x).astype(np.float64)


def step(x):
    """The distance of the e4m3 numbers around x."""
    return np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-9))), -6) - 3)


def assert_near(ours, theirs, rtol=1e-5):
    """Scales and sums equal to `rtol`; values equal but for few, which are neighbours.

    Exponentials and quotients differ in their last bits, and with them what lies next to the middle of two bfloat16 or
    two e4m3 numbers; a scale is that of a bfloat16 number. What is less than 1e-33 may be zero: those of the GPU are.
    """
    (rows, columns, *sums), (rows_, columns_, *sums_) = ours, theirs
    pairs = (
        jax.tree.leaves([(rows, columns)], is_leaf=is_quantized),
        jax.tree.leaves([(rows_, columns_)], is_leaf=is_quantized),
    )
    for a, b in zip(*pairs, strict=True):
        assert (a.values.shape, a.scales.shape) == (b.values.shape, b.scales.shape)
        used = np.s_[:, : len(b.values)]  # what stands for other rows means nothing
        scales, expected_scales = (np.where(x * 448 < 1e-33, 0, x) for x in (f64(a.scales)[used], f64(b.scales)[used]))
        near = np.isclose(scales, expected_scales, rtol=rtol, equal_nan=True)
        assert np.mean(~near) < 2e-3
        np.testing.assert_allclose(scales, expected_scales, rtol=2**-7)
        values, expected = f64(a.values), f64(b.values)
        np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
        large = np.repeat(expected_scales.T, 128, axis=1)[:, : values.shape[1]] * np.abs(expected) > 1e-33
        same_scale = np.repeat(near.T, 128, axis=1)[:, : values.shape[1]]
        differ = (values != expected) & large & same_scale
        assert differ.mean() < 2e-3
        size = np.maximum(np.abs(values), np.abs(expected))[differ]
        assert np.all(np.abs(values - expected)[differ] <= step(size))
    for a, b in zip(sums, sums_, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype == F32
            finite = np.abs(f64(b))[np.isfinite(f64(b))]
            np.testing.assert_allclose(f64(a), f64(b), rtol=1e-4, atol=1e-5 * finite.max(initial=0))


def is_quantized(x):
    return isinstance(x, Quantized)


def float32_hidden(gate_up, weight):
    gate, up = jnp.split(gate_up.astype(F32), 2, axis=1)
    return jax.nn.silu(gate) * up * (1 if weight is None else weight[:, None])


def float32_gradients(gate_up, weight, d_hidden):
    return jax.vjp(float32_hidden, gate_up, weight)[1](d_hidden)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_forward_quantises_the_hidden_values_rounded_to_bfloat16(kind, weighted):
    gate_up, weight = inputs('forward', kind, 130, 192, weighted)
    hidden = jax.jit(float32_hidden)(gate_up, weight)
    rounded = hidden.astype(BF16)
    both = [compiled(quantize, power_of_two=False) for quantize in (quantize_rows, quantize_columns)]
    expected = tuple(quantize(rounded) for quantize in both)
    assert_near(jitted('forward', api, gate_up, weight), expected)
    if kind == 'random':
        with pytest.raises(AssertionError):
            assert_near(tuple(quantize(hidden) for quantize in both), expected)


@pytest.mark.parametrize('operation', ['backward', 'backward_bf16'])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('kind', ['random', 'zero_rows', 'heavy_tailed', 'extreme_gates'])
def test_backward_quantises_the_gradient_of_the_hidden_values(operation, kind, weighted):
    gate_up, d_hidden, weight = inputs(operation, kind, 130, 192, weighted)
    rows, columns, d_weight = jitted(operation, api, gate_up, d_hidden, weight)
    dense = dequantize_rows(gate_up) if isinstance(gate_up, Quantized) else gate_up.astype(F32)
    d_gate_up, expected_d_weight = compiled(float32_gradients)(dense, weight, d_hidden.astype(F32))
    d_gate_up = d_gate_up.astype(BF16)
    both = tuple(compiled(quantize_columns, power_of_two=False)(half) for half in jnp.split(d_gate_up, 2, axis=1))
    expected = compiled(quantize_rows, power_of_two=False)(d_gate_up), both, expected_d_weight
    assert_near((rows, columns, d_weight), expected, rtol=1e-4)
    assert (d_weight is None) == (not weighted)


@pytest.mark.parametrize('H', [128, 192, 7])
@pytest.mark.parametrize('M', [1, 127, 129])
def test_shapes(M, H):
    Q, m, h, g = -(-M // 128) * 128, -(-M // 128), -(-H // 128), -(-2 * H // 128)
    gate_up, weight = jax.ShapeDtypeStruct((M, 2 * H), BF16), jax.ShapeDtypeStruct((M,), F32)
    shapes = lambda *xs: [(x.values.shape, x.scales.shape) for x in xs]  # noqa: E731
    rows, columns = jax.eval_shape(api.swiglu_quantize, gate_up, weight)
    assert shapes(rows, columns) == [((M, H), (h, Q)), ((H, Q), (m, h * 128))]
    kept = Quantized(jax.ShapeDtypeStruct(gate_up.shape, E4M3), jax.ShapeDtypeStruct((g, Q), F32))
    d_hidden = jax.ShapeDtypeStruct((M, H), BF16)
    rows, columns, d_weight = jax.eval_shape(api.swiglu_quantize_backward, kept, d_hidden, weight)
    assert shapes(rows, *columns) == [((M, 2 * H), (g, Q))] + [((H, Q), (m, h * 128))] * 2
    assert d_weight.shape == (M,)
    only = jax.eval_shape(functools.partial(api.swiglu_quantize_backward, columns=False), kept, d_hidden)
    assert only[1:] == (None, None)


@pytest.mark.parametrize('operation', OPERATIONS)
def test_rows_past_the_end_count_as_zeros(operation):
    args = inputs(operation, 'random', 129, 128)
    rows, columns, *_ = jitted(operation, reference, *args)
    assert not np.isnan(f64(rows.values)).any()
    for transposed in jax.tree.leaves(columns, is_leaf=is_quantized):
        np.testing.assert_array_equal(f64(transposed.values[:, 129:]), 0)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nonfinite_stays_in_its_tile(bad):
    gate_up, weight = inputs('forward', 'random', 130, 256)
    for dirty, own in (
        (gate_up.at[1, 256 + 5].set(bad), [np.s_[1, :128], np.s_[5, :128]]),
        (gate_up.at[129, 200].set(bad), [np.s_[129, 128:], np.s_[200, 128:]]),
    ):
        for ours, clean, place in zip(
            jitted('forward', api, dirty, weight), jitted('forward', api, gate_up, weight), own, strict=True
        ):
            inside = np.zeros(ours.values.shape, bool)
            inside[place] = True
            np.testing.assert_array_equal(np.isnan(f64(ours.values)), inside)
            np.testing.assert_array_equal(f64(ours.values)[~inside], f64(clean.values)[~inside])
            assert np.isnan(f64(ours.scales)).sum() == 1


# Each configuration runs on one of these: partial blocks of rows, several tiles across, fewer and more tiles than stages.
SHAPES = [(129, 256), (1, 128), (259, 128)]
CASES = [
    pytest.param(operation, config, *shape, id=f'{operation}-{config.warpgroups}x{config.stages}-{shape[0]}x{shape[1]}')
    for operation in OPERATIONS
    for config, shape in zip(tuned.candidates(operation), SHAPES, strict=False)
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(('operation', 'config', 'M', 'H'), CASES)
def test_kernel_interpreted_is_near_reference(operation, config, M, H, capsys):
    """One thread block takes all tiles: stages and result buffers are used again. Infinite values stay in their tiles."""
    args = inputs(operation, 'heavy_tailed', M, H, weighted=config == tuned.config(operation))
    if operation == 'forward':
        args = (args[0].at[M // 2, H + H // 2].set(jnp.inf).at[0].set(0), args[1])
    elif operation.startswith('backward'):
        args = (args[0], args[1].at[M // 2, H // 2].set(jnp.inf), args[2])
    power_of_two = config != tuned.config(operation)
    ours = run(
        operation,
        sm90,
        *args,
        power_of_two=power_of_two,
        config=dataclasses.replace(config, blocks=1),
        cores=1,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert_near(ours, jitted(operation, reference, *args, power_of_two=power_of_two))
    assert 'RACE DETECTED' not in capsys.readouterr().out, 'the interpreter prints races, it does not raise'


@needs_hopper_tools
@pytest.mark.timeout(180)
@pytest.mark.parametrize('operation', OPERATIONS)
def test_kernel_compiled_fits_the_multiprocessor(operation):
    """For every candidate, as many thread blocks as the grid counts on live on a multiprocessor at once; none spills."""
    args = jax.eval_shape(lambda: inputs(operation, 'random', 4097, 512))
    for config in tuned.candidates(operation):
        function = functools.partial(run, operation, sm90, config=config)
        [kernel] = [k for k in compile_for_h100(function, *args).kernels.values() if k.instructions['UTMALDG']]
        assert kernel.problems() == [], config
        warps = 4 * config.warpgroups * config.blocks
        assert warps * 32 * -(-kernel.registers // 8) * 8 <= 65_536, (config, kernel.registers)
        assert (kernel.shared_bytes + 1024) * config.blocks <= 228 * 1024, (config, kernel.shared_bytes)
        # What is transposed is written and read back in 8x8 values of each of 4 lanes, 64 columns by 64 rows at a time.
        columns = not operation.endswith('_rows')
        pieces = columns * (1 + operation.startswith('backward')) * 2 * 4
        assert kernel.instructions['STSM'] == kernel.instructions_in_full['LDSM.16.MT88.4'] == pieces


@pytest.mark.gpu
@pytest.mark.parametrize(('operation', 'config', 'M', 'H'), CASES)
def test_kernel_on_the_device_is_near_reference(operation, config, M, H):
    cpu = jax.devices('cpu')[0]
    for rows in (M, M + 200 * 128):  # fewer tiles than thread blocks, and several for each
        kernel = jax.jit(functools.partial(run, operation, sm90, config=config))
        specification = jax.jit(functools.partial(run, operation, reference))
        for kind in [*KINDS, 'nan']:
            args = inputs(operation, 'random' if kind == 'nan' else kind, rows, H)
            if kind == 'nan' and operation.startswith('forward'):
                args = (args[0].at[rows // 2, H // 2].set(jnp.nan).at[0, 0].set(jnp.inf), args[1])
            elif kind == 'nan':
                args = (args[0], args[1].at[rows // 2, H // 2].set(jnp.nan).at[0, 0].set(jnp.inf), args[2])
            expected = specification(*jax.device_put(args, cpu))
            # Memory that the results are likely to get: what is not written shows.
            poison = [jnp.full(part.nbytes, 0x7F, jnp.uint8).block_until_ready() for part in jax.tree.leaves(expected)]
            del poison
            assert_near(kernel(*args), expected, rtol=1e-4)


def test_bad_input_is_named():
    gate_up, d_hidden, weight = jnp.zeros((4, 256), BF16), jnp.zeros((4, 128), BF16), jnp.zeros(4, F32)
    kept = quantize_rows(gate_up, False)
    for function, args, problem in (
        (api.swiglu_quantize, (jnp.zeros((4, 256), jnp.float16),), 'float16'),
        (api.swiglu_quantize, (jnp.zeros((0, 256), BF16),), r'\(0, 256\)'),
        (api.swiglu_quantize, (jnp.zeros((4, 255), BF16),), r'\(4, 255\)'),
        (api.swiglu_quantize, (gate_up, jnp.zeros(3, F32)), r'float32\(3,\)'),
        (api.swiglu_quantize, (gate_up, jnp.zeros(4, BF16)), 'bfloat16'),
        (api.swiglu_quantize_backward, (kept._replace(scales=kept.scales[:, :4]), d_hidden), r'\(2, 4\)'),
        (api.swiglu_quantize_backward, (kept._replace(values=gate_up), d_hidden), 'bfloat16 with float32'),
        (api.swiglu_quantize_backward, (kept, gate_up), r'\(4, 256\)'),
        (api.swiglu_quantize_backward, (kept, d_hidden, weight[:1]), r'float32\(1,\)'),
    ):
        with pytest.raises(ValueError, match=problem):
            inspect.unwrap(function)(*args)  # past the shape checks that hold in tests alone
    for function, args in ((api.swiglu_quantize, (gate_up,)), (api.swiglu_quantize_backward, (kept, d_hidden))):
        with pytest.raises(NotImplementedError, match='Hopper'):
            function(*args, implementation='pallas')


def test_what_the_kernel_does_not_serve_is_named_on_hopper():
    struct = jax.ShapeDtypeStruct
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        forward = functools.partial(api.swiglu_quantize, implementation='pallas')
        with pytest.raises(NotImplementedError, match='H=192'):
            jax.eval_shape(forward, struct((4, 384), BF16))
        with pytest.raises(NotImplementedError, match='float32'):
            jax.eval_shape(forward, struct((4, 256), F32))
        kept = Quantized(struct((4, 256), E4M3), struct((2, 128), F32))
        backward = functools.partial(api.swiglu_quantize_backward, implementation='pallas')
        with pytest.raises(NotImplementedError, match='float32'):
            jax.eval_shape(backward, kept, struct((4, 128), F32))
        with pytest.warns(UserWarning, match='H=192'):
            jax.eval_shape(api.swiglu_quantize, struct((4, 384), BF16))
        rows, _, _ = jax.eval_shape(backward, kept, struct((4, 128), BF16))
    assert rows.values.shape == (4, 256)


def test_configuration_must_fit_the_tile():
    gate_up = jnp.zeros((128, 256), BF16)
    with pytest.raises(ValueError, match='128 rows'):
        sm90.swiglu_quantize(gate_up, config=tuned.config('forward_rows'), cores=1)
    with pytest.raises(ValueError, match='2 warpgroups'):
        sm90.swiglu_quantize(gate_up, config=QuantizeConfig(128, 1, 1, 1, 1), cores=1)


@pytest.mark.parametrize('name', ['forward', 'forward_rows', 'backward', 'backward_rows'])
def test_benchmark_case_is_right(name):
    case = bench.case(name, 256, 128)
    args = case.inputs(jax.random.key(0))
    results = case.run(*args, implementation='reference')
    for a, b in zip(jax.tree.leaves(case.dense(results)), jax.tree.leaves(case.reference(*args)), strict=True):
        np.testing.assert_array_equal(f64(a), f64(b))
    values = 256 * 128
    moved = {'forward': 6, 'forward_rows': 5, 'backward': 8, 'backward_rows': 6}[name] * values
    assert moved <= case.moved_bytes() <= 1.1 * moved
