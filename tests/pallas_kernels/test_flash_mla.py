"""Attention of MLA against the plain formula in float64, values and gradients of both results; the kernels against that."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bench import checks
from pallas_kernels.flash_mla import reference, sight, sm90
from pallas_kernels.flash_mla.api import SAVED, flash_mla, flash_mla_e5m6
from pallas_kernels.quantize_fp8.api import dequantize_e5m6
from tests.pallas_kernels.hopper import DEVICE, calls_on_h100, compile_for_h100, needs_hopper_tools

B, H, N, R, U = 2, 3, 16, 8, 12
SCALE = 0.3
NAMES = 'q', 'q_rope', 'k', 'k_rope', 'v'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries, the last one partial."""
    monkeypatch.setattr(reference, 'BLOCK', 16)


def inputs(T, S, dtype=jnp.float32):
    rng = np.random.default_rng([T, S])
    shapes = (B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, U)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def plain(q, q_rope, k, k_rope, v, visible_BTS):
    """Output and log-sum-exp as formulas say, in the precision of the inputs."""
    scores = SCALE * (jnp.einsum('bthn,bshn->bhts', q, k) + jnp.einsum('bthr,bsr->bhts', q_rope, k_rope))
    weights = jnp.where(visible_BTS[:, None], jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum('bhts,bshu->bthu', weights / jnp.where(total == 0, 1, total), v)
    return out, jnp.log(jnp.where(total == 0, 1, total))[..., 0]


def causal(T):
    return np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))


def documents(T, count, seed=0):
    """Segments of so many documents, cut at random, numbered in any order."""
    rng = np.random.default_rng([T, count, seed])
    cuts = np.sort(rng.integers(1, max(T, 2), (B, count - 1)), axis=1)
    order = np.stack([rng.permutation(count) for _ in range(B)])
    return np.take_along_axis(order, (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1), axis=1).astype(np.int32)


def zigzag(T, S):
    """Positions of T queries of each of two devices, a row each: one has both ends of S tokens, the other the middle."""
    ends = np.r_[: T // 2, S - (T - T // 2) : S]
    return np.stack([ends, T // 2 + np.arange(T)]).astype(np.int32)


def cases():
    rng = np.random.default_rng(0)
    for T in (1, 15, 16, 17, 50):
        yield f'causal-{T}', T, T, {}, causal(T)
    cuts = np.sort(rng.integers(0, 50, (B, 4)), axis=1)
    segments = (np.arange(50)[None, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)
    same = segments[:, :, None] == segments[:, None]
    starts = sight.document_starts(jnp.asarray(segments))
    yield 'documents', 50, 50, {'first_BT': starts}, causal(50) & same
    positions = zigzag(26, 52)
    starts = np.take_along_axis(np.asarray(sight.document_starts(jnp.asarray(documents(52, 4)))), positions, axis=1)
    seen = np.arange(52) <= positions[..., None]
    options = {'positions_BT': jnp.asarray(positions)}
    yield 'zigzag', 26, 52, options, seen
    seen = seen & (starts[..., None] <= np.arange(52))
    yield 'zigzag-documents', 26, 52, {'first_BT': jnp.asarray(starts), **options}, seen
    positions = np.array([[20], [3]]) + np.arange(18)
    yield 'prefix', 18, 40, {'positions_BT': jnp.asarray(positions)}, np.arange(40) <= positions[..., None]


CASES = {name: case for name, *case in cases()}


def results(function, x, d_out, d_lse):
    (out, lse), pull = jax.vjp(function, *x)
    return out, lse, *pull((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))


@jax.jit
def formula(x, visible_BTS, d_out, d_lse):
    return results(lambda *x: plain(*x, visible_BTS), x, d_out, d_lse)


def cotangents(T):
    rng = np.random.default_rng(1)
    return rng.standard_normal((B, T, H, U)), rng.standard_normal((B, H, T))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('name', CASES)
def test_results_and_gradients_are_those_of_the_formula(name, dtype, tolerance):
    """Errors in units of the largest value: float32 sums; in bfloat16 a few roundings of 2^-9 each."""
    T, S, options, visible = CASES[name]
    x, (d_out, d_lse) = inputs(T, S, dtype), cotangents(T)
    d_out = jnp.asarray(d_out, dtype)
    ours = jax.jit(functools.partial(results, functools.partial(flash_mla, scale=SCALE, **options)))(
        x, d_out, jnp.asarray(d_lse, jnp.float32)
    )
    with jax.enable_x64(True):
        wide = [np.asarray(array, np.float64) for array in (*x, d_out)]
        wanted = [np.asarray(array) for array in formula(wide[:5], visible, wide[5], d_lse)]
    for label, got, expected in zip(('out', 'lse', *NAMES), ours, wanted, strict=True):
        assert got.dtype == (jnp.float32 if label == 'lse' else dtype)
        error = np.max(np.abs(np.asarray(got, np.float64) - expected)) / np.max(np.abs(expected))
        assert error < tolerance, label


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    x = inputs(20, 20)
    positions_BT = jnp.asarray(np.tile(np.where(np.arange(20) == 5, -1, np.arange(20)), (B, 1)))
    attend = functools.partial(flash_mla, scale=SCALE, positions_BT=positions_BT)
    d_out, d_lse = np.ones((B, 20, H, U), np.float32), np.zeros((B, H, 20), np.float32)
    out, lse, *gradients = map(np.asarray, jax.jit(functools.partial(results, attend))(x, d_out, d_lse))
    assert not np.any(out[:, 5])
    assert np.all(np.isneginf(lse[:, :, 5]))
    assert np.all(np.isfinite(np.delete(lse, 5, axis=2)))
    assert all(np.all(np.isfinite(d)) for d in gradients)
    assert not np.any(gradients[0][:, 5])


def test_a_document_is_a_run_of_equal_numbers():
    segments_BT = jnp.array([[3, 3, 1, 1, 1, 3, 0, 0]])
    seen = sight.of_documents(segments_BT)
    np.testing.assert_array_equal(seen.first_BT, [[0, 0, 2, 2, 2, 5, 6, 6]])
    np.testing.assert_array_equal(seen.last_BT, [range(8)])
    np.testing.assert_array_equal(sight.document_starts(segments_BT), seen.first_BT)


def test_what_a_query_does_not_see_does_not_count():
    """Huge keys and values later, in other documents, and past the prefix change no bit."""
    T, S, options, visible = CASES['documents']
    x = inputs(T, S)
    row = 30
    hidden = ~visible[0, row]
    attend = jax.jit(functools.partial(flash_mla, scale=SCALE, **options))
    out, lse = map(np.asarray, attend(*x))
    loud = [np.array(array) for array in x]
    for array, value in zip(loud[2:], (1e3, 1e3, 1e30), strict=True):
        array[0, hidden] = value
    other, other_lse = map(np.asarray, attend(*loud))
    np.testing.assert_array_equal(out[0, row], other[0, row])
    np.testing.assert_array_equal(lse[0, :, row], other_lse[0, :, row])
    assert np.any(out[0] != other[0])


def test_only_output_and_log_sum_exp_are_kept_beside_the_inputs():
    x = inputs(50, 50)
    kept = jax.tree.leaves(jax.vjp(lambda *x: flash_mla(*x, scale=SCALE), *x)[1])
    floats = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sorted(floats) == sorted([*(array.shape for array in x), (B, 50, H, U), (B, H, 50)])


def wide_inputs(T):
    """With values 128 wide."""
    q, q_rope, k, k_rope, _ = inputs(T, T)
    v = jnp.asarray(np.random.default_rng(T).standard_normal((B, T, H, 128)), jnp.float32)
    return q, q_rope, k, k_rope, v


def test_twelve_bits_of_the_output_are_kept_in_its_place():
    x = wide_inputs(50)
    (out, _, packed), pull = jax.jit(lambda *x: jax.vjp(functools.partial(flash_mla_e5m6, scale=SCALE), *x))(*x)
    floats = sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32)
    assert floats == sorted([*(array.shape for array in x), (B, H, 50), packed.scales_kQ.shape])
    np.testing.assert_allclose(np.asarray(dequantize_e5m6(packed)).reshape(out.shape), out, rtol=2**-7, atol=1e-6)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), jnp.float32)
    both = [
        jax.jit(jax.grad(lambda *x, function=function: jnp.vdot(function(*x, scale=SCALE)[0], d_out), range(5)))(*x)
        for function in (flash_mla_e5m6, flash_mla)
    ]
    for ours, exact in zip(*both, strict=True):
        # Only the row sums of d_out * out see the rounding.
        assert np.any(ours != exact) == (ours.shape != x[4].shape)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-2 * np.abs(exact).max())


def test_an_output_of_no_whole_tiles_has_no_twelve_bits():
    with pytest.raises(ValueError, match='must be a multiple of 128'):
        flash_mla_e5m6(*inputs(8, 8), scale=SCALE)


def test_scores_are_held_for_a_block_of_queries_only():
    x = jax.eval_shape(lambda: inputs(512, 512))
    program = jax.jit(functools.partial(flash_mla, scale=SCALE)).lower(*x).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * B * H * 512 * 512 / 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: (*x[:4], x[4].astype(jnp.bfloat16)), 'bfloat16, they must all be'),
        (lambda x: tuple(array.astype(jnp.float16) for array in x), 'float16'),
        (lambda x: (x[0][:, :4], x[1][:, :4], *x[2:]), '4 queries of 8 keys need positions'),
        (lambda x: (x[0][:, :0], x[1][:, :0], *x[2:]), 'none empty'),
        (lambda x: (x[0], x[1][:, :, :1], *x[2:]), r'rotary queries \(.*\) must begin with \(B, T, H\)'),
        (lambda x: (*x[:2], x[2][:, :, :1], *x[3:]), r'keys \(.*\) must be \(B, S, H, N\)'),
        (lambda x: (*x[:3], x[3][..., :2], x[4]), r'rotary keys \(.*\) must be \(B, S, R\)'),
        (lambda x: (*x[:3], x[3][:, None], x[4]), r'none empty'),
        (lambda x: (*x[:4], x[4][:, :4]), r'values \(.*\) must begin with \(B, S, H\)'),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(flash_mla)(*change(inputs(8, 8)), scale=SCALE)


@pytest.mark.parametrize('kind', ['causal', 'documents', 'prefix', 'zigzag', 'zigzag-documents'])
def test_ranges_of_blocks_hold_all_that_is_seen(kind):
    """Outside of a range nobody sees anything; where nothing is masked, everybody sees everything."""
    T, S = 300, {'prefix': 420, 'zigzag': 600, 'zigzag-documents': 600}.get(kind, 300)
    seen = sights(kind, T, S) or sight.causal(B, T)
    first_BT, last_BT = map(np.asarray, seen)
    keys_S = np.arange(S)
    visible = (first_BT[..., None] <= keys_S) & (keys_S <= last_BT[..., None])
    rows, keys = 64, 32
    of_keys, of_queries = (
        np.asarray(jax.jit(ranges, static_argnums=(1, 2, 3))(seen, rows, keys, S))
        for ranges in (sight.key_ranges, sight.query_ranges)
    )
    for ranges, cut in (
        (of_keys, lambda b, i, j: visible[b, i * rows :][:rows, j * keys :][:, :keys]),
        (of_queries, lambda b, j, i: visible[b, i * rows :][:rows, j * keys :][:, :keys]),
    ):
        skipped = full = 0
        for b, one, other in np.ndindex(B, ranges.shape[1], -(-S // keys)):
            begin, full_begin, full_end, end = ranges[b, one]
            assert begin <= full_begin <= full_end <= end
            block = cut(b, one, other)
            if not begin <= other < end:
                assert not block.any()
                skipped += block.size > 0
            if full_begin <= other < full_end:
                assert block.all()
                full += block.size > 0
        assert skipped
        assert full


def served(T, S, heads=2):
    """Inputs of widths that the kernels serve."""
    rng = np.random.default_rng([T, S])
    shapes = (B, T, heads, 128), (B, T, heads, 64), (B, S, heads, 128), (B, S, 64), (B, S, heads, 128)
    return reference.Inputs(*(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes))


def sights(kind, T, S):
    """What is handed to the kernels, which take None for causal attention."""
    if kind == 'causal':
        return None
    if kind == 'documents':
        return sight.of_documents(jnp.asarray(documents(T, min(8, T))))
    if kind.startswith('zigzag'):
        last_BT = jnp.asarray(zigzag(T, S))
        starts_BS = sight.document_starts(jnp.asarray(documents(S, min(8, S))))
        first_BT = jnp.take_along_axis(starts_BS, last_BT, axis=1) if kind == 'zigzag-documents' else None
        return sight.of_positions(last_BT, S, first_BT)
    positions_BT = jnp.arange(T) + jnp.array([[S - T], [0]])
    return sight.of_positions(positions_BT.at[1, -1].set(-1), S)  # that one sees nothing


def given(T, heads=2):
    rng = np.random.default_rng(7)
    d_out, d_lse = rng.standard_normal((B, T, heads, 128)), rng.standard_normal((B, heads, T))
    return jnp.asarray(d_out, jnp.bfloat16), jnp.asarray(d_lse, jnp.float32)


def both_passes(module, x, seen, d_out, d_lse, saved=None, **options):
    """Forward, and backward from its results or from those that are given."""
    out, lse = module.forward(x, seen, SCALE / 4, **options)
    d_lse = jnp.where(jnp.isneginf(lse), 0, d_lse)
    return out, lse, *module.backward(x, seen, SCALE / 4, *(saved or (out, lse)), d_out, d_lse, **options)


def assert_same_attention(ours, theirs):
    """Bfloat16 results within a few roundings of the largest, and nearly all of them far nearer; `lse` of float32.

    Of few queries, gradients are small differences of products with outputs that may be rounded the other way.
    """
    for label, got, expected in zip(('out', 'lse', *NAMES), ours, theirs, strict=True):
        assert got.dtype == expected.dtype
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        if label == 'lse':
            np.testing.assert_allclose(got, expected, atol=1e-5)
            continue
        assert np.all(np.isfinite(got)), label
        assert np.max(np.abs(got - expected)) <= 2**-6 * np.max(np.abs(expected)), label
        norm = np.sum(got * got) + np.sum(expected * expected)
        assert norm == 0 or 1 - 2 * np.sum(got * expected) / norm < 2e-4, label


@pytest.mark.parametrize(
    ('kind', 'T', 'S'),
    [('causal', 150, 150), ('documents', 200, 200), ('prefix', 66, 200), ('zigzag-documents', 140, 280)],
)
def test_interpreted_kernels_give_the_reference(kind, T, S, capfd, monkeypatch):
    monkeypatch.setattr(reference, 'BLOCK', 512)
    x, seen, d = served(T, S, heads=1), sights(kind, T, S), given(T, heads=1)
    theirs = jax.jit(lambda x: both_passes(reference, x, seen, *d))(x)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    ours = jax.jit(lambda x: both_passes(sm90, x, seen, *d, saved=theirs[:2], interpret=interpret))(x)
    assert_same_attention(ours, theirs)
    assert 'RACE' not in ''.join(capfd.readouterr())


@needs_hopper_tools
@pytest.mark.parametrize(('kind', 'T'), [('causal', 4096), ('documents', 4096), ('causal', 1), ('prefix', 63)])
def test_kernels_compile_for_hopper(kind, T):
    """Without spills or waits between products; lengths that cannot be copied as they are, too."""
    x, d = jax.eval_shape(lambda: (served(T, T), given(T)))
    seen = jax.eval_shape(lambda: sights(kind, T, T))
    report = compile_for_h100(functools.partial(both_passes, sm90), x, seen, *d)
    assert set(report.kernels) == {'flash_mla', 'flash_mla_dq', 'flash_mla_dkv'}
    assert report.problems() == []


def test_the_kernels_serve_the_widths_of_the_model_on_hopper():
    kernels = {'kernel flash_mla': 1, 'kernel flash_mla_dq': 1, 'kernel flash_mla_dkv': 1}
    assert kernels_of_training(served(64, 64)) == kernels
    with pytest.warns(UserWarning, match='heads are'):
        assert kernels_of_training(tuple(inputs(64, 64, jnp.bfloat16))) == {}
    with pytest.warns(UserWarning, match='float32'):
        assert kernels_of_training([array.astype(jnp.float32) for array in served(64, 64)]) == {}


def test_a_policy_that_keeps_the_results_spares_the_forward_pass():
    keep = jax.checkpoint_policies.save_only_these_names(SAVED)
    kernels = {'kernel flash_mla': 1, 'kernel flash_mla_dq': 1, 'kernel flash_mla_dkv': 1}
    assert kernels_of_training(served(64, 64), lambda f: jax.checkpoint(f, policy=keep)) == kernels
    assert kernels_of_training(served(64, 64), jax.checkpoint) == kernels | {'kernel flash_mla': 2}


def kernels_of_training(x, wrap=lambda f: f):
    """How often each kernel is called by attention and its gradients, traced for an H100."""
    attend = wrap(lambda *x: flash_mla(*x, scale=SCALE)[0])

    def step(*x):
        out, pull = jax.vjp(attend, *x)
        return pull(out)

    return {name: count for name, count in calls_on_h100(step, *x).items() if name.startswith('kernel ')}


def test_a_kernel_asked_for_by_name_says_what_it_does_not_serve():
    on_h100 = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE))
    with on_h100, pytest.raises(NotImplementedError, match=r'heads are \(16, 8, 12\) wide'):
        flash_mla(*inputs(8, 8, jnp.bfloat16), scale=SCALE, implementation='pallas')
    with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
        flash_mla(*served(8, 8), scale=SCALE, implementation='pallas')


@pytest.mark.gpu
@pytest.mark.parametrize('T', [1, 63, 64, 65, 1000, 4096, 8192])
@pytest.mark.parametrize('kind', ['causal', 'documents', 'prefix', 'zigzag', 'zigzag-documents'])
def test_gpu_kernels_give_the_reference(kind, T, monkeypatch):
    """Both passes, through the public function, in memory that held NaNs; the same bits twice."""
    monkeypatch.setattr(reference, 'BLOCK', 512)
    S = T if kind in ('causal', 'documents') else 2 * T
    x, seen, d = served(T, S), sights(kind, T, S), given(T)
    options = {}
    if seen is not None and 'documents' in kind:
        options['first_BT'] = seen.first_BT
    if seen is not None and S > T:
        options['positions_BT'] = seen.last_BT

    def run(implementation, x, d):
        attend = functools.partial(flash_mla, scale=SCALE / 4, implementation=implementation, **options)
        (out, lse), pull = jax.vjp(attend, *x)
        return out, lse, *pull((d[0], jnp.where(jnp.isneginf(lse), 0, d[1])))

    theirs = jax.jit(functools.partial(run, 'reference'))(x, d)
    program = jax.jit(functools.partial(run, 'pallas'))
    ours, poisoned = checks.in_poisoned_memory(lambda: jax.block_until_ready(program(x, d)))
    assert poisoned or T < 8192  # small results may come to lie between others
    assert_same_attention(ours, theirs)
    for once, again in zip(ours, program(x, d), strict=True):
        np.testing.assert_array_equal(np.asarray(once), np.asarray(again))


@pytest.mark.gpu
@pytest.mark.parametrize('zeros', ['queries', 'keys'])
def test_gpu_products_of_registers_are_exact(zeros):
    """Scores are zeros: a query sees the four keys of its group with probability 1/4, and integers have no rounding."""
    T, heads = 512, 3
    rng = np.random.default_rng(0)
    whole = lambda zero, *shape: jnp.asarray(0 if zero else 1, jnp.bfloat16) * rng.integers(-2, 3, shape)  # noqa: E731
    q, k = zeros == 'queries', zeros == 'keys'
    x = reference.Inputs(
        whole(q, B, T, heads, 128),
        whole(q, B, T, heads, 64),
        whole(k, B, T, heads, 128),
        whole(k, B, T, 64),
        whole(False, B, T, heads, 128) * (jnp.arange(128) < 8),  # few terms: eight bits hold what becomes of them
    )
    x = reference.Inputs(*(array.astype(jnp.bfloat16) for array in x))
    d_out = (4 * whole(False, B, T, heads, 128)).astype(jnp.bfloat16)
    first_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // 4 * 4, (B, T))
    seen = sight.Sight(first_BT, first_BT + 3)
    out, lse = sm90.forward(x, seen, 1.0)
    ours = [
        np.asarray(y, np.float64) for y in (out, *sm90.backward(x, seen, 1.0, out, lse, d_out, jnp.zeros_like(lse)))
    ]

    four = lambda y: np.asarray(y, np.float64).reshape(B, T // 4, 4, *y.shape[2:])  # noqa: E731
    q, q_rope, k, k_rope, v = map(four, x)
    g = four(d_out)
    d_p = np.einsum('bgthu,bgshu->bghts', g, v)
    d_s = (d_p - d_p.mean(-1, keepdims=True)) / 4
    everywhere = lambda y: np.broadcast_to(y.mean(2, keepdims=True), y.shape)  # noqa: E731
    wanted = (
        everywhere(v),
        np.einsum('bghts,bgshn->bgthn', d_s, k),
        np.einsum('bghts,bgsr->bgthr', d_s, k_rope),
        np.einsum('bghts,bgthn->bgshn', d_s, q),
        np.einsum('bghts,bgthr->bgsr', d_s, q_rope),
        everywhere(g),
    )
    for label, got, expected in zip(('out', *NAMES), ours, wanted, strict=True):
        expected = np.asarray(jnp.asarray(expected.reshape(got.shape), jnp.bfloat16), np.float64)
        np.testing.assert_array_equal(got, expected, err_msg=label)
    assert np.any(ours[1]) != np.any(ours[3])
