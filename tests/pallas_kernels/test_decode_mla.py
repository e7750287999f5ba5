"""Attention over a paged latent cache: the specification against float64, and the Hopper kernel against both."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_mla import sm90
from pallas_kernels.decode_mla.api import LatentPages, decode_mla, quantize_latents
from pallas_kernels.decode_mla.schedule import OVERHEAD, schedule, share
from pallas_kernels.decode_mla.tuned import CombineConfig
from pallas_kernels.fp8 import E4M3
from tests.pallas_kernels.hopper import DEVICE, compile_for_h100, needs_hopper_tools
from tests.pallas_kernels.test_gemm_fp8 import poison

SCALE = 0.07
# In units of the largest output. bfloat16: p and the output are each rounded to 2^-9.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}
RAGGED = (0, 1, 63, 64, 65, 200)


def inputs(lengths, T=1, H=16, L=512, R=64, G=64, fp8=False, dtype=jnp.bfloat16, spare=3, seed=0):
    """Queries, pages in random order with NaN wherever no token is, a table with nonsense past each length."""
    rng = np.random.default_rng([seed, T, H, *lengths])
    B, pages_each = len(lengths), [-(-length // G) for length in lengths]
    W, P = max(pages_each) + 1, sum(pages_each) + spare
    order = rng.permutation(P)
    table = rng.choice([-7, 10**6, order[-1]], (B, W))
    real = np.zeros((P, G), bool)
    for b, (length, pages) in enumerate(zip(lengths, pages_each, strict=True)):
        table[b, :pages], order = order[:pages], order[pages:]
        for i in range(pages):
            real[table[b, i], : length - i * G] = True
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    latent, scales = draw(P * G, L), None
    if fp8:
        latent, scales = jax.jit(quantize_latents)(latent)
    real = real.reshape(-1, 1)
    hide = lambda x: jnp.asarray(np.where(real, x, x.dtype.type(np.nan)).reshape(P, G, -1))  # noqa: E731
    pages = LatentPages(hide(latent), hide(draw(P * G, R)), None if scales is None else hide(scales))
    as_int = functools.partial(jnp.asarray, dtype=jnp.int32)
    return draw(B, T, H, L), draw(B, T, H, R), pages, as_int(table), as_int(lengths)


def expected(q, q_rope, pages, table, lengths):
    """The formula in float64, token by token of the table."""
    q, q_rope = np.asarray(q, np.float64), np.asarray(q_rope, np.float64)
    latent, rope = np.asarray(pages.latent_PGL, np.float64), np.asarray(pages.rope_PGR, np.float64)
    if pages.scales_PGC is not None:
        latent *= np.asarray(pages.scales_PGC, np.float64).repeat(128, -1)[..., : latent.shape[-1]]
    B, T, H, _ = q.shape
    out, lse = np.zeros_like(q), np.full((B, H, T), -np.inf)
    for b, t in np.ndindex(B, T):
        seen = int(lengths[b]) - T + 1 + t
        if seen <= 0:
            continue
        where = [(int(table[b, i // latent.shape[1]]), i % latent.shape[1]) for i in range(seen)]
        keys, rotary = (np.array([x[place] for place in where]) for x in (latent, rope))
        scores = SCALE * (q[b, t] @ keys.T + q_rope[b, t] @ rotary.T)
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        out[b, t], lse[b, :, t] = weights @ keys / total, (top + np.log(total))[:, 0]
    return out, lse


def assert_near(got, wanted, fp8):
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    assert out.shape == wanted_out.shape
    assert lse.dtype == jnp.float32
    atol = TOLERANCE[out.dtype.type] * np.abs(wanted_out).max()
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted_out, rtol=0, atol=atol)
    # Float8 latents are rounded to bfloat16 when they have been multiplied by their scales.
    rounded = fp8 and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(lse), wanted_lse, rtol=0, atol=1e-2 if rounded else 1e-4)


@pytest.mark.parametrize(
    ('T', 'fp8', 'dtype'),
    [(1, False, jnp.bfloat16), (2, False, jnp.float32), (3, True, jnp.float32), (4, True, jnp.bfloat16)],
)
def test_reference_is_the_formula(T, fp8, dtype):
    x = inputs(RAGGED, T, H=3, L=160, R=12, fp8=fp8, dtype=dtype)
    got = jax.jit(functools.partial(decode_mla, scale=SCALE, implementation='reference'))(*x)
    assert got[0].dtype == dtype
    assert_near(got, expected(*x), fp8)


def test_other_page_sizes_and_longer_queries():
    x = inputs((0, 5, 16, 17, 40), T=6, H=2, L=24, R=4, G=16, dtype=jnp.float32)
    assert_near(jax.jit(functools.partial(decode_mla, scale=SCALE))(*x), expected(*x), False)


def test_what_no_query_sees_does_not_count():
    """Zeros in place of the NaN past the lengths, and another table past them, change no bit."""
    q, q_rope, pages, table, lengths = inputs(RAGGED, T=2, H=2, L=24, R=4)
    attend = jax.jit(functools.partial(decode_mla, scale=SCALE))
    first = attend(q, q_rope, pages, table, lengths)
    clean = LatentPages(*(None if x is None else jnp.nan_to_num(x) for x in pages))
    table = np.where(np.arange(table.shape[1]) * 64 < np.asarray(lengths)[:, None], table, 0)
    for got, wanted in zip(attend(q, q_rope, clean, table, lengths), first, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ('lengths', 'blocks'), [(RAGGED, 1), (RAGGED, 3), (RAGGED, 40), ((0, 0), 4), ((64 * 50,), 7), ((1,) * 9, 4)]
)
def test_every_page_is_in_one_share(lengths, blocks):
    plan = jax.jit(schedule, static_argnums=(1, 2))(jnp.asarray(lengths, jnp.int32), 60, blocks)
    starts, first_X, stop_X, seen = plan.starts.tolist(), plan.first_X.tolist(), plan.stop_X.tolist(), []
    size = int(share(plan.starts[-1], blocks))
    for block in range(blocks):
        for b in range(first_X[block], stop_X[block]):
            start = starts[b] + OVERHEAD
            first, stop = (min(max(edge, start), starts[b + 1]) for edge in (block * size, (block + 1) * size))
            seen += [(b, page - start) for page in range(first, stop)]
    assert seen == [(b, page) for b, length in enumerate(lengths) for page in range(-(-length // 64))]
    total = len(seen) + OVERHEAD * len(lengths)
    assert starts[-1] == total
    assert size == max(2, -(-total // blocks))


def test_lengths_past_the_table_are_cut():
    plan = schedule(jnp.array([-5, 1000, 64], jnp.int32), 3, 2)
    assert plan.starts.tolist() == [0, OVERHEAD, 2 * OVERHEAD + 3, 3 * OVERHEAD + 4]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'q_BTHL': lambda q: q[0]}, r'queries \(1, 16, 512\) and .* must be \(B, T, H, L\)'),
        ({'q_rope_BTHR': lambda q: q[:, :, :8]}, r'queries \(2, 1, 16, 512\) and \(2, 1, 8, 64\)'),
        ({'latent_PGL': lambda x: x[:, :32]}, r'pages \(5, 32, 512\) and \(5, 64, 64\) must be \(P, G, L\)'),
        ({'latent_PGL': lambda x: x[:, :, :256]}, r'must be as wide as pages \(5, 64, 256\)'),
        ({'rope_PGR': lambda x: x.astype(jnp.float32)}, 'rotary keys float32: they must all be bfloat16'),
        ({'q_BTHL': lambda q: q.astype(jnp.float16)}, 'queries are float16'),
        ({'latent_PGL': lambda x: x.astype(jnp.float32)}, 'latents are float32, they must be bfloat16'),
        ({'latent_PGL': lambda x: x.astype(E4M3)}, 'float8_e4m3fn latents need scales'),
        ({'scales_PGC': lambda _: jnp.ones((5, 64, 4))}, 'bfloat16 latents take no scales'),
        (
            {'latent_PGL': lambda x: x.astype(E4M3), 'scales_PGC': lambda _: jnp.ones((5, 64, 3))},
            r'scales are float32\(5, 64, 3\).* need float32\(5, 64, 4\)',
        ),
        ({'table_BW': lambda x: x[:1]}, r'the table is int32\(1, 2\), it must be int32 \(B=2, W\)'),
        ({'table_BW': lambda x: x.astype(jnp.uint32)}, 'the table is uint32'),
        ({'lengths_B': lambda x: x[:1]}, r'lengths are int32\(1,\), they must be int32\(2,\)'),
        ({'scale': lambda _: 0.0}, 'scale=0.0 must be positive'),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    q, q_rope, pages, table, lengths = inputs((3, 64))
    given = {'q_BTHL': q, 'q_rope_BTHR': q_rope, 'table_BW': table, 'lengths_B': lengths, 'scale': SCALE}
    given |= pages._asdict()
    given |= {name: function(given[name]) for name, function in change.items()}
    pages = LatentPages(*(given.pop(name) for name in LatentPages._fields))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(decode_mla)(pages=pages, **given)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'dtype': jnp.float32}, 'queries are float32, the kernel serves bfloat16'),
        ({'L': 256}, r'widths are \(256, 64\), the kernel serves \(512, 64\)'),
        ({'R': 32}, r'widths are \(512, 32\)'),
        ({'G': 32}, 'pages have 32 tokens, the kernel serves 64'),
        ({'T': 5}, 'T=5 exceeds 4'),
        ({'H': 8}, 'H=8 must be a multiple of 16 up to 128'),
        ({'H': 144}, 'H=144 must be a multiple of 16 up to 128'),
    ],
)
def test_what_the_kernel_does_not_serve_is_refused_by_name(options, message):
    x = inputs((3, 64), **options)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(NotImplementedError, match=message):
            decode_mla(*x, scale=SCALE, implementation='pallas')
        with pytest.warns(UserWarning, match=message):
            jax.eval_shape(functools.partial(decode_mla, scale=SCALE), *x)


# Lengths, queries, heads, float8, multiprocessors, blocks of a cluster.
INTERPRETED = {
    'cut_twice': ((130, 0, 65), 1, 16, False, 3, 1),
    'queries': ((66, 1), 2, 48, True, 4, 1),
    'cluster': ((70,), 1, 128, False, 4, 2),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize('name', INTERPRETED)
def test_interpreted_kernel_is_the_formula(name, capfd):
    lengths, T, H, fp8, cores, cluster = INTERPRETED[name]
    x = inputs(lengths, T, H, fp8=fp8)
    combine = CombineConfig(rows=T * H // 2, columns=256, ahead=2)
    options = {'cores': cores, 'cluster': cluster, 'combine': combine}
    got = sm90.decode_mla(*x, SCALE, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert_near(got, expected(*x), fp8)
    captured = capfd.readouterr()
    assert 'RACE' not in captured.out + captured.err


def shape(*dimensions: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dimensions, dtype)


@needs_hopper_tools
@pytest.mark.parametrize(
    ('B', 'T', 'H', 'fp8'),
    [(128, 1, 16, False), (128, 1, 64, False), (1, 2, 128, False), (128, 3, 48, True)],
)
def test_kernel_compiles_for_hopper_without_spills(B, T, H, fp8):
    P, scales = 1024, shape(1024, 64, 4, dtype=jnp.float32)
    pages = LatentPages(
        shape(P, 64, 512, dtype=E4M3 if fp8 else jnp.bfloat16), shape(P, 64, 64), scales if fp8 else None
    )
    rows, integers = shape(B, T, H, 512), functools.partial(shape, dtype=jnp.int32)
    operands = rows, shape(B, T, H, 64), pages, integers(B, 80), integers(B)
    report = compile_for_h100(functools.partial(decode_mla, scale=SCALE), *operands)
    assert report.problems() == []
    assert set(report.kernels) == {'decode_mla', 'decode_mla_combine'}
    products = report.kernels['decode_mla'].instructions_in_full
    # 576 columns of scores, 16 at a time, of a part's first page and of the others; 64 tokens of values, 16 at a time,
    # after each of them and of the other warpgroup's pages, the last one apart
    assert (products['HGMMA.64x64x16.F32.BF16'], products['HGMMA.64x256x16.F32.BF16']) == (2 * 36, 4 * 4)


def ragged(count: int, most: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, most, count).tolist())


ON_GPU = {
    'ragged': (ragged(150, 900), 1, 16),
    'more_sequences_than_blocks': (ragged(400, 130), 1, 64),
    'edges': ((*RAGGED, 128, 4096, 2, 3), 1, 128),
    'edges_of_4_queries': (RAGGED * 2, 4, 128),
    'three_queries': (ragged(20, 3000), 3, 32),
    'five_row_blocks': (ragged(9, 2000), 4, 80),
    'one_long': ((20_000,), 1, 128),
    'one_long_of_16_heads': ((20_001,), 2, 16),
    'one_short': ((1,), 1, 16),
    'none': ((0, 0, 0), 2, 64),
}


@pytest.mark.gpu
@pytest.mark.parametrize('fp8', [False, True])
@pytest.mark.parametrize('name', ON_GPU)
def test_gpu_kernel_is_the_formula(name, fp8):
    x = inputs(*ON_GPU[name], fp8=fp8)
    kernel = jax.jit(functools.partial(decode_mla, scale=SCALE, implementation='pallas'))
    for result in jax.eval_shape(kernel, *x):
        poison(result.shape, result.dtype)
    got = kernel(*x)
    # The reference is that formula, for tests above; it takes less time here.
    reference = jax.jit(functools.partial(decode_mla, scale=SCALE, implementation='reference'))
    with jax.default_device(jax.devices('cpu')[0]):
        wanted = tuple(np.asarray(y, np.float64) for y in reference(*jax.device_put(x, jax.devices('cpu')[0])))
    assert_near(got, wanted, fp8)
    for again, first in zip(kernel(*x), got, strict=True):
        np.testing.assert_array_equal(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize('cluster', [1, 2])
def test_gpu_results_do_not_depend_on_the_cluster(cluster):
    x = inputs(ragged(40, 2000), H=128)
    got = jax.jit(lambda *x: sm90.decode_mla(*x, SCALE, cluster=cluster))(*x)
    for one, other in zip(got, decode_mla(*x, scale=SCALE, implementation='pallas'), strict=True):
        np.testing.assert_array_equal(one, other)
