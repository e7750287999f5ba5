"""Cases of `flash_mla`: attention of training and prefill, with the widths of DeepSeek-V3."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import peers
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import JaxWork, TorchWork
from pallas_kernels.flash_mla import api, parts, tuned
from pallas_kernels.flash_mla.reference import Inputs
from pallas_kernels.flash_mla.sight import Sight, causal, key_ranges, of_documents
from pallas_kernels.implementation import Implementation

N, R, U = 128, 64, 128
SCALE = (N + R) ** -0.5
LENGTHS = [(4096, 128), (8192, 64)]  # T, H
DOCUMENTS = 8
CUDNN = 'cuDNN (torch)'
# Useful products of a query and a key, in numbers multiplied: scores and output; and backward five of them.
WORK = {'forward': N + R + U, 'backward': 3 * (N + R) + 2 * U}


def cases(quick: bool) -> list[Case]:
    """Both passes, causal and of packed documents; the quick ones are those of 4096 tokens."""
    sizes = LENGTHS[:1] if quick else LENGTHS
    return [make(name, *size) for name in WORK for size in sizes for make in (plain, packed)]


def plain(name: str, T: int, H: int) -> Case:
    """Causal attention of one row, against cuDNN, whose keys hold a copy of the rotary part for each head."""
    return _case(name, name, T, H, None, {}, CUDNN, functools.partial(_cudnn, name))


def packed(name: str, T: int, H: int) -> Case:
    """Documents of random lengths in one row, against one document: `blocks` of `of` are not skipped."""
    sight = of_documents(documents(T, DOCUMENTS))
    blocks = {'blocks': _blocks(sight), 'of': _blocks(causal(1, T))}
    one = lambda sets: peers.PeerWork(JaxWork(functools.partial(_run, name, None, 'pallas'), sets), None)  # noqa: E731
    return _case(f'{name}, {DOCUMENTS} documents', name, T, H, sight, blocks, 'the same of one document', one)


def documents(T: int, count: int) -> jax.Array:
    """Segments of one row, cut at random places."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, T), count - 1, replace=False))
    return jnp.asarray((np.arange(T)[:, None] >= cuts).sum(-1)[None], jnp.int32)


def _blocks(sight: Sight) -> int:
    ranges = key_ranges(sight, parts.ROWS, tuned.FORWARD.keys, sight.last_BT.shape[1])
    return int(jnp.sum(ranges[..., 3] - ranges[..., 0]))


def _case(label, name, T, H, sight, blocks, peer_name, peer) -> Case:
    seen = sight or causal(1, T)
    pairs = int(jnp.sum(seen.last_BT - seen.first_BT + 1))
    return Case(
        op='flash_mla',
        name=label,
        shape={'T': T, 'H': H} | blocks,
        flops=2 * WORK[name] * H * pairs,
        inputs=functools.partial(_inputs, name, T, H),
        run=lambda *inputs, implementation: _run(name, sight, implementation, *inputs),
        reference=lambda *inputs: _run(name, sight, 'reference', *inputs),
        peer_name=peer_name,
        peer=peer,
    )


def _inputs(name: str, T: int, H: int, key: jax.Array) -> tuple:
    keys = jax.random.split(key, 7)
    shapes = (1, T, H, N), (1, T, H, R), (1, T, H, N), (1, T, R), (1, T, H, U), (1, T, H, U)
    *x, d_out = (jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=False))
    # The time of backward does not depend on what it takes for the results of forward.
    results = d_out, jax.random.uniform(keys[6], (1, H, T), minval=4.0, maxval=6.0)
    return (Inputs(*x),) if name == 'forward' else (Inputs(*x), *results, d_out)


def _run(name: str, sight: Sight | None, implementation: Implementation, x: Inputs, *saved: jax.Array):
    module = api.module(implementation)
    if name == 'forward':
        return module.forward(x, sight, SCALE)
    return module.backward(x, sight, SCALE, *saved, jnp.zeros_like(saved[1]))


def _cudnn(name: str, sets: Sequence[tuple]) -> peers.PeerWork:
    """The same by torch's operators of cuDNN, without what a training framework does around them."""
    torch = peers.load_torch()
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    calls = []
    for x, *saved in sets:
        heads_first = lambda y: peers.to_torch(y).transpose(1, 2)  # noqa: E731
        k_rope = jnp.broadcast_to(x.k_rope_BSR[:, :, None], (*x.k_BSHN.shape[:3], R))
        q, k = jnp.concatenate([x.q_BTHN, x.q_rope_BTHR], -1), jnp.concatenate([x.k_BSHN, k_rope], -1)
        q, k, v = map(heads_first, (q, k, x.v_BSHU))
        call = functools.partial(forward, q, k, v, None, True, 0.0, True, scale=SCALE)
        if name == 'backward':
            out, lse, *cumulated, seed, offset, _ = call()
            d_out = heads_first(saved[2])
            calls.append(
                functools.partial(
                    backward, d_out, q, k, v, out, lse, seed, offset, None, *cumulated, 0.0, True, scale=SCALE
                )
            )
        else:
            calls.append(call)
    if name == 'backward':
        return peers.PeerWork(TorchWork(torch, calls), None)

    def results() -> tuple[jax.Array, jax.Array]:
        out, lse = calls[0]()[:2]
        return peers.from_torch(out.transpose(1, 2).contiguous()), peers.from_torch(lse.reshape(lse.shape[:3]))

    return peers.PeerWork(TorchWork(torch, calls), results)
