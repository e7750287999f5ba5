"""Sequences cut over devices: the step is that of one device, and what travels for attention is what the formula says."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import deepseek_jax as ds
from deepseek_jax import sharding
from deepseek_jax.sharding import ContextParallel
from tests.support import TINY, changed
from tests.train.meshes import ALONE, OnMeshes, relative_difference
from train.parallel import MeshConfig

ROWS, LENGTH = 8, 24
MODEL = dataclasses.replace(TINY, remat='paper')
WIDE, MIXED = MeshConfig(expert=2, context=4), MeshConfig(fsdp=2, expert=2, context=2, zero=3)


def batch() -> dict[str, np.ndarray]:
    """Rows of three documents and padding, cut elsewhere in each, on and beside the borders of chunks of 3 and 6 tokens."""
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (ROWS, LENGTH + 1))
    cuts = [[5, 9, 22], [1, 3, 25], [6, 18, 20], [11, 12, 25], [2, 4, 14], [12, 15, 25], [7, 17, 19], [10, 23, 24]]
    numbers = (np.arange(LENGTH + 1)[None, :, None] >= np.array(cuts)[:, None]).sum(-1)
    segments = np.where(numbers == 3, 0, numbers + 1)
    weights = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32)
    return {'tokens': tokens.astype(np.int32), 'segments': segments.astype(np.int32), 'weights': weights}


STEP = OnMeshes(MODEL, batch(), balance_weight=0.1)


@pytest.mark.parametrize(('config', 'microbatch_size'), [(WIDE, None), (MIXED, 4)], ids=['context_4', 'zero_3'])
def test_loss_and_every_gradient_equal_those_of_one_device(config, microbatch_size):
    STEP.check_gradients(config, microbatch_size)


def test_latents_and_rotary_keys_are_all_that_travels_for_attention():
    """They are gathered in the forward pass and, of blocks that keep their own only, in the backward pass; gradients go back once."""
    _, found = STEP.gradients(WIDE)
    n, layers = WIDE.context, MODEL.num_layers + MODEL.mtp_depth
    values = ROWS // WIDE.row_devices * LENGTH * (MODEL.mla.kv_rank + MODEL.mla.rope_head_dim)
    once = layers * values * 4 * (n - 1) / n
    sent = dict.fromkeys(('all-gather', 'reduce-scatter', 'all-reduce'), 0.0)
    for one in found:
        if re.search(r'\bcontext\b', one.scope):
            sent[one.kind] += one.times * one.sent_bytes
    assert sent['all-gather'] == pytest.approx(2 * once, rel=0.05)
    assert sent['reduce-scatter'] == pytest.approx(once, rel=0.05)
    # Beside them the balance loss counts each sequence's choices, once: the backward pass finds the counts kept.
    assert MODEL.moe is not None
    counts = (layers - MODEL.num_dense_layers) * (ROWS // WIDE.row_devices) * MODEL.moe.num_experts
    assert sent['all-reduce'] == pytest.approx(2 * counts * 4 * (n - 1) / n, rel=0.05)


def test_evaluation_equals_that_of_one_device():
    STEP.check_evaluation(WIDE)


def test_float8_is_within_its_roundings():
    """Forward, tokens are scaled one by one. Gradients of weights see other tiles of tokens, and those of keys and values are
    rounded in parts, one of each device's queries."""
    model = changed(
        MODEL,
        num_layers=1,
        mtp_depth=0,
        model_dim=128,
        mla={'num_heads': 2, 'value_head_dim': 64},
        precision=ds.PrecisionConfig(recipe='fp8'),
    )
    (found, _), (wanted, _) = (STEP.gradients(config, None, model) for config in (MeshConfig(context=2), ALONE))
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4)
    assert relative_difference(found[0], wanted[0]) < 2e-3


@functools.partial(jax.jit, static_argnums=1)
def chunks(tokens_BT: jax.Array, devices: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions and tokens of each device, in order, and what one of them makes of all tokens."""
    context = ContextParallel(devices)

    def local(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        part_Bt = context.part(tokens_BT)
        return context.positions(tokens_BT.shape[1]), part_Bt, context.whole(part_Bt[..., None])[..., 0]

    mesh = sharding.make_mesh(context=devices, devices=jax.devices()[:devices])
    cut = PartitionSpec('context'), PartitionSpec(None, 'context'), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=cut, check_vma=False)(tokens_BT)


def test_every_device_has_an_early_chunk_and_a_late_one():
    tokens_BT = np.random.default_rng(0).integers(0, 100, (2, 12))
    positions, parts_BT, whole_BT = chunks(tokens_BT, 3)
    np.testing.assert_array_equal(positions, [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7])
    np.testing.assert_array_equal(parts_BT, tokens_BT[:, positions])
    np.testing.assert_array_equal(whole_BT, tokens_BT)


def test_a_sequence_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r'length=16 of a sequence must be a multiple of 6, two chunks a device'):
        chunks(np.zeros((2, 16), np.int32), 3)
